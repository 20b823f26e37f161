# SPDX-License-Identifier: MIT
"""TII Falcon-H1: Mamba 2 and attention in parallel in each layer, and multipliers of embeddings, matrices and logits.

In GGUF files the weights already contain these multipliers. Source: TII, 2025, arXiv:2507.22448.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.kernels.silu_mul import gated
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.mlp import GatedMLP
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import llama
from candle_vllm.core.models.attention_names import GG, HF
from candle_vllm.core.models.falcon_h1_config import (
    Factors,
    FalconH1Config,
    config_from_gguf,
    config_from_hf,
    gguf_keys,
    otherwise,
)
from candle_vllm.core.models.family import Architecture, Family
from candle_vllm.core.models.llama import Attention, Llama, times
from candle_vllm.core.models.mamba2 import Mamba2Mixer, mixer_names
from candle_vllm.core.quantization.tensors import StoredTensor

# ---- block and model -------------------------------------------------------------------------------------------------


class SideBySide(Attention):
    """The sum of attention and Mamba 2: x [T, E] -> [T, E]."""

    def __init__(self, config: FalconH1Config, layer: int, rotary: Rotary, placement: Placement) -> None:
        super().__init__(config, layer, rotary, placement)
        cache = config.num_layers + layer
        self.mamba = Mamba2Mixer(cache, config.hidden_size, config.mamba, config.norm_eps, placement)

    def __call__(self, x: Value, step: StepInput) -> Value:
        return super().__call__(x, step) + self.mamba(x, step)


class ScaledMLP(GatedMLP):
    """down(silu(gate(x) * g) * up(x) * d), where g and d are the `gate` and `down` of `Factors`."""

    def __init__(self, config: FalconH1Config, placement: Placement) -> None:
        super().__init__(config.hidden_size, config.intermediate_size, placement)
        self._factors = config.factors or Factors()

    def __call__(self, x: Value) -> Value:
        factors = self._factors
        if factors.gate == factors.down == 1:
            return super().__call__(x)
        gate, up = self.gate_up(x).split([self.down.in_features] * 2, dim=-1)
        return self.down(times(gated(up, times(gate, factors.gate), "silu"), factors.down))


class Block(llama.Block):
    """One decoder layer: Llama's, with Mamba 2 in parallel to attention, and a `ScaledMLP`."""

    def mixer(self, config: FalconH1Config, layer: int, rotary: Rotary, placement: Placement) -> SideBySide:
        return SideBySide(config, layer, rotary, placement)

    def feed_forward(self, config: FalconH1Config, layer: int, placement: Placement) -> ScaledMLP:
        del layer
        return ScaledMLP(config, placement)


class FalconH1(Llama):
    """The decoder: token ids [T] -> hidden states [T, E] -> logits [T, V]."""

    block = Block

    def __init__(self, config: FalconH1Config, placement: Placement, checkpoint: Checkpoint) -> None:
        super().__init__(config, placement, checkpoint)
        self.narrows = False  # the last layer's states read all tokens


# ---- weight names ----------------------------------------------------------------------------------------------------


class Multiplied:
    """View of a weight that GGUF files store times a factor, and Hugging Face checkpoints (`plain`) without it."""

    def __init__(self, part: str, *, plain: bool) -> None:
        self._part, self._plain = part, plain

    def __call__(self, stored: StoredTensor, config: FalconH1Config) -> StoredTensor:
        if (config.factors is None) == self._plain:
            raise AdapterError(
                f"{stored.path}: multipliers are part of the matrices in GGUF files, and keys of config.json in other "
                "models: an adapter for one kind of file does not fit the other"
            )
        return stored

    def undone(self, stored: StoredTensor, config: FalconH1Config) -> StoredTensor:
        """Multiply the weight by its factor; the result has the stored type, or F32 if that is quantised."""
        factor, mamba = getattr(config.folded, self._part), config.mamba
        if isinstance(factor, tuple):
            factor = np.repeat(factor, (mamba.inner, *mamba.parts, mamba.heads))[:, None]
        made = computed(stored, stored.shape, lambda values: (values * factor).astype(np.float32), "F32")
        return computed(made, made.shape, lambda values: values, stored.dtype)


_RENAMED = {"mlp.": "feed_forward.", "post_attention_layernorm": "pre_ff_layernorm", "l.norm": "l.final_layernorm"}
_FOLDED = {f"{part}:weight": part for part in ("embed", "norm", "head")}
_FOLDED |= {f"layers.{{i}}.mlp.{end}weight": part for part, end in (("gate", "gate_up:gate."), ("down", "down:"))}
_FOLDED |= {f"layers.{{i}}.attention.mamba.{part}:weight": part for part in ("inputs", "result")}
_FOLDED |= {"layers.{i}.attention.output:weight": "output"}
_FOLDED |= {f"layers.{{i}}.attention.qkv:{part}.weight": part for part in "qkv"}


def _line(line: WeightName) -> WeightName:
    """A row of Llama's or Mamba 2's table with Falcon-H1's names, and with `Multiplied` for a weight with a factor."""
    forms: list[Any] = [each if isinstance(each, tuple) else (each,) for each in (line.hf, line.gguf)]
    (hf, *_), names = forms
    view, part = line.hf_view, _FOLDED.get(line.target)
    if isinstance(hf, str):
        hf = functools.reduce(lambda name, pair: name.replace(*pair), _RENAMED.items(), hf)
    if line.target.endswith("mlp_norm:weight"):
        names = (GG + "ffn_norm", *names)  # llama.cpp's name has no suffix
    if part is not None:
        first = names[0].name if isinstance(names[0], Seen) else str(names[0])
        view, names = Multiplied(part, plain=True), (Seen(first, Multiplied(part, plain=False)), *names[1:])
    return dataclasses.replace(line, hf=hf, gguf=names, hf_view=view)


FAMILY = Family(
    hf={"FalconH1ForCausalLM": "falcon_h1"},
    gguf=("falcon-h1",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    build=FalconH1,
    weights=[_line(line) for line in (*llama.WEIGHTS, *mixer_names("attention.mamba", HF + "mamba"))],
    ignored=llama.ignored,
    as_gguf={"falcon_h1": Architecture(name="falcon-h1", more=gguf_keys, otherwise=otherwise, unread=())},
)
