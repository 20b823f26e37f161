# SPDX-License-Identifier: MIT
"""Which pages of the layers with a sliding window hold which blocks, beside step 4. No torch here.

Where some layers see all tokens and others a window, the latter have a pool of pages of their own, which is smaller
than the number of blocks. A block has a page of these layers while a running sequence may read or write it there. When
it lies behind the window, or nobody runs any more, its page goes to the next block that needs one, at once if the block
cannot be found, else the least recently used first. Blocks, block tables and hashes stay those of the other layers, so
that a prefix is found by them, as far as the blocks that the window of its next token sees have pages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.loading.cache_specs import WindowRoom


class WindowedBlocks(BlockManager):
    """A block manager that hands out the pages of layers with a window, too, when a run is scheduled.

    Args:
        room: how many pages there are; at least `WindowRoom.blocks`, and page 0.
        page_of: [num_blocks] zeros: filled with the page of each block, which a step looks up; 0 is none.
        block_size, enable_prefix_caching: see `BlockManager`.
    """

    def __init__(
        self, room: WindowRoom, page_of: memoryview, block_size: int, *, enable_prefix_caching: bool = True
    ) -> None:
        super().__init__(len(page_of), block_size, enable_prefix_caching=enable_prefix_caching)
        self._window, self._most, self._page_of = room.window, room.blocks(block_size), page_of
        self._users = [0] * len(page_of)  # running sequences that may read or write a block
        self._free_pages = list(range(room.pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks with a page and no user, least recently used first

    @property
    def num_free_pages(self) -> int:
        """Pages that no running sequence needs."""
        return len(self._free_pages) + len(self._idle)

    def depth(self, blocks: Seq[int]) -> int:
        """The most of these blocks of a prefix behind which a token finds all pages that its window sees."""
        deepest = together = 0
        for count, block in enumerate(blocks, 1):
            together = together + 1 if self._page_of[block] else 0
            if together >= count - self._first(count * self.block_size):
                deepest = count
        return deepest

    def has_room(self, shared: Seq[int], needed: int, reserve: int) -> bool:
        """Whether a sequence with `needed` blocks, of which it shares some, may begin, and `reserve` pages are left."""
        first = self._first(len(shared) * self.block_size)
        used = sum(self._users[block] > 0 for block in shared[first:])
        return min(needed - first, self._most) - used + reserve <= self.num_free_pages

    def begin(self, sequence: Sequence, cached: int) -> None:
        """A sequence begins to run behind so many blocks that it shares."""
        first = self._first(cached * self.block_size)
        for block in sequence.block_table[first:cached]:
            self._idle.pop(block, None)
            self._users[block] += 1
        sequence.windowed = first, cached

    def advance(self, sequence: Sequence, start: int, end: int, spare: int = 0) -> int:
        """Lets go of what lies behind the window of a token, and takes pages for the positions up to `end`.

        Args:
            sequence: whose run begins at `start`.
            start, end: positions; that at `start` is of no draft, so that rejected drafts need nothing back.
            spare: pages that are to stay free.

        Returns:
            The position up to which it has pages, at most `end`.
        """
        (first, last), table, size = sequence.windowed, sequence.block_table, self.block_size
        behind, needed = self._first(start), -(-end // size)
        self._leave(table[first:behind])
        while last < needed and self.num_free_pages > spare:
            self._give(table[last])
            self._users[table[last]] = 1
            last += 1
        sequence.windowed = max(first, behind), last
        return min(end, last * size)

    def reaches(self, sequence: Sequence, position: int) -> bool:
        """Whether the next token of a decoding sequence has a page, one more if need be."""
        return self.advance(sequence, position, position + 1) > position

    def cut(self, sequence: Sequence, blocks: int) -> None:
        """A sequence keeps so many blocks of its table; 0 where it runs no longer."""
        first, last = sequence.windowed
        self._leave(sequence.block_table[max(first, blocks) : last])
        sequence.windowed = min(first, blocks), min(last, blocks)

    def take_in(self, digest: bytes) -> int | None:
        """See `BlockManager`; it has a page where one is free."""
        block = super().take_in(digest)
        if block is not None and self.num_free_pages:
            self._give(block)
            self._idle[block] = None
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """See `BlockManager`; but a twin takes the place of a block that has lost its page."""
        first = self._published.get(digest)
        if first is not None and self._page_of[block] and not self._page_of[first]:
            self._hash_of[first] = None
            del self._published[digest]
        super().publish(block, digest)

    def _forget(self, block: int) -> None:
        super()._forget(block)
        if block in self._idle:
            del self._idle[block]
            self._take_back(block)

    def _first(self, start: int) -> int:
        """The place in a block table of the first block that a token at a position sees."""
        return max(0, start - self._window + 1) // self.block_size

    def _give(self, block: int) -> None:
        assert not self._page_of[block], f"block {block} has a page"
        if not self._free_pages:
            self._take_back(self._idle.popitem(last=False)[0])
        self._page_of[block] = self._free_pages.pop()

    def _leave(self, blocks: Seq[int]) -> None:
        for block in blocks:
            self._users[block] -= 1
            assert self._users[block] >= 0, f"the page of block {block} is released twice"
            if self._hash_of[block] is not None and not self._users[block]:
                self._idle[block] = None
            elif not self._users[block]:
                self._take_back(block)

    def _take_back(self, block: int) -> None:
        self._free_pages.append(self._page_of[block])
        self._page_of[block] = 0
