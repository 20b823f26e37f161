# SPDX-License-Identifier: MIT
"""Record a step's kernel calls once and replay them: the layers run on recorded values, and steps replay the plan.

On the CPU a plan is a table of operations over fixed buffers, which the threads of a `ThreadTeam` run in one call. A
plan serves all steps up to its limits; it reads what varies (tokens, positions, tables) from arrays. Steps with
adapters have other plans, and so may steps of which only sampled rows are read. A plan pauses to write image rows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.runners.model_runner import EncoderRunner, SampledStep, StepwiseRunner
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, Ints, StepMemory, in_pages, turns
from candle_vllm.core.kernels import sampling
from candle_vllm.core.kernels.attention.cpu_cache import (
    PLAIN,
    CacheKind,
    key_cache_shape,
    number_bytes,
    value_cache_shape,
)
from candle_vllm.core.kernels.attention.rows import PagedCache, WindowedCache
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.cpu_runtime import team
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.numa import CpuRanks
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, compile_first, operation
from candle_vllm.core.kernels.cpu_runtime.recorder import (
    Adapted,
    EntryArrays,
    MeasuredKeys,
    Recorder,
    StepLimits,
    aligned,
)
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import buffer_of, buffer_value, step_tokens
from candle_vllm.core.kernels.cpu_runtime.weight_memory import drop_pages
from candle_vllm.core.kernels.latent_attention.layout import cache_shape as latent_cache_shape
from candle_vllm.core.kernels.recorded import Recorded, Value
from candle_vllm.core.kernels.sampling import RowDraw, draw
from candle_vllm.core.kernels.states import StateCache
from candle_vllm.core.layers.attention import StepInput, Taps
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading import cache_specs
from candle_vllm.core.memory import MIB, cache_bytes, room_for
from candle_vllm.core.models.family import Decoder, DraftHead, Encoder
from candle_vllm.core.sampling.sampler import Draw, Sampler, Token, right_runs, sampled_tokens
from candle_vllm.core.sampling.state import SamplingState

_APART = 1597  # distance between the positions at which successive tokens are measured


class RecordedRunner(StepwiseRunner):
    """Replays a decoder on the CPU; see `ModelRunner` and `BlockMemory`.

    Args:
        decoder: the model, its matrices in the layouts of the compiled kernels.
        num_blocks: blocks of the cache.
        limits: the largest step.
        isa: instruction sets that the kernels may use; None for those of `host_level`.
        team: threads of another runner, which closes them; None to start threads. Two teams would compete for the CPUs.
        taps: layers whose inputs `hidden_rows` returns; None for the output of the last norm.
        images: vectors per image row: its embedding, and one per layer that adds a vector; 0 for a text-only model.
        whole: whether `hidden_rows` may be called for any row of any step.
        kinds: types in which keys and values are stored.
        turning: the model's rotary embedding with table rows for a step's image tokens; None without M-RoPE.
        room: number of slots for layer states.
        windows: page pools of layers with a window.

    Attributes:
        caches: the cache of each layer.
        page_of: [G, num_blocks] page tables of G pools, see `WindowedBlocks`.
    """

    caches: tuple[Any, ...] = ()

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        limits: StepLimits,
        isa: Isa | None = None,
        team: ThreadTeam | None = None,
        taps: Sequence[int] | None = None,
        *,
        images: int = 0,
        whole: bool = False,
        kinds: tuple[CacheKind, CacheKind] = PLAIN,
        turning: Rotary | None = None,
        room: cache_specs.StateRoom = cache_specs.NO_STATES,
        windows: Sequence[cache_specs.WindowRoom] = (),
    ) -> None:
        config, pools = decoder.config, len(windows)
        limits = dataclasses.replace(limits, turned=turning is not None, states=room.running > 0, pools=pools)
        self.page_of = np.zeros((pools, num_blocks), np.int64)
        self._turning, self._turned = turning, False  # whether the last step had `turned` rows
        specs = config.cache_specs
        counts = [(spec, cache_specs.pages_of(spec, windows, num_blocks)) for spec in cache_specs.paged(specs)]
        tokens = [(spec, count * limits.block_size) for spec, count in counts]
        wide = config.compresses  # the kernels of compressed entries have float32 caches
        element_bytes = (lambda _: 4.0) if wide else lambda key_dim: number_bytes(key_dim, kinds)
        size = sum(cache_bytes([spec], count, element_bytes) for spec, count in tokens)
        less = "set kv_cache_memory={} (bytes)".format
        with room_for("the KV cache", size, "kv_cache_memory", lambda left: less(max(1, left // 2 // MIB) * MIB)):
            caches = _caches(
                *(specs, num_blocks, limits.block_size, None if config.latent or wide else kinds, limits.ranks),
                *(room, windows),
                wide=wide,
            )
        super().__init__()
        self._recorder = recorder = Recorder(limits, host_isa() if isa is None else isa)
        nothing: Any = None  # inputs that vary are read when the plan runs
        self._taps = tuple(taps or ())
        self._looked_up = _RecordedGiven(images) if images else None
        kept = None if taps is None else Taps(taps)
        self.caches = caches or self.caches
        step = StepInput(nothing, nothing, nothing, self.caches, taps=kept, given=self._looked_up)
        shared = [isinstance(spec, cache_specs.SharedKVSpec) for spec in specs]
        own = [cache for cache, other in zip(caches, shared, strict=True) if not other]
        self._own = [cache for cache in own if isinstance(cache, PagedCache)]
        self._states = [part for cache in own if not isinstance(cache, PagedCache) for part in cache]
        self._decoder, self._step = decoder, step
        readers = itertools.takewhile(lambda spec: isinstance(spec, cache_specs.SharedKVSpec), reversed(specs))
        self._readers = sum(1 for _ in readers)  # number of last layers without own keys and values
        self._narrows_at = config.num_layers - max(self._readers, 1)
        self._narrows = not whole and decoder.narrows and images <= self._narrows_at + 1

        def record_all() -> None:
            for adapted in (Adapted.NOT, Adapted.ADDED)[: 2 if limits.adapter_rank else 1]:
                self._record(Recorder(limits, recorder.isa), adapted)
            if self._narrows:
                self._record(Recorder(limits, recorder.isa), Adapted.NOT, narrows=True)

        compile_together(record_all, sampling.CODE, sampling.RARE_CODE)
        hidden, *ends = self._record(recorder, Adapted.NOT)
        assert recorder.logits is not None
        self._logits = self._wanted = recorder.logits
        self._owns_team, self.team = team is None, ThreadTeam(limits.threads, limits.ranks) if team is None else team
        self._arrays = arrays = recorder.arrays
        self._draw_rows = RowDraw(recorder.logits, arrays.numbers, self.team, arrays)
        self._sample_drafted = RowDraw(recorder.logits, arrays.numbers, self.team)
        self._sampler = Sampler(_drawing(self), self._draw_rows.controls, self._sample_drafted.controls)
        self._plan = self._planned(hidden, *ends)  # plan of the last step
        self._plans = {(Adapted.NOT, False): self._plan}
        if limits.adapter_rank:
            self._plan_of(Adapted.ADDED)
        self._adapters: AdapterRows | None = None  # adapters of the last step
        self._plan_samples = False  # whether the last step's plan sampled
        # The rows of the last logits, which are the same object in most steps, and the tokens sampled from them. In a
        # step that `goes_on` no numpy function is called, because reading the weights evicts numpy from the CPU caches.
        self._rows, self._ids = np.empty(0, np.int64), memoryview(b"")

    def _record(
        self, recorder: Recorder, adapted: Adapted, *, narrows: bool = False
    ) -> tuple[list[Recorded], int, int]:
        """Record a plan; return the layers' output and tapped inputs, and where the head begins in the plan.

        With `narrows`, the layers after the last write to the cache run only rows whose logits are wanted.
        """
        recorder.begin(adapted)
        if self._looked_up is not None:
            self._looked_up.begin(recorder)
        step = dataclasses.replace(self._step, positions=step_tokens(recorder, recorder.arrays.positions), shared={})
        if narrows:
            narrowed: dict[str, Any] = {"narrowed" if self._readers else "narrows": self._narrows_at}
            step = dataclasses.replace(step, **narrowed)
        hidden = self._layers(self._decoder, recorder, step)
        ends = len(recorder.plan), recorder.num_rows
        self._decoder.logits(hidden)
        kept = self._step.taps
        return [hidden, *([] if kept is None else [kept.values[layer] for layer in self._taps])], *ends

    def measure_keys(self, batches: Iterable[Batch], positions: int) -> tuple[list[MeasuredKeys], int]:
        """Run steps, and return sums over each layer's keys and queries, as if tokens were spread over positions below
        `positions`; also return the number of tokens."""
        recorder, done = self._recorder, 0
        recorder.measured, at = [], recorder.measured_at
        _, size, count = self._record(recorder, Adapted.NOT)
        measured, recorder.measured = recorder.measured, None
        plan = np.array(recorder.plan[:size], np.int64)
        for batch in batches:
            if len(self.page_of):
                self._find_pages(batch)
            self._lay_out(batch)
            recorder.look_up()
            tokens = batch.tokens.shape[1]
            at[:tokens] = np.arange(done, done + tokens) * _APART % positions
            self.team.run(plan, count)
            done += tokens
        return measured, done

    @property
    def fits(self) -> list[NDArray[np.float32]]:
        """`PagedCache.fit` of the layers with quantised keys."""
        return [cache.fit for cache in self._own if cache.fit is not None]

    @property
    def fit_mark(self) -> str:
        """Hash of what the quantised keys of all layers were fitted to, which also determines the bytes of a block."""
        return hashlib.sha256(b"".join(fit.tobytes() for fit in fits)).hexdigest()[:16] if (fits := self.fits) else ""

    def _layers(self, decoder: Any, recorder: Recorder, step: StepInput) -> Recorded:
        """Record the layers before the head; return the hidden states that the head reads."""
        return decoder.forward(step_tokens(recorder), step)

    @property
    def step_memory(self) -> StepMemory:
        return self._arrays

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """See `ModelRunner`. If the sampler does not edit the logits, the plan samples as well."""
        sampler, moves = self._sampler, False
        if batch.drafted:
            self._plan_samples = sampler.only_samples_runs(states, [run.drafts for run in batch.drawing])
        else:
            self._plan_samples = moves = bool(states) and sampler.only_samples(states, goes_on=batch.goes_on)
        self._arrays.moved_on = moves
        super().forward(batch, states)

    def draw(self, states: Sequence[SamplingState]) -> SampledStep:
        if not self._plan_samples:
            return super().draw(states)
        ids, drafts = self._ids.tolist(), self._drafts
        tokens: Sequence[Token] = ids
        if -1 in ids:
            rows = self._draw_rows if drafts is None else self._sample_drafted
            tokens = sampled_tokens(ids, rows.largest[: len(ids)].tolist())
        return SampledStep(tokens if drafts is None else right_runs(tokens, drafts))

    def run(self, batch: Batch) -> NDArray[np.float32]:
        if len(self.page_of):
            self._find_pages(batch)
        if batch.goes_on and batch.sampled_rows is self._rows:
            if self._recorder.look_ups:
                self._recorder.look_up()
            self.team.run(self._plan.rows, self._plan.count + self._plan_samples)
            return self._wanted
        self._lay_out(batch)
        if self._recorder.look_ups:
            self._recorder.look_up()
        self._adapters = batch.adapters
        narrows = self._narrows and batch.ends_alone and batch.adapters is None and batch.ahead is None
        self._plan = plan = self._plan_of(_lay_out_adapters(self._recorder, batch.adapters), narrows=narrows)
        if narrows:
            starts = np.searchsorted(batch.sampled_rows, batch.query_start)
            self._arrays.wanted_start[: len(starts)] = starts
        rows, count = plan.of_runs if batch.drafted else plan.rows, plan.count + self._plan_samples
        if (given := batch.embedded) is not None:
            done, parts = 0, plan.between_stops[batch.drafted]
            for number, (stop, part) in enumerate(zip(plan.stops, parts)):
                self.team.run(part, stop.operations - done)
                done, size = stop.operations, stop.rows.shape[1]
                vectors = given.vectors[:, number * size : (number + 1) * size]
                stop.rows[given.rows] = stop.rows[given.rows] + vectors if number else vectors
            rows, count = parts[-1], count - done
        return self._with_rows(batch.sampled_rows, rows, count)

    def _find_pages(self, batch: Batch) -> None:
        """Write slots and block tables of layers with a window."""
        arrays, (sequences, width) = self._arrays, batch.block_tables.shape
        if batch.goes_on and not batch.begun:
            arrays.page_slots[:, :sequences] += 1
            return
        slots, tables = in_pages(batch, self.page_of, self._recorder.limits.block_size)
        arrays.page_slots[:, : slots.shape[1]], arrays.page_tables[:, :sequences, :width] = slots, tables

    def _lay_out(self, batch: Batch) -> None:
        arrays, count, sequences = self._arrays, batch.tokens.shape[1], len(batch.context_lens)
        assert batch.tokens.base is arrays.tokens
        arrays.query_start[: sequences + 1] = batch.query_start
        arrays.numbers[StepNumber.TOKENS] = count
        arrays.numbers[StepNumber.SEQUENCES] = sequences
        if len(arrays.ahead):
            arrays.ahead[:count] = 0 if batch.ahead is None else batch.ahead
        assert batch.ahead is None or len(arrays.ahead)
        if arrays.turns is not None and self._turning is not None:
            turned = batch.turned
            if turned is not None:
                arrays.turns[:count] = turns(turned, batch.positions, self._turning.turn(turned.places))
            elif self._turned:
                arrays.turns[:] = 0
            self._turned = turned is not None

    def score(self, rows: Ints) -> NDArray[np.float32]:
        return self._with_rows(rows, self._plan.head, self._plan.head_count)

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        return self._plan.hidden.rows(rows).sum(-2, dtype=np.float64)

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        return np.concatenate([value.rows(rows) for value in self._plan.kept or (self._plan.hidden,)], 1)

    @property
    def block_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts(0, state=False))

    @property
    def state_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts(0, state=True))

    def copy_out(self, place: int, *, state: bool = False) -> Callable[[], bytearray]:
        parts, start = self._parts(place, state=state), 0
        data = bytearray(sum(part.nbytes for part in parts))
        flat = np.frombuffer(data, np.uint8)
        for part in parts:
            flat[start : start + part.nbytes].view(part.dtype).reshape(part.shape)[...] = part
            start += part.nbytes
        return lambda: data

    def copy_in(self, place: int, data: bytes | bytearray | memoryview, *, state: bool = False) -> None:
        flat, start = np.frombuffer(data, np.uint8), 0
        for part in self._parts(place, state=state):
            part[...] = flat[start : start + part.nbytes].view(part.dtype).reshape(part.shape)
            start += part.nbytes

    def _parts(self, place: int, *, state: bool) -> list[NDArray[Any]]:
        """Return views of a block of the cache, or of a state slot, in all layers."""
        if state:
            return [part.states[place] for part in self._states]
        own, parts = self._own, list[NDArray[Any]]()
        for which in range(2):
            for part, cache in ((cache[which], cache) for cache in own if cache[which] is not None):
                at = int(self.page_of[cache.pool, place]) if isinstance(cache, WindowedCache) else place
                if part.ndim == 4:  # latent attention: [stretches, blocks, S, width]
                    parts.append(part[divmod(at, part.shape[1])])
                else:  # [stretches, heads, blocks, ...]
                    parts.append(part[at // part.shape[2], :, at % part.shape[2]])
        return parts

    def drop_cache(self) -> None:
        caches: list[PagedCache | StateCache] = [*self._own, *self._states]
        parts = [part for cache in caches for part in cache if part is not None]
        for memory in (*{id(part.base): part.base for part in parts}.values(), *self._recorder.allocated):
            assert memory is not None
            drop_pages(memory)

    def close(self) -> None:
        if self._owns_team:
            self.team.close()

    def _plan_of(self, adapted: Adapted, *, narrows: bool = False) -> _Plan:
        """Return the plan for steps with or without adapters and `narrows`, see `_record`; record it at first use."""
        which = adapted, narrows
        if which not in self._plans:
            hidden, *ends = self._record(self._recorder, adapted, narrows=narrows)
            self._plans[which] = self._planned(hidden, *ends)
        return self._plans[which]

    def _planned(self, values: list[Recorded], head_start: int, layer_rows: int) -> _Plan:
        """Make a `_Plan` of the operations that were just recorded."""
        recorder = self._recorder
        rows, runs = (
            np.array([*recorder.plan, *draw.plan], np.int64) for draw in (self._draw_rows, self._sample_drafted)
        )
        head = rows[head_start:], recorder.num_rows - layer_rows
        stops = () if self._looked_up is None else tuple(self._looked_up.stops)
        return _Plan(rows, runs, recorder.num_rows, *head, values[0], values[1:], stops)

    def _with_rows(self, rows: Ints, plan: Ints, num_rows: int) -> NDArray[np.float32]:
        arrays, count = self._arrays, len(rows)
        self._rows = rows
        arrays.logit_rows[:count] = rows
        arrays.numbers[StepNumber.LOGIT_ROWS] = count
        self._wanted = self._logits[:count]
        self._ids = (self._draw_rows if self._drafts is None else self._sample_drafted).ids[:count].data
        if self._adapters is not None:
            _lay_out_wanted(self._recorder, self._adapters.among(rows))
        self.team.run(plan, num_rows)
        return self._wanted

    def draw_rows(self, logits: NDArray[np.float32], controls: NDArray[np.float64]) -> tuple[Ints, NDArray[np.float32]]:
        """See `kernels.draw`; the thread team samples, unless `logits` are a copy of some rows."""
        if logits is not self._wanted:
            return draw(logits, controls)
        if self._drafts is not None:
            return self._sample_drafted(controls)
        self._arrays.moved_on = True
        return self._draw_rows(controls)


class RecordedHead(RecordedRunner):
    """Replays a draft head on the CPU; see `HeadRunner`. Arguments with `RecordedRunner`'s names have the same meaning.

    `beside` is the model's runner; a draft head without a cache reads the caches of `beside`.
    """

    def __init__(
        self,
        head: DraftHead,
        num_blocks: int,
        limits: StepLimits,
        team: ThreadTeam | None = None,
        windows: Sequence[cache_specs.WindowRoom] = (),
        beside: RecordedRunner | None = None,
    ) -> None:
        if beside is not None and not head.config.cache_specs:
            self.caches = beside.caches
        self._given: tuple[NDArray[np.float32], ...] = ()  # input buffers: the model's states, fused states
        self._fusing = (0, 0)  # operations of the plan that fuse, and their elements in the plan
        super().__init__(head, num_blocks, limits, team=team, whole=True, windows=windows)  # type: ignore[arg-type]
        if beside is not None and windows:
            self.page_of = beside.page_of

    def _layers(self, decoder: Any, recorder: Recorder, step: StepInput) -> Recorded:
        """See `RecordedRunner`; the plan begins with the fusion of the model's hidden states."""
        given = recorder.buffer(decoder.input_size)
        fused = buffer_of(decoder.fuse(buffer_value(recorder, given)))
        self._buffers = given, fused  # reserved, so that the recorder does not reuse them
        self._given = tuple(each.array.reshape(-1, each.stride)[:, : each.width] for each in self._buffers)
        self._fusing = recorder.num_rows, len(recorder.plan)
        hidden, self._back = decoder.forward(step_tokens(recorder), buffer_value(recorder, fused), step)
        return hidden

    def run_on(self, batch: Batch, states: NDArray[np.float32], *, fused: bool) -> NDArray[np.float32]:
        operations, numbers = self._fusing if fused else (0, 0)
        self._given[fused][: len(states)] = states
        if len(self.page_of):
            self._find_pages(batch)
        self._lay_out(batch)
        return self._with_rows(batch.sampled_rows, self._plan.rows[numbers:], self._plan.count - operations)

    def given_back(self, rows: Ints) -> NDArray[np.float32]:
        return self._back.rows(rows)


