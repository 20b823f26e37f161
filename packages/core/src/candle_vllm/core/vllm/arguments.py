# SPDX-License-Identifier: MIT
"""Translate the arguments of vLLM's `LLM`, `EngineArgs` and `AsyncLLM` to settings of an engine.

Accepted are fields of `EngineConfig`; vLLM's names that are translated below, among them defaults of requests; and
names in the tables of `core/foreign_names.md`, if their values change nothing. All other names are refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from candle_vllm.core.assembly.model import sampling_defaults
from candle_vllm.core.config import CACHE_ALIASES, SETTINGS, EngineConfig
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.core.pooling import PoolingParams, TextPooling
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.setting_kinds import Boolean

_LOAD_FORMATS = {"hf": "auto", "safetensors": "auto", "fastsafetensors": "auto", "gguf": "auto"}
_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class Translated:
    """Translated arguments of vLLM.

    Attributes:
        config: settings of the engine.
        pooling: default pooling parameters of a call.
        quantization: given quantization method of the checkpoint; None if not given.
        generation: defaults of requests that replace the defaults in the model's files; None keeps the files' defaults.
        sampling: defaults of requests that override all others.
    """

    config: EngineConfig
    pooling: PoolingParams
    quantization: str | None
    generation: Mapping[str, Any] | None
    sampling: Mapping[str, Any]


def translated(model: str | Path | EngineConfig, given: Mapping[str, Any]) -> Translated:
    """Translate arguments: names of vLLM, or fields of `EngineConfig`.

    Raises:
        ConfigError, InvalidParameterError: a value is invalid; the error names its argument or its key.
        TypeError: an argument has no counterpart here, and its value would change something.
    """
    rest = _with_drafts(given)
    pooling = _pooling_params(rest.pop("pooler_config", None))
    quantization = rest.pop("quantization", None)
    if quantization is not None and quantization not in _methods():
        said = f"quantization {quantization!r:.60} is not supported: leave it out, because the checkpoint defines it"
        raise ConfigError(f"{said}, or use isq, which quantises plain weights", "quantization")
    generation = _generation(rest.pop("generation_config", "auto"))
    sampling = _overrides(rest.pop("override_generation_config", None))
    if isinstance(model, EngineConfig):
        if rest:
            raise ConfigError(f"pass an EngineConfig or arguments, not both: {', '.join(rest)}")
        return Translated(model, pooling, quantization, generation, sampling)
    settings: dict[str, Any] = {"model": model, "seed": 0}
    if pooling.pooling in get_args(TextPooling):  # scores have no parameters
        settings["pooling"] = pooling.pooling
    for name, value in sorted(rest.items(), key=lambda item: item[0] in _TRANSLATED):  # last, so that they win
        translate = _TRANSLATED.get(name)
        if translate is not None:
            settings |= translate(value)
        elif value is not None or name not in SETTINGS or SETTINGS[name].default is None:
            settings[name] = value
    if settings.get("tokenizer") == str(model):
        del settings["tokenizer"]
    return Translated(EngineConfig(**settings), pooling, quantization, generation, sampling)


def _methods() -> set[str]:
    """Return the quantization methods of checkpoints, in vLLM's names: the values of its flag."""
    becomes = next(row[1] for row in foreign_tables()["Flags"] if "--quantization" in row[0].split())
    return {each.strip(" :") for each in becomes.split(";")}


class EngineArgs:
    """Arguments of `LLM` and `AsyncLLM`, checked and stored; `vars` returns the model and the given arguments.

    Args:
        model: as in `InferenceEngine`.
        arguments: arguments of vLLM, or fields of `EngineConfig`.

    Raises:
        ConfigError, InvalidParameterError, TypeError: as in `LLM`.
    """

    def __init__(self, model: str | Path = "demo", **arguments: Any) -> None:
        translated(model, arguments)
        vars(self).update(model=model, **arguments)

    def __repr__(self) -> str:
        secrets = {each.name for each in SETTINGS.values() if each.secret}
        told = (f"{name}={value!r:.200}" for name, value in vars(self).items() if name not in secrets)
        return f"{type(self).__name__}({', '.join(told)})"

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add flags for settings and translated arguments to a parser; only `--model` has a default value."""
        parser.add_argument("--model", default="demo", help=SETTINGS["model"].help)
        for each in SETTINGS.values():
            if each.name != "model":
                reader = _value if each.name in _TRANSLATED else each.kind.from_text
                _add_flag(parser, each.name, each.help, isinstance(each.kind, Boolean), reader)
        for name in _TRANSLATED.keys() - SETTINGS.keys():
            _add_flag(parser, name, "as in vLLM", name.startswith(("enable_", "enforce_")), _value)
        for name in ("runner", "convert", "quantization", "generation_config"):
            _add_flag(parser, name, "as in vLLM", False, str)
        for name in ("pooler_config", "override_generation_config"):
            _add_flag(parser, name, "JSON, as in vLLM", False, json.loads)
        _add_flag(parser, "trust_remote_code", "without effect: a model's own code is never run", True, str)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Make `EngineArgs` from the result of a parser with `add_cli_args`; values of other flags are ignored."""
        known = argparse.ArgumentParser()
        cls.add_cli_args(known)
        names = {action.dest for action in known._actions} - {"help"}
        return cls(**{name: value for name, value in vars(args).items() if name in names})


