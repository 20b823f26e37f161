# SPDX-License-Identifier: MIT
"""Config of Gemma 3n, and its readers for config.json and GGUF metadata."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import gguf_windows, layer_windows, shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.gemma4_config import Gemma4Config, groups_of, sources_of
from candle_vllm.core.models.gemma_config import ROUNDED, gemma3_keys, layer_rope
from candle_vllm.core.models.local_layers import by_layer
from candle_vllm.core.quantization.plain import rounded

MOST_STREAMS = 8
_PERIOD = 5  # every fifth layer has no window, if a config does not list the layers
_SPARSE = 10, 1.6448533535003662  # number of first layers that keep 5 % of gate elements; cutoff in standard deviations
_OWNERS = 20  # layers with their own keys and values, if a GGUF file does not say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3nConfig(Gemma4Config):
    """Config of Gemma 3n.

    Attributes:
        streams, active: number N of residual streams, and index of the active one.
        scales_output: whether a vector [hidden_size] scales the active stream that gates the per-layer embedding.
        rank: rank of LAuReL.
        deviations: for each layer, the d of `kernels/scale_cap`, which makes the gate sparse; None without a cutoff.
        input_rows: number of tokens with their own per-layer embeddings; other tokens get those of token 0.
    """

    streams: int
    active: int
    scales_output: bool
    rank: int
    deviations: tuple[float | None, ...]
    input_rows: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.streams <= MOST_STREAMS:
            raise InvalidFileError(f"the model's config has {self.streams} streams; 2 to {MOST_STREAMS} are possible")
        if not 0 <= self.active < self.streams:
            raise InvalidFileError(f"the active stream is {self.active}; it must be 0 to {self.streams - 1}")
        if self.hidden_size % 16:
            raise UnsupportedModelError(f"hidden_size {self.hidden_size} is not implemented: not a multiple of 16")
        if self.input_size < 1:
            raise InvalidFileError(f"the model's config says per-layer embeddings have {self.input_size} elements")
        assert len(self.deviations) == self.num_layers

    @property
    def stream_count(self) -> int:
        return self.streams

    @property
    def whole_norms(self) -> bool:
        """Whether ranks cannot divide the model: the cutoff of a gate depends on all of its elements."""
        return any(each is not None for each in self.deviations)


def config_from_hf(fields: Fields, model_type: str) -> Gemma3nConfig:
    """Read `config.json` of gemma3n_text."""
    fields.choice("hidden_activation", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    layers = fields.count("num_hidden_layers")
    fields = _one_width(fields, "intermediate_size", by_layer(fields, "intermediate_size", layers))
    shared = shared_from_hf(fields, model_type) | {"max_position": fields.count("max_position_embeddings")}
    window = fields.count("sliding_window")
    windows = layer_windows(fields, layers, window) or _every(_PERIOD, layers, window)
    size = fields.count("hidden_size_per_layer_input", 256)
    stored = ROUNDED.get(fields.get("dtype", str, fields.get("torch_dtype", str, "float32")), "F64")
    own = {
        "rope": layer_rope(fields, shared, "full_attention"),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, True),
        "embedding_scale": rounded(math.sqrt(shared["hidden_size"]), stored),
        "input_scale": rounded(math.sqrt(size), stored),
        "final_softcap": fields.get("final_logit_softcapping", float, 30.0),
        "attention_bias": fields.get("attention_bias", bool, False),
        "active": fields.get("altup_active_idx", int, 0),
        "scales_output": fields.get("altup_correct_scale", bool, True),
        "deviations": _deviations(fields, layers),
    }
    return _config(
        fields,
        shared | own,
        windows,
        readers=fields.get("num_kv_shared_layers", int, 15),
        local_rope=layer_rope(fields, shared, "sliding_attention"),
        input_size=size,
        streams=fields.count("altup_num_inputs", 4),
        rank=fields.count("laurel_rank", 64),
        input_rows=fields.count("vocab_size_per_layer_input", 262144),
    )


def _config(
    fields: Fields, values: dict[str, Any], windows: Sequence[int | None], *, readers: int, **own: Any
) -> Gemma3nConfig:
    """Make the config; all layers have equal heads, and the last `readers` layers read earlier layers' caches."""
    layers, dim = values["num_layers"], values["head_dim"]
    shapes: dict[str, Any] = {
        "sliding_windows": tuple(windows),
        "groups": groups_of(values["num_heads"], (values["num_kv_heads"],) * layers, fields),
        "head_dims": (dim,) * layers,
        "sources": sources_of(windows, readers, fields),
        "keys_as_values": frozenset[int](),
        "widths": (1,) * layers,
        "layer_scales": False,
    }
    return Gemma3nConfig(**values | shapes | own)


def _every(period: int, layers: int, window: int) -> tuple[int | None, ...]:
    return tuple(window if (layer + 1) % period else None for layer in range(layers))


