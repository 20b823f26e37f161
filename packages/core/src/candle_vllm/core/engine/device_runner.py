"""Steps 5 to 7 on a GPU: a step is launched, and the next one prepared while it runs.

The host writes a step's numbers into staged memory; one copy brings them over. Tokens that the step before drew are
taken from where they were left on the device, so the host need not know them. A step that only decodes is the replay
of a captured graph, one for each size of batch; what remains of a graph's rows decodes nothing. Prompts are launched
operation by operation. Tokens go back to the host behind a mark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.batch import Batch, Ints
from candle_vllm.core.engine.device_stream import DeviceStream, Mark, Sent, Work
from candle_vllm.core.engine.model_runner import MAX_SCORED_ROWS
from candle_vllm.core.engine.staging import Staging
from candle_vllm.core.kernels.attention import AttentionRows, DeviceRows
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.models.registry import Decoder
from candle_vllm.core.sampling.device_sampler import DeviceSampler, DrawnRows
from candle_vllm.core.sampling.sampler import SampledToken
from candle_vllm.core.sampling.sampler import controls as controls_of
from candle_vllm.core.sampling.state import SamplingState

logger = logging.getLogger(__name__)

_SMALL_PROMPTS = (1, 8, 16, 32, 64, 128)  # tokens; kernels have forms for as many
MOST_CAPTURED = 512
"""Sequences of the largest step that is captured."""


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """The largest step.

    Attributes:
        tokens: in one step.
        sequences: in one step.
        table_width: blocks of the longest sequence.
        block_size: tokens of a block.
    """

    tokens: int
    sequences: int
    table_width: int
    block_size: int


def bucket_sizes(sequences: int) -> list[int]:
    """Sizes of captured steps: 1, 2, 4, 8, then multiples of 8 to 64, of 16 to 256, of 32 beyond."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, MOST_CAPTURED + 1, 32)]
    most = min(sequences, MOST_CAPTURED)
    return [*(size for size in sizes if size < most), most]


