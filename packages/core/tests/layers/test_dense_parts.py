# SPDX-License-Identifier: MIT
"""What dense families have beyond Llama's parts, in small decoders: op by op in torch against recorded steps.

Every variant wires the layers as its families do. In recorded steps queries, keys, values and probabilities are
bfloat16, and with Q8_0 matrices activations have eight bits; the rest is fp32.
"""

from __future__ import annotations

import dataclasses
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants

from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

pytest.importorskip("numba")

from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner, StepLimits
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.layer_norm import HeadLayerNorm, LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.mlp import MLP, GatedMLP
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.sampling.params import SamplingParams

VOCABULARY, LAYERS, LENGTH, BLOCK = 123, 2, 70, 16
CPU = torch.device("cpu")

# ---- a decoder of any wiring -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Which parts a decoder has. Sizes that are no multiples of 32 or 16 where nothing else is said."""

    hidden: int = 72
    inner: int = 90
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rotary: tuple[int, ...] = (32, 32)  # dimensions that turn, per layer; 0 is none
    layer_norm: bool = False
    norm_bias: bool = True
    sandwich: bool = False
    parallel: bool = False
    bias: bool = False
    mlp: str = "silu"
    fused: bool = False
    head_norm: str = ""
    attention: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sinks: bool = False
    adapted: bool = False  # linear layers have an adapter beside them, which is plain whatever they are
    embedding: Mapping[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS = {
    "Llama": Variant(),
    "Phi-2": Variant(
        head_dim=72,
        kv_heads=4,
        rotary=(32, 32),
        layer_norm=True,
        parallel=True,
        bias=True,
        mlp="MLP gelu_tanh",
        embedding={"bias": True},
    ),
    "Phi-3": Variant(head_dim=72, rotary=(36, 36), fused=True),
    "Gemma-2": Variant(
        head_dim=16,
        rotary=(16, 16),
        sandwich=True,
        mlp="gelu_tanh",
        attention={"softcap": 2.0, "scale": 0.3},
        embedding={"scale": 8.5, "softcap": 4.0},
    ),
    "Gemma-3": Variant(
        rotary=(32, 32), sandwich=True, mlp="gelu_tanh", head_norm="rms", attention={"window": 9}, inner=96
    ),
    "StableLM": Variant(
        head_dim=72, rotary=(18, 18), layer_norm=True, norm_bias=False, parallel=True, head_norm="layer", heads=2
    ),
    "Cohere": Variant(layer_norm=True, embedding={"logit_scale": 0.25}, head_norm="layer"),
    "SmolLM3": Variant(head_dim=72, rotary=(72, 0), head_norm="rms"),
    "gpt-oss": Variant(head_dim=18, rotary=(18, 18), bias=True, sinks=True, attention={"window": 20}),
    "relu": Variant(layer_norm=True, sandwich=True, mlp="MLP relu"),
    "gelu": Variant(layer_norm=True, mlp="MLP gelu", bias=True),
    "adapters": Variant(adapted=True, bias=True),
    "adapters, parallel": Variant(adapted=True, parallel=True),
}


class Adapted:
    """y = x W^T + (x A^T) B^T, as an adapter joins a layer's product; its scale is in B."""

    def __init__(self, layer: Linear, placement: Placement) -> None:
        weights = [part for name, part in layer.parameters().items() if name.endswith("weight")]
        self.layer = layer
        self.lora_a = Linear(layer.in_features, 4, placement)
        self.lora_b = Linear(4, sum(part.shape[0] for part in weights), placement)

    def __call__(self, x: Value) -> Value:
        return self.layer(x) + self.lora_b(self.lora_a(x))


class Attention:
    def __init__(self, variant: Variant, layer: int, placement: Placement) -> None:
        heads, kv_heads, dim = variant.heads, variant.kv_heads, variant.head_dim
        self.sizes, self.dim = (heads * dim, kv_heads * dim, kv_heads * dim), dim
        shards = dict(zip("qkv", self.sizes, strict=True))
        self.qkv = Linear(variant.hidden, shards, placement, bias=variant.bias)
        self.output = Linear(heads * dim, variant.hidden, placement, bias=variant.bias)
        norms: list[Any] = [None, None]
        if variant.head_norm == "rms":
            norms = [RMSNorm(dim, 1e-5, placement) for _ in range(2)]
        elif variant.head_norm:
            norms = [HeadLayerNorm(count, dim, 1e-5, placement) for count in (heads, kv_heads)]
        self.q_norm, self.k_norm = norms
        turning = variant.rotary[layer]
        rotary = Rotary(RopeConfig(dim=turning), 128, placement) if turning else None
        sinks = torch.empty(heads) if variant.sinks else None
        options = dict(variant.attention)
        if layer == 0:
            options.pop("window", None)
        self.attend = PagedAttention(layer, dim, rotary, *norms, sinks=sinks, **options)

    def __call__(self, x: Value, step: StepInput) -> Value:
        q, k, v = (part.unflatten(-1, (-1, self.dim)) for part in self.qkv(x).split(self.sizes, dim=-1))
        return self.output(self.attend(q, k, v, step).flatten(1))


class Block:
    def __init__(self, variant: Variant, layer: int, placement: Placement) -> None:
        self.variant = variant
        self.attention_norm, self.mlp_norm = (norm(variant, placement) for _ in range(2))
        self.behind_attention, self.behind_mlp = (norm(variant, placement) for _ in range(2))
        self.attention = Attention(variant, layer, placement)
        kind, _, activation = variant.mlp.rpartition(" ")
        shape, bias = (variant.hidden, variant.inner, placement), variant.bias
        if kind:
            self.mlp = MLP(*shape, bias=bias, activation=activation)  # type: ignore[arg-type]
        else:
            self.mlp = GatedMLP(*shape, bias=bias, activation=activation, fused=variant.fused)  # type: ignore[arg-type]
        for part in (self.attention, self.mlp) if variant.adapted else ():
            linears = {name: Adapted(each, placement) for name, each in vars(part).items() if isinstance(each, Linear)}
            vars(part).update(linears)

    def __call__(self, x: Value, residual: Value | None, step: StepInput) -> tuple[Value, Value]:
        normed, residual = self.attention_norm.add(x, residual)
        attended = self.attention(normed, step)
        if self.variant.parallel:
            mixed = self.mlp(normed)
            return mixed, residual + attended
        if self.variant.sandwich:
            normed, residual = self.mlp_norm.add(self.behind_attention(attended), residual)
            return self.behind_mlp(self.mlp(normed)), residual
        normed, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(normed), residual


class Model:
    narrows = False

    def __init__(self, variant: Variant, placement: Placement) -> None:
        self.config = ModelConfig(
            model_type="toy",
            vocab_size=VOCABULARY,
            hidden_size=variant.hidden,
            intermediate_size=variant.inner,
            num_layers=LAYERS,
            num_heads=variant.heads,
            num_kv_heads=variant.kv_heads,
            head_dim=variant.head_dim,
            max_position=128,
            norm_eps=1e-5,
            rope=RopeConfig(dim=16),
            sliding_windows=(None,) * LAYERS,
        )
        self.embed = Embedding(VOCABULARY, variant.hidden, placement, **variant.embedding)
        self.layers = [Block(variant, layer, placement) for layer in range(LAYERS)]
        self.norm = norm(variant, placement)

    def prepare(self, positions: int) -> None:
        pass

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        x, residual = self.embed(token_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, step)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: Value, out: torch.Tensor | None = None) -> Value:
        return self.embed.logits(hidden, out)


