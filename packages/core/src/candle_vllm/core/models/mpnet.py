# SPDX-License-Identifier: MIT
"""MPNet and DistilBERT: a `Bert` without token types; MPNet adds a bias by relative position that its layers share.

Sources: Song et al., 2020, arXiv:2004.09297 (MPNet); Sanh et al., 2019, arXiv:1910.01108 (DistilBERT); Raffel et al.,
2019, arXiv:1910.10683, section 2.1 (buckets of relative positions).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter, WeightName
from candle_vllm.core.models.bert import Bert, BertConfig
from candle_vllm.core.models.encoder_parts import ACTIVATIONS, both, head_of, prefix_of, sizes_from_hf
from candle_vllm.core.models.family import EncoderFamily

BUCKETS, FARTHEST = 32, 128  # of relative positions; those from FARTHEST on share the last bucket

# ---- config ----------------------------------------------------------------------------------------------------------


def config_from_hf(fields: Fields, model_type: str, *, scores: bool) -> BertConfig:
    """Reads `config.json` of mpnet and distilbert."""
    if model_type == "distilbert":
        said = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        said |= {"intermediate_size": "hidden_dim", "hidden_act": "activation"}
        names, first = {name: key for name, key in said.items() if key in fields}, 0
    else:
        names, first = {}, fields.get("pad_token_id", int, 1) + 1
        if fields.count("relative_attention_num_buckets", BUCKETS) != BUCKETS:
            raise UnsupportedModelError(f"{fields.path}: relative_attention_num_buckets must be {BUCKETS}")
    fields = Fields({**fields.values, **{name: fields.values[key] for name, key in names.items()}}, fields.path)
    return BertConfig(
        model_type=model_type,
        **sizes_from_hf(fields),
        max_position=fields.count("max_position_embeddings", 512) - first,
        norm_eps=fields.get("layer_norm_eps", float, 1e-12),
        first_position=first,
        typed=False,
        activation=fields.choice("hidden_act", "gelu", *ACTIVATIONS),
        head_activation="relu" if model_type == "distilbert" else "tanh",
        **head_of(fields, scores=scores),
    )


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> BertConfig:
    """No GGUF file has an architecture of this family: DistilBERT's are files of bert."""
    raise UnsupportedModelError(f"{checkpoint.path}: {fields.prefix} is not an architecture of GGUF files")


# ---- attention -------------------------------------------------------------------------------------------------------


class BucketBias:
    """A number for each head and bucket of relative positions, [32, H]; `table` has one for each distance."""

    def __init__(self, config: BertConfig, placement: Placement) -> None:
        self._weight, self._placement = placement.empty(BUCKETS, config.num_heads), placement
        self._farthest, self.table = config.max_position - 1, None

    def finish(self) -> None:
        """Spreads the buckets over all distances of key from query."""
        spread = on_host(self._weight).T[:, buckets(np.arange(-self._farthest, self._farthest + 1))]
        self.table = self._placement.constant(np.ascontiguousarray(spread))

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self._weight)}


def buckets(distances: np.ndarray) -> np.ndarray:
    """The bucket of each distance of a key from its query: one for each near one, then wider ones, keys behind last.

    The logarithm is taken in float32, as models are trained with.
    """
    half, exact = BUCKETS // 2, BUCKETS // 4
    away = abs(distances)
    with np.errstate(divide="ignore"):
        ratio = np.log(np.float32(away) / np.float32(exact)) / np.float32(np.log(FARTHEST / exact))
    wide = exact + (np.maximum(ratio, 0) * np.float32(half - exact)).astype(np.int64)
    return np.where(distances > 0, half, 0) + np.where(away < exact, away, np.minimum(wide, half - 1))


# ---- model -----------------------------------------------------------------------------------------------------------


def build(config: BertConfig, placement: Placement) -> Bert:
    """The model without its weights."""
    return Bert(config, placement, BucketBias(config, placement) if config.model_type == "mpnet" else None)


# ---- weight names ----------------------------------------------------------------------------------------------------


def weights(config: BertConfig, stored: Iterable[str]) -> list[WeightName]:
    """The table of names."""
    at = prefix_of(stored, "embeddings.word_embeddings.weight")
    mpnet, table = config.model_type == "mpnet", f"{at}embeddings."
    layer, block = f"{at}{'encoder' if mpnet else 'transformer'}.layer.{{i}}.", "blk.{i}."
    qkv = {part: f"attention.attn.{part}" if mpnet else f"attention.{part}_lin" for part in "qkv"}
    rest = (
        ("attention.attn.o", "attention.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm")
        if mpnet
        else ("attention.out_lin", "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm")
    )
    targets = ("attention.output:", "attention_norm:", "mlp.up:", "mlp.down:", "output_norm:")
    ggufs = ("attn_output", "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm")
    head = ("classifier.dense", "classifier.out_proj") if mpnet else ("pre_classifier", "classifier")
    lines = [(f"attention.qkv:{part}.", qkv[part], f"attn_{part}") for part in "qkv"]
    lines += list(zip(targets, rest, ggufs, strict=True))
    return [
        WeightName("embed:weight", f"{table}word_embeddings.weight", "token_embd.weight"),
        WeightName("positions:weight", f"{table}position_embeddings.weight", "position_embd.weight"),
        WeightName("near:weight", f"{at}encoder.relative_attention_bias.weight", None),
        *both("norm:", f"{table}LayerNorm", "token_embd_norm"),
        *(line for target, name, gguf in lines for line in both(f"layers.{{i}}.{target}", layer + name, block + gguf)),
        *both("head:", head[0]),
        *both("score:", head[1]),
    ]


def ignored(config: BertConfig) -> list[str]:
    """Stored names that a vector does not need: counted positions, the pooler, the heads of pre-training."""
    head = [] if config.scores else [r"(pre_)?classifier\..*"]
    return [r"(\w+\.)?embeddings\.position_ids", r"(\w+\.)?pooler\..*", r"(lm_head|vocab_\w+)\..*", *head]


FAMILY = EncoderFamily(
    hf={
        "MPNetModel": ("mpnet", False),
        "MPNetForMaskedLM": ("mpnet", False),
        "MPNetForSequenceClassification": ("mpnet", True),
        "DistilBertModel": ("distilbert", False),
        "DistilBertForMaskedLM": ("distilbert", False),
        "DistilBertForSequenceClassification": ("distilbert", True),
    },
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=build,
    weights=weights,
    ignored=ignored,
)
