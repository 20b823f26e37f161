# SPDX-License-Identifier: MIT
"""Which pages of the layers with a sliding window hold which blocks, beside step 4. No torch here.

Where some layers see all tokens and others a window, the latter have a pool of pages of their own, which is smaller
than the number of blocks. A block has a page of these layers while a running sequence may read or write it there. When
it lies behind the window, or nobody runs any more, its page goes to the next block that needs one, at once if the block
cannot be found, else the least recently used first. Blocks, block tables and hashes stay those of the other layers, so
that a prefix is found by them, as far as the blocks that the window of its next token sees have pages.

Pages are handed out when a run is scheduled. A prompt takes as many tokens of a step as there are pages for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from candle_vllm.core.engine.block_manager import BlockManager
from candle_vllm.core.engine.sequence import Sequence
from candle_vllm.core.loading.cache_specs import WindowRoom


class WindowPages:
    """Hands out the pages of layers with a window.

    Args:
        room: how many there are; at least `WindowRoom.blocks`, and page 0.
        blocks: the cache's block manager.
        page_of: [num_blocks] zeros: filled with the page of each block, which a step looks up; 0 is none.
    """

    def __init__(self, room: WindowRoom, blocks: BlockManager, page_of: memoryview) -> None:
        self._window, self._size, self._most = room.window, blocks.block_size, room.blocks(blocks.block_size)
        self._blocks, self._page_of = blocks, page_of
        self._users = [0] * blocks.num_blocks  # running sequences that may read or write a block
        self._free = list(range(room.pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # blocks with a page and no user, least recently used first
        blocks.windows = self

    @property
    def num_free(self) -> int:
        """Pages that no running sequence needs."""
        return len(self._free) + len(self._idle)

    def has_page(self, block: int) -> bool:
        """Whether a block has a page."""
        return bool(self._page_of[block])

    def depth(self, blocks: Seq[int]) -> int:
        """The most of these blocks of a prefix behind which a token finds all pages that its window sees."""
        deepest = together = 0
        for count, block in enumerate(blocks, 1):
            together = together + 1 if self._page_of[block] else 0
            if together >= count - self._first(count * self._size):
                deepest = count
        return deepest

    def has_room(self, shared: Seq[int], needed: int, reserve: int) -> bool:
        """Whether a sequence with `needed` blocks, of which it shares some, may begin, and `reserve` pages are left."""
        first = self._first(len(shared) * self._size)
        used = sum(self._users[block] > 0 for block in shared[first:])
        return min(needed - first, self._most) - used + reserve <= self.num_free

    def begin(self, sequence: Sequence, cached: int) -> None:
        """A sequence begins to run behind so many blocks that it shares."""
        first = self._first(cached * self._size)
        for block in sequence.block_table[first:cached]:
            if not self._users[block]:
                del self._idle[block]
            self._users[block] += 1
        sequence.windowed = first, cached

    def advance(self, sequence: Sequence, start: int, end: int, spare: int = 0) -> int:
        """Lets go of what lies behind the window of position `start`, and takes pages for the positions up to `end`.

        Rejected drafts take nothing back: `start` is the position of a token that is certain.

        Args:
            sequence: whose run begins at `start`.
            start, end: positions.
            spare: pages that are to stay free.

        Returns:
            The position up to which it has pages, at most `end`.
        """
        (first, last), table, size = sequence.windowed, sequence.block_table, self._size
        behind, needed = self._first(start), -(-end // size)
        for block in table[first:behind]:
            self._leave(block)
        while last < needed and self.num_free > spare:
            self._give(table[last])
            self._users[table[last]] = 1
            last += 1
        sequence.windowed = max(first, behind), last
        return min(end, last * size)

    def cut(self, sequence: Sequence, blocks: int) -> None:
        """A sequence keeps so many blocks of its table."""
        first, last = sequence.windowed
        for block in sequence.block_table[blocks:last]:
            self._leave(block)
        sequence.windowed = first, min(last, blocks)

    def end(self, sequence: Sequence) -> None:
        """A sequence runs no longer."""
        first, last = sequence.windowed
        for block in sequence.block_table[first:last]:
            self._leave(block)
        sequence.windowed = (0, 0)

    def take_in(self, block: int) -> None:
        """A page, where one is free, for a published block that comes from a store."""
        if self.num_free:
            self._give(block)
            self._idle[block] = None

    def forget(self, block: int) -> None:
        """A block can be found no more."""
        if block in self._idle:
            del self._idle[block]
            self._take_back(block)

    def _first(self, start: int) -> int:
        """The place in a block table of the first block that a token at a position sees."""
        return max(0, start - self._window + 1) // self._size

    def _give(self, block: int) -> None:
        assert not self._page_of[block], f"block {block} has a page"
        if not self._free:
            self._take_back(self._idle.popitem(last=False)[0])
        self._page_of[block] = self._free.pop()

    def _leave(self, block: int) -> None:
        self._users[block] -= 1
        assert self._users[block] >= 0, f"the page of block {block} is released twice"
        if not self._users[block]:
            if self._blocks.is_published(block):
                self._idle[block] = None
            else:
                self._take_back(block)

    def _take_back(self, block: int) -> None:
        self._free.append(self._page_of[block])
        self._page_of[block] = 0
