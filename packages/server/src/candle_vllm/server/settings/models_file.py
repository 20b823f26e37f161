# SPDX-License-Identifier: MIT
"""models.yaml: named models with their settings; `original_keys` reads the keys of the Rust candle-vllm.

The file is read at start and on reload. An unknown key is an error that names the nearest known key, a null value sets
nothing, and a key without effect causes a remark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candle_vllm.core.config import DEMO
from candle_vllm.core.setting_kinds import FilePath, Kind, Located, Text, nearest
from candle_vllm.server.settings.adapters import make_spec, spec_text
from candle_vllm.server.settings.options import Option, UsageError, convert, known_keys, line_of
from candle_vllm.server.settings.original_keys import (
    MODEL_KEYS,
    given,
    lot_limits,
    lot_mailbox,
    model_params,
    our_params,
)
from candle_vllm.server.settings.sources import SettingsSource, read_yaml
from candle_vllm.server.settings.table import OPTIONS

_MODEL_KEYS = ("name", "hf_id", "local_path", "weight_file", "params", "adapters", "notes", *MODEL_KEYS)
_TOP_KEYS = ("models", "default_model", "idle_unload_secs", "mailbox", "parking_lot", "global_params")
_GLOBAL = ("idle_unload_secs",)


@dataclass(frozen=True)
class ModelsFile:
    """A models.yaml: named models with their settings.

    Attributes:
        default_model: the model for requests that name no model.
        globals: settings of the file that do not belong to one model.
        params: defaults for its models (`global_params`).
    """

    path: Path
    models: Mapping[str, SettingsSource]
    default_model: str | None
    globals: SettingsSource
    params: SettingsSource
    mailbox: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = ()


def find_models_file(explicit: Path | None, home: Path, folder: Path) -> ModelsFile | None:
    """Read the models.yaml that applies: the given one, else the first in ~/.candle-vllm and the working folder."""
    if explicit is not None:
        return read_models_file(folder / explicit)
    paths = [base / name for base in (home / ".candle-vllm", folder) for name in ("models.yaml", "models.yml")]
    found = [path for path in paths if (path.exists() or path.is_symlink()) and not path.is_char_device()]  # /dev/null
    return read_models_file(found[0]) if found else None


def read_models_file(path: Path) -> ModelsFile:
    """Parse and check a models.yaml; the UsageError for an error names the file, the line and the key."""
    content, remarks = given(read_yaml(path), str(path)), list[str]()
    known_keys(content, _TOP_KEYS, str(path))
    entries = content.get("models")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: models must be a list with at least one model")
    models: dict[str, SettingsSource] = {}
    for number, entry in enumerate(entries, 1):
        name, source = model_entry(given(entry, f"{path}: model {number}"), str(path), path.parent, remarks, number)
        if name in models:
            raise UsageError(f"{path}{line_of(entry)}: two models are called {name!r}")
        models[name] = source
    default = content.get("default_model")
    if default is not None and (not isinstance(default, str) or default not in models):
        where = f"{path}{line_of(content, 'default_model')}"
        raise UsageError(f"{where}: default_model {default!r} is not one of its models{nearest(str(default), models)}")
    title = f"global_params of {path}"
    params = our_params(given(content.get("global_params", {}), title), title, remarks)
    return ModelsFile(
        path,
        models,
        default,
        _globals(content, path, remarks),
        SettingsSource(title, *_values(params, title, path.parent, content.get("global_params"))),
        _mailbox(content, path, remarks),
        tuple(remarks),
    )


def _globals(content: Mapping[str, Any], path: Path, remarks: list[str]) -> SettingsSource:
    """Read the global settings: top-level keys, and limits in `parking_lot`."""
    told = {name: content[name] for name in _GLOBAL if name in content}
    if "parking_lot" in content:
        told = {**lot_limits(content["parking_lot"], f"{path}: parking_lot", remarks), **told}
    values = {
        option.name: convert(option.kind, told[option.name], f"{path}{line_of(content, option.name)}: {option.name}")
        for option in OPTIONS
        if option.name in told
    }
    return SettingsSource(str(path), values, {name: name for name in values})


def _mailbox(content: Mapping[str, Any], path: Path, remarks: list[str]) -> Mapping[str, Any] | None:
    lot = lot_mailbox(content["parking_lot"], f"{path}: parking_lot", remarks) if "parking_lot" in content else None
    if "mailbox" not in content:
        return lot
    if lot is not None:
        raise UsageError(f"{path}: mailbox and parking_lot.mailbox both set up the mailbox: give one")
    return given(content["mailbox"], f"{path}: mailbox")


def model_entry(
    entry: Mapping[str, Any], where: str, folder: Path, remarks: list[str], number: int = 1
) -> tuple[str, SettingsSource]:
    """Read one entry of `models`, and return the model's name and its settings.

    `where` is the source for messages, a file or the request; relative paths start from `folder`, and `number` counts
    entries from 1. Remarks on keys without effect are added to `remarks`. UsageError, which names the key, if the entry
    is invalid.
    """
    name = convert(Text(512), entry.get("name"), f"{where}{line_of(entry)}: name of model {number}")
    if name == "default":
        raise UsageError(
            f"{where}{line_of(entry)}: model {number} cannot be called 'default', which always means default_model"
        )
    title = f"model {name!r} of {where}"
    for key in entry:
        if key not in _MODEL_KEYS and key in _yaml_options():
            raise UsageError(f"{title}{line_of(entry, key)}: {key} is a setting of the model: write it in params")
    known_keys(entry, _MODEL_KEYS, title)
    if ("hf_id" in entry) == ("local_path" in entry):
        raise UsageError(f"{title}{line_of(entry)}: give exactly one of hf_id and local_path")

    def read(key: str, kind: Kind) -> Any:
        return convert(kind, entry[key], f"{title}{line_of(entry, key)}: {key}")

    if "hf_id" in entry:
        model = read("hf_id", Text())
    else:
        local = read("local_path", FilePath())
        model = str(folder / local)
        if str(local) == DEMO and not Path(model).exists():
            raise UsageError(f"{title}{line_of(entry, 'local_path')}: the demo model is no path: write hf_id: {local}")
    values: dict[str, Any] = {"model": model, "served_model_name": (name,)}
    given_as = {"model": "hf_id" if "hf_id" in entry else "local_path"}
    if "weight_file" in entry:
        values["weight_file"] = read("weight_file", Text())
    params, spelled = _values(model_params(entry, title, remarks), title, folder, entry.get("params"))
    if "adapters" in entry:
        if "lora_modules" in params:
            raise UsageError(f"{title}: adapters and {spelled['lora_modules']} are the same setting: give one")
        values["lora_modules"] = _adapters(entry, title, folder)
        values["enable_lora"], given_as["lora_modules"], given_as["enable_lora"] = True, "adapters", "adapters"
    return name, SettingsSource(title, {**values, **params}, {**given_as, **spelled})


def _adapters(entry: Mapping[str, Any], title: str, folder: Path) -> tuple[str, ...]:
    where = f"{title}{line_of(entry, 'adapters')}: adapters"
    found = entry["adapters"]
    if not isinstance(found, list):
        raise UsageError(f"{where} must be a list of adapters, each with name and path")
    return tuple(spec_text(make_spec(given(each, where), where, folder)) for each in found)


def _values(params: Mapping[Any, Any], title: str, folder: Path, section: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Return typed values by setting name, and the key of each setting in the file."""
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    options = _yaml_options()
    for key, value in params.items():
        where = f"{title}{line_of(section, key)}"
        if key in _GLOBAL:
            raise UsageError(f"{where}: {key} holds for all models: write it at the top of the file, not in params")
        if key not in options:
            raise UsageError(f"{where}: unknown key {str(key)[:60]!r} in params{nearest(str(key), options)}")
        option = options[key]
        if option.name in values:
            raise UsageError(f"{where}: {key} and {given_as[option.name]} are the same setting: give one")
        given = value if option.repeat and isinstance(value, list) else [value]
        each = [convert(option.kind, single, f"{where}: {key}") for single in given]
        if isinstance(option.kind, Located):
            each = [option.kind.beside(single, folder) for single in each]
        values[option.name] = tuple(each) if option.repeat else each[0]
        given_as[option.name] = key
    return values, given_as


def _yaml_options() -> dict[str, Option]:
    options: dict[str, Option] = {}
    for option in OPTIONS:
        if option.in_yaml:
            names = [flag.lstrip("-").replace("-", "_") for flag in option.flags if len(flag) > 3]
            options.update(dict.fromkeys([option.name, *names], option))
    return options
