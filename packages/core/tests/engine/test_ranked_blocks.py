# SPDX-License-Identifier: MIT
"""Blocks besides the cache where ranks have a part of each: restarts, what one rank alone lacks, and every order."""

from __future__ import annotations

import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.engine.cache import block_tiers as kept_blocks
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.block_stores import BlockError, Bytes, HostBlocks
from candle_vllm.core.engine.cache.block_tiers import BlockParts, OffloadedBlocks
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from tests.waiting import Clock, wait_for

SIZE = 8  # tokens of a block
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
FORMS: dict[str, dict[str, Any]] = {"ranks": {"tensor_parallel_size": 2}, "stages": {"pipeline_parallel_size": 2}}
BOUND = 1 << 20
USUAL: dict[str, Any] = {
    "device": "cpu", "op_by_op": True, "threads": 1, "block_size": SIZE, "max_num_seqs": 8,
    "max_num_batched_tokens": 64, "max_model_len": 256,
}  # fmt: skip


def prompt(number: int, blocks: int = 5) -> list[int]:
    return [3 + number, *(3 + n * 7 % 90 for n in range(blocks * SIZE))]


class Kept:
    """An engine of several processes with blocks on disk."""

    def __init__(self, model: Path, folder: Path | None, form: dict[str, Any], **settings: Any) -> None:
        self.folder = folder
        settings |= {} if folder is None else {"prompt_cache_path": folder, "prompt_cache_bytes": BOUND}
        self.engine = InferenceEngine(str(model), **USUAL | form | settings)

    def answer(self, given: list[int], params: SamplingParams = GREEDY) -> tuple[int, ...]:
        return tuple(self.engine.generate([given], params, use_tqdm=False)[0].outputs[0].token_ids)

    @property
    def store(self) -> OffloadedBlocks:
        assert self.engine._engine is not None
        assert self.engine._engine.offloaded is not None
        return self.engine._engine.offloaded

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def found(self, given: list[int], params: SamplingParams = GREEDY) -> tuple[tuple[int, ...], int]:
        """The answer, and how many blocks were not computed for it."""
        before = self.stats().cached_prompt_tokens
        said = self.answer(given, params)
        return said, (self.stats().cached_prompt_tokens - before) // SIZE

    def forget(self) -> None:
        """Memory has no blocks any more; the folder has all of them, once they are written."""
        assert self.engine._engine is not None
        self.engine._engine.scheduler.blocks.reset_prefix_cache()

    def parts(self) -> list[Path]:
        """Of each rank the folder of its parts."""
        assert self.folder is not None
        return sorted(self.folder.iterdir())

    def names(self, rank: int) -> set[str]:
        return {path.name for path in self.parts()[rank].glob("*/*") if len(path.name) == 64}

    def written(self, names: set[str]) -> list[str]:
        """The new blocks, in the order in which they were written, once all ranks have written as many."""
        wait_for(lambda: len(self.names(0) - names) == len(self.names(1) - names) >= 5)
        return sorted(self.names(0) - names, key=lambda name: self.path(0, name).stat().st_mtime_ns)

    def path(self, rank: int, name: str) -> Path:
        return self.parts()[rank] / name[:2] / name


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[Clock]:
    """The time that the first rank waits for blocks stands still: whoever waits in vain waits for ever."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Clock(monkeypatch, kept_blocks)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(num_hidden_layers=3))


@pytest.fixture(scope="module")
def right(model: Path) -> Iterator[Callable[..., tuple[int, ...]]]:
    """What one rank answers, without blocks on disk."""
    whole = Kept(model, None, {}, enable_prefix_caching=False)
    with whole.engine:
        yield whole.answer


@pytest.fixture(scope="module", params=[pytest.param("ranks", marks=pytest.mark.every_case), "stages"])
def kept(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory, right: Callable[..., Any]
) -> Iterator[Kept]:
    folder, form = tmp_path_factory.mktemp("kept") / "blocks", FORMS[request.param]
    first = Kept(model, folder, form)
    with first.engine:  # what was not written yet is written when it ends
        assert first.found(prompt(0)) == (right(prompt(0)), 0)
    assert first.names(0) == first.names(1)
    assert len(first.names(0)) == 5
    again = Kept(model, folder, form)
    with again.engine:
        assert again.found(prompt(0)) == (right(prompt(0)), 5)
        assert (again.stats().kept_blocks_read, again.stats().kept_block_failures) == (5, 0)
        yield again


RANKS = pytest.mark.skipif(sys.platform == "win32", reason="several ranks need sockets that a child inherits")


@RANKS
def test_blocks_come_back_when_they_have_left_memory(kept: Kept, right: Callable[..., Any]) -> None:
    """Several at once too, of which others' steps run meanwhile; with another salt nothing is found."""
    prompts = [prompt(10 + number) for number in range(4)]
    for each in prompts:
        before = kept.names(0)
        assert kept.found(each) == (right(each), 0)
        kept.written(before)
    kept.forget()
    read = kept.stats().kept_blocks_read
    outputs = kept.engine.generate([*prompts, [5, 6, 7]], GREEDY, use_tqdm=False)
    assert [tuple(each.outputs[0].token_ids) for each in outputs] == [*map(right, prompts), right([5, 6, 7])]
    assert kept.stats().kept_blocks_read == read + 20
    salted = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, cache_salt="mine")
    assert kept.found(prompts[0], salted) == (right(prompts[0]), 0)


