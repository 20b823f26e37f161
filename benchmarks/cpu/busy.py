# SPDX-License-Identifier: MIT
"""What engines keep of their speed beside other work: quiet and beside busy loops, in turns, on one machine.

    python benchmarks/cpu/busy.py MODEL.gguf [--loops 0 2 4] [--shapes one batch prompt] [--rounds 3] [--json]
        [--also NAME=PYTHON_OR_FOLDER ...]                     another version of candle-vllm beside this one
        [--llama-bench NAME=FOLDER ...]                        llama.cpp's tools or a fork's: llama-bench and
                                                               llama-batched-bench in FOLDER
        [--openvino-python PATH]                               a Python with openvino-genai
        [--url NAME=http://HOST:PORT/v1 ...]                   any server that speaks OpenAI's completions

Shapes: `one` stream of 128 + 512 tokens, `batch` of 32 streams of 64 + 64, `prompt` of 1,024 tokens and one more. A
figure is the median over the rounds of tokens per second over the whole time: output tokens, and for `prompt` those of
the prompt. A busy loop is a process that only computes, with the priority of the engines; loops are stopped while they
are not wanted. In a round every engine runs beside every number of loops and quiet again behind the last, so that its
own quiet speed lies on both sides of what is compared with it: a machine's speed wanders within minutes.

`share` is the speed as a part of what would be fair: with T threads of an engine and n loops on C cores, C / (T + n) of
the round's quiet speed; `shares` are those of the rounds, whose median it is. `cpu` is how many cores the engine had,
where it is ours; what it lacks of T * C / (T + n) was slept through, and what it has without speed was waited away.
`foreign` is how many cores computed for anybody else: a figure with more than a tenth of a core of that is taken again,
three times at most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """Streams, and tokens of each one's prompt and answer."""

    streams: int
    prompt: int
    output: int

    @property
    def counted(self) -> int:
        """Tokens that a rate counts."""
        return self.prompt if self.output == 1 else self.streams * self.output


SHAPES = {"one": Shape(1, 128, 512), "batch": Shape(32, 64, 64), "prompt": Shape(1, 1024, 1)}


class Run(NamedTuple):
    """Tokens per second, and cores that were used, by the engine and by others (NaN where nobody knows)."""

    rate: float
    cores: float = float("nan")
    foreign: float = float("nan")


Measure = Callable[[Shape], Run]
MOST_FOREIGN = 0.1  # cores
Found = defaultdict[tuple[str, str, int], list[list[Run]]]  # the runs of each round, by engine, shape and loops

OPENVINO = """
import json, sys, time
import numpy as np, openvino as ov, openvino_genai as genai
config = genai.SchedulerConfig()
config.cache_size, config.max_num_seqs, config.max_num_batched_tokens = 2, 64, 2048
config.dynamic_split_fuse, config.enable_prefix_caching = True, False
pipe = genai.ContinuousBatchingPipeline(sys.argv[1], config, "CPU", {}, {})
text = "Numbers were written down long before anyone counted with machines. " * 300
ids = pipe.get_tokenizer().encode(text).input_ids.data
for line in sys.stdin:
    streams, prompt, output = json.loads(line)
    options = genai.GenerationConfig()
    options.max_new_tokens, options.ignore_eos = output, True
    options.do_sample, options.apply_chat_template = False, False
    prompts = [ov.Tensor(np.ascontiguousarray(ids[:, i : i + prompt])) for i in range(streams)]
    began, used = time.perf_counter(), time.process_time()
    pipe.generate(prompts, [options] * streams)
    print(json.dumps([time.perf_counter() - began, time.process_time() - used]), flush=True)
"""


# ---- engines ---------------------------------------------------------------------------------------------------------


def serve(model: str, threads: int | None) -> None:
    """Runs the shapes that standard input asks for; answers with wall and CPU seconds of each."""
    from candle_vllm.core import InferenceEngine, SamplingParams

    numbers = random.Random(0)  # noqa: S311 - the same prompts in every run
    with InferenceEngine(
        model, enable_prefix_caching=False, threads=threads, max_num_seqs=64, speculative_config={"method": "none"}
    ) as engine:
        for line in sys.stdin:
            streams, prompt, output = json.loads(line)
            vocabulary = engine.model_info.vocab_size
            prompts = [[numbers.randrange(vocabulary) for _ in range(prompt)] for _ in range(streams)]
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
            began, used = time.perf_counter(), time.process_time()
            answers = engine.generate(prompts, params, use_tqdm=False)
            took = [time.perf_counter() - began, time.process_time() - used]
            if any(len(answer.outputs[0].token_ids) != output for answer in answers):
                raise RuntimeError("an answer has not the length that was asked for")
            sys.stdout.write(json.dumps(took) + "\n")
            sys.stdout.flush()


