# SPDX-License-Identifier: MIT
"""The block manager: who owns a block, what the free ones remember, and that equal hashes mean equal contents."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.step.sequence import block_hashes


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(4, 16)
    taken = blocks.allocate(3)
    assert taken is not None
    assert len(set(taken)) == 3
    assert blocks.num_free == 1
    assert blocks.allocate(2) is None
    assert blocks.num_free == 1
    blocks.release(taken)
    assert blocks.num_free == 4


def test_a_published_block_is_found_after_its_release_and_forgotten_when_reused() -> None:
    blocks = BlockManager(2, 4)
    hashes = block_hashes(range(8), 4, None)
    table = blocks.allocate(2)
    assert table is not None
    for block, digest in zip(table, hashes, strict=True):
        blocks.publish(block, digest)
    blocks.release(table)
    assert blocks.lookup(hashes) == table
    (reused,) = blocks.allocate(1) or []
    assert reused == table[1], "the tail of a released table is reused before its head"
    assert blocks.lookup(hashes) == table[:1]


def test_shared_blocks_outlive_their_first_owner() -> None:
    blocks = BlockManager(3, 4)
    hashes = block_hashes(range(4), 4, None)
    table = blocks.allocate(1) or []
    blocks.publish(table[0], hashes[0])
    blocks.share(table)
    blocks.release(table)
    assert blocks.num_free == 2
    assert blocks.num_free_after_sharing(table) == 2
    blocks.release(table)
    assert blocks.num_free == 3
    assert blocks.num_free_after_sharing(table) == 2


def test_least_recently_released_is_evicted_first() -> None:
    blocks = BlockManager(2, 1)
    first, second = block_hashes([1], 1, None), block_hashes([2], 1, None)
    (a,) = blocks.allocate(1) or []
    (b,) = blocks.allocate(1) or []
    blocks.publish(a, first[0])
    blocks.publish(b, second[0])
    blocks.release([b])
    blocks.release([a])
    assert blocks.allocate(1) == [b]
    assert blocks.lookup(first) == [a]


def test_disabled_cache_finds_nothing() -> None:
    blocks = BlockManager(2, 1, enable_prefix_caching=False)
    (a,) = blocks.allocate(1) or []
    digest = block_hashes([1], 1, None)
    blocks.publish(a, digest[0])
    assert blocks.lookup(digest) == []


def test_releasing_twice_is_caught() -> None:
    blocks = BlockManager(1, 1)
    table = blocks.allocate(1) or []
    blocks.release(table)
    with pytest.raises(AssertionError):
        blocks.release(table)


tokens = st.lists(st.integers(0, 3), max_size=24)


@given(tokens, tokens, st.integers(1, 5), st.sampled_from([None, "a", "b"]), st.sampled_from([None, "a", "b"]))
@settings(deadline=None)
def test_hashes_are_equal_exactly_for_equal_beginnings(
    one: list[int], two: list[int], size: int, salt_one: str | None, salt_two: str | None
) -> None:
    left, right = block_hashes(one, size, salt_one), block_hashes(two, size, salt_two)
    for position in range(min(len(left), len(right))):
        end = (position + 1) * size
        same = salt_one == salt_two and one[:end] == two[:end]
        assert (left[position] == right[position]) == same


@given(tokens, st.integers(1, 5), st.integers(0, 24))
@settings(deadline=None)
def test_hashes_grow_by_extension(some: list[int], size: int, cut: int) -> None:
    whole = block_hashes(some, size, "s")
    part = block_hashes(some[:cut], size, "s")
    assert block_hashes(some, size, "s", part) == whole


@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_no_block_is_leaked_or_owned_twice(seed: int, count: int) -> None:
    """Random tables come and go; owned and free blocks always add up, and fresh blocks never overlap live ones."""
    rng, blocks = random.Random(seed), BlockManager(count, 2)
    tables: list[tuple[list[int], list[bytes]]] = []
    for _ in range(200):
        if tables and rng.random() < 0.4:
            table, _ = tables.pop(rng.randrange(len(tables)))
            blocks.release(table)
            continue
        hashes = block_hashes([rng.randrange(2) for _ in range(2 * rng.randrange(1, 4))], 2, None)
        shared = blocks.lookup(hashes)
        fresh_count = len(hashes) - len(shared)
        if blocks.num_free_after_sharing(shared) < fresh_count:
            continue
        blocks.share(shared)
        fresh = blocks.allocate(fresh_count)
        assert fresh is not None
        live = {block for table, _ in tables for block in table} | set(shared)
        assert not live & set(fresh)
        table = shared + fresh
        for block, digest in zip(table, hashes, strict=True):
            blocks.publish(block, digest)
        tables.append((table, hashes))
        assert blocks.num_free == count - len({block for table, _ in tables for block in table})
    for table, _ in tables:
        blocks.release(table)
    assert blocks.num_free == count


def test_a_reset_forgets_free_blocks_and_those_in_use() -> None:
    blocks = BlockManager(3, 4)
    hashes = block_hashes(range(8), 4, None)
    table = blocks.allocate(2) or []
    for block, digest in zip(table, hashes, strict=True):
        blocks.publish(block, digest)
    blocks.release(table[1:])
    blocks.reset_prefix_cache()
    assert blocks.lookup(hashes) == []
    assert blocks.num_free == 2, "who holds a block keeps it"
    blocks.publish(table[0], hashes[0])
    assert blocks.lookup(hashes) == table[:1]
    blocks.release(table[:1])
    assert blocks.num_free == 3
