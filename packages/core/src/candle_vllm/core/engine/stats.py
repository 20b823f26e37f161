# SPDX-License-Identifier: MIT
"""Statistics of an engine, each declared with its form, which `/metrics` and the sums over replicas use.

The part that observes a number reports it under the name of its field (`stats()` of the scheduler, the adapter store,
the drafter and others); `EngineStats.snapshot` puts the reports together.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self

import msgspec

from candle_vllm.core.shown import ShownStruct


class ReplicaStats(ShownStruct, frozen=True, kw_only=True):
    """Statistics of one replica: one of several engines with the same model.

    Attributes:
        alive: whether it accepts requests; a replica that has died is restarted.
        restarts: number of restarts since the start of the fleet.
        num_running, num_waiting, num_blocks, num_free_blocks: see `EngineStats`; 0 while it is not alive.
        prompt_tokens, cached_prompt_tokens: see `EngineStats`; since its last restart.
    """

    alive: bool
    restarts: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0


class Histogram(msgspec.Struct, array_like=True):
    """Counts of values per bucket, and the sum of the values. One thread writes at a time.

    It has no lock, because some values are measured at every token.

    Attributes:
        bounds: upper bounds of the buckets, ascending, without the infinite one.
        counts: number of values in each bucket, the infinite one included; all 0 if left out.
        total: sum of the values.

    Raises:
        ValueError: the numbers of bounds and counts do not match.
    """

    bounds: tuple[float, ...]
    counts: list[int] = []
    total: float = 0.0

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)
        elif len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.counts)} counts of a histogram with {len(self.bounds)} bounds")

    def observe(self, value: float) -> None:
        """Count one value in the first bucket whose upper bound is at least the value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: Histogram) -> None:
        """Add the observations of another histogram with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """Return a histogram with the same observations."""
        return Histogram(self.bounds, self.counts[:], self.total)


class Stat(NamedTuple):
    """Form of a field of `EngineStats`, and the series of `/metrics` that shows the field.

    Attributes:
        form: what the field is, and how the values of several engines are aggregated. A "counter" counts since the
            start, and the values are added; a counter of type `Histogram` is a histogram. A "gauge" is a current value:
            it ends with its engine, and the values are added. Of a "shared" gauge, such as bytes of a folder that
            all engines use, the maximum is taken. Of a "constant", the first value that is neither 0 nor empty.
        series: the name of the series; empty if the field has no series of its own.
        help: the help text of the series.
        label: the label of a series with a sample for each element of the field: the element's index, from 0.
        when: a gauge has samples only while this other field is not 0.
        zero: the value before the first observation: the field's default.
    """

    form: Literal["counter", "gauge", "shared", "constant"]
    series: str = ""
    help: str = ""
    label: str = ""
    when: str = ""
    zero: Any = 0

    @property
    def kind(self) -> Literal["counter", "gauge", "histogram"]:
        """Prometheus's type of the series."""
        if isinstance(self.zero, Histogram):
            return "histogram"
        return "counter" if self.form == "counter" else "gauge"

    def join(self, values: Sequence[Any]) -> Any:
        """Aggregate the values of several engines; without values, return `zero`."""
        if self.form == "shared":
            return max(values, default=self.zero)
        if self.form == "constant":
            return next(filter(None, values), self.zero)
        if isinstance(self.zero, Histogram):
            joined = Histogram(self.zero.bounds)
            for each in values:
                joined.merge(each)
            return joined
        if isinstance(self.zero, Mapping):
            return dict(sum(map(Counter, values), Counter[str]()))
        if isinstance(self.zero, tuple):
            return tuple(map(sum, itertools.zip_longest(*values, fillvalue=0)))
        return sum(values, self.zero)


