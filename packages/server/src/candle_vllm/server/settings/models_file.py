"""models.yaml: named models with their settings, and what candle-vllm's own `parking_lot` section says there.

Read before step 1 of a request's life. A key that is not known is refused with the nearest one that is; what
`parking_lot` has without a counterpart here is refused by name rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.core.setting_kinds import FilePath, Text, nearest
from candle_vllm.server.settings.options import Option, UsageError, known_keys, mapping
from candle_vllm.server.settings.sources import SettingsSource, convert, read_small
from candle_vllm.server.settings.table import OPTIONS

if TYPE_CHECKING:
    import yaml

_MODEL_KEYS = ("name", "hf_id", "local_path", "weight_file", "params", "notes")
_TOP_KEYS = ("models", "default_model", "idle_unload_secs", "mailbox", "parking_lot")
_GLOBAL = ("idle_unload_secs",)
_LOT_KEYS = ("pool", "limits", "queue", "mailbox")
_LOT_LIMITS = {"max_queue_depth": "max_queued_requests", "timeout_secs": "request_timeout"}
_LOT_MAILBOX = ("backend", "retention_secs", "postgres_url", "sqlite_path", "webhook")
_LOT_NOT_HERE = {
    "worker_threads": "--threads sets the engine's threads",
    "max_blocking_threads": "there is no such pool here",
    "thread_stack_size": "there is no such pool here",
    "max_units": "--mem sets the size of the KV cache",
    "queue": "the queue is kept in memory",
    "surreal_path": "the mailbox is kept in SQLite or PostgreSQL",
}


@dataclass(frozen=True)
class ModelsFile:
    """A models.yaml: named models with their settings.

    Attributes:
        path: of the file.
        models: the settings of each model by name.
        default_model: the one that is meant where none is named.
        globals: settings of the file that are not of one model.
        mailbox: the section on the mailbox, as it stands there.
    """

    path: Path
    models: Mapping[str, SettingsSource]
    default_model: str | None
    globals: SettingsSource
    mailbox: Mapping[str, Any] | None = None


def find_models_file(explicit: Path | None, home: Path, folder: Path) -> ModelsFile | None:
    """The models.yaml that applies: the given one, else that of the home folder, else that of the working folder."""
    if explicit is not None:
        path = folder / explicit
        if not path.is_file():
            raise UsageError(f"models file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
        return read_models_file(path)
    for base in (home / ".candle-vllm", folder):
        for name in ("models.yaml", "models.yml"):
            if (base / name).is_file():
                return read_models_file(base / name)
    return None


def read_models_file(path: Path) -> ModelsFile:
    """Parses and checks a models.yaml; every mistake is a UsageError that names the file and the key."""
    import yaml

    try:
        loader = _unique_loader()(read_small(path))
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    content = mapping(content, str(path))
    known_keys(content, _TOP_KEYS, str(path))
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: models must be a list with at least one model")
    models: dict[str, SettingsSource] = {}
    for number, entry in enumerate(entries, 1):
        name, source = _model_entry(mapping(entry, f"{path}: model {number}"), path, number)
        if name in models:
            raise UsageError(f"{path}: two models are called {name!r}")
        models[name] = source
    default = content.get("default_model")
    if default is not None and default not in models:
        raise UsageError(f"{path}: default_model {default!r} is not one of its models{nearest(str(default), models)}")
    return ModelsFile(path, models, default, _globals(content, path), _mailbox(content, path))


def _globals(content: Mapping[str, Any], path: Path) -> SettingsSource:
    """What is not of one model: keys of the top, and candle-vllm's limits."""
    given = {name: content[name] for name in _GLOBAL if name in content}
    if "parking_lot" in content:
        given = {
            **_lot_limits(mapping(content["parking_lot"], f"{path}: parking_lot"), f"{path}: parking_lot"),
            **given,
        }
    values = {
        option.name: convert(option.kind, given[option.name], f"{path}: {option.name}")
        for option in OPTIONS
        if option.name in given
    }
    return SettingsSource(str(path), values, {name: name for name in values})