class _Stop(NamedTuple):
    """A position at which a plan pauses in steps with image rows.

    Attributes:
        numbers, operations: elements and operations of the plan before it.
        rows: float32 [T, E] activations; image rows are replaced (after the embedding) or added to (after a layer).
    """

    numbers: int
    operations: int
    rows: NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A recorded step.

    Attributes:
        rows, of_runs: the plan. Its last operation samples: in `rows` one token of each sequence, from which the next
            step may continue; in `of_runs` the tokens of runs with drafts.
        count: operations before sampling.
        head, head_count: the part of the plan that computes logits, and its operations.
        hidden: the output of the layers.
        kept: the inputs of the tapped layers.
        stops: after the embedding and after the layers to which image vectors are added; empty for a text-only model.
    """

    rows: Ints
    of_runs: Ints
    count: int
    head: Ints
    head_count: int
    hidden: Recorded
    kept: list[Recorded]
    stops: tuple[_Stop, ...] = ()

    @functools.cached_property
    def between_stops(self) -> tuple[Sequence[Ints], Sequence[Ints]]:
        """`rows` and `of_runs`, each from the beginning and from each stop on."""
        begins = [0, *(stop.numbers for stop in self.stops)]
        return [self.rows[at:] for at in begins], [self.of_runs[at:] for at in begins]


class _RecordedGiven:
    """See `GivenRows`: records stops at which the runner writes image rows, with `vectors` vectors for each row."""

    vectors: Value = None  # written while a plan stops

    def __init__(self, vectors: int) -> None:
        self._vectors = vectors

    def begin(self, recorder: Recorder) -> None:
        """Begin to record another plan."""
        self._recorder, self.stops = recorder, list[_Stop]()

    def put(self, x: Recorded, ranks: Collective | None) -> Recorded:
        assert ranks is None, "a model divided among processes is not recorded"
        self._stop(x)
        return x

    def add(self, layer: int, x: Recorded, residual: Recorded | None) -> tuple[Recorded, Recorded | None]:
        if layer + 1 >= self._vectors:
            return x, residual
        total = x if residual is None else residual + x
        self._stop(total)
        return total, None

    def _stop(self, x: Recorded) -> None:
        rows = buffer_of(x).rows  # may record the operation that computes x, before the length of the plan is read
        self.stops.append(_Stop(len(self._recorder.plan), self._recorder.num_rows, rows))


def _fill_entries(entries: EntryArrays, adapters: AdapterRows) -> None:
    """Write the adapters of rows into the arrays that the plan reads."""
    count, groups = len(adapters.rows), len(adapters.adapters)
    entries.rows[:count], entries.scales[:count] = adapters.rows, adapters.scales
    entries.starts[: groups + 1] = adapters.starts
    entries.tables[:groups] = [adapter.layout.address for adapter in adapters.adapters]


def _lay_out_adapters(recorder: Recorder, adapters: AdapterRows | None) -> Adapted:
    """Write the adapters of a step's rows; return how its plan must apply them."""
    if adapters is None:
        return Adapted.NOT
    _fill_entries(recorder.entries, adapters)
    recorder.arrays.numbers[StepNumber.ADAPTERS] = len(adapters.adapters)
    return Adapted.APART if any(adapter.apart for adapter in adapters.adapters) else Adapted.ADDED


