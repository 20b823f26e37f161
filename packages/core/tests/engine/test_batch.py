# SPDX-License-Identifier: MIT
"""Steps as arrays: what is kept from one step to the next never shows."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from candle_vllm.core import SamplingParams
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.ranks.rank_line import Batches, Forward, Next, ToRank, decoder, encoded
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step import batch as batch_module
from candle_vllm.core.engine.step.batch import Batch, BatchBuilder
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run, Sequence

SIZE = 4


def written_out(scheduled: list[Run], before: list[Run]) -> dict[str, list[int]]:
    """The numbers of a step, one token after the other."""
    found: dict[str, list[int]] = {name: [] for name in ("token_ids", "positions", "slots", "sources", "sampled_rows")}
    drawn = {item.sequence: place for place, item in enumerate(before)}
    for item in scheduled:
        for at in range(item.start, item.start + item.count):
            known = at < len(item.sequence.tokens)
            found["token_ids"].append(item.sequence.tokens[at] if known else 0)
            found["sources"].append(-1 if known else drawn[item.sequence])
            found["positions"].append(at)
            found["slots"].append(item.sequence.block_table[at // SIZE] * SIZE + at % SIZE)
        if item.wanted:
            found["sampled_rows"].append(len(found["positions"]) - 1)
    return found


def check(batch: Batch, scheduled: list[Run], before: list[Run]) -> None:
    for name, wanted in written_out(scheduled, before).items():
        assert getattr(batch, name).tolist() == wanted, name
    assert np.diff(batch.query_start).tolist() == [item.count for item in scheduled]
    assert batch.query_start[0] == 0
    assert batch.context_lens.tolist() == [item.start + item.count for item in scheduled]
    for item, row in zip(scheduled, batch.block_tables.tolist(), strict=True):
        used = (item.start + item.count - 1) // SIZE + 1
        assert row[:used] == item.sequence.block_table.tolist()[:used]
    assert list(batch.drawing) == [item for item in scheduled if item.wanted]
    assert batch.num_decodes == sum(item.decodes for item in scheduled)


class Told:
    """What another rank makes of the steps that it is told, in the fewest words."""

    fatal, in_flight = (), 1
    step_memory = hidden_sum = drop_cache = restore_cache = wake_up = None  # not called

    def __init__(self) -> None:
        self._ranks: Any = RankedRunner(self, None)  # type: ignore[arg-type]
        self._batches, self._versions = Batches(), (object(), object())
        self.next = self.whole = 0

    def hears(self, batch: Batch) -> None:
        message = decoder(ToRank).decode(encoded(self._ranks._message(batch)))
        assert batch.goes_on or not isinstance(message, Next)
        self.next += isinstance(message, Next)
        self.whole += batch.goes_on and isinstance(message, Forward)
        made = self._batches.batch(message)
        for name in ("tokens", "query_start", "context_lens", "sampled_rows"):
            np.testing.assert_array_equal(getattr(made, name), getattr(batch, name), name)
        used = np.arange(batch.block_tables.shape[1]) * SIZE < batch.context_lens[:, None]
        np.testing.assert_array_equal(made.block_tables * used, batch.block_tables * used)
        assert made.num_decodes == batch.num_decodes
        versions = batch.tables_version, made.tables_version
        same = [new is old for new, old in zip(versions, self._versions)]
        assert same[0] == same[1]
        self._versions = versions


@pytest.mark.parametrize("overlapping", [False, True])
def test_any_run_of_steps(overlapping: bool) -> None:
    """Sequences come and go, are preempted and come back a token at a time, with blocks for few of them.

    Another rank that is told most of the steps makes the same of them.
    """
    rng, missing = random.Random(3), random.Random(4)
    preemptions = unchanged = recomputed = told_next = told_whole = 0
    for _ in range(40):
        places, longest = rng.choice((3, 8)), rng.choice((6, 24))
        scheduler = Scheduler(BlockManager(rng.randrange(9, 24), SIZE), places, rng.choice((places, 20)))
        builder, before, flight, version = BatchBuilder(SIZE), [], None, None
        ends: dict[Sequence, int] = {}
        other = Told()
        for step in range(120):
            if rng.random() < 0.3 and len(ends) < 9:
                prompt = [rng.randrange(9) for _ in range(rng.randrange(1, longest))]
                settings = {"params": SamplingParams(), "priority": rng.randrange(3)}
                request = GenerationRequest(request_id=str(step), prompt_token_ids=prompt, **settings)
                sequence = Sequence(request, 0, step)
                ends[sequence] = len(prompt) + rng.randrange(1, 36 - longest)
                scheduler.add(sequence)
            scheduled = scheduler.schedule()
            if scheduled:
                batch = builder.build(scheduled, before)
                check(batch, scheduled, before)
                if missing.random() < 0.9:
                    other.hears(batch)
                unchanged += batch.tables_version is version
                last = scheduled[-1]
                recomputed += last.count == 1 and not last.wanted and last.start >= last.sequence.num_prompt_tokens
                version = batch.tables_version
                scheduler.launched(scheduled)
            landing = flight if overlapping else scheduled
            flight = scheduled
            if landing:
                scheduler.commit(landing)
            for item in landing or ():
                if item.wanted and item.sequence in ends:
                    item.sequence.append(rng.randrange(9))
                    if len(item.sequence.tokens) >= ends[item.sequence]:
                        del ends[item.sequence]
                        scheduler.remove(item.sequence)
            before = [item for item in scheduled if item.wanted] if overlapping else []
        preemptions += scheduler.num_preemptions
        told_next, told_whole = told_next + other.next, told_whole + other.whole
    assert preemptions > 20
    assert unchanged > 100
    assert overlapping or told_next > 100
    assert overlapping or told_whole > 10, "where the one before was missed"
    assert recomputed > 0, "one token of what is recomputed, beside nothing but decoding sequences"


@pytest.mark.parametrize(
    ("before", "told", "said"),
    [
        ((), Next(np.zeros(1, np.int64), ()), "does not follow a decoding step of 1"),
        ((3, 5), Next(np.zeros(1, np.int64), ()), "does not follow a decoding step of 1"),
        ((3,), Next(np.zeros(2, np.int64), ()), "does not follow a decoding step of 2"),
        ((3,), Next(np.zeros(1, np.int64), ((1, 1, 1),)), "sequence 1 begins"),
        ((3,), Next(np.zeros(1, np.int64), ((-1, 1, 1),)), "sequence -1 begins"),
        ((3,), Next(np.zeros(1, np.int64), ((0, 2, 1),)), "block 2 of"),
        ((3,), Next(np.zeros(1, np.int64), ((0, 0, 1),)), "block 0 of"),
    ],
)
def test_a_step_that_cannot_go_on_is_refused(before: tuple[int, ...], told: Next, said: str) -> None:
    batches = Batches()
    if before:
        count = len(before)
        rows, starts, contexts, tables = (
            np.array(each) for each in ([list(before)] * 4, range(count + 1), before, [[0]] * count)
        )
        batches.batch(Forward(rows, starts, contexts, starts[:-1], count, tables, None, None))
    with pytest.raises(ValueError, match=said):
        batches.batch(told)


def test_tables_that_stay_say_so() -> None:
    """The version changes where a block is begun, and where other sequences run."""
    scheduler, builder, versions = Scheduler(BlockManager(20, SIZE), 8, 32), BatchBuilder(SIZE), []
    for step in range(6):
        if step in (0, 4):
            request = GenerationRequest(request_id=str(step), prompt_token_ids=[1, 2], params=SamplingParams())
            scheduler.add(Sequence(request, 0, step))
        scheduled = scheduler.schedule()
        versions.append(builder.build(scheduled).tables_version)
        scheduler.launched(scheduled)
        scheduler.commit(scheduled)
        for item in scheduled:
            item.sequence.append(7)
    same = [one is other for one, other in itertools.pairwise(versions)]
    assert same == [True, True, False, False, True]  # of 2, 3, 4, 5 and 6 tokens; then with another


def test_a_few_rows_are_laid_out_as_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, single tokens and drafts, by hand and by arrays."""
    rng = random.Random(5)
    for case in range(60):
        scheduled: list[Run] = []
        for number in range(rng.randrange(1, 6)):
            prompt = [rng.randrange(99) for _ in range(rng.randrange(1, 30))]
            request = GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=SamplingParams())
            sequence = Sequence(request, 0, number)
            sequence.block_table.extend(rng.sample(range(200), 20))
            drafts = tuple(rng.randrange(99) for _ in range(rng.choice((0, rng.randrange(9)))))
            start = len(prompt) - 1 if drafts else rng.randrange(len(prompt))
            count = rng.randint(1, len(prompt) - start) + len(drafts)
            wanted = (1 + len(drafts)) * (start + count >= len(prompt))
            scheduled.append(Run(sequence, start, count, wanted, 0, False, drafts))
        made: list[dict[str, Any]] = []
        for few in (0, 1000):
            monkeypatch.setattr(batch_module, "_FEW", few)
            monkeypatch.setattr(batch_module, "_FEW_ROWS", few)
            batch = BatchBuilder(SIZE).build(scheduled)
            names = ("tokens", "query_start", "context_lens", "sampled_rows", "block_tables")
            made.append({name: getattr(batch, name).tolist() for name in names})
        assert made[0] == made[1], case
        tokens = [token for run in scheduled for token in (*run.sequence.tokens, *run.drafts)[run.start :][: run.count]]
        assert made[0]["tokens"][0] == tokens
        rows = [row for run in scheduled for row in range(run.count - run.wanted, run.count)]
        starts = [start for run, start in zip(scheduled, made[0]["query_start"]) for _ in range(run.wanted)]
        assert made[0]["sampled_rows"] == [start + row for start, row in zip(starts, rows)]
