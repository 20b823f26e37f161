# SPDX-License-Identifier: MIT
"""Paged attention on the CPU: one JSON line per result.

Decode: microseconds per layer and GB/s of keys and values read, with as many layers as the model has, each with its own
cache, so that nothing is in the processor's caches that would not be there in a step. Prefill: GFLOP/s of the causal
work. Every figure is the best of `--rounds`.

    python benchmarks/cpu/attention.py [--shape NAME] [--threads N] [--depths 128,1024]
        [--cache bf16,q8_0,q4_0]

With several types of `--cache` a line has the time of the first over its own, in rounds of all of them in turns.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from candle_vllm.core.config import CACHE_ALIASES, CACHE_TYPES
from candle_vllm.core.kernels.attention.cpu_cache import (
    BF16,
    CacheKind,
    key_cache_shape,
    number_bytes,
    scratch_bytes,
    stretch_step,
    value_cache_shape,
)
from candle_vllm.core.kernels.attention.cpu_record import AttendArguments, attend_operation, merge_operation
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.kv_write import WriteArguments, rotate_and_write_operation

SHAPES = {  # H, K, D, layers
    "smollm2": (9, 3, 64, 30),
    "qwen2.5-0.5b": (14, 2, 64, 24),
    "llama-8b": (32, 8, 128, 8),
    "gemma-4-e2b": (8, 1, 512, 7),  # layers without a window, and the same bytes in heads of 128
    "heads-of-128": (32, 4, 128, 7),
}
MEMORY = 3 << 30  # most bytes of caches


def small_bf16(random: np.random.Generator, count: int) -> np.ndarray:
    """Small bfloat16 numbers of either sign."""
    numbers = aligned(count, np.uint16)
    numbers[:] = random.integers(0, 1 << 16, count, np.uint16)
    numbers &= 0x83FF
    numbers |= 0x3C00
    return numbers


def quantised(shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that are codes and scales."""
    codes = aligned(math.prod(shape), np.uint8)
    codes[:] = 0x35
    return codes.reshape(shape)


