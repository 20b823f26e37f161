# SPDX-License-Identifier: MIT
"""The state pool under a pretend model whose state is the text itself: each run goes on from exactly what is before it.

Whatever is found, cut into pieces, drafted, preempted, aborted or forgotten, the state that a run begins with is that
of its sequence's tokens before it, and a checkpoint that is found is that of the blocks which name it.
"""

from __future__ import annotations

import random

import pytest

from benchmarks.train_small import FOLDER
from candle_vllm.core import InferenceEngine
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run, Sequence, block_hashes
from candle_vllm.core.sampling.params import SamplingParams
from tests.waiting import wait_for

SIZE = 4


def make(tokens: list[int], order: int, *, max_tokens: int = 4, index: int = 0, priority: int = 0) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    request = GenerationRequest(request_id=str(order), prompt_token_ids=tokens, params=params, priority=priority)
    sequence = Sequence(request, index, order)
    sequence.max_length = len(tokens) + max_tokens
    return sequence


class Pretended:
    """A scheduler, and slots that hold texts; `luck` says of each draft whether it is right."""

    def __init__(
        self, *, blocks: int = 64, seqs: int = 4, budget: int = 16, checkpoints: int = 8, drafts: int = 0, seed: int = 0
    ) -> None:
        self.states = StatePool(seqs, checkpoints, SIZE)
        self.scheduler = Scheduler(BlockManager(blocks, SIZE), seqs, budget, draft_rows=drafts, states=self.states)
        self.slots: list[list[int] | None] = [None] * (seqs + checkpoints)
        self.kept: list[list[int]] = [[] for _ in range(seqs)]
        self.random, self.drafts = random.Random(seed), drafts
        self.cached: dict[str, int] = {}

    def add(self, tokens: list[int], order: int, max_tokens: int = 4, index: int = 0) -> Sequence:
        sequence = make(tokens, order, max_tokens=max_tokens, index=index)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Run]:
        scheduler = self.scheduler
        for sequence in scheduler.running:
            if self.drafts and sequence.num_uncomputed_tokens == 1:
                sequence.drafts = tuple(self.random.randrange(3) for _ in range(self.random.randrange(self.drafts + 1)))
        scheduler.has_drafts = self.drafts > 0
        runs = scheduler.schedule()
        self._run(runs)
        scheduler.launched(runs)
        for run in runs:
            if run.wanted:
                run.sequence.num_ahead -= 1
        scheduler.commit([run for run in runs if not run.drafts])
        for run in runs:
            if run.wanted:
                self._draw(run)
        self._check()
        return runs

    def _run(self, runs: list[Run]) -> None:
        """As a kernel does, the sequences of a step in any order."""
        begun = [(run.state, self._begin(run)) for run in runs]
        stored: dict[int, list[int]] = {}
        for run, (state, text) in zip(runs, begun, strict=True):
            assert state is not None
            certain = run.count - len(run.drafts)
            marks = dict(state.marks)
            text = [*text, *self.kept[state.slot][: state.replays]]
            assert text == run.sequence.tokens[: run.start], "a run goes on from what is before it"
            for row in range(certain):
                text = [*text, run.sequence.tokens[run.start + row]]
                slot = marks.get(row, state.slot if row == certain - 1 else -1)
                if slot >= 0:
                    assert slot not in stored, "two write one slot"
                    stored[slot] = text
            if run.drafts:
                self.kept[state.slot] = list(run.drafts)
        read = {state.source for state, _ in begun if state is not None}
        own = {state.slot for state, _ in begun if state is not None}
        assert not (stored.keys() - own) & read, "nobody reads what another one writes"
        for slot, text in stored.items():
            self.slots[slot] = text

    def _begin(self, run: Run) -> list[int]:
        assert run.state is not None
        text = [] if run.state.source < 0 else self.slots[run.state.source]
        assert text is not None
        return text

    def _draw(self, run: Run) -> None:
        sequence, right = run.sequence, 0
        while right < len(run.drafts) and self.random.random() < 0.6:
            right += 1
        more = [*run.drafts[:right], self.random.randrange(3)]
        for token in more[: sequence.max_length - len(sequence.tokens)]:
            sequence.append(token)
        if run.drafts:
            self.scheduler.commit_drafts(run)
        if len(sequence.tokens) == sequence.max_length:
            self.scheduler.remove(sequence)

    def _check(self) -> None:
        for digest, slot in self.states._published.items():
            text = self.slots[slot]
            assert text is not None
            assert len(text) % SIZE == 0
            assert block_hashes(text, SIZE, None)[-1] == digest, "a checkpoint is what its name says"

    def finish(self, most: int = 2000) -> None:
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            self.step()
        raise AssertionError("somebody never ends")

    def is_whole(self) -> bool:
        """Every slot is free, or that of a checkpoint that can be found."""
        pool = self.states
        slots = [*pool._free_running, *pool._free, *pool._published.values()]
        return sorted(slots) == list(range(len(self.slots))) and not +pool._pins and not +pool._coming


