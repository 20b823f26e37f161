# SPDX-License-Identifier: MIT
"""Pages of layers with a window under a pretend model whose cache holds texts: each row finds all that it sees.

Every position of a block and of a page holds the text up to there, of whoever wrote it. Whatever is found, cut into
pieces, drafted, preempted, aborted, taken in or forgotten, a row reads its own text in every block, and in the page of
every block that its window reaches. A page that nobody needs holds nothing, so that a wrong read shows.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run, Sequence, block_hashes
from candle_vllm.core.loading.cache_specs import WindowRoom
from packages.core.tests.engine.test_states import make

SIZE = 4
Text = tuple[int, ...]


class Pretended:
    """A scheduler, and blocks and pages that hold texts.

    Args:
        window: of each page pool.
        spare: pages of each pool that are more than one sequence needs.
    """

    def __init__(
        self,
        *,
        window: int | tuple[int, ...],
        blocks: int = 64,
        seqs: int = 4,
        budget: int = 16,
        drafts: int = 0,
        spare: int = 0,
        states: bool = False,
        caching: bool = True,
        seed: int = 0,
    ) -> None:
        self.windows = (window,) if isinstance(window, int) else window
        sizes = [WindowRoom(each, budget + drafts).blocks(SIZE) + 1 + spare for each in self.windows]
        rooms = [WindowRoom(each, budget + drafts, pages) for each, pages in zip(self.windows, sizes, strict=True)]
        self.page_of = np.zeros((len(rooms), blocks), np.int64)
        page_of = [each.data for each in self.page_of]
        self.blocks = WindowedBlocks(rooms, page_of, SIZE, enable_prefix_caching=caching)
        pool = StatePool(seqs, 8, SIZE) if states else None
        self.scheduler = Scheduler(self.blocks, seqs, budget, draft_rows=drafts, states=pool)
        self.full: list[list[Text | None]] = [[None] * SIZE for _ in range(blocks)]
        self.paged: list[list[list[Text | None]]] = [[[None] * SIZE for _ in range(pages)] for pages in sizes]
        self.random, self.drafts = random.Random(seed), drafts

    def add(self, tokens: list[int], order: int, max_tokens: int = 4, index: int = 0, priority: int = 0) -> Sequence:
        sequence = make(tokens, order, max_tokens=max_tokens, index=index, priority=priority)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Run]:
        scheduler = self.scheduler
        for sequence in scheduler.running:
            if self.drafts and sequence.num_uncomputed_tokens == 1:
                sequence.drafts = tuple(self.random.randrange(3) for _ in range(self.random.randrange(self.drafts + 1)))
        scheduler.has_drafts = self.drafts > 0
        runs = scheduler.schedule()
        assert runs or not scheduler.running
        self._run(runs)
        scheduler.launched(runs)
        for run in runs:
            if run.wanted:
                run.sequence.num_ahead -= 1
        scheduler.commit([run for run in runs if not run.drafts])
        for run in runs:
            if run.wanted:
                self._draw(run)
        self.check()
        return runs

    def _run(self, runs: list[Run]) -> None:
        """As a layer does: all rows write, and then all rows read."""
        written: set[tuple[int, int]] = set()
        texts = [(*run.sequence.tokens[: run.start + run.count - len(run.drafts)], *run.drafts) for run in runs]
        for run, text in zip(runs, texts, strict=True):
            for position in range(run.start, run.start + run.count):
                block, at = run.sequence.block_table[position // SIZE], position % SIZE
                assert self.page_of[:, block].all(), "a row has a page of each pool to write to"
                assert (block, at) not in written, "two write to one place"
                assert self.blocks._hash_of[block] is None, "nobody writes to what can be found"
                written.add((block, at))
                for paged, pages in zip(self.paged, self.page_of, strict=True):
                    paged[pages[block]][at] = text[: position + 1]
                self.full[block][at] = text[: position + 1]
        for run, text in zip(runs, texts, strict=True):
            end, table = run.start + run.count, run.sequence.block_table
            for seen in range(end):
                block, at = table[seen // SIZE], seen % SIZE
                assert self.full[block][at] == text[: seen + 1]
                for window, paged, pages in zip(self.windows, self.paged, self.page_of, strict=True):
                    if seen > run.start - window:
                        assert pages[block], "a page that a row sees is there"
                        assert paged[pages[block]][at] == text[: seen + 1]

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

    def take_in(self, text: list[int]) -> None:
        """The full blocks of a text come from a store, as far as there is a place for them."""
        for number, digest in enumerate(block_hashes(text, SIZE, None), 1):
            if not self.blocks.lookup([digest]):
                block = self.blocks.take_in(digest)
                if block is None:
                    return
                held = [tuple(text[: number * SIZE - SIZE + at + 1]) for at in range(SIZE)]
                self.full[block] = [*held]
                for paged, pages in zip(self.paged, self.page_of, strict=True):
                    paged[pages[block]] = [*held]
        self.check()

    def check(self) -> None:
        """Every page has one owner, and what has none is wiped; each running sequence is counted once."""
        for number, pool in enumerate(self.blocks.pools):
            page_of, paged = self.page_of[number], self.paged[number]
            assert sorted([*page_of[page_of > 0].tolist(), *pool.free_pages]) == list(range(1, len(paged)))
            users = [0] * self.blocks.num_blocks
            for sequence in self.scheduler.running:
                for block in sequence.block_table[slice(*sequence.windowed[number])]:
                    users[block] += 1
            assert users == pool.users
            idle = {block for block in np.flatnonzero(page_of).tolist() if not users[block]}
            assert idle == set(pool.idle)
            assert all(self.blocks._hash_of[block] is not None for block in idle)
            for page in (0, *pool.free_pages):
                paged[page] = [None] * SIZE

    def finish(self, most: int = 3000) -> None:
        for _ in range(most):
            if not (self.scheduler.waiting or self.scheduler.running):
                return
            self.step()
        raise AssertionError("somebody never ends")


@pytest.mark.one_of_each(23)
@pytest.mark.parametrize("seed", range(120))
def test_every_row_finds_what_its_window_sees(seed: int) -> None:
    chance = random.Random(seed)
    model = Pretended(
        window=chance.choice((1, 2, 4, 5, 9, 17, (2, 9), (1, 5, 17))),
        blocks=chance.choice((14, 24, 64)),
        seqs=chance.randint(1, 5),
        budget=chance.choice((5, 8, 16, 31)),
        drafts=chance.choice((0, 0, 3)),
        spare=chance.choice((0, 1, 4, 20)),
        states=chance.random() < 0.3,
        caching=chance.random() < 0.9,
        seed=seed,
    )
    begins = [[chance.randrange(3) for _ in range(chance.randrange(1, 34))] for _ in range(3)]
    for order in range(40):
        begin = chance.choice(begins)
        tokens = begin[: chance.randint(1, len(begin))] + [chance.randrange(3) for _ in range(chance.randrange(12))]
        priority = chance.choice((0, 0, 0, -1, 1))
        for index in range(chance.choice((1, 1, 3))):
            model.add(tokens, order, chance.randint(1, 12), index, priority)
        for _ in range(chance.randrange(5)):
            model.step()
        if chance.random() < 0.15 and (both := [*model.scheduler.running, *model.scheduler.waiting]):
            model.scheduler.remove(chance.choice(both))
            model.check()
        if chance.random() < 0.1 and model.scheduler.states is None and model.blocks.enable_prefix_caching:
            model.take_in(chance.choice(begins))
        if chance.random() < 0.05:
            model.blocks.reset_prefix_cache()
            model.check()
    model.finish()
    assert model.blocks.num_free == model.blocks.num_blocks
    assert [pool.num_free + 1 for pool in model.blocks.pools] == [len(paged) for paged in model.paged]
    model.blocks.reset_prefix_cache()
    assert not model.page_of.any()


def test_a_sequence_holds_its_window_alone() -> None:
    model = Pretended(window=8, blocks=64, budget=16)
    sequence = model.add([1] * 100, 0, max_tokens=60)
    most = 0
    while model.scheduler.waiting or model.scheduler.running:
        model.step()
        first, last = sequence.windowed[0] if sequence.windowed else (0, 0)
        most = max(most, last - first)
        if sequence.num_tokens > sequence.num_prompt_tokens + 1:
            assert last - first <= 3, "8 tokens touch 3 blocks of 4"
    assert most == 6, "a piece of 16 tokens, and 7 before it"


def test_a_prefix_needs_the_pages_of_its_window_alone() -> None:
    model = Pretended(window=8, blocks=64, spare=1)
    text = list(range(60))
    model.add(text, 0, max_tokens=1)
    model.finish()
    assert int((model.page_of > 0).sum()) < len(text) // SIZE, "most pages have gone to others"
    again = model.add(text, 1, max_tokens=1)
    model.finish()
    assert again.num_cached_tokens == 56


def test_a_prefix_whose_pages_have_gone_is_computed_from_where_they_are_there() -> None:
    model = Pretended(window=8, blocks=64, spare=1)
    first = list(range(60))
    model.add(first, 0, max_tokens=1)
    model.finish()
    model.add(list(range(100, 160)), 1, max_tokens=1)
    model.finish()
    again = model.add(first, 2, max_tokens=1)
    model.finish()
    assert again.num_cached_tokens == 0
    more = model.add(first, 3, max_tokens=1)
    model.finish()
    assert more.num_cached_tokens == 56, "what was computed anew can be found again"


def test_a_burst_that_waits_for_a_prefix_computes_it_once() -> None:
    model = Pretended(window=8, blocks=64, budget=64, spare=20)
    for order in range(3):
        model.add([*range(40), order], order, max_tokens=1)
    assert [run.count for run in model.step()] == [41]
    assert [run.count for run in model.step()] == [1, 1]


def test_rejected_drafts_take_no_page_away_that_is_needed_again() -> None:
    model = Pretended(window=4, blocks=64, drafts=3, seed=5)
    model.random.random = lambda: 1.0  # type: ignore[method-assign]
    model.add([1] * 9, 0, max_tokens=40)
    model.finish()


def test_of_prompts_that_cannot_go_on_the_last_makes_room() -> None:
    model = Pretended(window=9, blocks=64, budget=8, spare=6, caching=False)
    last, first = make([1] * 40, 0, priority=1), make([2] * 40, 1)
    for sequence in (last, first):
        model.scheduler.add(sequence)
        assert [run.sequence for run in model.step()] == [sequence]
    del model.blocks.pools[0].free_pages[:]
    assert [run.sequence for run in model.scheduler.schedule()] == [first]
    assert model.scheduler.waiting == [last]


def test_a_narrow_window_keeps_fewer_pages_than_a_wide_one() -> None:
    model = Pretended(window=(4, 24), blocks=64, budget=8)
    sequence = model.add([1] * 60, 0, max_tokens=30)
    held = [0, 0]
    while model.scheduler.waiting or model.scheduler.running:
        model.step()
        if sequence.num_tokens > sequence.num_prompt_tokens + 1 and sequence.windowed:
            held = [max(most, last - first) for most, (first, last) in zip(held, sequence.windowed, strict=True)]
    assert held == [2, 7]


def test_what_a_step_under_way_fills_has_its_pages_when_it_is_published() -> None:
    """Where steps overlap, the next one is scheduled before: a store would be given a block without its pages."""
    model, offered = Pretended(window=4, blocks=64, budget=16, spare=8), list[int]()

    class Kept:
        def offer(self, block: int, digest: bytes) -> None:
            assert model.blocks.has_pages(block)
            offered.append(block)

        def __getattr__(self, name: str) -> object:
            return lambda *_: name == "is_ready"

    model.scheduler.offloaded = Kept()  # type: ignore[assignment]
    sequence = model.add([*range(64)], 0, max_tokens=2)
    flights = []
    for _ in range(4):
        flights.append(model.scheduler.schedule())
        model._run(flights[-1])
        model.scheduler.launched(flights[-1])
        if len(flights) > 1:
            model.scheduler.commit(flights.pop(0))
    model.scheduler.commit(flights.pop())
    assert offered == sequence.block_table.tolist()


def test_nobody_makes_way_while_a_step_under_way_may_free_pages() -> None:
    model = Pretended(window=9, blocks=64, budget=8, spare=6)
    for order in range(2):
        model.add([order] * 4, order, max_tokens=1)
    step = model.scheduler.schedule()
    model.scheduler.launched(step)
    assert not model.scheduler.schedule(), "both wait for their last token"
    assert len(model.scheduler.running) == 2
    prompts = Pretended(window=9, blocks=64, budget=8, caching=False)
    for order in range(2):
        prompts.scheduler.add(make([order] * 40, order))
    step = prompts.scheduler.schedule()
    prompts.scheduler.launched(step)
    prompts.scheduler.blocks.pools[0].free_pages.clear()  # type: ignore[attr-defined]
    assert not prompts.scheduler.schedule()
    assert prompts.scheduler.num_preemptions == 0


def test_blocks_of_a_store_leave_a_touched_prefix_its_pages() -> None:
    model = Pretended(window=8, blocks=64, spare=20)
    text = list(range(40))
    for order, each in enumerate((text, list(range(100, 140)))):
        model.add(each, order, max_tokens=1)
        model.finish()
    found = model.blocks.lookup(hashes := block_hashes(text, SIZE, None))
    assert len(found) == 10
    model.blocks.touch(hashes)
    model.take_in(list(range(200, 200 + SIZE * (len(model.blocks.pools[0].free_pages) + 5))))
    assert all(model.blocks.has_pages(block) for block in found)


def test_a_block_whose_page_has_gone_is_read_from_a_store_anew() -> None:
    model = Pretended(window=8, blocks=64, spare=1)
    text = list(range(60))
    model.add(text, 0, max_tokens=1)
    model.finish()
    hashes = block_hashes(text, SIZE, None)[:14]
    model.add(list(range(100, 160)), 1, max_tokens=1)
    model.finish()
    assert len(model.blocks.lookup(hashes)) == 14
    model.blocks.renew(hashes, lambda digest: digest != hashes[13])
    assert len(model.blocks.lookup(hashes)) == 14, "without its last block the prefix would be no longer"
    model.blocks.renew(hashes, lambda _: True)
    assert len(model.blocks.lookup(hashes)) == 12, "the window of the next token sees the last two blocks"
    model.blocks.renew(hashes, lambda _: True)
    assert len(model.blocks.lookup(hashes)) == 12, "a second look forgets no more"
    model.take_in(text)
    again = model.add(text, 2, max_tokens=1)
    model.finish()
    assert again.num_cached_tokens == 56


@pytest.mark.parametrize("spare", [0, 2, 6, 16])
def test_nobody_is_preempted_for_pages_where_answers_are_reproducible(spare: int) -> None:
    model = Pretended(window=8, blocks=128, budget=8, spare=spare)
    scheduler, together = model.scheduler, 0
    scheduler.reproducible = True
    for order in range(4):
        model.add([order + 3] * 3, order, max_tokens=30)
    while scheduler.running or scheduler.waiting:
        model.step()
        together = max(together, len(scheduler.running))
    assert scheduler.num_preemptions == 0
    assert together == {0: 1, 2: 1, 6: 2, 16: 4}[spare]