def _mailbox(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    lot = _lot_mailbox(content["parking_lot"], f"{path}: parking_lot") if "parking_lot" in content else None
    if "mailbox" not in content:
        return lot
    if lot is not None:
        raise UsageError(f"{path}: mailbox and parking_lot.mailbox both set up the mailbox: give one")
    return mapping(content["mailbox"], f"{path}: mailbox")


def _unique_loader() -> type[yaml.SafeLoader]:
    """YAML's safe loader, which also refuses a key that stands twice; yaml itself takes the last one."""
    import yaml

    class UniqueLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {str(key.value)[:60]!r} stands twice", key.start_mark
                    )
                if isinstance(key.value, str):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    return UniqueLoader


def _model_entry(entry: Mapping[str, Any], path: Path, number: int) -> tuple[str, SettingsSource]:
    name = convert(Text(512), entry.get("name"), f"{path}: name of model {number}")
    if name == "default":
        raise UsageError(f"{path}: model {number} cannot be called 'default', which always means default_model")
    title = f"model {name!r} of {path}"
    known_keys(entry, _MODEL_KEYS, title)
    if ("hf_id" in entry) == ("local_path" in entry):
        raise UsageError(f"{title}: give exactly one of hf_id and local_path")
    if "hf_id" in entry:
        model = convert(Text(), entry["hf_id"], f"{title}: hf_id")
    else:
        local = convert(FilePath(), entry["local_path"], f"{title}: local_path")
        model = str(path.parent / local)
    values: dict[str, Any] = {"model": model, "served_model_name": (name,)}
    given_as = {"model": "hf_id" if "hf_id" in entry else "local_path"}
    if "weight_file" in entry:
        values["weight_file"] = convert(Text(), entry["weight_file"], f"{title}: weight_file")
    for key, value in mapping(entry.get("params", {}), f"{title}: params").items():
        option = _yaml_option(key, title)
        values[option.name] = _yaml_value(option, value, f"{title}: {key}", path.parent)
        given_as[option.name] = key
    return name, SettingsSource(title, values, given_as)


def _yaml_option(key: Any, title: str) -> Option:
    options: dict[str, Option] = {}
    for option in OPTIONS:
        if option.in_yaml:
            names = [flag.lstrip("-").replace("-", "_") for flag in option.flags if len(flag) > 3]
            options.update(dict.fromkeys([option.name, *names], option))
    if key not in options:
        raise UsageError(f"{title}: unknown key {str(key)[:60]!r} in params{nearest(str(key), options)}")
    return options[key]


def _yaml_value(option: Option, value: Any, spelled: str, folder: Path) -> Any:
    if option.repeat:
        return tuple(convert(option.kind, item, spelled) for item in (value if isinstance(value, list) else [value]))
    converted = convert(option.kind, value, spelled)
    return folder / converted if isinstance(converted, Path) else converted


def _lot_limits(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings that `limits` and `pool` of `parking_lot` give, by our names; `limits` wins."""
    values: dict[str, Any] = {}
    for part in ("pool", "limits"):
        given = mapping(section.get(part, {}), f"{where}.{part}")
        _known_in_lot(given, _LOT_LIMITS, f"{where}.{part}")
        values |= {_LOT_LIMITS[key]: value for key, value in given.items()}
    return values


def _lot_mailbox(section: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """The `mailbox` of `parking_lot` as `mailbox` of models.yaml has it: `url`, `retention_secs`, `webhook`."""
    _known_in_lot(section, _LOT_KEYS, where)
    given = section.get("mailbox")
    if given is None:
        return None
    where = f"{where}.mailbox"
    _known_in_lot(mapping(given, where), _LOT_MAILBOX, where)
    values = {key: given[key] for key in ("retention_secs", "webhook") if key in given}
    backend = given.get("backend", "memory")
    if backend == "sqlite":
        path = given.get("sqlite_path")
        if not isinstance(path, str):
            raise UsageError(f"{where}: backend sqlite needs its sqlite_path")
        return {**values, "url": f"sqlite:///{path}"}
    if backend == "postgres":
        if not isinstance(given.get("postgres_url"), str):
            raise UsageError(f"{where}: backend postgres needs its postgres_url")
        return {**values, "url": given["postgres_url"]}
    if backend == "memory":
        return {**values, "url": "sqlite"}
    raise UsageError(f"{where}: backend must be memory, sqlite or postgres, not {backend!r:.60}")


def _known_in_lot(section: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in section:
        if key in _LOT_NOT_HERE:
            raise UsageError(f"{where}: {key} is not supported: {_LOT_NOT_HERE[key]}; leave it out")
        known_keys((key,), known, where)