@RANKS
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_what_one_rank_lacks_is_computed_again(kept: Kept, right: Callable[..., Any], rank: int, damage: str) -> None:
    given = prompt(20 + 2 * rank + (damage == "missing"))
    before = kept.names(0)
    assert kept.answer(given) == right(given)
    path = kept.path(rank, kept.written(before)[2])
    if damage == "flipped":
        data = path.read_bytes()
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    else:
        path.unlink()
    failures = kept.stats().kept_block_failures
    kept.forget()
    assert kept.found(given) == (right(given), 2)
    assert kept.stats().kept_block_failures == failures + 1
    kept.written(before)
    kept.forget()
    assert kept.found(given) == (right(given), 5)  # it was written again


@RANKS
def test_a_rank_whose_disk_hangs_costs_a_second_once(kept: Kept, right: Callable[..., Any], clock: Clock) -> None:
    given = prompt(30)
    before = kept.names(0)
    assert kept.answer(given) == right(given)
    path = kept.path(1, kept.written(before)[1])
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for somebody who writes
    store, over = kept.store, threading.Event()

    def give_up() -> None:
        """Let time pass for a sequence that has got its first block, and for no other."""
        while not over.wait(0.01):
            if any(reading.brought == 1 for reading in list(store._readings.values())):
                clock.skip(1.1)

    def found() -> int:
        kept.forget()
        answer, number = kept.found(given)
        assert answer == right(given)
        return number

    def found_nothing() -> bool:
        time.sleep(1.1)  # after which the other rank knows that its disk hangs
        return found() == 0  # at once: for what hangs no time would pass

    giving_up = threading.Thread(target=give_up)
    giving_up.start()
    try:
        assert found() == 1
        wait_for(found_nothing)
    finally:
        over.set()
        giving_up.join()
        path.write_bytes(b"")
    wait_for(lambda: not path.exists())  # it was no block, and is deleted
    kept.forget()
    kept.answer(given)
    kept.written(before)
    kept.forget()
    assert kept.found(given) == (right(given), 5)


@RANKS
def test_blocks_outlive_sleep(kept: Kept, right: Callable[..., Any]) -> None:
    given = prompt(31)
    before = kept.names(0)
    assert kept.answer(given) == right(given)
    kept.engine.sleep(2)
    assert len(kept.written(before)) == 5
    kept.engine.wake_up()
    assert kept.found(given) == (right(given), 5)


@RANKS
def test_one_bound_is_for_all(kept: Kept, right: Callable[..., Any]) -> None:
    """And what was used last is there in all ranks."""
    for number in range(24):
        kept.answer(prompt(40 + number, 25))
        if number % 4 == 0:
            assert kept.found(prompt(70)) == (right(prompt(70)), 5 if number else 0)
            kept.forget()
    wait_for(lambda: not kept.store._own._to_write)

    def found() -> list[int]:
        assert kept.folder is not None
        return [path.stat().st_size for path in kept.folder.glob("*/*/*")]

    wait_for(lambda: sum(found()) > BOUND / 2)
    sizes = found()
    part = max(sizes)
    assert 24 * 25 * 2 * part > 1.5 * BOUND  # more was written than may be there
    assert BOUND / 2 < sum(sizes) < BOUND * (1 + 2 / 16) + 2 * part
    assert kept.found(prompt(70)) == (right(prompt(70)), 5)
    assert kept.found(prompt(40, 25))[1] < 25


