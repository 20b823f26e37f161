# SPDX-License-Identifier: MIT
"""Overlapping steps: on a stream that is as late as a GPU may ever be, answers are those of the step-by-step engine."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from candle_vllm.core import EngineConfig, FinishReason, SamplingParams, StructuredOutputsParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.outputs import OutputCollector
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceInputs, DeviceLimits, StepSize
from candle_vllm.core.engine.runners.device_runner import DeviceRunner, bucket_sizes
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.step.batch import Batch
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.kernels.device_stream import Staging
from candle_vllm.core.kernels.states import StateRows
from candle_vllm.core.sampling.device_edits import mask_in_torch
from candle_vllm.core.sampling.processors import mask_row
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream

CPU = torch.device("cpu")
SIZE = 16
CONTEXT = 192
PROMPTS = [list(range(1, 2 + 7 * i % 45)) for i in range(10)] + [[9] * 40, [9] * 40]

EVERYTHING = [
    SamplingParams(temperature=0.0, max_tokens=24, logprobs=3),
    SamplingParams(temperature=0.9, seed=1, max_tokens=30, top_p=0.9),
    SamplingParams(temperature=1.1, seed=2, max_tokens=9, top_k=7, min_p=0.01, logprob_token_ids=[65, 3, 65, 9]),
    SamplingParams(temperature=0.8, seed=3, max_tokens=25, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=20, presence_penalty=1.5),
    SamplingParams(temperature=0.7, seed=4, max_tokens=22, logit_bias={65: 4.0, 66: -100.0}, n=3),
    SamplingParams(temperature=0.7, seed=5, max_tokens=22, allowed_token_ids=[70, 71, 72, 90, 258], min_tokens=4),
    SamplingParams(temperature=1.3, seed=6, max_tokens=40, bad_words=["he", "q"], ignore_eos=True),
    SamplingParams(temperature=1.3, seed=7, max_tokens=40, stop=["e", "\x05"], stop_token_ids=[100, 101]),
    SamplingParams(temperature=0.0, max_tokens=12, prompt_logprobs=2),
    SamplingParams(temperature=1.0, seed=8, max_tokens=1),
    SamplingParams(temperature=1.0, seed=8, max_tokens=60, ignore_eos=True),
]
SHORT = [msgspec.structs.replace(each, max_tokens=min(each.max_tokens or 9, 9)) for each in EVERYTHING]


def reversed_row(tokens: Sequence[int], row: NDArray[np.float32]) -> NDArray[np.float32]:
    """Looks at the tokens so far, too: they must be there."""
    return (-row + np.float32(len(tokens) % 3)).astype(np.float32)


def refusing(tokens: Sequence[int], row: NDArray[np.float32]) -> NDArray[np.float32]:
    if len(tokens) > 30:
        raise ValueError("thirty is enough")
    return row


RARE = [
    SamplingParams(temperature=0.9, seed=1, max_tokens=30, dry_multiplier=0.8, dry_allowed_length=1),
    SamplingParams(temperature=0.9, seed=2, max_tokens=30, xtc_probability=0.5, xtc_threshold=0.01, logprobs=1),
    SamplingParams(temperature=0.9, seed=3, max_tokens=30, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.5),
    SamplingParams(temperature=0.7, seed=4, max_tokens=30, mirostat=1, mirostat_tau=4.0, n=2),
    SamplingParams(temperature=0.9, seed=5, max_tokens=30, repetition_penalty=1.5, repeat_last_n=4),
    SamplingParams(temperature=0.0, max_tokens=30, dry_multiplier=2.0, presence_penalty=1.0, repeat_last_n=9),
    SamplingParams(temperature=0.9, seed=6, max_tokens=30, typical_p=0.5, dynatemp_range=0.5, top_n_sigma=2.0),
    SamplingParams(temperature=0.9, seed=7, max_tokens=30, logits_processors=[reversed_row]),
    SamplingParams(temperature=0.9, seed=8, max_tokens=40, logits_processors=[refusing], ignore_eos=True),
    SamplingParams(temperature=1.0, seed=9, max_tokens=40, ignore_eos=True),
]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Tokens are compared between steps of different sizes."""
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config(max_position_embeddings=CONTEXT))
    return load_model(EngineConfig(model=str(folder), op_by_op=True), CPU, lambda *_: None)