@contextmanager
def worker(command: list[str], environment: dict[str, str] | None = None) -> Iterator[Measure]:
    """An engine in a process of its own, that answers as `serve` does."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def measure(shape: Shape) -> Run:
        asked.write(json.dumps(shape) + "\n")
        asked.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError(f"{command[0]} has ended")
        wall, used = json.loads(line)
        return Run(shape.counted / wall, used / wall)

    try:
        yield measure
    finally:
        asked.close()
        process.wait(60)


def llama(model: str, threads: int, folder: Path) -> Measure:
    """llama-bench and llama-batched-bench: a process for each figure, whose loading is not in it."""
    bench, batched = str(folder / "llama-bench"), str(folder / "llama-batched-bench")

    def measure(shape: Shape) -> Run:
        common = ["-m", model, "-t", str(threads)]
        if shape.streams == 1:
            pair = ["-p", "0", "-n", "0", "-pg", f"{shape.prompt},{shape.output}"]
            text = output_of(bench, *common, "-r", "1", *pair)
            rate = float(re.findall(r"\|\s+([\d.]+) ± [\d.]+ \|", text)[0])
            return Run(rate * shape.counted / (shape.prompt + shape.output))
        sizes = ["-npp", str(shape.prompt), "-ntg", str(shape.output), "-npl", str(shape.streams)]
        text = output_of(batched, *common, "-tb", str(threads), "-c", "8192", "-b", "2048", "-ub", "512", *sizes)
        row = re.findall(rf"^\|\s+{shape.prompt} \|\s+{shape.output} \|\s+{shape.streams} \|.*$", text, re.MULTILINE)[0]
        return Run(shape.counted / float(row.split("|")[9]))

    return measure


def output_of(*command: str) -> str:
    """Standard output and error of a program that must succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout[-300:]}")
    return done.stdout


def served(url: str, key: str | None) -> Measure:
    """A server; prompts are words, so that their length in tokens is what the server's answer says."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def call(path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url.rstrip("/") + path, data, headers)  # noqa: S310 - the user's own address
        with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
            return json.load(answer)

    model = call("/models")["data"][0]["id"]
    turn = iter(range(1 << 30))

    def measure(shape: Shape) -> Run:
        body = {"model": model, "max_tokens": shape.output, "temperature": 0, "ignore_eos": True}
        prompts = [f"{next(turn)}" + " and" * (shape.prompt - 4) for _ in range(shape.streams)]
        with ThreadPoolExecutor(shape.streams) as pool:
            began = time.perf_counter()
            usages = [got["usage"] for got in pool.map(lambda p: call("/completions", body | {"prompt": p}), prompts)]
            took = time.perf_counter() - began
        counted = sum(usage["prompt_tokens" if shape.output == 1 else "completion_tokens"] for usage in usages)
        return Run(counted / took)

    return measure


# ---- loops -----------------------------------------------------------------------------------------------------------


class Loops:
    """Processes that only compute, stopped while they are not wanted."""

    def __init__(self, most: int) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(most)]
        self._send(self._processes, signal.SIGSTOP)

    @contextmanager
    def running(self, count: int) -> Iterator[None]:
        """As many of them compute."""
        some = self._processes[:count]
        self._send(some, signal.SIGCONT)
        time.sleep(0.2)  # until they are spread over the cores
        try:
            yield
        finally:
            self._send(some, signal.SIGSTOP)

    def close(self) -> None:
        """Ends them."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _send(self, processes: list[subprocess.Popen[bytes]], number: int) -> None:
        for process in processes:
            process.send_signal(number)


# ---- whose time it is ------------------------------------------------------------------------------------------------


