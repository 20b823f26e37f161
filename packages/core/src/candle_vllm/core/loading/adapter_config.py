# SPDX-License-Identifier: MIT
"""Read an adapter's `adapter_config.json`: each key is applied, has no effect on inference, or is refused by name.

Source: `LoraConfig` of PEFT 0.21.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from candle_vllm.core.errors import AdapterError, InvalidFileError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.loading.name_patterns import first_match

MAX_CONFIG_BYTES = 1 << 20
"""Maximum size of the file; usual files have a few thousand bytes."""
_CONVERSION = (
    "such training changes the base's own weights: save the adapter with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=FOLDER OF THE ADAPTER BEFORE TRAINING), which converts it to a plain "
    "adapter"
)
_UNCHANGED_BASE = ("gaussian", "eva", "orthogonal", "mica")
_MERGE = "merge it into the model with PEFT's merge_and_unload and serve that"
_REFUSED = {
    "layer_replication": "layers that a model runs more than once",
    "use_qalora": "QA-LoRA's pooled inputs",
    "use_bdlora": "blocks on a diagonal (BD-LoRA)",
    "kasa_config": "KaSA's singular values",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA's samples",
    "arrow_config": "routing between adapters (Arrow)",
}
_BASE = "base_model_name_or_path"
_HONOURED = (
    "peft_type", _BASE, "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
    "use_dora", "bias", "lora_bias", "init_lora_weights", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "ensure_weight_tying", "fan_in_fan_out",
)  # fmt: skip
_NO_EFFECT = (
    "task_type", "revision", "peft_version", "auto_mapping", "inference_mode", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "qalora_group_size", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core", "runtime_config",
)  # fmt: skip
"""Keys that do not change what is computed; the tensors' names show which modules were trained."""
_RANK = 8  # PEFT's default
_SHOWN = 10
_MOST_INVOKING = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Configuration of an adapter.

    Attributes:
        rank: returns the rank r of a module by its name; None if the configuration has no rank.
        alpha: returns alpha of a module by its name; 0 means a scale of 1.
        rslora: the scale is alpha / sqrt(r), not alpha / r.
        bias: which biases were trained: "none", "all" or "lora_only".
        dora: the adapter also has magnitude vectors (DoRA).
        tied: changes of the embedding table also apply to an output layer that shares it.
        trained_tokens: trained rows of tables, by the module's name; "" is the embedding table.
        targets: trained parameters that are not modules, named as in `target_parameters`.
        alora: invocation tokens: the adapter is active from their last occurrence on; None for the whole sequence.
        base: name of the base model in the files.
        architecture: architecture of the base model in GGUF files; "" if unknown.
        notes: remarks for the operator, such as unknown keys.
        effect: JSON of the `_HONOURED` keys except the base's name; files with equal `effect` are equivalent.
    """

    rank: Callable[[str], int | None]
    alpha: Callable[[str], float]
    rslora: bool = False
    bias: str = "none"
    dora: bool = False
    tied: bool = False
    trained_tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = ()
    alora: tuple[int, ...] | None = None
    base: str | None = None
    architecture: str = ""
    notes: tuple[str, ...] = ()
    effect: bytes = b""

    def scale(self, name: str, rank: int) -> float:
        """Return the scale of the module `name`, whose matrix A has `rank` rows."""
        alpha = self.alpha(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank) if alpha else 1.0


def parse_config(data: bytes, path: Path, max_rank: int) -> AdapterConfig:
    """Parse the bytes of an `adapter_config.json`, at most `MAX_CONFIG_BYTES`; r is at most `max_rank`.

    Raises:
        AdapterError: the bytes are not JSON, or a key has an unsupported value.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: must be a JSON object")
    try:
        return _read(_Keys({"r": _RANK} | values, path), max_rank)
    except InvalidFileError as error:
        raise AdapterError(str(error)) from error


class _Keys(Fields):
    """`Fields` of an adapter's configuration."""

    def refuse(self, key: str, why: str) -> None:
        raise AdapterError(f"{self.path}: {key} is {self.values[key]!r:.80}: {why}")

    def pattern(self, key: str, default: float, most: int | None = None) -> Callable[[str], float]:
        """Return the function that gives a name's number by a section of patterns, or `default`.

        With `most`, the numbers are integers from 1 to `most`.
        """
        section = self.section(key)
        for name in section.values:
            section.count(name, most=most) if most is not None else section.get(name, float)
        try:
            return first_match(dict(section.values), default)
        except ValueError as error:
            raise AdapterError(f"{self.path}: {key}: {error}; write the module's name instead") from error


