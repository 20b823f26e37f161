# SPDX-License-Identifier: MIT
"""Allocate KV-cache blocks to sequences (step 4 of a request's life). No torch is imported: a block is its number.

The cache is `num_blocks` blocks of `block_size` token positions. A sequence holds a block table, the list of its
blocks in order. The hash of a full block is chained over everything up to its end (salt, tokens, marks of adapters and
images), so equal hashes mean equal contents and a later prompt can share the block. Shared blocks have a reference
count and are never written by sequences, which publish only full blocks and write only after their last full block.

When its reference count is 0, a block enters the free queue: a published block at the end, where its contents and hash
stay until it is allocated again, any other block at the front.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from candle_vllm.core.engine.step import sequence as step


class BlockManager:
    """Allocates the blocks of the KV cache, and finds published blocks by their hashes, free ones included.

    Args:
        num_blocks: blocks in the cache.
        block_size: token positions in a block.
        enable_prefix_caching: publish and find blocks.

    Attributes:
        forgot: called with the hash of a block that is unpublished, unless an equal block replaces it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.forgot: Callable[[bytes], object] | None = None
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._owners = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Number of blocks that no sequence holds; some of them may still be in the prefix cache."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the published blocks for `hashes`, up to the first hash without a block; allocate nothing."""
        found: list[int] = []
        if self.enable_prefix_caching:
            for digest in hashes:
                block = self._published.get(digest)
                if block is None:
                    break
                found.append(block)
        return found

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Make the free blocks that `lookup` finds the most recently used ones; the tail stays before the head."""
        for block in reversed(self.lookup(hashes)):
            if block in self._free:
                self._free.move_to_end(block)

    def num_free_after_sharing(self, blocks: Sequence[int]) -> int:
        """Return the number of free blocks once a sequence holds these published ones, too."""
        return len(self._free) - sum(self._owners[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add an owner to each of these published blocks."""
        for block in blocks:
            if self._owners[block] == 0:
                del self._free[block]
            self._owners[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Allocate the first `count` blocks of the free queue, and unpublish them; None if fewer are free."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._owners[block] = 1
            taken.append(block)
        return taken

    def begin(self, sequence: step.Sequence, shared: list[int], fresh: int) -> None:
        """Give an admitted sequence `shared` published blocks and `fresh` new ones, which must be free."""
        self.share(shared)
        taken = self.allocate(fresh)
        assert taken is not None
        sequence.block_table = array("i", shared + taken)

    def end(self, sequence: step.Sequence) -> None:
        """Release the blocks of a sequence that has ended or was preempted."""
        self.release(sequence.block_table)
        sequence.block_table = array("i")

    def grow(self, sequence: step.Sequence) -> bool:
        """Append a block to the block table of a sequence; return False if no block is free."""
        taken = self.allocate(1) or ()
        sequence.block_table.extend(taken)
        return bool(taken)

    def extend(self, sequence: step.Sequence, position: int) -> bool:
        """Append a block if the block table ends before `position`, the next one; return False if no block is free."""
        return position < self.block_size * len(sequence.block_table) or self.grow(sequence)

    def take_in(self, digest: bytes) -> int | None:
        """`publish` a free block and return it; the caller then writes its contents. None if no block is free."""
        taken = self.allocate(1)
        if taken is None:
            return None
        self.publish(taken[0], digest)
        self.release(taken)  # if published, it becomes the most recently used free block
        return taken[0]

    def forget(self, digest: bytes) -> None:
        """Unpublish the block of a hash."""
        self._forget(self._published[digest])

    def publish(self, block: int, digest: bytes) -> None:
        """Publish a block under its hash; do nothing if the hash already has a block, or if prefix caching is off."""
        if self.enable_prefix_caching and self._hash_of[block] is None and digest not in self._published:
            self._hash_of[block] = digest
            self._published[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Remove one owner of each block; a published tail is reused before the head, which is shared more often."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0, f"block {block} released twice"
            if self._owners[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def reset_prefix_cache(self) -> None:
        """Unpublish all blocks; running sequences keep their blocks."""
        for block in list(self._published.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self._hash_of[block]
        if digest is not None:
            del self._published[digest]
            self._hash_of[block] = None
            if self.forgot is not None:
                self.forgot(digest)
