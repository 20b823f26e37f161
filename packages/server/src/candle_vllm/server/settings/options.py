"""What a setting is: its name, flags, kind and help; those of the engine are told in the table of `EngineConfig`.

Read before step 1 of a request's life.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from candle_vllm.core import config as core
from candle_vllm.server.settings.kinds import Boolean, Choice, Device, FilePath, Integer, Kind, Number, Text

ENV_PREFIX = "CANDLE_VLLM_"
COMMANDS = {
    "serve": "serve the model over HTTP (what happens without a command)",
    "generate": "continue one prompt on the terminal",
    "chat": "talk with the model on the terminal",
    "agent": "carry out one request with the tools of MCP servers",
    "bench": "measure the model on this machine",
    "quantize": "write the model as a GGUF file, quantised or plain",
    "config": "show every setting, and where its value comes from",
}
MODEL, DEVICE, LIMITS, SAMPLING, MODELS, MAILBOX, RESPONSES, TOOLS, HTTP, LOGGING = (
    "model", "device and memory", "scheduling", "default sampling", "several models", "mailbox and webhooks",
    "kept responses", "MCP tools", "HTTP server", "logging",
)  # fmt: skip
GROUPS = (MODEL, DEVICE, LIMITS, SAMPLING, MODELS, MAILBOX, RESPONSES, TOOLS, HTTP, LOGGING)
COMMAND_GROUPS: Mapping[str, tuple[str, ...]] = {
    "serve": GROUPS,
    "generate": (MODEL, DEVICE, LIMITS, SAMPLING, LOGGING),
    "chat": (MODEL, DEVICE, LIMITS, SAMPLING, LOGGING),
    "agent": (MODEL, DEVICE, LIMITS, SAMPLING, TOOLS, LOGGING),
    "bench": (MODEL, DEVICE, LIMITS, LOGGING),
    "quantize": (MODEL, LOGGING),
    "config": GROUPS,
}


@dataclasses.dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: field of `Settings`; upper-cased after `CANDLE_VLLM_`, the environment variable.
        group: heading in the help.
        flags: flags that take a value, in the order of the help.
        kind: how its values are read and checked.
        help: what it does, for `--help`.
        metavar: what stands for the value in the help.
        constants: flags without a value, and the value that each means.
        repeat: the flag may be given several times; in the environment, values are separated by commas.
        in_yaml: may stand among `params` of a model in models.yaml.
        rivals: name of the set of settings of which one source may give only one.
        commands: those that the setting acts on, among those that have its group; the others do not know its flags.
        default: what it is where nobody gives it; None leaves it to the engine, the model or the machine.
        engine: the field of `EngineConfig` that takes it as it is.
    """

    name: str
    group: str
    flags: tuple[str, ...]
    kind: Kind
    help: str
    metavar: str = ""
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeat: bool = False
    in_yaml: bool = False
    rivals: str | None = None
    commands: tuple[str, ...] = tuple(COMMANDS)
    default: Any = None
    engine: str | None = None

    @property
    def env(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.upper()


Told = Callable[[str, Any], Option]
"""A setting but for its name and its default."""


def switch(name: str, group: str, text: str, off: tuple[str, ...] = (), **more: Any) -> Option:
    """An option that is on or off: `--name` and `--no-name`, or others that switch it off."""
    flag = "--" + name.replace("_", "-")
    constants = {flag: True, **dict.fromkeys(off or (f"--no-{flag[2:]}",), False)}
    return Option(name, group, (), Boolean(), text, constants=constants, **more)


def own(group: str, kind: Kind, text: str, metavar: str = "", **more: Any) -> Told:
    """A setting that the server alone has."""

    def told(name: str, default: Any) -> Option:
        if isinstance(kind, Boolean):
            return switch(name, group, text, default=default, **more)
        given = {"flags": ("--" + name.replace("_", "-"),), **more}
        return Option(
            name, group, kind=kind, help=text, metavar=metavar, repeat=default == (), default=default, **given
        )

    return told


def engine(
    group: str, metavar: str = "", *, name: str = "", text: str = "", more: str = "",
    reading: Mapping[str, Any] | None = None, **others: Any,
) -> Told:  # fmt: skip
    """A setting that `EngineConfig` has, under the same name or under `name`.

    What it may hold and its help are told there; `text` stands for that help, `more` is added to it, and `reading`
    says how its kind is spelled here. It may stand in models.yaml.
    """

    def told(field: str, default: Any) -> Option:
        setting = core.SETTINGS[name or field]
        kind = dataclasses.replace(_kind(setting.limits), **(reading or {}))
        given = {"in_yaml": True, "engine": setting.name, **others}
        return own(group, kind, (text or setting.help) + more, metavar, **given)(field, default)

    return told


def _kind(limits: core.Limits) -> Any:
    """How what the engine takes is read from a text."""
    match limits:
        case core.Whole():
            return Integer(limits.low, limits.high)
        case core.Real():
            return Number(limits.low, limits.high, open_low=True, open_high=not limits.closed)
        case core.OneOf():
            return Choice(limits.names, {})
        case core.Device():
            return Device()
        case core.Switch():
            return Boolean()
        case core.Folder():
            return FilePath()
    return Text()
