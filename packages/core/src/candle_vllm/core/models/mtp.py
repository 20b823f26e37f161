# SPDX-License-Identifier: MIT
"""Multi-token prediction layers (MTP, "nextn"), trained with a model and stored in the model's checkpoint.

At position p such a layer reads the embedding of token p + 1 and the output of the model's last norm at p. Both are
normalised, projected to one vector, and pass a block like the model's own. A norm and a head predict token p + 2.
The next draft starts from the layer's own result: before its norm in DeepSeek and GLM, after it in Qwen and Hy3.

Only the first of several such layers is used, for all drafts. It follows the model's last layer (DeepSeek, GLM, Hy3:
`model.layers.{N}`; GGUF: `blk.{N}`, with `blk.{N}.nextn`), or has its own names (Qwen3-Next, Qwen3.5: `mtp`). In a
model whose layers have recurrent states, this layer has attention, and its cache has only pages.
Source: DeepSeek-AI, 2024, arXiv:2412.19437, section 2.2. Shapes: T tokens, E hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import plus_one
from candle_vllm.core.loading.weights import Names, Seen, WeightName
from candle_vllm.core.models import deepseek, llama, qwen3_next
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.qwen3_next_config import Qwen3NextConfig
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.quantization.tensors import StoredTensor

_ROWS = 1 << 12  # rows that are compared at a time


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a checkpoint stores such a layer.

    Attributes:
        block: prefix of the block's names.
        names: names of the other parts, by their names in `NextTokens`; of these, the "own" parts may be missing.
        given_back: whether the next draft starts from the result of the norm.
        near_one: safetensors store norm weights as the difference from 1.
    """

    block: str
    names: Mapping[str, str]
    given_back: bool = False
    near_one: bool = False


_BEHIND = MappingProxyType(
    {
        "embedding_norm": "enorm",
        "hidden_norm": "hnorm",
        "project": "eh_proj",
        "own_norm": "shared_head.norm",
        "own_head": "shared_head.head",
        "own_embed": "embed_tokens",
    }
)
_HY3 = MappingProxyType({part: _BEHIND[part] for part in ("embedding_norm", "hidden_norm", "project")})
_HY3 = MappingProxyType({**_HY3, "own_norm": "final_layernorm"})
_APART = MappingProxyType(
    {
        "embedding_norm": "pre_fc_norm_embedding",
        "hidden_norm": "pre_fc_norm_hidden",
        "project": "fc",
        "own_norm": "norm",
    }
)


def find_layout(config: ModelConfig, checkpoint: Checkpoint) -> Layout:
    """Find the layer in a checkpoint.

    Raises:
        UnsupportedModelError: the checkpoint has no such layer, or such layers of its family are not implemented.
    """
    qwen = type(config) is Qwen3NextConfig  # not its subclasses, which have other blocks
    known = qwen or isinstance(config, (llama.LlamaConfig, deepseek.DeepseekConfig))
    # whose layers have windows, kinds, other names or other index keys
    others = ("step3p5", "step35", "nemotron_h", "nemotron_h_moe", "glm5_next_text", "glm5-next")
    if not known or config.model_type in others:
        raise UnsupportedModelError(f"multi-token prediction layers of {config.model_type} are not implemented")
    tensors, last, hy3 = checkpoint.tensors, config.num_layers, config.model_type == "hy_v3"
    if checkpoint.format == "gguf" and f"blk.{last}.nextn.eh_proj.weight" in tensors:
        names = {part: f"blk.{last}.nextn.{name.replace('.', '_')}" for part, name in _BEHIND.items()}
        return Layout(f"blk.{last}.", names, given_back=qwen or hy3)
    if f"model.layers.{last}.eh_proj.weight" in tensors:
        names = {part: f"model.layers.{last}.{name}" for part, name in (_HY3 if hy3 else _BEHIND).items()}
        return Layout(f"model.layers.{last}.", names, given_back=hy3)
    for start in ("mtp.", "model.mtp."):
        if f"{start}fc.weight" in tensors:
            names = {part: start + name for part, name in _APART.items()}
            return Layout(f"{start}layers.0.", names, given_back=True, near_one=qwen)
    raise UnsupportedModelError(f"{checkpoint.path}: the model has no multi-token prediction layer")


def layer_tensors(layout: Layout, checkpoint: Checkpoint, model: Sequence[WeightName]) -> Checkpoint:
    """The layer's own tensors in a model's checkpoint, without copies of the model's embedding and head.

    Args:
        layout, checkpoint: see `find_layout`.
        model: the model's table of weight names.
    """
    tensors, gguf = checkpoint.tensors, checkpoint.format == "gguf"
    names = {line.target: line.gguf if gguf else line.hf for line in model}
    shared = {f"own_{part}": str(names.get(f"{part}:weight")) for part in ("embed", "head")}
    unused = f"{layout.block}shared_head.weight"  # Hy3 has it, and predicts with the model's own
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(layout.block) and name != unused}
    for part, name in layout.names.items():
        stored, same = tensors.get(f"{name}.weight"), tensors.get(shared.get(part, ""))
        found.pop(f"{name}.weight", None)
        if stored is not None and not (same is not None and _is_copy(stored, same)):
            found[f"{name}.weight"] = stored
    return checkpoint.with_tensors(found)


