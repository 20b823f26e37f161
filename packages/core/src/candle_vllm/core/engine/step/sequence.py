# SPDX-License-Identifier: MIT
"""Step 4: the scheduler's view of a running or waiting sequence, and its run in a step. Imports no torch."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from struct import pack
from types import MappingProxyType
from typing import Any

import msgspec

from candle_vllm.core.engine.adapters.adapter_store import Adapter, Entries
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest, serving_rank
from candle_vllm.core.vision.inputs import ImageInput

NO_LIMIT = 1 << 62

Tokens = tuple[int, ...]


class PlacedImage(msgspec.Struct, eq=False):
    """An image in a prompt.

    Attributes:
        positions: prompt positions of its embeddings, in ascending order.
        spans: begin and end of each tile, or of the prefix, whose tokens attend to each other; empty if all are causal.
        rows: its embeddings, float32 [count, V * E] (`EmbeddedRows`); None unless they are encoded and still needed.
        turned: rotary positions int64 [n, 4] of n tokens of the image (`RotaryPositions`); empty without M-RoPE.
        begin: prompt position of the first of these tokens.
        shift: rotary position of a token after these tokens, minus the token's position in the prompt; at most 0.
        blank: the token id that replaces its image tokens in the text model's input; None to leave these unchanged.
    """

    given: ImageInput
    positions: Seq[int]
    spans: Seq[tuple[int, int]] = ()
    rows: Any = None
    turned: Any = ()
    begin: int = 0
    shift: int = 0
    blank: int | None = None

    def marks(self, block_size: int) -> Iterator[tuple[int, bytes]]:
        """Yield each block number with embeddings of the image, and the key and offset that the hash must include."""
        last = -1
        for number, position in enumerate(self.positions):
            if position // block_size != last:
                last = position // block_size
                yield last, b"image" + self.given.key + pack("<q", number)


class RunState(msgspec.Struct, frozen=True, gc=False):
    """State slots that a run reads and writes; see `kernels/states.py`.

    Attributes:
        slot: the slot that the run writes, its sequence's own.
        source: the slot that the run reads; -1 at the beginning of a sequence.
        replays: number of accepted draft tokens whose stored inputs the run applies first.
        marks: rows of the run after which a checkpoint is written, each with the checkpoint's slot.
    """

    slot: int
    source: int
    replays: int = 0
    marks: tuple[tuple[int, int], ...] = ()


class SequenceState(msgspec.Struct, eq=False):
    """State slots and checkpoints of a running sequence. A checkpoint is identified by the number of blocks before it.

    Attributes:
        plain: the `RunState` that reads and writes the sequence's own slot and writes no checkpoint.
        going: the `RunState` of its next run, without checkpoints.
        reading: the slot of a checkpoint that its last run read; -1 if it read its own slot.
        wanted: requested checkpoints that are not scheduled yet, in ascending order.
        announced: checkpoints that waiting sequences may wait for, each with the hash of the last block before it.
        pending: checkpoints that launched runs write, with their slots.
        generated: the hash of the last checkpoint after its prompt.
    """

    plain: RunState
    going: RunState
    reading: int = -1
    wanted: list[int] = msgspec.field(default_factory=list[int])
    announced: dict[int, bytes] = msgspec.field(default_factory=dict[int, bytes])
    pending: dict[int, int] = msgspec.field(default_factory=dict[int, int])
    generated: bytes = b""


@dataclass(eq=False, repr=False, slots=True)  # slots keep the attributes close to each other in memory
class Sequence:
    """One of the `n` sequences of a request.

    Attributes:
        index: the sequence's index among the request's `n` sequences.
        rank: `serving_rank` of its request.
        order: number of arrival, unique; breaks ties of rank.
        tokens: prompt and output tokens that are known.
        num_prompt_tokens: number of tokens of the prompt, which is the beginning of `tokens`.
        is_pooled: whether its hidden states are pooled and no token follows the prompt.
        drafts: draft tokens for the next step that has rows for them.
        num_ahead: tokens after `tokens` that launched steps will sample.
        num_uncomputed_tokens: tokens that steps must still run, including tokens that launched steps will sample; 1
            while decoding, also between its steps. The keys and values of all tokens before them are in the cache, or
            will be when the launched steps have run.
        num_full_blocks: number of full blocks: shared ones, and blocks that committed steps have filled.
        max_length: total length at which the sequence ends in any case.
        num_admissions: number of its admissions; distinguishes its current blocks from blocks before a preemption.
        num_cached_tokens: prompt tokens that were found in the prefix cache at first admission.
        block_table: cache blocks, in order of position.
        adapted_from: the position from which each of `adapters` is active.
        entries: its request's entries in the adapter store; `adapters` is set when the store has leased them.
        held_since: number of sequences that had been admitted when it was first held back for its adapters.
        images: the images of its prompt, in order.
        state: state slots of a running sequence; None if no layer keeps a state.
        windowed: for each pool of `WindowedBlocks`, begin and end in the block table of the blocks with pages.
        answer_window: see `ModelConfig.answer_window`; generated tokens then use this many slots in turn.
    """

    request: GenerationRequest
    index: int
    order: int
    rank: int = field(init=False)
    tokens: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    is_pooled: bool = field(init=False)
    drafts: Tokens = ()
    num_ahead: int = 0
    num_uncomputed_tokens: int = field(init=False)
    num_full_blocks: int = 0
    max_length: int = NO_LIMIT
    num_admissions: int = 0
    num_cached_tokens: int | None = None
    block_table: array[int] = field(default_factory=lambda: array("i"))
    entries: Entries = ()
    held_since: int | None = None
    images: tuple[PlacedImage, ...] = ()
    state: SequenceState | None = None
    windowed: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    answer_window: int | None = None
    adapted_from: tuple[int, ...] = ()
    _adapters: tuple[tuple[Adapter, float], ...] = field(default=(), init=False)
    _hashes: list[bytes] = field(default_factory=list[bytes], init=False)

    def __post_init__(self) -> None:
        self.rank = serving_rank(self.request)
        self.tokens = list(self.request.prompt_token_ids)
        self.num_prompt_tokens = self.num_uncomputed_tokens = len(self.tokens)
        self.is_pooled = isinstance(self.request, PoolingRequest)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens, including tokens that launched steps will sample."""
        return len(self.tokens) + self.num_ahead

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are in the cache, or will be when the launched steps have run."""
        return len(self.tokens) + self.num_ahead - self.num_uncomputed_tokens

    @property
    def adapters(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters of its tokens and their scales; set once, before its first step."""
        return self._adapters

    @adapters.setter
    def adapters(self, adapters: tuple[tuple[Adapter, float], ...]) -> None:
        prompt = self.tokens[: self.num_prompt_tokens]
        self._adapters, self._hashes = adapters, []
        self.adapted_from = tuple(_activation(prompt, adapter.alora) for adapter, _ in adapters)

    def place(self, position: int) -> int:
        """Return the position in the block table of a token's keys: its own, or one that `answer_window` reuses."""
        if self.answer_window is None or position < self.num_prompt_tokens:
            return position
        return self.num_prompt_tokens + (position - self.num_prompt_tokens) % self.answer_window

    def num_places(self, tokens: int) -> int:
        """Return how many positions in the block table the first `tokens` tokens use."""
        return tokens if self.answer_window is None else min(tokens, self.num_prompt_tokens + self.answer_window)

    def append(self, token_id: int) -> None:
        """Append a sampled token."""
        self.tokens.append(token_id)
        if self.num_ahead:
            self.num_ahead -= 1

    def chunk(self, budget: int) -> int:
        """Return how many uncomputed tokens the next run may have, at most `budget`, without splitting a span.

        With an `answer_window`, a generated token overwrites keys that the one before it reads: it runs alone.
        """
        start = self.num_computed_tokens
        if self.answer_window is not None:
            budget = min(budget, max(self.num_prompt_tokens - start, 1))
        end = start + min(self.num_uncomputed_tokens, budget)
        for image in self.images if start < self.num_prompt_tokens else ():
            end = next((first for first, behind in image.spans if first < end < behind), end)
        return max(0, end - start)

    def hashes(self, block_size: int) -> list[bytes]:
        """Return the hashes of all full blocks of the known tokens; they are cached while the sequence grows.

        With an `answer_window` only blocks of the prompt have hashes: others are overwritten, and are not a prompt's.
        """
        known = self.tokens if self.answer_window is None else self.tokens[: self.num_prompt_tokens]
        if len(known) < (len(self._hashes) + 1) * block_size:
            return self._hashes
        marks = defaultdict[int, bytes](bytes)
        for (adapter, scale), start in zip(self._adapters, self.adapted_from):
            if start < NO_LIMIT:  # a different order of adapters changes the hash, but not the answer
                marks[start // block_size] += adapter.digest + pack("<dq", scale, start)
        for image in self.images if len(self._hashes) * block_size < self.num_prompt_tokens else ():
            for place, mark in image.marks(block_size):  # image tokens are the same for every image
                marks[place] += mark
            if (end := image.given.prefix) and not self._hashes:  # all keys and values depend on the whole prefix
                marks[0] += b"prefix" + array("q", [end, *self.tokens[:end]]).tobytes() + image.given.key
        self._hashes = block_hashes(known, block_size, self.request.params.cache_salt, self._hashes, marks)
        return self._hashes


def _activation(prompt: Seq[int], invocation: Tokens | None) -> int:
    """Return the position from which an adapter is active: the prompt's last `invocation`; `NO_LIMIT` if absent."""
    if invocation is None:
        return 0
    size, first = len(invocation), invocation[0]
    starts = range(len(prompt) - size, -1, -1)
    return next((n for n in starts if prompt[n] == first and tuple(prompt[n : n + size]) == invocation), NO_LIMIT)


class Run(msgspec.Struct, frozen=True, gc=False):
    """Rows of a step that belong to one sequence: its tokens from position `start` on.

    A decoding sequence has a run of one token and its draft tokens, a prompt chunk usually a run of many tokens.

    Attributes:
        start: position of the first row.
        count: number of rows, draft tokens included.
        wanted: number of last rows for which the next token is sampled: 1 if the step computes the sequence's last
            token, and 1 more for each draft token; 0 for an earlier chunk of a prompt, and for pooling.
        drafts: the draft tokens, which are its last rows.
        admission: the sequence's `num_admissions` when it was scheduled.
        decodes: whether the run is only the last generated token, and no prompt or recomputed tokens.
        state: state slots that it reads and writes; None if no layer keeps a state.
    """

    sequence: Sequence
    start: int
    count: int
    wanted: int
    admission: int
    decodes: bool
    drafts: Tokens = ()
    state: RunState | None = None

    @classmethod
    def next(cls, sequence: Sequence, count: int, drafts: Tokens = ()) -> Run:
        """Return a run of the next `count` tokens of a sequence, followed by draft tokens."""
        start = sequence.num_computed_tokens
        last = start + count == sequence.num_tokens and not sequence.is_pooled
        if drafts:
            return cls(sequence, start, count + len(drafts), 1 + len(drafts), sequence.num_admissions, False, drafts)
        decodes = last and count == 1 and start >= sequence.num_prompt_tokens
        return cls(sequence, start, count, int(last), sequence.num_admissions, decodes)


class Step(list[Run]):
    """The runs of a step, decoding sequences first.

    Attributes:
        goes_on: whether it decodes the next token of the same sequences as the previous step, in the same order.
        begins: if it goes on, indices of the runs whose token is the first of a block.
        fills: if it goes on, indices of the runs whose token is the last of a block.
    """

    __slots__ = ("begins", "fills", "goes_on")

    def __init__(
        self, runs: Iterable[Run], *, goes_on: bool = False, begins: Seq[int] = (), fills: Seq[int] = ()
    ) -> None:
        super().__init__(runs)
        self.goes_on, self.begins, self.fills = goes_on, begins, fills

    @property
    def filling(self) -> Seq[Run]:
        """The runs that may fill blocks: all of them if the step does not go on."""
        return [self[place] for place in self.fills] if self.goes_on else self


def block_hashes(
    tokens: Seq[int],
    block_size: int,
    salt: str | None,
    parents: Seq[bytes] = (),
    marks: Mapping[int, bytes] = MappingProxyType({}),
) -> list[bytes]:
    """Return chained SHA-256 hashes of the full blocks of `tokens`; `parents` are the hashes of the first blocks.

    `marks` are bytes by block that change the hash of the block and of all later ones, such as an adapter's digest.

    The hash is SHA-256, not a faster one, because a collision would show one user another user's context.
    """
    hashes = list(parents)
    parent = hashes[-1] if hashes else hashlib.sha256(b"" if salt is None else b"salt:" + salt.encode()).digest()
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        if mark := marks.get(start // block_size):
            parent = hashlib.sha256(parent + b"mark:" + mark).digest()
        parent = hashlib.sha256(parent + array("q", tokens[start : start + block_size]).tobytes()).digest()
        hashes.append(parent)
    return hashes
