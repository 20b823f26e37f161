# SPDX-License-Identifier: MIT
"""candle-vllm side by side with other CPU engines on one GGUF file and one machine, in one run.

    python benchmarks/cpu/compare.py MODEL.gguf [--deep] [--json]
        [--llama-bench PATH --llama-batched-bench PATH]        llama.cpp's tools
        [--ik-bench PATH --ik-batched-bench PATH]              ik_llama.cpp's tools
        [--openvino-python PATH]                               a Python with openvino-genai

Columns, in tokens per second: `prefill_1024` of one prompt; `decode_128`, `decode_1024` and, with --deep, `decode_7000`
of one stream at that depth; `batch32`, output tokens of 32 streams of 64 + 64 tokens over the whole time. Every engine
runs the same file on as many threads as there are physical cores. Each row is one engine; the last is candle-vllm's
figure over the best other of each column. The roofline line says what share of the memory's speed one stream reaches.
`peak_rss_mb` is the process's largest resident memory with 64 tokens behind a prompt of 1,024, `torch_rss_mb` what
importing torch alone takes of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.threads import physical_cores

COLUMNS = ("prefill_1024", "decode_128", "decode_1024", "decode_7000", "batch32")
Row = dict[str, float]

OPENVINO = """
import json, sys, time
import numpy as np, openvino as ov, openvino_genai as genai
config = genai.SchedulerConfig()
config.cache_size, config.max_num_seqs, config.max_num_batched_tokens = 2, 64, 2048
config.dynamic_split_fuse, config.enable_prefix_caching = True, False
pipe = genai.ContinuousBatchingPipeline(sys.argv[1], config, "CPU", {}, {})
text = "Numbers were written down long before anyone counted with machines. " * 900
ids = pipe.get_tokenizer().encode(text).input_ids.data

def seconds(prompts, count):
    options = genai.GenerationConfig()
    options.max_new_tokens, options.ignore_eos = count, True
    options.do_sample, options.apply_chat_template = False, False
    began = time.perf_counter()
    pipe.generate([ov.Tensor(np.ascontiguousarray(p)) for p in prompts], [options] * len(prompts))
    return time.perf_counter() - began

def median(once):
    return sorted(once() for _ in range(3))[1]

def decode(depth, count=64):
    return count / (seconds([ids[:, :depth]], count + 1) - seconds([ids[:, :depth]], 1))

seconds([ids[:, :1024]], 4)
row = {
    "prefill_1024": median(lambda: 1024 / seconds([ids[:, :1024]], 1)),
    "decode_128": median(lambda: decode(128)),
    "decode_1024": median(lambda: decode(1024)),
    "batch32": median(lambda: 32 * 64 / seconds([ids[:, i : i + 64] for i in range(32)], 64)),
}
if sys.argv[2] == "deep":
    row["decode_7000"] = median(lambda: decode(7000))
print(json.dumps(row))
"""


def output_of(*command: str) -> str:
    """Standard output and error of a program that must succeed."""
    return run(*command)[0]


def run(*command: str) -> tuple[str, float]:
    """The same, and the program's largest resident memory in MB."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        killer = threading.Timer(1800, process.kill)
        killer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            killer.cancel()
        output.seek(0)
        text = output.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed: {text[-300:]}")
    return text, usage.ru_maxrss / 1024


def ours(model: str, deep: bool) -> Row:
    """`candle-vllm bench` at each shape."""

    def bench(prompt: int, output: int, streams: int = 1) -> Row:
        shape = ["--prompt-tokens", str(prompt), "--output-tokens", str(output), "--concurrency", str(streams)]
        text = output_of(sys.executable, "-m", "candle_vllm.server.cli", "bench", "--m", model, *shape, "--json")
        return json.loads(text.strip().splitlines()[-1])

    short, middle = bench(128, 128), bench(1024, 64)
    row = {
        "prefill_1024": middle["prefill_tok_s"],
        "decode_128": short["decode_tok_s"],
        "decode_1024": middle["decode_tok_s"],
        "batch32": bench(64, 64, 32)["output_tok_s"],
        "start_s": short["start_s"],
        "peak_rss_mb": middle["peak_rss_mb"],
        "torch_rss_mb": run(sys.executable, "-c", "import torch")[1],
        "weight_mb": short["weight_mb"],
    }
    if deep:
        row["decode_7000"] = bench(7000, 64)["decode_tok_s"]
    return row


def llama_rates(bench: str, model: str, *arguments: str, repeat: int = 3) -> list[float]:
    """Tokens a second of each row of llama-bench's table."""
    text = output_of(bench, "-m", model, "-t", str(physical_cores()), "-r", str(repeat), *arguments)
    return [float(rate) for rate in re.findall(r"\|\s+([\d.]+) ± +[\d.]+ \|", text)]