def _lay_out_wanted(recorder: Recorder, among: AdapterRows | None) -> None:
    """Write the adapters of the rows whose logits are wanted."""
    recorder.arrays.numbers[StepNumber.LOGIT_ADAPTERS] = 0 if among is None else len(among.adapters)
    if among is not None:
        _fill_entries(recorder.logit_entries, among)


def _drawing(runner: RecordedRunner) -> Draw:
    """Return the sampling function of the runner's sampler. It has only a weak reference to the runner, so that weights
    and cache are freed with the last reference to the runner, and not by a later garbage collection."""
    weakly = weakref.proxy(runner)
    return lambda logits, controls: weakly.draw_rows(logits, controls)


def compile_together(record: Callable[[], object], more: Sequence[str] = (), later: Sequence[str] = ()) -> None:
    """Compile kernels that `record` requests, and `more`, at a machine's first start; `later`: see `compile_first`."""

    def ask() -> None:
        record()
        for code in (team.CODE, *more):
            operation(code)

    compile_first(ask, later)


class RecordedEncoderRunner(EncoderRunner):
    """Replays an encoder, with matrices in the layouts of the compiled kernels, on the CPU; see `EncoderRunner`. The
    largest step must hold the longest text."""

    def __init__(self, encoder: Encoder, limits: StepLimits) -> None:
        super().__init__(encoder.config)
        self._recorder = recorder = Recorder(limits, host_isa())

        def record(recorder: Recorder, adapted: Adapted) -> Recorded:
            recorder.begin(adapted)
            arrays = recorder.arrays
            ids, places = step_tokens(recorder), step_tokens(recorder, arrays.positions)
            hidden: Recorded = encoder.forward(ids, places, step_tokens(recorder, arrays.token_types), ())
            if encoder.config.scores:
                encoder.scores(hidden.wanted()).logits(None, 1.0, None)
            return hidden

        def record_all() -> None:
            for adapted in (Adapted.NOT, Adapted.ADDED)[: 2 if limits.adapter_rank else 1]:
                record(Recorder(limits, recorder.isa), adapted)

        compile_together(record_all)
        self._record, self._plans = record, dict[Adapted, tuple[Recorded, Ints, int]]()
        self._hidden = self._plan_of(Adapted.NOT)[0]  # the layers' output in the last step
        self._logits = recorder.logits
        self._team = ThreadTeam(limits.threads, limits.ranks)

    def _plan_of(self, adapted: Adapted) -> tuple[Recorded, Ints, int]:
        """Return the layers' output, the plan and its number of operations; record it when it is first needed."""
        if adapted not in self._plans:
            recorder = self._recorder
            self._plans[adapted] = self._record(recorder, adapted), np.array(recorder.plan, np.int64), recorder.num_rows
        return self._plans[adapted]

    def encode(
        self, token_ids: Ints, positions: Ints, types: Ints, query_start: Ints, adapters: AdapterRows | None
    ) -> NDArray[np.float32] | None:
        arrays, count, texts = self._recorder.arrays, len(token_ids), len(query_start) - 1
        arrays.token_ids[:count] = token_ids
        arrays.positions[:count] = positions
        arrays.token_types[:count] = types
        arrays.query_start[: texts + 1] = query_start
        arrays.logit_rows[:texts] = query_start[:-1]
        arrays.numbers[StepNumber.TOKENS] = count
        arrays.numbers[StepNumber.SEQUENCES] = arrays.numbers[StepNumber.LOGIT_ROWS] = texts
        self._hidden, plan, rows = self._plan_of(_lay_out_adapters(self._recorder, adapters))
        if adapters is not None:
            _lay_out_wanted(self._recorder, adapters.among(query_start[:-1]))
        self._team.run(plan, rows)
        return None if self._logits is None else self._logits[:texts]

    def states_sum(self, rows: Ints) -> NDArray[np.float64]:
        return self._hidden.rows(rows).sum(-2, dtype=np.float64)

    def close(self) -> None:
        self._team.close()