class Bench:
    """A plan of one model's attention, layer after layer, for `streams` sequences of `context` tokens."""

    def __init__(
        self,
        shape: str,
        streams: int,
        context: int,
        new: int,
        team: ThreadTeam,
        block: int = 64,
        scatter: bool = False,
        kind: CacheKind = BF16,
    ) -> None:
        self.kinds = kind, kind
        self.heads, self.kv_heads, self.dim, layers = SHAPES[shape]
        self.team, self.block, tokens = team, block, streams * new
        pages = -(-context // block)
        layer_bytes = 4 * streams * pages * block * self.kv_heads * self.dim
        self.layers = max(1, min(layers, MEMORY // layer_bytes))
        random = np.random.default_rng(0)
        at = (streams * pages, block, self.layers, self.kv_heads, self.dim)
        self.keys, self.values = (
            (
                small_bf16(random, math.prod(shape)).reshape(shape).swapaxes(0, 1)
                for shape in (key_cache_shape(*at), value_cache_shape(*at))
            )
            if kind == BF16
            else (
                quantised(shape).swapaxes(0, 1) for shape in (key_cache_shape(*at, kind), value_cache_shape(*at, kind))
            )
        )
        self.q = small_bf16(random, tokens * self.heads * self.dim)
        self.out = np.zeros((tokens, self.heads, self.dim), np.float32)
        self.starts = np.arange(streams + 1, dtype=np.int64) * new
        self.contexts = np.full(streams, context, np.int64)
        order = random.permutation if scatter else np.arange
        self.tables = np.stack([order(streams * pages) for _ in range(self.layers)]).astype(np.int64)
        self.numbers = np.zeros(8, np.int64)
        self.numbers[:2] = tokens, streams
        width = (self.heads + 2 * self.kv_heads) * self.dim
        self.qkv = random.standard_normal((tokens, width), np.float32)
        self.angles = np.zeros((context, self.dim // 2), np.float32)
        self.positions = np.tile(np.arange(context - new, context, dtype=np.int64), streams)
        size = scratch_bytes(
            max_tokens=tokens,
            max_seqs=streams,
            heads=self.heads,
            head_dim=self.dim,
            max_context=context,
            threads=team.threads,
        )
        self.scratch = np.zeros(size // 8 + 16, np.int64)
        self.size = size
        self.fit = np.ones((self.kv_heads, 3, self.dim), np.float32)
        self.fit[:, 0] = 0
        self.slots = [
            (table.reshape(streams, pages)[np.arange(tokens) // new, self.positions // block] * block)
            + self.positions % block
            for table in self.tables
        ]
        self.pages = pages

    def _write_arguments(self, layer: int) -> WriteArguments:
        k_column = self.heads * self.dim
        return WriteArguments(
            qkv=address_of(self.qkv),
            stride=self.qkv.shape[1],
            q_column=0,
            k_column=k_column,
            v_column=k_column + self.kv_heads * self.dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            stretch_step=stretch_step(self.keys[layer].strides, self.dim, self.kinds[0]),
            block_shift=self.block.bit_length() - 1,
            half=self.dim // 2,
            cos=address_of(self.angles),
            sin=address_of(self.angles),
            positions=address_of(self.positions),
            slots=address_of(self.slots[layer]),
            q=address_of(self.q),
            key_cache=address_of(self.keys[layer]),
            value_cache=address_of(self.values[layer]),
            scale=0.18,
            fit=address_of(self.fit),
            group=self.heads // self.kv_heads,
        )

    def _attend_arguments(self, layer: int) -> AttendArguments:
        return AttendArguments(
            q=address_of(self.q),
            out=address_of(self.out),
            key_cache=address_of(self.keys[layer]),
            value_cache=address_of(self.values[layer]),
            query_start=address_of(self.starts),
            context_lens=address_of(self.contexts),
            block_tables=address_of(self.tables[layer]),
            table_stride=self.pages,
            stretch_step=stretch_step(self.keys[layer].strides, self.dim, self.kinds[0]),
            block_shift=self.block.bit_length() - 1,
            heads=self.heads,
            kv_heads=self.kv_heads,
            scratch=-(-address_of(self.scratch) // 64) * 64,
            scratch_size=self.size,
        )

    def seconds(self, rounds: int, *, write: bool, attend: bool) -> float:
        """Best time of one layer."""
        isa, words = host_isa(), []
        for layer in range(self.layers):
            rows = [(rotate_and_write_operation(*self.kinds), self._write_arguments(layer))] if write else []
            if attend:
                row = self._attend_arguments(layer)
                rows += [
                    (attend_operation(self.dim, isa, *self.kinds), row),
                    (merge_operation(self.dim, self.kinds[1]), row),
                ]
            for address, arguments in rows:
                words += plan_row(address, address_of(self.numbers), arguments, barrier=True)
        plan, count = np.array(words, np.int64), self.layers * (write + 2 * attend)
        self.team.run(plan, count)
        return best(lambda: self.team.run(plan, count), rounds) / self.layers

    def bytes_read(self) -> float:
        """By one layer."""
        context = int(self.contexts.sum())
        return 2 * context * self.kv_heads * self.dim * number_bytes(self.dim, self.kinds)


def in_turns(benches: dict[CacheKind, Bench], rounds: int) -> dict[CacheKind, tuple[float, float]]:
    """Best seconds of a layer of each, and the median of the first one's time over its own, in the same round."""
    times = {kind: list[float]() for kind in benches}
    for _ in range(rounds):
        for kind, bench in benches.items():
            times[kind].append(bench.seconds(1, write=False, attend=True))
    first = next(iter(times.values()))
    return {
        kind: (min(own), statistics.median(one / other for one, other in zip(first, own)))
        for kind, own in times.items()
    }


def best(function: Callable[[], None], rounds: int) -> float:
    """The shortest of `rounds` calls, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def read_speed() -> float:
    """What numpy reads with one thread, GB/s: tells a busy machine from an idle one."""
    data = np.ones(1 << 25, np.float32)
    return data.nbytes / best(lambda: data.max(), 3) / 1e9


def report(**fields: object) -> None:
    """One result."""
    sys.stdout.write(json.dumps({"benchmark": "cpu/attention", "machine": platform.processor(), **fields}) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Paged attention on the CPU: one JSON line per result.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--depths", default="128,1024,7000")
    parser.add_argument("--streams", default="1,32")
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--cache", default="bf16", help="types of keys and values")
    parser.add_argument("--block", type=int, default=64, help="block size")
    parser.add_argument("--scatter", action="store_true", help="blocks in random order instead of one after the other")
    options = parser.parse_args()
    team = ThreadTeam(options.threads)
    rows = {name: CACHE_TYPES[CACHE_ALIASES.get(name, name)] for name in options.cache.split(",")}
    names = {CacheKind.of(row.bits, row.minima, row.levels): name for name, row in rows.items()}
    common = {"shape": options.shape, "threads": options.threads, "block": options.block, "scatter": options.scatter}
    report(**common, kind="numpy read", gb_per_s=round(read_speed(), 1))
    for streams in map(int, options.streams.split(",")):
        for depth in map(int, options.depths.split(",")):
            more = options.block, options.scatter
            benches = {kind: Bench(options.shape, streams, depth, 1, team, *more, kind) for kind in names}
            for kind, (seconds, ratio) in in_turns(benches, options.rounds).items():
                bench = benches[kind]
                report(
                    **common,
                    kind="decode",
                    cache=names[kind],
                    streams=streams,
                    depth=depth,
                    us_per_layer=round(seconds * 1e6, 2),
                    times_as_fast=round(ratio, 2),
                    gb_per_s=round(bench.bytes_read() / seconds / 1e9, 1),
                    write_us=round(bench.seconds(options.rounds, write=True, attend=False) * 1e6, 2),
                )
    benches = {
        kind: Bench(options.shape, 1, options.prefill, options.prefill, team, options.block, options.scatter, kind)
        for kind in names
    }
    for kind, (seconds, ratio) in in_turns(benches, options.rounds).items():
        flop = 2 * options.prefill * (options.prefill + 1) * benches[kind].heads * benches[kind].dim
        report(
            **common,
            kind="prefill",
            cache=names[kind],
            tokens=options.prefill,
            us_per_layer=round(seconds * 1e6, 1),
            times_as_fast=round(ratio, 2),
            gflop_per_s=round(flop / seconds / 1e9),
            write_us=round(benches[kind].seconds(options.rounds, write=True, attend=False) * 1e6, 1),
        )
    team.close()


if __name__ == "__main__":
    main()
