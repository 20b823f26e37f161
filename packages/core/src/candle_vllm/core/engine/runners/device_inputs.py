# SPDX-License-Identifier: MIT
"""Arrays of a step in the device memory from which its kernels read them (step 5 of a request's life).

The addresses of these arrays never change, because captured steps contain them.
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
        tokens: maximum number of tokens of a step.
        sequences: maximum number of sequences of a step.
        table_width: blocks of the longest sequence.
        block_size: tokens of a block.
        states: whether layers keep states.
        chunks: whether kernels may compute states chunk by chunk; results then depend on how steps divide a prompt.
    """

    tokens: int
    sequences: int
    table_width: int
    block_size: int
    states: bool = False
    chunks: bool = True

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, rounded up to whole blocks."""
        return self.table_width * self.block_size


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The size of a step. In a captured one, rows beyond the batch are padding: they write nothing and are not read.

    Attributes:
        tokens: T, the number of tokens.
        rows: number of sequences; T in a step that only decodes.
        mixed: whether the step may have prompts.
    """

    tokens: int
    rows: int
    mixed: bool


class DeviceInputs:
    """A step's arrays: on the host for the next step, on the device for the current one.

    Args:
        stream: the stream that copies them.
        limits: the largest step.
        in_flight: maximum number of steps in flight. If more than 1, a step's sampling controls are sent separately
            (`send_controls`), when the last stage has returned its hidden states: other steps are sent in between.
    """

    def __init__(self, stream: DeviceStream, limits: DeviceLimits, in_flight: int = 1) -> None:
        self._stream = stream
        self._limits = limits
        sequences = limits.sequences
        controls: dict[str, Any] = {"controls": ((sequences, 5), np.float64)}
        # One run more than there are sequences, for the padding tokens.
        runs: dict[str, Any] = dict.fromkeys(("slots", "sources", "replays"), ((sequences + 1,), np.int32))
        runs["starts"] = (sequences + 2,), np.int32
        self._filler = np.array([*_FILLER, [-1], [-1], [1]] if limits.states else _FILLER)
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
            # Four elements for each token, three more with states, then the block tables, as wide as the step needs.
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
        self._random: list[int] = []  # rows that are not greedy
        self._asks = (False, False)

    @property
    def controls(self) -> torch.Tensor:
        """Sampling controls of each row, float64 [maximum number of sequences, 5]; see `kernels/sampling`."""
        return self._draws.device["controls"]

    def send(
        self, batch: Batch, states: Sequence[SamplingState], size: StepSize | None, turns: Ints | None = None
    ) -> tuple[bool, bool]:
        """Copy a step to the device, padded to `size` if captured; return `kernels.sampling.asks` of the last controls.

        `turns` are added to the positions; see `batch.turns`.
        """
        rows, tokens = len(batch.context_lens), batch.tokens.shape[1]
        size = size or StepSize(tokens, rows, True)
        host, room = self._staging.host()
        stride = aligned(size.tokens)
        numbers = room[: self._planes * stride].reshape(self._planes, stride)
        numbers[:4, :tokens] = batch.tokens
        if self._limits.states:
            numbers[6, :tokens] = batch.positions
        if turns is not None:
            numbers[1, :tokens] += turns
        numbers[:, tokens : size.tokens] = self._filler
        if self._limits.states:
            self._write_states(host, numbers[4:6], batch.states, size)
        host["context_lens"][:rows] = batch.context_lens
        host["context_lens"][rows : size.rows] = 0
        if size.mixed:
            host["query_start"][: rows + 1] = batch.query_start
            host["query_start"][rows + 1 : size.rows + 1] = tokens
            host["sample_rows"][: len(batch.sampled_rows)] = batch.sampled_rows
            host["sample_rows"][len(batch.sampled_rows) : size.rows] = 0
            host["decoding"][0] = batch.num_decodes
        if states:
            self._write_controls(host["controls"], states)
        begin = self._planes * stride
        self._send_tables(room[begin:], begin, batch)
        return self._asks

    def _write_states(
        self, host: Mapping[str, NDArray[Any]], of_tokens: NDArray[Any], rows: StateRows | None, size: StepSize
    ) -> None:
        """Write the state slots that a step reads and writes; without `rows`, only padding."""
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

    def states(self, size: StepSize, *, prompts: bool, drafts: bool = False) -> StateRows | None:
        """Return the state slots of the step that was sent, padded to `size`; None if no layer keeps a state.

        `prompts` is whether the step may have prompts, `drafts` whether a decoding sequence may have several rows.
        """
        if not self._limits.states:
            return None
        starts = self._there["starts"][: size.rows + 2]
        runs = (self._there[name][: size.rows + 1] for name in ("slots", "sources", "replays"))
        rows = StateRows(starts, *runs, *(self._of_tokens(place, size.tokens) for place in (4, 5)))
        positions = self._of_tokens(6, size.tokens) if prompts and self._limits.chunks else None
        return rows._replace(positions=positions, single=not (prompts or drafts))

    def send_controls(self, states: Sequence[SamplingState]) -> tuple[bool, bool]:
        """Copy the sampling controls of a step whose hidden states the last stage returned; return what `send` does."""
        host, _ = self._draws.host()
        self._write_controls(host["controls"], states)
        self._draws.send(0)
        return self._asks

    def _write_controls(self, controls: NDArray[np.float64], states: Sequence[SamplingState]) -> None:
        """Write the sampling controls; while the sequences stay the same, only the random numbers change."""
        if states != self._states:
            self._states = states
            self._controls = controls_of(states)
            self._random = [row for row, state in enumerate(states) if not state.params.greedy]
            self._asks = asks(self._controls)
        elif self._random:
            self._controls[self._random, Control.UNIFORM] = [states[row].uniform() for row in self._random]
        controls[: len(states)] = self._controls
        controls[len(states) :] = _LIKELIEST  # captured sampling may have more rows

    def _send_tables(self, room: NDArray[np.int32], begin: int, batch: Batch) -> None:
        """Copy the step, followed by its block tables if they differ from the previous step's."""
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
        """Copy a step of padding only, and greedy sampling controls for all rows. Waits for earlier steps."""
        self._stream.mark().wait()
        host, room = self._staging.host()
        stride = aligned(size.tokens)
        numbers = room[: self._planes * stride].reshape(self._planes, stride)
        numbers[...] = self._filler
        if self._limits.states:
            self._write_states(host, numbers[4:6], None, size)
        for name in ("context_lens", "query_start", "sample_rows", "decoding"):
            host[name][:] = 0
        if self._draws is self._staging:
            host["controls"][:] = _LIKELIEST
        else:
            self._draws.host()[0]["controls"][:] = _LIKELIEST
            self._draws.send(0)
        self._staging.send(self._planes * stride)

    def send_zeros(self, starts: Ints, last_context: int, decodes: int = 0) -> Batch:
        """Copy sequences of zeros only, which write nothing to the cache. Waits for earlier steps.

        Args:
            starts: [R + 1] offsets of the sequences into the tokens.
            last_context: context length of the last sequence; the others have no earlier context.
            decodes: number of first sequences, of one token each, that are decoding.
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
            num_decodes=decodes,
            runs=(),
            drawing=(),
            drafted=False,
            sampled_rows=np.arange(min(self._limits.sequences, tokens)),
        )
        self._stream.mark().wait()
        self.send(batch, (), None)
        return batch

    def given(self, batch: Batch) -> Callable[[], GivenTensors | None]:
        """Return work that copies a batch's image rows to the device."""
        if batch.embedded is None:
            return lambda: None
        rows, vectors = (Sent(self._stream, each) for each in (batch.embedded.rows, batch.embedded.vectors))
        return lambda: GivenTensors(rows.there(), vectors.there())

    def rows_of(self, batch: Batch) -> DeviceRows:
        """Return the rows of the batch that was sent, grouped by sequence, for attention."""
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
        """Compute slots and rows of each page pool; block n is page `page_of[g, n]`, int32. Call it in stream work."""
        size, found = self._limits.block_size, list[tuple[torch.Tensor, DeviceRows]]()
        blocks = slots.div(size, rounding_mode="floor")
        for pages in page_of:
            tables = pages[rows.block_tables]
            there = torch.where(slots < 0, slots, slots + (pages[blocks] - blocks) * size)
            host = None if rows.host is None else dataclasses.replace(rows.host, block_tables=tables)
            found.append((there, dataclasses.replace(rows, block_tables=tables, host=host)))
        return found

    def rows_for(self, size: StepSize) -> DeviceRows:
        """Return the rows of a captured step of this size, grouped by sequence, for attention."""
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
        """Return positions and slots, [T] int32 each, padding included; see `StepInput`."""
        return self._of_tokens(1, tokens), self._of_tokens(2, tokens)

    def token_ids(self, tokens: int, drawn: torch.Tensor) -> torch.Tensor:
        """Return token ids, [T] int32; unknown ones are read from the last sampled, `drawn`. Call it in stream work."""
        sources = self._of_tokens(3, tokens)
        return torch.where(sources >= 0, drawn[sources.clamp(min=0)].to(torch.int32), self._of_tokens(0, tokens))

    def sample_rows(self, count: int) -> torch.Tensor:
        """Return the rows whose next token is sampled, [count] int32."""
        return self._there["sample_rows"][:count]


def by_rows(batch: Batch) -> Batch:
    """Return a step in which each row of a run with drafts is a decoding sequence, with the block table of its run.

    A layer writes the keys and values of all rows before attention, and each row attends to earlier positions only. So
    each row's result equals that of a step of its own, unless results of decoding depend on other rows of the step.
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


_FILLER = np.array([[0], [0], [-1], [-1]])  # token id, position, slot, source of a padding token
_LIKELIEST = (0.0, 0.0, 0.0, 1.0, 0.5)  # sampling controls of a padding row: greedy
