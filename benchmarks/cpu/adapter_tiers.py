# SPDX-License-Identifier: MIT
"""What many registered adapters cost, and what a cold one does to its request and to its neighbours.

    python -m benchmarks.cpu.adapter_tiers MODEL.gguf FOLDER [--counts 5 100 1000 2000] [--memory 2000000000]
        [--streams 32] [--tokens 64] [--rounds 8] [--rank 8] [--colds 10] [--threads 2] [--json]
        [--turns FILE.jsonl] [--plot FILE.svg]

FOLDER gets as many adapters as the largest count where they are not there yet: distinct files of random numbers in
bfloat16, every linear layer, 4.9 MB each at rank 8 of SmolLM2-135M (9.8 GB for 2,000).

A line for each count: `--streams` clients ask one engine for answers of `--tokens` behind prompts of as many, each for
an adapter that is drawn by Zipf's law with exponent 1 from the first so many (S-LoRA's curve, arXiv 2311.03285, figure
of the number of adapters). One engine takes all counts in turns, `--rounds` times, and the median of the turns is shown
beside that of the first count in the same turns. The memory for adapters is bounded, so that with many of them some are
always cold: it is filled at first with those that long use would have left there. `--turns` keeps the turns of several
runs, whose medians are shown then, and `--plot` draws them.

The last lines ask, beside as many streams less one that all are answering, for adapters that are not in memory
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
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from benchmarks.cpu.depth import panel
from candle_vllm.core import InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.loading.adapters import CONFIG_FILE, WEIGHTS_FILE
from packages.core.tests.toy_adapter import linear_shapes, write_adapter


def write_missing(folder: Path, count: int, shapes: dict[str, tuple[int, int]], rank: int) -> None:
    """Adapters 0 to `count` - 1: the same random numbers, each time begun at another."""
    missing = [number for number in range(count) if not (path_of(folder, number) / WEIGHTS_FILE).exists()]
    each = 2 * rank * sum(sum(shape) for shape in shapes.values())
    free = shutil.disk_usage(folder).free
    if len(missing) * each > free - (1 << 30):
        raise SystemExit(f"{len(missing)} adapters of {each / 1e6:.1f} MB need more than the {free / 1e9:.1f} GB here")
    if not missing:
        return
    made = write_adapter(folder / "model", shapes, rank=rank, dtype="BF16")
    config, whole = (made / CONFIG_FILE).read_bytes(), (made / WEIGHTS_FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    numbers = memoryview(whole)[header:]
    for number in missing:
        path, turn = path_of(folder, number), 2 * (number + 1) * (len(numbers) // 2 // (count + 1))
        path.mkdir()
        (path / CONFIG_FILE).write_bytes(config)
        (path / WEIGHTS_FILE).write_bytes(b"".join((whole[:header], numbers[turn:], numbers[:turn])))


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

    async def answer(self, number: int | None, begun: asyncio.Semaphore | None = None) -> list[float]:
        """When it was asked for, and when each token came; `begun` is told of the eighth, with which steps are even."""
        vocabulary = self._engine.model_info.vocab_size
        prompt = [self._chance.randrange(1000, vocabulary - 1000) for _ in range(self._tokens)]
        params = SamplingParams(temperature=0.0, max_tokens=self._tokens, ignore_eos=True)
        chosen = None if number is None else adapter(self._folder, number)
        times = [time.perf_counter()]
        async for _ in self._engine.stream(prompt, params, lora_request=chosen):
            times.append(time.perf_counter())
            if begun is not None and len(times) == 9:
                begun.release()
        return times

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
        """Seconds to the first token of an answer with an adapter beside others, and their longest gap until then."""
        begun = asyncio.Semaphore(0)
        others = [asyncio.create_task(self.answer(None, begun)) for _ in range(streams - 1)]
        for _ in others:
            await begun.acquire()
        asked, first, *_ = await self.answer(number)
        gaps = [gap for other in others for gap in pairwise((await other)[1:])]
        return first - asked, max(end - start for start, end in gaps if end > asked and start < first)


def forget(path: Path) -> None:
    """Has the system read the files anew from the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def fill(engine: InferenceEngine, folder: Path, count: int, memory: int) -> None:
    """Loads what draws by Zipf's law would have left in memory."""
    engine.add_lora(adapter(folder, 0))
    most = min(count, memory // engine.stats().adapter_bytes)
    draws = random.Random(2).choices(range(count), [1 / (place + 1) for place in range(count)], k=20 * count)  # noqa: S311
    for number in reversed(list(dict.fromkeys(reversed(draws)))[:most]):
        engine.add_lora(adapter(folder, number))


Turn = dict[str, dict[str, float]]
"""By the number of adapters: tokens a second, loads, and seconds of them."""


async def take_turn(engine: InferenceEngine, asking: Asking, options: argparse.Namespace) -> Turn:
    """All counts, one after the other."""
    made: Turn = {}
    for count in options.counts:
        before = engine.stats()
        speed = await asking.turn(count, options.streams)
        after = engine.stats()
        loads = after.adapter_loads - before.adapter_loads
        seconds = after.adapter_load_seconds - before.adapter_load_seconds
        made[str(count)] = {"tokens a second": speed, "loads": loads, "load ms": 1e3 * seconds / max(1, loads)}
    return made


def medians(turns: Sequence[Turn]) -> list[dict[str, float]]:
    """A row for each count that all turns have."""
    counts = [count for count in turns[0] if all(count in turn for turn in turns)]
    return [
        {"adapters": int(count)}
        | {name: statistics.median(turn[count][name] for turn in turns) for name in turns[0][count]}
        | {
            "of the first": statistics.median(
                turn[count]["tokens a second"] / turn[counts[0]]["tokens a second"] for turn in turns
            )
        }
        for count in counts
    ]


def plot(rows: Sequence[dict[str, float]], streams: int) -> str:
    """Tokens a second by the number of adapters, as an SVG."""
    line = {"": [(row["adapters"], row["tokens a second"]) for row in rows]}
    drawn = panel(60, line, f"{streams} streams: tokens a second", "registered adapters")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 450 360" font-family="sans-serif" font-size="12">\n'
        f'<rect width="450" height="360" fill="white"/>{drawn}</svg>\n'
    )