class DeviceRunner:
    """Runs a decoder on a GPU; see `ModelRunner`. `allocate` must be called before the first step.

    Args:
        decoder: the model, on the stream's device.
        limits: the largest step.
        stream: where steps run.
        dtype: of the cache; float8_e4m3fn is scaled by 1.
        attend: what computes attention, see `kernels/attention`; None is the package's own.
        graphs: capture decoding steps.
        finite_cache: every number of the cache must be finite from the start.
    """

    overlaps = True

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
    ) -> None:
        self.decoder = decoder
        self._empty = torch.zeros if finite_cache else torch.empty
        self._limits = limits
        self._stream = stream
        self._dtype = dtype
        self._attend = {} if attend is None else {"attend": attend}
        one = torch.ones(1, dtype=torch.float32, device=stream.device)
        self._scales = (one, one) if dtype == torch.float8_e4m3fn else None
        tokens, sequences = limits.tokens, limits.sequences
        self._staging = Staging(
            stream,
            {
                "controls": ((sequences, 5), np.float64),
                "query_start": ((sequences + 1,), np.int32),
                "context_lens": ((sequences,), np.int32),
                "sample_rows": ((sequences,), np.int32),
                "token_ids": ((tokens,), np.int32),
                "positions": ((tokens,), np.int32),
                "slots": ((tokens,), np.int32),
                "sources": ((tokens,), np.int32),
                "tables": ((sequences * limits.table_width,), np.int32),  # rows as wide as a step needs them
            },
        )
        self._tables = torch.zeros(sequences, limits.table_width, dtype=torch.int32, device=stream.device)
        self._logits = torch.zeros(sequences, decoder.config.vocab_size, dtype=torch.float32, device=stream.device)
        self._sampler = DeviceSampler(stream, self._logits, self._staging.device["controls"], graphs=graphs)
        self._buckets = bucket_sizes(sequences) if graphs else []
        self._graphs: dict[int, Work] = {}
        self._hidden = torch.empty(0)
        self._allocate(1)

    def launch(self, batch: Batch, states: Sequence[SamplingState]) -> DrawnRows | Passed:
        """See `ModelRunner`."""
        rows = len(batch.context_lens)
        bucket = self._bucket(batch)
        self._stage(batch, states, rows if bucket is None else bucket)
        if bucket is not None:
            self._stream.run(self._captured(bucket))
        else:
            self._stream.run(self._eager(batch))
        if not states:
            return Passed(self._stream.mark())
        return self._sampler.launch(states, self._controls[: len(states)], bucket)

    def score(self, rows: Ints) -> torch.Tensor:
        """See `ModelRunner`. Waits for the step."""
        scores: list[torch.Tensor] = []
        self._stream.run(self._score(rows, scores))
        self._stream.mark().wait()
        return scores[0]

    def close(self) -> None:
        """Waits for what was launched, and lets go of caches and graphs."""
        with contextlib.suppress(torch.AcceleratorError):  # a broken device has nothing to wait for
            self._stream.mark().wait()
        self._graphs.clear()
        self.key_caches = self.value_caches = ()

    def allocate(self, num_blocks: int) -> None:
        """Makes the cache, and captures decoding steps."""
        self._allocate(num_blocks)
        began = time.perf_counter()
        for size in reversed(self._buckets):  # the memory of the largest serves the others
            self._blank(size)
            self._captured(size)
        for size in self._buckets[:1] or [1]:
            self._blank(size)
            self._sampler.warm_up(size)
        self._stream.mark().wait()
        if self._buckets:
            logger.info("captured %d sizes of steps in %.1f s", len(self._buckets), time.perf_counter() - began)

    @property
    def num_graphs(self) -> int:
        """How many steps are captured."""
        return len(self._buckets)

    @property
    def edit_bytes(self) -> int:
        """What masks, penalties and log-probabilities may take: copies of the logits, and a table as large."""
        return 3 * self._logits.nbytes

    def largest_steps(self) -> tuple[Work, Work, Work]:
        """A small step, and a prompt and a decoding step of the largest size, over a cache of one block.

        They show what memory steps take, and compile on the way what later ones use; the small one comes first, for
        layers prepare themselves when they first run. The results mean nothing: blocks and positions are all 0.
        """
        limits = self._limits
        longest = limits.table_width * limits.block_size
        # The last token stands for the chunk that ends the longest prompt: what is made of its context counts too.
        others = limits.sequences - 1
        tokens = min(limits.tokens, others * longest + 1 if others else longest)
        starts = np.unique([*range(0, tokens - 1, longest), tokens - 1, tokens] if others else [0, tokens])

        def smallest() -> None:
            self._blank(1)
            self._stream.run(lambda: self._decode(1))
            for count in _SMALL_PROMPTS:
                if count <= min(tokens, longest):
                    self._launch_blank(np.array([0, count]), count)

        def prompt() -> None:
            self._launch_blank(starts, longest)
            self._stream.run(self._score(np.arange(min(MAX_SCORED_ROWS, tokens)), []))

        def decoding() -> None:
            self._blank(limits.sequences)
            self._stream.run(lambda: self._decode(limits.sequences))
            self._sampler.warm_up(limits.sequences)

        return smallest, prompt, decoding

    def _launch_blank(self, starts: Ints, last_context: int) -> None:
        """Prompts of nothing but zeros, which write nothing, the last behind a context."""
        rows, tokens = len(starts) - 1, int(starts[-1])
        contexts = np.diff(starts)
        contexts[-1] = last_context
        zeros = np.zeros(tokens, np.int64)
        batch = Batch(
            token_ids=zeros,
            positions=zeros,
            slots=zeros - 1,
            query_start=starts,
            context_lens=contexts,
            block_tables=np.zeros((rows, self._limits.table_width), np.int64),
            sources=zeros - 1,
            num_decodes=0,
            sample_rows=np.arange(min(self._limits.sequences, tokens)),
            samples=(),
        )
        self._stream.mark().wait()
        self._stage(batch, (), rows)
        self._stream.run(self._eager(batch))

    def _allocate(self, num_blocks: int) -> None:
        config = self.decoder.config
        shape = (num_blocks, self._limits.block_size, config.num_kv_heads, config.head_dim)

        def caches() -> tuple[torch.Tensor, ...]:
            return tuple(
                self._empty(shape, dtype=self._dtype, device=self._stream.device) for _ in range(config.num_layers)
            )

        self.key_caches, self.value_caches = caches(), caches()
        self._stream.join()

    def _bucket(self, batch: Batch) -> int | None:
        """The size of the captured step that runs a batch; None where none does."""
        rows = len(batch.context_lens)
        if batch.num_decodes < rows or len(batch.samples) < rows:
            return None
        return next((size for size in self._buckets if size >= rows), None)

    def _stage(self, batch: Batch, states: Sequence[SamplingState], padded: int) -> None:
        """Writes a step's numbers and sends them over; rows up to `padded` that no sequence has decode nothing."""
        rows, tokens = len(batch.context_lens), len(batch.token_ids)
        host = self._staging.host()
        for name in ("token_ids", "positions", "slots", "sources"):
            host[name][:tokens] = getattr(batch, name)
        host["query_start"][: rows + 1] = batch.query_start
        host["context_lens"][:rows] = batch.context_lens
        host["tables"][: batch.block_tables.size] = batch.block_tables.reshape(-1)
        host["sample_rows"][: len(batch.sample_rows)] = batch.sample_rows
        if padded > rows:
            _fill_up(host, rows, padded)
        if states:
            host["controls"][: len(states)] = controls_of(states)
        self._controls = host["controls"]
        self._staging.send("tables", batch.block_tables.size)
        sent = self._staging.device["tables"][: batch.block_tables.size].view(batch.block_tables.shape)
        target = self._tables[:rows, : sent.shape[1]]
        self._stream.run(lambda: _copy(target, sent))

    def _blank(self, rows: int) -> None:
        """Sends over a step whose rows decode nothing."""
        self._stream.mark().wait()  # no step came between that had waited for the copies before
        host = self._staging.host()
        host["query_start"][0] = 0
        _fill_up(host, 0, rows)
        self._staging.send("tables", 0)

    def _captured(self, rows: int) -> Work:
        """The graph of a decoding step. The first of a size runs as it is, and is captured for those after it."""
        if rows in self._graphs:
            return self._graphs[rows]

        def step() -> None:
            self._decode(rows)

        self._stream.run(step)
        self._graphs[rows] = self._stream.capture(step)
        return _nothing

    def _eager(self, batch: Batch) -> Work:
        """Any step, operation by operation."""
        there, rows, tokens = self._staging.device, len(batch.context_lens), len(batch.token_ids)
        samples, tables = len(batch.sample_rows), self._tables[:rows]
        known = AttentionRows(tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), tables)
        places = DeviceRows(
            there["query_start"][: rows + 1],
            there["context_lens"][:rows],
            tables,
            batch.num_decodes,
            most_tokens=int(np.diff(batch.query_start).max()),
            most_context=int(batch.context_lens.max()),
            host=known,
        )

        def work() -> None:
            self._hidden = torch.empty(0)  # that of the step before makes room
            self._hidden = self._forward(tokens, places)
            if samples:
                wanted = there["sample_rows"][:samples]
                self.decoder.logits(self._hidden[wanted], self._logits[:samples])

        return work

    def _decode(self, rows: int) -> None:
        """A step of one generated token for each of `rows` sequences; work on the device."""
        there, limits = self._staging.device, self._limits
        places = DeviceRows(
            there["query_start"][: rows + 1],
            there["context_lens"][:rows],
            self._tables[:rows],
            rows,
            most_tokens=1,
            most_context=limits.table_width * limits.block_size,
        )
        self._hidden = self._forward(rows, places)
        self.decoder.logits(self._hidden, self._logits[:rows])

    def _forward(self, tokens: int, places: DeviceRows) -> torch.Tensor:
        there = self._staging.device
        sources = there["sources"][:tokens]
        drawn = self._sampler.ids[sources.clamp(min=0)].to(torch.int32)
        token_ids = torch.where(sources >= 0, drawn, there["token_ids"][:tokens])
        step = StepInput(
            there["positions"][:tokens],
            there["slots"][:tokens],
            places,
            self.key_caches,
            self.value_caches,
            self._scales,
            **self._attend,
        )
        return self.decoder.forward(token_ids, step)

    def _score(self, rows: Ints, scores: list[torch.Tensor]) -> Work:
        """Logits of some rows of the last step, into the list."""
        wanted = Sent(self._stream, rows)
        return lambda: scores.append(self.decoder.logits(self._hidden[wanted.there()]))


@dataclasses.dataclass(frozen=True)
class Passed:
    """A step that draws nothing; see `Launched`."""

    mark: Mark

    def tokens(self) -> list[SampledToken]:
        """Nothing; waits for the step."""
        self.mark.wait()
        return []


def _fill_up(host: Mapping[str, NDArray[Any]], first: int, last: int) -> None:
    """Rows of a decoding step without a sequence: no context, nothing written, the likeliest token."""
    for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1), ("sources", -1), ("context_lens", 0)):
        host[name][first:last] = value
    host["query_start"][first + 1 : last + 1] = range(first + 1, last + 1)
    host["controls"][first:last] = (0.0, 0.0, 0.0, 1.0, 0.5)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _nothing() -> None:
    """The step has run already."""
