# SPDX-License-Identifier: MIT
"""Transfer activations between pipeline stages on GPUs while steps are computed (step 6 of a request's life).

Transfers have their own streams (incoming, outgoing and returning), and steps use several buffers in turn. So a step is
computed while the previous one is sent and the next one is received. Layers read and write these buffers; in captured
steps they read and write memory with fixed addresses.

Work on a stream waits only for work that the hosts of all stages have launched before it. So there is no deadlock, even
if a GPU executes all its streams as a single one. Each stage processes the steps in the order in which they began.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch

from candle_vllm.core.engine.runners.eager_runner import GivenTensors
from candle_vllm.core.kernels.device_stream import DeviceStream, Mark, copy
from candle_vllm.core.models.stack import Stage

_TURNS = 2  # number of buffers for arriving steps, and for leaving steps: one is computed, one is transferred


class Border(NamedTuple):
    """Buffers of a step's activations.

    Attributes:
        arrived: activations from the previous stage; None on the first stage.
        left: activations for the next stage; on the last stage, hidden states for the first.
        width: elements of each row of `EmbeddedRows.vectors`; 0 without image rows.
        vectors: list of one element, the arriving or leaving vectors, [N, width] float32; empty until work sets it.
    """

    arrived: torch.Tensor | None
    left: torch.Tensor
    width: int
    vectors: list[torch.Tensor]


class _Places:
    """Buffers that steps use in turn, each in an element of `memory`."""

    def __init__(self, memory: Sequence[torch.Tensor]) -> None:
        self._memory = memory
        self._free: list[Mark | None] = [None] * len(memory)
        self._held: list[list[torch.Tensor]] = [[] for _ in memory]
        self._turn = 0

    def take(self, stream: DeviceStream, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the next buffer for work on a stream, which waits until the buffer's earlier use has ended."""
        self._turn = (self._turn + 1) % len(self._memory)
        mark = self._free[self._turn]
        if mark is not None:
            stream.after(mark)
        self._held[self._turn] = []
        return _of(self._memory[self._turn], shape)

    def held(self) -> list[torch.Tensor]:
        """Return a list that keeps tensors alive while the buffer that was taken last is in use."""
        return self._held[self._turn]

    def free(self, mark: Mark) -> None:
        """Note that the buffer that was taken last is free after a mark."""
        self._free[self._turn] = mark

    def any(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return any buffer, while no step is in flight."""
        return _of(self._memory[0], shape)


class DeviceBorders:
    """Transfers of activations to and from a pipeline stage.

    Args:
        stream: the stream that computes its steps.
        tokens: maximum number of tokens of a step.
        captured: maximum number of tokens of a captured step.
    """

    def __init__(self, stage: Stage, stream: DeviceStream, tokens: int, captured: int) -> None:
        self._stage, self._stream = stage, stream
        self._tokens, self._captured = tokens, captured
        self._incoming, self._outgoing, self._returning = (stream.beside() for _ in range(3))
        self._collecting: deque[tuple[torch.Tensor, Mark]] = deque()  # steps in flight, oldest first
        self.make()

    def make(self) -> None:
        """Allocate the buffers."""
        stage, tokens = self._stage, self._tokens

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            return stage.empty(math.prod(shape)).zero_()  # padding of a captured step must be finite

        def places(count: int, shape: tuple[int, ...]) -> _Places:
            return _Places([empty(shape) for _ in range(count)])

        self._left = places(_TURNS, stage.leaves(tokens))
        self._arrived = None if stage.is_first else places(_TURNS, stage.arrives(tokens))
        self._returned = places(stage.line.size, stage.returns(tokens)) if stage.is_first else None
        arrived = None if stage.is_first else _of(empty(stage.arrives(self._captured)), stage.arrives(self._captured))
        self._still = arrived, _of(empty(stage.leaves(self._captured)), stage.leaves(self._captured))
        for each in (self._stream, self._incoming, self._outgoing, self._returning):
            each.join()

    def drop(self) -> None:
        """Free the buffers; no step may be in flight."""
        for each in (self._incoming, self._outgoing, self._returning):
            each.mark().wait()
        nothing = torch.empty(0)
        self._left, self._arrived, self._returned = _Places([nothing]), None, None
        self._still = None, nothing

    def connect(self) -> None:
        """Establish the connections by sending one padding row through all stages; all stages must call this."""
        self.leave(self.enter(1))
        if self._stage.is_first:
            self.collect()

    def enter(self, tokens: int, rows: int = 0, width: int = 0) -> Border:
        """Begin a step of `tokens` tokens, of which `rows` are image rows with vectors of `width` elements.

        Work that is launched from now on can read the activations of the previous stage.
        """
        arrived, vectors = None, None
        if self._arrived is not None:
            arrived = self._arrived.take(self._incoming, self._stage.arrives(tokens))
            self._incoming.run(functools.partial(self._stage.take, arrived))
            vectors = self._arrived.held()
            if self._stage.vectors_arrive(width):
                # Allocated only when needed, because few steps have vectors, and few stages pass them on.
                self._incoming.run(functools.partial(self._hold, vectors, (rows, width)))
                self._incoming.run(lambda: self._stage.take(vectors[0]))
            self._stream.after(self._incoming.mark())
        left = self._left.take(self._stream, self._stage.leaves(tokens))
        return Border(arrived, left, width, self._left.held() if vectors is None else vectors)

    def _hold(self, vectors: list[torch.Tensor], shape: tuple[int, int]) -> None:
        vectors.append(torch.empty(shape, dtype=torch.float32, device=self._stream.device))

    def give(self, border: Border, given: GivenTensors) -> None:
        """Set the vectors of a step's image rows to the vectors that have arrived. Call it in stream work."""
        if self._stage.vectors_arrive(border.width):
            given.vectors = border.vectors[0]

    def keep(self, border: Border, given: GivenTensors) -> None:
        """Keep the vectors that image rows pass on to the next stage. Call it in stream work."""
        if self._stage.vectors_leave(border.width):
            border.vectors[:] = [given.vectors]

    def leave(self, border: Border) -> None:
        """Send a step's activations to the next stage; the first stage also receives the step's final hidden states."""
        computed = self._stream.mark()
        self._outgoing.after(computed)
        self._outgoing.run(functools.partial(self._stage.hand_on, border.left))
        if goes_on := self._stage.vectors_leave(border.width):
            self._outgoing.run(lambda: self._stage.hand_on(border.vectors[0]))
        sent = self._outgoing.mark()
        self._left.free(sent)
        if self._arrived is not None:
            self._arrived.free(sent if goes_on else computed)
        if self._returned is not None:
            place = self._returned.take(self._returning, self._stage.returns(border.left.shape[1]))
            self._returning.after(computed)  # so all reads of this buffer for its earlier step have ended
            self._returning.run(functools.partial(self._stage.take_back, place))
            self._collecting.append((place, self._returning.mark()))

    def collect(self) -> torch.Tensor:
        """Return the hidden states [T, E] of the oldest step in flight, for work that is launched from now on.

        Only the first stage has them. They are valid until S later steps have begun, where S is the number of stages.
        """
        place, mark = self._collecting.popleft()
        self._stream.after(mark)
        return place

    # ---- captured steps, and padding steps ---------------------------------------------------------------------------

    def still(self, tokens: int) -> Border:
        """Return the buffers of a captured step of `tokens` tokens, whose addresses are fixed."""
        arrived, left = self._still
        return Border(None if arrived is None else arrived[:, :tokens], left[..., :tokens, :], 0, [])

    def fill(self, border: Border, tokens: int) -> None:
        """Copy arrived activations to a captured step's buffers of `tokens` tokens, padded. Call it in stream work."""
        arrived, _ = self._still
        if arrived is not None and border.arrived is not None:
            count = border.arrived.shape[1]
            copy(arrived[:, :count], border.arrived)
            arrived[:, count:tokens].zero_()

    def empty(self, border: Border) -> None:
        """Copy the activations for the next stage from the buffers of a captured step. Call it in stream work."""
        copy(border.left, self._still[1][..., : border.left.shape[-2], :])

    def blank(self, tokens: int) -> Border:
        """Return buffers for a padding step that is not sent, while no step is in flight."""
        stage = self._stage
        arrived = None if self._arrived is None else self._arrived.any(stage.arrives(tokens))
        return Border(arrived, self._left.any(stage.leaves(tokens)), 0, [])

    def blank_hidden(self, tokens: int) -> torch.Tensor:
        """Return a buffer for hidden states of a padding step on the first stage."""
        assert self._returned is not None
        return self._returned.any(self._stage.returns(tokens))


def _of(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the beginning of the memory, as a contiguous tensor of a shape."""
    return memory[: math.prod(shape)].view(shape)