def _caches(
    specs: Sequence[cache_specs.CacheSpec],
    num_blocks: int,
    block_size: int,
    kinds: tuple[CacheKind, CacheKind] | None,
    ranks: CpuRanks | None,
    room: cache_specs.StateRoom,
    windows: Sequence[cache_specs.WindowRoom],
    *,
    wide: bool,
) -> tuple[PagedCache | tuple[StateCache, ...], ...]:
    """Allocate the cache of each layer. Layers with the same shape and number of pages share one allocation.
    `kinds` is None for latent attention, which may have index keys in place of values, and for `wide` caches, which are
    float32 [1, B, S, width], as those of an exact spec."""

    def pool_of(spec: cache_specs.PagedSpec) -> tuple[tuple[int, int, int], int, bool]:
        return spec.shape, cache_specs.pages_of(spec, windows, num_blocks), wide or spec.exact

    pools = Counter(map(pool_of, cache_specs.paged(specs)))
    rest = {pool: iter(_layers(pool, count, block_size, kinds, ranks)) for pool, count in pools.items()}

    def make(_: int, spec: cache_specs.PagedSpec | cache_specs.StateSpec) -> PagedCache | tuple[StateCache, ...]:
        if isinstance(spec, cache_specs.PagedSpec):
            cache, pool = next(rest[pool_of(spec)]), cache_specs.pool_of(spec, windows)
            cache = cache if pool is None else WindowedCache.of(pool, *cache)
            cache.kinds = None if spec.exact else kinds
            if cache.kinds is not None and cache.kinds[0].is_quantised:
                cache.fit = np.ones((spec.kv_heads, 3, spec.key_dim), np.float32)
                cache.fit[:, 0] = 0
            return cache
        shapes = (((room.slots, *part.shape), (room.running, room.drafts, part.inputs)) for part in spec.parts)
        return tuple(StateCache(*map(_zeros, each)) for each in shapes)

    return cache_specs.layer_caches(specs, make)