def norm(variant: Variant, placement: Placement) -> RMSNorm | LayerNorm:
    if variant.layer_norm:
        return LayerNorm(variant.hidden, 1e-5, placement, bias=variant.norm_bias)
    return RMSNorm(variant.hidden, 1e-5, placement)


# ---- its weights -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class InMemory(StoredTensor):
    """A tensor of which no file is needed."""

    data: np.ndarray

    @property
    def path(self) -> Path:
        return Path("memory")

    def raw(self) -> np.ndarray:
        return self.data

    def release(self) -> None:
        pass


def stored(name: str, shape: tuple[int, ...], quantised: bool) -> InMemory:
    """Numbers that depend on the name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(*shape, generator=generator)
    if len(shape) == 1 or "_norm" in name:
        values = values * 0.1 + (1 if "norm" in name and "bias" not in name else 0)
    else:
        values *= shape[1] ** -0.5 * (3 if "embed" in name else 0.5 if "lora_b" in name else 1.0)
    if quantised and len(shape) == 2 and "_norm" not in name and "lora" not in name:
        data = quants.quantize(values.numpy(), GGMLQuantizationType.Q8_0)
        values = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType.Q8_0))
        return InMemory(name, shape, "Q8_0", data.nbytes, data)
    data = values.contiguous().numpy()
    return InMemory(name, shape, "F32", data.nbytes, data.view(np.uint8))


def parameters_of(thing: object, path: str = "") -> Iterator[tuple[str, Parameter]]:
    if hasattr(thing, "parameters"):
        yield from ((f"{path}:{name}", part) for name, part in thing.parameters().items())  # type: ignore[attr-defined]
    for key, value in vars(thing).items():
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if type(item).__module__.startswith(("candle_vllm.core.layers", __name__)):
                yield from parameters_of(item, f"{path}.{key}{number}")


def filled(variant: Variant, placement: Placement, *, quantised: bool = False) -> Model:
    model = Model(variant, placement)
    names = set()
    for name, part in parameters_of(model):
        part.fill(stored(name, part.shape, quantised))
        names.add(name.rpartition(".")[2].rpartition(":")[2])
    assert {"weight"} <= names
    return model


def recorded(variant: Variant, *, quantised: bool = False, tokens: int = LENGTH) -> RecordedRunner:
    model = filled(variant, Placement(CPU, "F32", WeightMemory()), quantised=quantised)
    limits = StepLimits(tokens=tokens, sequences=4, logit_rows=64, table_width=8, block_size=BLOCK, threads=2)
    return RecordedRunner(model, 8, limits)


def eager(variant: Variant, *, quantised: bool = False) -> EagerRunner:
    model = filled(variant, Placement(CPU, "F32"), quantised=quantised)
    return EagerRunner(model, 8, BLOCK, CPU, torch.float32)


def outcomes(runner: ModelRunner, chunks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and hidden states [T, E] of a prompt in chunks."""
    tokens = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    request = GenerationRequest(request_id="r", prompt_token_ids=tokens, params=SamplingParams())
    sequence = Sequence(request, 0, 0)
    sequence.block_table = array("i", reversed(range(8)))
    logits, hidden, start = [], [], 0
    for chunk in chunks:
        sequence.num_uncomputed_tokens = len(tokens) - start
        runner.forward(BatchBuilder(BLOCK, runner.step_memory).build([Run.next(sequence, chunk)]), [])
        for first in range(0, chunk, 64):
            rows = np.arange(first, min(first + 64, chunk))
            logits.append(torch.as_tensor(runner.score(rows)).clone())
            hidden += [torch.from_numpy(runner.hidden_sum(row)) for row in rows[:, None]]
        start += chunk
    runner.close()
    return torch.cat(logits), torch.stack(hidden).float()


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_steps_compute_what_torch_does(name: str) -> None:
    variant = VARIANTS[name]
    wanted = outcomes(eager(variant), [LENGTH])
    for got, exact in zip(outcomes(recorded(variant), [LENGTH]), wanted):
        assert error(got, exact) < 6e-3
    pieces = outcomes(recorded(variant, tokens=16), [16, 1, 7, 16, 16, 13, 1])
    for got, again in zip(pieces, outcomes(recorded(variant, tokens=40), [1, 40, 29])):
        assert torch.equal(got, again), "what a step holds must not change a token's numbers"


