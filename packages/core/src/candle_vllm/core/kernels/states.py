# SPDX-License-Identifier: MIT
"""States of fixed size that layers keep of sequences, and what a step does with them.

Contract of every kernel that keeps a state. A step has T rows of R sequences. For sequence r the kernel

1. begins with the state in slot `sources[r]`, or with zeros where that is -1;
2. takes in the first `replays[r]` rows of `kept[slots[r]]`: drafts of the step before that were right. They give no
   output;
3. takes in its rows query_start[r]..query_start[r + 1] of this step, one after the other, and gives the output of each.
   Behind row t it writes the state to slot `stores[t]`, unless that is -1, and where `keeps[t]` is not -1 it writes the
   row's inputs to `kept[slots[r], keeps[t]]`.

The state behind a draft is stored nowhere, and its inputs are kept. The state behind the last row that is certain is
stored in the sequence's own slot, or in that of a checkpoint, which the next step then begins with. No slot that one
sequence of a step stores is a source of another one. Numbers are taken in one by one and in fp32, so the state is the
same to the bit however a text is cut into steps; on a GPU a kernel may compute whole chunks between absolute multiples
of 64.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class StateCache(NamedTuple):
    """A part of the state of a layer.

    Attributes:
        states: [slots, ...]: the slots of running sequences, then those of checkpoints.
        kept: [slots of running sequences, most drafts, inputs of a token] float32: inputs of drafted tokens.
    """

    states: Any
    kept: Any


class StateRows(NamedTuple):
    """What a step does with states; int64, on a GPU int32.

    Attributes:
        query_start: [R + 1] offsets into the step's tokens.
        slots: [R] the slot in which a sequence runs.
        sources: [R] the slot whose state it goes on from; -1 where it begins.
        replays: [R] kept rows that are taken in first.
        stores: [T] the slot that the state behind a token is written to; -1 for none.
        keeps: [T] where among the sequence's kept rows its inputs are written; -1 for nowhere.
    """

    query_start: Any
    slots: Any
    sources: Any
    replays: Any
    stores: Any
    keeps: Any
