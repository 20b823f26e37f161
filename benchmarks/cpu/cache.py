# SPDX-License-Identifier: MIT
"""What a smaller KV cache gains and costs, and one on disk: steps at depth, facts asked back, prompts after a restart.

    python benchmarks/cpu/cache.py step MODEL.gguf [--depth 7000] [--cache auto q8_0 q4_0] [--rounds 48]
    python benchmarks/cpu/cache.py needle MODEL.gguf [--tokens 2000] [--cache auto q8_0 q4_0] [--texts 3]
    python benchmarks/cpu/cache.py disk MODEL.gguf [--tokens 4096] [--cache auto] [--rounds 3] [--url redis://localhost]
                                                   [--cold] [--folder DIR]

`step` has an engine of each type read the same prompt, then decode one token in turns: the median step, and the median
over the rounds of the first type's time over its own. `needle` hides lines with numbers at eight depths of real text
(that of `perplexity.py`), asks for each behind it, in another order, and counts those whose every token is the
likeliest one, so that a greedy answer has them; `nats` are what the right answers' tokens take on average. What each
type costs in perplexity, `perplexity.py --cache` says. `disk` reads a prompt in a new engine whose folder of blocks is
empty, in another one when they are there, and once more there, where they are in memory; and says how fast the folder's
files are read alone, and as blocks. With `--cold` the system's memory forgets the files before each of both (which it
does of files that are on disk, without more rights), and they are read alone in their order, in the same pieces, before
and behind; the median of the rounds' ratios says how much of the disk's speed blocks get. `--folder` is on the disk to
measure. With `--url` the blocks are in Redis, whose model's blocks are deleted.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from perplexity import CACHE_SETTINGS, TEXT

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.perplexity import cut

NAMES = ("Ada", "Boris", "Clara", "Dimitri", "Elena", "Farid", "Greta", "Hugo")


def open_engine(stack: ExitStack, model: str, cache: str, context: int) -> InferenceEngine:
    """One stream's engine with that type of keys and values, or those of keys, values."""
    types: dict[str, Any] = {} if cache == "auto" else dict(zip(CACHE_SETTINGS, 2 * cache.split(",")))
    engine = InferenceEngine(
        model, max_model_len=context, max_num_seqs=1, enable_prefix_caching=False,
        speculative_config={"method": "none"}, **types,
    )  # fmt: skip
    return stack.enter_context(engine)


def steps(model: str, depth: int, caches: list[str], rounds: int) -> None:
    """Prints a line for each type."""
    with ExitStack() as stack:
        engines = {cache: open_engine(stack, model, cache, depth + rounds + 8) for cache in caches}
        params, numbers = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True), random.Random(0)  # noqa: S311
        prompt = [numbers.randrange(next(iter(engines.values())).model_info.vocab_size) for _ in range(depth)]
        for engine in engines.values():
            engine.add_request(prompt, params)
            while not any(piece.token_ids for piece in engine.step()):
                pass
        times = {cache: list[float]() for cache in caches}
        for _ in range(rounds):
            for cache, engine in engines.items():
                began = time.perf_counter()
                engine.step()
                times[cache].append(time.perf_counter() - began)
    first = times[caches[0]]
    print(f"{'cache':>10} {'step ms':>9} {'times as fast':>14}   one stream at {depth} tokens, {rounds} rounds")
    for cache, own in times.items():
        ratio = statistics.median(one / other for one, other in zip(first, own))
        print(f"{cache:>10} {statistics.median(own) * 1e3:9.3f} {ratio:14.2f}", flush=True)


def hidden(
    engine: InferenceEngine, text: list[int], tokens: int, numbers: random.Random
) -> tuple[list[int], list[range]]:
    """So many tokens of a text with a line for each name and the questions behind them, and where the answers stand."""

    def words(line: str) -> list[int]:
        return engine.tokenize(line, add_special_tokens=False)

    lines, asked = list[list[int]](), list[tuple[list[int], list[int]]]()
    for name in NAMES:
        secret = numbers.randrange(10_000, 99_999)
        lines.append(words(f"\nThe secret number of {name} is {secret}.\n"))
        asked.append((words(f"\nThe secret number of {name} is"), words(f" {secret}")))
    numbers.shuffle(asked)
    end, given, answers = words("."), list[int](), list[range]()
    piece = (tokens - sum(len(part) for each in (lines, *asked) for part in each) - len(asked) * len(end)) // len(lines)
    for n, line in enumerate(lines):
        before, behind = piece * n + piece // 2, piece * (n + 1)
        given += text[piece * n : before] + line + text[before:behind]
    for question, answer in asked:
        given += question
        answers.append(range(len(given), len(given) + len(answer)))
        given += answer + end
    return given, answers


