# SPDX-License-Identifier: MIT
"""Starts on the CPU, of one installation or of several in turns: the first token, `/ready`, and memory.

    python benchmarks/cpu/start.py MODEL.gguf [--python OLD/.venv/bin/python --python NEW/.venv/bin/python] [--rounds 5]

Every figure is of a process of its own, from exec on, with bytecode there. Prints one JSON line for each installation,
the medians, and with two a third, the second's over the first's (the median of the rounds' ratios).

`help_s`         `candle-vllm --help`, to its end
`first_token_s`  `candle-vllm generate PROMPT --max-tokens 1`, to the first byte of the text
`generate_s`     the same, to its end
`first_start_s`  to the first byte of the text where no kernel has been kept: compiled, or read where code travels
`port_s`         `candle-vllm`, to any answer of `/ready`          `ready_s`  to its 200
`peak_mb`        most resident memory of a process that makes 64 tokens behind a prompt of 1,024 with two threads

The first token's seconds by parts, in a process that goes through them one by one:
`python_s` the interpreter · `numpy_s`, `tokenizers_s` their imports · `import_s` the engine's own and what else it
needs · `load_s` until the engine is there, kernels included · `step_s` the first token · `next_s` one more
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

PROMPT = "Once upon a time"

PARTS = """
import json, sys, time
stamps = [time.time()]
def part():
    stamps.append(time.time())
import numpy
part()
import tokenizers
part()
from candle_vllm.core import InferenceEngine, SamplingParams
part()
engine = InferenceEngine(sys.argv[1])
part()
for _ in range(2):
    engine.generate(["Once upon a time"], SamplingParams(max_tokens=1), use_tqdm=False)
    part()
print(json.dumps(stamps))
"""

MEMORY = """
import resource, sys
from candle_vllm.core import InferenceEngine, SamplingParams
with InferenceEngine(sys.argv[1], threads=2) as engine:
    prompt = [100 + number * 37 % 30000 for number in range(1024)]
    engine.generate([prompt], SamplingParams(max_tokens=64, ignore_eos=True), use_tqdm=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

# Bytecode is what a second start has, whatever this shell says of it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    """Measures in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--python", action="append", help="of an installation; repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pythons = options.python or [sys.executable]
    for python in pythons:
        measure(python, options.model)
    rounds = [[measure(python, options.model) for python in pythons] for _ in range(options.rounds)]
    for number, python in enumerate(pythons):
        print(json.dumps({"python": python, **_medians([each[number] for each in rounds])}))
    if len(pythons) == 2:
        ratios = [{name: new[name] / old[name] for name in new} for old, new in rounds]
        print(json.dumps({"ratio": "second over first", **_medians(ratios)}))


def measure(python: str, model: str) -> Mapping[str, float]:
    """Every figure of one installation, once."""
    command = [python, "-m", "candle_vllm.server.cli"]
    started = time.perf_counter()
    subprocess.run([*command, "--help"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    found = {"help_s": time.perf_counter() - started}
    with tempfile.TemporaryDirectory() as empty:
        found["first_start_s"] = _generate(command, model, XDG_CACHE_HOME=empty)["first_token_s"]
    return found | _generate(command, model) | _serve(command, model) | _parts(python, model) | _memory(python, model)


def _generate(command: list[str], model: str, **changes: str) -> dict[str, float]:
    arguments = ["generate", PROMPT, "--m", model, "--max-tokens", "1"]
    environment, started = {**ENVIRONMENT, **changes}, time.perf_counter()
    with subprocess.Popen([*command, *arguments], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - started
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return {"first_token_s": first, "generate_s": time.perf_counter() - started}


def _serve(command: list[str], model: str) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--m", model, "--p", str(port), "--log-level", "error"]
    started = time.perf_counter()
    seen: list[float] = []
    process = subprocess.Popen([*command, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    try:
        while (status := _status(port)) != 200:
            if status and not seen:
                seen.append(time.perf_counter() - started)
            if process.poll() is not None or time.perf_counter() - started > 120:
                raise SystemExit(f"{command[0]} does not serve")
            time.sleep(0.02)  # asked more often, the server would answer that and load slower
        ready = time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    return {"port_s": seen[0] if seen else ready, "ready_s": ready}


def _status(port: int) -> int:
    """Of `/ready`; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _parts(python: str, model: str) -> dict[str, float]:
    started = time.time()
    stamps = [started, *json.loads(_output(python, PARTS, model))]
    names = ("python_s", "numpy_s", "tokenizers_s", "import_s", "load_s", "step_s", "next_s")
    return {name: after - before for name, before, after in zip(names, stamps, stamps[1:])}


def _memory(python: str, model: str) -> dict[str, float]:
    return {"peak_mb": float(_output(python, MEMORY, model))}


def _output(python: str, script: str, model: str) -> str:
    """What a script prints last."""
    done = subprocess.run([python, "-c", script, model], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


if __name__ == "__main__":
    main()