def make(
    loaded: LoadedModel,
    runner: ModelRunner,
    *,
    blocks: int = 200,
    sequences: int = 16,
    budget: int = 64,
    reproducible: bool = False,
    drafts: int = 0,
) -> Engine:
    how: dict[str, Any] = {"reproducible": reproducible, "draft_rows": drafts, "in_flight": runner.in_flight}
    scheduler = Scheduler(BlockManager(blocks, SIZE), sequences, budget, **how)
    drafter = Drafter(SpeculativeConfig(), drafts) if drafts else None
    return Engine(runner, scheduler, preparation_for(loaded, CONTEXT, seed=0), drafter)


def device_runner(
    loaded: LoadedModel,
    *,
    blocks: int = 200,
    sequences: int = 16,
    budget: int = 64,
    graphs: bool = True,
    prompts: int = 0,
    drafts: int = 0,
    stream: LazyStream | None = None,
) -> tuple[DeviceRunner, LazyStream]:
    stream = LazyStream() if stream is None else stream
    limits = DeviceLimits(budget, sequences + drafts, -(-CONTEXT // SIZE), SIZE)
    settings = {"graphs": graphs, "finite_cache": True, "captured_prompts": prompts, "overlaps": not drafts}
    runner = DeviceRunner(loaded.decoder, limits, stream, torch.float32, **settings)
    for work in runner.largest_steps():
        work()
    runner.allocate(blocks)
    return runner, stream


def drive(engine: Engine, requests: Iterable[GenerationRequest], *, every: int = 0) -> dict[str, Any]:
    """Runs requests to their end, a new one every so many steps; what came out, by request id."""
    waiting = list(requests)
    collectors = {request.request_id: OutputCollector(request) for request in waiting}
    steps = 0
    while waiting or engine.has_work:
        while waiting and (not every or steps % every == 0):
            engine.add(engine.prepare(waiting.pop(0)))
            if every:
                break
        for piece in engine.step():
            collectors[piece.request_id].add(piece)
        steps += 1
        assert steps < 5000
    results = {}
    for name, collector in collectors.items():
        output = collector.result()
        results[name] = [
            (o.text, tuple(o.token_ids), o.finish_reason, o.stop_reason, rounded(o.logprobs)) for o in output.outputs
        ] + [rounded(output.prompt_logprobs)]
    return results


def rounded(positions: Any) -> Any:
    """Logarithms that two ways of summing give to the fifth place."""
    if positions is None:
        return None
    return [
        p and [(e.token_id, pytest.approx(e.logprob, abs=1e-4), e.rank) for e in (p.chosen, *p.top)] for p in positions
    ]


def asked(params: list[SamplingParams] = EVERYTHING) -> list[GenerationRequest]:
    return [
        GenerationRequest(request_id=str(i), prompt_token_ids=PROMPTS[i % len(PROMPTS)], params=params[i % len(params)])
        for i in range(len(PROMPTS))
    ]


def stepwise(loaded: LoadedModel, params: list[SamplingParams]) -> dict[str, Any]:
    return drive(make(loaded, EagerRunner(loaded.decoder, 200, SIZE, CPU, torch.float32)), asked(params))


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> dict[str, Any]:
    return stepwise(loaded, EVERYTHING)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("graphs", "prompts", "every"), [(True, 0, 0), (True, 0, 3), (False, 0, 2), (True, 64, 0), (True, 40, 1)]
)
def test_answers_are_those_of_the_engine_without_overlap(
    loaded: LoadedModel, expected: dict[str, Any], graphs: bool, prompts: int, every: int
) -> None:
    """Also where steps with prompts of up to so many tokens are captured."""
    runner, stream = device_runner(loaded, graphs=graphs, prompts=prompts)
    found = drive(make(loaded, runner), asked(), every=every)
    assert found == expected
    assert {len(found[name]) for name in found} == {2, 4}
    assert (stream.replayed > 0) == graphs


@pytest.mark.parametrize(("graphs", "every"), [(True, 0), (False, 2)])
def test_rare_samplers_are_those_of_the_engine_without_overlap(loaded: LoadedModel, graphs: bool, every: int) -> None:
    runner, _ = device_runner(loaded, graphs=graphs)
    found = drive(make(loaded, runner), asked(RARE), every=every)
    assert found == stepwise(loaded, RARE)
    reasons = [answers[0][2] for answers in found.values()]
    assert reasons.count("error") == 1  # that of the processor which raises, and no neighbour's


def test_steps_overlap(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is launched before the one before is waited for; where a draw must know its last token, all but the draw.

    So a request with bad words or a grammar makes neither the device nor its neighbours wait.
    """
    runner, stream = device_runner(loaded)
    engine = make(loaded, runner)
    engine.add(engine.prepare(asked([SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)])[0]))
    pieces = [engine.step() for _ in range(4)]
    assert [len(step) for step in pieces] == [0, 1, 1, 1], "each step gives what the one before drew"
    assert stream.pending > 0, "the last one has not run"
    words = SamplingParams(temperature=0.0, max_tokens=8, bad_words=["abc"])
    engine.add(engine.prepare(asked([words])[1]))
    assert len(engine.step()) == 1
    assert len(engine.step()) == 2, "nothing is drawn twice and nothing is left out"
    landing, ahead = engine._collect, []

    def watched() -> Any:
        under_way, given = bool(engine._flights), stream.pending
        pieces = landing()
        if under_way:
            ahead.append((given, stream.pending))
        return pieces

    monkeypatch.setattr(engine, "_collect", watched)
    while engine.has_work:
        engine.step()
    behind = [left for _, left in ahead]
    assert all(behind[:3]), "the model's part of the next step was given before this one was waited for"
    assert behind[-1] == 0


FORM = {"type": "object", "properties": {"a": {"enum": ["one", "two"]}, "b": {"type": "boolean"}}, "required": ["a"]}
FORMED = [
    SamplingParams(temperature=0.9, seed=seed, max_tokens=40, structured_outputs=StructuredOutputsParams(json=FORM))
    for seed in range(3)
]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("params", [EVERYTHING, RARE, FORMED], ids=["everything", "rare", "formed"])
def test_drafts_change_no_answer(
    loaded: LoadedModel, params: list[SamplingParams], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right ones up to some place, then random ones: steps are those of the engine without."""
    expected = stepwise(loaded, params)
    runner, stream = device_runner(loaded, graphs=graphs, drafts=24)
    engine = make(loaded, runner, drafts=24)
    rng, replayed = random.Random(1), stream.replayed

    def propose(lives: Sequence[LiveSequence]) -> bool:
        for live in lives:
            sequence = live.sequence
            answer = expected[live.request.request_id][sequence.index][1]
            place = len(sequence.tokens) - sequence.num_prompt_tokens
            some = (rng.randrange(259) for _ in range(rng.randint(0, 2)))
            sequence.drafts = (*answer[place : place + rng.randint(0, 6)], *some)
        return True

    assert engine._drafter is not None
    monkeypatch.setattr(engine._drafter, "propose", propose)
    assert drive(engine, asked(params), every=3) == expected
    stats = engine.stats()
    assert stats.draft_tokens > stats.accepted_draft_tokens > 50
    assert stats.num_free_blocks == stats.num_blocks
    assert (stream.replayed > replayed) == graphs


def test_masks_of_rows_on_any_device() -> None:
    """Those of the compiled functions, a broken row's NaN included."""
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 70)).astype(np.float32)
    logits[2, 5] = np.inf
    bits = {row: rng.integers(-(1 << 31), 1 << 31, 3).astype(np.int32) for row in (0, 2)}
    wanted, found = logits.copy(), torch.from_numpy(logits.copy())
    for row, each in bits.items():
        mask_row(wanted[row], each)
    mask_in_torch(found, bits)
    np.testing.assert_array_equal(np.delete(found.numpy(), 2, 0), np.delete(wanted, 2, 0))
    assert np.isnan(wanted[2, 0])
    assert found[2, 0].isnan()


