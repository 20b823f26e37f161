# SPDX-License-Identifier: MIT
"""The configuration: every source merged into the settings of the process and a catalogue of models.

Made before step 1 of a request's life. Precedence: command line > environment > names of other deployments in it >
`.env` > models.yaml > defaults. What stands above models.yaml holds for every model in it, but for the choice of the
model and its served names. What lies in the working folder ends no command that does not need it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import is_demo
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry, source_name
from candle_vllm.server.settings.derived import demo_model, mailbox_options
from candle_vllm.server.settings.foreign_variables import (
    HUB_TOKENS,
    SERVING,
    deployment_source,
    dotenv_remarks,
    hub_token_source,
    key_remarks,
)
from candle_vllm.server.settings.models_file import ModelsFile, find_models_file, model_entry
from candle_vllm.server.settings.options import SOCKETS, UsageError, split_host
from candle_vllm.server.settings.sources import SettingsSource, environment_source, merge, read_dotenv
from candle_vllm.server.settings.table import settings_of as settings_of_command

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.options import MailboxOptions

_CHOOSING = frozenset(
    {"model", "weight_path", "weight_file", "served_model_name"}
)  # which model, and what it is called


@dataclass(frozen=True)
class Configuration:
    """What a process was told.

    Attributes:
        settings: of the process and of the model that it starts with.
        catalogue: every model that it may serve; its default is the one that it starts with.
        sources: where settings came from, the strongest first, for `candle-vllm config`.
        models_file: the models.yaml that was read, if any.
        mailbox: how answers are kept, or None.
        in_file: its models are those of models.yaml.
        again: reads everything anew.
        entry_of: one model more, said as in models.yaml, and remarks on it; UsageError where it is wrong.
        remarks: what was given and has no effect, or another than its author may think; each in a sentence.
    """

    settings: Settings
    catalogue: Catalogue
    sources: tuple[SettingsSource, ...]
    models_file: Path | None = None
    mailbox: MailboxOptions | None = None
    remarks: tuple[str, ...] = ()
    in_file: bool = False
    again: Callable[[], Configuration] | None = field(default=None, repr=False, compare=False)
    entry_of: Callable[[Mapping[str, Any], list[str]], ModelEntry] | None = field(
        default=None, repr=False, compare=False
    )


def load_configuration(
    command_line: SettingsSource, environ: Mapping[str, str], *, folder: Path, home: Path, command: str = "serve"
) -> Configuration:
    """Merges all sources.

    Args:
        command_line: values of the flags that were given.
        environ: the process's environment.
        folder: the working folder, where `.env` and models.yaml may lie.
        home: the home folder, where `.candle-vllm/models.yaml` may lie.
        command: which it is for; those that serve nothing pass over what is wrong in files that they do not need.

    Raises:
        UsageError: something in them is wrong; it is named.
    """
    serving, remarks = command in SERVING, list[str]()
    place = folder / ".env"
    dotenv = read_dotenv(place, None if serving else remarks)
    known = None if serving else {option.name for option in settings_of_command(command)}
    variables = {**dotenv, **environ}
    given = [command_line, environment_source(environ, "the environment")]
    own = environment_source(dotenv, str(place), known)
    keyed = bool(merge([*given, own]).keys() & {"api_key", "api_key_file", "api_keys_file"})
    upper = [*given, deployment_source(environ, merge(given), command, keyed=keyed), own]
    hub = hub_token_source(("the environment", environ), (str(place), dotenv))
    merged = merge(upper)
    models_file = _found_models(merged, home, folder, remarks, needed=known is None or "model" in known)
    name = _started(models_file, merged)
    lower = [hub] if models_file is None else [models_file.globals, hub]

    def settings_of(sources: Sequence[SettingsSource]) -> Settings:
        values = merge(sources)
        _settle_port(values, sources)
        values["hf_token"] = _token(values, variables, folder)
        return Settings(**values)

    def entry_of(section: Mapping[str, Any], said: list[str]) -> ModelEntry:
        model, source = model_entry(section, "the request", folder, said)
        settings = settings_of([*(_without(each, _CHOOSING) for each in upper), source, *lower])
        return ModelEntry(model, settings, settings.served_model_name)

    if models_file is None or name is None:
        sources = [*upper, *lower]
        settings = settings_of(sources)
        name_there = source_name(settings, demo_model())  # where another is given, nobody learns of it
        entries = [ModelEntry((*settings.served_model_name, name_there)[0], settings, settings.served_model_name)]
    else:
        sources, entries = [], []
        for model, entry in models_file.models.items():
            kept = {"served_model_name"} if model == name else set[str]()  # others would have the same name
            its = [*(_without(source, _CHOOSING - kept) for source in upper), entry, models_file.params, *lower]
            sources = its if model == name else sources
            settings = settings_of(its)
            entries.append(ModelEntry(model, settings, settings.served_model_name))
    catalogue = Catalogue(entries, name if models_file is not None and name is not None else None)
    settings = catalogue.default.settings
    mailbox = None
    if serving:
        section = models_file.mailbox if models_file else None
        try:
            mailbox = mailbox_options(settings, section, variables, given=merge(sources), home=home)
        except UsageError as error:
            raise UsageError(f"{models_file.path}: {error}" if models_file and section else str(error)) from None
    remarks += [remark for source in upper for remark in source.remarks]
    if serving:
        remarks += models_file.remarks if models_file is not None and name is not None else ()
        remarks += [*dotenv_remarks(dotenv), *key_remarks(settings, environ, dotenv)]
    return Configuration(
        settings,
        catalogue,
        tuple(sources),
        models_file and models_file.path,
        mailbox,
        tuple(dict.fromkeys(remarks)),
        in_file=models_file is not None and name is not None,
        entry_of=entry_of,
        again=partial(load_configuration, command_line, environ, folder=folder, home=home, command=command),
    )


def load_settings(command_line: SettingsSource, environ: Mapping[str, str], *, folder: Path, home: Path) -> Settings:
    """The settings alone, for a process that runs one model; arguments and errors as `load_configuration`."""
    return load_configuration(command_line, environ, folder=folder, home=home).settings


def _found_models(
    merged: Mapping[str, Any], home: Path, folder: Path, remarks: list[str], *, needed: bool
) -> ModelsFile | None:
    """The models.yaml that applies; a wrong file that was not asked for is passed over if no model needs it."""
    explicit, model = merged.get("models_config"), merged.get("model")
    if model is None:
        elsewhere = bool(merged.keys() & {"weight_path", "weight_file"})
    else:
        elsewhere = is_demo(model) or "/" in model or (folder / model).exists()
    try:
        return find_models_file(explicit, home, folder)
    except UsageError as error:
        if explicit is not None or (needed and not elsewhere):
            raise
        remarks.append(f"{error}; nothing of that file is used")
        return None


def _started(models_file: ModelsFile | None, merged: Mapping[str, Any]) -> str | None:
    """Which entry of models.yaml the process starts with; None where the model stands outside of it."""
    name = merged.get("model")
    if models_file is None:
        if name == "default":
            raise UsageError("model 'default' needs a models.yaml with a default_model")
        return None
    if name is None and ("weight_path" in merged or "weight_file" in merged):
        return None
    if name in (None, "default"):
        if name == "default" and models_file.default_model is None:
            raise UsageError(f"model 'default' needs a default_model in {models_file.path}")
        return models_file.default_model or next(iter(models_file.models))
    return name if name in models_file.models else None


def _without(source: SettingsSource, names: frozenset[str]) -> SettingsSource:
    return dataclasses.replace(source, values={key: value for key, value in source.values.items() if key not in names})


def _settle_port(merged: dict[str, Any], sources: Sequence[SettingsSource]) -> None:
    """Of a port inside `host` and a `port`, the one from the stronger source counts."""
    if "host" not in merged or "port" not in merged or merged["host"].startswith(SOCKETS):
        return
    name, inner = split_host(merged["host"])
    if inner is None or inner == merged["port"]:
        return
    rank = {key: next(i for i, source in enumerate(sources) if key in source.values) for key in ("host", "port")}
    if rank["host"] == rank["port"]:
        raise UsageError(f"host {merged['host']!r} and port {merged['port']} name two ports: give one")
    if rank["port"] < rank["host"]:
        merged["host"] = f"[{name}]" if ":" in name else name


def _token(merged: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> str | None:
    """The Hugging Face token: itself, by the name of a variable, from a file, or from HF_TOKEN."""
    if merged.get("hf_token_path") is not None:
        path = folder / merged["hf_token_path"]
        try:
            token = path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError(f"cannot read the Hugging Face token from {path}") from None
        if not token:
            raise UsageError(f"the Hugging Face token file {path} is empty")
        return token
    given = merged.get("hf_token")
    if given is None or given.startswith("hf_") or given in [variables.get(name) for name in HUB_TOKENS]:
        return given
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", given):
        raise UsageError("--hf-token must be a token that begins with hf_, or the name of an environment variable")
    if not variables.get(given):
        raise UsageError(f"--hf-token names the environment variable {given}, which is not set")
    return variables[given]
