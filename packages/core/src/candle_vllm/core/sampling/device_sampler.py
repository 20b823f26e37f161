# SPDX-License-Identifier: MIT
"""DeviceSampler: sample one token per sequence of a batch without waiting for the device (step 7 of a request's life).

It does the work of `Sampler.sample` with functions of `kernels/sampling` whose arguments and results stay on the
device; only a request's logits processors, which run on the host, wait for it. The sampled tokens are the input of the
next step. The host gets them when it waits for the step, with each row's largest logit and requested log-probabilities.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.device_stream import DeviceStream, Mark, Sent, Work, copy
from candle_vllm.core.kernels.sampling.contract import DeviceEdits
from candle_vllm.core.sampling.device_edits import HostEdits, OccurrenceTable, has_edits, narrowing, on_host
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.sampling.sampler import LogprobRow, SampledToken, Token, sampled_tokens
from candle_vllm.core.sampling.state import SamplingState, process_row

_PIECES = 2  # maximum number of steps whose results are being copied to the host
_KINDS = ((False, False), (True, False), (True, True))  # kinds of sampling, see `asks` of `DeviceSampler.launch`


class DeviceSampler:
    """Sample tokens from logits in a fixed buffer on the device.

    Args:
        logits: [maximum rows, V] float32 on the device; the first rows hold each step's logits.
        controls: [maximum rows, 5] float64 on the device, see `kernels.Control`; written before each launch.
        graphs: capture sampling as CUDA graphs.

    `ids`, [maximum rows] int64 on the device, are the tokens of the last step.
    """

    def __init__(
        self, stream: DeviceStream, logits: torch.Tensor, controls: torch.Tensor, *, graphs: bool = True
    ) -> None:
        rows, vocabulary = logits.shape
        self._stream = stream
        self._logits = logits
        self._controls = controls
        self._graphs: dict[tuple[int, bool, bool], Work] | None = {} if graphs else None
        # Tokens and largest logits are adjacent, so that one copy transfers both to the host.
        self._result = torch.zeros(rows * 12, dtype=torch.uint8, device=stream.device)
        self.ids, self._largest = _split(self._result)
        self._staged = [stream.staged(rows * 12) for _ in range(_PIECES)]
        self._staged_arrays = [tuple(part.numpy() for part in _split(staged)) for staged in self._staged]
        self._turn = 0
        self._occurrences = OccurrenceTable(stream, vocabulary)

    def launch(
        self, states: Sequence[SamplingState], asks: tuple[bool, bool], padded: int | None = None
    ) -> SampledRows:
        """Launch sampling of the first len(states) rows; earlier work of the stream writes their logits and controls.

        Args:
            asks: whether a row has a temperature, and whether a row has top_k or top_p; see `kernels.asks`.
            padded: rows of the captured graph, at least R; None to run without a graph, as for edits.
        """
        random, search = asks
        count, edited = len(states), any(state.may_edit and has_edits(state) for state in states)
        rows = [row for row, state in enumerate(states) if state.params.logprobs is not None]
        asking = Sent(self._stream, np.array(rows, np.int64)) if rows else None
        raw = self._keep(asking) if edited and asking else None
        note = self._edit(states) if edited else None
        if note is not None or padded is None or self._graphs is None:
            self._stream.run(lambda: self._draw(count, random, search))
        else:
            self._stream.run(self._captured(padded, random, search))
        if note is not None:
            self._stream.run(note)
        logprobs = None
        if asking is not None:
            logprobs = self._stand([states[row].params for row in rows], rows, asking, raw)
        surprises = Surprises.of(self._stream, states) if edited else None
        if surprises is not None:
            self._stream.run(lambda: surprises.take(self._logits, self.ids))
        self._turn = (self._turn + 1) % _PIECES
        staged, result = self._staged[self._turn], self._result
        self._stream.run(lambda: copy(staged, result))
        return SampledRows(self._stream.mark(), self._staged_arrays[self._turn], tuple(states), logprobs, surprises)

    def forget_counts(self, states: Sequence[SamplingState]) -> None:
        """Recount the tokens of these sequences before their next edit: another sampler has sampled some tokens."""
        self._occurrences.outdated.update(state for state in states if state.counts is not None)

    def warm_up(self, rows: int) -> None:
        """Run sampling of `rows`, masks, bias, penalties and log-probabilities once, so that kernels are compiled."""
        for kind in _KINDS:
            self._stream.run(functools.partial(self._draw, rows, *kind))
        self._stream.run(self._edit_nothing)

    def capture(self, rows: int) -> None:
        """Capture sampling of `rows` as CUDA graphs, if graphs are enabled."""
        if self._graphs is not None:
            for kind in _KINDS:
                self._captured(rows, *kind)

    def drop_graphs(self) -> None:
        """Release the CUDA graphs; the next steps capture new ones."""
        if self._graphs is not None:
            self._graphs = {}

    def close(self) -> None:
        """Release the CUDA graphs."""
        self._graphs = None

    def _edit_nothing(self) -> None:
        """Run the kernels of edits, counts and log-probabilities without an effect. Call it as the stream's work."""
        device, logits, vocabulary = self._stream.device, self._logits[:1], self._logits.shape[1]

        def row(kind: torch.dtype, *shape: int, value: int = 0) -> torch.Tensor:
            return torch.full((1, *shape), value, dtype=kind, device=device)

        nowhere, counts = row(torch.int32, value=-1), row(torch.int32, vocabulary)
        bias = {"bias_ids": row(torch.int32, 1, value=-1), "bias": row(torch.float32, 1)}
        masks = {"mask_rows": nowhere, "masks": row(torch.int32, -(-vocabulary // 32))}
        counted = {"count_rows": nowhere, "counts": counts, "penalties": row(torch.float64, 3)}
        for edits in (bias, masks, counted, masks | counted):
            kernels.edit_tensors(logits, DeviceEdits(**edits))
        kernels.note_tokens(counts, nowhere, self.ids[:1])
        kernels.stand_tensors(logits, self.ids[:1], row(torch.int64), 1)

    def _captured(self, rows: int, random: bool, search: bool) -> Work:
        assert self._graphs is not None
        key = (rows, random, search)
        if key not in self._graphs:
            self._stream.run(lambda: self._draw(*key))  # compiles; sampling does not change the logits
            self._graphs[key] = self._stream.capture(lambda: self._draw(*key))
        return self._graphs[key]

    def _draw(self, rows: int, random: bool, search: bool) -> None:
        ids, largest = kernels.draw_tensors(self._logits[:rows], self._controls[:rows], random, search)
        self.ids[:rows] = ids
        self._largest[:rows] = largest

    def _edit(self, states: Sequence[SamplingState]) -> Work:
        """Launch all edits in order; return the work that counts the tokens after they were sampled."""
        for row, state in enumerate(states):
            if state.params.logits_processors:
                self._stream.run(functools.partial(on_host, self._logits[row], process_row, state))
        slots = [-1 if state.counts is None else self._occurrences.slot(state) for state in states]
        edits, rows = HostEdits(self._stream, states, slots), len(states)
        noted = [-1 if state.windowed else slot for state, slot in zip(states, slots)]
        counted = Sent(self._stream, np.array(noted, np.int32)) if edits.counts_tokens else None
        self._stream.run(lambda: kernels.edit_tensors(self._logits[:rows], edits.there(self._occurrences.counts)))
        narrow = narrowing(self._stream, states)
        if narrow is not None:
            self._stream.run(lambda: narrow(self._logits[:rows]))

        def note() -> None:
            counts = self._occurrences.counts
            if counted is not None and counts is not None:
                kernels.note_tokens(counts, counted.there(), self.ids[:rows])

        return note

    def _keep(self, asking: Sent) -> list[torch.Tensor]:
        """Copy the rows' logits before they are edited; the list is filled when the stream reaches this work."""
        kept: list[torch.Tensor] = []
        self._stream.run(lambda: kept.append(self._logits[asking.there()]))
        return kept

    def _stand(
        self, params: list[SamplingParams], rows: list[int], asking: Sent, raw: list[torch.Tensor] | None
    ) -> StandingRows:
        tops = [each.logprobs or 0 for each in params]
        standing = StandingRows(self._stream, rows, max(tops), params)
        sent = Sent(self._stream, np.array(tops, np.int64))

        def work() -> None:
            places = asking.there()
            logits = self._logits[places] if raw is None else raw.pop()
            standing.take(kernels.stand_tensors(logits, self.ids[places], sent.there(), max(tops)), logits)

        self._stream.run(work)
        return standing


class StandingRows:
    """Log-probabilities of the rows that ask for them, copied from the device to the host.

    A row has at most `most` likeliest tokens; its parameters may name the tokens to report.
    """

    def __init__(self, stream: DeviceStream, rows: list[int], most: int, params: list[SamplingParams]) -> None:
        self.rows = rows
        count = len(rows)
        self._params = params
        longest = max(len(each.logprob_token_ids or ()) for each in params)
        ids = [[*(each.logprob_token_ids or ()), *[0] * longest][:longest] for each in params]
        self._named = Sent(stream, np.array(ids, np.int64)) if longest else None
        self._named_logits = stream.staged(count * longest * 4).view(torch.float32).view(count, longest)
        self._found = kernels.DeviceStanding(
            offsets=stream.staged(count * 8).view(torch.float64),
            ranks=stream.staged(count * 8).view(torch.int64),
            logits=stream.staged(count * 4).view(torch.float32),
            top_ids=stream.staged(count * most * 8).view(torch.int64).view(count, most),
            top_logits=stream.staged(count * most * 4).view(torch.float32).view(count, most),
        )

    def take(self, found: kernels.DeviceStanding, logits: torch.Tensor) -> None:
        """Copy the results of the rows' logits to the host. Call it as the stream's work."""
        if self._named is not None:
            copy(self._named_logits, logits.gather(1, self._named.there()))
        for target, source in zip(self._found, found):
            copy(target, source)

    def entry(self, place: int, token_id: int) -> LogprobRow:
        """Return the log-probabilities of the row at `place` of `rows`, for which `token_id` was sampled."""
        found = self._found
        top = zip(found.top_ids[place].tolist(), found.top_logits[place].tolist())
        logit, offset = float(found.logits[place]), float(found.offsets[place])
        if ids := self._params[place].logprob_token_ids:
            top = {token_id: logit, **dict(zip(ids, self._named_logits[place].tolist()))}.items()
        return LogprobRow.of(token_id, logit, offset, int(found.ranks[place]), top)


class Surprises:
    """Surprise of the tokens that were sampled for rows with mirostat, copied from the device to their states.

    `told` are each row, its state, and the position that is sampled.
    """

    def __init__(self, stream: DeviceStream, told: list[tuple[int, SamplingState, int]]) -> None:
        self._told = told
        self._rows = Sent(stream, np.array([row for row, _, _ in told], np.int64))
        self._temperatures = Sent(stream, np.array([state.controls[0] for _, state, _ in told]))
        self._bits = stream.staged(8 * len(told)).view(torch.float64)

    @classmethod
    def of(cls, stream: DeviceStream, states: Sequence[SamplingState]) -> Surprises | None:
        """Prepare the surprises of these rows; None if no row has mirostat."""
        told = [(row, state, state.position) for row, state in enumerate(states) if state.params.mirostat]
        return cls(stream, told) if told else None

    def take(self, logits: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Compute the surprises from the logits that were sampled from. Call it as the stream's work."""
        rows = self._rows.there()
        copy(self._bits, kernels.surprise_tensors(logits, rows, token_ids[rows], self._temperatures.there()))

    def tell(self) -> None:
        """Pass the surprises to the states; the step's mark must have been reached."""
        for (_, state, position), bits in zip(self._told, self._bits.tolist()):
            state.note_surprise(bits, position)


@dataclasses.dataclass(frozen=True, eq=False)
class SampledRows:
    """Sampled tokens that are being copied to the host; see `engine/runners/model_runner.Launched`."""

    mark: Mark
    staged: Sequence[NDArray[Any]]
    states: tuple[SamplingState, ...]
    logprobs: StandingRows | None
    surprises: Surprises | None

    def tokens(self) -> list[Token]:
        """Wait for the step and return one token per row."""
        self.mark.wait()
        ids, largest = (part[: len(self.states)].tolist() for part in self.staged)
        drawn = sampled_tokens(ids, largest)
        for row, state in enumerate(self.states):
            if state.failure is not None:
                drawn[row] = SampledToken(-1, error=state.failure, by_request=True)
        if self.surprises is not None:
            self.surprises.tell()
        if self.logprobs is not None:
            for place, row in enumerate(self.logprobs.rows):
                if isinstance(token := drawn[row], int):
                    drawn[row] = SampledToken(token, self.logprobs.entry(place, token))
        return drawn


def _split(result: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """View bytes [12 R] as ids [R] int64 and largest logits [R] float32."""
    rows = len(result) // 12
    return result[: 8 * rows].view(torch.int64), result[8 * rows :].view(torch.float32)
