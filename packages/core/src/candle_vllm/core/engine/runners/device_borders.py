# SPDX-License-Identifier: MIT
"""Step 6 of a model's stage on a GPU: what comes over its borders and what goes, beside the steps that are computed.

Transfers have streams of their own, in and out and back, and places of their own for each step, so that a step is
computed while the one before is on its way out and the one behind on its way in. Layers read and write a place, or,
where they are captured, memory that never moves.

Whatever is given to a stream waits for nothing but what the hosts of all stages have given before it: were all streams
of each GPU a single one, nothing would wait in a circle either. So it does not matter how many of them a GPU runs at
once. What a stage does to a step it does in the order in which the steps began.
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

_TURNS = 2  # places for steps that arrive and that leave: one is computed, one on its way


class Border(NamedTuple):
    """Where a step's activations are.

    Attributes:
        arrived: what came from the stage before; None on the first one.
        left: what goes to the stage behind.
        width: how many numbers each row is given that stands for a picture; 0 where there are none.
        vectors: where they arrive or leave, once work has come so far: one, [N, width] float32.
    """

    arrived: torch.Tensor | None
    left: torch.Tensor
    width: int
    vectors: list[torch.Tensor]


class _Places:
    """Memory of steps in turn.

    Args:
        memory: of each.
    """

    def __init__(self, memory: Sequence[torch.Tensor]) -> None:
        self._memory = memory
        self._free: list[Mark | None] = [None] * len(memory)
        self._held: list[list[torch.Tensor]] = [[] for _ in memory]
        self._turn = 0

    def take(self, stream: DeviceStream, shape: tuple[int, ...]) -> torch.Tensor:
        """The next one, for work of a stream, which comes after what was done with it before."""
        self._turn = (self._turn + 1) % len(self._memory)
        mark = self._free[self._turn]
        if mark is not None:
            stream.after(mark)
        self._held[self._turn] = []
        return _of(self._memory[self._turn], shape)

    def held(self) -> list[torch.Tensor]:
        """Keeps what is put there as long as the place that was taken last; memory of the stream that took it."""
        return self._held[self._turn]

    def free(self, mark: Mark) -> None:
        """Behind a mark nobody uses what was taken last."""
        self._free[self._turn] = mark

    def any(self, shape: tuple[int, ...]) -> torch.Tensor:
        """One of them, while no step is under way."""
        return _of(self._memory[0], shape)


class DeviceBorders:
    """A stage's borders.

    Args:
        stage: see above.
        stream: where its steps are computed.
        tokens: most of a step.
        captured: most of a captured step.
    """

    def __init__(self, stage: Stage, stream: DeviceStream, tokens: int, captured: int) -> None:
        self._stage, self._stream = stage, stream
        self._tokens, self._captured = tokens, captured
        self._incoming, self._outgoing, self._returning = (stream.beside() for _ in range(3))
        self._landing: deque[tuple[torch.Tensor, Mark]] = deque()  # what was begun here, in order
        self.make()

    def make(self) -> None:
        """Makes its memory."""
        stage, tokens = self._stage, self._tokens

        def empty(shape: tuple[int, ...]) -> torch.Tensor:
            return stage.empty(math.prod(shape)).zero_()  # what fills a captured step up must be numbers

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
        """Gives its memory back; no step may be under way."""
        for each in (self._incoming, self._outgoing, self._returning):
            each.mark().wait()
        nothing = torch.empty(0)
        self._left, self._arrived, self._returned = _Places([nothing]), None, None
        self._still = None, nothing

    def connect(self) -> None:
        """Has a row that means nothing go round all stages, which must all do so: from then on they are connected."""
        self.leave(self.enter(1))
        if self._stage.is_first:
            self.land()

    def enter(self, tokens: int, rows: int = 0, width: int = 0) -> Border:
        """Begins a step: work that is given from now on has what the stage before hands on of it.

        Args:
            tokens: of the step.
            rows, width: how many of them stand for pictures, and how many numbers each of these is given.
        """
        arrived, vectors = None, None
        if self._arrived is not None:
            arrived = self._arrived.take(self._incoming, self._stage.arrives(tokens))
            self._incoming.run(functools.partial(self._stage.take, arrived))
            vectors = self._arrived.held()
            if self._stage.vectors_arrive(width):
                # Few steps have any, and few borders lie before the layers that add of them: no place is kept for them.
                self._incoming.run(functools.partial(self._hold, vectors, (rows, width)))
                self._incoming.run(lambda: self._stage.take(vectors[0]))
            self._stream.after(self._incoming.mark())
        left = self._left.take(self._stream, self._stage.leaves(tokens))
        return Border(arrived, left, width, self._left.held() if vectors is None else vectors)

    def _hold(self, vectors: list[torch.Tensor], shape: tuple[int, int]) -> None:
        vectors.append(torch.empty(shape, dtype=torch.float32, device=self._stream.device))

    def give(self, border: Border, given: GivenTensors) -> None:
        """Gives the rows of a step that stand for pictures what has arrived of them; work."""
        if self._stage.vectors_arrive(border.width):
            given.vectors = border.vectors[0]

    def keep(self, border: Border, given: GivenTensors) -> None:
        """Keeps what these rows hand on, behind the layers that are here; work."""
        if self._stage.vectors_leave(border.width):
            border.vectors[:] = [given.vectors]

    def leave(self, border: Border) -> None:
        """Hands on what the work that was given so far has left there; the first stage will get what comes of it."""
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
            self._returning.after(computed)  # and so after whatever was read of the step that had this place
            self._returning.run(functools.partial(self._stage.take_back, place))
            self._landing.append((place, self._returning.mark()))

    def land(self) -> torch.Tensor:
        """On the first stage the hidden states [T, E] of the first step that has not landed, for work that is given
        from now on; they stay until as many steps as there are stages have begun behind it."""
        place, mark = self._landing.popleft()
        self._stream.after(mark)
        return place

    # ---- captured steps, and those that mean nothing -----------------------------------------------------------------

    def still(self, tokens: int) -> Border:
        """The same of any captured step of so many tokens; its memory never moves."""
        arrived, left = self._still
        return Border(None if arrived is None else arrived[:, :tokens], left[..., :tokens, :], 0, [])

    def fill(self, border: Border, tokens: int) -> None:
        """Gives a captured step of so many tokens what has arrived of one of fewer; work."""
        arrived, _ = self._still
        if arrived is not None and border.arrived is not None:
            count = border.arrived.shape[1]
            copy(arrived[:, :count], border.arrived)
            arrived[:, count:tokens].zero_()

    def empty(self, border: Border) -> None:
        """Takes what a captured step has left; work."""
        copy(border.left, self._still[1][..., : border.left.shape[-2], :])

    def blank(self, tokens: int) -> Border:
        """Places for a step that means nothing and goes nowhere, while none is under way."""
        stage = self._stage
        arrived = None if self._arrived is None else self._arrived.any(stage.arrives(tokens))
        return Border(arrived, self._left.any(stage.leaves(tokens)), 0, [])

    def blank_hidden(self, tokens: int) -> torch.Tensor:
        """The same of what comes back to the first stage."""
        assert self._returned is not None
        return self._returned.any(self._stage.returns(tokens))


def _of(memory: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The beginning of memory, in one piece."""
    return memory[: math.prod(shape)].view(shape)
