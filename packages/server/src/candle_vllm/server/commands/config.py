"""`candle-vllm config`: every setting with its value and where that comes from; loads nothing."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from candle_vllm.core.setting_kinds import Secret
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.options import GROUPS, Option
from candle_vllm.server.settings.sources import origins
from candle_vllm.server.settings.table import OPTIONS

DEFAULT = "default"
HIDDEN = "***"


@dataclasses.dataclass(frozen=True)
class Effective:
    """One setting as it counts.

    Attributes:
        option: the setting.
        value: as JSON has it; secrets are hidden.
        source: where it comes from, "default" where nobody gave it.
    """

    option: Option
    value: Any
    source: str


def config(configuration: Configuration, *, as_json: bool = False) -> int:
    """Prints the settings of the model that the server would start with, and the other models' names."""
    settings = effective(configuration)
    models = [entry.names for entry in configuration.catalogue.entries]
    mailbox = None if configuration.mailbox is None else _mailbox(configuration.mailbox)
    if as_json:
        values = {each.option.name: {"value": each.value, "from": each.source} for each in settings}
        content = {"settings": values, "models": [list(names) for names in models], "mailbox": mailbox}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        sys.stdout.write(_table(settings, models, configuration.models_file, mailbox))
    return 0


def _mailbox(options: MailboxOptions) -> dict[str, Any]:
    """The mailbox as it will be, models.yaml's section included; what may hold a secret is hidden."""

    def shown(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return {each.name: shown(getattr(value, each.name)) if each.repr else HIDDEN for each in fields}
        return list(value) if isinstance(value, tuple) else value

    return shown(options)


def effective(configuration: Configuration) -> list[Effective]:
    """Every setting, in the order of the help."""
    deciding = origins(configuration.sources)
    found = []
    for option in sorted(OPTIONS, key=lambda option: GROUPS.index(option.group)):
        source = deciding.get(option.name)
        spelled = "" if source is None else f" ({source.given_as.get(option.name, option.name)})"
        found.append(
            Effective(
                option, _shown(option, configuration.settings), DEFAULT if source is None else source.title + spelled
            )
        )
    return found


def _shown(option: Option, settings: Settings) -> Any:
    value = getattr(settings, option.name)
    if isinstance(option.kind, Secret) and value and value != getattr(Settings(), option.name):
        return [HIDDEN] * len(value) if option.repeat else HIDDEN
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _table(
    settings: list[Effective],
    models: list[tuple[str, ...]],
    models_file: Path | None,
    mailbox: dict[str, Any] | None,
) -> str:
    width = max(len(each.option.name) for each in settings)
    lines = [f"models.yaml: {models_file or 'none'}", f"models: {'; '.join(', '.join(names) for names in models)}"]
    group = ""
    for each in settings:
        if each.option.group != group:
            group = each.option.group
            lines += ["", f"{group}:"]
        value = "-" if each.value is None or each.value == [] else json.dumps(each.value, ensure_ascii=False)
        lines.append(f"  {each.option.name:{width}}  {value:24}  {each.source}")
    if mailbox is not None:
        lines += ["", "the mailbox, with what models.yaml says of it:"]
        lines += [f"  {name:{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in mailbox.items()]
    return "\n".join(lines) + "\n"
