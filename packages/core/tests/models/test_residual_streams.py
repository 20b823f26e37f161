# SPDX-License-Identifier: MIT
"""Hyper-connections: transformers' modules, in torch and in a recorded step, with rows narrowed or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextHyperConnection, Glm5NextTextHyperHead

from candle_vllm.core.devices import CPU
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.models.residual_streams import HyperConnection, StreamCopies, StreamHead, Streams
from packages.core.tests.layers.test_dense_parts import InMemory

SIZE, TOKENS, EPS = 48, 7, 1e-5


def theirs(kind: Any, count: int, rounds: int) -> Any:
    torch.manual_seed(count)
    sizes = {"hidden_size": SIZE, "hc_mult": count, "hc_sinkhorn_iters": rounds}
    module = kind(DeepseekV4Config(**sizes, hc_eps=1e-3, rms_norm_eps=EPS))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(1.0 if name.endswith("scale") else 0.0, 0.1 if name.endswith("fn") else 0.5)
    return module


def filled(layer: Any, module: torch.nn.Module) -> Any:
    prefix = "hc_" if isinstance(module, DeepseekV4HyperHead) else ""
    names = [prefix + name for name in ("fn", "base", "scale")]
    parameters = {**{f"fn.{name}": each for name, each in layer.fn.parameters().items()}, **layer.parameters()}
    for (name, parameter), own in zip(parameters.items(), names, strict=True):
        values = getattr(module, own).detach().numpy()
        assert parameter.shape == values.shape, name
        parameter.fill(
            InMemory(name, values.shape, "F32", values.nbytes, values.reshape(len(values), -1).view(np.uint8))
        )
    layer.finish()
    return layer


def replayed(recorder: Recorder, given: list[tuple[Any, torch.Tensor]], made: Any, rows: int) -> torch.Tensor:
    """Run the recorded plan on the given buffers; return the first rows of the result."""
    for buffer, values in given:
        buffer.array[:] = np.nan
        buffer.rows[: len(values)] = values.numpy()
    recorder.arrays.numbers[[StepNumber.TOKENS, StepNumber.LOGIT_ROWS]] = TOKENS, rows
    recorder.arrays.logit_rows[:2] = 6, 3
    team = ThreadTeam(2)
    team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
    team.close()
    return torch.from_numpy(buffer_of(made).rows[:rows].copy())


def recording() -> Recorder:
    limits = StepLimits(tokens=9, sequences=1, logit_rows=2, table_width=1, block_size=16, threads=2)
    return Recorder(limits, host_isa())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()) < 1e-6


@pytest.mark.parametrize("kind", [DeepseekV4HyperConnection, Glm5NextTextHyperConnection])
@pytest.mark.parametrize(("count", "rounds"), [(4, 20), (2, 1), (3, 5)])
@torch.no_grad()
def test_a_connection_reads_and_writes_as_transformers_does(kind: Any, count: int, rounds: int) -> None:
    module, streams = theirs(kind, count, rounds), Streams(count, SIZE, rounds, 1e-3, EPS)
    x, result = 3 * torch.randn(1, TOKENS, count, SIZE), torch.randn(TOKENS, SIZE)
    post, comb, read = module(x)
    written = (post.unsqueeze(-1) * result.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)).flatten(2)[0]
    eager = filled(HyperConnection(streams, Placement(CPU, "F32")), module)
    own, weights = eager(x.flatten(2)[0])
    assert close(own, read[0])
    assert close(eager.write(x.flatten(2)[0], result, weights), written)

    layer = filled(HyperConnection(streams, Placement(CPU, "F32", WeightMemory())), module)
    for rows in ([*range(TOKENS)], [6, 3]):
        recorder = recording()
        before, after = recorder.buffer(count * SIZE), recorder.buffer(SIZE)
        value = buffer_value(recorder, before)
        own, weights = layer(value)
        sublayer = buffer_value(recorder, after)
        made = layer.write(value, sublayer.narrowed() if len(rows) == 2 else sublayer, weights)
        given = [(before, x.flatten(2)[0]), (after, result)]
        assert close(replayed(recorder, given, made, len(rows)), written[rows])
        assert close(torch.from_numpy(buffer_of(own).rows[:TOKENS].copy()), read[0])


@pytest.mark.parametrize("count", [2, 4])
@torch.no_grad()
def test_the_ends_are_those_of_transformers(count: int) -> None:
    """The first copies, the mean at the end of GLM-5.3-Flash, and the weighted sum at the end of DeepSeek V4."""
    module, streams = theirs(DeepseekV4HyperHead, count, 1), Streams(count, SIZE, 1, 1e-3, EPS)
    x, narrow = torch.randn(1, TOKENS, count, SIZE), torch.randn(TOKENS, SIZE)
    wanted = [narrow.repeat(1, count), Glm5NextTextHyperHead()(x)[0], module(x)[0]]
    eager, ends = Placement(CPU, "F32"), [narrow, x.flatten(2)[0], x.flatten(2)[0]]
    for placement in (eager, Placement(CPU, "F32", WeightMemory())):
        copies, head = StreamCopies(count, placement), filled(StreamHead(streams, placement), module)
        for layer, given, expected in zip((copies, copies.mean, head), ends, wanted, strict=True):
            if placement is eager:
                assert close(layer(given), expected)
                continue
            recorder = recording()
            buffer = recorder.buffer(given.shape[1])
            made = layer(buffer_value(recorder, buffer))
            assert close(replayed(recorder, [(buffer, given)], made, TOKENS), expected)


def test_sizes_take_no_memory_before_they_are_checked() -> None:
    """A config may claim any size; models are first built by their shapes alone."""
    made = HyperConnection(Streams(4, 1 << 40, 20, 1e-6, 1e-6), SHAPES)
    assert made.norm.weight.shape == (1 << 42,)
