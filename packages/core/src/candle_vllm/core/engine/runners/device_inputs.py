# SPDX-License-Identifier: MIT
"""Step 5 on a GPU: the numbers of a step, where its kernels read them.

Their memory never moves, so that a captured step finds the next one's numbers where it found its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.runners.eager_runner import GivenTensors
from candle_vllm.core.engine.step.batch import Batch, Ints
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.device_stream import DeviceStream, Sent, Staging, aligned, copy
from candle_vllm.core.kernels.sampling import asks
from candle_vllm.core.kernels.sampling.contract import Control
from candle_vllm.core.kernels.states import StateRows
from candle_vllm.core.sampling.sampler import controls as controls_of
from candle_vllm.core.sampling.state import SamplingState


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """The largest step.

    Attributes:
        tokens: in one step.
        sequences: in one step.
        table_width: blocks of the longest sequence.
        block_size: tokens of a block.
        states: layers keep states.
    """

    tokens: int
    sequences: int
    table_width: int
    block_size: int
    states: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.table_width * self.block_size


@dataclasses.dataclass(frozen=True)
class StepSize:
    """What a step is captured for. What a batch leaves of it decodes nothing, writes nothing and is not read.

    Attributes:
        tokens: T.
        rows: sequences; of a step that only decodes, T of them.
        mixed: the step may have prompts.
    """

    tokens: int
    rows: int
    mixed: bool


class DeviceInputs:
    """A step's numbers, on the host for the next one and on the device for this one.

    Args:
        stream: which copies them.
        limits: the largest step.
        in_flight: steps that may be under way at once. Where they are several, how a step's tokens are drawn is sent
            when it has landed (`send_draws`), for others are sent meanwhile.
    """

    def __init__(self, stream: DeviceStream, limits: DeviceLimits, in_flight: int = 1) -> None:
        self._stream = stream
        self._limits = limits
        sequences = limits.sequences
        controls: dict[str, Any] = {"controls": ((sequences, 5), np.float64)}
        # One run more than there are sequences: of the tokens that are none.
        runs: dict[str, Any] = dict.fromkeys(("slots", "sources", "replays"), ((sequences + 1,), np.int32))
        runs["starts"] = (sequences + 2,), np.int32
        self._filler = np.array([*_FILLER, [-1], [-1]] if limits.states else _FILLER)
        planes = self._planes = len(self._filler)
        several = in_flight > 1
        self._staging = Staging(
            stream,
            {
                **({} if several else controls),
                "context_lens": ((sequences,), np.int32),
                "query_start": ((sequences + 1,), np.int32),
                "sample_rows": ((sequences,), np.int32),
                "decoding": ((1,), np.int32),
                **(runs if limits.states else {}),
            },
            # Of each token four numbers, and two of states, then the block tables, as wide as the step needs them.
            room=planes * aligned(limits.tokens) + sequences * limits.table_width,
            pieces=max(2, in_flight),
        )
        self._draws = Staging(stream, controls, room=0) if several else self._staging
        self._there, self._room = self._staging.device, self._staging.device_room
        self._tables = torch.zeros(sequences, limits.table_width, dtype=torch.int32, device=stream.device)
        self._tables_version: object = None
        self._one_each = torch.arange(sequences + 1, dtype=torch.int32, device=stream.device)
        self._states: Sequence[SamplingState] = ()
        self._controls = np.zeros((0, 5))
        self._random: list[int] = []  # rows that draw at random
        self._asks = (False, False)

    @property
    def controls(self) -> torch.Tensor:
        """[most sequences, 5] float64, how each row's token is drawn; see `kernels/sampling`."""
        return self._draws.device["controls"]

    def send(
        self, batch: Batch, states: Sequence[SamplingState], size: StepSize | None, turns: Ints | None = None
    ) -> tuple[bool, bool]:
        """Sends a step over, filled up to the size that it was captured for, if it was.

        `turns` are added to the positions, see `batch.turns`.

        Returns:
            `kernels.sampling.asks` of its draws.
        """
        rows, tokens = len(batch.context_lens), batch.tokens.shape[1]
        size = size or StepSize(tokens, rows, True)
        host, room = self._staging.host()
        stride = aligned(size.tokens)
        numbers = room[: self._planes * stride].reshape(self._planes, stride)
        numbers[:4, :tokens] = batch.tokens
        if turns is not None:
            numbers[1, :tokens] += turns
        numbers[:, tokens : size.tokens] = self._filler
        if self._limits.states:
            self._write_states(host, numbers[4:], batch.states, size)
        host["context_lens"][:rows] = batch.context_lens
        host["context_lens"][rows : size.rows] = 0
        if size.mixed:
            host["query_start"][: rows + 1] = batch.query_start
            host["query_start"][rows + 1 : size.rows + 1] = tokens
            host["sample_rows"][: len(batch.drawn_rows)] = batch.drawn_rows
            host["sample_rows"][len(batch.drawn_rows) : size.rows] = 0
            host["decoding"][0] = batch.num_decodes
        if states:
            self._write_controls(host["controls"], states)
        begin = self._planes * stride
        self._send_tables(room[begin:], begin, batch)
        return self._asks

    def _write_states(
        self, host: Mapping[str, NDArray[Any]], of_tokens: NDArray[Any], rows: StateRows | None, size: StepSize
    ) -> None:
        """What a step does with states; nothing where it has no rows."""
        if rows is None:
            count, host["starts"][0], of_tokens[:] = 0, 0, -1
        else:
            count, tokens = len(rows.slots), len(rows.stores)
            host["starts"][: count + 1] = rows.query_start
            host["slots"][:count], host["sources"][:count] = rows.slots, rows.sources
            host["replays"][:count] = rows.replays
            of_tokens[0, :tokens], of_tokens[1, :tokens] = rows.stores, rows.keeps
        host["starts"][count + 1 : size.rows + 2] = size.tokens
        for name, nothing in (("slots", 0), ("sources", -1), ("replays", 0)):
            host[name][count : size.rows + 1] = nothing

    def states(self, size: StepSize) -> StateRows | None:
        """What the step that was sent, filled up to a size, does with states; None where no layer keeps one."""
        if not self._limits.states:
            return None
        starts = self._there["starts"][: size.rows + 2]
        runs = (self._there[name][: size.rows + 1] for name in ("slots", "sources", "replays"))
        return StateRows(starts, *runs, *(self._of_tokens(place, size.tokens) for place in (4, 5)))

    def send_draws(self, states: Sequence[SamplingState]) -> tuple[bool, bool]:
        """Sends how the tokens of the step that has landed are drawn; the same result."""
        host, _ = self._draws.host()
        self._write_controls(host["controls"], states)
        self._draws.send(0)
        return self._asks

    def _write_controls(self, controls: NDArray[np.float64], states: Sequence[SamplingState]) -> None:
        """How each row is drawn. But for the random numbers that stays as long as the sequences do."""
        if states != self._states:
            self._states = states
            self._controls = controls_of(states)
            self._random = [row for row, state in enumerate(states) if not state.params.greedy]
            self._asks = asks(self._controls)
        elif self._random:
            self._controls[self._random, Control.UNIFORM] = [states[row].uniform() for row in self._random]
        controls[: len(states)] = self._controls
        controls[len(states) :] = _LIKELIEST  # a captured draw has more rows

    def _send_tables(self, room: NDArray[np.int32], begin: int, batch: Batch) -> None:
        """Sends the step, and the block tables behind its tokens where they are not those of the step before."""
        if batch.tables_version is self._tables_version:
            self._staging.send(begin)
            return
        count, shape = batch.block_tables.size, batch.block_tables.shape
        room[:count].reshape(shape)[...] = batch.block_tables
        self._staging.send(begin + count)
        sent, target = self._room[begin : begin + count].view(shape), self._tables[: shape[0], : shape[1]]
        self._stream.run(lambda: copy(target, sent))
        self._tables_version = batch.tables_version

    def send_blank(self, size: StepSize) -> None:
        """Sends over a step of nothing but fillers, and the draws of as many rows as may be. Waits for steps before."""
        self._stream.mark().wait()
        host, room = self._staging.host()
        stride = aligned(size.tokens)
        numbers = room[: self._planes * stride].reshape(self._planes, stride)
        numbers[...] = self._filler
        if self._limits.states:
            self._write_states(host, numbers[4:], None, size)
        for name in ("context_lens", "query_start", "sample_rows", "decoding"):
            host[name][:] = 0
        if self._draws is self._staging:
            host["controls"][:] = _LIKELIEST
        else:
            self._draws.host()[0]["controls"][:] = _LIKELIEST
            self._draws.send(0)
        self._staging.send(self._planes * stride)

    def send_zeros(self, starts: Ints, last_context: int) -> Batch:
        """Sends over prompts of nothing but zeros, which write nothing. Waits for the steps before.

        Args:
            starts: [R + 1] where each begins, and the end.
            last_context: context of the last one; the others have none.
        """
        rows, tokens = len(starts) - 1, int(starts[-1])
        contexts = np.diff(starts)
        contexts[-1] = last_context
        batch = Batch(
            tokens=np.repeat(_FILLER, tokens, 1),
            query_start=starts,
            context_lens=contexts,
            block_tables=np.zeros((rows, self._limits.table_width), np.int64),
            tables_version=object(),
            num_decodes=0,
            runs=(),
            drawing=(),
            drafted=False,
            drawn_rows=np.arange(min(self._limits.sequences, tokens)),
        )
        self._stream.mark().wait()
        self.send(batch, (), None)
        return batch

    def given(self, batch: Batch) -> Callable[[], GivenTensors | None]:
        """What brings a batch's rows of pictures over; work."""
        if batch.embedded is None:
            return lambda: None
        rows, vectors = (Sent(self._stream, each) for each in (batch.embedded.rows, batch.embedded.vectors))
        return lambda: GivenTensors(rows.there(), vectors.there())

    def rows_of(self, batch: Batch) -> DeviceRows:
        """Which tokens of a batch that was sent belong together."""
        rows = len(batch.context_lens)
        tables = self._tables[:rows]
        return DeviceRows(
            self._there["query_start"][: rows + 1],
            self._there["context_lens"][:rows],
            tables,
            batch.num_decodes,
            most_tokens=int(np.diff(batch.query_start).max()),
            most_context=int(batch.context_lens.max()),
            host=AttentionRows(tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), tables),
        )

    def windowed(
        self, rows: DeviceRows, slots: torch.Tensor, page_of: torch.Tensor
    ) -> list[tuple[torch.Tensor, DeviceRows]]:
        """Slots and rows of each pool of pages, where block n is in page `page_of[g, n]`, int32; work."""
        size, found = self._limits.block_size, list[tuple[torch.Tensor, DeviceRows]]()
        blocks = slots.div(size, rounding_mode="floor")
        for pages in page_of:
            tables = pages[rows.block_tables]
            there = torch.where(slots < 0, slots, slots + (pages[blocks] - blocks) * size)
            host = None if rows.host is None else dataclasses.replace(rows.host, block_tables=tables)
            found.append((there, dataclasses.replace(rows, block_tables=tables, host=host)))
        return found

    def rows_for(self, size: StepSize) -> DeviceRows:
        """The same of any step that a captured one runs."""
        starts = self._there["query_start"] if size.mixed else self._one_each
        return DeviceRows(
            starts[: size.rows + 1],
            self._there["context_lens"][: size.rows],
            self._tables[: size.rows],
            size.rows,
            most_tokens=size.tokens if size.mixed else 1,
            most_context=self._limits.longest,
            decoding=self._there["decoding"] if size.mixed else None,
        )

    def _of_tokens(self, place: int, tokens: int) -> torch.Tensor:
        begin = place * aligned(tokens)
        return self._room[begin : begin + tokens]

    def positions_and_slots(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] int32 each; see `StepInput`. T is that of the whole step, fillers included."""
        return self._of_tokens(1, tokens), self._of_tokens(2, tokens)

    def token_ids(self, tokens: int, drawn: torch.Tensor) -> torch.Tensor:
        """[T] int32, those that the host does not know taken from what the step before drew; work on the device."""
        sources = self._of_tokens(3, tokens)
        return torch.where(sources >= 0, drawn[sources.clamp(min=0)].to(torch.int32), self._of_tokens(0, tokens))

    def sample_rows(self, count: int) -> torch.Tensor:
        """[count] int32: the tokens whose successor is drawn."""
        return self._there["sample_rows"][:count]


def by_rows(batch: Batch) -> Batch:
    """A step in which each row of a run with drafts is a sequence that decodes, with the blocks of its own.

    All rows' keys and values are written before a layer attends, and each sees what stands before it; so its bits are
    those of a step of one row wherever those of decoding do not depend on the rest of the step.
    """
    counts = np.diff(batch.query_start)
    apart = np.array([run.decodes or bool(run.drafts) for run in batch.runs])
    first = int(apart.sum())
    assert apart[:first].all(), "prompts stand behind what decodes"
    rows = int(counts[:first].sum())
    owners = np.concatenate([np.repeat(np.arange(first), counts[:first]), np.arange(first, len(counts))])
    contexts = batch.context_lens[owners]
    contexts[:rows] = batch.positions[:rows] + 1
    return msgspec.structs.replace(
        batch,
        query_start=np.concatenate([np.arange(rows), batch.query_start[first:]]),
        context_lens=contexts,
        block_tables=batch.block_tables[owners],
        tables_version=object(),
        num_decodes=rows,
        drafted=False,
    )


_FILLER = np.array([[0], [0], [-1], [-1]])  # token id, position, slot, source of a token that is none
_LIKELIEST = (0.0, 0.0, 0.0, 1.0, 0.5)  # the draw of a row without a sequence
