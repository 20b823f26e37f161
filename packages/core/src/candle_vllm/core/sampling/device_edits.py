"""What a batch's states ask to be done to its logits, as tensors for a GPU's kernels (step 7 of ten).

Bias and forbidden tokens are short lists, made anew for each step. Allowed tokens, and those that a grammar leaves, are
a bit for each of the vocabulary.
Occurrences for the penalties stay on the device, a row for each sequence that needs them, where the kernels count on.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.kernels.device_stream import DeviceStream, Sent
from candle_vllm.core.kernels.sampling.contract import DeviceEdits
from candle_vllm.core.sampling.state import SamplingState

_FIRST_ROWS = 8


def has_edits(state: SamplingState) -> bool:
    """Whether the logits of a sequence are changed before its next token is drawn."""
    return state.masks_tokens or len(state.bias_ids) > 0 or state.counts is not None


class HostEdits:
    """The edits of one step, worked out on the host and on their way to the device.

    Args:
        stream: whose work will ask for them.
        states: one per row, at least one of which `has_edits`.
        slots: the row of the table of occurrences for each, or -1.
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
        """As the kernels take them, with the table of occurrences; what no row has is None. Work."""
        found = {name: sent.there() for name, sent in self._sent.items()}
        return DeviceEdits(**found, counts=counts if self.counts_tokens else None)


class OccurrenceTable:
    """Occurrences of every token in the sequences that have penalties: [S, V] int32 on the device.

    A count is 0 for a token that was not seen, else 1 and its occurrences in the output.
    """

    def __init__(self, stream: DeviceStream, vocab_size: int) -> None:
        self._stream = stream
        self._vocab_size = vocab_size
        self._rows = 0
        self._free: list[int] = []
        self._slots: weakref.WeakKeyDictionary[SamplingState, int] = weakref.WeakKeyDictionary()
        self.counts: torch.Tensor | None = None

    def slot(self, state: SamplingState) -> int:
        """The row of a state that has counts; work that fills it is given to the stream when it is new."""
        known = self._slots.get(state)
        if known is not None:
            return known
        assert state.counts is not None
        assert not state.num_ahead
        if not self._free:
            grown = max(_FIRST_ROWS, 2 * self._rows)
            self._free += range(self._rows, grown)
            self._rows = grown
        slot = self._free.pop()
        self._slots[state] = slot
        weakref.finalize(state, self._free.append, slot).atexit = False
        ids = Sent(self._stream, state.counts.ids)
        counts = Sent(self._stream, state.counts.counts.astype(np.int32) + 1)

        def fill() -> None:
            row = self._grown()[slot]
            row.zero_()
            row.index_copy_(0, ids.there(), counts.there())

        self._stream.run(fill)
        return slot

    def _grown(self) -> torch.Tensor:
        """The table with at least as many rows as were handed out."""
        if self.counts is None or len(self.counts) < self._rows:
            table = torch.zeros(self._rows, self._vocab_size, dtype=torch.int32, device=self._stream.device)
            if self.counts is not None:
                table[: len(self.counts)] = self.counts
            self.counts = table
        return self.counts


_NO_IDS = np.zeros(0, np.int64)


def _bias(states: Sequence[SamplingState]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """[R, N] ids, -1 where unused, and what is added to their logits; -inf for a forbidden token."""
    rows = []
    for state in states:
        banned = np.unique(state.forbidden_ids()) if state.masks_tokens else _NO_IDS
        kept = ~np.isin(state.bias_ids, banned)
        ids = np.concatenate((banned, state.bias_ids[kept]))
        rows.append((ids, np.concatenate((np.full(len(banned), -np.inf), state.bias_values[kept]))))
    most = max(len(ids) for ids, _ in rows)
    all_ids, all_values = np.full((len(rows), most), -1, np.int32), np.zeros((len(rows), most), np.float32)
    for row, (ids, values) in enumerate(rows):
        all_ids[row, : len(ids)], all_values[row, : len(ids)] = ids, values
    return all_ids, all_values
