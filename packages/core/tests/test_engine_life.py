# SPDX-License-Identifier: MIT
"""How long an engine lives: it goes with its last name, and it works in the process that made it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from candle_vllm.core import EngineDeadError, InferenceEngine, SamplingParams
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.remote import RemoteEngine

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_a_dropped_engine_frees_its_memory_at_once(toy_model: Path, eager: bool, used: bool) -> None:
    """Weights and cache; the garbage collector, which would come some time later, is not asked."""
    engine = InferenceEngine(str(toy_model), threads=1, op_by_op=eager, block_size=32)
    if used:
        engine.generate("abc", GREEDY, use_tqdm=False)
    assert engine._engine is not None
    runner = weakref.ref(engine._engine.runner)
    assert isinstance(runner(), RecordedRunner) is not eager
    gc.collect()
    gc.disable()
    try:
        del engine
        assert runner() is None
    finally:
        gc.enable()


def _in_child(work: Callable[[], object]) -> str:
    """What is said to `work` in a forked child, or what it gives."""

    def run(end: Connection) -> None:
        try:
            end.send(repr(work()))
        except EngineDeadError as error:
            end.send(f"dead: {error}")
        end.close()

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(there,))
    child.start()
    try:
        assert here.poll(20), "it hangs"
        said: str = here.recv()
        child.join(20)
        assert child.exitcode == 0
        return said
    finally:
        if child.is_alive():
            child.kill()
        child.join()


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_is_told_that_the_engine_is_elsewhere(toy_model: Path, used: bool) -> None:
    with InferenceEngine(str(toy_model), threads=2, block_size=32) as engine:
        if used:
            engine.generate("abc", GREEDY, use_tqdm=False)
        for work in (
            lambda: engine.generate("abc", GREEDY, use_tqdm=False),
            lambda: list(engine.generate_stream("abc", GREEDY)),
            lambda: engine.embed("abc", use_tqdm=False),
            engine.stats,
        ):
            assert _in_child(work).startswith("dead: the engine belongs to another process")
        assert _in_child(lambda: engine.is_alive) == "False"
        assert _in_child(lambda: engine.tokenize("abc")) == repr(engine.tokenize("abc"))
        assert _in_child(engine.close) == "None"
        assert engine.generate("abc", GREEDY, use_tqdm=False)[0].token_ids


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_leaves_the_engines_process_alone(toy_model: Path) -> None:
    with RemoteEngine(str(toy_model), threads=1, block_size=32) as engine:
        assert _in_child(lambda: engine.generate("abc", GREEDY)).startswith("dead: the engine belongs to another")
        assert _in_child(engine.close) == "None"
        assert engine.generate("abc", GREEDY, use_tqdm=False)[0].token_ids


def test_a_failed_engine_keeps_nothing_of_the_calls_that_it_refuses(toy_model: Path) -> None:
    """An error that is raised again would keep the frames of every caller, with their prompts."""

    def fail(tokens: tuple[int, ...], row: object) -> None:
        raise SystemExit("over")

    def refused(params: SamplingParams) -> list[str]:
        with pytest.raises(EngineDeadError, match="the engine has stopped: SystemExit: over") as info:
            engine.generate("abc", params, use_tqdm=False)
        return [entry.name for entry in info.traceback]

    with InferenceEngine(str(toy_model), threads=1, block_size=32) as engine:
        refused(SamplingParams(logits_processors=[fail]))
        assert refused(GREEDY) == refused(GREEDY)
