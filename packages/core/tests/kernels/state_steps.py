# SPDX-License-Identifier: MIT
"""Texts cut into steps at random, as an engine would: chunks, checkpoints, drafts of which some are right, restarts.

What a kernel that keeps a state makes of such steps is compared with what it makes of each text in one step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from candle_vllm.core.kernels.states import TABLES, StateCache, StateRows

Inputs: TypeAlias = tuple[np.ndarray, ...]
Run: TypeAlias = Callable[[Inputs, StateRows, np.ndarray], np.ndarray]
"""A step: inputs [T, ...] of its rows, what it does with states, positions of the rows -> its results [T, ...]."""

DRAFTS = 4


def whole_rows(tokens: int, *, slot: int = 0, first: int = 0) -> StateRows:
    """One text in one step: the state behind each row goes to the slots from `first` on."""
    return StateRows(
        query_start=np.array([0, tokens]),
        slots=np.array([slot]),
        sources=np.array([-1]),
        replays=np.array([0]),
        stores=np.arange(first, first + tokens),
        keeps=np.full(tokens, -1),
    )


@dataclasses.dataclass
class _Sequence:
    """A text that runs.

    Attributes:
        slot: in which it runs.
        done: tokens that are in the state of `source`.
        kept: drafts behind them that were right.
        source: where its state is; -1 for nowhere.
    """

    slot: int
    done: int = 0
    kept: int = 0
    source: int = -1


@dataclasses.dataclass
class Cuts:
    """Runs texts in random steps and compares results and states with those of whole texts.

    Args:
        texts: inputs [N, ...] of each text.
        run: the kernel; keeps its states between the calls.
        states: all slots, [slots, ...]: one for each text, `spare` behind them.
        wanted: results and the states behind each token, of each whole text.
        check, check_state: compare results, and states, that were found with those that are wanted.
        most: tokens of a chunk.
    """

    texts: Sequence[Inputs]
    run: Run
    states: Callable[[int], np.ndarray]
    spare: int
    wanted: Sequence[tuple[np.ndarray, np.ndarray]]
    check: Callable[[np.ndarray, np.ndarray], None]
    check_state: Callable[[np.ndarray, np.ndarray], None]
    seed: int = 0
    most: int = 9
    drafts: int = DRAFTS
    grain: int = 1

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.sequences = [_Sequence(slot) for slot in range(len(self.texts))]
        self.checkpoints: dict[int, tuple[int, int]] = {}  # by slot: text, and tokens
        self.seen = {"replayed": 0, "restarted": 0, "together": 0, "stored": 0}

    def all(self) -> None:
        """Steps until every text is at its end."""
        while any(not self._ended(number) for number in range(len(self.texts))):
            self.step()
        assert all(self.seen.values()), self.seen

    def _ended(self, number: int) -> bool:
        return self.sequences[number].done + self.sequences[number].kept >= len(self.texts[number][0])

    def step(self) -> None:
        """A step of some texts."""
        running = [n for n in self.random.permutation(len(self.texts)) if not self._ended(n)]
        running = running[: self.random.integers(1, len(running) + 1)]
        free = list(range(len(self.texts), len(self.texts) + self.spare))
        self.random.shuffle(free)
        for number in running:
            if self.random.random() < 0.5:
                self._restart(number)
        used = {self.sequences[number].source for number in running}
        free = [slot for slot in free if slot not in used]
        rows: dict[str, list[Any]] = {name: [] for name in TABLES}
        rows["query_start"] = [0]
        inputs, positions, spans = [], [], []
        for number in running:
            sequence, text = self.sequences[number], self.texts[number]
            begin, length = sequence.done + sequence.kept, len(text[0])
            certain = int(min(self.random.integers(1, self.most + 1) * self.grain, length - begin))
            end = begin + certain
            right = int(min(self.random.integers(0, self.drafts + 1), length - end))
            wrong = int(self.random.integers(0, self.drafts - right + 1))
            inputs.append(tuple(part[begin : end + right] for part in text))
            inputs.append(tuple(self.random.permuted(part[:wrong], axis=-1) + 1 for part in text))
            wrong = len(inputs[-1][0])
            stores = [-1] * (certain + right + wrong)
            stores[certain - 1] = sequence.slot
            for place in range(certain - 1):
                if free and self.random.random() < 0.4 / self.grain:
                    stores[place] = free.pop()
                    self.checkpoints[stores[place]] = (number, begin + place + 1)
                    self.seen["stored"] += 1
            rows["stores"] += stores
            rows["keeps"] += [-1] * certain + list(range(right + wrong))
            rows["query_start"].append(rows["query_start"][-1] + len(stores))
            rows["slots"].append(sequence.slot)
            rows["sources"].append(sequence.source)
            rows["replays"].append(sequence.kept)
            positions += range(begin, begin + len(stores))
            spans.append((number, rows["query_start"][-2], begin, end + right))
            self.seen["replayed"] += sequence.kept
            self.sequences[number] = _Sequence(sequence.slot, end, right, sequence.slot)
        self.seen["together"] += len(running) > 1
        whole = tuple(np.concatenate(parts) for parts in zip(*inputs))
        made = StateRows(**{name: np.array(numbers, np.int64) for name, numbers in rows.items()})
        found = self.run(whole, made, np.array(positions, np.int64))
        for number, first, begin, end in spans:
            results, behind = self.wanted[number]
            self.check(found[first : first + end - begin], results[begin:end])
            self.check_state(self.states(self.sequences[number].slot), behind[self.sequences[number].done - 1])
        for slot, (number, tokens) in self.checkpoints.items():
            self.check_state(self.states(slot), self.wanted[number][1][tokens - 1])

    def _restart(self, number: int) -> None:
        """The text goes on from a checkpoint of its own, behind which nothing was kept."""
        slots = [slot for slot, (text, _) in self.checkpoints.items() if text == number]
        if slots:
            slot = int(self.random.choice(slots))
            self.sequences[number] = _Sequence(self.sequences[number].slot, self.checkpoints[slot][1], 0, slot)
            self.seen["restarted"] += 1


# ---- compiled --------------------------------------------------------------------------------------------------------


class Compiled:
    """The recorded operations of a kernel, with states between NaN.

    Args:
        widths: of its inputs, which stand side by side, with something between them.
        make: records it, given its inputs and the cache.
        shape, inputs: of a state and of a kept row.
        slots: of states, and of kept rows.
        threads: of the team.
        tokens: of the largest step.
        drafts: rows that can be kept.
    """

    def __init__(
        self,
        widths: Sequence[int],
        make: Callable[[list[Any], StateCache], Any],
        shape: tuple[int, ...],
        inputs: int,
        slots: int,
        threads: int,
        *,
        tokens: int = 80,
        drafts: int = DRAFTS,
    ) -> None:
        from candle_vllm.core.kernels.cpu_runtime.level import host_isa
        from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
        from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
        from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

        limits = StepLimits(
            tokens=tokens,
            sequences=8,
            logit_rows=1,
            table_width=0,
            block_size=1,
            threads=threads,
            states=True,
        )
        self.recorder = Recorder(limits, host_isa())
        self.team, self.shape, self.inputs = ThreadTeam(threads), shape, inputs
        sizes = [size for width in widths for size in (3, width)]
        self.source = self.recorder.buffer(sum(sizes))
        self.places = np.cumsum([0, *sizes])[1::2]
        self.states = np.full((slots, 2, *shape), np.nan, np.float32)  # of two layers
        self.kept = np.full((slots, drafts, inputs + 3), np.nan, np.float32)
        self.cache = StateCache(self.states[:, 1], self.kept[:, :, :inputs])
        self.result = make(buffer_value(self.recorder, self.source).split(sizes, -1)[1::2], self.cache)

    def run(self, inputs: Inputs, rows: StateRows, positions: np.ndarray) -> np.ndarray:
        """A step; nothing that is not its own is read or written."""
        recorder, tokens = self.recorder, len(inputs[0])
        self.lay_out(inputs, rows)
        self.team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
        found = self.result.rows(np.arange(recorder.limits.tokens))
        assert np.isnan(found[tokens:]).all()
        assert np.isnan(self.states[:, 0]).all()
        assert np.isnan(self.kept[:, :, self.inputs :]).all()
        return found[:tokens]

    def lay_out(self, inputs: Inputs, rows: StateRows) -> None:
        """Writes down what a step is given, and NaN wherever it writes."""
        from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber

        recorder, tokens = self.recorder, len(inputs[0])
        for memory in recorder.allocated:
            memory[:] = np.nan
        for place, part in zip(self.places, inputs):
            self.source.rows[:tokens, place : place + part[0].size] = part.reshape(tokens, -1)
        for name, numbers in rows.tables.items():
            array = getattr(recorder.arrays.states, name)
            array[:] = 10**6
            array[: len(numbers)] = numbers
        recorder.arrays.numbers[StepNumber.TOKENS] = tokens
        recorder.arrays.numbers[StepNumber.SEQUENCES] = len(rows.slots)

    def state(self, slot: int) -> np.ndarray:
        """What stands in a slot."""
        return self.cache.states[slot]


def tensors(rows: StateRows) -> StateRows:
    """What a step does with states, for torch."""
    import torch

    return StateRows(**{name: torch.from_numpy(numbers) for name, numbers in rows.tables.items()})


def random(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """A check."""
    assert np.array_equal(got, wanted)


def close_to(got: np.ndarray, wanted: np.ndarray) -> None:
    """Another, for plain torch, whose functions round a vector's numbers otherwise than those behind the last one."""
    assert error(got, wanted) < 1e-6
