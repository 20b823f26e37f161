"""Where settings come from besides the command line: the environment, `.env` and models.yaml.

Read before step 1 of a request's life. Every source becomes a `Source`: typed values by setting name. A name that
is not in the table is an error with the nearest one that is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.server import parking_lot
from candle_vllm.server.flags import ENV_PREFIX, OPTIONS, Option
from candle_vllm.server.kinds import FilePath, Kind, Text, UsageError, nearest

if TYPE_CHECKING:
    import yaml

_MAX_FILE = 1 << 20  # bytes of .env and models.yaml
_MODEL_KEYS = ("name", "hf_id", "local_path", "weight_file", "params", "notes")
_TOP_KEYS = ("models", "default_model", "idle_unload_secs", "mailbox", "parking_lot")
_GLOBAL = ("idle_unload_secs",)
_KUBERNETES = re.compile(r"CANDLE_VLLM(_\w+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_\w+)?)")


@dataclass(frozen=True)
class Source:
    """Values that one source gives.

    Attributes:
        title: what the source is, for messages.
        values: typed values by setting name.
        given_as: how each setting was spelled there, for messages.
    """

    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    given_as: Mapping[str, str] = field(default_factory=dict)


def convert(kind: Kind, value: Any, spelled: str) -> Any:
    """`value` as its kind wants it, from text or from a typed YAML value; UsageError names how it was spelled."""
    try:
        if isinstance(value, str):
            return kind.from_text(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return kind.from_text(str(value))
        return kind.check(value)
    except ValueError as error:
        raise UsageError(f"{spelled} {error}") from None


def environment_source(variables: Mapping[str, str], title: str) -> Source:
    """The `CANDLE_VLLM_*` variables; other variables are none of our business."""
    options = {option.env: option for option in OPTIONS}
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, text in variables.items():
        if not name.startswith(ENV_PREFIX) or name.startswith(ENV_PREFIX + "TEST_"):
            continue
        if _KUBERNETES.fullmatch(name) and ("://" in text or name not in options):
            raise UsageError(
                f"{name} in {title} looks like a Kubernetes service link of a service called candle-vllm:"
                " set enableServiceLinks: false in the pod, or name the service otherwise"
            )
        if name not in options:
            raise UsageError(f"unknown variable {name} in {title}{nearest(name, options)}")
        option = options[name]
        spelled = f"{name} in {title}"
        parts = [part.strip() for part in text.split(",")] if option.repeat else [text]
        converted = [convert(option.kind, part, spelled) for part in parts]
        values[option.name] = tuple(converted) if option.repeat else converted[0]
        given_as[option.name] = name
    return Source(title, values, given_as)


def read_dotenv(path: Path) -> dict[str, str]:
    """The assignments of a `.env` file; an empty mapping where there is no such file. `${...}` is not expanded."""
    if not path.is_file():
        return {}
    import io

    from dotenv.parser import parse_stream

    assignments: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_read_small(path))):
        if binding.error:
            raise UsageError(f"{path}, line {binding.original.line}: not a line of the form NAME=value")
        if binding.key is not None:
            if binding.value is None:
                raise UsageError(f"{path}, line {binding.original.line}: {binding.key} has no value")
            assignments[binding.key] = binding.value
    return assignments


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
    models: Mapping[str, Source]
    default_model: str | None
    globals: Source
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
        loader = _unique_loader()(_read_small(path))
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    content = _mapping(content, str(path))
    _known_keys(content, _TOP_KEYS, str(path))
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: models must be a list with at least one model")
    models: dict[str, Source] = {}
    for number, entry in enumerate(entries, 1):
        name, source = _model_entry(_mapping(entry, f"{path}: model {number}"), path, number)
        if name in models:
            raise UsageError(f"{path}: two models are called {name!r}")
        models[name] = source
    default = content.get("default_model")
    if default is not None and default not in models:
        raise UsageError(f"{path}: default_model {default!r} is not one of its models{nearest(str(default), models)}")
    return ModelsFile(path, models, default, _globals(content, path), _mailbox(content, path))


def _globals(content: Mapping[str, Any], path: Path) -> Source:
    """What is not of one model: keys of the top, and candle-vllm's limits."""
    given = {name: content[name] for name in _GLOBAL if name in content}
    if "parking_lot" in content:
        given = {**parking_lot.limits_of(content["parking_lot"], f"{path}: parking_lot"), **given}
    values = {
        option.name: convert(option.kind, given[option.name], f"{path}: {option.name}")
        for option in OPTIONS
        if option.name in given
    }
    return Source(str(path), values, {name: name for name in values})


def _mailbox(content: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    lot = parking_lot.mailbox_of(content["parking_lot"], f"{path}: parking_lot") if "parking_lot" in content else None
    if "mailbox" not in content:
        return lot
    if lot is not None:
        raise UsageError(f"{path}: mailbox and parking_lot.mailbox both set up the mailbox: give one")
    return _mapping(content["mailbox"], f"{path}: mailbox")


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


def _model_entry(entry: Mapping[str, Any], path: Path, number: int) -> tuple[str, Source]:
    name = convert(Text(512), entry.get("name"), f"{path}: name of model {number}")
    if name == "default":
        raise UsageError(f"{path}: model {number} cannot be called 'default', which always means default_model")
    title = f"model {name!r} of {path}"
    _known_keys(entry, _MODEL_KEYS, title)
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
    for key, value in _mapping(entry.get("params", {}), f"{title}: params").items():
        option = _yaml_option(key, title)
        values[option.name] = _yaml_value(option, value, f"{title}: {key}", path.parent)
        given_as[option.name] = key
    return name, Source(title, values, given_as)


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


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values")
    return value


def _known_keys(mapping: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in mapping:
        if key not in known:
            raise UsageError(f"{where}: unknown key {str(key)[:60]!r}{nearest(str(key), known)}")


def _read_small(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise UsageError(f"{path} is larger than {_MAX_FILE >> 20} MB")
        return content.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