@pytest.mark.parametrize("seed", range(60))
def test_every_run_goes_on_from_what_is_before_it(seed: int) -> None:
    chance = random.Random(seed)
    model = Pretended(
        blocks=chance.choice((14, 24, 64)),
        seqs=chance.randint(1, 5),
        budget=chance.choice((5, 8, 16, 31)),
        checkpoints=chance.choice((0, 1, 3, 20)),
        drafts=chance.choice((0, 0, 3)),
        seed=seed,
    )
    begins = [[chance.randrange(3) for _ in range(chance.randrange(1, 24))] for _ in range(3)]
    for order in range(40):
        begin = chance.choice(begins)
        tokens = begin[: chance.randint(1, len(begin))] + [chance.randrange(3) for _ in range(chance.randrange(12))]
        for index in range(chance.choice((1, 1, 3))):
            model.add(tokens, order, chance.randint(1, 12), index)
        for _ in range(chance.randrange(5)):
            model.step()
            queue = model.scheduler.running + model.scheduler.waiting
            if queue and chance.random() < 0.1:
                model.scheduler.remove(chance.choice(queue))
            if chance.random() < 0.02:
                model.scheduler.blocks.reset_prefix_cache()
    model.finish()
    assert model.is_whole()


def test_a_prompt_is_found_up_to_its_last_full_block() -> None:
    model = Pretended()
    tokens = [1, 2] * 7
    model.add(tokens, 0)
    model.finish()
    again = model.add(tokens, 1)
    model.finish()
    assert again.num_cached_tokens == 12


def test_a_short_prompt_holds_one_block_and_one_slot() -> None:
    model = Pretended(blocks=64)
    sequence = model.add([1, 2, 1], 0)
    model.step()
    assert (len(sequence.block_table), model.scheduler.blocks.num_free) == (1, 63)
    assert model.states.num_free_after_sharing([]) == 8, "it ends with no block, and so has no checkpoint"


def test_prompts_that_part_leave_a_checkpoint_where_they_do() -> None:
    model, shared = Pretended(), [2, 1, 0, 0] * 3
    model.add([*shared, 1, 1, 1, 1, 1], 0)
    model.finish()
    second = model.add([*shared, 0, 0, 0, 0, 0], 1)
    model.finish()
    third = model.add([*shared, 2, 2, 2, 2, 2], 2)
    model.finish()
    assert (second.num_cached_tokens, third.num_cached_tokens) == (0, 12)


def test_a_prompt_that_waits_asks_the_running_one_for_a_checkpoint() -> None:
    model, shared = Pretended(budget=10), [2, 1, 0, 0] * 3
    model.add([*shared, 1, 1, 1, 1, 1], 0)
    second = model.add([*shared, 0, 0, 0, 0, 0], 1)
    model.finish()
    assert second.num_cached_tokens == 12


def test_no_prompt_waits_for_another_one_where_there_are_no_checkpoints() -> None:
    model = Pretended(checkpoints=0)
    prompts = [model.add(list(range(12)), order) for order in range(2)]
    assert [(run.sequence, run.count) for run in model.step()] == [(prompts[0], 12), (prompts[1], 4)]


def test_sequences_of_one_request_share_their_prompt() -> None:
    model = Pretended()
    all_of_it = [model.add([0, 1, 2, 0] * 3 + [1, 1], 0, index=index) for index in range(3)]
    model.finish()
    assert [each.num_cached_tokens for each in all_of_it] == [0, 12, 12]


def test_a_conversation_goes_on_behind_its_last_answer() -> None:
    model = Pretended(drafts=3)
    first = model.add([0, 1, 2] * 3, 0, max_tokens=20)
    model.finish()
    second = model.add([*first.tokens, 1, 1], 1)
    model.finish()
    assert second.num_cached_tokens == (len(first.tokens) - 1) // SIZE * SIZE


def test_an_answer_keeps_one_checkpoint() -> None:
    model = Pretended()
    model.add([0, 1, 2, 1, 2], 0, max_tokens=40)
    model.finish()
    assert model.states.stats()["checkpoints"] == 2


def test_no_checkpoint_outlives_the_cache() -> None:
    """Also one that was read back without its block, which no block that leaves takes along."""
    with InferenceEngine(str(FOLDER / "lfm2"), threads=1) as engine:
        pool = engine._engine.scheduler.states  # type: ignore[union-attr]
        for forget in (engine.reset_prefix_cache, lambda: engine.sleep(1)):
            engine.generate("The length", SamplingParams(max_tokens=2), use_tqdm=False)
            assert pool.take_in(b"never read") is not None
            forget()
            wait_for(lambda: pool.stats()["checkpoints"] == 0)  # the engine's thread does it


def test_a_block_that_leaves_the_cache_takes_its_checkpoint_along() -> None:
    model = Pretended(blocks=8)
    model.add([0, 1, 2, 1] * 3 + [1], 0)
    model.finish()
    model.add([2, 1] * 14, 1)
    model.finish()
    assert model.is_whole()
    found = model.states.stats()["checkpoints"]
    assert found == len([each for each in model.states._published if each in model.scheduler.blocks._published])
