# SPDX-License-Identifier: MIT
"""Run any decoder or encoder on any device in torch, operation by operation (steps 6 and 7 of a request's life)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.devices import Device
from candle_vllm.core.engine.runners.images import Encoding
from candle_vllm.core.engine.runners.model_runner import EncoderRunner, StepwiseRunner
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, Ints, in_pages, turns
from candle_vllm.core.kernels.attention.rows import AttentionRows, PagedCache, WindowedCache
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.lora.reference import EagerAdapters
from candle_vllm.core.kernels.offloading import block_bytes, block_parts, state_parts, states_of, tensors_of
from candle_vllm.core.kernels.states import StateCache, StateRows
from candle_vllm.core.layers.attention import StepInput, Taps
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading import cache_specs
from candle_vllm.core.models.family import Decoder, DraftHead, Encoder
from candle_vllm.core.models.stack import DecoderStack, layers_here
from candle_vllm.core.models.tower_family import Tower, TowerStep, joined
from candle_vllm.core.sampling.state import SamplingState


class CacheParts:
    """Mix-in for a `BlockMemory` whose caches are torch tensors: finds the bytes of a block or of a state slot."""

    caches: tuple[Any, ...]
    page_of: Ints

    @property
    def block_bytes(self) -> int:
        return block_bytes(self.caches)

    @property
    def state_bytes(self) -> int:
        return sum(map(len, state_parts(self.caches, 0)))

    def _parts(self, place: int, *, state: bool) -> list[torch.Tensor]:
        return state_parts(self.caches, place) if state else block_parts(self.caches, place, self.page_of)


class EagerRunner(CacheParts, StepwiseRunner):
    """Runs the layers one operation after the other, in torch; see `ModelRunner` and `BlockMemory`.

    Args:
        decoder: the model with its weights.
        num_blocks, block_size: shape of the cache.
        room: number of slots for layer states.
        device, dtype: device and element type of the cache.
        adapters: applies adapters in the decoder's layers; None without LoRA.
        taps: layers whose inputs `hidden_rows` returns; None for the output of the last norm.
        turning, windows: see `RecordedRunner`, which also explains the attribute `page_of`.
    """

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(
        self,
        decoder: Decoder,
        num_blocks: int,
        block_size: int,
        device: torch.device | Device,
        dtype: torch.dtype,
        adapters: EagerAdapters | None = None,
        taps: Sequence[int] | None = None,
        turning: Rotary | None = None,
        room: cache_specs.StateRoom = cache_specs.NO_STATES,
        windows: Sequence[cache_specs.WindowRoom] = (),
    ) -> None:
        config = decoder.config
        self.page_of = np.zeros((len(windows), num_blocks), np.int64)
        super().__init__()
        self.decoder = decoder
        self.device = device
        # Not zeroed: the system allocates pages when they are first written, and attention reads only written rows.
        empty = functools.partial(torch.empty, device=device, dtype=dtype)
        self._block_size = block_size
        self.caches = layer_caches_of(decoder, (num_blocks, block_size), empty, room=room, windows=windows)
        self._hidden = torch.empty(0, config.hidden_size)
        self.adapters = adapters
        self._adapter_rows: AdapterRows | None = None
        self._taps = taps
        self._kept = None if taps is None else Taps(taps)
        self._turning = turning

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        token_ids, step = self._step(batch)
        self._hidden = self.decoder.forward(token_ids, step)
        return self.score(batch.sampled_rows)

    def _step(self, batch: Batch) -> tuple[torch.Tensor, StepInput]:
        places = batch.positions
        if batch.turned is not None and self._turning is not None:
            places = places + turns(batch.turned, places, self._turning.turn(batch.turned.places))
        token_ids, positions, slots, tables = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.token_ids, places, batch.slots, batch.block_tables)
        )
        ahead = None if batch.ahead is None else torch.from_numpy(batch.ahead).to(self.device)
        starts, contexts, windowed = tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), ()
        rows = AttentionRows(starts, contexts, tables, ahead)
        if len(self.page_of):
            there = (torch.from_numpy(each).to(self.device) for each in in_pages(batch, self.page_of, self._block_size))
            windowed = [(each, AttentionRows(starts, contexts, table, ahead)) for each, table in zip(*there)]
        if self.adapters is not None:
            self._adapter_rows = batch.adapters
            self.adapters.choose(batch.adapters, self.device)
        given = None
        if batch.embedded is not None:
            places, vectors = (
                torch.from_numpy(each).to(self.device) for each in (batch.embedded.rows, batch.embedded.vectors)
            )
            given = GivenTensors(places, vectors)
        states = None
        if batch.states is not None:
            states = StateRows(*(torch.from_numpy(each).to(self.device) for each in batch.states.tables.values()))
        how: dict[str, Any] = {"taps": self._kept, "given": given, "may_divide": batch.adapters is None}
        return token_ids, StepInput(positions, slots, rows, self.caches, states=states, windowed=windowed, **how)

    @torch.inference_mode()
    def score(self, rows: Ints) -> Any:
        if self.adapters is not None:
            self.adapters.choose(self._adapter_rows, self.device, rows)
        return self.decoder.logits(self._hidden[torch.from_numpy(rows).to(self.device)])

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        return _sum_of(self._hidden, rows)

    def copy_out(self, place: int, *, state: bool = False) -> Callable[[], memoryview]:
        data = torch.cat(self._parts(place, state=state)).cpu().numpy().data
        return lambda: data

    def copy_in(self, place: int, data: bytes | bytearray | memoryview, *, state: bool = False) -> None:
        start, there = 0, torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        for part in self._parts(place, state=state):
            part.copy_(there[start : start + len(part)])
            start += len(part)

    def drop_cache(self) -> None:
        self._hidden = self._hidden[:0].clone()
        for part in (*tensors_of(self.caches), *states_of(self.caches)):
            part.untyped_storage().resize_(0)

    def restore_cache(self) -> None:
        for part in (*tensors_of(self.caches), *states_of(self.caches)):
            part.untyped_storage().resize_(part.numel() * part.itemsize)

    @torch.inference_mode()
    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        kept = [self._hidden] if self._kept is None else [self._kept.values[number] for number in self._taps or ()]
        wanted = torch.from_numpy(rows).to(self.device)
        return torch.cat([value[wanted].float() for value in kept], 1).cpu().numpy()


def layer_caches_of(
    decoder: Decoder,
    blocks: tuple[int, int],
    empty: Callable[..., torch.Tensor],
    beside: int = 0,
    room: cache_specs.StateRoom = cache_specs.NO_STATES,
    state_dtype: torch.dtype | None = None,
    windows: Sequence[cache_specs.WindowRoom] = (),
) -> tuple[PagedCache | tuple[StateCache, ...], ...]:
    """Allocate the cache of each layer of a decoder; layers of another stage get tensors without elements.

    Args:
        blocks: number of blocks, and tokens of a block.
        empty: allocates a tensor of a shape, in the type of keys unless `dtype` is given.
        beside: extra elements per key and value, which widen its row; `kv_write/scaled_rows.py` has their layout.
        room: number of slots for layer states.
        state_dtype: type of layer states that are not `exact` (`StatePart`); None for the type of keys.
        windows: page pools of layers with a window.
    """
    layers, specs = decoder.config.num_layers, decoder.config.cache_specs
    here = [number for number in range(len(specs)) if number % layers in layers_here(decoder, layers)]

    def state(number: int, part: cache_specs.StatePart) -> StateCache:
        slots, kept = (room.slots, room.running) if number in here else (0, 0)
        dtype = torch.float32 if part.exact else state_dtype
        states = empty((slots, *part.shape), **({} if dtype is None else {"dtype": dtype}))
        return StateCache(states, empty((kept, room.drafts, part.inputs), dtype=torch.float32))

    def make(number: int, spec: cache_specs.PagedSpec | cache_specs.StateSpec) -> PagedCache | tuple[StateCache, ...]:
        if isinstance(spec, cache_specs.StateSpec):
            return tuple(state(number, part) for part in spec.parts)
        sizes = (spec.key_dim, spec.value_dim) if number in here else ()
        count, pool = cache_specs.pages_of(spec, windows, blocks[0]), cache_specs.pool_of(spec, windows)
        shape, exact = (count, blocks[1], spec.kv_heads), {"dtype": torch.float32} if spec.exact else {}
        parts = [empty((*shape, size if exact else size + beside), **exact) for size in sizes]
        parts = parts or [empty(0), empty(0)]
        return PagedCache(*parts) if pool is None else WindowedCache.of(pool, *(*parts, None)[:2])

    return cache_specs.layer_caches(specs, make)


class StageRunner(EagerRunner):
    """Runs a pipeline stage of a model: `decoder` is its part, and `others` are the other arguments of `EagerRunner`.

    On the first stage, steps are in flight from `forward` to `collect`, at most one for each stage; `draw` and `score`
    refer to the step that `collect` collected last.
    """

    def __init__(self, decoder: Decoder, *others: Any) -> None:
        super().__init__(decoder, *others)
        assert isinstance(decoder, DecoderStack)
        assert decoder.stage is not None
        self._stack, self._stage = decoder, decoder.stage
        self.in_flight = self._stage.line.size
        self._begun: collections.deque[Batch] = collections.deque()

    @torch.inference_mode()
    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """See `ModelRunner`; does not wait for the later stages."""
        del states
        token_ids, step = self._step(batch)
        stage, tokens = self._stage, len(token_ids)
        given, width = step.given, 0 if batch.embedded is None else batch.embedded.vectors.shape[1]
        arrived = None if stage.is_first else stage.take(stage.empty(*stage.arrives(tokens)))
        if given is not None and stage.vectors_arrive(width):
            stage.take(given.vectors)
        stage.hand_on(self._stack.part(token_ids, step, arrived))
        if given is not None and stage.vectors_leave(width):
            stage.hand_on(given.vectors)
        if stage.is_first:
            self._begun.append(batch)

    @torch.inference_mode()
    def collect(self) -> None:
        """See `ModelRunner`; does nothing on a stage after the first."""
        if self._stage.is_first:
            batch, stage = self._begun.popleft(), self._stage
            self._hidden = stage.take_back(stage.empty(*stage.returns(batch.tokens.shape[1])))
            self._adapter_rows = batch.adapters
            self._sampled_from = self.score(batch.sampled_rows)

    def score(self, rows: Ints) -> Any:
        """See `ModelRunner`; a stage after the first has no head, and returns no logits."""
        return super().score(rows) if self._stage.is_first else torch.empty(0)


@dataclasses.dataclass
class GivenTensors:
    """See `GivenRows`."""

    rows: torch.Tensor
    vectors: torch.Tensor

    def put(self, x: torch.Tensor, ranks: Collective | None) -> torch.Tensor:
        if ranks is not None:
            self.vectors = ranks.sum(self.vectors)
        x[self.rows] = self.vectors[:, : x.shape[1]].to(x.dtype)
        return x

    def add(
        self, layer: int, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        size = x.shape[1]
        more = self.vectors[:, (layer + 1) * size : (layer + 2) * size]
        if not more.shape[1]:
            return x, residual
        total = x if residual is None else residual + x
        total[self.rows] += more.to(x.dtype)
        return total, None


class EagerTower:
    """Runs a vision tower; see `TowerRunner`. On a GPU it runs on another stream than the steps."""

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(self, tower: Tower, device: torch.device | Device) -> None:
        self._tower, self._device = tower, torch.device(device)

    def embeddings(self, tiles: Collection[NDArray[np.uint8]], whole: tuple[int, int] = (0, 0)) -> Encoding:
        tower, config = self._tower, self._tower.config
        made: list[NDArray[np.float32]] = []
        for tile in tiles:
            rows = config.read(tile)
            with _computing(self._device):  # only for a part of the encoding: engine steps run between the parts
                placed = tower.place(rows.places, 0, rows.grid)
                patches, numbers, start = (
                    None if each is None else torch.from_numpy(each).to(self._device)
                    for each in (rows.patches(), *placed)
                )
                step = TowerStep(numbers, (len(rows.places),), rows.windows, start)
                x, deep = tower.begin(patches, step), list[torch.Tensor]()
            for number, layer in enumerate(tower.layers):
                with _computing(self._device):
                    x = layer(x, step)
                    if number in config.deep:
                        deep.append(tower.mergers[len(deep)](config.cells(x)))
                yield
            with _computing(self._device):
                found = torch.cat([tower.project(tower.cells(tower.norm(x))), *deep], 1)
                made.append(rows.in_order(found.float().cpu().numpy()))
        return (yield from joined(tower, np.concatenate(made), whole))


class EagerHead(EagerRunner):
    """Runs a draft head; see `HeadRunner`. Arguments with the names of `EagerRunner`'s have the same meaning.

    `adapters` is the model's: it is off in steps of the draft head, which may share the model's embedding and head.
    `beside` is the model's runner; a draft head without a cache reads the caches of `beside`.
    """

    def __init__(
        self,
        head: DraftHead,
        num_blocks: int,
        block_size: int,
        device: torch.device | Device,
        dtype: torch.dtype,
        adapters: EagerAdapters | None = None,
        beside: EagerRunner | None = None,
    ) -> None:
        super().__init__(head, num_blocks, block_size, device, dtype, adapters)  # type: ignore[arg-type]
        self._head, self._dtype = head, dtype
        if beside is not None and not self.caches:
            self.caches, self.page_of = beside.caches, beside.page_of
        self._back = self._hidden

    @torch.inference_mode()
    def run_on(self, batch: Batch, states: NDArray[np.float32], *, fused: bool) -> torch.Tensor:
        token_ids, step = self._step(batch)
        given = torch.from_numpy(states).to(self.device, self._dtype)
        self._hidden, self._back = self._head.forward(token_ids, given if fused else self._head.fuse(given), step)
        return self.score(batch.sampled_rows)

    @torch.inference_mode()
    def given_back(self, rows: Ints) -> NDArray[np.float32]:
        return self._back[torch.from_numpy(rows).to(self.device)].float().cpu().numpy()


class EagerEncoderRunner(EncoderRunner):
    """Runs an encoder, one operation after the other, in torch; see `EncoderRunner`."""

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(self, encoder: Encoder, device: torch.device | Device, adapters: EagerAdapters | None = None) -> None:
        super().__init__(encoder.config)
        self.encoder = encoder
        self.device = device
        self.adapters = adapters
        self._hidden = torch.empty(0)

    def encode(
        self, token_ids: Ints, positions: Ints, types: Ints, query_start: Ints, adapters: AdapterRows | None
    ) -> NDArray[np.float32] | None:
        with _computing(self.device):
            if self.adapters is not None:
                self.adapters.choose(adapters, self.device)
            ids, places, kinds = (torch.from_numpy(array).to(self.device) for array in (token_ids, positions, types))
            self._hidden = self.encoder.forward(ids, places, kinds, np.diff(query_start).tolist())
            if not self.encoder.config.scores:
                return None
            if self.adapters is not None:
                self.adapters.choose(adapters, self.device, query_start[:-1])
            first = torch.from_numpy(query_start[:-1]).to(self.device)
            return self.encoder.scores(self._hidden[first]).float().cpu().numpy()

    def states_sum(self, rows: Ints) -> NDArray[np.float64]:
        return _sum_of(self._hidden, rows)


@contextlib.contextmanager
def _computing(device: torch.device | Device) -> Iterator[None]:
    """Set inference mode and this thread's current device: Triton launches kernels there, not where tensors are."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(), torch.inference_mode():
        yield


@torch.inference_mode()
def _sum_of(hidden: torch.Tensor, rows: Ints) -> NDArray[np.float64]:
    return hidden[torch.from_numpy(rows).to(hidden.device)].float().sum(-2, dtype=torch.float64).cpu().numpy()
