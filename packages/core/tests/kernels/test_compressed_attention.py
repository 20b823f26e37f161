# SPDX-License-Identifier: MIT
"""Compressed entries: the reference by the definition, and the CPU's operations as the reference."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core.kernels.attention.rows import AttentionRows, PagedCache
from candle_vllm.core.kernels.compressed_attention import EntryParts, Groups, IndexQueries, entry_share
from candle_vllm.core.kernels.compressed_attention.cpu_record import RecordedStep
from candle_vllm.core.kernels.compressed_attention.reference import TorchStep
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value

HEADS, SIZE, INDEX_HEADS, INDEX_SIZE, HALF, EPS, LONGEST, WINDOW, TOP = 3, 48, 5, 32, 4, 1e-5, 160, 20, 6
STEPS = (  # first position and number of tokens of each sequence, in steps that follow each other
    ((0, 37), (0, 1), (0, 70)),
    ((37, 1), (1, 5), (70, 27)),
    ((38, 90), (6, 1), (97, 31)),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer with random weights, and the inputs of all tokens of three sequences."""

    groups: Groups | None
    indexed: bool
    block: int

    def random(self, *shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * math.prod(shape)))

    @property
    def all_groups(self) -> list[Groups]:
        if self.groups is None:
            return []
        keys = Groups(self.groups.ratio, INDEX_SIZE, self.groups.overlaps)
        return [self.groups, keys] if self.indexed else [self.groups]

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(LONGEST)[:, None] * 0.3 ** torch.arange(HALF)
        return angles.cos(), angles.sin()

    def parts(self, number: int, groups: Groups) -> EntryParts:
        bias, norm = self.random(groups.ratio, groups.width, seed=number), 1 + self.random(groups.size, seed=number) / 9
        return EntryParts(bias, norm, EPS)

    def given(self, sequence: int) -> list[torch.Tensor]:
        """Queries, rows before the norm, inputs of each kind of entry, and an index's queries and weights."""
        widths = [HEADS * SIZE, SIZE, *[2 * each.width for each in self.all_groups]]
        widths += [INDEX_HEADS * INDEX_SIZE, INDEX_HEADS] if self.indexed else []
        return [self.random(LONGEST, width, seed=1 + sequence + 7 * n) for n, width in enumerate(widths)]


