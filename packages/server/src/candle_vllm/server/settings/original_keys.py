# SPDX-License-Identifier: MIT
"""Keys of models.yaml and variables of the Rust candle-vllm: their meaning here, or a remark that they have no effect.

Read before step 1 of a request's life. A key with an equivalent is translated to that setting; a key without effect
causes a remark; an unknown key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.core.config import ISQ_NAMES
from candle_vllm.core.foreign_names import foreign_tables
from candle_vllm.core.setting_kinds import Boolean, Choice, Integer, Secret
from candle_vllm.server.settings.options import ENV_PREFIX, Section, UsageError, convert, known_keys, line_of, mapping
from candle_vllm.server.settings.table import BY_NAME

_LOT = {
    "pool": ("max_queue_depth", "timeout_secs", "worker_threads", "max_blocking_threads", "thread_stack_size"),
    "limits": ("max_queue_depth", "timeout_secs", "max_units"),
    "queue": ("backend", "persistence", "postgres_url", "sqlite_path", "surreal_path", "yaque_dir"),
    "mailbox": ("backend", "retention_secs", "postgres_url", "sqlite_path", "surreal_path", "webhook"),
}
_LIMITS = {"max_queue_depth": "max_queued_requests", "timeout_secs": "request_timeout"}
_IDLE = {
    "worker_threads": "--threads sets the engine's threads",
    "max_blocking_threads": "this pool does not exist here",
    "thread_stack_size": "this pool does not exist here",
    "max_units": "mem sets the size of the KV cache",
    "multithread": "a model is divided among GPUs by processes, one for each GPU",
    "kvcache_mem_cpu": "no part of the KV cache is swapped out",
}
_PROMPT_CACHE = (
    "enabled", "backend", "cache_path", "redis_url", "ttl_seconds", "max_cached_prefixes", "min_prefix_length",
    "model_fingerprint",
)  # fmt: skip
_KEPT_IN = {
    "sled": (("cache_path", "prompt_cache_path"),),
    "redis": (("redis_url", "prompt_cache_url"),),
    None: (("cache_path", "prompt_cache_path"), ("redis_url", "prompt_cache_url")),
}
_VISION_MODES = Choice(("disabled", "proxy", "native"))
_MAX_DEVICES = 64
_DEVICE_ID = Integer(0, 999, units=False)

MODEL_KEYS = ("capabilities", "parking_lot")
"""Keys of a model that only the Rust candle-vllm's models.yaml has."""


def given(section: Any, where: str) -> dict[Any, Any]:
    """Return a section without its null keys, which set nothing; UsageError if it is not a mapping."""
    kept = Section({key: value for key, value in mapping(section, where).items() if value is not None})
    if isinstance(section, Section):
        kept.line, kept.lines = section.line, section.lines
    return kept


# ---- a model and its params ------------------------------------------------------------------------------------------


def model_params(entry: Mapping[str, Any], title: str, remarks: list[str]) -> dict[str, Any]:
    """Return the params of a model by our names, with params from its `parking_lot` and its `capabilities`.

    `entry` is the model's mapping in the file, `title` its name in messages; `remarks` gets remarks on keys without
    effect.
    """
    params = given(entry.get("params", {}), f"{title}: params")
    if "capabilities" in entry:
        where = f"{title}: capabilities"
        section = given(entry["capabilities"], where)
        known_keys(section, ("vision_mode", "vision_proxy", "image_token"), where)
        mode = convert(_VISION_MODES, section.get("vision_mode", "disabled"), f"{where}.vision_mode")
        if mode != "disabled":
            remarks.append(f"{where}: vision_mode {mode} has no effect: vision models accept images without it")
        elif "vision_mode" in section:
            params.setdefault("max_images", 0)
    lots = [section["parking_lot"] for section in (entry, params) if section.get("parking_lot") is not None]
    params.pop("parking_lot", None)
    weights = [entry.get(key) for key in ("weight_file", "local_path", "hf_id")]
    found = our_params(params, title, remarks, stored=any(str(name).lower().endswith(".gguf") for name in weights))
    for lot in lots:
        found = {**_limits_of_model(lot, f"{title}: parking_lot", remarks), **found}
    return found


