"""What many registered adapters cost, and what a cold one does to its request and to its neighbours.

    python benchmarks/cpu/adapter_tiers.py MODEL.gguf FOLDER [--counts 5 100 1000 2000] [--memory 2000000000]
        [--streams 32] [--tokens 64] [--rounds 8] [--rank 8] [--colds 10] [--threads 2] [--json]

FOLDER gets as many adapters as the largest count where they are not there yet: distinct files of random numbers in
bfloat16, every linear layer, 4.9 MB each at rank 8 of SmolLM2-135M (9.8 GB for 2,000).

A line for each count: `--streams` clients ask one engine for answers of `--tokens` behind prompts of as many, each for
an adapter that is drawn by Zipf's law with exponent 1 from the first so many (S-LoRA's curve, arXiv 2311.03285, figure
of the number of adapters). One engine takes all counts in turns, `--rounds` times, and the median of the turns is shown
beside that of the first count in the same turns. Loads and evictions are those of all turns of a count; the memory for
adapters is bounded, so that with many of them some are always cold. The first turn of each is not counted.

The last lines ask, beside as many streams less one that have all begun to answer, for adapters that are not in memory
and for one that is, in turns: how long the first token takes, and the longest gap between two tokens of a neighbour
meanwhile. `posix_fadvise` has the system forget each file first, so that it is read from the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import time
from itertools import accumulate, pairwise
from pathlib import Path

from candle_vllm.core import InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.testing.toy_adapter import linear_shapes, write_adapter


def write_missing(folder: Path, count: int, shapes: dict[str, tuple[int, int]], rank: int) -> None:
    """Adapters 0 to `count` - 1, each of numbers of its own."""
    missing = [
        number for number in range(count) if not (path_of(folder, number) / "adapter_model.safetensors").exists()
    ]
    each = 2 * rank * sum(sum(shape) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if len(missing) * each > free - (1 << 30):
        raise SystemExit(f"{len(missing)} adapters of {each / 1e6:.1f} MB need more than the {free / 1e9:.1f} GB here")
    for number in missing:
        write_adapter(path_of(folder, number), shapes, rank=rank, seed=number, dtype="BF16")


def path_of(folder: Path, number: int) -> Path:
    return folder / f"adapter-{name_of(number)}"


def name_of(number: int) -> str:
    return f"{number:05d}"


def adapter(folder: Path, number: int) -> LoRARequest:
    return LoRARequest(name_of(number), lora_path=str(path_of(folder, number)))


class Asking:
    """Requests of random tokens to one engine.

    Args:
        engine: that answers.
        folder: with the adapters.
        tokens: of a prompt, and of an answer.
    """

    def __init__(self, engine: InferenceEngine, folder: Path, tokens: int) -> None:
        self._engine = engine
        self._folder = folder
        self._tokens = tokens
        self._chance = random.Random(0)  # noqa: S311

    async def answer(self, number: int | None, begun: asyncio.Semaphore | None = None) -> tuple[float, list[float]]:
        """Seconds to the first token, which `begun` is told of, and between each two."""
        vocabulary = self._engine.model_info.vocab_size
        prompt = [self._chance.randrange(1000, vocabulary - 1000) for _ in range(self._tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=self._tokens, ignore_eos=True)
        chosen = None if number is None else adapter(self._folder, number)
        began = time.perf_counter()
        times: list[float] = []
        async for _ in self._engine.stream(prompt, params, lora_request=chosen):
            times.append(time.perf_counter())
            if begun is not None and len(times) == 1:
                begun.release()
        return times[0] - began, [after - before for before, after in pairwise(times)]

    async def turn(self, count: int, streams: int) -> float:
        """Tokens a second of `streams` clients with two answers each, of `count` adapters."""
        weights = list(accumulate(1 / (place + 1) for place in range(count)))
        draws = self._chance.choices(range(count), cum_weights=weights, k=2 * streams)

        async def client(own: list[int]) -> None:
            for number in own:
                await self.answer(number)

        began = time.perf_counter()
        await asyncio.gather(*(client(draws[place::streams]) for place in range(streams)))
        return 2 * streams * self._tokens / (time.perf_counter() - began)

    async def beside(self, number: int, streams: int) -> tuple[float, float]:
        """Seconds to the first token of an answer with an adapter while others go on, and their longest gap then."""
        begun = asyncio.Semaphore(0)
        others = [asyncio.create_task(self.answer(None, begun)) for _ in range(streams - 1)]
        for _ in others:
            await begun.acquire()
        first = asyncio.create_task(self.answer(number))
        wait = (await first)[0]
        gaps = [await other for other in others]
        return wait, max(max(between) for _, between in gaps)


def forget(path: Path) -> None:
    """Has the system read the files anew from the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


async def measure(engine: InferenceEngine, options: argparse.Namespace) -> list[dict[str, float]]:
    asking = Asking(engine, options.folder, options.tokens)
    speeds: dict[int, list[float]] = {count: [] for count in options.counts}
    loads = dict.fromkeys(options.counts, 0)
    for turn in range(options.rounds + 1):
        for count in options.counts:
            before = engine.stats().adapter_loads
            speed = await asking.turn(count, options.streams)
            if turn:
                speeds[count].append(speed)
                loads[count] += engine.stats().adapter_loads - before
    first = options.counts[0]
    rows = [
        {
            "adapters": count,
            "tokens a second": statistics.median(speeds[count]),
            "of the first": statistics.median(
                own / base for own, base in zip(speeds[count], speeds[first], strict=True)
            ),
            "loads a turn": loads[count] / max(1, options.rounds),
        }
        for count in options.counts
    ]
    chance = random.Random(1)  # noqa: S311
    for _ in range(options.colds):
        held = {each.name for each in engine.list_loras() if each.state == "ready"}
        cold = chance.choice([n for n in range(max(options.counts)) if name_of(n) not in held] or [0])
        forget(path_of(options.folder, cold))
        wait, gap = await asking.beside(cold, options.streams)
        warm_wait, warm_gap = await asking.beside(cold, options.streams)
        rows.append({
            "cold, first token ms": 1e3 * wait, "warm": 1e3 * warm_wait,
            "longest gap of neighbours, cold ms": 1e3 * gap, "warm gap": 1e3 * warm_gap,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 100, 1000, 2000])
    parser.add_argument("--memory", type=int, default=2_000_000_000)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--colds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with InferenceEngine(
        options.model, threads=options.threads, max_num_seqs=options.streams, enable_lora=True,
        lora_memory=options.memory, max_model_len=2 * options.tokens + 16, speculative_config={"method": "none"},
    ) as engine:  # fmt: skip
        write_missing(options.folder, max(options.counts), linear_shapes(engine._require()[1].config), options.rank)  # type: ignore[attr-defined]
        rows = asyncio.run(measure(engine, options))
        stats = engine.stats()
        rows.append({
            "load ms": 1e3 * stats.adapter_load_seconds / max(1, stats.adapter_loads),
            "bytes an adapter": stats.adapter_bytes / max(1, stats.adapters_in_memory),
        })  # fmt: skip
    for row in rows:
        print(json.dumps(row) if options.json else ", ".join(f"{name} {value:.4g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