class EngineStats(ShownStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot of the engine's statistics. A counter counts since the start; the help texts explain the other fields.

    Attributes:
        num_running, num_waiting: current number of running and waiting sequences.
        num_blocks, num_free_blocks, block_size: blocks of the KV cache, free blocks now, tokens of a block.
        generation_tokens: tokens of all outputs.
        finished: sequences by finish reason.
        step_seconds: estimated time of a step of one sequence with 0, 1, 2, ... draft tokens, relative to a plain step;
            the drafter chooses their number by it. Empty without speculative decoding.
        adapter_load_seconds: failed loads included.
        max_adapters: maximum number of adapters in one step; 0 without LoRA.
        running_adapters, waiting_adapters: current number of sequences by adapter, only for the adapters with the most.
        kept_block_bytes: in main memory and in Redis, of the first rank only; 0 without KV tiers.
        sleep_level: 0 while the engine is awake; see `InferenceEngine.sleep`.
        replicas: the statistics of each replica; empty for a single engine.
    """

    # fmt: off
    num_running: Annotated[int, Stat("gauge")]
    num_waiting: Annotated[int, Stat("gauge")]
    num_blocks: Annotated[int, Stat("gauge")]
    num_free_blocks: Annotated[int, Stat("gauge")]
    block_size: Annotated[int, Stat("constant")]
    generation_tokens: Annotated[int, Stat("counter")]
    finished: Annotated[Mapping[str, int], Stat("counter")] = {}
    preemptions: Annotated[int, Stat(
        "counter", "vllm:num_preemptions_total", "Preemptions of sequences, which are recomputed later.")]
    prompt_tokens: Annotated[int, Stat(
        "counter", "vllm:prefix_cache_queries_total", "Prompt tokens, each prompt counted once.")]
    cached_prompt_tokens: Annotated[int, Stat(
        "counter", "vllm:prefix_cache_hits_total", "Prompt tokens that were found in the prefix cache.")]
    drafts: Annotated[int, Stat(
        "counter", "vllm:spec_decode_num_drafts_total",
        "Drafts that were verified, one for each sequence and step.")] = 0
    draft_tokens: Annotated[int, Stat(
        "counter", "vllm:spec_decode_num_draft_tokens_total", "Draft tokens that were verified.")] = 0
    accepted_draft_tokens: Annotated[int, Stat(
        "counter", "vllm:spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted.")] = 0
    accepted_per_position: Annotated[tuple[int, ...], Stat(
        "counter", "vllm:spec_decode_num_accepted_tokens_per_pos_total",
        "Accepted draft tokens, by position in the draft.", label="position")] = ()
    step_seconds: Annotated[tuple[float, ...], Stat("constant")] = ()
    steps: Annotated[int, Stat("counter", "candle_vllm:engine_steps_total", "Steps of the engine.")]
    step_tokens: Annotated[Histogram, Stat(
        "counter", "candle_vllm:engine_step_tokens",
        "Tokens of a step: of prompts, decoded ones and draft tokens.")] = msgspec.field(
            default_factory=lambda: Histogram((1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)))
    adapters: Annotated[int, Stat(
        "shared", "candle_vllm:lora_adapters", "LoRA adapters of the engine.", when="max_adapters")] = 0
    adapters_in_memory: Annotated[int, Stat(
        "gauge", "candle_vllm:lora_adapters_in_memory", "LoRA adapters in memory.", when="max_adapters")] = 0
    adapter_bytes: Annotated[int, Stat(
        "gauge", "candle_vllm:lora_memory_bytes", "Bytes of LoRA adapters in memory.", when="max_adapters")] = 0
    adapter_loads: Annotated[int, Stat(
        "counter", "candle_vllm:lora_loads_total", "LoRA adapters that were loaded to memory.")] = 0
    adapter_load_failures: Annotated[int, Stat(
        "counter", "candle_vllm:lora_load_failures_total", "LoRA adapters that could not be loaded.")] = 0
    adapter_load_seconds: Annotated[float, Stat(
        "counter", "candle_vllm:lora_load_seconds_total", "Time of loading LoRA adapters, seconds.")] = 0.0
    adapter_evictions: Annotated[int, Stat(
        "counter", "candle_vllm:lora_evictions_total", "LoRA adapters that were evicted from memory.")] = 0
    max_adapters: Annotated[int, Stat("constant")] = 0
    running_adapters: Annotated[Mapping[str, int], Stat("gauge")] = {}
    waiting_adapters: Annotated[Mapping[str, int], Stat("gauge")] = {}
    kept_block_bytes: Annotated[int, Stat(
        "shared", "candle_vllm:prompt_cache_bytes",
        "Bytes of offloaded KV blocks: on disk, in main memory, in Redis.", when="num_blocks")] = 0
    checkpoints: Annotated[int, Stat(
        "gauge", "candle_vllm:state_checkpoints",
        "State checkpoints, from which prompts with the same prefix continue.", when="num_blocks")] = 0
    checkpoint_slots: Annotated[int, Stat(
        "gauge", "candle_vllm:state_checkpoint_slots",
        "Maximum number of state checkpoints; 0 if no layer has a state.", when="num_blocks")] = 0
    sleep_level: Annotated[int, Stat("shared")] = 0
    images_encoded: Annotated[int, Stat("counter", "candle_vllm:images_encoded_total", "Images that were encoded.")] = 0
    images_reused: Annotated[int, Stat(
        "counter", "candle_vllm:images_reused_total", "Images whose embeddings were reused.")] = 0
    image_failures: Annotated[int, Stat(
        "counter", "candle_vllm:image_failures_total", "Images that could not be encoded.")] = 0
    image_seconds: Annotated[float, Stat(
        "counter", "candle_vllm:image_encoding_seconds_total", "Time of encoding images, seconds.")] = 0.0
    kept_blocks_read: Annotated[int, Stat(
        "counter", "candle_vllm:prompt_cache_blocks_read_total", "Offloaded KV blocks that were read.")] = 0
    kept_blocks_written: Annotated[int, Stat(
        "counter", "candle_vllm:prompt_cache_blocks_written_total", "KV blocks that were offloaded.")] = 0
    kept_blocks_skipped: Annotated[int, Stat(
        "counter", "candle_vllm:prompt_cache_blocks_skipped_total",
        "KV blocks not offloaded, because writing was too slow.")] = 0
    kept_block_failures: Annotated[int, Stat(
        "counter", "candle_vllm:prompt_cache_failures_total",
        "Offloaded KV blocks that were damaged or late, or could not be read or written.")] = 0
    replicas: Annotated[tuple[ReplicaStats, ...], Stat("constant")] = ()
    # fmt: on

    @classmethod
    def snapshot(cls, *parts: Mapping[str, Any]) -> Self:
        """Return copies of the values that the parts of an engine report, by field; raises msgspec.ValidationError if a
        name is no field, a value has another type, or a field without default is absent."""
        reported = {name: value for part in parts for name, value in part.items()}
        return msgspec.convert(msgspec.to_builtins(reported), cls)


@cache
def forms(kind: type[EngineStats]) -> Mapping[str, Stat]:
    """Return the form of each field of `EngineStats`, or of a class with further fields."""
    found = dict[str, Stat]()
    for field in msgspec.structs.fields(kind):
        (stat,) = field.type.__metadata__
        default = 0 if field.required else field.default
        zero = default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        found[field.name] = stat._replace(zero=zero)
    return found


STATS = forms(EngineStats)
"""Form of each field of `EngineStats`."""


def combined(each: Sequence[EngineStats]) -> EngineStats:
    """Aggregate the statistics of several engines, field by field."""
    kind = type(each[0]) if each else EngineStats
    return kind(**{name: stat.join([getattr(stats, name) for stats in each]) for name, stat in forms(kind).items()})


def ended(stats: EngineStats) -> EngineStats:
    """Return the counters and constants of an engine that has ended, with all gauges at zero."""
    gauges = {name: stat.zero for name, stat in forms(type(stats)).items() if stat.form in ("gauge", "shared")}
    return msgspec.structs.replace(stats, **gauges)
