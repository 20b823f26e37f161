# SPDX-License-Identifier: MIT
"""Apertus: Llama's layers (`llama.py`) with a norm on every head of q and k, and an MLP with the activation xIELU.

The MLP has no gate: down(xielu(up(x))). xIELU has two trained parameters in each layer, tensors in safetensors and
metadata in GGUF files. Apertus 1.5 has further embeddings for codes of images and audio, behind those of
`output_vocab_size` text tokens; only these have logits. The codes are not computed, so the further rows are not loaded.
Sources: Swiss AI Initiative, 2025, arXiv:2509.14233; arXiv:2411.13010 (xIELU); `Apertus1p5TextModel` of its
transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.mlp import XieluMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import shared_from_gguf, shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF, gguf_has_bias
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Llama, LlamaConfig
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- config ----------------------------------------------------------------------------------------------------------

_PARTS = ("alpha_p", "alpha_n", "beta", "eps")
_USUAL = (0.20338, -1.05023, 0.5, -1e-6)  # values of an untrained model
_ROPE = {"rope_type": "llama3", "rope_theta": 1.2e7, "factor": 8.0, "original_max_position_embeddings": 8192}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApertusConfig(LlamaConfig):
    """Config of Llama, each layer's stored xIELU parameters (alpha_p, alpha_n, beta, eps), and all rows of embeddings.

    The rows are 0 in a model without codes of images and audio.
    """

    xielu: tuple[tuple[float, ...], ...] = ()
    rows: int = 0

    def numbers(self, layer: int) -> np.ndarray:
        """The factors of `xielu` in a layer, float32 [3]; raises UnsupportedModelError if eps is not close to 0."""
        p, n, beta, eps = self.xielu[layer] if self.xielu else _USUAL
        if not -1e-3 <= eps <= 0:
            raise UnsupportedModelError(f"the eps of xIELU is {eps}; implemented: -0.001 to 0")
        return np.array([np.logaddexp(0, p), beta + np.logaddexp(0, n), beta], np.float32)


def config_from_hf(fields: Fields, model_type: str) -> ApertusConfig:
    """Read `config.json` of apertus and apertus1p5_text."""
    fields.choice("hidden_act", "xielu", "xielu")
    usual = {} if "rope_parameters" in fields or "rope_scaling" in fields else {"rope_parameters": _ROPE}
    shared, bias = fields.with_defaults(rope_theta=1.2e7, **usual), fields.get("attention_bias", bool, False)
    values = shared_from_hf(shared, model_type)
    if "output_vocab_size" in fields:
        values |= {"vocab_size": fields.count("output_vocab_size", most=(rows := values["vocab_size"])), "rows": rows}
    return ApertusConfig(**values, qk_norm=True, qkv_bias=bias, output_bias=bias)


def completed(config: ApertusConfig, tensors: Mapping[str, StoredTensor]) -> ApertusConfig:
    """Add the xIELU parameters, which are tensors with one element each, to the config."""
    names = [[f"model.layers.{n}.mlp.act_fn.{part}" for part in _PARTS] for n in range(config.num_layers)]
    if any(name not in tensors or tensors[name].numel != 1 for layer in names for name in layer):
        raise WeightsError("the parameters of xIELU (mlp.act_fn.alpha_p and others) are missing, or not of one element")
    found = (tuple(float(tensors[name].load().reshape(-1)[0]) for name in layer) for layer in names)
    return dataclasses.replace(config, xielu=tuple(found))


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> ApertusConfig:
    """Read GGUF metadata of apertus."""
    shared, output_bias = shared_from_gguf(fields, checkpoint), "blk.0.attn_output.bias" in checkpoint.tensors
    columns = [Fields(fields.values, fields.path).get(f"xielu.{part}", list) for part in _PARTS]
    if any(len(column) != shared["num_layers"] or {*map(type, column)} != {float} for column in columns):
        raise InvalidFileError(f"{fields.path}: the parameters of xIELU are not {shared['num_layers']} numbers each")
    own: dict[str, Any] = {
        "qkv_bias": gguf_has_bias(checkpoint),
        "output_bias": output_bias,
        "xielu": tuple(zip(*columns, strict=True)),
    }
    return ApertusConfig(**shared | own, qk_norm=True)


# ---- block and model -------------------------------------------------------------------------------------------------


class Block(llama.Block):
    """One decoder layer."""

    def feed_forward(self, config: Any, layer: int, placement: Placement) -> XieluMLP:
        """See `llama.Block`."""
        return XieluMLP(config.hidden_size, config.intermediate_size, config.numbers(layer), placement)


class Apertus(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block


# ---- weight names ----------------------------------------------------------------------------------------------------


def text_rows(stored: StoredTensor, config: ApertusConfig) -> StoredTensor:
    """View of the embeddings of the tokens that have logits, if a file has those of all codes."""
    more = config.rows > config.vocab_size and stored.shape == (config.rows, config.hidden_size)
    return stored.rows(0, config.vocab_size) if more else stored


_NAMES = (("attention", "attention"), ("mlp", "feedforward"))
_NORMS = {f"layers.{{i}}.{to}_norm:weight": f"{HF}{name}_layernorm.weight" for to, name in _NAMES}
_VIEWS = {"embed:weight": text_rows}
WEIGHTS = [
    *(
        dataclasses.replace(line, hf=_NORMS.get(line.target, line.hf), hf_view=_VIEWS.get(line.target, line.hf_view))
        for line in llama.WEIGHTS
    ),
    WeightName("layers.{i}.mlp.up:weight", HF + "mlp.up_proj.weight", GG + "ffn_up.weight"),
]


def ignored(config: ApertusConfig) -> list[str]:
    """Names that Llama ignores, and the xIELU parameters, which are in the config."""
    return [*llama.ignored(config), r"model\.layers\.\d+\.mlp\.act_fn\..*"]


def gguf_keys(config: ApertusConfig) -> dict[str, Any]:
    """The xIELU parameters of all layers, whose keys lack the architecture's prefix."""
    return {f"xielu.{part}": list(numbers) for part, numbers in zip(_PARTS, zip(*config.xielu))}


FAMILY = Family(
    hf={"ApertusForCausalLM": "apertus"},
    gguf=("apertus",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Apertus,
    weights=WEIGHTS,
    ignored=ignored,
    completed=completed,
    as_gguf={"apertus": Architecture(name="apertus", more=gguf_keys, head=True, unread=())},
)
