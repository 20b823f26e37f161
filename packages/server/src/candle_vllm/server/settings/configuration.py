# SPDX-License-Identifier: MIT
"""The configuration: merges all sources into the settings of the process and the catalogue of models.

Precedence: command line > `CANDLE_VLLM_*` > other environment variables > `.env` > models.yaml > `HF_TOKEN` >
defaults. Sources above models.yaml apply to every model in it, except for the choice of the model, and for a served
name or weight file, which only that model gets. An invalid file that no setting names stops only commands that need it.
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
from candle_vllm.server.settings import foreign_variables as variables_of
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry, source_name
from candle_vllm.server.settings.commands import COMMANDS
from candle_vllm.server.settings.derived import demo_model, mailbox_options
from candle_vllm.server.settings.models_file import ModelsFile, find_models_file, model_entry
from candle_vllm.server.settings.options import SOCKETS, UsageError, split_host
from candle_vllm.server.settings.sources import SettingsSource, environment_source, merge, read_dotenv

if TYPE_CHECKING:
    from candle_vllm.server.mailbox.options import MailboxOptions

_CHOOSING = frozenset({"model", "weight_path", "weight_file", "served_model_name"})
"""Settings that select the model, its file and its names."""


@dataclass(frozen=True)
class Configuration:
    """The complete configuration of a process.

    Attributes:
        settings: settings of the process and of its default model.
        catalogue: every model that the process may serve; its default is the model that the process starts with.
        sources: sources of these settings, the highest precedence first, for `candle-vllm config`.
        models_file: the models.yaml that was read, if any.
        mailbox: settings of the mailbox, or None.
        in_file: whether the models are from models.yaml.
        again: loads the configuration again.
        entry_of: builds another entry from a section in the format of models.yaml; adds remarks or raises UsageError.
        remarks: warnings about settings without effect, or with a surprising effect.
        unlisted: settings for models that have no entry in models.yaml, such as downloaded models.
    """

    settings: Settings
    unlisted: Settings
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
    command_line: SettingsSource, environ: Mapping[str, str], *, folder: Path, home: Path, command: str = "serve",
    remote: bool = False
) -> Configuration:  # fmt: skip
    """Merge all sources; UsageError, which names the source, if one is invalid.

    Args:
        folder: the working folder, which may contain `.env` and models.yaml.
        home: the home folder, which may contain `.candle-vllm/models.yaml`.
        command: the command; one that does not serve ignores errors in files that it does not need.
        remote: whether another server has the model, so that models.yaml does not apply.
    """
    serving, remarks = COMMANDS[command].serves_models, list[str]()
    dotenv_path = folder / ".env"
    dotenv = read_dotenv(dotenv_path, None if serving else remarks)
    known = None if serving else {option.name for option in COMMANDS[command].settings}
    variables = {**dotenv, **environ}
    given = [command_line, environment_source(environ, "the environment")]
    own = environment_source(dotenv, str(dotenv_path), known)
    keyed = bool(merge([*given, own]).keys() & {"api_key", "api_key_file", "api_keys_file"})
    upper = [*given, variables_of.deployment_source(environ, merge(given), command, keyed=keyed), own]
    hub = variables_of.hub_token_source(("the environment", environ), (str(dotenv_path), dotenv))
    merged = merge(upper)
    needed = known is None or "model" in known
    models_file = None if remote else _found_models(merged, home, folder, remarks, needed=needed)
    name = None if remote else _started(models_file, merged)
    lower = [hub] if models_file is None else [models_file.globals, hub]
    listed = None if name is None else models_file  # the file, if it has the model

    def settings_of(sources: Sequence[SettingsSource]) -> Settings:
        values = merge(sources)
        _choose_port(values, sources)
        values["hf_token"] = _token(values, variables, folder)
        return Settings(**values)

    def settings_of_other(*sources: SettingsSource) -> Settings:
        defaults = [] if listed is None else [listed.params]
        return settings_of([*(_without(each, _CHOOSING) for each in upper), *sources, *defaults, *lower])

    def entry_of(section: Mapping[str, Any], remarks: list[str]) -> ModelEntry:
        model, source = model_entry(section, "the request", folder, remarks)
        settings = settings_of_other(source)
        return ModelEntry(model, settings, settings.served_model_name)

    if listed is None:
        sources = [*upper, *lower]
        settings = settings_of(sources)
        name_there = source_name(settings, demo_model())  # unused if a served name is set
        entries = [ModelEntry((*settings.served_model_name, name_there)[0], settings, settings.served_model_name)]
    else:
        sources, entries = [], []
        for model, entry in listed.models.items():
            kept = {"served_model_name", "weight_file"} if model == name else set[str]()  # models must not share them
            its = [*(_without(source, _CHOOSING - kept) for source in upper), entry, listed.params, *lower]
            sources = its if model == name else sources
            settings = settings_of(its)
            entries.append(ModelEntry(model, settings, settings.served_model_name))
    catalogue = Catalogue(entries, name)
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
        remarks += () if listed is None else listed.remarks
        remarks += [*variables_of.dotenv_remarks(dotenv), *variables_of.key_remarks(settings, environ, dotenv)]
    return Configuration(
        settings,
        dataclasses.replace(settings_of_other(), download_dir=settings.download_dir),
        catalogue,
        tuple(sources),
        models_file.path if models_file else None,
        mailbox,
        tuple(dict.fromkeys(remarks)),
        in_file=listed is not None,
        entry_of=entry_of,
        again=partial(load_configuration, command_line, environ, folder=folder, home=home, command=command),
    )


def load_settings(command_line: SettingsSource, environ: Mapping[str, str], *, folder: Path, home: Path) -> Settings:
    """Return only the settings, for a process with one model; see `load_configuration`."""
    return load_configuration(command_line, environ, folder=folder, home=home).settings


def _found_models(
    merged: Mapping[str, Any], home: Path, folder: Path, remarks: list[str], *, needed: bool
) -> ModelsFile | None:
    """Return the models.yaml that applies; ignore an invalid file that is neither named explicitly nor needed."""
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
        remarks.append(f"{error}; the file is ignored")
        return None


def _started(models_file: ModelsFile | None, merged: Mapping[str, Any]) -> str | None:
    """Return the entry of models.yaml that the process starts with; None if its model is not in the file."""
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


def _choose_port(merged: dict[str, Any], sources: Sequence[SettingsSource]) -> None:
    """Choose between the port in `host` and `port`: the source with higher precedence decides."""
    if "host" not in merged or "port" not in merged or merged["host"].startswith(SOCKETS):
        return
    name, inner = split_host(merged["host"])
    if inner is None or inner == merged["port"]:
        return
    place = {key: next(i for i, source in enumerate(sources) if key in source.values) for key in ("host", "port")}
    if place["host"] == place["port"]:
        raise UsageError(f"host {merged['host']!r} and port {merged['port']} name two ports: give one")
    if place["port"] < place["host"]:
        merged["host"] = f"[{name}]" if ":" in name else name


def _token(merged: Mapping[str, Any], variables: Mapping[str, str], folder: Path) -> str | None:
    """Return the Hugging Face token: the setting's value, or the content of the variable or file that it names."""
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
    if given is None or given.startswith("hf_") or given in [variables.get(name) for name in variables_of.HUB_TOKENS]:
        return given
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", given):
        raise UsageError("--hf-token must be a token that begins with hf_, or the name of an environment variable")
    if not variables.get(given):
        raise UsageError(f"--hf-token names the environment variable {given}, which is not set")
    return variables[given]
