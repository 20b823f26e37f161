# SPDX-License-Identifier: MIT
"""Who begins when there are more adapters than places for them: nobody waits for ever, and nobody for a load alone."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest

from candle_vllm.core.engine.adapters.adapter_admission import AdapterAdmission
from candle_vllm.core.engine.adapters.adapter_store import AdapterStore
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import AdapterUse, GenerationRequest
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.sampling.params import SamplingParams
from tests.waiting import PATIENCE, wait_for

from .adapter_fakes import Loads


class Pretended:
    """A scheduler whose steps give each sequence a token at once, and a store that loads between them."""

    def __init__(
        self, loads: Loads, *, seqs: int = 8, most: int = 4, memory: int | None = None, blocks: int = 200
    ) -> None:
        self.store = AdapterStore(loads, most=memory, most_at_once=most)
        self.store._begin = lambda: None  # type: ignore[method-assign]  # loads are run by `load`
        admission = AdapterAdmission(self.store, most, patience=seqs)
        self.scheduler = Scheduler(BlockManager(blocks, 4), seqs, 64, adapters=admission)
        self.began: list[Sequence] = []
        self.adapters_in_steps: list[set[str]] = []
        self._orders = 0

    def ask(self, *names: str, max_tokens: int = 4, length: int = 3, priority: int = 0) -> Sequence:
        params = SamplingParams(max_tokens=max_tokens)
        uses = tuple(AdapterUse(name=name, path=f"/{name}") for name in names)
        ids = [(self._orders * 7 + place) % 250 for place in range(length)]
        request = GenerationRequest(
            request_id=str(self._orders), prompt_token_ids=ids, params=params, adapters=uses, priority=priority
        )
        sequence = Sequence(request, 0, self._orders)
        sequence.entries = self.store.found(uses)
        self._orders += 1
        self.scheduler.add(sequence)
        return sequence

    def load(self, most: int = 1 << 30) -> None:
        """Loads what is wanted, so many at most."""
        for _ in range(most):
            with self.store._change:
                entry = self.store._next()
            if entry is None:
                return
            entry.state = "loading"
            self.store._bring(entry)

    def step(self) -> list[Sequence]:
        """One step; those that ended in it."""
        items = self.scheduler.schedule()
        ended = []
        self.scheduler.launched(items)
        self.scheduler.commit(items)
        for item in items:
            sequence = item.sequence
            assert len(sequence.adapters) == len(sequence.entries)
            assert all(entry.loaded is not None for entry, _ in sequence.entries)
            if sequence not in self.began:
                self.began.append(sequence)
            if item.wanted:
                sequence.append(7)
                if len(sequence.tokens) - sequence.num_prompt_tokens >= (sequence.request.params.max_tokens or 0):
                    self.scheduler.remove(sequence)
                    ended.append(sequence)
        self.adapters_in_steps.append({entry.name for item in items for entry, _ in item.sequence.entries})
        return ended


def test_others_pass_a_sequence_whose_adapter_is_not_there() -> None:
    engine = Pretended(Loads())
    waits, base = engine.ask("a"), engine.ask()
    engine.step()
    assert engine.began == [base]
    assert engine.scheduler.waiting == [waits]
    engine.load()
    engine.step()
    assert engine.began == [base, waits]


def test_steps_go_on_as_they_are_while_a_load_is_waited_for() -> None:
    engine = Pretended(Loads())
    engine.ask(max_tokens=20)
    engine.ask("a")
    engine.step()
    engine.step()
    engine.step()
    assert engine.scheduler.schedule().goes_on
    engine.load()
    assert not engine.scheduler.schedule().goes_on


def test_a_step_has_no_more_adapters_than_it_may() -> None:
    engine = Pretended(Loads(), most=2)
    for name in "abcabc":
        engine.ask(name)
    engine.step()
    engine.load()
    while engine.scheduler.waiting or engine.scheduler.running:
        engine.step()
        engine.load()
    assert max(map(len, engine.adapters_in_steps)) == 2
    assert [each.request.adapters[0].name for each in engine.began] == ["a", "b", "a", "b", "c", "c"]


def test_a_preempted_sequence_is_not_held_back_for_one_that_waits_for_its_memory() -> None:
    engine = Pretended(Loads(), memory=1, seqs=2)
    begun = engine.ask("a", max_tokens=8)
    engine.step()
    engine.load()
    engine.step()
    engine.scheduler._preempt(begun)
    for _ in range(8):
        engine.ask(priority=-1)
    engine.ask("b", priority=-2)
    for _ in range(60):
        engine.step()
        engine.load()
    assert not engine.scheduler.waiting


def test_a_preempted_sequence_keeps_what_it_began_with() -> None:
    engine = Pretended(Loads(), memory=1, blocks=5, most=1)
    first, second = (engine.ask("a", max_tokens=12, length=4) for _ in range(2))
    engine.step()
    engine.load()
    engine.ask("b")
    while engine.scheduler.num_preemptions == 0:
        engine.step()
        engine.load()
    assert second.adapters
    assert second.entries[0][0].leases == 2
    lent = second.adapters
    while second in engine.scheduler.waiting:
        engine.step()
        engine.load()
    assert second.adapters is lent
    assert first.tokens[-1] == 7
    for _ in range(60):
        engine.step()
        engine.load()
    assert not engine.scheduler.waiting
    assert engine.store._in_memory


@pytest.mark.parametrize(("most", "memory"), [(4, None), (4, 4), (64, 4)])
def test_forty_adapters_share_four_places_and_none_waits_for_more_than_two_rounds(
    most: int, memory: int | None
) -> None:
    """A few popular adapters are asked for whenever one of them ends; the others now and then."""
    chance = random.Random(1)
    engine = Pretended(Loads(), seqs=32, most=most, memory=memory)
    names = [f"a{number:02d}" for number in range(40)]
    asked: dict[Sequence, int] = {}
    began: dict[Sequence, int] = {}

    def ask(name: str) -> None:
        asked[engine.ask(name, max_tokens=chance.randint(2, 8))] = step

    step = 0
    for name in names:
        ask(name)
    for _ in range(64):  # who ask for one of four again and again, and would keep their places for ever
        ask(chance.choice(names[:4]))
    for step in range(1, 600):
        before = len(engine.began)
        ended = engine.step()
        engine.load(1)
        began |= dict.fromkeys(engine.began[before:], step)
        for sequence in ended:
            popular = sequence.request.adapters[0].name in names[:4]
            ask(chance.choice(names[:4]) if popular else sequence.request.adapters[0].name)
    assert max(map(len, engine.adapters_in_steps)) <= 4
    waits = {sequence: began.get(sequence, step) - at for sequence, at in asked.items()}
    # In a round each of 100 askers is served once: 100 answers of 5 steps, 4 at a time at worst.
    assert max(waits.values()) <= 2 * 100 * 5 / 4
    rare = Counter(each.request.adapters[0].name for each in began if each.request.adapters[0].name in names[4:])
    assert len(rare) == 36
    assert min(rare.values()) >= 3


@pytest.mark.parametrize(("most", "memory"), [(1, None), (8, 1)])
def test_a_popular_adapter_does_not_keep_a_rare_one_out(most: int, memory: int | None) -> None:
    engine = Pretended(Loads(), seqs=4, most=most, memory=memory)
    rare, waited = None, 0
    for step in range(400):
        if step == 20:
            rare, waited = engine.ask("rare"), len(engine.began)
        while len(engine.scheduler.waiting) < 6:
            engine.ask("popular", max_tokens=3 + step % 5)
        engine.step()
        engine.load()
        if rare in engine.began:
            break
    assert rare in engine.began
    begun = [each for each in engine.began[waited:] if each.entries]
    assert len(begun) <= 4 + 1 + 6  # its patience, itself, and those that came before it


def test_a_mix_of_adapters_is_not_kept_out_by_single_ones() -> None:
    engine = Pretended(Loads(), seqs=8, most=2)
    mix = None
    for step in range(200):
        if step == 10:
            mix = engine.ask("c", "d")
        while len(engine.scheduler.waiting) < 8:
            for place, name in enumerate("ab"):
                engine.ask(name, max_tokens=3 + (step + place) % 4)
        engine.step()
        engine.load()
        if mix in engine.began:
            break
    assert mix in engine.began


def test_what_has_its_adapters_is_not_held_back_for_the_sake_of_one_that_waits_for_their_memory() -> None:
    engine = Pretended(Loads(), memory=1)
    admission = AdapterAdmission(engine.store, 2, patience=0)
    first, second = engine.ask("a"), engine.ask("b")
    admission.waits(second)
    admission.look([second])
    engine.load()
    assert not admission.holds_back(second)  # it has its adapter, and waits for blocks
    admission.waits(first)
    admission.look([first, second])
    engine.load()
    assert admission.holds_back(first)
    assert not admission.holds_back(second)


def test_what_is_removed_while_it_waits_is_wanted_no_more() -> None:
    loads = Loads()
    engine = Pretended(loads)
    first, second = engine.ask("a"), engine.ask("b")
    engine.step()
    assert len(engine.store._wanted) == 2
    engine.scheduler.remove(first)
    engine.step()
    assert [entry.name for entry in engine.store._wanted] == ["b"]
    engine.scheduler.remove(second)
    assert engine.store._wanted == ()
    engine.load()
    assert loads.begun == []


def test_a_load_in_its_own_thread_makes_a_waiting_sequence_begin() -> None:
    loads = Loads()
    store = AdapterStore(loads)
    woken = threading.Event()
    store.on_change = woken.set
    scheduler = Scheduler(BlockManager(8, 4), 2, 8, adapters=AdapterAdmission(store, 2, 2))
    request = GenerationRequest(
        request_id="r", prompt_token_ids=[1], params=SamplingParams(), adapters=(AdapterUse(name="a", path="/a"),)
    )
    sequence = Sequence(request, 0, 0)
    sequence.entries = store.found(request.adapters)
    scheduler.add(sequence)
    assert not scheduler.schedule()
    assert woken.wait(PATIENCE)
    steps = []
    wait_for(lambda: steps.extend(scheduler.schedule()) or steps)
    assert steps[0].sequence is sequence
    store.close()