def our_params(params: Mapping[Any, Any], title: str, remarks: list[str], *, stored: bool = False) -> dict[Any, Any]:
    """Translate params to our names, and leave other keys. `stored` tells whether the weights are in a GGUF file."""
    found: dict[Any, Any] = {}
    for key, value in given(params, f"{title}: params").items():
        where = f"{title}{line_of(params, key)}: {key}"
        if key == "device_ids":
            name, means = "device", _device(value, where)
        elif key == "kvcache_mem_gpu":
            name, means = "mem", value
        elif key == "prompt_cache":
            name, means = "enable_prefix_caching", _prompt_cache(value, where, remarks, found)
        elif key == "quantization":
            name, means = "isq", _isq(value, where, remarks, stored)
        elif key == "kvcache_compression":
            name, means = key, None
            if given(value, where).get("policy") != "disabled":
                remarks.append(f"{where} has no effect: use kv_cache_dtype: q8_0 to compress keys and values")
        elif key in _IDLE:
            name, means = key, None
            if value != 0 or isinstance(value, bool):
                remarks.append(f"{where} has no effect: {_IDLE[key]}")
        else:
            name, means = key, value
        if means is None:
            continue
        if name in found or (name != key and name in params):
            raise UsageError(f"{where} and {name} are the same setting: give one")
        found[name] = means
    return found


def _device(value: Any, where: str) -> str:
    """Translate a list of GPUs to `device`: [] is "cpu", [0] is "auto", other lists are "cuda:N" joined by commas."""
    if not isinstance(value, list) or len(value) > _MAX_DEVICES:
        raise UsageError(f"{where} must be a list of at most {_MAX_DEVICES} whole numbers, not {value!r:.60}")
    numbers = [convert(_DEVICE_ID, number, where) for number in value]
    if len(numbers) > 1:
        return ",".join(f"cuda:{number}" for number in numbers)
    return "cpu" if not numbers else "auto" if numbers[0] == 0 else f"cuda:{numbers[0]}"


def _prompt_cache(value: Any, where: str, remarks: list[str], found: dict[Any, Any]) -> bool | None:
    section = given(value, where)
    known_keys(section, _PROMPT_CACHE, where)
    enabled = convert(Boolean(), section.pop("enabled", False), f"{where}.enabled") if "enabled" in section else None
    backend = section.pop("backend", None)  # sled is another file format: a folder of blocks replaces it
    for key, ours in () if enabled is False else _KEPT_IN.get(backend, ()):
        if key in section:
            if ours in found:
                raise UsageError(f"{where}.{key} and {ours} are the same setting: give one")
            found[ours] = section.pop(key)
    if section and enabled is not False:
        remarks.append(
            f"{where}: {', '.join(section)} without effect: prompt prefixes are stored in the KV cache itself"
        )
    return enabled


def _isq(value: Any, where: str, remarks: list[str], stored: bool) -> str | None:
    name = str(value).strip().lower()
    if name in ("none", "auto"):
        return None
    if name.replace("_k", "k") in ISQ_NAMES and not stored:
        return name
    remarks.append(f"{where} has no effect: the model's files define its quantisation; isq is for unquantised models")
    return None


# ---- parking_lot -----------------------------------------------------------------------------------------------------


def _limits_of_model(section: Any, where: str, remarks: list[str]) -> dict[str, Any]:
    found = lot_limits(section, where, remarks)
    for key in ("request_timeout", "mailbox"):
        if found.pop(key, None) is not None or key in section:
            name = "timeout_secs" if key == "request_timeout" else key
            remarks.append(
                f"{where}: {name} has no effect: it is for all models: set it in parking_lot at the top level"
            )
    return found


