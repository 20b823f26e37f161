# SPDX-License-Identifier: MIT
"""Whole steps over the Triton kernels: a toy model's answers are those of the references."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.outputs import GenerationOutput, OutputCollector
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.kernels import dispatch
from candle_vllm.core.kernels.device_stream import CudaStream
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.quantization.format_writers import Written, gptq, quantise_model
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.common_run import few

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SIZE, CONTEXT = 16, 64
PROMPTS = [[5, 9, 200], list(range(40, 62))]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=5, ignore_eos=True),
    SamplingParams(
        temperature=0.0, max_tokens=3, prompt_logprobs=5, repetition_penalty=1.5, logprobs=2, ignore_eos=True
    ),
]


def load(path: Path, device: torch.device, dtype: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> LoadedModel:
    """The model as it lies on a GPU, wherever the test runs."""
    usual = loading.choose_placement

    def placed(config: EngineConfig, *others: Any) -> Any:
        return dataclasses.replace(usual(config, *others), **changes)

    monkeypatch.setattr(loading, "choose_placement", placed)
    config = EngineConfig(model=str(path), op_by_op=True, dtype=dtype)  # type: ignore[arg-type]
    return loading.load_model(config, device, lambda *_: None)


def answers(
    loaded: LoadedModel,
    device: torch.device,
    *,
    prompts: int = 0,
    cache: torch.dtype | None = None,
    largest: bool = False,
) -> list[GenerationOutput]:
    """The second request comes when the first decodes; steps with prompts are captured up to so many tokens.

    `cache` is its type where its rows have scales of their own. The `largest` steps run first, as at a start: under the
    interpreter they take as long as the answers.
    """
    stream = LazyStream() if device.type == "cpu" else CudaStream(device)
    limits = DeviceLimits(32, 2, CONTEXT // SIZE, SIZE)
    dtype, row_scales = cache or loaded.placement.torch_dtype, cache is not None
    runner = DeviceRunner(loaded.decoder, limits, stream, dtype, captured_prompts=prompts, row_scales=row_scales)
    for work in runner.largest_steps() if largest or device.type != "cpu" else ():
        work()
    runner.allocate(12)
    scheduler = Scheduler(BlockManager(12, SIZE), 2, 32)
    engine = Engine(runner, scheduler, preparation_for(loaded, CONTEXT))
    collectors = []
    waiting = [
        GenerationRequest(request_id=str(index), prompt_token_ids=prompt, params=params)
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS))
    ]
    while waiting or engine.has_work:
        if waiting:
            collectors.append(OutputCollector(waiting[0]))
            engine.add(engine.prepare(waiting.pop(0)))
        for piece in engine.step():
            assert piece.error is None, piece.error
            collectors[int(piece.request_id)].add(piece)
    return [collector.result() for collector in collectors]


def check(got: list[GenerationOutput], wanted: list[GenerationOutput], tolerance: float) -> None:
    """RMS(error) / RMS of the prompts' log-probabilities is small; where it is very small, answers are the same."""
    for one, other in zip(got, wanted, strict=True):
        a, b = (
            torch.tensor([entry.chosen.logprob for entry in output.prompt_logprobs or () if entry], dtype=torch.float64)
            for output in (one, other)
        )
        assert len(a) == len(b) == len(one.prompt_token_ids) - 1
        assert float((a - b).square().mean().sqrt()) <= tolerance * float(b.square().mean().sqrt())
        assert len(one.outputs[0].token_ids) == 3
        if tolerance < 1e-3:
            assert one.outputs[0].token_ids == other.outputs[0].token_ids


CONFIG = toy_config("qwen3", max_position_embeddings=CONTEXT, head_dim=32, tie_word_embeddings=True)
SMALL = toy_config("llama", max_position_embeddings=CONTEXT, head_dim=32, num_hidden_layers=1)  # interpreted: seconds


@pytest.mark.parametrize("prompts", few([0, 32], 32))
def test_plain_weights(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: int) -> None:
    loaded = load(write_toy_model(tmp_path / "toy", CONFIG), device, "f32", monkeypatch)
    got = answers(loaded, device, prompts=prompts, largest=True)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    reference = load(write_toy_model(tmp_path / "toy", CONFIG), torch.device("cpu"), "f32", monkeypatch)
    check(got, answers(reference, torch.device("cpu")), 1e-4)


@pytest.mark.parametrize("cache", few([torch.int8, torch.uint8], torch.int8))
def test_a_cache_whose_rows_have_scales(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: torch.dtype
) -> None:
    """The kernels against the references over the same cache, and both near the plain one."""
    path = write_toy_model(tmp_path / "toy", {**CONFIG, "num_hidden_layers": 1})
    got = answers(load(path, device, "f32", monkeypatch), device, cache=cache)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    reference = load(path, torch.device("cpu"), "f32", monkeypatch)
    check(got, answers(reference, torch.device("cpu"), cache=cache), 1e-3)
    plain = answers(reference, torch.device("cpu"))
    check(got, plain, 0.02 if cache == torch.int8 else 0.05)
    with pytest.raises(AssertionError):
        check(got, plain, 1e-6)


@pytest.mark.every_case
@pytest.mark.parametrize("invariant", few([False, True], True))  # families have the other on the way to their logits
def test_quantised_weights(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    """Matrices of a layer in three types, plain ones among them, against the decoded weights in fp32."""
    path = write_toy_gguf(tmp_path / "toy.gguf", SMALL, quantization="Q4_0", others={"attn_v": "F16", "ffn_up": "Q8_0"})
    loaded = load(path, device, "bf16", monkeypatch, keeps_quantised=True, invariant=invariant)
    got = answers(loaded, device)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    reference = load(path, torch.device("cpu"), "f32", monkeypatch, keeps_quantised=False)
    check(got, answers(reference, torch.device("cpu")), 0.03)


@pytest.mark.every_case  # the kernels' own tests have the same forms
@pytest.mark.usefixtures("turing")
def test_turing(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised weights, and plain ones beside them, in float16 against fp32."""
    path = write_toy_gguf(tmp_path / "toy.gguf", SMALL, quantization="Q4_0", others={"attn_v": "F16"})
    got = answers(load(path, device, "f16", monkeypatch, keeps_quantised=True), device)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    reference = load(path, torch.device("cpu"), "f32", monkeypatch, keeps_quantised=False)
    check(got, answers(reference, torch.device("cpu")), 0.03)


@pytest.mark.every_case  # families have a row of each format
def test_codes_in_groups(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ with zeros of its own, some layers in activation order, and a plain head."""

    def writer(weight: torch.Tensor) -> Written:
        return gptq(weight, symmetric=False, act_order=weight.shape[0] != SMALL["intermediate_size"])

    source = write_toy_model(tmp_path / "toy", SMALL)
    folder, _ = quantise_model(source, tmp_path, writer)
    got = answers(load(folder, device, "bf16", monkeypatch, keeps_quantised=True), device)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    reference = load(folder, torch.device("cpu"), "f32", monkeypatch, keeps_quantised=False)
    check(got, answers(reference, torch.device("cpu")), 0.03)
