# SPDX-License-Identifier: MIT
"""`SettingsSource`, the values of one source; reading the environment, `.env` and YAML; and which source decides.

Sources are read before step 1 of a request's life. Each becomes a `SettingsSource`: typed values by setting name. An
unknown name is an error with the nearest known name, or a remark if only some settings are used.
"""

from __future__ import annotations

import io
import os
import re
import select
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.core.setting_kinds import nearest
from candle_vllm.server.settings.options import ENV_PREFIX, Section, UsageError, convert
from candle_vllm.server.settings.original_keys import original_variable
from candle_vllm.server.settings.table import BY_NAME, OPTIONS

if TYPE_CHECKING:
    import yaml

_MAX_FILE = 1 << 20  # maximum bytes of .env, models.yaml and key files
_ADAPTER = re.compile(r'\s*{(?:"(?:\\.|[^"\\])*"|[^"{}])*}\s*|[^,]+')  # JSON, which may have commas, or name=path
_KUBERNETES = re.compile(r"CANDLE_VLLM(_\w+)?_(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_\w+)?)")


@dataclass(frozen=True)
class SettingsSource:
    """Typed values from one source, by setting name; `title` is its name for messages.

    `given_as` has the spelling of each setting in the source, and `remarks` are sentences about entries that have no
    effect, or a surprising one.
    """

    title: str
    values: Mapping[str, Any] = field(default_factory=dict)
    given_as: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def environment_source(variables: Mapping[str, str], title: str, known: Container[str] | None = None) -> SettingsSource:
    """Read the `CANDLE_VLLM_*` variables; ignore other variables and `CANDLE_VLLM_TEST_*`.

    `title` names the source in messages. `known` are the settings that are used (None: all); errors in other settings
    and unknown variables become remarks.

    Raises UsageError if a used setting's variable is invalid, or a variable is a Kubernetes service link or (without
    `known`) unknown.
    """
    options = {option.env: option for option in OPTIONS}
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    remarks: list[str] = []
    idle: dict[str, list[str]] = {}
    for name, text in variables.items():
        if not name.startswith(ENV_PREFIX) or name.startswith(ENV_PREFIX + "TEST_"):
            continue
        if _KUBERNETES.fullmatch(name) and ("://" in text or name not in options):
            raise UsageError(
                f"{name} in {title} looks like a Kubernetes service link of a service whose name begins with "
                "candle-vllm: set enableServiceLinks: false in the pod, or give the service another name"
            )
        spelled, option = f"{name} in {title}", options.get(name)
        if text.startswith("/path/to/") and not Path(text).exists():
            remarks.append(f"{spelled} is still the example's {text:.80}: it is not used")
            continue
        try:
            if option is not None:
                if option.repeat:
                    parts = _ADAPTER.findall(text) if option.name == "lora_modules" else text.split(",")
                    values[option.name] = tuple(convert(option.kind, part.strip(), spelled) for part in parts)
                else:
                    values[option.name] = convert(option.kind, text, spelled)
                given_as[option.name] = name
                continue
            theirs = original_variable(name, text, spelled, variables)
            if theirs is None:
                raise UsageError(f"unknown variable {spelled}{nearest(name, options)}")
        except UsageError as error:
            if known is None or (option is not None and option.name in known):
                raise
            remarks.append(str(error))
            continue
        if isinstance(theirs, str):
            idle.setdefault(theirs, []).append(name)
        elif BY_NAME[theirs[0]].env not in variables:
            values[theirs[0]], given_as[theirs[0]] = theirs[1], name
    if known is None:
        remarks += [f"{', '.join(names)} in {title}: no effect, because {why}" for why, names in idle.items()]
    return SettingsSource(title, values, given_as, tuple(remarks))


