# SPDX-License-Identifier: MIT
"""The engine end to end, with random weights at a real model's sizes: one JSON line per result.

    python benchmarks/gpu/engine.py --model llama-3.1-8b [--gguf] [--batches 1 8 64 256] [--prompts 2048 8192]
        [--attention-backend triton] [--no-cuda-graphs] [--deterministic] [--seconds 90]
        [--set linear.OWN_ROWS=16 EngineConfig.max_num_seqs=64 ...]
        [--quick --device cpu --eager]

`what` says which result a line is. A step is the engine's: scheduler, sampler and detokenizer included; prompts are
random tokens and the prefix cache is off.

decode   `batch` streams with `context` tokens on average: `ms_step` (the clock over `--steps` steps, by the number of
         tokens that came out), `tok_s` of all streams, `roofline_share`: the time that weights and caches would take at
         the measured speed of a large copy, or the products at the measured rate, whichever is longer, over `ms_step`.
         `idle_share` is 1 less the GPU's time in replayed graphs over the step, `idle_share_profiled` 1 less that in
         kernels and copies by the profiler; see `idle.py`.
prefill  one prompt to its first token: `tok_s`, and `matmul_share` of the measured rate.
serve    `batch` prompts of `--depth` tokens at once, `--output` tokens each: output tokens per second over it all.
mixed    `batch` streams of `prompt` + `output` tokens that came one after the other, so that a prompt is read in most
         steps, each new one in place of one that has ended: `tok_s`, and `decoding_share`, that over the rate of as
         many streams at the same context that only decode.
load     seconds until the engine stands.

`--set` tries other tiles, switches and settings of the engine (`settings.py`); where one does not exist, the only line
says so under `absent`. `--gguf` takes the model as a Q4_K_M file with random blocks (`models.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import settings
import torch
from idle import ReplayClock, profiled_seconds
from measure import Deadline, ceilings, report
from models import SHAPES, Shape, gguf_read_bytes, write_folder, write_gguf

from candle_vllm.core import CandleVllmError, EngineConfig, InferenceEngine, SamplingParams

WARM = 8
"""Steps before the clock runs: graphs are captured, tables filled."""

Result = tuple[str, Callable[[], dict[str, Any]]]
"""A name, and what measures it."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """An engine and what is known of its model and machine."""

    engine: InferenceEngine
    shape: Shape
    read_bytes: int  # of weights in a step
    reached: dict[str, float]
    device: str
    clock: ReplayClock
    numbers: random.Random

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [self.numbers.randrange(2, self.shape.vocabulary) for _ in range(length)]


def main() -> None:
    """Measures what the command line asks for."""
    options = finished_options(arguments())
    deadline = Deadline(options.seconds)
    say = functools.partial(report, "engine", options.device, options.commit, **what_is_measured(options))
    with started(options, say) as bench:
        if bench is not None:
            measure_all(_results(bench, options), deadline, say)


def what_is_measured(options: argparse.Namespace) -> dict[str, Any]:
    """What stands in every line about the model and how the engine is set."""
    config = {name: getattr(options, name) for name in ("attention_backend", "deterministic", "gguf")}
    config["cuda_graphs"] = not options.no_cuda_graphs
    if options.set:
        config["set"] = options.set
    return {"model": options.model, "config": config}


@contextlib.contextmanager
def started(options: argparse.Namespace, say: Callable[..., None]) -> Iterator[Bench | None]:
    """An engine as the command line asks for it, after a line that says how long its start took; None, after a line
    that says why, where it cannot be had."""
    shape = SHAPES[options.model]
    reached = ceilings(options.device, options.quick)
    say(what="ceilings", copy_gbps=reached["copy"] / 1e9, matmul_tflops=reached["matmul"] / 1e12)
    clock = ReplayClock()
    with tempfile.TemporaryDirectory() as folder, clock.installed():
        source = Path(folder) / "model.gguf" if options.gguf else Path(folder)
        (write_gguf if options.gguf else write_folder)(source, shape)
        start = time.perf_counter()
        try:
            changed = settings.parsed(options.set)
            settings.apply(changed)
            config = dataclasses.replace(_engine_config(source, shape, options), **settings.engine_fields(changed))
            engine = InferenceEngine(config)
        except settings.NoSuchSettingError as error:
            say(what="load", absent=str(error))
            yield None
            return
        except CandleVllmError as error:  # a backend that is not there, for one
            say(what="load", failed=str(error))
            yield None
            return
        with engine:
            say(what="load", seconds=time.perf_counter() - start, weight_mb=engine.model_info.weight_bytes / 1e6)
            weights = gguf_read_bytes(shape) if options.gguf else 2 * shape.multiplied
            numbers = random.Random(0)  # noqa: S311 - the same prompts in every run
            yield Bench(engine, shape, weights, reached, options.device, clock, numbers)


def measure_all(results: list[Result], deadline: Deadline, say: Callable[..., None]) -> None:
    """A line for each result, or for what kept it from being one; what the time does not suffice for is named."""
    skipped = []
    for name, figures in results:
        if deadline.over:
            skipped.append(name)
            continue
        try:
            say(**figures())
        except Exception as error:
            say(what=name, failed=f"{type(error).__name__}: {error}"[:500])
    if skipped:
        say(skipped=skipped)


def arguments(description: str | None = __doc__) -> argparse.ArgumentParser:
    """What all that start an engine take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--gguf", action="store_true", help="as Q4_K_M")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 64, 8, 256])
    parser.add_argument("--prompts", nargs="*", type=int, default=[2048, 8192])
    parser.add_argument("--serve", nargs="*", type=int, default=[64], help="requests at once")
    parser.add_argument("--mixed", nargs="*", type=int, default=[64], help="streams one after the other")
    parser.add_argument("--depth", type=int, default=512, help="tokens of prompt before decoding is measured")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer, of --serve and --mixed")
    parser.add_argument("--steps", type=int, default=64, help="measured")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--attention-backend", default="auto")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--eager", action="store_true", help="the layers one by one in torch")
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=NUMBER", help="other tiles: see settings.py")
    parser.add_argument("--seconds", type=float, default=600.0, help="no measurement begins later than this")
    parser.add_argument("--quick", action="store_true", help="a toy model, to check this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    return parser


def finished_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with toy sizes where those are asked for."""
    options = parser.parse_args()
    if options.quick:
        options.model, options.batches, options.prompts = "toy", [1, 3], [40]
        options.serve, options.mixed = options.serve and [2], options.mixed and [3]
        options.depth, options.steps, options.output = 16, 4, 6
    return options


def _engine_config(source: Path, shape: Shape, options: argparse.Namespace) -> EngineConfig:
    decoded = [options.depth + most_tokens(batch, options.depth, options.steps) for batch in options.batches]
    mixed = [options.output + most_tokens(batch, options.output, options.output) for batch in options.mixed]
    longest = max([*options.prompts, *decoded, *mixed, options.depth + options.output])
    return EngineConfig(
        model=str(source),
        load_format="auto" if options.gguf else "dummy",
        device=options.device,
        attention_backend=options.attention_backend,
        cuda_graphs=not options.no_cuda_graphs,
        deterministic=options.deterministic,
        op_by_op=options.eager,
        threads=1 if options.quick else None,
        max_model_len=min(longest + 64, shape.context),
        max_num_seqs=max([*options.batches, *options.serve, *options.mixed, 1]),
        kv_cache_memory=(64 << 20) if options.quick else None,  # so that several can run beside each other
        enable_prefix_caching=False,
        seed=0,
    )


def _results(bench: Bench, options: argparse.Namespace) -> list[Result]:
    found: list[Result] = []
    decode = functools.partial(decoding, bench, options.depth, options.steps, options.temperature)
    found += [(f"decode {batch}", functools.partial(decode, batch)) for batch in options.batches]
    found += [(f"prefill {length}", functools.partial(prefilling, bench, length)) for length in options.prompts]
    serve = functools.partial(serving, bench, options.depth, options.output)
    found += [(f"serve {batch}", functools.partial(serve, batch)) for batch in options.serve]
    mixed = functools.partial(mixing, bench, options.output, options.steps)
    return found + [(f"mixed {batch}", functools.partial(mixed, batch)) for batch in options.mixed]


# ---- decode ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def streams(bench: Bench, depth: int, steps: int, temperature: float, batch: int) -> Iterator[None]:
    """So many that have answered their first tokens and decode for `steps` measured ones at least."""
    engine = bench.engine
    params = SamplingParams(temperature=temperature, max_tokens=most_tokens(batch, depth, steps), ignore_eos=True)
    waiting = {engine.add_request(bench.prompt(depth), params) for _ in range(batch)}
    running = set(waiting)
    try:
        while waiting:
            waiting -= {piece.request_id for piece in engine.step() if piece.token_ids}
        advance(engine, WARM)
        yield
    finally:
        stop(engine, running)


def stop(engine: InferenceEngine, running: set[str]) -> None:
    """Ends requests, and what is still under way."""
    for request_id in running:
        engine.abort(request_id)
    while engine.has_unfinished_requests:
        engine.step()


def decoding(bench: Bench, depth: int, steps: int, temperature: float, batch: int) -> dict[str, Any]:
    """Steps in which every stream decodes one token."""
    with streams(bench, depth, steps, temperature, batch):
        start = time.perf_counter()
        count = advance(bench.engine, steps) / batch
        seconds = (time.perf_counter() - start) / count
        context = depth + WARM + steps / 2
        figures = {
            "what": "decode",
            "batch": batch,
            "context": round(context),
            "ms_step": 1e3 * seconds,
            "tok_s": batch / seconds,
            "roofline_share": _floor(bench, batch, context) / seconds,
        }
        if bench.device == "cuda":
            figures |= _idle(bench, batch, steps // 2, seconds)
        return figures


def most_tokens(batch: int, depth: int, steps: int) -> int:
    """Of a stream that outlasts the measurement; the first ones decode while the last prompts are read."""
    return 2 * WARM + 3 * steps + batch * depth // 512


def advance(engine: InferenceEngine, steps: int) -> int:
    """Runs steps; the number of tokens that came out."""
    pieces = [piece for _ in range(steps) for piece in engine.step()]
    if any(piece.finished for piece in pieces):
        raise RuntimeError("a stream ended while it was measured")
    return sum(len(piece.token_ids) for piece in pieces)


def _floor(bench: Bench, batch: int, context: float) -> float:
    """Seconds that a step takes at least, by the measured ceilings."""
    moved = bench.read_bytes + batch * context * bench.shape.kv_bytes()
    return max(moved / bench.reached["copy"], 2 * batch * bench.shape.multiplied / bench.reached["matmul"])


def _idle(bench: Bench, batch: int, steps: int, seconds: float) -> dict[str, float]:
    figures = {}
    for name, working in (("idle_share", bench.clock.seconds), ("idle_share_profiled", profiled_seconds)):
        spent = working(lambda: advance(bench.engine, steps) / batch)
        if spent is not None:
            figures[name] = max(0.0, 1 - spent / seconds)
    return figures


# ---- whole requests --------------------------------------------------------------------------------------------------


def prefilling(bench: Bench, length: int) -> dict[str, Any]:
    """One prompt, the median of three after one that does not count."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    times = [_answered(bench, [length], params) for _ in range(4)][1:]
    seconds, shape = statistics.median(times), bench.shape
    products = 2 * length * (shape.multiplied - shape.vocabulary * shape.hidden)  # the head sees one token
    attention = 2 * shape.layers * shape.heads * shape.head_dim * length * (length + 1)
    return {
        "what": "prefill",
        "tokens": length,
        "ms": 1e3 * seconds,
        "tok_s": length / seconds,
        "matmul_share": (products + attention) / seconds / bench.reached["matmul"],
    }


def serving(bench: Bench, depth: int, output: int, batch: int) -> dict[str, Any]:
    """Many requests at once, prompts included."""
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    _answered(bench, [depth] * batch, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    seconds = _answered(bench, [depth] * batch, params)
    return {"what": "serve", "batch": batch, "prompt": depth, "output": output, "tok_s": batch * output / seconds}


def mixing(bench: Bench, output: int, steps: int, batch: int) -> dict[str, Any]:
    """Streams of `output` + `output` tokens in turns, against as many that only decode at the same context."""
    alone = decoding(bench, output, output, 0.0, batch)
    engine = bench.engine
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    running: set[str] = set()
    every = max(1, output // batch)  # steps from one to the next, so that they end one after the other too

    def turn(number: int) -> int:
        if len(running) < batch and number % every == 0:
            running.add(engine.add_request(bench.prompt(output), params))
        pieces = engine.step()
        running.difference_update(piece.request_id for piece in pieces if piece.finished)
        return sum(len(piece.token_ids) for piece in pieces)

    try:
        for number in range(output + every * batch):
            turn(number)
        start = time.perf_counter()
        tokens = sum(turn(number) for number in range(max(steps, output)))
        rate = tokens / (time.perf_counter() - start)
    finally:
        stop(engine, running)
    return {
        "what": "mixed",
        "batch": batch,
        "prompt": output,
        "output": output,
        "tok_s": rate,
        "decoding_tok_s": alone["tok_s"],
        "decoding_share": rate / alone["tok_s"],
    }


def _answered(bench: Bench, lengths: list[int], params: SamplingParams) -> float:
    """Seconds from the first request to the last answer."""
    prompts = [bench.prompt(length) for length in lengths]
    start = time.perf_counter()
    for prompt in prompts:
        bench.engine.add_request(prompt, params)
    while bench.engine.has_unfinished_requests:
        bench.engine.step()
    if bench.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