def _zeros(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return aligned(math.prod(shape), np.float32).reshape(shape)


def _layers(
    pool: tuple[tuple[int, int, int], int, bool],
    layers: int,
    block_size: int,
    kinds: tuple[CacheKind, CacheKind] | None,
    ranks: CpuRanks | None,
) -> list[PagedCache]:
    """Allocate the caches of layers of one `pool`: shape (`PagedSpec.shape`), number of pages, and whether it is wide.

    The heads of a rank are on its NUMA node; if heads cannot be divided, pages are interleaved over all nodes.
    """
    (kv_heads, key_dim, value_dim), num_blocks, wide = pool
    if wide:
        shapes = [(1, layers, num_blocks, block_size, kv_heads * dim) for dim in (key_dim, value_dim) if dim]
    elif kinds is None:
        shapes = [latent_cache_shape(num_blocks, block_size, layers, dim) for dim in (key_dim, value_dim) if dim]
    else:
        sizes = (num_blocks, block_size, layers, kv_heads, key_dim)
        shapes = [key_cache_shape(*sizes, kinds[0]), value_cache_shape(*sizes, kinds[1])]
    types: list[Any] = [np.float32] * 2 if wide else [kind.dtype for kind in kinds or PLAIN]
    by_heads = not wide and kinds is not None and ranks is not None and ranks.divides(kv_heads)
    made: list[NDArray[Any]] = []
    for each, dtype in zip(shapes, types):
        count = math.prod(each)
        if ranks is None or not ranks.apart:
            memory = aligned(count, dtype)
        else:
            memory = ranks.pages(count * np.dtype(dtype).itemsize)
            if by_heads:
                ranks.place(memory, ranks.borders(memory.size))
            memory = memory.view(dtype)
        if by_heads:  # to [stretches, layers, heads, ...], the layout without ranks
            stretches, _, heads, *rest = each
            every = memory.reshape(heads, stretches, layers, *rest)
            made.append(np.moveaxis(every, 0, 2).swapaxes(0, 1))
        else:
            made.append(memory.reshape(each).swapaxes(0, 1))
    return [PagedCache(*each) for each in zip(*made)]
