# SPDX-License-Identifier: MIT
"""The compiled engine on CPUs that lack instructions, with too many threads, and with matrices of odd shapes."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from candle_vllm.core import ConfigError, InferenceEngine, SamplingParams
from candle_vllm.core.engine.runners import recorded_runner
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.testing.toy_model import toy_config
from packages.core.tests import toy_gguf
from packages.core.tests.toy_gguf import write_toy_gguf

CONFIG = toy_config(hidden_size=128, head_dim=32, intermediate_size=160)
PROMPT = [(7 * i) % 256 for i in range(90)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_gguf(tmp_path_factory.mktemp("gguf") / "toy.gguf", CONFIG, quantization="Q4_1")


def answer(path: Path, **settings: Any) -> tuple[list[int], list[dict[int, float]]]:
    """Greedy tokens, and the best log-probabilities of each."""
    with InferenceEngine(str(path), **({"threads": 2, "block_size": 16} | settings)) as engine:
        output = engine.generate([PROMPT], GREEDY, use_tqdm=False)[0].outputs[0]
        scores = [{t.token_id: t.logprob for t in (e.chosen, *e.top)} for e in output.logprobs or ()]
        return list(output.token_ids), scores


# ---- instructions that a CPU may not have ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(model: Path) -> tuple[list[int], list[dict[int, float]]]:
    """The plain path in fp32."""
    return answer(model, op_by_op=True)


def gap(scores: list[dict[int, float]], exact: list[dict[int, float]]) -> float:
    """RMS of the differences of log-probabilities over their own RMS."""
    gaps = [row[token] - true[token] for row, true in zip(scores, exact) for token in row.keys() & true.keys()]
    assert len(gaps) > 10 * len(exact)
    sizes = [value for row in exact for value in row.values()]
    return float(np.sqrt(np.mean(np.square(gaps)) / np.mean(np.square(sizes))))


@pytest.mark.every_case
@pytest.mark.parametrize("isa", [Isa.GENERIC, Isa.VNNI, Isa.BF16, Isa.VNNI | Isa.BF16, ~Isa.GENERIC], ids=repr)
def test_every_set_of_instructions_gives_the_model(
    isa: Isa, model: Path, exact: tuple[list[int], list[dict[int, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa & ~host_isa():
        pytest.skip(f"this CPU has no {isa & ~host_isa()}")
    monkeypatch.setattr(recorded_runner, "host_isa", lambda: isa)
    tokens, scores = answer(model)
    assert tokens == exact[0]
    assert gap(scores, exact[1]) < 0.03


# ---- threads ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """This thread, and those that it starts, may use a single CPU."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system does not pin threads")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_the_number_of_threads_changes_no_bit(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = answer(model, threads=1)
    many = len(os.sched_getaffinity(0)) + 3
    assert "outnumber CPUs" not in caplog.text
    began = time.perf_counter()
    assert answer(model, threads=many) == alone
    assert time.perf_counter() - began < 120  # seconds alone; a team that spins instead of sleeping takes minutes
    assert f"threads ({many}) outnumber CPUs" in caplog.text


def test_a_busy_machine_changes_no_bit(model: Path) -> None:
    alone = answer(model, threads=1)
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    began = time.perf_counter()
    try:
        assert answer(model, threads=len(loops)) == alone
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert time.perf_counter() - began < 120


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_a_process_pinned_to_one_cpu(
    threads: int | None, model: Path, exact: tuple[list[int], Any], caplog: pytest.LogCaptureFixture
) -> None:
    began = time.perf_counter()
    assert answer(model, threads=threads)[0] == exact[0]
    assert time.perf_counter() - began < 120
    assert ("threads (3) outnumber CPUs (1)" in caplog.text) == (threads == 3)


@pytest.mark.usefixtures("one_cpu")
def test_many_barriers_on_one_cpu() -> None:
    team = ThreadTeam(4)
    rows = np.zeros(1, np.int64)
    began = time.perf_counter()
    for _ in range(200):
        team.run(rows, 0)  # no operation, one barrier
    team.close()
    assert time.perf_counter() - began < 30


def test_a_system_that_starts_no_more_threads_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = threading.active_count(), threading.Thread.start

    def start(self: threading.Thread) -> None:
        if self.name == "candle-vllm-cpu-3":
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ConfigError, match=r"does not start 5 threads \(.*a stack of 16 MiB: set threads=2$"):
        ThreadTeam(5)
    assert threading.active_count() <= before  # those that did start have ended


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.5, True])
def test_numbers_of_threads_that_cannot_be(threads: Any, model: Path) -> None:
    with pytest.raises(ConfigError, match=r"threads .* is not a whole number between 1 and 1024"):
        InferenceEngine(str(model), threads=threads)


# ---- shapes without a kernel -----------------------------------------------------------------------------------------


def test_a_matrix_whose_rows_are_no_whole_groups_is_multiplied_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, add = toy_gguf.quants.quantize, GGUFWriter.add_tensor

    def add_plain(self: GGUFWriter, name: str, data: np.ndarray, raw_dtype: Any = None) -> None:
        add(self, name, data, raw_dtype=None if data.dtype == np.float32 else raw_dtype)

    # As real quantisers do: a row that the type cannot hold stays as it is.
    monkeypatch.setattr(
        toy_gguf.quants, "quantize", lambda data, kind: data if data.shape[1] % 32 else quantize(data, kind)
    )
    monkeypatch.setattr(GGUFWriter, "add_tensor", add_plain)
    path = write_toy_gguf(tmp_path / "odd.gguf", CONFIG | {"intermediate_size": 80}, seed=1)  # of 0 two tokens are near
    with InferenceEngine(str(path), block_size=16) as engine:
        assert engine.model_info.dtype == "int8, f32"
    (tokens, scores), (same, exact) = answer(path), answer(path, op_by_op=True)
    assert tokens == same
    assert gap(scores, exact) < 0.03


# ---- the event loop --------------------------------------------------------------------------------------------------


async def test_the_event_loop_goes_on_while_a_prompt_is_computed(tmp_path: Path) -> None:
    """One thread that holds Python's lock for a step would stop the loop for as long as the step takes."""
    large = CONFIG | {"max_position_embeddings": 4096, "num_hidden_layers": 8}
    path = write_toy_gguf(tmp_path / "toy.gguf", large)
    prompt, params = [i % 256 for i in range(4000)], SamplingParams(temperature=0.0, max_tokens=1)
    settings: dict[str, Any] = {"max_num_batched_tokens": 4096, "enable_prefix_caching": False, "max_num_seqs": 4}
    with InferenceEngine(str(path), threads=1, **settings) as engine:
        await engine.agenerate(prompt[:8], params)
        ticks: list[float] = []
        gaps: list[float] = []

        async def tick() -> None:
            while True:
                ticks.append(time.perf_counter())
                await asyncio.sleep(0.005)

        ticker = asyncio.create_task(tick())
        for _ in range(5):  # the best of them: a busy machine may stop one for long
            began = time.perf_counter()
            await engine.agenerate(prompt, params)
            took = time.perf_counter() - began
            assert took > 0.1  # long enough to tell
            gaps.append(np.diff([began, *(t for t in ticks if t > began), began + took]).max() / took)
            if gaps[-1] < 0.5:
                break
        ticker.cancel()
    logging.getLogger(__name__).info("the longest gaps as parts of their steps: %s", gaps)
    assert gaps[-1] < 0.5
