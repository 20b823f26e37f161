# SPDX-License-Identifier: MIT
"""Launch steps on a GPU, each while the previous one runs (steps 5 to 7 of a request's life).

The host writes a step's arrays into staged memory, and one copy transfers them. Tokens that the previous step sampled
are read on the device, so the host need not wait for them. A step that only decodes replays a captured CUDA graph, if
one of `bucket_sizes` is large enough; rows beyond the step's own are padding. A step with prompts is launched operation
by operation, or replays a graph too if it has few enough tokens, no images and no adapters. Sampled tokens are copied
to the host, followed by a mark (an event) to wait for.

If experts are in main memory (`kernels/moe/host.py`), the host computes within a step: the step is launched or replayed
in parts, and the next one is not launched ahead.

With pipeline parallelism, as many steps are in flight as there are stages (`device_borders.py`). Once the hidden states
of the last stage are back, the first stage runs the head, which is not captured with the layers, and samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.runners.device_borders import Border, DeviceBorders
from candle_vllm.core.engine.runners.device_inputs import DeviceInputs, DeviceLimits, StepSize, by_rows
from candle_vllm.core.engine.runners.eager_runner import CacheParts, GivenTensors, layer_caches_of
from candle_vllm.core.engine.runners.model_runner import MAX_SCORED_ROWS, SampledStep
from candle_vllm.core.engine.step.batch import AdapterRows, Batch, Ints, turns
from candle_vllm.core.engine.step.sequence import Tokens
from candle_vllm.core.kernels.attention.backends import attend_by_reference
from candle_vllm.core.kernels.attention.rows import DeviceRows, WindowedCache
from candle_vllm.core.kernels.device_stream import DeviceStream, Mark, Sent, Work, copy
from candle_vllm.core.kernels.kv_write.scaled_rows import SCALE
from candle_vllm.core.kernels.lora.device import DeviceAdapters
from candle_vllm.core.kernels.moe.host import HostExperts
from candle_vllm.core.kernels.offloading import LayerCache
from candle_vllm.core.kernels.triton_build import next_power_of_2
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.cache_specs import NO_STATES, StateRoom, WindowRoom
from candle_vllm.core.loading.cache_specs import states as state_specs
from candle_vllm.core.models.family import Decoder
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.sampling.device_sampler import DeviceSampler, SampledRows
from candle_vllm.core.sampling.sampler import Sampler
from candle_vllm.core.sampling.state import SamplingState

logger = logging.getLogger(__name__)

_SMALL_PROMPTS = (1, 8, 16, 32, 64, 128)  # numbers of tokens for which kernels are specialised
MOST_CAPTURED = 512
"""Maximum number of sequences of a captured decoding step."""


def bucket_sizes(sequences: int) -> list[int]:
    """Return batch sizes of captured steps: 1, 2, 4; every 8 up to 64, every 16 up to 256, every 32; the maximum."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MOST_CAPTURED + 1, 32)]
    most = min(sequences, MOST_CAPTURED)
    return [*(size for size in sizes if size < most), most]