def lot_limits(section: Any, where: str, remarks: list[str]) -> dict[str, Any]:
    """Return the settings in `limits` and `pool` of a `parking_lot` by our names; `limits` precedes `pool`."""
    lot = given(section, where)
    known_keys(lot, _LOT, where)
    values: dict[str, Any] = {}
    for part in ("pool", "limits"):
        told = _part(lot, part, where)
        for key in (each for each in told if each in _LIMITS):
            kind = BY_NAME[_LIMITS[key]].kind
            values[_LIMITS[key]] = convert(kind, told[key], f"{where}.{part}{line_of(told, key)}: {key}")
        remarks += [f"{where}.{part}: {key} has no effect: {_IDLE[key]}" for key in told if key in _IDLE]
    queue = _part(lot, "queue", where)
    if queue.get("backend", "memory") != "memory" or queue.get("persistence"):
        remarks.append(f"{where}.queue: {', '.join(queue)} without effect: requests wait in memory")
    return values


def lot_mailbox(section: Any, where: str, remarks: list[str]) -> dict[str, Any] | None:
    """Translate `mailbox` of `parking_lot` to keys of `mailbox` in models.yaml: `url`, `retention_secs`, `webhook`."""
    lot = given(section, where)
    if "mailbox" not in lot:
        return None
    told, where = _part(lot, "mailbox", where), f"{where}.mailbox"
    values = {key: told[key] for key in ("retention_secs",) if key in told}
    if "webhook" in told:
        values |= _webhook(given(told["webhook"], f"{where}.webhook"), f"{where}.webhook")
    backend = told.get("backend", "memory")
    if backend in ("postgres", "sqlite"):
        key = "sqlite_path" if backend == "sqlite" else "postgres_url"
        if not isinstance(told.get(key), str):
            raise UsageError(f"{where}: backend {backend} needs its {key}")
        return {**values, "url": f"sqlite:///{told[key]}" if backend == "sqlite" else told[key]}
    if backend == "surrealdb":
        remarks.append(
            f"{where}: backend surrealdb is not supported: the mailbox is stored in SQLite, in ~/.candle-vllm"
        )
    elif backend != "memory":
        raise UsageError(f"{where}: backend must be memory, sqlite, postgres or surrealdb, not {backend!r:.60}")
    return {**values, "url": "sqlite"}


def _part(lot: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    found = given(lot.get(name, {}), f"{where}.{name}")
    known_keys(found, _LOT[name], f"{where}.{name}")
    return found


def _webhook(section: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate the webhook; {} for a disabled webhook, whose other keys are not checked."""
    for key in ("enabled", "sign_payload"):
        if key in section:
            section[key] = convert(Boolean(), section[key], f"{where}: {key}")
    if not section.pop("enabled", True):
        return {}
    if not section.pop("sign_payload", True):
        section.pop("signing_secret", None)
    if isinstance(auth := section.get("auth"), dict) and auth.get("type") == "hmac":
        section["auth"] = {"signs": "body", **auth}  # the Rust candle-vllm's receivers verify only the body
    return {"webhook": section}


# ---- variables -------------------------------------------------------------------------------------------------------

ORIGINAL: Mapping[str, str] = {
    name.removeprefix(ENV_PREFIX): why for name, _, why in foreign_tables()["Variables"] if name.startswith(ENV_PREFIX)
}
"""Variables of the Rust candle-vllm that have no effect here: name without the prefix -> reason."""

_HONOURED = ("PROMPT_CACHE_ENABLED", "PROMPT_CACHE_REDIS_URL", "STREAM_AS_REASONING_CONTENT")


def original_variable(name: str, text: str, spelled: str, among: Mapping[str, str]) -> tuple[str, Any] | str | None:
    """Translate a variable of the Rust candle-vllm to a setting, or to the reason for no effect; None if unknown."""
    inner = name.removeprefix(ENV_PREFIX)
    if inner in ORIGINAL:
        return ORIGINAL[inner]
    if inner not in _HONOURED:
        return None
    if inner == "PROMPT_CACHE_REDIS_URL":
        if among.get(ENV_PREFIX + "PROMPT_CACHE_BACKEND") != "redis":
            return ORIGINAL["PROMPT_CACHE_BACKEND"]
        return "prompt_cache_url", convert(Secret(), text, spelled)
    on = convert(Boolean(), text, spelled)
    if inner == "PROMPT_CACHE_ENABLED":
        return "enable_prefix_caching", on
    return "reasoning is returned separately by default" if on else ("reasoning_parser", "none")
