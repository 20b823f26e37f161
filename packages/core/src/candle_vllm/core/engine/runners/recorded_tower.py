# SPDX-License-Identifier: MIT
"""Record a vision tower and replay it for each tile, in parts between steps (before step 4 of a request's life)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.runners.images import Encoding
from candle_vllm.core.engine.runners.recorded_runner import compile_together
from candle_vllm.core.engine.step.batch import Ints
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import PART_CODE, ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value, step_tokens
from candle_vllm.core.kernels.recorded import Recorded
from candle_vllm.core.models.tower_family import Tower, TowerStep, joined

_PIECE = 0.03  # maximum seconds of encoding between two steps, as predicted
_SLOWEST = 2e10  # assumed multiplications and additions a second before any measurement
_MOST_PARTS = 1 << 12  # maximum number of parts of an operation
_TOUCHED = 1 << 24  # bytes of memory that are touched at a time
_STRIP = 1 << 10  # number of patches that are read at a time; a quarter as many cells are projected at a time


class RecordedTower:
    """Replays a vision tower on the CPU, a tile at a time; see `TowerRunner`.

    The time of an operation is predicted from the same operation in an earlier layer or for an earlier tile. An
    operation that would delay steps for too long runs in parts.

    Args:
        tower: the model, its matrices in the layouts of the compiled kernels.
        team: the threads of the model's runner, which closes them.
    """

    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, tower: Tower, team: ThreadTeam) -> None:
        config = self._config = tower.config
        self._tower, self._place, self._cells_of = tower, tower.place, tower.cells
        level, most = host_isa(), config.patches // config.cell**2
        tiles, cells = (
            StepLimits(tokens=rows, sequences=windows, logit_rows=1, table_width=0, block_size=1, threads=team.threads)
            for rows, windows in ((config.patches, config.windows), (min(most, _STRIP // 4), 1))
        )

        def record() -> None:
            self._record(tower, Recorder(tiles, level))
            self._join(tower, Recorder(cells, level))

        compile_together(record, [PART_CODE])
        self._team = team
        self._tile, self._cells = Recorder(tiles, level), Recorder(cells, level)
        self._layers = self._record(tower, self._tile)
        self._joins = self._join(tower, self._cells)
        self._touched = 0  # patches whose memory the system has allocated
        self._took: dict[tuple[_Kind, int], tuple[int, float]] = {}  # (rows, seconds) by operation number; -1: all

    def _record(self, tower: Tower, recorder: Recorder) -> list[_Piece]:
        """Record the layers, the patch embedding before them and the norm after them."""
        config, given = tower.config, recorder.buffer(tower.config.patch_size)
        start = recorder.buffer(config.hidden_size) if config.learned else None
        begins = None if start is None else buffer_value(recorder, start)
        self._patches, self._start = given.rows, None if start is None else start.rows
        self._deep = dict[int, NDArray[np.float32]]()  # outputs of the layers in `config.deep`
        step = TowerStep(step_tokens(recorder, recorder.arrays.positions), start=begins)
        x = tower.begin(buffer_value(recorder, given), step)
        ends = [0]
        for number, layer in enumerate(tower.layers):
            x = layer(x, step)
            ends.append(recorder.num_rows)
            if number in config.deep:
                self._deep[number] = buffer_of(x).rows
        self._hidden: Recorded = tower.norm(x)
        size, inner = config.hidden_size, config.intermediate_size
        each, before = 2 * size * (2 * size + 2 * inner), 4 * size  # work for a patch, and for a pair of patches
        made = [
            _piece(recorder, first, last, number in config.windowed, (each, before))
            for number, (first, last) in enumerate(itertools.pairwise(ends))
        ]
        if recorder.num_rows != ends[-1]:
            made.append(_piece(recorder, ends[-1], recorder.num_rows, False, (0, 0)))
        return made

    @staticmethod
    def _join(tower: Tower, recorder: Recorder) -> list[_Join]:
        """Record the projections of cells to embeddings, for the outputs of the last norm and of each `deep` layer."""
        made: list[_Join] = []
        config = tower.config
        for project in (tower.project, *tower.mergers):
            recorder.begin(Adapted.NOT)
            given = recorder.buffer(config.cell_size)
            found = buffer_of(project(buffer_value(recorder, given)))
            each = 2 * config.cell_size * (config.cell_size + config.text_size)
            made.append(_Join(_piece(recorder, 0, recorder.num_rows, False, (each, 0)), given.rows, found.rows))
        return made

    def embeddings(self, tiles: Collection[NDArray[np.uint8]], whole: tuple[int, int] = (0, 0)) -> Encoding:
        config, clock = self._config, _Clock()
        ends = np.cumsum([config.count(tile) for tile in tiles])
        made = np.empty((ends[-1], config.vectors * config.text_size), np.float32)
        for tile, target in zip(tiles, np.split(made, ends[:-1])):
            yield from self._encode(tile, target, clock)
        return (yield from joined(self._tower, made, whole))

    def _encode(self, tile: NDArray[np.uint8], target: NDArray[np.float32], clock: _Clock) -> Iterator[None]:
        """Write the embeddings of a tile to `target`, [cells, vectors * text size]."""
        arrays, read = self._tile.arrays, self._config.read(tile)
        rows = len(read.places)
        yield from self._touch(rows, clock)
        for numbers, patches in read.strips(_STRIP):
            self._patches[numbers] = patches
            yield from clock.pause(clock.waited)
        for first in range(0, rows, _STRIP):
            last = min(first + _STRIP, rows)
            placed = self._place(read.places[first:last], first, read.grid)
            arrays.positions[first:last] = placed.numbers
            if self._start is not None:
                self._start[first:last] = placed.start
            yield from clock.pause(clock.waited)
        deep = 0
        for number, layer in enumerate(self._layers):
            lengths = read.lengths(number, windowed=layer.kind.windowed)
            rows = sum(lengths)
            arrays.numbers[[StepNumber.TOKENS, StepNumber.SEQUENCES]] = rows, len(lengths)
            arrays.query_start[: len(lengths) + 1] = 0, *itertools.accumulate(lengths)
            yield from self._run(layer, rows, clock)
            if number in self._deep:
                deep += 1
                x = self._deep[number]
                yield from self._project(deep, lambda numbers, x=x: x[numbers], read.order, target, clock)
        yield from self._project(0, self._hidden.rows, read.order, target, clock)

    def _touch(self, rows: int, clock: _Clock) -> Iterator[None]:
        """Touch the memory of patches beyond the largest earlier tile, in parts, because page faults take time too."""
        for array in self._tile.allocated if rows > self._touched else ():
            whole = array.view(np.uint8)
            first, last = (whole.nbytes * count // self._tile.limits.tokens for count in (self._touched, rows))
            for begin in range(first, last, _TOUCHED):
                whole[begin : min(begin + _TOUCHED, last) : 4096] = 0
                yield from clock.pause(_PIECE / 4)
        self._touched = max(self._touched, rows)

    def _project(
        self,
        number: int,
        rows_of: Callable[[Ints], NDArray[np.float32]],
        order: Ints | None,
        target: NDArray[np.float32],
        clock: _Clock,
    ) -> Iterator[None]:
        """Write the columns of a tile's embeddings that projection `number` computes from the result of `rows_of`."""
        config, join = self._config, self._joins[number]
        size, most = config.text_size, self._cells.limits.tokens
        columns = target[:, number * size : number * size + join.made.shape[1]]
        for first in range(0, len(target), most):
            last = min(first + most, len(target))
            rows = rows_of(np.arange(first * config.cell_rows, last * config.cell_rows))
            join.cells[: last - first] = config.cells(rows) if number else self._cells_of(rows)
            self._cells.arrays.numbers[StepNumber.TOKENS] = last - first
            yield from self._run(join.piece, last - first, clock)
            columns[slice(first, last) if order is None else order[first:last]] = join.made[: last - first]

    def _run(self, piece: _Piece, rows: int, clock: _Clock) -> Iterator[None]:
        """Run a piece whole; if that would take too long, run its operations one by one, in parts."""
        least = max(_PIECE, 1e-6) / 2
        expected = self._foreseen(piece.kind, -1, rows)
        if expected is None:
            expected = rows * (piece.work[0] + piece.work[1] * rows) / _SLOWEST
        if expected <= _PIECE:
            yield from clock.pause(expected)
            self._took[piece.kind, -1] = rows, _seconds(self._team.run, piece.plan, piece.kind.operations)
            return
        total = 0.0
        for number, operation in enumerate(piece.each):
            alone = self._foreseen(piece.kind, number, rows)
            alone = expected if alone is None else alone
            parts, done, step, took = min(math.ceil(alone / least), _MOST_PARTS) or 1, 0, 1, 0.0
            while done < parts:
                count = min(step, parts - done)
                yield from clock.pause(took / done * count if done else least)
                if parts == 1:
                    seconds = _seconds(self._team.run, operation, 1)
                else:
                    seconds = _seconds(self._team.run_parts, operation, done, done + count, parts)
                done, took = done + count, took + seconds
                step = max(1, min(2 * count, int(least * count / max(seconds, 1e-9))))  # an empty part takes no time
            self._took[piece.kind, number] = rows, took
            total += took
        self._took[piece.kind, -1] = rows, total

    def _foreseen(self, kind: _Kind, number: int, rows: int) -> float | None:
        """Predict an upper bound of an operation's seconds for `rows` rows; None if it has not run yet."""
        before, seconds = self._took.get((kind, number), (0, 0.0))
        if not before:
            return None
        return seconds * max(rows / before, (rows / before) ** 2)