def mixed_sizes(tokens: int) -> list[int]:
    """Return the token counts of captured steps with prompts: multiples of 16 up to 128, four a doubling; `tokens`."""
    sizes = [*range(16, 128, 16)]
    while sizes[-1] < tokens:
        sizes.append(sizes[-1] + max(16, next_power_of_2(sizes[-1] + 1) // 8))
    return [*(size for size in sizes if size < tokens), tokens] if tokens else []


class DeviceRunner(CacheParts):
    """Runs a decoder on a GPU; see `ModelRunner` and `BlockMemory`. `allocate` must be called before the first step.

    Args:
        decoder: the model, on the stream's device.
        limits: the largest step.
        stream: the stream on which steps run.
        dtype: element type of the cache; float8_e4m3fn has the scale 1, unless each row has its own scales.
        attend: the attention backend, see `kernels/attention`; None for `paged_attention`.
        graphs: whether steps and sampling are captured.
        finite_cache: whether every element of the cache must be finite from the start.
        captured_prompts: maximum tokens of a captured step with prompts; 0 unless the attention `Backend` is `mixed`.
        overlaps: whether the next step may be launched before this one's tokens are known; False with speculative
            decoding, whose drafts depend on these tokens; `limits.sequences` then includes the draft tokens of a step.
        host: computes the experts that are in main memory; None without such experts. It is closed with the runner.
        row_scales: whether each row of the cache has its own scales, see `kernels/kv_write/scaled_rows`.
        turning: see `RecordedRunner`.
        state_dtype: type of layer states that are not `exact` (`StatePart`); None for `dtype`.

    Attributes:
        adapters: applies adapters in the decoder's layers; None without LoRA.
        in_flight: number of the model's stages.
        page_of: [G, num_blocks] page tables of G pools, see `WindowedBlocks`; each step copies changes to the device.
    """

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)
    step_memory = None

    def __init__(
        self,
        decoder: Decoder,
        limits: DeviceLimits,
        stream: DeviceStream,
        dtype: torch.dtype,
        *,
        attend: Callable[..., torch.Tensor] | None = None,
        graphs: bool = True,
        finite_cache: bool = False,
        captured_prompts: int = 0,
        overlaps: bool = True,
        adapters: DeviceAdapters | None = None,
        host: HostExperts | None = None,
        row_scales: bool = False,
        turning: Rotary | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder, self._host = decoder, host
        self._room = StateRoom(1, 0, 1) if state_specs(decoder.config.cache_specs) else NO_STATES
        limits = dataclasses.replace(limits, states=self._room is not NO_STATES)
        stage = decoder.stage if isinstance(decoder, DecoderStack) else None
        self._has_head = stage is None or stage.is_first
        self.in_flight = 1 if stage is None else stage.line.size
        self.overlaps = overlaps and stage is None
        self._empty = torch.zeros if finite_cache else torch.empty
        self._limits = limits
        self._stream = stream
        self._dtype, self._state_dtype = dtype, state_dtype or dtype
        self._attend: dict[str, Any] = {} if attend is None else {"attend": attend}
        one = torch.ones(1, dtype=torch.float32, device=stream.device)
        self._scales = (one, one) if dtype == torch.float8_e4m3fn and not row_scales else None
        self._beside = SCALE if row_scales else 0
        self._turning = turning
        self._inputs = DeviceInputs(stream, limits, self.in_flight)
        vocabulary, sequences = decoder.config.vocab_size, limits.sequences
        self._logits = torch.zeros(sequences, vocabulary, dtype=torch.float32, device=stream.device)
        self._sampler = DeviceSampler(stream, self._logits, self._inputs.controls, graphs=graphs)
        self._buckets = [StepSize(rows, rows, False) for rows in bucket_sizes(sequences)] if graphs else []
        most = min(captured_prompts, limits.tokens) if graphs else 0
        self._mixed = [StepSize(size, min(size, sequences), True) for size in mixed_sizes(most)]
        self._graphs: dict[tuple[StepSize, bool], Work] = {}
        self._borders: DeviceBorders | None = None
        self._begun: deque[tuple[StepSize | None, Batch]] = deque()  # on the first stage
        if stage is not None:
            largest = [sizes[-1].tokens for sizes in (self._buckets, self._mixed) if sizes]
            self._borders = DeviceBorders(stage, stream, limits.tokens, max(largest, default=0))
        self.adapters = adapters
        self._entries: AdapterRows | None = None  # adapters of the last step
        self._hidden = torch.empty(0)
        self._kept = torch.empty(0)  # [maximum tokens of a captured step with prompts, E], which `_take_kept` uses
        self._size: StepSize | None = None
        self._asks = (False, False)
        self._drafts: list[Tokens] | None = None
        self._run_sampler = Sampler()
        self.page_of = np.zeros((0, 1), np.int64)
        self._allocate(1, self._room, ())

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """See `ModelRunner`. Rows of draft tokens run as decoding rows, by the same graphs and kernels."""
        shifts, self._drafts = self._turn(batch), None
        if batch.drafted:
            self._drafts = [run.drafts for run in batch.drawing]
            self._run_sampler.look_ahead(states, self._drafts)
            batch, states = by_rows(batch), ()
        with self._over_if_it_fails():
            size, entries, tokens = self._captured_size(batch), batch.adapters, batch.tokens.shape[1]
            self._send_pages()
            if self._borders is not None:
                self._pass_on(self._borders, batch, size, shifts)
                return
            self._size, self._entries = size, entries
            self._asks = self._inputs.send(batch, states, size, shifts)
            self._count_on_host(tokens)
            if size is None:
                self._stream.run(self._eager(batch))
            else:
                if entries is not None:
                    self._added().send(entries, batch.sampled_rows)
                self._stream.run(self._captured(size, adapted=entries is not None))
            if size is not None and size.mixed:
                self._stream.run(self._take_kept)
            self._count_on_host(0)  # until the next step, all rows are padding

    def _send_pages(self) -> None:
        """Copy changed page tables to the device, after the launched steps."""
        if not np.array_equal(self.page_of, self._sent_pages):
            self._sent_pages = self.page_of.copy()
            sent, there = Sent(self._stream, self.page_of.astype(np.int32)), self._pages_there
            self._stream.run(lambda: copy(there, sent.there()))

    def _pass_on(self, borders: DeviceBorders, batch: Batch, size: StepSize | None, shifts: Ints | None) -> None:
        """Launch a stage's part of a step. The layers may be captured; transfers contain no padding tokens."""
        entries, tokens = batch.adapters, batch.tokens.shape[1]
        self._inputs.send(batch, (), size, shifts)
        rows, width = (0, 0) if batch.embedded is None else batch.embedded.vectors.shape
        border = borders.enter(tokens, rows, width)
        if size is None:
            self._stream.run(self._eager(batch, border))
        else:
            if entries is not None:
                self._added().send(entries, batch.sampled_rows)
            self._stream.run(functools.partial(borders.fill, border, size.tokens))
            self._stream.run(self._captured(size, adapted=entries is not None))
            self._stream.run(functools.partial(borders.empty, border))
        borders.leave(border)
        if self._has_head:
            self._begun.append((size, batch))

    def _turn(self, batch: Batch) -> Ints | None:
        """Write rotary table rows for image rows; return the step's `turns`, or None without M-RoPE or images."""
        turned = batch.turned
        if turned is None or self._turning is None:
            return None
        if len(turned.rows):
            turn, sources = self._turning.turn_there, Sent(self._stream, self._turning.sources(turned.places))
            self._stream.run(lambda: turn(sources.there()))
        return turns(turned, batch.positions, self._turning.first_turned)

    def _count_on_host(self, tokens: int) -> None:
        if self._host is not None:
            self._stream.run(functools.partial(self._host.begin, tokens))

    def draw(self, states: Sequence[SamplingState]) -> SampledRows | Passed | SampledStep:
        if self._drafts is not None:
            return self._sample_runs(states, self._drafts)
        if not states:
            return Passed(self._stream.mark())
        with self._over_if_it_fails():
            if self._borders is not None:
                self._asks = self._inputs.send_controls(states)
            fitting = (size.rows for size in self._buckets if self._size is not None and size.rows >= len(states))
            return self._sampler.launch(states, self._asks, next(fitting, None))  # rows of the captured graph

    def _sample_runs(self, states: Sequence[SamplingState], drafts: Sequence[Tokens]) -> SampledStep:
        """Sample for runs with drafts; the host decides which draft tokens are accepted."""
        with self._over_if_it_fails(), self._here():
            self._stream.mark().wait()
            drawn = self._run_sampler.sample_runs(self._logits[: sum(1 + len(own) for own in drafts)], states, drafts)
        self._sampler.forget_counts(states)
        return SampledStep(drawn)

    def _here(self) -> AbstractContextManager[object]:
        """Set the thread's current device to the stream's device."""
        device = self._stream.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    @contextlib.contextmanager
    def _over_if_it_fails(self) -> Iterator[None]:
        """After a failure, wait for the stream: no one collects this step, but its copies still read staged memory."""
        try:
            yield
        except Exception:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                self._stream.mark().wait()
            raise

    def collect(self) -> None:
        """See `ModelRunner`; does nothing without stages or on a later one. The host does not wait here, but work that
        is launched on the stream from now on does."""
        if self._borders is not None and self._has_head:
            with self._over_if_it_fails():
                self._size, batch = self._begun.popleft()
                self._entries = batch.adapters
                self._stream.run(functools.partial(self._take_hidden, self._borders.collect()))
                self._stream.run(self._head(batch.sampled_rows))

    def score(self, rows: Ints) -> torch.Tensor:
        """See `ModelRunner`. Waits for the step; a stage after the first has no head, and returns no logits."""
        if not self._has_head:
            return torch.empty(0)
        scores: list[torch.Tensor] = []
        self._stream.run(self._score(rows, scores))
        self._stream.mark().wait()
        return scores[0] if scores else torch.empty(0)

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        found: list[torch.Tensor] = []
        wanted = Sent(self._stream, rows)
        self._stream.run(lambda: found.append(self._hidden[wanted.there()].float().sum(-2, dtype=torch.float64)))
        self._stream.mark().wait()
        return found[0].cpu().numpy()

    def close(self) -> None:
        """Wait for launched work, and free caches and graphs."""
        with contextlib.suppress(torch.AcceleratorError):  # a broken device cannot be waited for
            self._stream.mark().wait()
        self._graphs.clear()
        self._sampler.close()
        if self._host is not None:
            self._host.close()
        self.caches: tuple[LayerCache, ...] = ()

    def copy_out(self, place: int, *, state: bool = False) -> Callable[[], bytearray]:
        """See `BlockMemory`; the copy runs on the stream after the launched steps."""
        parts = self._parts(place, state=state)
        staged = self._stream.staged(sum(map(len, parts)))

        def work() -> None:
            start = 0
            for part in parts:
                copy(staged[start : start + len(part)], part)
                start += len(part)

        self._stream.run(work)
        mark = self._stream.mark()

        def taken() -> bytearray:
            mark.wait()
            return bytearray(staged.numpy())  # a copy, because pinned memory is scarce

        return taken

    def copy_in(self, place: int, data: bytes | bytearray | memoryview, *, state: bool = False) -> None:
        parts = self._parts(place, state=state)
        sent = Sent(self._stream, np.frombuffer(data, np.uint8))

        def work() -> None:
            there, start = sent.there(), 0
            for part in parts:
                copy(part, there[start : start + len(part)])
                start += len(part)

        self._stream.run(work)

    def drop_cache(self) -> None:
        """See `ModelRunner`; graphs are dropped too, because they contain addresses of the cache."""
        self._stream.mark().wait()
        self._graphs.clear()
        self._sampler.drop_graphs()
        self._stream.new_pool()
        self._hidden = self._kept = torch.empty(0)
        self.caches = ()
        if self._borders is not None:
            self._borders.drop()

    def restore_cache(self) -> None:
        if self._borders is not None:
            self._borders.make()
        self._allocate(self._num_blocks, self._room, self._windows)

    def wake_up(self) -> None:
        self._stream.join()
        self._capture()

    def allocate(self, num_blocks: int, room: StateRoom = NO_STATES, windows: Sequence[WindowRoom] = ()) -> None:
        """Allocate the cache, with slots for layer states and page pools, and capture steps."""
        self.page_of = np.zeros((len(windows), num_blocks), np.int64)
        self._allocate(num_blocks, room, windows)
        self._capture()

    def _capture(self) -> None:
        began = time.perf_counter()
        sizes = [*self._buckets, *self._mixed]
        for size in reversed(sizes):  # the largest first, because smaller graphs reuse its memory
            self._inputs.send_blank(size)
            self._captured(size, adapted=False)
            if self.adapters is not None and not size.mixed:
                self.adapters.send(None, np.empty(0, np.int64))
                self._captured(size, adapted=True)
        self._inputs.send_blank(_ONE)
        self._sampler.warm_up(1)
        for size in (*self._buckets[-1:], *self._buckets[:1]):
            self._sampler.capture(size.rows)
        self._stream.mark().wait()
        if sizes:
            logger.info("captured %d sizes of steps in %.1f s", len(sizes), time.perf_counter() - began)

    @property
    def num_graphs(self) -> int:
        """Maximum number of graphs: a step of each size; for each decoding size 3 samplings, and a step with LoRA."""
        return (4 + (self.adapters is not None)) * len(self._buckets) + len(self._mixed)

    @property
    def edit_bytes(self) -> int:
        """Maximum bytes of masks, penalties and logprobs: copies of the logits, and a table of the same size."""
        return 3 * self._logits.nbytes

    def largest_steps(self) -> tuple[Work, ...]:
        """Return work for small steps, the largest prompts and the largest decoding step, over a cache of one block.

        Beside the prompts, all other sequences decode, because partial sums of attention take memory, too.

        If steps with prompts are captured, the largest captured one follows. These steps measure the memory of steps
        and compile the kernels of later steps; the small ones are first, because they are not measured. The results
        are meaningless: all blocks and positions are 0. The steps are not captured, because `compile_together` may run
        them without launching kernels. They need no other stage, except that the small steps connect the stages.
        """
        limits = self._limits
        # The last sequence is the last token of the longest context, because a context takes memory, too.
        others = limits.sequences - 1
        tokens = min(limits.tokens, others * limits.longest + 1 if others else limits.longest)
        prompts = -(-tokens // limits.longest) + 1
        decodes = max(0, min(limits.sequences - prompts, tokens - 1))
        begins = [*range(decodes), *range(decodes, tokens - 1, limits.longest), tokens - 1] if others else [0]
        starts = np.unique([*begins, tokens])

        def smallest() -> None:
            self._inputs.send_blank(_ONE)
            border = None if self._borders is None else self._borders.blank(1)
            self._stream.run(lambda: self._padded(_ONE, border, adapted=False))
            for count in _SMALL_PROMPTS:
                if count <= min(tokens, limits.longest):
                    self._run_blank(self._inputs.send_zeros(np.array([0, count]), count))
            if self._borders is not None:
                self._borders.connect()

        def prompt() -> None:
            self._run_blank(self._inputs.send_zeros(starts, limits.longest, decodes))
            if self._has_head:
                self._stream.run(self._score(np.arange(min(MAX_SCORED_ROWS, tokens)), []))

        def decoding() -> None:
            blank(StepSize(limits.sequences, limits.sequences, False))
            self._run_blank_head(limits.sequences, np.arange(limits.sequences))
            self._sampler.warm_up(limits.sequences)

        def blank(size: StepSize) -> None:
            self._inputs.send_blank(size)
            if self.adapters is not None:
                self.adapters.send(None, np.empty(0, np.int64))
            border = None if self._borders is None else self._borders.blank(size.tokens)
            self._stream.run(lambda: self._padded(size, border, adapted=self.adapters is not None and not size.mixed))

        return smallest, prompt, decoding, *(functools.partial(blank, size) for size in self._mixed[-1:])

    def _run_blank(self, batch: Batch) -> None:
        tokens = batch.tokens.shape[1]
        border = None if self._borders is None else self._borders.blank(tokens)
        self._stream.run(self._eager(batch, border, measured=True))
        self._run_blank_head(tokens, batch.sampled_rows)

    def _run_blank_head(self, tokens: int, rows: Ints) -> None:
        """Run the first stage's head over rows of a padding step; without stages, the head is part of the step."""
        if self._borders is not None and self._has_head:
            self._stream.run(functools.partial(self._take_hidden, self._borders.blank_hidden(tokens)))
            self._stream.run(self._head(rows))

    def _allocate(self, num_blocks: int, room: StateRoom, windows: Sequence[WindowRoom]) -> None:
        self._num_blocks, self._room, self._windows = num_blocks, room, windows
        empty = functools.partial(self._empty, dtype=self._dtype, device=self._stream.device)
        blocks = num_blocks, self._limits.block_size
        self.caches = layer_caches_of(self.decoder, blocks, empty, self._beside, room, self._state_dtype, windows)
        self._pages_there = torch.zeros(len(windows), num_blocks, dtype=torch.int32, device=self._stream.device)
        self._sent_pages = np.zeros((len(windows), num_blocks), np.int64)
        for cache in self.caches:
            if isinstance(cache, WindowedCache):
                for part in cache:  # a tile may begin before the window: masked elements must be finite
                    part[:1].view(torch.uint8).zero_()
        self._stream.join()

    def _captured_size(self, batch: Batch) -> StepSize | None:
        """Return the size of the captured step for a batch; None if it must run operation by operation."""
        if batch.embedded is not None:
            return None
        decodes = batch.num_decodes == len(batch.context_lens)
        if batch.adapters is not None and not (decodes and self._added().capturable(batch.adapters)):
            return None
        sizes = self._buckets if decodes else self._mixed
        return next((size for size in sizes if size.tokens >= batch.tokens.shape[1]), None)

    def _captured(self, size: StepSize, *, adapted: bool) -> Work:
        """Return work that replays the graph of a size. For a new size, run the step, capture it, return `_nothing`."""
        if (size, adapted) in self._graphs:
            return self._graphs[size, adapted]

        border = None if self._borders is None else self._borders.still(size.tokens)

        def step() -> None:
            self._padded(size, border, adapted=adapted)

        self._stream.run(step)
        self._graphs[size, adapted] = self._stream.capture(step)
        return _nothing

    def _added(self) -> DeviceAdapters:
        assert self.adapters is not None, "without LoRA, no sequence has an adapter"
        return self.adapters

    def _eager(self, batch: Batch, border: Border | None = None, *, measured: bool = False) -> Work:
        """Return work for a step, operation by operation; a stage runs it without the head. A measured step does not
        divide tokens among ranks, because in other steps one rank may get all of them."""
        tokens, samples, places = len(batch.token_ids), len(batch.sampled_rows), self._inputs.rows_of(batch)
        size = StepSize(tokens, len(batch.context_lens), True)
        entries, given = batch.adapters, self._inputs.given(batch)
        ahead = None if batch.ahead is None else Sent(self._stream, batch.ahead)
        take, take_sampled = (
            self._taking(some) for some in (entries, None if entries is None else entries.among(batch.sampled_rows))
        )

        def layers() -> torch.Tensor:
            take()
            pictures, there = given(), None if ahead is None else ahead.there()
            divide = not measured and entries is None
            if self._borders is None or border is None or pictures is None:
                return self._forward(size, places, pictures, there, border, may_divide=divide)
            self._borders.give(border, pictures)
            left = self._forward(size, places, pictures, there, border, may_divide=divide)
            self._borders.keep(border, pictures)
            return left

        def work() -> None:
            self._hidden = torch.empty(0)  # frees the previous step's hidden states first
            self._hidden = layers()
            take_sampled()
            if samples and self._has_head:
                self._leave_logits(self._hidden[self._inputs.sample_rows(samples)])

        def part() -> None:
            layers()

        return work if border is None else part

    def _taking(self, entries: AdapterRows | None) -> Work:
        """Return work that sets the adapters of later operations."""
        return _nothing if self.adapters is None else self.adapters.taking(entries)

    def _take_sent(self, adapted: bool, *, head: bool) -> None:
        """Apply the adapters that were sent for a captured step."""
        if adapted:
            self._added().taking_sent(head=head)
        elif self.adapters is not None:
            self.adapters.taking_none()

    def _padded(self, size: StepSize, border: Border | None, *, adapted: bool) -> None:
        """Run a step padded to a size; a stage runs it without the head. Called as work of the stream."""
        self._take_sent(adapted, head=False)
        hidden = self._forward(size, self._inputs.rows_for(size), border=border)
        if border is not None:
            return
        if size.mixed:
            if not len(self._kept):
                self._kept = hidden.new_zeros(self._mixed[-1].tokens, hidden.shape[1])
            copy(self._kept[: size.tokens], hidden)
            hidden = hidden[self._inputs.sample_rows(size.rows)]
        self._take_sent(adapted, head=True)
        self._leave_logits(hidden)

    def _leave_logits(self, hidden: torch.Tensor) -> None:
        """Write logits of rows, gathered from all ranks, to the memory that sampling reads; work of the stream."""
        self.decoder.logits(hidden, self._logits[: len(hidden)])

    def _take_kept(self) -> None:
        """Make `score` and `hidden_sum` read the hidden states of the last captured step."""
        self._hidden = self._kept

    def _take_hidden(self, hidden: torch.Tensor) -> None:
        """Make `score` and `hidden_sum` read the hidden states that `collect` collected."""
        self._hidden = hidden

    def _forward(
        self,
        size: StepSize,
        places: DeviceRows,
        given: GivenTensors | None = None,
        ahead: torch.Tensor | None = None,
        border: Border | None = None,
        *,
        may_divide: bool = False,
    ) -> torch.Tensor:
        tokens = size.tokens
        positions, slots = self._inputs.positions_and_slots(tokens)
        how: dict[str, Any] = {**self._attend, "given": given, "may_divide": may_divide}
        prompts = size.mixed and (places.decoding is not None or places.decodes < size.rows)
        how["states"] = self._inputs.states(size, prompts=prompts, drafts=self._room.drafts > 0)
        if ahead is not None:  # only the reference supports rows that attend to later positions
            places = dataclasses.replace(places, host=dataclasses.replace(places.on_host(), ahead=ahead))
            how["attend"] = attend_by_reference
        how["windowed"] = self._inputs.windowed(places, slots, self._pages_there)
        step = StepInput(positions, slots, places, self.caches, self._scales, **how)
        if border is None:
            return self.decoder.forward(self._inputs.token_ids(tokens, self._sampler.ids), step)
        assert isinstance(self.decoder, DecoderStack)
        token_ids = self._inputs.token_ids(tokens, self._sampler.ids)
        return self.decoder.part(token_ids, step, border.arrived, border.left)

    def _head(self, rows: Ints) -> Work:
        """Return work that computes logits of the step that `collect` collected, for sampling."""
        return self._of_rows(rows, self._leave_logits) if len(rows) else _nothing

    def _score(self, rows: Ints, scores: list[torch.Tensor]) -> Work:
        """Return work that appends logits of some rows of the last step to `scores`."""
        return self._of_rows(rows, lambda hidden: scores.append(self.decoder.logits(hidden)))

    def _of_rows(self, rows: Ints, use: Callable[[torch.Tensor], None]) -> Work:
        """Return work that calls `use` with the hidden states of some rows of the last step."""
        wanted, entries = Sent(self._stream, rows), self._entries
        take = self._taking(None if entries is None else entries.among(rows))

        def work() -> None:
            take()
            use(self._hidden[wanted.there()])

        return work


@dataclasses.dataclass(frozen=True)
class Passed:
    """A step without sampling; see `Launched`."""

    mark: Mark

    def tokens(self) -> tuple[()]:
        """Wait for the step; return no tokens."""
        self.mark.wait()
        return ()


_ONE = StepSize(1, 1, False)


def _nothing() -> None:
    """Work that does nothing."""