@RANKS
def test_forgetting_and_a_disk_that_fails_in_one_rank(kept: Kept, right: Callable[..., Any]) -> None:
    kept.engine.reset_prefix_cache()
    given = prompt(34)
    assert kept.found(given) == (right(given), 0)
    assert len(kept.written(set())) == 5
    kept.engine.reset_prefix_cache()
    assert kept.found(given) == (right(given), 0)
    assert len(kept.written(set())) == 5
    lost = kept.parts()[1]
    lost.rename(lost.with_name("gone"))
    lost.write_bytes(b"")  # no file can be made there any more
    kept.forget()
    for each in (given, prompt(35)):
        assert kept.found(each) == (right(each), 0)
    kept.forget()
    assert kept.found(given) == (right(given), 0)
    assert kept.found(prompt(35)) == (right(prompt(35)), 0)


# ---- every order -----------------------------------------------------------------------------------------------------


def part(rank: int, digest: bytes) -> bytes:
    return bytes([rank]) + digest


class Cache:
    """A rank's cache; a part of a block is its rank and the block's hash."""

    block_bytes, state_bytes = 33, 0

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}

    def copy_out(self, place: int, *, state: bool = False) -> Callable[[], Bytes]:
        assert not state
        data = self.blocks[place]
        return lambda: data

    def copy_in(self, place: int, data: Bytes, *, state: bool = False) -> None:
        assert not state
        self.blocks[place] = bytes(data)


class Shaky(HostBlocks):
    """Forgets some of what it has, is late, and fails."""

    def __init__(self, seed: int) -> None:
        super().__init__(33 * 40, 33)
        self.random, self.late = random.Random(seed), threading.Event()

    def read(self, digest: bytes) -> Bytes | None:
        chance = self.random.random()
        if chance < 0.05:
            self.forget(digest)
            raise BlockError("damaged")
        if chance < 0.1:
            self.forget(digest)
        time.sleep(0.003 if chance > 0.9 else 0)
        return super().read(digest)


