# SPDX-License-Identifier: MIT
"""First steps of Ollama's, llama.cpp's and vLLM's documentation: `python benchmarks/suites/first_steps.py`.

`first_steps.toml` is the list. Each step must answer, or end with one sentence that says what to write, as it says.
Arguments choose: `vllm`, or `vllm:3-9` for some of its steps, counted from 1.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import httpx
from suite import HERE

from tests.real_models import all_minilm

_COMMAND = [sys.executable, "-m", "candle_vllm"]
_PROGRAMS = {  # the command here for each program of the other projects
    "ollama": "", "vllm": "", "llama serve": "serve", "llama-server": "serve", "llama cli": "chat", "llama-cli": "chat",
    "./llama-completion": "generate", "./llama-bench": "bench", "./llama-batched-bench": "bench",
    "./llama-quantize": "quantize",
}  # fmt: skip
_START = re.compile("|".join(map(re.escape, sorted(_PROGRAMS, key=len, reverse=True))))
_ADDRESS = re.compile(r"http://localhost:(11434|8080|8000)")
_MODULES = "import sys, candle_vllm as V; sys.modules |= {'vllm': V, 'vllm.sampling_params': V}\n"
_SECONDS = 180  # for one step
_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def main() -> int:
    """Try the steps; return 0 if each did what the list says."""
    blocks = tomllib.loads((HERE / "first_steps.toml").read_text(encoding="utf-8"))
    wanted: dict[str, list[int]] = {}
    for word in sys.argv[1:] or blocks:
        name, numbers = _chosen(word, blocks)
        wanted.setdefault(name, []).extend(numbers)
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("mcp.json").write_text('{"mcpServers": {}}')
        Path("template.jinja").write_text(_TEMPLATE)
        Path("grammar.gbnf").write_text('root ::= "yes" | "no"')
        for name, numbers in wanted.items():
            steps = {number: _step(blocks[name]["steps"][number - 1]) for number in numbers}
            for number in [one for one in numbers if "run" in steps[one] or "python" in steps[one]]:
                results[f"{name}:{number}"] = _shown(f"{name}:{number}", _tried(steps[number], ""))
            if asking := [one for one in numbers if "client" in steps[one]]:
                with _server(blocks[name]["serve"]) as address:
                    for number in asking:
                        results[f"{name}:{number}"] = _shown(f"{name}:{number}", _tried(steps[number], address))
    right = sum(not fault for fault in results.values())
    print(f"{right} of {len(results)} did what the list says")
    return 0 if right == len(results) > 0 else 1


def _shown(name: str, fault: str) -> str:
    print(name, fault or "ok", flush=True)
    return fault


def _chosen(word: str, blocks: dict[str, Any]) -> tuple[str, list[int]]:
    name, _, some = word.partition(":")
    first, _, last = some.partition("-")
    count = len(blocks[name]["steps"])
    return name, list(range(int(first or 1), int(last or first or count) + 1))


def _step(step: str | dict[str, str]) -> dict[str, str]:
    return {"run": step} if isinstance(step, str) else step


def _tried(step: dict[str, str], address: str) -> str:
    """Try a step; return "" if it did what the list says, else what it did."""
    if "run" in step:
        code, out = _command(step["run"])
    else:
        text = _local(step.get("client") or step["python"], address)
        if text.startswith(("from ", "import ")):
            command = [sys.executable, "-c", (_MODULES if "python" in step else "") + text]
            variables = {"OLLAMA_HOST": address}
        else:
            words = shlex.split(text)
            ours = words[0] in _PROGRAMS
            command = [*(_COMMAND if ours else ["curl", "--silent", "--fail-with-body"]), *words[1:]]
            variables = {"CANDLE_VLLM_PORT": address.rpartition(":")[2]}
        code, out = _run(command, variables)
    lines = out.strip().splitlines() or [""]
    if "says" not in step:
        return "" if code == 0 and lines[-1] else f"ends with {code}: {lines[-1]:.300}"
    sentences = [line for line in lines if "error" in line]
    fits = code != 0 and len(sentences) == 1 and step["says"] in sentences[0]
    return "" if fits else f"should say {step['says']!r}, ends with {code}: {lines[-1]:.300}"


def _local(text: str, address: str = "") -> str:
    """Replace the placeholders of a step by a local model, by local files and by the address of the server."""
    for name, value in (
        ("EMBEDDER", str(all_minilm())), ("TEMPLATE", "template.jinja"), ("GRAMMAR", "grammar.gbnf"),
        ("MODEL", "demo"),
    ):  # fmt: skip
        text = re.sub(rf"\b{name}\b", value, text)
    return _ADDRESS.sub(address, text)


def _command(line: str) -> tuple[int, str]:
    """Run a command line; send one request to a server that it starts, and end the server."""
    line = _local(line.removeprefix('echo "Hello world" | '))
    match = _START.match(line)
    assert match is not None, line
    words = [*shlex.split(_PROGRAMS[match[0]]), *shlex.split(line[match.end() :])]
    if words[:1] != ["serve"] or any(word.startswith("--help") for word in words):
        return _run([*_COMMAND, *words], {})
    try:
        with _server(line) as address, _http(address) as client:
            model = client.get("/v1/models").json()["data"][0]["id"]
            path = "/v1/embeddings" if "--embedding" in words else "/v1/completions"
            extra = {"input": "Hi"} if "--embedding" in words else {"prompt": "Hi", "max_tokens": 4}
            answer = client.post(path, json={"model": model, **extra})
            return (0 if answer.is_success else 1), answer.text
    except RuntimeError as error:
        return 1, str(error)


@contextmanager
def _server(line: str) -> Iterator[str]:
    """Start the server of a command line and give its address; `RuntimeError` with its output if it ends."""
    match = _START.match(line := _local(line))
    assert match is not None, line
    words = [*shlex.split(_PROGRAMS[match[0]]), *shlex.split(line[match.end() :])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for flag in ("--port", "--ollama-port"):  # theirs may be taken on this machine
        if flag in words:
            at = words.index(flag)
            words[at : at + 2] = ["--port", port]
    address = f"unix:{words[words.index('--uds') + 1]}" if "--uds" in words else f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        variables = os.environ | {"CANDLE_VLLM_PORT": port}
        process = subprocess.Popen([*_COMMAND, *words], env=variables, stdout=log, stderr=log, text=True)
        try:
            _until_ready(process, address)
            yield address
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(log.read() or str(error)) from None
        finally:
            process.terminate()
            process.wait(60)


def _until_ready(process: subprocess.Popen[str], address: str) -> None:
    end = time.monotonic() + _SECONDS
    with _http(address) as client:
        while process.poll() is None and time.monotonic() < end:
            try:
                if client.get("/ready").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise RuntimeError("error: it did not start in time")


def _http(address: str) -> httpx.Client:
    uds = address.removeprefix("unix:") if address.startswith("unix:") else None
    base = "http://localhost" if uds else address
    key = {"Authorization": "Bearer token-abc123"}
    return httpx.Client(base_url=base, transport=httpx.HTTPTransport(uds=uds), headers=key, timeout=_SECONDS)


def _run(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            command, env=os.environ | variables, input="hi\n", capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return 124, "it takes too long"
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


if __name__ == "__main__":
    raise SystemExit(main())
