# SPDX-License-Identifier: MIT
"""The config of a model that runs transformers' module code, from its `config.json`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.config import MAX_EXPERTS, MAX_LAYERS, ModelConfig
from candle_vllm.core.loading.rope import RopeConfig, rope_from_hf, stretched_context
from candle_vllm.core.models.any_architecture.attention import PROBE, AttentionCall, NotPagedError
from candle_vllm.core.models.any_architecture.trial import calls_of, class_of, without_memory

_VERSION = version("transformers")
_NO_SIZE = re.compile(r"_id$|theta|base|factor|scal|seed|param|model_max_length")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyConfig(ModelConfig):
    """Config of a model that runs transformers' module code, and of the caches of its layers.

    Attributes:
        described: the model's config object of transformers.
        calls: the model's calls of attention, in order; empty for a model that runs one sequence at a time.
        obstacle: why the model runs one sequence at a time, on transformers' cache; None if it runs on the paged cache.
    """

    described: Any
    calls: tuple[AttentionCall, ...] = ()
    obstacle: str | None = None

    @property
    def implementation(self) -> str:
        """See `ModelInfo`."""
        return "transformers" if self.obstacle is None else "transformers, one sequence at a time"

    @property
    def one_at_a_time(self) -> str | None:
        """See `ModelConfig`."""
        return self.obstacle

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`; for a model on transformers' own cache the pages only count tokens."""
        return tuple(call.spec for call in self.calls) or (PagedSpec(1, 1, 1),) * self.num_layers


def config_from_hf(values: Mapping[str, Any], path: Path) -> AnyConfig:
    """Read a `config.json` by transformers' own class, build the model on the meta device, and run it once there.

    Raises:
        UnsupportedModelError: transformers has no such decoder, or the decoder cannot run here.
        InvalidFileError: the config contradicts itself, or has sizes that no model has.
    """
    _check_sizes(values, path)
    kind = Fields(values, path).get("model_type", str)
    if kind not in CONFIG_MAPPING:
        code = "; code beside the weights is never run" if values.get("auto_map") else ""
        raise UnsupportedModelError(f"{path}: transformers {_VERSION} has no model_type {kind!r:.80} either{code}")
    try:
        described = CONFIG_MAPPING[kind].from_dict(_with_floats(values))
        kind_of = class_of(described)
        if kind_of is None:
            raise UnsupportedModelError(f"{path}: {kind} of transformers {_VERSION} is no decoder")
        declared = kind_of._supports_attention_backend
        model = without_memory(described, PROBE if declared else None, torch.float32)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers' classes raise errors of many kinds
        raise InvalidFileError(f"{path}: transformers {_VERSION} refuses it: {error!s:.300}") from error
    calls, obstacle = tuple[AttentionCall, ...](), None
    try:
        calls = calls_of(model)
    except NotPagedError as error:
        obstacle = str(error)
        if not error.causal:
            raise UnsupportedModelError(f"{path}: {type(model).__name__} cannot run here: {obstacle}") from error
    text = described.get_text_config(decoder=True)
    first = calls[0] if calls else AttentionCall("", 1, 1, 2, 2, None, 1.0, None)
    length = _number(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 1 << 15
    scaling = getattr(text, "rope_parameters", None) or {}
    if scaling.get("factor") and scaling.get("rope_type") in ("linear", "dynamic", "yarn"):
        kept = {key: scaling.get(key) for key in ("rope_type", "factor", "original_max_position_embeddings")}
        length = stretched_context(rope_from_hf(Fields({"rope_parameters": kept}, path), 4, length), length)
    hidden = _number(text, "hidden_size", "n_embd", "d_model") or 1
    return AnyConfig(
        model_type=kind,
        # a class with the second key returns no logits of rows that only pad the table
        vocab_size=min(filter(None, (_number(text, key) for key in ("vocab_size", "unpadded_vocab_size"))), default=0),
        hidden_size=hidden,
        intermediate_size=_number(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden,
        num_layers=len(calls) or 1,
        num_heads=first.heads,
        num_kv_heads=first.kv_heads,
        head_dim=first.key_dim,
        max_position=length,
        norm_eps=1e-5,
        rope=RopeConfig(dim=2),
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        sliding_windows=tuple(call.reach for call in calls) or (None,),
        eos_token_ids=Fields(values, path).token_ids("eos_token_id", lowest=-1),
        described=described,
        calls=calls,
        obstacle=obstacle,
    )


def _with_floats(value: Any) -> Any:
    """Convert the floats that JSON cannot express and transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        special = value.get("__float__")
        return float(special) if isinstance(special, str) else {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def _check_sizes(values: Mapping[str, Any], path: Path) -> None:
    """Raise InvalidFileError if the config asks for larger sizes than any model has."""
    for key, value in values.items():
        for section in value if isinstance(value, list) else (value,):
            if isinstance(section, Mapping):
                _check_sizes(section, path)
        most = MAX_LAYERS if key in _LAYERS else MAX_EXPERTS if key.endswith("experts") else MAX_COUNT
        most = most << 4 if "vocab" in key else most  # some models have a table of token n-grams
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most and not _NO_SIZE.search(key):
            raise InvalidFileError(f"{path}: {key} is {value}; at most {most} are possible")


def _number(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)