class Lines:
    """The lines to other ranks, each of which does what it is told in two threads, when it comes to it."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self._closed, self.errors = count, set[int](), list[BaseException]()
        self.caches, self.parts = [Cache() for _ in range(count)], list[BlockParts]()
        self.line = [queue.SimpleQueue[Callable[[], Any] | None]() for _ in range(count)]
        self.side = [queue.SimpleQueue[Callable[[], Any] | None]() for _ in range(count)]
        self._seed = seed
        self.threads = list[threading.Thread]()

    def listen(self, heard: Callable[[int, int, bool, bool], None]) -> None:
        for rank in range(self.count):
            told = lambda number, found, failed, rank=rank + 1: heard(rank, number, found, failed)  # noqa: E731
            self.parts.append(BlockParts(Shaky(self._seed + rank), self.caches[rank], told))
        for each in (*self.line, *self.side):
            self.threads.append(threading.Thread(target=self._run, args=(each,)))
            self.threads[-1].start()

    def _run(self, told: queue.SimpleQueue[Callable[[], Any] | None]) -> None:
        late = random.Random(self._seed)
        while (work := told.get()) is not None:
            if late.random() < 0.1:
                time.sleep(0.002)
            try:
                work()
            except BaseException as error:
                self.errors.append(error)

    def tell(self, lines: Sequence[queue.SimpleQueue[Any]], work: Callable[[int], Any]) -> None:
        for rank, line in enumerate(lines):
            line.put(lambda rank=rank: work(rank))

    def offer(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        given = list(blocks)
        self.tell(self.line, lambda rank: [self.parts[rank].offer(*each) for each in given])

    def read(self, number: int, digests: Sequence[bytes]) -> None:
        self.tell(self.side, lambda rank: self.parts[rank].read(number, digests))

    def bring(self, number: int, blocks: Sequence[int]) -> None:
        self.tell(self.line, lambda rank: [self.parts[rank].bring(number, each) for each in blocks])

    def end(self, number: int, brought: int) -> None:
        self.tell(self.side, lambda rank: self.parts[rank].end(number, brought))

    def clear(self) -> None:
        self.tell(self.line, lambda rank: self.parts[rank].clear())

    def close(self) -> None:
        def work(rank: int) -> None:
            self.parts[rank].close()
            self._closed.add(rank)

        self.tell(self.line, work)

    def closed(self) -> bool:
        return len(self._closed) == self.count


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("seed", range(4))
def test_whatever_ranks_lack_and_however_late_they_are(seed: int) -> None:
    """Sequences that begin, wait, give up and take each other's blocks: what is found is right in every rank."""
    chance, lines, own = random.Random(seed), Lines(1 + seed % 2, seed), Cache()
    blocks = BlockManager(10, 1)
    kept = OffloadedBlocks(Shaky(seed + 100), own, blocks, lines)
    chains = [[bytes([chain, n]) * 16 for n in range(6)] for chain in range(8)]
    waiting: dict[object, list[bytes]] = {}
    found = 0

    def check(taken: Sequence[int], hashes: Sequence[bytes]) -> None:
        for rank, cache in enumerate([own, *lines.caches]):
            work = lambda cache=cache, rank=rank: [  # noqa: E731
                _require(cache.blocks[block], part(rank, digest)) for block, digest in zip(taken, hashes, strict=False)
            ]
            work() if not rank else lines.line[rank - 1].put(work)

    rounds = 0
    while rounds < 300 or kept.stats()["kept_blocks_read"] <= 20:
        rounds += 1
        kept.take()
        if len(waiting) < 3 and chance.random() < 0.5:
            waiting[object()] = chance.choice(chains)
        for sequence, hashes in list(waiting.items()):
            if chance.random() < 0.03:  # given up
                kept.left(sequence)
                del waiting[sequence]
                continue
            if not kept.is_ready(sequence, hashes, len(hashes)):
                continue
            shared = blocks.lookup(hashes)
            if len(hashes) - len(shared) > blocks.num_free_after_sharing(shared):
                continue
            del waiting[sequence]
            kept.left(sequence)
            check(shared, hashes)
            found += len(shared)
            blocks.share(shared)
            fresh = blocks.allocate(len(hashes) - len(shared)) or []
            for place, digest in zip(fresh, hashes[len(shared) :], strict=True):  # a step
                own.blocks[place] = part(0, digest)
                for rank, cache in enumerate(lines.caches):
                    lines.line[rank].put(
                        lambda cache=cache, place=place, digest=digest, rank=rank: cache.blocks.update(
                            {place: part(rank + 1, digest)}
                        )
                    )
                blocks.publish(place, digest)
                kept.offer(place, digest)
            blocks.release([*shared, *fresh])
            break  # what is offered is told before the next step
        if chance.random() < 0.01:
            kept.reset()
            blocks.reset_prefix_cache()
        kept.wait(0.002)
    for sequence in waiting:
        kept.left(sequence)
    kept.close()
    for line in (*lines.line, *lines.side):
        line.put(None)
    for thread in lines.threads:
        thread.join()
    assert lines.errors == []
    assert found > 50
    assert kept.stats()["kept_blocks_read"] > 20
    assert kept.stats()["kept_block_failures"]
    for each in (kept._own, *lines.parts):
        assert not each._readings
        assert not each._num_held


def test_blocks_are_read_beside_a_running_sequence_that_holds_the_blocks_before_them() -> None:
    own, blocks, hashes = Cache(), BlockManager(10, 1), [bytes([n]) * 32 for n in range(8)]
    kept = OffloadedBlocks(HostBlocks(33 * 40, 33), own, blocks)
    running = blocks.allocate(5) or []
    for place, digest in zip(running, hashes, strict=False):
        blocks.publish(place, digest)
    for place, digest in enumerate(hashes):
        own.blocks[place] = part(0, digest)
        kept.offer(place, digest)
    wait_for(lambda: kept.stats().get("kept_blocks_written") == len(hashes))
    sequence = object()
    assert not kept.is_ready(sequence, hashes, 9), "4 of the 9 blocks are missing, and 5 are free"
    while not kept.is_ready(sequence, hashes, 9):
        kept.take()
    assert len(blocks.lookup(hashes)) == 8
    kept.left(sequence)
    kept.close()


def _require(is_there: bytes, wanted: bytes) -> None:
    assert is_there == wanted


@pytest.mark.every_case
def test_parts_of_other_divisions_have_other_names(model: Path) -> None:
    from candle_vllm.core.assembly.model import load_model
    from candle_vllm.core.devices import CPU
    from candle_vllm.core.engine.cache.block_tiers import _fingerprint

    loaded = load_model(EngineConfig(model=str(model), op_by_op=True), CPU, lambda *_: None)
    forms = [{}, *FORMS.values(), {"tensor_parallel_size": 4}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
    names = [
        _fingerprint(config, loaded, rank)
        for form in forms
        for config in (EngineConfig(model=str(model), **form),)
        for rank in range(config.ranks)
    ]
    assert len(set(names)) == len(names) == 1 + 2 + 2 + 4 + 4