LONG = [
    SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=35, ignore_eos=True, repetition_penalty=1.2, logprobs=1),
]


@pytest.mark.every_case
def test_memory_for_few(loaded: LoadedModel) -> None:
    """Preempted sequences come back with the same answers; reproducible scheduling preempts nobody."""
    expected = stepwise(loaded, LONG)
    for reproducible in (False, True):
        runner, _ = device_runner(loaded, blocks=14, sequences=8)
        engine = make(loaded, runner, blocks=14, sequences=8, reproducible=reproducible)
        found = drive(engine, asked(LONG))
        assert found == expected
        assert (engine.scheduler.num_preemptions == 0) == reproducible
        assert engine.scheduler.blocks.num_free == 14


@pytest.mark.parametrize("reproducible", [False, True])
def test_what_is_published(loaded: LoadedModel, reproducible: bool) -> None:
    """Blocks of prompts and answers; where answers must be reproducible, of prompts alone."""
    runner, _ = device_runner(loaded)
    engine = make(loaded, runner, reproducible=reproducible)
    request = GenerationRequest(request_id="0", prompt_token_ids=[9] * 40, params=LONG[0])
    tokens = [9] * 40 + list(drive(engine, [request])["0"][0][1])
    again = GenerationRequest(request_id="1", prompt_token_ids=tokens, params=LONG[0])
    (live,) = engine.prepare(again)
    shared = engine.scheduler.blocks.lookup(live.sequence.hashes(SIZE))
    assert len(shared) == (2 if reproducible else 4)  # 40 and 69 of 70 tokens in blocks of 16