def _is_copy(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.type_name, one.shape) != (other.type_name, other.shape):
        return False
    first, second = one.raw(), other.raw()
    return all(np.array_equal(first[at : at + _ROWS], second[at : at + _ROWS]) for at in range(0, len(first), _ROWS))


def head_config(config: ModelConfig, layout: Layout, checkpoint: Checkpoint) -> ModelConfig:
    """The config of the layer, as if it were a model with one layer."""
    routers = ("mlp.gate.weight", "mlp.router.gate.weight", "ffn_gate_inp.weight")
    sparse = any(layout.block + name in checkpoint.tensors for name in routers)
    common: dict[str, Any] = {"num_layers": 1, "sliding_windows": (None,)}
    if isinstance(config, deepseek.DeepseekConfig):
        return dataclasses.replace(config, **common, dense_layers=0 if sparse else 1, extra_layers=0)
    layers = frozenset({0} if sparse else ())
    if isinstance(config, Qwen3NextConfig):
        return dataclasses.replace(config, **common, sparse_layers=layers, delta_layers=frozenset())
    assert isinstance(config, llama.LlamaConfig)
    return dataclasses.replace(config, **common, sparse_layers=layers, unrotated_layers=frozenset())


# ---- layer -----------------------------------------------------------------------------------------------------------


class NextTokens:
    """The layer: hidden states of the model's last norm or of the layer, and token ids [T] -> logits [T, V].

    Args:
        config: the config from `head_config`.
        layout: where the layer is stored.
        checkpoint, placement: as for any model; the checkpoint is the result of `layer_tensors`.
        target: the model, whose embedding, norm and head are used if the layer lacks its own.
    """

    def __init__(
        self, config: ModelConfig, layout: Layout, checkpoint: Checkpoint, placement: Placement, target: DecoderStack
    ) -> None:
        hidden, eps = config.hidden_size, config.norm_eps
        self.config, self.input_size = config, hidden
        self.taps: tuple[int, ...] | None = None
        self._target, self._given_back = target, layout.given_back

        def stored(part: str) -> bool:
            return f"{layout.names.get(part)}.weight" in checkpoint.tensors

        self.own_embed = Embedding(config.vocab_size, hidden, placement) if stored("own_embed") else None
        self.own_head = Embedding(config.vocab_size, hidden, placement) if stored("own_head") else None
        self.own_norm = RMSNorm(hidden, eps, placement) if stored("own_norm") else None
        self.embedding_norm = RMSNorm(hidden, eps, placement)
        self.hidden_norm = RMSNorm(hidden, eps, placement)
        self.project = Linear(2 * hidden, hidden, placement)
        if isinstance(config, deepseek.DeepseekConfig):
            self.block: deepseek.Block | llama.Block | qwen3_next.Block
            self.block = deepseek.Block(config, 0, target.rotary, placement)
        elif isinstance(config, Qwen3NextConfig):
            self.block = qwen3_next.Block(config, 0, target.rotary, placement)
        else:
            assert isinstance(config, llama.LlamaConfig)
            self.block = llama.Block(config, 0, target.rotary, placement)

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        self._target.rotary.prepare(positions)

    def fuse(self, states: Value) -> Value:
        """See `DraftHead.fuse`; the hidden states are unchanged."""
        return states

    def forward(self, token_ids: Value, hidden: Value, step: StepInput) -> tuple[Value, Value]:
        """See `DraftHead.forward`."""
        embedded = self.embedding_norm((self.own_embed or self._target.embed)(token_ids))
        x = self.project(side_by_side(embedded, self.hidden_norm(hidden)))
        x, residual = self.block(x, None, step)
        norm = self.own_norm or self._target.norm
        assert norm is not None, "models with such layers have one"
        x, total = norm.add(x, residual)
        return x, x if self._given_back else total

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Logits [T, V] in fp32."""
        return (self.own_head or self._target.head or self._target.embed).logits(hidden, out)


# ---- weight names ----------------------------------------------------------------------------------------------------


def weight_names(layout: Layout, model: Sequence[WeightName]) -> list[WeightName]:
    """The layer's table of weight names; its block has the names of `model` with another prefix."""

    def moved(names: Names) -> Names:
        if isinstance(names, tuple):
            return tuple(each for name in names if not isinstance(each := moved(name), (tuple, type(None))))
        if isinstance(names, Seen):
            return dataclasses.replace(names, name=layout.block + names.name.removeprefix(HF).removeprefix(GG))
        return None if names is None else layout.block + names.removeprefix(HF).removeprefix(GG)

    block = [
        dataclasses.replace(
            line, target=line.target.replace("layers.{i}", "block", 1), hf=moved(line.hf), gguf=moved(line.gguf)
        )
        for line in model
        if line.target.startswith("layers.{i}.")
    ]
    parts = [
        WeightName(
            f"{part}:weight",
            f"{name}.weight",
            f"{name}.weight",
            plus_one if layout.near_one and part.endswith("norm") else None,
        )
        for part, name in layout.names.items()
    ]
    return [*block, *parts]
