# SPDX-License-Identifier: MIT
"""DeBERTa v2 and v3: a `Bert` with disentangled attention, content to position and position to content.

Distant relative positions share buckets. It runs op by op in torch. Source: He et al., 2020, arXiv:2006.03654,
and 2021, arXiv:2111.09543 (v3). Shapes: T tokens, E hidden, S span of relative positions on each side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.whole_attention import disentangled_attention
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.bert import Bert, BertConfig
from candle_vllm.core.models.encoder_parts import ACTIVATIONS, both, head_of, prefix_of, sizes_from_hf
from candle_vllm.core.models.family import EncoderFamily

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(BertConfig):
    """Config of a DeBERTa model.

    Attributes:
        buckets: buckets of relative positions on each side, the farther half in logarithmic steps; 0 is one for each.
        farthest: distance from which on all positions share a bucket.
    """

    buckets: int = 0
    farthest: int = 512

    @property
    def span(self) -> int:
        """S."""
        return self.buckets or self.farthest


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> DebertaConfig:
    """Reads `config.json` of deberta-v2."""
    kinds = fields.values.get("pos_att_type") or []
    kinds = kinds.split("|") if isinstance(kinds, str) else kinds
    wanted: dict[str, object] = {"relative_attention": True, "share_att_key": True, "position_biased_input": False}
    wanted |= {"conv_kernel_size": 0, "type_vocab_size": 0, "norm_rel_ebd": "layer_norm"}
    given: dict[str, object] = {"position_biased_input": True, **fields.values}
    wrong = [key for key, value in wanted.items() if (given.get(key) or 0) != value]
    if sorted(map(str, kinds)) != ["c2p", "p2c"]:
        wrong.append("pos_att_type")
    size = fields.count("hidden_size")
    if fields.get("embedding_size", int, size) != size or fields.get("attention_head_size", int, None) is not None:
        wrong.append("embedding_size")
    if wrong:
        said = ", ".join(f"{key} is {fields.values.get(key)!r:.40}" for key in wrong)
        raise UnsupportedModelError(f"{fields.path}: {said}, which is not implemented for {model_type}")
    position, most = fields.count("max_position_embeddings", 512), fields.get("max_relative_positions", int, -1)
    return DebertaConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=position,
        norm_eps=fields.get("layer_norm_eps", float, 1e-7),
        typed=False,
        placed=False,
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        head_activation=ACTIVATIONS[fields.choice("pooler_hidden_act", "gelu", *ACTIVATIONS)],
        buckets=max(fields.get("position_buckets", int, -1), 0),
        farthest=most if most > 0 else position,
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> DebertaConfig:
    """No GGUF file has an architecture of this family."""
    raise UnsupportedModelError(f"{checkpoint.path}: {fields.prefix} is not an architecture of GGUF files")


# ---- attention -------------------------------------------------------------------------------------------------------


def rows_of_distances(config: DebertaConfig) -> np.ndarray:
    """The row in the table of relative positions for each distance of query minus key, int64 [2 P - 1].

    Logarithms are computed in float32, as in training.
    """
    away = np.arange(1 - config.max_position, config.max_position)
    if config.buckets:
        middle, wide = config.buckets // 2, np.maximum(abs(away), 1).astype(np.float32)
        most = np.log(np.float32((config.farthest - 1) / middle))
        far = np.ceil(np.log(wide / np.float32(middle)) / most * np.float32(middle - 1)).astype(np.int64) + middle
        away = np.where(abs(away) <= middle, away, np.sign(away) * far)
    return (away + config.span).clip(0, 2 * config.span - 1)


class Relative:
    """The table of relative positions [2 S, E]."""

    def __init__(self, config: DebertaConfig, placement: Placement) -> None:
        self.weight = placement.empty(2 * config.span, config.hidden_size)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self.weight)}


# ---- model -----------------------------------------------------------------------------------------------------------


class Deberta(Bert):
    """The encoder; see `Encoder`."""

    def __init__(self, config: DebertaConfig, placement: Placement) -> None:
        super().__init__(config, placement)
        self.relative, self.rows = Relative(config, placement), rows_of_distances(config)
        self.relative_norm = LayerNorm(config.hidden_size, config.norm_eps, placement)

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Hidden states [T, E] in fp32; see `Bert.forward`."""
        del positions
        x, relative = self.norm(self.embed(token_ids)), self.relative_norm(self.relative.weight)
        heads = self.config.num_heads
        for layer in self.layers:
            near = layer.attention.qkv(relative)
            x = layer(x, lambda qkv, near=near: disentangled_attention(qkv, near, heads, lengths, self.rows), types)
        return x


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: DebertaConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names."""
    del config
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    layer = f"{at}encoder.layer.{{i}}."
    lines = {f"attention.qkv:{part}.": f"attention.self.{name}_proj" for part, name in zip("qkv", _PARTS, strict=True)}
    lines |= {"attention.output:": "attention.output.dense", "attention_norm:": "attention.output.LayerNorm"}
    lines |= {"mlp.up:": "intermediate.dense", "mlp.down:": "output.dense", "output_norm:": "output.LayerNorm"}
    return [
        WeightName("embed:weight", f"{at}embeddings.word_embeddings.weight", None),
        WeightName("relative:weight", f"{at}encoder.rel_embeddings.weight", None),
        *both("relative_norm:", f"{at}encoder.LayerNorm"),
        *both("norm:", f"{at}embeddings.LayerNorm"),
        *(line for target, name in lines.items() for line in both(f"layers.{{i}}.{target}", layer + name)),
        *both("head:", "pooler.dense"),
        *both("score:", "classifier"),
    ]


_PARTS = ("query", "key", "value")


def ignored(config: DebertaConfig) -> list[str]:
    """Tensor names that an embedding does not need: heads of pre-training and of other tasks."""
    head = [] if config.scores else [r"pooler\..*", r"classifier\..*"]
    return [r"(\w+\.)?embeddings\.position_ids", r"(cls|lm_predictions|mask_predictions|legacy_cls)\..*", *head]


FAMILY = EncoderFamily(
    hf={
        "DebertaV2Model": ("deberta-v2", False),
        "DebertaV2ForMaskedLM": ("deberta-v2", False),
        "DebertaV2ForSequenceClassification": ("deberta-v2", True),
    },
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=Deberta,
    weights=weights,
    ignored=ignored,
    in_torch="the relative attention of DeBERTa has no compiled kernel",
)
