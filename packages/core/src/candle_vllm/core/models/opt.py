# SPDX-License-Identifier: MIT
"""OPT: GPT-2 with ReLU, and positions that begin with the third row of their table.

OPT-350m has a norm after each part of a block, x = norm(x + part(x)), no norm after the last block, and embeddings
that are narrower than the hidden states. Source: Zhang et al., 2022, arXiv:2205.01068.
"""

from __future__ import annotations

import dataclasses

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import shared_from_hf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.family import Family
from candle_vllm.core.models.gpt import Block, Gpt, GptConfig, activation_of

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptConfig(GptConfig):
    """Config of OPT.

    Attributes:
        embed_size: elements of an embedding; it is projected if hidden states have another size.
        norms_behind: norms follow each part of a block instead of preceding it; no norm follows the last block.
    """

    embed_size: int
    norms_behind: bool


def config_from_hf(fields: Fields, model_type: str) -> OptConfig:
    """Read `config.json` of opt."""
    for key, usual in (("layer_norm_elementwise_affine", True), ("_remove_final_layer_norm", False)):
        if fields.get(key, bool, usual) != usual:
            raise UnsupportedModelError(f"{fields.path}: {key} is {str(not usual).lower()}, which is not implemented")
    names = {"intermediate_size": "ffn_dim", "num_key_value_heads": "num_attention_heads"}
    fields = fields.with_defaults(tie_word_embeddings=True, layer_norm_eps=1e-5)
    shared = shared_from_hf(fields, model_type, eps="layer_norm_eps", names=names)
    bias = fields.get("enable_bias", bool, True)
    return OptConfig(
        **shared,
        activation=activation_of(fields, "activation_function", "relu"),
        positions=shared["max_position"],
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        embed_size=fields.count("word_embed_proj_dim", shared["hidden_size"]),
        norms_behind=not fields.get("do_layer_norm_before", bool, True),
    )


# ---- block -----------------------------------------------------------------------------------------------------------


class NormsBehind(Block):
    """One decoder layer with norms after attention and MLP; see `Block`."""

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        assert self.mlp_norm is not None
        x = x if residual is None else residual + x
        x = self.attention_norm(x + self.attention(x, step))
        return self.mlp_norm(x + self.mlp(x)), None


# ---- model -----------------------------------------------------------------------------------------------------------


class Opt(Gpt):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    def __init__(self, config: OptConfig, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        hidden, size = config.hidden_size, config.embed_size
        self.project_in = self.project_out = None
        if size != hidden:
            self.embed = Embedding(config.vocab_size, size, placement)
            self.head = None if config.tie_embeddings else Embedding(config.vocab_size, size, placement)
            self.project_in, self.project_out = Linear(size, hidden, placement), Linear(hidden, size, placement)
        if config.norms_behind:
            self.layers = [NormsBehind(config, at, self.rotary, placement) for at in range(config.num_layers)]
            self.norm = None

    def start(self, token_ids: Value, step: StepInput) -> Value:
        """See `DecoderStack.start`."""
        if self.project_in is None or self.positions is None:
            return super().start(token_ids, step)
        return self.project_in(self.embed(token_ids)) + self.positions(step.positions)

    def end(self, hidden: Value) -> Value:
        """See `DecoderStack.end`."""
        if self.project_out is None:
            return hidden
        return self.project_out(hidden.wanted() if isinstance(hidden, Recorded) else hidden)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _names(part: str) -> tuple[str, str]:
    """The tensor name in a checkpoint with a head, and in one that was saved without it."""
    return f"model.decoder.{part}", f"decoder.{part}"


_L = "layers.{i}."  # in targets
WEIGHTS = [
    WeightName("embed:weight", _names("embed_tokens.weight"), None),
    WeightName(
        "positions:weight", _names("embed_positions.weight"), None, lambda stored, _: stored.rows(2, stored.shape[0])
    ),
    WeightName("project_in:weight", _names("project_in.weight"), None),
    WeightName("project_out:weight", _names("project_out.weight"), None),
    *pair(_L + "attention_norm:", _names(_L + "self_attn_layer_norm")),
    *[line for part in "qkv" for line in pair(f"{_L}attention.qkv:{part}.", _names(f"{_L}self_attn.{part}_proj"))],
    *pair(_L + "attention.output:", _names(_L + "self_attn.out_proj")),
    *pair(_L + "mlp_norm:", _names(_L + "final_layer_norm")),
    *pair(_L + "mlp.up:", _names(_L + "fc1")),
    *pair(_L + "mlp.down:", _names(_L + "fc2")),
    *pair("norm:", _names("final_layer_norm")),
    WeightName("head:weight", "lm_head.weight", None),
]


FAMILY = Family(
    hf={"OPTForCausalLM": "opt"},
    config_from_hf=config_from_hf,
    build=Opt,
    weights=WEIGHTS,
    ignored=lambda config: [r"lm_head\.weight"] if config.tie_embeddings else [],
)