def llama_streams(batched: str, model: str, prompt: int, output: int, streams: int, *more: str) -> float:
    """Output tokens a second of llama-batched-bench, over the whole time; `more` are switches without a value."""
    threads = str(physical_cores())
    text = output_of(
        *(batched, "-m", model, "-t", threads, "-tb", threads, "-c", "8192", "-b", "2048", "-ub", "512"),
        *("-npp", str(prompt), "-ntg", str(output), "-npl", str(streams), *more),
    )
    found = re.findall(rf"^\|\s+{prompt} \|\s+{output} \|\s+{streams} \|.*$", text, re.MULTILINE)
    return streams * output / float(found[0].split("|")[9])


def llama(
    model: str, deep: bool, bench: str, batched: str | None, depth: Callable[[int], list[str]], *more: str
) -> Row:
    """llama-bench and, if its path is given, llama-batched-bench.

    `depth` gives the arguments that measure 64 tokens at a depth; `more` are arguments of the other measurements.
    """
    threads, rates = str(physical_cores()), partial(llama_rates, bench, model)
    prefill, short = rates("-p", "1024", "-n", "128", *more)
    _, memory = run(bench, "-m", model, "-t", threads, "-r", "1", *depth(1024))
    row = {"prefill_1024": prefill, "decode_128": short, "decode_1024": rates(*depth(1024))[0]}
    if batched:
        row["batch32"] = llama_streams(batched, model, 64, 64, 32, *more[:1])
    row["peak_rss_mb"] = memory
    if deep:
        row["decode_7000"] = rates(*depth(7000))[0]
    return row


def bytes_per_token(model: str) -> int:
    """Bytes of weights that a token reads: all, but of an embedding table that is not also the head one row only."""
    with open_gguf(Path(model)) as checkpoint:
        sizes = {name: tensor.nbytes for name, tensor in checkpoint.tensors.items()}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


def memory_speed() -> float:
    """Bytes per second that all cores read from memory together, best of five."""
    from concurrent.futures import ThreadPoolExecutor

    parts = np.zeros((physical_cores(), 1 << 26), np.float32)
    parts += 1
    with ThreadPoolExecutor(len(parts)) as pool:

        def once() -> float:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            return parts.nbytes / (time.perf_counter() - began)

        return max(once() for _ in range(5))


def main() -> None:
    """Runs what it is pointed at and prints a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--json", action="store_true")
    for name in ("llama-bench", "llama-batched-bench", "ik-bench", "ik-batched-bench", "openvino-python"):
        parser.add_argument(f"--{name}")
    options = parser.parse_args()
    model, deep = str(Path(options.model).resolve()), options.deep
    engines: dict[str, Callable[[], Row]] = {"candle-vllm": lambda: ours(model, deep)}
    if options.llama_bench:
        depth = lambda n: ["-p", "0", "-n", "64", "-d", str(n), *(["-fa", "1"] if n > 4096 else [])]  # noqa: E731
        engines["llama.cpp"] = lambda: llama(model, deep, options.llama_bench, options.llama_batched_bench, depth)
    if options.ik_bench:
        depth_ik = lambda n: ["-p", "0", "-n", "0", "-gp", f"{n},64"]  # noqa: E731
        repacked = lambda n: [*depth_ik(n), "-rtr", "1"]  # noqa: E731
        tools = options.ik_bench, options.ik_batched_bench
        engines["ik_llama.cpp"] = lambda: llama(model, deep, *tools, depth_ik)
        engines["ik, repacked"] = lambda: llama(model, deep, *tools, repacked, "-rtr", "1")
    if options.openvino_python:
        mode = "deep" if deep else "short"
        engines["OpenVINO GenAI"] = lambda: json.loads(
            output_of(options.openvino_python, "-c", OPENVINO, model, mode).strip().splitlines()[-1]
        )
    rows: dict[str, Row] = {}
    for name, measure in engines.items():
        try:
            rows[name] = measure()
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            sys.stderr.write(f"{name} is left out: {error}\n")
            continue
        print_row(name, rows[name], options.json)
    others = [row for name, row in rows.items() if name != "candle-vllm"]
    mine = rows.get("candle-vllm", {})
    best = {column: max((row.get(column, 0.0) for row in others), default=0.0) for column in COLUMNS}
    print_row("ratio to best", {c: mine[c] / best[c] for c in COLUMNS if best[c] and c in mine}, options.json)
    if mine:
        speed, read = memory_speed(), mine["decode_128"] * bytes_per_token(model)
        print_row(
            "roofline", {"memory_gb_s": speed / 1e9, "read_gb_s": read / 1e9, "share": read / speed}, options.json
        )


def print_row(name: str, row: Row, as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps({"engine": name} | {key: round(value, 3) for key, value in row.items()}), flush=True)
    else:
        cells = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
        print(f"{name:16} {cells}", flush=True)


if __name__ == "__main__":
    main()