def _read(keys: _Keys, max_rank: int) -> AdapterConfig:
    kind = keys.get("peft_type", str)
    if kind != "LORA":
        keys.refuse("peft_type", f"only LORA is served; {_MERGE}")
    for key, what in _REFUSED.items():
        if keys.values.get(key):
            keys.refuse(key, f"{what} cannot be served; {_MERGE}")
    _check_init(keys)
    rank = keys.count("r", _RANK, most=MAX_COUNT)
    ranks = keys.pattern("rank_pattern", rank, MAX_COUNT)
    for value in (rank, *keys.section("rank_pattern").values.values()):
        if value > max_rank:
            key = "r" if value == rank else "rank_pattern"
            keys.refuse(key, f"ranks up to {max_rank} are allowed: raise max_lora_rank to {value}")
    alpha = keys.get("lora_alpha", float, 8.0)
    alphas = keys.pattern("alpha_pattern", alpha)
    if not alpha or not all(keys.section("alpha_pattern").values.values()):
        keys.refuse("alpha_pattern" if alpha else "lora_alpha", "the adapter would do nothing; it must not be 0")
    bias, targets = keys.get("bias", str, "none"), keys.get("target_parameters", list, [])
    if bias not in ("none", "all", "lora_only"):
        keys.refuse("bias", "it must be one of none, all, lora_only")
    if not all(isinstance(name, str) for name in targets):
        keys.refuse("target_parameters", "it must be a list of names")
    for key in ("lora_bias", "fan_in_fan_out"):  # only validated: tensors show lora_bias; the other matters in merging
        keys.get(key, bool, False)
    base = keys.get(_BASE, str, None)
    return AdapterConfig(
        rank=lambda name: int(ranks(name)),
        alpha=alphas,
        rslora=keys.get("use_rslora", bool, False),
        bias=bias,
        dora=keys.get("use_dora", bool, False),
        tied=keys.get("ensure_weight_tying", bool, False),
        trained_tokens=_trained_tokens(keys),
        targets=tuple(targets),
        alora=invocation_of(keys, "alora_invocation_tokens"),
        base=base or None,
        notes=_notes(keys, base),
        effect=json.dumps({key: keys.values.get(key) for key in _HONOURED if key != _BASE}, sort_keys=True).encode(),
    )


def invocation_of(keys: Fields, key: str) -> tuple[int, ...] | None:
    """Return the invocation tokens of activated LoRA, for which prompts are searched; None for other adapters."""
    tokens = keys.token_ids(key)
    if len(tokens) > _MOST_INVOKING:
        raise AdapterError(f"{keys.path}: {key} has {len(tokens)} tokens; at most {_MOST_INVOKING} are allowed")
    return tokens or None


def _check_init(keys: _Keys) -> None:
    """Refuse unknown initialisations, and those that change the base model; others have no effect on inference."""
    value = keys.values.get("init_lora_weights")
    if value is None or isinstance(value, bool) or value in _UNCHANGED_BASE:
        return
    if isinstance(value, str) and value.lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        keys.refuse("init_lora_weights", _CONVERSION)
    if value == "loftq":
        keys.refuse("init_lora_weights", f"such training changes the base's own weights; {_MERGE}")
    keys.refuse("init_lora_weights", f"it must be true, false, {', '.join(_UNCHANGED_BASE)}; otherwise {_MERGE}")


def _trained_tokens(keys: _Keys) -> dict[str, tuple[int, ...]]:
    if isinstance(keys.values.get("trainable_token_indices"), dict):
        section = keys.section("trainable_token_indices")
        found = {name: section.token_ids(name) for name in section.values}
    else:
        found = {"": keys.token_ids("trainable_token_indices")}
    for name, ids in found.items():
        if len(set(ids)) < len(ids):
            keys.refuse("trainable_token_indices", f"{name or 'the list'} names a token twice")
    return {name: ids for name, ids in found.items() if ids}


def _notes(keys: _Keys, base: str | None) -> tuple[str, ...]:
    unknown = [key for key, value in keys.values.items() if key not in _HONOURED + _NO_EFFECT and value]
    found = []
    if unknown:
        shown = ", ".join(f"{key!r:.60}" for key in unknown[:_SHOWN])
        rest = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        found.append(f"unknown keys of adapter_config.json have no effect: {shown}{rest}")
    if not base:
        found.append("adapter_config.json does not name the base model; only shapes were compared")
    return tuple(found)
