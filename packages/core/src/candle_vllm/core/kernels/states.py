# SPDX-License-Identifier: MIT
"""States of fixed size that layers store for sequences, and how a step reads and writes them.

Contract of every kernel with a state. A step has T rows (tokens) of R sequences. A **slot** is the memory of one state;
a **kept row** has the inputs of one draft token. For sequence r the kernel

1. begins with the state in slot `sources[r]`, or with zeros if that is -1;
2. applies the first `replays[r]` kept rows of `kept[slots[r]]`, without output: the previous step's draft tokens that
   were accepted;
3. applies rows query_start[r]:query_start[r + 1] of this step, one after the other, and computes the output of each.
   After row t it writes the state to slot `stores[t]`, unless that is -1, and the row's inputs to
   `kept[slots[r], keeps[t]]`, unless `keeps[t]` is -1.

The state after a draft token is not stored, but the token's inputs are. The state after the last row before draft
tokens is stored in the sequence's own slot, or in the slot of a checkpoint, which is the source of the next step. No
slot that one sequence stores in a step is the source of another sequence. Tokens are applied one by one and in fp32, so
the bits of a state do not depend on the division of a text into steps. The exceptions are GPU kernels that compute 64
tokens at once, from a position that is a multiple of 64 on, if one step has all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class StateCache(NamedTuple):
    """A state of a layer; layers may have several.

    Attributes:
        states: [slots, ...]: slots of running sequences, then of checkpoints.
        kept: [slots of running sequences, maximum draft tokens, inputs of a token] float32: inputs of draft tokens.
    """

    states: Any
    kept: Any


TABLES = ("query_start", "slots", "sources", "replays", "stores", "keeps")
"""The fields of `StateRows` that every kernel with a state reads."""


class StateRows(NamedTuple):
    """State slots that a step reads and writes; int64, on a GPU int32.

    Attributes:
        query_start: [R + 1] offsets into the step's tokens.
        slots: [R] the sequence's own slot.
        sources: [R] the slot whose state the sequence continues; -1 at its beginning.
        replays: [R] number of kept rows that are applied first.
        stores: [T] the slot to which the state after a token is written; -1 for no slot.
        keeps: [T] the row of `StateCache.kept[slot]` to which a token's inputs are written; -1 for no row.
        positions: [T] each token's position in its sequence, by which kernels on a GPU find whole chunks; None if they
            process tokens one by one.
        single: each sequence r has exactly row r in this step; this saves a launch of `short_conv` on a GPU.
    """

    query_start: Any
    slots: Any
    sources: Any
    replays: Any
    stores: Any
    keeps: Any
    positions: Any = None
    single: Any = False

    @property
    def tables(self) -> dict[str, Any]:
        """The arrays of `TABLES`, by name."""
        return dict(zip(TABLES, self))
