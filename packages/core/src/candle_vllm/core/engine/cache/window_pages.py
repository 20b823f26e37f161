# SPDX-License-Identifier: MIT
"""Allocate pages of sliding-window layers to blocks, without torch (step 4 of a request's life).

The layers with the same window size share one pool of pages, which has fewer pages than the cache has blocks. A block
has a page of a pool while a running sequence may read or write it there. When the block has left the window, or no
running sequence uses it, its page may be given to another block: at once if the block is not published, else least
recently used first. Blocks, block tables and hashes are the same for all layers. The part of a cached prefix before a
token can be reused if all blocks in the window of that token have pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.loading.cache_specs import WindowRoom


class PagePool:
    """The pages of the layers with one window size.

    Args:
        room: window size and number of pages: those that one sequence needs at least, and page 0, which is never used.
        page_of: [num_blocks] page of each block, which steps read; 0 for a block without a page, so all 0 at first.
        hash_of: [num_blocks] the hash of each published block; None for other blocks.
        block_size: tokens of a block.
    """

    def __init__(self, room: WindowRoom, page_of: memoryview, hash_of: Seq[bytes | None], block_size: int) -> None:
        self._window, self._size, self.most = room.window, block_size, room.blocks(block_size)
        self.decoding = room.blocks(block_size, 1) + 1  # maximum pages of a decoding sequence
        self.for_decoding = room.pages - 1 - -(-room.rows // block_size)  # pages beside those of prompts and drafts
        self.page_of, self._hash_of = page_of, hash_of
        self.users = [0] * len(page_of)  # running sequences that may read or write a block
        self.free_pages = list(range(room.pages - 1, 0, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # blocks with a page and no user, least recently used first

    @property
    def num_free(self) -> int:
        """Pages that no running sequence needs."""
        return len(self.free_pages) + len(self.idle)

    def first(self, start: int) -> int:
        """Return the index in a block table of the first block that a token at this position attends to."""
        return max(0, start - self._window + 1) // self._size

    def has_room(self, shared: Seq[int], needed: int, reserve: int) -> bool:
        first = self.first(len(shared) * self._size)
        used = sum(self.users[block] > 0 for block in shared[first:])
        return min(needed - first, self.most) - used + reserve <= self.num_free

    def take(self, block: int) -> None:
        """Note that a running sequence may read or write a block; give the block a page if it lacks one."""
        if not self.page_of[block]:
            self.give(block)
        self.idle.pop(block, None)
        self.users[block] += 1

    def give(self, block: int) -> None:
        assert not self.page_of[block], f"block {block} has a page"
        if not self.free_pages:
            self._take_back(next(iter(self.idle)))
        self.page_of[block] = self.free_pages.pop()
        self.idle[block] = None

    def leave(self, blocks: Seq[int]) -> None:
        """Note that a running sequence no longer reads or writes these blocks."""
        for block in blocks:
            self.users[block] -= 1
            assert self.users[block] >= 0, f"the page of block {block} is released twice"
            if not self.users[block]:
                self.idle[block] = None
                self.forget(block)

    def forget(self, block: int) -> None:
        """Free the page of an unused block that is not published."""
        if block in self.idle and self._hash_of[block] is None:
            self._take_back(block)

    def _take_back(self, block: int) -> None:
        del self.idle[block]
        self.free_pages.append(self.page_of[block])
        self.page_of[block] = 0


class WindowedBlocks(BlockManager):
    """Block manager that also allocates pages for layers with a window when a run is scheduled.

    Args:
        rooms: the size of each page pool.
        page_of: the page table of each pool, see `PagePool`.
        block_size, enable_prefix_caching: see `BlockManager`.
    """

    def __init__(
        self, rooms: Seq[WindowRoom], page_of: Seq[memoryview], block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        super().__init__(len(page_of[0]), block_size, enable_prefix_caching=enable_prefix_caching)
        both = zip(rooms, page_of, strict=True)
        self.pools = [PagePool(room, pages, self._hash_of, block_size) for room, pages in both]

    def has_pages(self, block: int) -> bool:
        """Whether a block has a page of each pool."""
        return all(pool.page_of[block] for pool in self.pools)

    def depth(self, blocks: Seq[int]) -> int:
        """Return how many of these prefix blocks can be shared: the token after them must find the pages it reads."""
        deepest, together = 0, [0] * len(self.pools)
        for count, block in enumerate(blocks, 1):
            together = [many + 1 if pool.page_of[block] else 0 for pool, many in zip(self.pools, together)]
            end = count * self.block_size
            if all(many >= count - pool.first(end) for pool, many in zip(self.pools, together)):
                deepest = count
        return deepest

    def renew(self, hashes: Seq[bytes], in_store: Callable[[bytes], bool]) -> None:
        """Unpublish blocks of a prefix that have lost their pages, if the KV tier has them and can read them back.

        Nothing is unpublished if a running sequence holds one of these blocks: the prefix would not become longer.
        """
        blocks = self.lookup(hashes)
        end = len(blocks)
        while end < len(hashes) and in_store(hashes[end]):
            end += 1
        first = min(pool.first(end * self.block_size) for pool in self.pools)
        gone = [place for place in range(first, len(blocks)) if not self._has_pages(place, end, blocks[place])]
        if all(not self._owners[blocks[place]] and in_store(hashes[place]) for place in gone):
            for place in gone:
                self._hide(hashes[place])

    def _has_pages(self, place: int, end: int, block: int) -> bool:
        """Whether a block has the pages that a token after `end` blocks reads."""
        return all(pool.page_of[block] or place < pool.first(end * self.block_size) for pool in self.pools)

    def has_room(self, shared: Seq[int], needed: int, reserve: int) -> bool:
        """Whether a sequence of `needed` with `shared` blocks can start and leave `reserve` free pages in each pool."""
        return all(pool.has_room(shared, needed, reserve) for pool in self.pools)

    def suffice(self, lengths: Seq[int]) -> bool:
        """Whether there are pages for all running sequences until they have these numbers of blocks."""
        return all(sum(min(each, pool.decoding) for each in lengths) <= pool.for_decoding for pool in self.pools)

    def begin(self, sequence: Sequence, shared: list[int], fresh: int) -> None:
        """See `BlockManager`; the sequence uses the pages of the shared blocks in its windows."""
        super().begin(sequence, shared, fresh)
        cached = len(shared)
        sequence.windowed = [(pool.first(cached * self.block_size), cached) for pool in self.pools]
        for pool, (first, last) in zip(self.pools, sequence.windowed):
            for block in sequence.block_table[first:last]:
                pool.take(block)

    def advance(self, sequence: Sequence, start: int, end: int, spare: int = 0) -> int:
        """Release the pages before the windows of position `start`, and allocate pages for the positions up to `end`.

        Args:
            sequence: blocks that a running step fills are not published yet and keep their page.
            start, end: positions of its run. `start` is no draft token, so rejected drafts never need a released page.
            spare: pages that must stay free.

        Returns:
            The position up to which the sequence has pages, at most `end`.
        """
        table, needed, reached = sequence.block_table, -(-end // self.block_size), end
        for number, (pool, (first, last)) in enumerate(zip(self.pools, sequence.windowed)):
            behind = max(first, min(pool.first(start), sequence.num_full_blocks))
            pool.leave(table[first:behind])
            while last < needed and pool.num_free > spare:
                pool.take(table[last])
                last += 1
            sequence.windowed[number] = behind, last
            reached = min(reached, last * self.block_size)
        return reached

    def extend(self, sequence: Sequence, position: int) -> bool:
        """See `BlockManager`; also return False if the token at `position` does not get its pages."""
        return super().extend(sequence, position) and self.advance(sequence, position, position + 1) > position

    def end(self, sequence: Sequence) -> None:
        """See `BlockManager`; also release its pages."""
        self.cut(sequence, 0)
        super().end(sequence)

    def cut(self, sequence: Sequence, blocks: int) -> None:
        """Release the pages after the first `blocks` blocks of a sequence's table."""
        for number, (pool, (first, last)) in enumerate(zip(self.pools, sequence.windowed)):
            pool.leave(sequence.block_table[max(first, blocks) : last])
            sequence.windowed[number] = min(first, blocks), min(last, blocks)

    def touch(self, hashes: Seq[bytes]) -> None:
        """See `BlockManager`; also make their pages the most recently used ones."""
        super().touch(hashes)
        for block in self.lookup(hashes):
            for pool in self.pools:
                if block in pool.idle:
                    pool.idle.move_to_end(block)

    def take_in(self, digest: bytes) -> int | None:
        """See `BlockManager`; the block gets a page of each pool that has a free one."""
        block = super().take_in(digest)
        if block is not None:
            for pool in self.pools:
                if pool.num_free:
                    pool.give(block)
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """See `BlockManager`; a block with all pages replaces an equal block that lacks one."""
        first = self._published.get(digest)
        if first is not None and self.has_pages(block) and not self.has_pages(first):
            self._hide(digest)
        super().publish(block, digest)

    def _hide(self, digest: bytes) -> None:
        """Unpublish the block of a hash; the checkpoint of a state with this hash (`states.py`) stays."""
        block = self._published.pop(digest)
        self._hash_of[block] = None
        for pool in self.pools:
            pool.forget(block)

    def _forget(self, block: int) -> None:
        super()._forget(block)
        for pool in self.pools:
            pool.forget(block)