def cpu_seconds(process: int) -> float:
    """CPU time of a process, without its children."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family_seconds() -> float:
    """CPU time of this process, of its children, and of those that have ended."""
    children = Path("/proc/self/task").glob("*/children")
    living = {int(child) for listed in children for child in listed.read_text().split()}
    ended = os.times()
    return cpu_seconds(os.getpid()) + sum(map(cpu_seconds, living)) + ended.children_user + ended.children_system


def machine_seconds() -> float:
    """CPU time that the machine has had for everybody, and what its host took."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def watched(measure: Measure, shape: Shape) -> Run:
    """A figure, and what others took meanwhile; once more where that was too much."""
    tries = 4
    while True:
        began, before = time.perf_counter(), machine_seconds() - family_seconds()
        run = measure(shape)
        others = machine_seconds() - family_seconds() - before
        run = run._replace(foreign=others / (time.perf_counter() - began))
        tries -= 1
        if run.foreign <= MOST_FOREIGN or not tries:
            return run


# ---- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measures and prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["one", "batch"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--also", action="append", default=[])
    parser.add_argument("--url", action="append", default=[])
    parser.add_argument("--llama-bench", action="append", default=[])
    for name in ("openvino-python", "key"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = str(Path(options.model).resolve())
    if options.serve:
        serve(model, options.threads)
        return
    from contextlib import ExitStack

    with ExitStack() as stack:
        loops = Loops(max(options.loops))
        stack.callback(loops.close)
        own = [__file__, model, "--serve", "--threads", str(options.threads)]
        engines = {"candle-vllm": stack.enter_context(worker([sys.executable, *own]))}
        for name, _, place in (given.partition("=") for given in options.also):
            sources = ":".join(str(path) for path in sorted(Path(place).glob("packages/*/src")))
            python = sys.executable if sources else place
            engines[name] = stack.enter_context(worker([python, *own], {"PYTHONPATH": sources} if sources else None))
        for name, _, folder in (given.partition("=") for given in options.llama_bench):
            engines[name] = llama(model, options.threads, Path(folder))
        if options.openvino_python:
            engines["OpenVINO GenAI"] = stack.enter_context(worker([options.openvino_python, "-c", OPENVINO, model]))
        for name, _, url in (given.partition("=") for given in options.url):
            engines[name] = served(url, options.key)
        for measure in engines.values():
            for shape in options.shapes:
                measure(SHAPES[shape])  # not counted: pages are touched, caches filled
        found: Found = defaultdict(lambda: [[] for _ in range(options.rounds)])
        again = [0] if 0 in options.loops and any(options.loops) else []
        for turn in range(options.rounds):
            for shape in options.shapes:
                for name, measure in engines.items():
                    for count in options.loops + again:
                        with loops.running(count):
                            run = watched(measure, SHAPES[shape])
                        found[name, shape, count][turn].append(run)
                        told = f"{name}, {shape}, beside {count}: {run.rate:.1f} tok/s, foreign {run.foreign:.2f}"
                        print(told, file=sys.stderr, flush=True)
        show(found, options)


def show(found: Found, options: argparse.Namespace) -> None:
    """A line for each engine, shape and number of loops."""
    cores = len(os.sched_getaffinity(0))
    for (name, shape, count), turns in found.items():
        runs = [run for turn in turns for run in turn]
        row: dict[str, Any] = {"engine": name, "shape": shape, "loops": count}
        row["tok_s"] = round(statistics.median(run.rate for run in runs), 1)
        row["all"] = [round(run.rate, 1) for run in runs]
        row["cpu"] = round(statistics.median(run.cores for run in runs), 2)
        row["foreign"] = [round(run.foreign, 2) for run in runs]
        if quiet := found.get((name, shape, 0)):
            fair = min(1.0, cores / (options.threads + count)) if count else 1.0
            pairs = zip(turns, quiet, strict=True)
            shares = [round(mean_rate(ours) / mean_rate(alone) / fair, 3) for ours, alone in pairs]
            row |= {"share": round(statistics.median(shares), 3), "shares": shares}
        print(
            json.dumps(row) if options.json else "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


def mean_rate(runs: list[Run]) -> float:
    """Of a round's runs: of all their tokens over all their time, as they have equally many."""
    return statistics.harmonic_mean([run.rate for run in runs])


if __name__ == "__main__":
    main()