def read_dotenv(path: Path, wrong: list[str] | None = None) -> dict[str, str]:
    """Read the assignments of a `.env` file; returns {} without one, or for a folder. `${...}` is not expanded.

    An invalid line or file is a UsageError; if `wrong` is given, it is skipped, and its message added to `wrong`.
    """
    if path.is_dir() or not (path.exists() or path.is_symlink()):  # some name a virtual environment .env
        return {}
    from dotenv.parser import parse_stream

    assignments: dict[str, str] = {}
    try:
        text = read_small(path)
    except UsageError as error:
        if wrong is None:
            raise
        wrong.append(f"{error}; the file is ignored")
        return {}
    for binding in parse_stream(io.StringIO(text)):
        if binding.key is not None and binding.value is not None and not binding.error:
            assignments[binding.key] = binding.value
        elif binding.error or binding.key is not None:
            what = "not a line of the form NAME=value" if binding.error else f"{binding.key} has no value"
            message = f"{path}, line {binding.original.line}: {what}"
            if wrong is None:
                raise UsageError(message)
            wrong.append(message)
    return assignments


def read_small(path: Path) -> str:
    """Read a settings file of at most a megabyte; UsageError, also for a missing file."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                if not select.select([file], [], [], 30)[0]:  # seconds
                    raise UsageError(f"cannot read {path}: no program writes to this pipe")
                os.set_blocking(file.fileno(), True)
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:
            raise UsageError(f"{path} is larger than {_MAX_FILE >> 20} MB")
        return content.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None


def read_text(path: Path, called: str, encoding: str = "utf-8") -> str:
    """Read a text file that an option names; the UsageError of an unreadable file says what it is `called`."""
    try:
        return path.read_text(encoding)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {called} {path}: {reason}") from None


def read_yaml(path: Path, *, secret: bool = False) -> Any:
    """Parse a YAML settings file, with its mappings as `Section`; if it is `secret`, no message repeats its content.

    UsageError, which names the line if it is known, if it is unreadable, not YAML or has a key twice.
    """
    import yaml

    try:
        loader = _loader()(read_small(path))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = "" if secret else f": {getattr(error, 'problem', error)}"
        raise UsageError(f"{path}{where}: not valid YAML{reason}") from None
    except RecursionError:
        raise UsageError(f"{path}: not valid YAML: it is nested too deeply") from None


def _loader() -> type[yaml.SafeLoader]:
    """Return PyYAML's safe loader with line numbers; it refuses duplicate keys, of which PyYAML would take the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError) as error:  # a date such as 2026-02-30, `!!bool foo`
                raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # the parent class refuses others
                if not isinstance(key.value, str):
                    continue  # the parent class refuses a mapping or list as key
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {str(key.value)[:60]!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    def section(loader: Loader, node: yaml.MappingNode) -> Iterator[Section]:
        made = Section()
        yield made  # its content may refer to it
        made.line = node.start_mark.line + 1
        made.update(loader.construct_mapping(node))
        made.lines = {key.value: key.start_mark.line + 1 for key, _ in node.value if isinstance(key.value, str)}

    Loader.add_constructor("tag:yaml.org,2002:map", section)
    return Loader


def merge(sources: Sequence[SettingsSource]) -> dict[str, Any]:
    """Return the value of each setting from its first source; of rivals (`Option.rivals`), only the first source's."""
    return {name: source.values[name] for name, source in origins(sources).items()}


def origins(sources: Sequence[SettingsSource]) -> dict[str, SettingsSource]:
    """Return the source that decides each setting; UsageError if one source sets two rivals."""
    deciding: dict[str, SettingsSource] = {}
    taken: set[str] = set()
    for source in sources:
        rivals: dict[str, str] = {}
        for name in source.values:
            group = BY_NAME[name].rivals or name
            if group in rivals:
                spelled = [source.given_as.get(each, each) for each in (rivals[group], name)]
                raise UsageError(f"{spelled[0]} and {spelled[1]} both set the {group}: give one ({source.title})")
            rivals[group] = name
            if group not in taken:
                deciding[name] = source
        taken.update(rivals)
    return deciding