def _one_width(fields: Fields, key: str, widths: Sequence[int]) -> Fields:
    """The fields with one width instead of a width for each layer; the widths must be equal."""
    if len(set(widths)) > 1:
        raise UnsupportedModelError(f"{fields.path}: {fields.prefix}{key} differs by layer, which is not implemented")
    return Fields({**fields.values, fields.prefix + key: widths[0]}, fields.path, fields.prefix)


def _deviations(fields: Fields, layers: int) -> tuple[float | None, ...]:
    """The cutoffs by each layer's share of zeroed elements: by default 95 % in the first ten, if there are more."""
    key = "activation_sparsity_pattern"
    count = _SPARSE[0] * (layers > _SPARSE[0])
    shares = fields.get(key, list, [0.95] * count + [0.0] * (layers - count))
    if len(shares) != layers or not all(isinstance(share, (int, float)) and 0 <= share < 1 for share in shares):
        raise InvalidFileError(f"{fields.path}: {key} must have a share from 0 to below 1 for each of {layers} layers")
    return tuple(float(np.float32(NormalDist().inv_cdf(share))) if share > 0 else None for share in shares)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Gemma3nConfig:
    """Read GGUF metadata of gemma3n; optional keys have llama.cpp's defaults."""
    layers, key, tensors = fields.count("block_count"), "feed_forward_length", checkpoint.tensors
    known = _one_width(fields, key, by_layer(fields, key, layers))
    shared, size = shared_from_gguf(known, checkpoint), known.count("embedding_length_per_layer_input")
    usual = [_SPARSE[1]] * min(_SPARSE[0], layers) + [-math.inf] * max(layers - _SPARSE[0], 0)
    deviations = known.get("activation_sparsity_scale", list, usual)
    if len(deviations) != layers or not all(isinstance(each, float) and each < math.inf for each in deviations):
        raise InvalidFileError(f"{fields.path}: {fields.prefix}activation_sparsity_scale must have {layers} numbers")
    table = tensors.get("per_layer_token_embd.weight")
    rank = tensors.get("blk.0.laurel_l.weight")
    own = {
        "max_position": known.count("context_length"),
        "embedding_scale": math.sqrt(shared["hidden_size"]),
        "input_scale": math.sqrt(size),
        "final_softcap": known.get("final_logit_softcapping", float, 30.0),
        "active": known.get("altup.active_idx", int, 0),
        "scales_output": "blk.0.altup_correct_scale.weight" in tensors,
        "deviations": tuple(each if each > -math.inf else None for each in deviations),
    }
    return _config(
        fields,
        shared | own,
        gguf_windows(known, layers, known.count("attention.sliding_window"), period=_PERIOD),
        readers=known.get("attention.shared_kv_layers", int, max(layers - _OWNERS, 0)),
        local_rope=RopeConfig(theta=known.get("rope.freq_base_swa", float, 1e4), dim=shared["rope"].dim),
        input_size=size,
        streams=known.count("altup.num_inputs", 4),
        rank=rank.shape[0] if rank and rank.shape else 64,
        input_rows=table.shape[0] if table and table.shape else shared["vocab_size"],
    )


def gguf_keys(config: Gemma3nConfig) -> dict[str, Any]:
    """The GGUF metadata of a Gemma 3n in addition to the keys of every model.

    llama.cpp reads no key of AltUp, LAuReL, shared caches and sparsity: it has the numbers of the published models.
    """
    if config.streams != 4 or not config.scales_output:
        raise UnsupportedModelError("llama.cpp's gemma3n has four streams, and a scale of the active one")
    layers, cutoffs = config.num_layers, [each or 0.0 for each in config.deviations]
    fixed = {
        "altup_active_idx 0": config.active == 0,
        "laurel_rank 64": config.rank == 64,
        "hidden_size_per_layer_input 256": config.input_size == 256,
        f"num_kv_shared_layers {max(layers - _OWNERS, 0)}": config.readers == max(layers - _OWNERS, 0),
        f"activation_sparsity_pattern 0.95 in the first {_SPARSE[0]} layers alone": np.allclose(
            cutoffs, [_SPARSE[1] * (layer < _SPARSE[0]) for layer in range(layers)], atol=1e-4
        ),
    }
    if others := [name for name, is_so in fixed.items() if not is_so]:
        raise UnsupportedModelError(f"llama.cpp's gemma3n has {', '.join(others)}, and this model has not")
    return gemma3_keys(config) | {
        "feed_forward_length": [config.intermediate_size] * config.num_layers,
        "altup.active_idx": config.active,
        "altup.num_inputs": config.streams,
        "activation_sparsity_scale": [-math.inf if each is None else each for each in config.deviations],
        "attention.shared_kv_layers": config.readers,
        "embedding_length_per_layer_input": config.input_size,
    }


def otherwise(config: Gemma3nConfig) -> dict[str, Any]:
    """The config field that differs in a GGUF file, whose per-layer table has a row for every token."""
    return {"input_rows": config.vocab_size}