async def measure(engine: InferenceEngine, options: argparse.Namespace) -> list[dict[str, float]]:
    asking = Asking(engine, options.folder, options.tokens)
    await asking.turn(1, options.streams)
    turns = [await take_turn(engine, asking, options) for _ in range(options.rounds)]
    if options.turns:
        with options.turns.open("a+", encoding="utf-8") as file:
            file.writelines(json.dumps(turn) + "\n" for turn in turns)
            file.seek(0)
            turns = [json.loads(line) for line in file]
    rows = medians(turns) if turns else []
    if options.plot:
        options.plot.write_text(plot(rows, options.streams), encoding="utf-8")
    chance = random.Random(1)  # noqa: S311
    more: list[tuple[float, float]] = []
    for _ in range(options.colds):
        held = {each.name for each in engine.list_loras() if each.state == "ready"}
        cold = chance.choice([n for n in range(max(options.counts)) if name_of(n) not in held] or [0])
        forget(path_of(options.folder, cold))
        wait, gap = await asking.beside(cold, options.streams)
        warm_wait, warm_gap = await asking.beside(cold, options.streams)
        more.append((wait - warm_wait, gap - warm_gap))
        rows.append({
            "cold, first token ms": 1e3 * wait, "warm": 1e3 * warm_wait,
            "longest gap of neighbours, cold ms": 1e3 * gap, "warm gap": 1e3 * warm_gap,
        })  # fmt: skip
    if more:
        waits, gaps = zip(*more, strict=True)
        rows.append({
            "of a cold one, median: first token later by ms": 1e3 * statistics.median(waits),
            "longest gap longer by ms": 1e3 * statistics.median(gaps),
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
    parser.add_argument("--turns", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with InferenceEngine(
        options.model, threads=options.threads, max_num_seqs=options.streams, enable_lora=True,
        lora_memory=options.memory, max_model_len=2 * options.tokens + 16, speculative_config={"method": "none"},
    ) as engine:  # fmt: skip
        write_missing(options.folder, max(options.counts), linear_shapes(engine._require()[1].config), options.rank)  # type: ignore[attr-defined]
        fill(engine, options.folder, max(options.counts), options.memory)
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
