# SPDX-License-Identifier: MIT
"""Edits of a batch's logits (step 7): as tensors for a GPU's kernels, or applied by torch.

Logit bias and forbidden tokens are short lists, rebuilt in each step. Allowed tokens, including a grammar's, are a
bitmask over the vocabulary. Token counts for penalties stay on the device, one row for each sequence with penalties;
the kernels update them, except counts of only the last tokens, which the host sends in each step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.device_stream import DeviceStream, Sent
from candle_vllm.core.kernels.sampling.contract import DeviceEdits
from candle_vllm.core.sampling.state import SamplingState, narrow_row, process_row

_FIRST_ROWS = 8


def has_edits(state: SamplingState) -> bool:
    """Whether the logits of a sequence are changed before its next token is sampled."""
    common = state.masks_tokens or len(state.bias_ids) > 0 or state.counts is not None
    return common or state.chain is not None or state.dry is not None or bool(state.params.logits_processors)


class HostEdits:
    """Masks, bias and penalties of one step, computed on the host and copied to the device.

    `has_edits` is true for at least one of `states`; `slots` has for each row its row in the `OccurrenceTable`, or -1.
    """

    def __init__(self, stream: DeviceStream, states: Sequence[SamplingState], slots: Sequence[int]) -> None:
        self._sent: dict[str, Sent] = {}
        ids, values = _bias(states)
        if ids.shape[1]:
            self._sent |= {"bias_ids": Sent(stream, ids), "bias": Sent(stream, values)}
        masks = [state.mask_bits() if state.masks_tokens else None for state in states]
        found = [bits for bits in masks if bits is not None]
        if found:
            rows = np.cumsum([bits is not None for bits in masks], dtype=np.int32) - 1
            rows[[bits is None for bits in masks]] = -1
            self._sent |= {"mask_rows": Sent(stream, rows), "masks": Sent(stream, np.stack(found))}
        self.counts_tokens = any(slot >= 0 for slot in slots)
        if self.counts_tokens:
            params = [state.params for state in states]
            penalties = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
            self._sent |= {
                "count_rows": Sent(stream, np.array(slots, np.int32)),
                "penalties": Sent(stream, np.array(penalties)),
            }

    def there(self, counts: torch.Tensor | None) -> DeviceEdits:
        """Return the kernels' arguments with the table `counts`; call it as the stream's work."""
        found = {name: sent.there() for name, sent in self._sent.items()}
        return DeviceEdits(**found, counts=counts if self.counts_tokens else None)


def narrowing(stream: DeviceStream, states: Sequence[SamplingState]) -> Callable[[torch.Tensor], None] | None:
    """Compute the edits by DRY and llama.cpp's sampler chain in one step; None if no row has any.

    The result changes logits [R, V] in place; call it as the stream's work.
    """
    rows, dry, chain = [row for row, state in enumerate(states) if state.chain is not None], None, None
    if any(state.dry is not None for state in states):
        taken = [state.dry.penalties() if state.dry is not None else (_NO_IDS, _NO_IDS) for state in states]
        dry = [Sent(stream, part) for part in _padded([(ids, -values) for ids, values in taken])]
    if rows:
        links = np.stack([states[row].links() for row in rows])
        chain = [Sent(stream, np.array(rows, np.int64)), Sent(stream, links)]
    if dry is None and chain is None:
        return None

    def narrow(logits: torch.Tensor) -> None:
        if dry is not None:
            ids, values = (sent.there() for sent in dry)
            kernels.edit_tensors(logits, DeviceEdits(bias_ids=ids, bias=values))
        if chain is not None:
            kernels.narrow_tensors(logits, *(sent.there() for sent in chain))

    return narrow


class OccurrenceTable:
    """Counts of every token in the sequences with penalties: [S, V] int32 on the device, a row each, and spare rows.

    A count is 0 for a token without penalties, otherwise 1 plus its occurrences in the output (`SamplingState.counts`).

    `counts` is None before the first row is filled; rows of states in `outdated` must be filled again.
    """

    def __init__(self, stream: DeviceStream, vocab_size: int) -> None:
        self._stream = stream
        self._vocab_size = vocab_size
        self._rows = 0
        self._free: list[int] = []
        self._slots: weakref.WeakKeyDictionary[SamplingState, int] = weakref.WeakKeyDictionary()
        self.counts: torch.Tensor | None = None
        self.outdated: weakref.WeakSet[SamplingState] = weakref.WeakSet()

    def slot(self, state: SamplingState) -> int:
        """Return the table row of a state that has counts; the stream fills a new or outdated row.

        If only the last tokens count (`windowed`), the row is filled in every step.
        """
        known = self._slots.get(state)
        if known is not None and not state.windowed and state not in self.outdated:
            return known
        self.outdated.discard(state)
        assert state.counts is not None
        assert not state.num_ahead or state.windowed
        slot = self._new_slot(state) if known is None else known
        ids = Sent(self._stream, state.counts.ids)
        counts = Sent(self._stream, state.counts.counts.astype(np.int32) + 1)

        def fill() -> None:
            row = self._grown()[slot]
            row.zero_()
            row.index_copy_(0, ids.there(), counts.there())

        self._stream.run(fill)
        return slot

    def _new_slot(self, state: SamplingState) -> int:
        if not self._free:
            grown = max(_FIRST_ROWS, 2 * self._rows)
            self._free += range(self._rows, grown)
            self._rows = grown
        slot = self._free.pop()
        self._slots[state] = slot
        weakref.finalize(state, self._free.append, slot).atexit = False
        return slot

    def _grown(self) -> torch.Tensor:
        """Return the table, enlarged to `_rows` rows."""
        if self.counts is None or len(self.counts) < self._rows:
            table = torch.zeros(self._rows, self._vocab_size, dtype=torch.int32, device=self._stream.device)
            if self.counts is not None:
                table[: len(self.counts)] = self.counts
            self.counts = table
        return self.counts


_NO_IDS = np.zeros(0, np.int64)


def _bias(states: Sequence[SamplingState]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return [R, N] token ids, padded with -1, and their biases; the bias of a forbidden token is -inf."""
    rows = []
    for state in states:
        banned = np.unique(state.forbidden_ids()) if state.masks_tokens else _NO_IDS
        kept = ~np.isin(state.bias_ids, banned)
        ids = np.concatenate((banned, state.bias_ids[kept]))
        rows.append((ids, np.concatenate((np.full(len(banned), -np.inf), state.bias_values[kept]))))
    return _padded(rows)