def by_definition(problem: Problem, sequence: int, position: int) -> torch.Tensor:
    """The result [H, D] of one token, from all inputs of its sequence."""
    q, kv, *more = problem.given(sequence)
    cos, sin = problem.tables

    def turned(x: torch.Tensor, at: int, sign: float = 1.0) -> torch.Tensor:
        x = x.clone()
        for i in range(HALF):
            one, two = x[..., -2 * HALF + 2 * i].clone(), x[..., -2 * HALF + 2 * i + 1].clone()
            x[..., -2 * HALF + 2 * i] = one * cos[at, i] - sign * two * sin[at, i]
            x[..., -2 * HALF + 2 * i + 1] = two * cos[at, i] + sign * one * sin[at, i]
        return x

    def entry(number: int, groups: Groups, parts: EntryParts, inputs: torch.Tensor) -> torch.Tensor:
        ratio, size, values, gates = groups.ratio, groups.size, list[torch.Tensor](), list[torch.Tensor]()
        for group in (number - 1, number) if groups.overlaps and number else (number,):
            half = slice(None) if not groups.overlaps else slice(size, None) if group == number else slice(size)
            kv, gate = inputs[group * ratio : (group + 1) * ratio].split(groups.width, 1)
            values.append(kv[:, half])
            gates.append((gate + parts.bias)[:, half])
        pooled = (torch.cat(values) * torch.cat(gates).softmax(0)).sum(0)
        return turned(pooled / (pooled.square().mean() + EPS).sqrt() * parts.norm, number * ratio)

    norm = 1 + problem.random(SIZE, seed=5) / 9
    rows = [
        turned(kv[at] / (kv[at].square().mean() + EPS).sqrt() * norm, at)
        for at in range(max(0, position - WINDOW + 1), position + 1)
    ]
    if problem.groups is not None:
        kinds = [(each, problem.parts(n, each), more[n]) for n, each in enumerate(problem.all_groups)]
        numbers = [*range((position + 1) // problem.groups.ratio)]
        if problem.indexed and len(numbers) > TOP:
            own = turned(more[2][position].view(INDEX_HEADS, INDEX_SIZE), position)
            scores = [float((own @ entry(n, *kinds[1])).relu() @ more[3][position]) for n in numbers]
            numbers = sorted(numbers, key=lambda n: -scores[n])[:TOP]
        rows += [entry(n, *kinds[0]) for n in numbers]
    keys, query = torch.stack(rows), turned(q[position].view(HEADS, SIZE), position)
    scores = torch.cat([query @ keys.T * SIZE**-0.5, problem.random(HEADS, seed=3)[:, None]], 1)
    return turned(scores.softmax(1)[:, :-1] @ keys, position, -1.0)


def caches_of(problem: Problem, blocks: int) -> tuple[PagedCache, PagedCache]:
    """Caches whose rows are NaN until they are written."""
    shares = [entry_share(each.size, each.ratio) for each in problem.all_groups]
    widths = [SIZE, sum(2 * each.width for each in problem.all_groups)]
    made = [torch.full((blocks, problem.block, 1, width), math.nan) for width in (*widths, *shares, 0, 0)[:4]]
    return PagedCache(made[0], made[1]), PagedCache(made[2], made[3])


def eager_step(problem: Problem, caches: tuple[PagedCache, PagedCache], rows: AttentionRows) -> torch.Tensor:
    at = [
        torch.arange(context - rows.query_start[n + 1] + rows.query_start[n], context)
        for n, context in enumerate(rows.context_lens)
    ]
    positions = torch.cat(at)
    given = [torch.cat(each) for each in zip(*[[x[own] for x in problem.given(n)] for n, own in enumerate(at)])]
    blocks = torch.cat([rows.block_tables[n, own // problem.block] for n, own in enumerate(at)])
    slots = blocks * problem.block + positions % problem.block
    q, kv, *more = given
    normed = kv * torch.rsqrt(kv.square().mean(-1, keepdim=True) + EPS) * (1 + problem.random(SIZE, seed=5) / 9)
    step = TorchStep(positions, problem.tables, *caches, slots, rows, rows)
    return attended(problem, step, caches, q.view(-1, HEADS, SIZE), normed[:, None], more)


def attended(problem: Problem, step: Any, caches: tuple[PagedCache, PagedCache], q: Any, kv: Any, more: Any) -> Any:
    """The result [T, H, D] of a step's operations, of heads of queries and normed rows, and the other inputs."""
    step.write([step.turned(kv)], caches[0].keys)
    inputs, first, index = more[: len(problem.all_groups)], 0, None
    if inputs:
        step.write(inputs, caches[0].values)
    for n, groups in enumerate(problem.all_groups):
        parts = problem.parts(n, groups)
        if isinstance(step, RecordedStep):
            parts = EntryParts(parts.bias.numpy(), parts.norm.numpy(), EPS)
        step.compress(first, caches[1][n], groups, parts)
        first += 2 * groups.width
    if problem.indexed:
        own = step.turned(more[2].unflatten(-1, (-1, INDEX_SIZE)))
        index = IndexQueries(own, more[3], caches[1].values, problem.all_groups[1], TOP)
    sinks: Any = problem.random(HEADS, seed=3)
    sinks = sinks.numpy() if isinstance(step, RecordedStep) else sinks
    return step.attend(step.turned(q), sinks, WINDOW, SIZE**-0.5, problem.groups, index)


def rows_of(step: tuple[tuple[int, int], ...], block: int) -> AttentionRows:
    starts = np.cumsum([0, *[count for _, count in step]]).tolist()
    width = -(-LONGEST // block)
    tables = torch.randperm(3 * width, generator=torch.Generator().manual_seed(2)).view(3, width)
    return AttentionRows(tuple(starts), tuple(first + count for first, count in step), tables)


PROBLEMS = [
    Problem(None, False, 16),
    Problem(Groups(4, SIZE, True), True, 16),
    Problem(Groups(8, SIZE, True), True, 64),
    Problem(Groups(4, SIZE, False), False, 32),
    Problem(Groups(32, SIZE, False), False, 16),
    Problem(Groups(16, SIZE, True), False, 16),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_reference_by_the_definition(problem: Problem) -> None:
    caches = caches_of(problem, 3 * -(-LONGEST // problem.block))
    for step in STEPS:
        made = eager_step(problem, caches, rows_of(step, problem.block))
        at = 0
        for sequence, (first, count) in enumerate(step):
            for position in {first, first + count // 2, first + count - 1}:
                torch.testing.assert_close(
                    made[at + position - first], by_definition(problem, sequence, position), rtol=1e-4, atol=1e-5
                )
            at += count


@pytest.mark.parametrize(
    ("problem", "threads", "isa"),
    [*((problem, threads, host_isa()) for problem in PROBLEMS for threads in (1, 3)), (PROBLEMS[1], 2, Isa.GENERIC)],
    ids=str,
)
def test_the_operations_as_the_reference(problem: Problem, threads: int, isa: Isa) -> None:
    blocks, width = 3 * -(-LONGEST // problem.block), -(-LONGEST // problem.block)
    wanted, own = caches_of(problem, blocks), caches_of(problem, blocks)
    both = [PagedCache(*[part.numpy().transpose(2, 0, 1, 3) for part in each]) for each in own]
    limits = StepLimits(
        tokens=150, sequences=3, logit_rows=1, table_width=width, block_size=problem.block, threads=threads
    )
    recorder = Recorder(limits, isa)
    buffers = [recorder.buffer(each.shape[1]) for each in problem.given(0)]
    q, kv, *more = (buffer_value(recorder, buffer) for buffer in buffers)
    norm, tables = (1 + problem.random(SIZE, seed=5) / 9).numpy(), [table.numpy() for table in problem.tables]
    recorded = RecordedStep(recorder, (tables[0], tables[1]), *both)
    q, kv = q.unflatten(-1, (-1, SIZE)), kv.unflatten(-1, (-1, SIZE)).rms_norm(norm, EPS)
    made = buffer_of(attended(problem, recorded, (both[0], both[1]), q, kv, more))
    team, arrays = ThreadTeam(threads), recorder.arrays
    for step in STEPS:
        rows = rows_of(step, problem.block)
        expected = eager_step(problem, wanted, rows)
        at = 0
        for sequence, (first, count) in enumerate(step):
            positions = torch.arange(first, first + count)
            for buffer, values in zip(buffers, problem.given(sequence), strict=True):
                buffer.rows[at : at + count] = values[positions].numpy()
            arrays.positions[at : at + count] = positions.numpy()
            slots = rows.block_tables[sequence, positions // problem.block] * problem.block + positions % problem.block
            arrays.slots[at : at + count] = slots.numpy()
            at += count
        arrays.query_start[:], arrays.context_lens[:] = rows.query_start, rows.context_lens
        arrays.block_tables[:] = rows.block_tables.numpy()
        arrays.numbers[[StepNumber.TOKENS, StepNumber.SEQUENCES]] = at, 3
        made.array[:] = np.nan
        team.run(np.array(recorder.plan, np.int64), recorder.num_rows)
        found = torch.from_numpy(made.rows[:at].copy())
        assert float((found - expected.flatten(1)).square().mean().sqrt() / expected.square().mean().sqrt()) < 1e-5
        assert np.isnan(made.rows[at:]).all()
    team.close()
