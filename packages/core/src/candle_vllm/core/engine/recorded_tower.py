"""A tower that is recorded once and replayed, a tile at a time, in pieces between steps (before step 4)."""

from __future__ import annotations

import itertools
import math
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.batch import Ints
from candle_vllm.core.engine.images import Encoding
from candle_vllm.core.engine.recorded_runner import compile_together
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value, step_tokens
from candle_vllm.core.kernels.recorded import Recorded
from candle_vllm.core.models.family import Tower, TowerStep

_PIECE = 0.05  # seconds that a tower's piece takes at least, but for the last; others wait for it


class RecordedTower:
    """Replays a tower on the CPU, a tile at a time; see `TowerRunner`.

    Args:
        tower: the model, its matrices in the layouts of the compiled kernels.
        team: threads that are there, of whoever closes them.
        isa: as for `RecordedRunner`.
    """

    fatal: tuple[type[Exception], ...] = ()

    def __init__(self, tower: Tower, team: ThreadTeam, isa: Isa | None = None) -> None:
        config = self._config = tower.config
        self._place = tower.place
        level, most = host_isa() if isa is None else isa, config.patches // config.cell**2
        tiles, cells = (
            StepLimits(tokens=rows, sequences=windows, logit_rows=1, table_width=0, block_size=1, threads=team.threads)
            for rows, windows in ((config.patches, most if config.windowed else 1), (most, 1))
        )

        def record() -> None:
            self._record(tower, Recorder(tiles, level))
            self._join(tower, Recorder(cells, level))

        compile_together(record)
        self._team = team
        self._tile, self._cells = Recorder(tiles, level), Recorder(cells, level)
        self._patches, self._start, self._deep, self._ends, self._hidden = self._record(tower, self._tile)
        self._joins = self._join(tower, self._cells)
        plan = np.array(self._tile.plan, np.int64)
        ends = zip(self._ends, self._ends[1:])
        self._pieces = [(plan[first:last].copy(), after - before) for (first, before), (last, after) in ends]
        bounds, ends = [0, *self._tile.ends], itertools.pairwise(each for _, each in self._ends)
        operations = [plan[first:last].copy() for first, last in itertools.pairwise(bounds)]
        self._operations = [[(each, 1) for each in operations[before:after]] for before, after in ends]  # of each piece

    @staticmethod
    def _record(
        tower: Tower, recorder: Recorder
    ) -> tuple[
        NDArray[np.float32],
        NDArray[np.float32] | None,
        dict[int, NDArray[np.float32]],
        list[tuple[int, int]],
        Recorded,
    ]:
        """Where patches go, and what x begins with; x behind `deep` layers; the ends of the plan's pieces (numbers and
        operations before), and the last norm."""
        config, given = tower.config, recorder.buffer(tower.config.patch_size)
        start = recorder.buffer(config.hidden_size) if config.learned else None
        begins = None if start is None else buffer_value(recorder, start)
        step = TowerStep(step_tokens(recorder, recorder.arrays.positions), start=begins)
        x = tower.begin(buffer_value(recorder, given), step)
        ends, deep = [(0, 0)], dict[int, NDArray[np.float32]]()
        for number, layer in enumerate(tower.layers):
            x = layer(x, step)
            ends.append((len(recorder.plan), recorder.num_rows))
            if number in config.deep:
                deep[number] = buffer_of(x).rows
        hidden: Recorded = tower.norm(x)
        if (len(recorder.plan), recorder.num_rows) != ends[-1]:
            ends.append((len(recorder.plan), recorder.num_rows))
        return given.rows, None if start is None else start.rows, deep, ends, hidden

    @staticmethod
    def _join(tower: Tower, recorder: Recorder) -> list[_Join]:
        """What makes embeddings of cells: of those of the last norm, and of each of the `deep` layers."""
        made: list[_Join] = []
        for project in (tower.project, *tower.mergers):
            recorder.begin(Adapted.NOT)
            given = recorder.buffer(tower.config.cell_size)
            found = buffer_of(project(buffer_value(recorder, given)))
            plan = np.array(recorder.plan, np.int64)
            made.append(_Join(plan, recorder.num_rows, given.rows, found.rows))
        return made

    def embeddings(self, tiles: NDArray[np.uint8]) -> Encoding:
        """See `TowerRunner`."""
        config, rows = self._config, math.prod(tiles.shape[1:3]) // self._config.patch**2
        made: list[NDArray[np.float32]] = []
        arrays, began = self._tile.arrays, time.perf_counter()
        arrays.numbers[StepNumber.TOKENS] = rows
        slow = False  # a piece takes too long for others to wait for all of it
        for tile in tiles:
            read = config.read(tile)
            placed = self._place(read.places)
            self._patches[:rows], arrays.positions[:rows] = read.patches, placed.numbers
            if self._start is not None:
                self._start[:rows] = placed.start
            deep: list[NDArray[np.float32]] = []
            for number, piece in enumerate(self._pieces):
                lengths = read.windows if number in config.windowed else (rows,)
                arrays.numbers[StepNumber.SEQUENCES] = len(lengths)
                arrays.query_start[: len(lengths) + 1] = 0, *itertools.accumulate(lengths)
                for plan, operations in self._operations[number] if slow else [piece]:
                    started = time.perf_counter()
                    self._team.run(plan, operations)
                    ended = time.perf_counter()
                    slow = slow or ended - started > _PIECE
                    if ended - began > _PIECE:
                        yield
                        began = time.perf_counter()
                if number in self._deep:
                    deep.append(self._joined(self._joins[1 + len(deep)], self._deep[number][:rows]).copy())
            found = self._joined(self._joins[0], self._hidden.rows(np.arange(rows)))
            made.append(read.in_order(np.concatenate([found, *deep], 1) if deep else found))
        return np.concatenate(made)

    def _joined(self, join: _Join, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embeddings of the cells of so many rows; good until the next call."""
        cells = self._config.cells(rows)
        join.cells[: len(cells)] = cells
        self._cells.arrays.numbers[StepNumber.TOKENS] = len(cells)
        self._team.run(join.plan, join.operations)
        return join.made[: len(cells)]


class _Join(NamedTuple):
    """What makes embeddings of cells: a plan and its operations, where the cells go, and where embeddings are."""

    plan: Ints
    operations: int
    cells: NDArray[np.float32]
    made: NDArray[np.float32]