def test_aborts_at_any_time_leave_nothing_behind(loaded: LoadedModel, expected: dict[str, Any]) -> None:
    rng = random.Random(5)
    runner, _ = device_runner(loaded, blocks=40)
    engine = make(loaded, runner, blocks=40)
    for _ in range(3):
        ended: set[str] = set()
        collectors = {}
        for request in asked():
            collectors[request.request_id] = OutputCollector(request)
            engine.add(engine.prepare(request))
        while engine.has_work:
            pieces = engine.step()
            if rng.random() < 0.2:
                victim = str(rng.randrange(len(PROMPTS)))
                aborted = engine.abort(victim)
                ended |= {piece.request_id for piece in aborted}
                pieces = [*pieces, *aborted]
            for piece in pieces:
                collectors[piece.request_id].add(piece)
        assert engine.scheduler.blocks.num_free == 40
        for name, collector in collectors.items():
            outputs = collector.result().outputs
            whole = [tuple(entry[1]) for entry in expected[name][:-1]]
            if name in ended:
                assert all(
                    tuple(o.token_ids) == full[: len(o.token_ids)] for o, full in zip(outputs, whole, strict=True)
                )
            else:
                assert [tuple(o.token_ids) for o in outputs] == whole


def test_a_step_that_fails_ends_its_requests_and_no_others(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = device_runner(loaded)
    engine = make(loaded, runner)
    first, second = asked([SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)])[:2]
    engine.add(engine.prepare(first))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(runner._inputs, "send", lambda *_: 1 / 0)
        pieces = engine.step()
    assert [piece.finish_reason for piece in pieces] == [None, FinishReason.ERROR]
    assert len(pieces[0].token_ids) == 1, "what the step before drew is not lost"
    assert "ZeroDivisionError" in str(pieces[1].error)
    assert not engine.has_work
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert drive(engine, [second])["1"][0][2] is FinishReason.LENGTH


