# SPDX-License-Identifier: MIT
"""Statistics of an engine, each annotated with its aggregation over replicas and its series in `/metrics`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

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


def _by_key(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, values), Counter[str]()))


def _by_place(values: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(map(sum, itertools.zip_longest(*values, fillvalue=0)))


def _first(values: Sequence[Sequence[float]]) -> Sequence[float]:
    return next(filter(None, values), ())


class Stat(NamedTuple):
    """Annotation of a field of `EngineStats`.

    Attributes:
        series: the counter of `/metrics` that shows the field; empty without a counter of its own.
        help: the help text of the counter.
        now: whether the field is a gauge, which ends with its engine; other fields count since the start.
        join: aggregates the values of replicas: `sum`, or `max` if all replicas have the same or a shared value.
        label: the label of a counter with a sample for each element of the field: the element's index, from 0.
    """

    series: str = ""
    help: str = ""
    now: bool = False
    join: Callable[[Sequence[Any]], Any] = sum
    label: str = ""


class EngineStats(ShownStruct, frozen=True, kw_only=True):
    """A snapshot of the engine's counters.

    Attributes:
        num_running, num_waiting: current number of running and waiting sequences.
        num_blocks, num_free_blocks, block_size: blocks of the KV cache, free blocks now, tokens of a block.
        checkpoints, checkpoint_slots: current and maximum number of checkpoints of layer states.
        prompt_tokens, cached_prompt_tokens: tokens of all prompts since the start, and those found in the prefix cache.
        generation_tokens: tokens sampled, since the start.
        finished: sequences by finish reason, since the start.
        preemptions, steps: counts since the start.
        drafts, draft_tokens, accepted_draft_tokens: drafts (one for each sequence and step), draft tokens, and accepted
            draft tokens, since the start.
        accepted_per_position: number of accepted draft tokens at each position of a draft.
        step_seconds: estimated time of a step of one sequence with 0, 1, 2, ... draft tokens, relative to a plain step;
            the drafter chooses their number by it. Empty without speculative decoding.
        adapters, adapters_in_memory, adapter_bytes: known adapters, adapters in memory and their bytes, now.
        adapter_loads, adapter_load_failures, adapter_evictions: counts since the start.
        adapter_load_seconds: total time of the loads.
        max_adapters: maximum number of adapters in one step; 0 without LoRA.
        running_adapters, waiting_adapters: current number of sequences of the adapters with the most sequences.
        kept_block_bytes: current bytes of offloaded blocks (KV tiers) on disk, in main memory and in Redis (in the last
            two, of the first rank only); 0 without KV tiers.
        kept_blocks_read, kept_blocks_written: offloaded blocks read and written, since the start.
        kept_blocks_skipped: blocks that were not written because the writer was too slow, since the start.
        kept_block_failures: blocks that could not be read or written, were damaged or late, since the start.
        sleep_level: 0 while it is awake; see `InferenceEngine.sleep`.
        images_encoded, images_reused, image_failures: images that were encoded, images whose embeddings were reused,
            and images that could not be encoded, since the start.
        image_seconds: total time of encoding images, since the start.
        replicas: the statistics of each replica; empty for a single engine.
    """

    # fmt: off
    num_running: Annotated[int, Stat(now=True)]
    num_waiting: Annotated[int, Stat(now=True)]
    num_blocks: Annotated[int, Stat(now=True)]
    num_free_blocks: Annotated[int, Stat(now=True)]
    block_size: Annotated[int, Stat(join=max)]
    generation_tokens: int
    finished: Annotated[Mapping[str, int], Stat(join=_by_key)]
    preemptions: Annotated[int, Stat(
        "vllm:num_preemptions_total", "Preemptions of sequences, which are recomputed later.")]
    prompt_tokens: Annotated[int, Stat(
        "vllm:prefix_cache_queries_total", "Prompt tokens, each prompt counted once.")]
    cached_prompt_tokens: Annotated[int, Stat(
        "vllm:prefix_cache_hits_total", "Prompt tokens that were found in the prefix cache.")]
    drafts: Annotated[int, Stat(
        "vllm:spec_decode_num_drafts_total", "Drafts that were verified, one for each sequence and step.")] = 0
    draft_tokens: Annotated[int, Stat(
        "vllm:spec_decode_num_draft_tokens_total", "Draft tokens that were verified.")] = 0
    accepted_draft_tokens: Annotated[int, Stat(
        "vllm:spec_decode_num_accepted_tokens_total", "Draft tokens that were accepted.")] = 0
    accepted_per_position: Annotated[tuple[int, ...], Stat(
        "vllm:spec_decode_num_accepted_tokens_per_pos_total", "Accepted draft tokens, by position in the draft.",
        join=_by_place, label="position")] = ()
    step_seconds: Annotated[tuple[float, ...], Stat(join=_first)] = ()
    steps: Annotated[int, Stat("candle_vllm:engine_steps_total", "Steps of the engine.")]
    adapters: Annotated[int, Stat(now=True, join=max)] = 0
    adapters_in_memory: Annotated[int, Stat(now=True)] = 0
    adapter_bytes: Annotated[int, Stat(now=True)] = 0
    adapter_loads: Annotated[int, Stat("candle_vllm:lora_loads_total", "LoRA adapters that were loaded to memory.")] = 0
    adapter_load_failures: Annotated[int, Stat(
        "candle_vllm:lora_load_failures_total", "LoRA adapters that could not be loaded.")] = 0
    adapter_load_seconds: Annotated[float, Stat(
        "candle_vllm:lora_load_seconds_total", "Time of loading LoRA adapters, seconds.")] = 0.0
    adapter_evictions: Annotated[int, Stat(
        "candle_vllm:lora_evictions_total", "LoRA adapters that were evicted from memory.")] = 0
    max_adapters: Annotated[int, Stat(join=max)] = 0
    running_adapters: Annotated[Mapping[str, int], Stat(now=True, join=_by_key)] = msgspec.field(default_factory=dict)
    waiting_adapters: Annotated[Mapping[str, int], Stat(now=True, join=_by_key)] = msgspec.field(default_factory=dict)
    checkpoints: Annotated[int, Stat(now=True)] = 0
    checkpoint_slots: Annotated[int, Stat(now=True)] = 0
    sleep_level: Annotated[int, Stat(now=True, join=max)] = 0
    images_encoded: Annotated[int, Stat("candle_vllm:images_encoded_total", "Images that were encoded.")] = 0
    images_reused: Annotated[int, Stat(
        "candle_vllm:images_reused_total", "Images whose embeddings were reused.")] = 0
    image_failures: Annotated[int, Stat(
        "candle_vllm:image_failures_total", "Images that could not be encoded.")] = 0
    image_seconds: Annotated[float, Stat(
        "candle_vllm:image_encoding_seconds_total", "Time of encoding images, seconds.")] = 0.0
    kept_block_bytes: Annotated[int, Stat(now=True, join=max)] = 0
    kept_blocks_read: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_read_total", "Offloaded KV blocks that were read.")] = 0
    kept_blocks_written: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_written_total", "KV blocks that were offloaded.")] = 0
    kept_blocks_skipped: Annotated[int, Stat(
        "candle_vllm:prompt_cache_blocks_skipped_total", "KV blocks not offloaded, because writing was too slow.")] = 0
    kept_block_failures: Annotated[int, Stat(
        "candle_vllm:prompt_cache_failures_total",
        "Offloaded KV blocks that were damaged or late, or could not be read or written.")] = 0
    replicas: Annotated[tuple[ReplicaStats, ...], Stat(join=lambda _: ())] = ()
    # fmt: on


def _stat(hint: Any) -> Stat:
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Stat)), Stat())


_HINTS = get_type_hints(EngineStats, include_extras=True)
STATS: Mapping[str, Stat] = {name: _stat(_HINTS[name]) for name in EngineStats.__struct_fields__}
"""Annotation of each field of `EngineStats`."""
