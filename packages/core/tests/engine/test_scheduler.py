# SPDX-License-Identifier: MIT
"""The scheduler against a simulated engine: every request ends, no block leaks, nobody writes into a shared block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.sampling.params import SamplingParams


def make(
    tokens: list[int], order: int, *, max_tokens: int = 4, priority: int = 0, index: int = 0, skip: bool = False
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, skip_reading_prefix_cache=skip)
    request = GenerationRequest(request_id=str(order), prompt_token_ids=tokens, params=params, priority=priority)
    return Sequence(request, index, order)


def scheduler(blocks: int = 64, size: int = 4, seqs: int = 8, budget: int = 16, cache: bool = True) -> Scheduler:
    return Scheduler(BlockManager(blocks, size, enable_prefix_caching=cache), seqs, budget)


def run_step(engine: Scheduler, next_token: int = 7) -> list[tuple[str, int, int]]:
    """One step of a pretend model; returns (request id, start, count) and ends sequences at their length."""
    items = engine.schedule()
    for item in items:
        engine.launched([item])
        engine.commit([item])
    for item in items:
        if item.wanted:
            item.sequence.append(next_token)
            params = item.sequence.request.params
            if item.sequence.num_tokens - item.sequence.num_prompt_tokens >= (params.max_tokens or 0):
                engine.remove(item.sequence)
    return [(item.sequence.request.request_id, item.start, item.count) for item in items]


def test_decodes_go_before_prompts_and_the_budget_holds() -> None:
    engine = scheduler(budget=10)
    engine.add(make([1] * 6, 0))
    assert run_step(engine) == [("0", 0, 6)]
    engine.add(make([2] * 30, 1))
    assert run_step(engine) == [("0", 6, 1), ("1", 0, 9)]
    assert run_step(engine) == [("0", 7, 1), ("1", 9, 9)]


def test_equal_priorities_run_in_order_of_arrival_and_lower_values_first() -> None:
    engine = scheduler(seqs=1)
    engine.add(make([1], 0, priority=1, max_tokens=1))
    engine.add(make([2], 1, priority=0, max_tokens=1))
    engine.add(make([3], 2, priority=0, max_tokens=1))
    assert [run_step(engine)[0][0] for _ in range(3)] == ["1", "2", "0"]


def test_a_waiting_prompt_of_a_higher_priority_does_not_wait_for_prompts_that_have_begun() -> None:
    engine = scheduler(budget=10)
    engine.add(make([1] * 25, 0, priority=1))
    engine.add(make([2] * 25, 1, priority=1))
    assert run_step(engine) == [("0", 0, 10)]
    engine.add(make([3] * 4, 2, max_tokens=1))
    engine.add(make([4] * 4, 3, priority=1))
    assert run_step(engine) == [("2", 0, 4), ("0", 10, 6)]
    assert run_step(engine) == [("0", 16, 9), ("1", 0, 1)]


def test_rows_of_drafts_go_before_prompts_also_of_a_higher_priority() -> None:
    engine = Scheduler(BlockManager(64, 4), 8, 16, draft_rows=4)
    drafted = make([1] * 5, 0, max_tokens=9, priority=1)
    engine.add(drafted)
    run_step(engine)
    drafted.drafts, engine.has_drafts = (7, 7), True
    engine.add(make([2], 1))
    engine.add(make([3] * 6, 2))
    items = engine.schedule()
    assert [(item.sequence.order, len(item.drafts)) for item in items] == [(0, 2), (1, 0), (2, 0)]


@pytest.mark.parametrize("lacking", ["a place", "blocks"])
@pytest.mark.parametrize("cache", [False, True])
def test_running_sequences_of_a_lower_priority_make_way(lacking: str, cache: bool) -> None:
    engine = scheduler(blocks=12 if lacking == "blocks" else 64, seqs=2 if lacking == "a place" else 8, cache=cache)
    for order in range(2):
        engine.add(make([order] * 15, order, max_tokens=12, priority=order))
    for _ in range(4):
        run_step(engine)  # both decode, and the steps go on from one to the next
    assert engine._going is not None
    engine.add(make([2] * 11, 2, max_tokens=2))
    assert [(name, count) for name, _, count in run_step(engine)] == [("0", 1), ("2", 11)]
    assert [each.order for each in engine.waiting] == [1], "and not the one of its own priority"
    assert engine.num_preemptions == 1
    for _ in range(40):
        run_step(engine)
    assert not engine.running
    assert not engine.waiting


def test_nobody_makes_way_for_what_cannot_begin_or_where_answers_are_reproducible() -> None:
    for skip, reproducible in ((False, False), (True, True)):
        engine = Scheduler(BlockManager(64, 4), 2, 64, reproducible=reproducible)
        for order in range(2):
            engine.add(make([order] * 30, order, max_tokens=12, priority=1))
            engine.waiting[-1].max_length = 42
        assert len(engine.schedule()) == 2
        engine.add(make([0] * 30, 2, skip=skip))  # unless it skips the cache, its first blocks are being computed
        engine.schedule()
        assert [each.order for each in engine.waiting] == [2]
        assert engine.num_preemptions == 0


def test_a_cached_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    engine = scheduler()
    engine.add(make(list(range(8)), 0, max_tokens=1))
    run_step(engine)
    engine.add(make(list(range(8)), 1, max_tokens=1))
    assert run_step(engine) == [("1", 4, 4)]
    engine.add(make([*range(8), 9], 2, max_tokens=1))
    assert run_step(engine) == [("2", 8, 1)]
    engine.add(make(list(range(8)), 3, max_tokens=1, skip=True))
    assert run_step(engine) == [("3", 0, 8)]


def test_a_burst_with_one_beginning_computes_it_once() -> None:
    engine = scheduler(budget=64)
    for order in range(3):
        engine.add(make([*range(16), order], order, max_tokens=1))
    assert run_step(engine) == [("0", 0, 17)]
    assert run_step(engine) == [("1", 16, 1), ("2", 16, 1)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    engine = scheduler(blocks=5, size=2, cache=False)
    engine.add(make([1, 1, 1], 0, max_tokens=5))
    engine.add(make([2, 2, 2], 1, max_tokens=5))
    for _ in range(40):
        run_step(engine)
    assert engine.num_preemptions > 0
    assert not engine.running
    assert not engine.waiting
    assert engine.blocks.num_free == 5


def test_nobody_overtakes_a_preempted_sequence_whose_token_is_on_its_way() -> None:
    engine = scheduler(blocks=9, size=4, budget=64, cache=False)
    for order in range(2):
        engine.add(make([order] * 15, order, max_tokens=9))
    first = engine.schedule()
    for item in first:
        engine.launched([item])
    for item in engine.schedule():
        engine.launched([item])
    for item in first:
        engine.commit([item])
        item.sequence.append(7)
    engine.add(make([7] * 3, 2))
    # Both need a fifth block and one is free: the second gives its four back, while its token is on its way.
    assert [item.sequence.order for item in engine.schedule()] == [0]
    assert engine.num_preemptions == 1
    assert [sequence.order for sequence in engine.waiting] == [1, 2]


def test_a_prompt_waits_until_all_of_it_fits() -> None:
    engine = scheduler(blocks=4, size=4, budget=8, cache=False)
    engine.add(make([1] * 8, 0, max_tokens=3))
    engine.add(make([2] * 12, 1, max_tokens=1))
    assert [entry[0] for entry in run_step(engine)] == ["0"]
    assert [entry[0] for entry in run_step(engine)] == ["0"]
    assert [entry[0] for entry in run_step(engine)] == ["0"]
    assert run_step(engine) == [("1", 0, 8)]


def test_removing_a_waiting_sequence_touches_no_block() -> None:
    engine = scheduler()
    sequence = make([1, 2, 3], 0)
    engine.add(sequence)
    engine.remove(sequence)
    assert not engine.waiting
    assert engine.blocks.num_free == 64


def test_a_sequence_that_waits_for_an_aborted_one_runs_itself() -> None:
    engine = scheduler(budget=8)
    first = make(list(range(32)), 0)
    engine.add(first)
    engine.add(make(list(range(32)), 1, max_tokens=1))
    assert run_step(engine) == [("0", 0, 8)]
    engine.remove(first)
    assert run_step(engine) == [("1", 8, 8)], "the finished blocks are shared, the rest is computed"


@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(6, 24),
    size=st.sampled_from([1, 2, 4]),
    seqs=st.integers(1, 6),
    extra=st.integers(0, 12),
    cache=st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_every_request_ends_and_no_block_is_lost_or_written_while_shared(
    seed: int, blocks: int, size: int, seqs: int, extra: int, cache: bool
) -> None:
    rng = random.Random(seed)
    engine = scheduler(blocks, size, seqs, seqs + extra, cache)
    longest = blocks * size
    pending, alive, order = rng.randrange(1, 14), [], 0
    for _ in range(3000):
        if pending and rng.random() < 0.5:
            length = rng.randrange(1, longest)
            prompt = [rng.randrange(2) for _ in range(length)]
            most = rng.randrange(1, longest - length + 1)
            sequence = make(prompt, order, max_tokens=most, priority=rng.randrange(3), skip=rng.random() < 0.2)
            engine.add(sequence)
            alive.append(sequence)
            pending, order = pending - 1, order + 1
        if alive and rng.random() < 0.03:
            victim = alive.pop(rng.randrange(len(alive)))
            engine.remove(victim)
        items = engine.schedule()
        assert sum(item.count for item in items) <= engine.max_num_batched_tokens
        assert len({id(item.sequence) for item in items}) == len(items) <= seqs
        assert items or not alive, "work is waiting and nothing runs"
        for item in items:
            sequence, start, count = item.sequence, item.start, item.count
            assert count > 0
            assert start == sequence.num_computed_tokens
            written = sequence.block_table[start // size : (start + count - 1) // size + 1]
            assert len(written) == (start + count - 1) // size - start // size + 1
            others = [b for other in engine.running if other is not sequence for b in other.block_table]
            assert not set(written) & set(others), "a block is written while another sequence holds it"
        for item in items:
            engine.launched([item])
            engine.commit([item])
            if item.wanted:
                item.sequence.append(rng.randrange(2))
                params = item.sequence.request.params
                if item.sequence.num_tokens - item.sequence.num_prompt_tokens == params.max_tokens:
                    engine.remove(item.sequence)
                    alive.remove(item.sequence)
        held = {block for sequence in engine.running for block in sequence.block_table}
        assert engine.blocks.num_free == blocks - len(held)
        if not pending and not alive:
            break
    assert not pending
    assert not alive
    assert engine.blocks.num_free == blocks
    assert not +engine._computing


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 5), st.booleans())
def test_any_load_ends_where_steps_overlap(seed: int, seqs: int, size: int, reproducible: bool) -> None:
    """A step is scheduled before the tokens of the one before are known; sequences may end without notice."""
    rng = random.Random(seed)
    blocks = rng.randrange(24, 60)
    engine = Scheduler(BlockManager(blocks, size), seqs, max(seqs, rng.randrange(4, 20)), reproducible=reproducible)
    pending = []
    for order in range(12):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 2 * size + 9))]
        sequence = make(tokens, order, max_tokens=rng.randrange(1, 9), priority=rng.randrange(2))
        sequence.max_length = len(tokens) + (sequence.request.params.max_tokens or 0)
        if engine.blocks.blocks_for(sequence.max_length) <= blocks:
            pending.append(sequence)
    alive, flight = set(), []
    for _ in range(2000):
        if pending and rng.random() < 0.5:
            alive.add(pending[-1])
            engine.add(pending.pop())
        items = engine.schedule()
        assert items or flight or not alive, "work is waiting and nothing runs"
        for item in items:
            sequence, start, count = item.sequence, item.start, item.count
            assert sequence.num_ahead <= 1
            assert start + count <= sequence.max_length
            written = sequence.block_table[start // size : (start + count - 1) // size + 1]
            others = [b for other in engine.running if other is not sequence for b in other.block_table]
            assert not set(written) & set(others), "a block is written while another sequence holds it"
            engine.launched([item])
        for item in flight:
            engine.commit([item])
            if item.wanted and item.sequence in alive:
                item.sequence.append(rng.randrange(2))
                if len(item.sequence.tokens) == item.sequence.max_length or rng.random() < 0.1:
                    engine.remove(item.sequence)
                    alive.remove(item.sequence)
        flight = items
        held = {block for sequence in engine.running for block in sequence.block_table}
        assert engine.blocks.num_free == blocks - len(held)
        if not pending and not alive and not flight:
            break
    assert not pending
    assert not alive
    assert engine.blocks.num_free == blocks
    assert not (reproducible and engine.num_preemptions)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_a_step_that_goes_on_is_what_would_be_scheduled_anew(size: int, overlapping: bool) -> None:
    """Two schedulers have the same load, and one of them forgets what ran before; sequences end, and are aborted."""
    outcomes = [same_steps(random.Random(seed), size, overlapping) for seed in range(24)]
    assert sum(went_on for went_on, _ in outcomes) > 150
    assert sum(preempted for _, preempted in outcomes) > 0


def same_steps(rng: random.Random, size: int, overlapping: bool) -> tuple[int, int]:
    """How many steps went on, and how often one was preempted."""
    seqs, cache = rng.randrange(2, 9), rng.random() < 0.5
    blocks = rng.randrange(48 // size + 1, 96 // size + 3)
    engines = [Scheduler(BlockManager(blocks, size, enable_prefix_caching=cache), seqs, seqs + 9) for _ in range(2)]
    alive: dict[int, list[Sequence]] = {}
    flight, order, went_on = [], 0, 0
    for _ in range(120):
        if rng.random() < 0.15 and len(alive) < 2 * seqs:
            tokens, most = [rng.randrange(2) for _ in range(rng.randrange(1, 20))], rng.randrange(1, 28)
            priority = rng.randrange(2)
            alive[order] = [make(tokens, order, max_tokens=most, priority=priority) for _ in engines]
            for engine, sequence in zip(engines, alive[order]):
                sequence.max_length = len(tokens) + most
                engine.add(sequence)
            order += 1
        engines[1]._going = None
        steps = [engine.schedule() for engine in engines]
        told = [
            [(r.sequence.order, r.start, r.count, r.wanted, r.decodes, r.sequence.block_table) for r in step]
            for step in steps
        ]
        assert told[0] == told[1]
        went_on += steps[0].goes_on
        assert not steps[1].goes_on
        if steps[0].goes_on:
            assert list(steps[0].begins) == [at for at, run in enumerate(steps[0]) if run.start % size == 0]
            assert list(steps[0].filling) == [run for run in steps[0] if (run.start + 1) % size == 0]
        for engine, step in zip(engines, steps):
            engine.launched(step)
        landing, flight = (flight, steps) if overlapping else (steps, [])
        for engine, step in zip(engines, landing):
            engine.commit(step.filling)
        drawn = {run.sequence.order: rng.randrange(2) for run in (landing[0] if landing else ()) if run.wanted}
        leaving = [number for number in alive if rng.random() < 0.01]
        for at, engine in enumerate(engines):
            for number, token in drawn.items():
                if number in alive:
                    alive[number][at].append(token)
            for number, copies in alive.items():
                if number in leaving or len(copies[at].tokens) == copies[at].max_length:
                    engine.remove(copies[at])
        alive = {number: copies for number, copies in alive.items() if number not in leaving and not _is_full(copies)}
        assert len({(engine.num_preemptions, engine.blocks.num_free) for engine in engines}) == 1
        assert engines[0].blocks._published == engines[1].blocks._published
        assert +engines[0]._computing == +engines[1]._computing
    return went_on, engines[0].num_preemptions


def _is_full(copies: list[Sequence]) -> bool:
    return len(copies[0].tokens) == copies[0].max_length


def test_many_sequences_of_a_request_leave_half_of_the_places_to_another() -> None:
    engine = scheduler(seqs=4)
    for index in range(7):
        engine.add(make([1, 2], index, index=index, max_tokens=3))
    many = engine.waiting[0].request
    for sequence in engine.waiting:
        sequence.request = many
    run_step(engine)
    assert [each.index for each in engine.running] == [0, 1, 2, 3], "alone it has them all"
    engine.add(late := make([7], 9, max_tokens=3))
    while late in engine.waiting:
        run_step(engine)
    assert late in engine.running
    assert [each.request for each in engine.waiting if each.request is many], "it waited for one generation alone"