class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` under vLLM's name for programs with an event loop."""


def _add_flag(parser: argparse.ArgumentParser, name: str, told: str, switch: bool, read: Callable[[str], Any]) -> None:
    flag, told = f"--{name.replace('_', '-')}", told.replace("%", "%%")
    if switch:
        parser.add_argument(
            flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=name, help=told
        )
    else:
        parser.add_argument(flag, type=read, default=argparse.SUPPRESS, dest=name, help=told)


def _value(text: str) -> Any:
    """Parse a text as JSON, such as a number; other text is returned unchanged."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _by(name: str, names: Mapping[str, str]) -> Callable[[Any], dict[str, Any]]:
    """Return a function that translates a setting's values by a table; a torch dtype is replaced by its name."""

    def translate(value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        said = value if isinstance(value, str) else str(value).removeprefix("torch.")
        return {name: names.get(said, said)}

    return translate


def _eager(value: Any) -> dict[str, Any]:
    """Translate `enforce_eager`: vLLM's only disables CUDA graphs; `EngineConfig.op_by_op` also decodes the weights."""
    if not isinstance(value, bool):
        raise ConfigError(f"enforce_eager must be true or false, not {value!r:.60}", "enforce_eager")
    return {"cuda_graphs": False} if value else {}


def image_limit(given: Any) -> int | None:
    """Return the limit of images in vLLM's `limit_mm_per_prompt`: by kind of input a count, or a dict with `count`.

    None is no limit: a dict may have sizes only, which vLLM uses to reserve memory. Raises ValueError if it has another
    form, or allows inputs other than images.
    """
    try:
        counts = {kind: limit.get("count") if isinstance(limit, dict) else limit for kind, limit in given.items()}
    except AttributeError:
        raise ValueError('must be a JSON object of counts, as {"image": 4}') from None
    other = next((kind for kind, count in counts.items() if kind != "image" and count != 0), None)
    if other is not None:
        raise ValueError(f"has {other!r:.40}: images are the only supported input besides text")
    return counts.get("image")


def _images(value: Any) -> dict[str, Any]:
    try:
        count = image_limit(value or {})
    except ValueError as error:
        raise ConfigError(f"limit_mm_per_prompt {error}", "limit_mm_per_prompt") from None
    return {} if count is None else {"max_images": count}


def _template(value: Any) -> dict[str, Any]:
    """Read the template from the file, unless the value has a brace or a line break: then it is the template."""
    if value is None:
        return {}
    text = str(value)
    if len(text) < 4096 and "{" not in text and "\n" not in text:
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:  # ValueError: it is no path, or the file is not UTF-8
            said = f"chat_template {text!r:.200} is neither a file nor Jinja source: {error!s:.200}"
            raise ConfigError(said, "chat_template") from None
    return {"chat_template": text}


_TRANSLATED: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "dtype": _by("dtype", {}),
    "kv_cache_dtype": _by("kv_cache_dtype", CACHE_ALIASES),
    "attention_backend": lambda value: {} if value is None else {"attention_backend": str(value).lower()},
    "load_format": _by("load_format", _LOAD_FORMATS),
    "enforce_eager": _eager,
    "max_model_len": lambda value: {} if value in (None, -1, "auto") else {"max_model_len": value},
    "hf_token": lambda value: {} if value is None or value is True else {"hf_token": value},
    "tokenizer": lambda value: {} if value is None else {"tokenizer": str(value)},
    "chat_template": _template,
    "allowed_local_media_path": lambda value: {} if value in (None, "") else {"allowed_local_media_path": value},
    "kv_cache_memory_bytes": lambda value: {} if value is None else {"kv_cache_memory": value},
    "limit_mm_per_prompt": _images,
    "enable_chunked_prefill": lambda value: {"max_num_batched_tokens": 0} if value is False else {},
}


def _with_drafts(given: Mapping[str, Any]) -> dict[str, Any]:
    """Move vLLM's separate arguments for parts of `speculative_config` into it."""
    names = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
    parts = {ours: given[name] for name, ours in names.items() if given.get(name) is not None}
    rest = {name: value for name, value in given.items() if name not in names}
    own = given.get("speculative_config") or {}  # `EngineConfig` refuses another type
    return rest | {"speculative_config": {**own, **parts}} if parts and isinstance(own, Mapping) else rest


def _generation(value: Any) -> Mapping[str, Any] | None:
    """Translate `generation_config`: the model's own defaults, no defaults, or those of a folder."""
    if value == "auto":
        return None
    if value == "vllm":
        return {}
    path = Path(value) / "generation_config.json" if isinstance(value, (str, Path)) else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"generation_config {value!r:.200} must be auto, for the model's own, vllm, for none, or a folder with a "
            "generation_config.json",
            "generation_config",
        )
    return sampling_defaults(Fields(read_json(path), path))


def _overrides(value: Any) -> dict[str, Any]:
    if not isinstance(value, (Mapping, type(None))):
        raise ConfigError("override_generation_config must be values by name", "override_generation_config")
    given = dict(value or {})
    unknown = next((name for name in given if name not in _GENERATION), None)
    if unknown is not None:
        said = f"override_generation_config has {unknown!r:.60}; it may have {', '.join(_GENERATION)}"
        raise ConfigError(said, "override_generation_config")
    if "max_new_tokens" in given:
        given["max_tokens"] = given.pop("max_new_tokens")
    SamplingParams(**given)
    return given


def _pooling_params(value: Any) -> PoolingParams:
    """Translate vLLM's `PoolerConfig`, a dict or an object."""
    if value is None:
        return PoolingParams()
    given = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    if given is None:
        raise ConfigError("pooler_config must be values by name, or an object with them", "pooler_config")
    made: dict[str, Any] = {}
    for name, said in given.items():
        if said is None:
            continue
        if name in ("pooling_type", "seq_pooling_type"):
            made["pooling"] = str(said).lower()
        elif name in ("normalize", "use_activation", "dimensions"):
            made[name] = said
        elif name != "enable_chunked_processing" or said is not False:
            raise ConfigError(f"pooler_config has {name!r:.60}, which is not supported", "pooler_config")
    return PoolingParams(**made)
