# SPDX-License-Identifier: MIT
"""Step 4: the scheduler's view of one running or waiting sequence, and its share of a step. No torch here."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from struct import pack
from typing import Any

import msgspec

from candle_vllm.core.engine.adapters.adapter_store import Adapter, Entries
from candle_vllm.core.engine.cache.block_manager import block_hashes
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest, serving_rank
from candle_vllm.core.vision.inputs import ImageInput

NO_LIMIT = 1 << 62

Tokens = tuple[int, ...]


class PlacedImage(msgspec.Struct, eq=False):
    """A picture in a prompt.

    Attributes:
        given: the picture.
        positions: in the prompt, of each of its embeddings, rising.
        spans: where in the prompt those of a tile begin and end that see each other, in order; nothing where none do.
        rows: its embeddings float32 [count, E], once they are there.
        grid: its rows and columns of embeddings, where these are turned by three positions; they stand side by side.
        first: the position by which its first embedding is turned then, in time, height and width.
        blank: the token that the text model is given where its embeddings stand; None leaves the mark.
    """

    given: ImageInput
    positions: Seq[int]
    spans: Seq[tuple[int, int]] = ()
    rows: Any = None
    grid: tuple[int, int] | None = None
    first: int = 0
    blank: int | None = None

    @property
    def shift(self) -> int:
        """By how much the position that turns a token behind it differs from that in the prompt, at most 0."""
        return 0 if self.grid is None else self.first + max(self.grid) - (self.positions[-1] + 1)

    def marks(self, block_size: int) -> Iterator[tuple[int, bytes]]:
        """Each block that it stands in, and what it shows there: its own key, and from which embedding on."""
        last = -1
        for number, position in enumerate(self.positions):
            if position // block_size != last:
                last = position // block_size
                yield last, b"image" + self.given.key + pack("<q", number)


class RunState(msgspec.Struct, frozen=True, gc=False):
    """What a run does with the state of its sequence; slots as in `kernels/states.py`.

    Attributes:
        slot: of the sequence.
        source: where its state is; -1 where it begins.
        replays: kept rows of drafts that were right.
        marks: rows of the run behind which a checkpoint is written, and into which slot.
    """

    slot: int
    source: int
    replays: int = 0
    marks: tuple[tuple[int, int], ...] = ()


class SequenceState(msgspec.Struct, eq=False):
    """The state of a sequence that runs. Checkpoints are told by how many blocks are before them.

    Attributes:
        plain: what a run does that goes on from the sequence's own slot and writes no checkpoint.
        going: what its next run does, but for checkpoints.
        reading: the slot of a checkpoint that its last run read; -1 for none.
        wanted: checkpoints that are to be written, rising.
        told: those of its prompt that others wait for, and the hashes of their blocks.
        pending: those that are being written, and into which slot.
        generated: the hash of the last one behind its prompt.
    """

    plain: RunState
    going: RunState
    reading: int = -1
    wanted: list[int] = msgspec.field(default_factory=list[int])
    told: dict[int, bytes] = msgspec.field(default_factory=dict[int, bytes])
    pending: dict[int, int] = msgspec.field(default_factory=dict[int, int])
    generated: bytes = b""


class Sequence:  # its attributes have slots: a step finds them in one place
    """One of the `n` sequences of a request.

    Attributes:
        request: what was asked for.
        index: which of the request's `n` sequences.
        order: number of arrival, unique; breaks ties of priority.
        tokens: prompt and output so far, as far as known.
        num_prompt_tokens: how many of `tokens` are the prompt.
        is_pooled: its hidden states are wanted, and no token behind the prompt.
        drafts: tokens that may come next, to be tried in the next step that has room for them.
        num_ahead: tokens behind `tokens` that launched steps will draw; more than 0 only where steps overlap.
        num_uncomputed_tokens: tokens that steps must still run, with those that launched steps will draw; 1 while
            decoding, and between its steps. The keys and values of all before them are in the cache, or will be when
            what was launched has run.
        num_full_blocks: blocks that are full for certain, because the step that filled them is over.
        max_length: total length at which the sequence ends in any case.
        num_admissions: how often it began to run; tells its present blocks from those before a preemption.
        num_cached_tokens: prompt tokens that were found in the prefix cache at first admission.
        block_table: cache blocks, in order of position.
        adapted_from: of each of `adapters`, the position from which on it acts.
        entries: what its request's adapters are; `adapters` are lent to it when it begins.
        held_since: how many sequences had begun when it was first held back for its adapters.
        images: the pictures of its prompt, in their order.
        state: where layers keep the states of one that runs; None where none keeps any.
        windowed: of each page pool, from where to where in its block table the blocks are that have pages for it, see
            `WindowedBlocks`.
    """

    __slots__ = (
        "_adapters",
        "_hashes",
        "adapted_from",
        "block_table",
        "drafts",
        "entries",
        "held_since",
        "images",
        "index",
        "is_pooled",
        "max_length",
        "num_admissions",
        "num_ahead",
        "num_cached_tokens",
        "num_full_blocks",
        "num_prompt_tokens",
        "num_uncomputed_tokens",
        "order",
        "request",
        "state",
        "tokens",
        "windowed",
    )

    def __init__(self, request: GenerationRequest, index: int, order: int) -> None:
        self.request = request
        self.index = index
        self.order = order
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt_tokens = len(self.tokens)
        self.is_pooled = isinstance(request, PoolingRequest)
        self.drafts: Tokens = ()
        self.num_ahead = 0
        self.num_uncomputed_tokens = len(self.tokens)
        self.num_full_blocks = 0
        self.max_length = NO_LIMIT
        self.num_admissions = 0
        self.num_cached_tokens: int | None = None
        self.block_table = array("i")
        self.entries: Entries = ()
        self.held_since: int | None = None
        self.images: tuple[PlacedImage, ...] = ()
        self.state: SequenceState | None = None
        self.windowed: list[tuple[int, int]] = []
        self.adapted_from: tuple[int, ...] = ()
        self._adapters: tuple[tuple[Adapter, float], ...] = ()
        self._hashes: list[bytes] = []

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sort key: lower runs first."""
        return serving_rank(self.request.priority, arrival=self.order)

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, with what has been launched."""
        return len(self.tokens) + self.num_ahead

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose keys and values are in the cache, or will be when what was launched has run."""
        return len(self.tokens) + self.num_ahead - self.num_uncomputed_tokens

    @property
    def adapters(self) -> tuple[tuple[Adapter, float], ...]:
        """The adapters that act on its tokens, and how much; set once, before its first step."""
        return self._adapters

    @adapters.setter
    def adapters(self, adapters: tuple[tuple[Adapter, float], ...]) -> None:
        prompt = self.tokens[: self.num_prompt_tokens]
        self._adapters, self._hashes = adapters, []
        self.adapted_from = tuple(_activation(prompt, adapter.alora) for adapter, _ in adapters)

    def append(self, token_id: int) -> None:
        """Takes the token that was drawn next."""
        self.tokens.append(token_id)
        if self.num_ahead:
            self.num_ahead -= 1

    def piece(self, budget: int) -> int:
        """How many tokens of what it has to run a step may take, at most `budget`: tiles whose rows see each other are
        not cut."""
        start = self.num_computed_tokens
        end = start + min(self.num_uncomputed_tokens, budget)
        for image in self.images if start < self.num_prompt_tokens else ():
            end = next((first for first, behind in image.spans if first < end < behind), end)
        return max(0, end - start)

    def hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of the known tokens, kept as the sequence grows."""
        marks: dict[int, bytes] = {}
        for (adapter, scale), start in zip(self._adapters, self.adapted_from):
            if start < NO_LIMIT:  # one by one: the order of a mix does not make another answer, but is told
                marks[start // block_size] = (
                    marks.get(start // block_size, b"") + adapter.digest + pack("<dq", scale, start)
                )
        for image in self.images if len(self._hashes) * block_size < self.num_prompt_tokens else ():
            for place, mark in image.marks(block_size):  # its tokens are alike whatever it shows
                marks[place] = marks.get(place, b"") + mark
        self._hashes = block_hashes(self.tokens, block_size, self.request.params.cache_salt, self._hashes, marks)
        return self._hashes


def _activation(prompt: Seq[int], invocation: Tokens | None) -> int:
    """From which position on an adapter acts: where the last `invocation` in the prompt begins; `NO_LIMIT` is never."""
    if invocation is None:
        return 0
    size, first = len(invocation), invocation[0]
    starts = range(len(prompt) - size, -1, -1)
    return next((n for n in starts if prompt[n] == first and tuple(prompt[n : n + size]) == invocation), NO_LIMIT)


class Run(msgspec.Struct, frozen=True, gc=False):
    """Rows of a step that belong to one sequence: its tokens from position `start` on.

    A plain token is a run of one, a prompt's chunk a run of many.

    Attributes:
        sequence: whose.
        start: position of the first row.
        count: rows.
        wanted: of how many of the last rows the successor is drawn: 1 where the step computes the sequence's last
            token, and 1 for each draft behind it; 0 for an earlier part of a prompt, and where states are pooled.
        drafts: what its last rows hold beyond the sequence's tokens.
        admission: the sequence's `num_admissions` when it was scheduled.
        decodes: one token that was generated and is the last, as against tokens of a prompt, or of what is recomputed.
        state: what it does with the sequence's state; None where no layer keeps one.
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
        """The next `count` tokens of a sequence; behind its last one, drafts of what may follow."""
        start = sequence.num_computed_tokens
        last = start + count == sequence.num_tokens and not sequence.is_pooled
        if drafts:
            return cls(sequence, start, count + len(drafts), 1 + len(drafts), sequence.num_admissions, False, drafts)
        decodes = last and count == 1 and start >= sequence.num_prompt_tokens
        return cls(sequence, start, count, int(last), sequence.num_admissions, decodes)


class Step(list[Run]):
    """What a step runs, decoding sequences first.

    Attributes:
        goes_on: it is one more token of each sequence of the step before, in the same order; all of them decoded there.
        begins: where it goes on, the places of those whose token is the first of a block.
        fills: the same of those whose token is the last of a block.
    """

    __slots__ = ("begins", "fills", "goes_on")

    def __init__(
        self, runs: Iterable[Run], *, goes_on: bool = False, begins: Seq[int] = (), fills: Seq[int] = ()
    ) -> None:
        super().__init__(runs)
        self.goes_on, self.begins, self.fills = goes_on, begins, fills

    @property
    def filling(self) -> Seq[Run]:
        """Those that may fill blocks: all where it does not go on."""
        return [self[place] for place in self.fills] if self.goes_on else self