def test_a_draw_that_fails_leaves_nothing_under_way(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step has been sent: the memory that it is copied from is written again two steps later."""
    runner, stream = device_runner(loaded)
    engine = make(loaded, runner)
    for request in asked([SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)])[:2]:
        engine.add(engine.prepare(request))
    with monkeypatch.context() as patch:
        patch.setattr(runner._sampler, "launch", lambda *_: 1 / 0)
        pieces = engine.step()
    assert [piece.finish_reason for piece in pieces] == [FinishReason.ERROR] * 2
    assert stream.pending == 0


def test_a_broken_device_ends_the_engine(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, _ = device_runner(loaded)
    engine = make(loaded, runner)
    engine.add(engine.prepare(asked()[0]))

    def broken(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(runner, "forward", broken)
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_sizes_of_captured_steps() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(3) == [1, 2, 3]
    assert bucket_sizes(20) == [1, 2, 4, 8, 16, 20]
    for most in (64, 200, 256, 512, 4096):
        sizes = bucket_sizes(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(most, 512)
        assert all(b - a <= max(8, a // 4) for a, b in itertools.pairwise(sizes))


def test_states_are_told_positions_in_the_text() -> None:
    """Not those that images turn, and never a multiple of 64 for padding."""
    stream = LazyStream()
    inputs = DeviceInputs(stream, DeviceLimits(8, 2, 5, SIZE, states=True))
    starts = np.array([0, 3])
    batch = Batch(
        tokens=np.array([[5, 6, 7], [62, 63, 64], [2, 3, 4], [-1, -1, -1]]),
        query_start=starts,
        context_lens=np.array([65]),
        block_tables=np.zeros((1, 5), np.int64),
        tables_version=object(),
        num_decodes=0,
        runs=(),
        drawing=(),
        drafted=False,
        sampled_rows=np.array([2]),
        states=StateRows(starts, *np.zeros((3, 1), np.int64), *np.full((2, 3), -1)),
    )
    size = StepSize(4, 1, True)
    inputs.send(batch, (), size, turns=np.array([3, 3, 3]))
    stream.mark().wait()
    rows, (turned, _) = inputs.states(size, prompts=True), inputs.positions_and_slots(3)
    assert rows is not None
    assert (turned.tolist(), rows.positions.tolist(), rows.single) == ([65, 66, 67], [62, 63, 64, 1], False)
    for drafts in (False, True):
        rows = inputs.states(size, prompts=False, drafts=drafts)
        assert rows is not None
        assert (rows.positions, rows.single) == (None, not drafts)
    reproducible = DeviceInputs(stream, DeviceLimits(8, 2, 5, SIZE, states=True, chunks=False))
    rows = reproducible.states(size, prompts=True)
    assert rows is not None
    assert rows.positions is None, "bits would depend on the cuts of a prompt"


def test_staged_numbers_are_not_overwritten_before_they_are_copied() -> None:
    stream = LazyStream()
    staging = Staging(stream, {"a": ((3,), np.int32), "b": ((4, 2), np.float64)}, room=7)
    seen = []
    for step in range(2):
        host, room = staging.host()
        host["a"][:] = step
        host["b"][:] = step + 0.5
        room[:] = step + 7
        staging.send(2)
        there = (*staging.device.values(), staging.device_room)
        stream.run(lambda there=there: seen.append(tuple(array.tolist() for array in there)))
    stream.mark().wait()
    assert seen == [([step] * 3, [[step + 0.5] * 2] * 4, [step + 7] * 2 + [0] * 5) for step in range(2)]