def needles(model: str, texts: int, caches: list[str], tokens: int) -> None:
    """Prints a line for each type."""
    print(f"{'cache':>10} {'found':>7} {'nats':>8}   {len(NAMES)} numbers in each of {texts} texts of {tokens} tokens")
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for cache in caches:
        with ExitStack() as stack:
            engine = open_engine(stack, model, cache, tokens + 8)
            numbers, found, nats = random.Random(1), list[bool](), list[float]()  # noqa: S311 - the same for every type
            for text in cut(engine, TEXT.read_text("utf-8"), tokens, texts * tokens)[1][:texts]:
                given, answers = hidden(engine, text, tokens, numbers)
                known = engine.generate([given], scored, use_tqdm=False)[0].prompt_logprobs or ()
                for answer in answers:
                    chosen = [each.chosen for each in known[answer.start : answer.stop] if each is not None]
                    found.append(all(each.rank == 1 for each in chosen))
                    nats += [-each.logprob for each in chosen]
            print(f"{cache:>10} {sum(found):>4}/{len(found)} {statistics.mean(nats):8.4f}", flush=True)


def forgotten(paths: list[Path]) -> None:
    """Has the system's memory forget files, which are on disk then."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read_alone(paths: list[Path]) -> tuple[int, float]:
    """Bytes of files, and the seconds that reading them takes."""
    began = time.perf_counter()
    return sum(len(path.read_bytes()) for path in paths), time.perf_counter() - began


def kept(model: str, cache: str, tokens: int, rounds: int, url: str | None, cold: bool, at: str | None) -> None:
    """Prints a line for each way to a prompt's first token."""
    types: dict[str, Any] = {} if cache == "auto" else dict(zip(CACHE_SETTINGS, 2 * cache.split(",")))
    far = "from disk" if url is None else "from Redis"
    times: dict[str, list[float]] = {"computed": [], far: [], "from memory": []}
    one, size, engine_bytes, alone, before = SamplingParams(temperature=0, max_tokens=1), 0, 0, list[float](), 0.0
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=at) as folder:
            for ways in (("computed",), (far, "from memory")):
                place: Any = (
                    {"prompt_cache_path": Path(folder) / "blocks"} if url is None else {"prompt_cache_url": url}
                )
                settings: dict[str, Any] = {**place, **types}
                with InferenceEngine(model, max_model_len=tokens + 64, max_num_seqs=1, **settings) as engine:
                    draws = random.Random(number)  # noqa: S311
                    prompt = [draws.randrange(engine.model_info.vocab_size) for _ in range(tokens)]
                    engine.generate([[1, 2, 3]], one, use_tqdm=False)
                    if url is not None and far not in ways:
                        engine.reset_prefix_cache()
                        time.sleep(1)
                    paths = sorted(Path(folder).glob("*/*/*/*"), key=lambda path: path.stat().st_mtime_ns)
                    for way in ways:
                        if cold and way == far:
                            forgotten(paths)
                            before = read_alone(paths)[1]
                            forgotten(paths)
                        began = time.perf_counter()
                        engine.generate([prompt], one, use_tqdm=False)
                        times[way].append(time.perf_counter() - began)
                        if way == far:
                            if cold:
                                forgotten(paths)
                            size, seconds = read_alone(paths)
                            alone.append(statistics.mean((before, seconds)) if cold else seconds)
                    engine_bytes = engine.stats().kept_block_bytes
            size = size or engine_bytes
    print(f"{'a prompt of ' + str(tokens):>20} {'ms':>9} {'times as fast':>14}   medians of {rounds}")
    for way, own in times.items():
        ratio = statistics.median(one / other for one, other in zip(times["computed"], own))
        print(f"{way:>20} {statistics.median(own) * 1e3:9.1f} {ratio:14.1f}")
    more = [disk - memory for disk, memory in zip(times[far], times["from memory"])]
    rates = f"{size / 1e6:.0f} MB: {size / statistics.median(more) / 1e9:.2f} GB/s as blocks"
    if url is None:
        share = statistics.median(plain / blocks for plain, blocks in zip(alone, more))
        rates += f", {size / statistics.median(alone) / 1e9:.2f} as plain files{' that were cold' * cold}: {share:.2f}"
    print(rates)


def main() -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "needle", "disk"])
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--cache", nargs="+", default=["auto", "q8_0", "q4_0"], help="types of keys and values")
    parser.add_argument("--depth", type=int, default=7000, help="tokens of context of a step")
    parser.add_argument("--rounds", type=int, help="steps of each type (48), or new engines (3)")
    parser.add_argument("--tokens", type=int, default=2000, help="of a needle's text")
    parser.add_argument("--texts", type=int, default=3, help="with needles")
    parser.add_argument("--url", help="of Redis, in the place of a folder")
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the system's memory")
    parser.add_argument("--folder", metavar="DIR", help="where blocks are offloaded to meanwhile, in the place of /tmp")
    options = parser.parse_args()
    if options.what == "disk":
        for cache in options.cache:
            kept(options.model, cache, options.tokens, options.rounds or 3, options.url, options.cold, options.folder)
    elif options.what == "step":
        steps(options.model, options.depth, options.cache, options.rounds or 48)
    else:
        needles(options.model, options.texts, options.cache, options.tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
