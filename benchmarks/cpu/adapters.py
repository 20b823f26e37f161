# SPDX-License-Identifier: MIT
"""What adapters cost: steps and prompts with them beside those of the model alone, in turns in one engine.

    python benchmarks/cpu/adapters.py MODEL.gguf [--ranks 16 ...] [--streams 1 32] [--depth 128] [--prompt 1024]
        [--steps 24] [--repeat 3] [--lora-dtype int8 bf16 ...] [--json]

Adapters are random bfloat16 numbers and change every product of the layers. For each type that they may have in memory,
each in an engine of its own, for each rank and each number of streams: the model alone, one adapter for all streams,
and one for each; and one prompt, read with an adapter and without. All take turns. A figure is the median time of a
step, or of reading the prompt, over all rounds; the share is the time of that engine's model alone by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.conversion.gguf_tensors import Constant
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.adapters.adapter_loading import adapter_packer
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter
from candle_vllm.core.layers.adapters import number_places


def random_adapter(loaded: LoadedModel, rank: int, numbers: np.random.Generator) -> FittedAdapter:
    """Of every product of the layers, so small that answers hardly change."""

    def matrix(rows: int, columns: int) -> Constant:
        values = numbers.standard_normal((rows, columns), np.float32) * np.float32(0.01)
        values.view(np.uint32)[:] &= 0xFFFF0000  # as files have them
        return Constant("random", values.shape, "F32", values.nbytes, Path("random"), values)

    deltas = {
        path: {
            name: Delta(a=matrix(rank, place.columns), b=matrix(end - begin, rank))
            for place in places
            for name, (_, begin, end) in place.parts.items()
        }
        for path, places in number_places(loaded.decoder).items()
        if path not in ("embed", "head")
    }
    return FittedAdapter(digest=numbers.bytes(32), alora=None, deltas=deltas, rank=rank, nbytes=0, norm=0.0)


class Bench:
    """An engine, and how long its steps take.

    Args:
        dtype: of adapters in memory.
        ranks: of adapters, of each as many as streams.
    """

    def __init__(self, model: str, streams: int, threads: int | None, dtype: Any, ranks: Sequence[int]) -> None:
        self.config = EngineConfig(
            model=model,
            enable_lora=True,
            max_num_seqs=max(64, streams),
            enable_prefix_caching=False,
            threads=threads,
            lora_dtype=dtype,
            speculative_config={"method": "none"},  # a step is of one token of each stream
        )
        self.loaded = load_model(self.config, CPU, lambda *_: None)
        self.engine: Engine = build_engine(self.config, self.loaded)
        self.numbers = np.random.default_rng(0)
        self._asked = 0
        self.made = {rank: self._adapters(rank, streams) for rank in ranks}

    def _adapters(self, rank: int, count: int) -> list[PackedAdapter]:
        """Distinct ones."""
        pack = adapter_packer(self.config, self.loaded, self.engine.runner)
        return [pack(random_adapter(self.loaded, rank, self.numbers)) for _ in range(count)]

    def _ask(self, length: int, adapter: PackedAdapter | None) -> str:
        self._asked += 1
        name, vocabulary = str(self._asked), self.loaded.config.vocab_size
        prompt = self.numbers.integers(0, vocabulary, length).tolist()
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        prepared = self.engine.prepare(GenerationRequest(request_id=name, prompt_token_ids=prompt, params=params))
        for live in prepared:
            live.sequence.adapters = () if adapter is None else ((adapter, 1.0),)
        self.engine.add(prepared)
        return name

    def steps(self, depth: int, count: int, adapters: Sequence[PackedAdapter | None]) -> list[float]:
        """Seconds of `count` steps of a token of each stream, one for each of the adapters, or None."""
        names = {self._ask(depth - count - 1, adapter) for adapter in adapters}
        waiting, times = set(names), []
        while waiting:
            waiting -= {piece.request_id for piece in self.engine.step() if piece.token_ids}
        for _ in range(count):
            began = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - began)
        self._end(names)
        return times

    def prompt(self, length: int, adapter: PackedAdapter | None) -> float:
        """Seconds until a prompt's first token."""
        began = time.perf_counter()
        name = self._ask(length, adapter)
        while not any(piece.token_ids for piece in self.engine.step()):
            pass
        took = time.perf_counter() - began
        self._end({name})
        return took

    def _end(self, names: set[str]) -> None:
        for name in names:
            self.engine.abort(name)
        while self.engine.has_work:
            self.engine.step()


def main() -> None:
    """Measures and shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--depth", type=int, default=128, help="tokens of context")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt; 0 for none")
    parser.add_argument("--steps", type=int, default=24, help="measured in a round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--lora-dtype", nargs="+", default=["auto"], help="as the engine's setting")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    streams_most = max(options.streams)
    benches = {
        dtype: Bench(options.model, streams_most, options.threads, dtype, options.ranks) for dtype in options.lora_dtype
    }
    times: dict[tuple[str, int, int, int], list[float]] = defaultdict(list)  # type, rank, streams, adapters
    for turn in range(options.repeat + 1):
        found = defaultdict(list)
        for streams in options.streams:
            for dtype, bench in benches.items():
                found[dtype, 0, streams, 0] += bench.steps(options.depth, options.steps, [None] * streams)
            for rank in options.ranks:
                for count in sorted({1, streams}):
                    for dtype, bench in benches.items():
                        given = [bench.made[rank][stream % count] for stream in range(streams)]
                        found[dtype, rank, streams, count] += bench.steps(options.depth, options.steps, given)
        for dtype, bench in benches.items() if options.prompt else ():
            found[dtype, 0, 0, 0].append(bench.prompt(options.prompt, None))
            for rank in options.ranks:
                found[dtype, rank, 0, 1].append(bench.prompt(options.prompt, bench.made[rank][0]))
        if turn:  # the first is not counted: pages are touched, caches filled
            for key, values in found.items():
                times[key] += values
    for bench in benches.values():
        bench.engine.close()
    if not options.json:
        print(f"{'type':>8} {'rank':>6} {'streams':>8} {'adapters':>9} {'ms':>10} {'share':>6}")
    for (dtype, rank, streams, adapters), values in times.items():
        took, base = statistics.median(values), statistics.median(times[dtype, 0, streams, 0])
        row = {"type": dtype, "rank": rank, "streams": streams, "adapters": adapters, "ms": took * 1e3}
        row["share"] = base / took
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            shown = f"{dtype:>8} {rank or 'alone':>6} {streams or 'prompt':>8} {adapters:9}"
            print(f"{shown} {took * 1e3:10.3f} {base / took:6.3f}", flush=True)


if __name__ == "__main__":
    main()