@pytest.mark.parametrize("name", ["Phi-2", "Gemma-2", "gpt-oss", "Cohere", "adapters"])
def test_with_quantised_matrices(name: str) -> None:
    variant = dataclasses.replace(VARIANTS[name], hidden=64, inner=96, head_dim=80, rotary=(32, 32))
    wanted = outcomes(eager(variant, quantised=True), [LENGTH])
    for got, exact in zip(outcomes(recorded(variant, quantised=True), [LENGTH]), wanted):
        assert error(got, exact) < 3e-2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attention": {"softcap": 2.0}}, "softcap of scores"),
        ({"attention": {"window": 9}}, "window"),
        ({"sinks": True}, "sinks"),
        ({"rotary": (32, 0)}, "a layer that does not turn"),
        ({"rotary": (16, 16)}, "partial rotary"),
        ({"embedding": {"scale": 1.5}}, "scale"),
        ({"embedding": {"bias": True}}, "bias"),
        ({"embedding": {"softcap": 4.0}}, "softcap of logits"),
        ({"mlp": "gelu_tanh"}, "activation"),
        ({"head_norm": "rms"}, "head norm"),
        ({"sandwich": True}, "sandwich"),
        ({"parallel": True}, "parallel"),
        ({"adapted": True}, "adapters"),
    ],
)
def test_no_part_is_idle(change: dict[str, Any], what: str) -> None:
    """Each part changes the logits by far more than the tolerance above, so that its loss would be seen."""
    plain = outcomes(eager(Variant()), [LENGTH])[0]
    assert error(outcomes(eager(dataclasses.replace(Variant(), **change)), [LENGTH])[0], plain) > 3e-2, what


def operations(variant: Variant) -> int:
    runner = recorded(variant)
    runner.close()
    return runner._recorder.num_rows


def test_parts_cost_operations_only_where_they_are() -> None:
    """A layer: norm, q, k, v, rotary, attend, merge, input, output, norm, gate, up, gate, down. Then norm and head."""
    plain = operations(Variant())
    assert plain == 1 + LAYERS * 14 + 2
    assert operations(Variant(fused=True)) == plain - LAYERS
    assert operations(Variant(layer_norm=True, sinks=True, attention={"softcap": 2.0}, rotary=(32, 0))) == plain
    assert operations(Variant(sandwich=True)) == plain + 2 * LAYERS
    assert operations(Variant(head_norm="layer")) == plain + 2 * LAYERS
    assert operations(Variant(embedding={"scale": 2.0, "bias": True, "softcap": 3.0})) == plain + 2
    assert operations(Variant(parallel=True)) == plain - LAYERS
    assert operations(Variant(mlp="MLP relu")) == plain - LAYERS
    # Of each of four: A, its result as an input, B; attention's result is made an input for W and for A.
    assert operations(Variant(adapted=True)) == plain + 13 * LAYERS


def test_the_form_of_head_norms_that_checkpoints_cut_by_heads() -> None:
    placement = Placement(CPU, "F32")
    whole, cut = (HeadLayerNorm(3, 8, 1e-5, placement, rows=rows) for rows in (False, True))
    assert whole.parameters()["weight"].shape == (3, 8)
    values = torch.arange(24.0).view(3, 8)
    for head, name in enumerate(("0.weight", "1.weight", "2.weight")):
        row = values[head]
        cut.parameters()[name].fill(InMemory("n", (8,), "F32", 32, row.numpy().view(np.uint8)))
    assert torch.equal(cut.weight, values)