def _padded(rows: Sequence[tuple[NDArray[np.int64], NDArray[Any]]]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Return ids and values of rows as [R, N], padded with -1 and 0."""
    most = max(len(ids) for ids, _ in rows)
    all_ids, all_values = np.full((len(rows), most), -1, np.int32), np.zeros((len(rows), most), np.float32)
    for row, (ids, values) in enumerate(rows):
        all_ids[row, : len(ids)], all_values[row, : len(ids)] = ids, values
    return all_ids, all_values


# ---- with torch ------------------------------------------------------------------------------------------------------
# The N edited logits are addressed by their index in all logits, [R * V].

_INF = float("inf")


def mask_flags(bits: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """Unpack a bitmask to [V]: whether each token is allowed."""
    return np.unpackbits(bits.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def apply_in_torch(logits: torch.Tensor, states: Sequence[SamplingState]) -> None:
    """Do what `apply_processors` does, on any device; `process_row` and `narrow_row` run on the host."""
    for row, state in enumerate(states):
        if state.params.logits_processors:
            on_host(logits[row], process_row, state)
    masked = [row for row, state in enumerate(states) if state.masks_tokens]
    if masked:
        with _keeping_faults(logits, masked):
            _mask(logits, states, masked)
    biased = [row for row, state in enumerate(states) if len(state.bias_ids)]
    if biased:
        places = _places(logits, biased, [states[row].bias_ids for row in biased])
        values = torch.from_numpy(np.concatenate([states[row].bias_values for row in biased])).to(logits.device)
        logits.view(-1)[places] += values
    counted = [row for row, state in enumerate(states) if state.counts is not None]
    if counted:
        _penalise(logits, states, counted)
    for row, state in enumerate(states):
        if state.chain is not None or state.dry is not None:
            on_host(logits[row], narrow_row, state)


def mask_in_torch(logits: torch.Tensor, masks: Mapping[int, NDArray[np.int32]]) -> None:
    """Do what `mask_rows` (`processors.py`) does, on any device."""
    rows = list(masks)
    with _keeping_faults(logits, rows):
        flags = np.stack([mask_flags(bits, logits.shape[1]) for bits in masks.values()])
        logits[rows] = logits[rows].masked_fill(~torch.from_numpy(flags).to(logits.device), -_INF)


@contextlib.contextmanager
def _keeping_faults(logits: torch.Tensor, rows: list[int]) -> Iterator[None]:
    """Return a context for masking rows: a row that had a NaN or +inf before has a NaN afterwards."""
    broken = ~(logits[rows].amax(1) < _INF)
    yield
    logits[rows, 0] = torch.where(broken, float("nan"), logits[rows, 0])


def on_host(
    row: torch.Tensor, change: Callable[[NDArray[np.float32], SamplingState], None], state: SamplingState
) -> None:
    """Change a row [V] with a function on numpy arrays."""
    there = row.cpu().numpy().copy()
    change(there, state)
    row.copy_(torch.from_numpy(there))


def _mask(logits: torch.Tensor, states: Sequence[SamplingState], rows: list[int]) -> None:
    flat = logits.view(-1)
    for row in rows:
        if (states[row].grammar is not None or states[row].is_due) and (bits := states[row].mask_bits()) is not None:
            flags = torch.from_numpy(mask_flags(bits, logits.shape[1])).to(logits.device)
            logits[row].masked_fill_(~flags, -_INF)
    allowed = [(row, ids) for row in rows if (ids := states[row].allowed) is not None]
    if allowed:
        places = _places(logits, [row for row, _ in allowed], [ids for _, ids in allowed])
        kept = flat[places]
        logits[[row for row, _ in allowed]] = -_INF
        flat[places] = kept
    forbidden = [states[row].forbidden_ids() for row in rows]
    if any(map(len, forbidden)):
        flat[_places(logits, rows, forbidden)] = -_INF


def _penalise(logits: torch.Tensor, states: Sequence[SamplingState], rows: list[int]) -> None:
    counts = [tracked for row in rows if (tracked := states[row].counts) is not None]
    lengths = [len(tracked.ids) for tracked in counts]
    places = _places(logits, rows, [tracked.ids for tracked in counts])
    if not len(places):
        return
    params = [states[row].params for row in rows]
    table = np.array([(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params])
    per_entry = torch.from_numpy(np.repeat(table, lengths, axis=0)).to(logits.device)
    occurrences = torch.from_numpy(np.concatenate([tracked.counts for tracked in counts])).to(logits.device)
    flat = logits.view(-1)
    flat[places] = penalised(flat[places], occurrences, *per_entry.unbind(1))


def penalised(
    logits: torch.Tensor,
    counts: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Apply the three penalties to the logits of tokens that have occurred.

    Args:
        logits: [N] float32 logits of tokens in the prompt or the output.
        counts: [N] float32, occurrences in the output; 0 for a token of the prompt only.
        repetition: [N] float64 above 0: divides positive logits, multiplies the others (Keskar et al., CTRL, 2019).
        frequency: [N] float64, subtracted for each occurrence.
        presence: [N] float64, subtracted once if `counts` is above 0.

    Returns:
        [N] float32, computed in float64. Even with a repetition penalty close to 0, a finite logit stays below +inf;
        -inf stays -inf.
    """
    wide = logits.double()
    scaled = torch.where(wide > 0, wide / repetition, wide * repetition)
    result = scaled - frequency * counts - presence * (counts > 0)
    return torch.where(wide < _INF, result.clamp(max=torch.finfo(torch.float32).max), wide).float()


def _places(logits: torch.Tensor, rows: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> torch.Tensor:
    """Return [N] int64 indices of the entries (row, id) in the flattened logits."""
    starts = np.repeat(np.array(rows, np.int64) * logits.shape[1], [len(part) for part in ids])
    return torch.from_numpy(starts + np.concatenate(ids)).to(logits.device)