class _Kind(NamedTuple):
    """Key of pieces that take the same time: number of operations, whether attention has windows, recorder's id."""

    operations: int
    windowed: bool
    recorder: int


class _Piece(NamedTuple):
    """Consecutive operations.

    Attributes:
        plan: the plan of all operations.
        each: the plan of each operation.
        work: multiplications and additions for each row, and for each pair of rows in attention.
    """

    plan: Ints
    each: list[Ints]
    kind: _Kind
    work: tuple[int, int]


class _Join(NamedTuple):
    """The projection of cells to embeddings, with its input and output buffers."""

    piece: _Piece
    cells: NDArray[np.float32]
    made: NDArray[np.float32]


def _piece(recorder: Recorder, first: int, last: int, windowed: bool, work: tuple[int, int]) -> _Piece:
    """Return the operations `first` to `last` of a plan as a piece."""
    ends = [0, *recorder.ends]
    plan = np.array(recorder.plan[ends[first] : ends[last]], np.int64)
    each = [np.array(recorder.plan[begin:end], np.int64) for begin, end in itertools.pairwise(ends[first : last + 1])]
    return _Piece(plan, each, _Kind(last - first, windowed, id(recorder)), work)


class _Clock:
    """Measures the time since the last pause of encoding, in which engine steps could run."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    @property
    def waited(self) -> float:
        """Seconds since the last pause."""
        return time.perf_counter() - self._began

    def pause(self, ahead: float) -> Iterator[None]:
        """Yield to steps if `ahead` more seconds would make them wait too long."""
        if self.waited + ahead > _PIECE:
            yield
            self._began = time.perf_counter()


def _seconds(run: Callable[..., object], *given: Any) -> float:
    started = time.perf_counter()
    run(*given)
    return time.perf_counter() - started
