# SPDX-License-Identifier: MIT
"""Time to the first token of a chat's second turn, beside that of its first: one JSON line per round, and the medians.

    python benchmarks/cpu/turns.py [MODEL | --shape qwen3.5-0.8b|lfm2-1.2b [--layers N]] [--tokens 4000]
        [--answer 64] [--more 40] [--rounds 5] [--threads N] [--llama-server PATH]

The first turn is a prompt of so many tokens, answered with `--answer` tokens; the second one is that prompt, the answer
and `--more` tokens. In a model whose layers keep states it goes on from the checkpoint at the answer's last whole
block. Each round has a prompt of its own. `computed` are the tokens of the second turn that were not found in the
cache. Without MODEL a model of that shape with random weights is measured, in 4 bits.

With `--llama-server` the same turns are asked of llama.cpp's server too, which serves the same GGUF file in one slot
with its prompt cache; each round asks one engine after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.testing.toy_model import write_toy_tokenizer

_QWEN: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
_LFM2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "block_auto_adjust_ff_dim": False,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "conv_L_cache": 3,
    "norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen3.5-0.8b": (_QWEN, [*["linear_attention"] * 3, "full_attention"] * 6),
    "lfm2-1.2b": (_LFM2, ["full_attention" if n in (2, 5, 8, 10, 12, 14) else "conv" for n in range(16)]),
}


def write_shape(folder: Path, shape: str, layers: int | None) -> Path:
    """The config of a shape, or of its first layers, and a tokenizer of bytes."""
    fields, kinds = SHAPES[shape]
    kinds = kinds[:layers]
    more = {"layer_types": kinds, "num_hidden_layers": len(kinds), "tie_word_embeddings": True, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields | more | {"max_position_embeddings": 32768}))
    write_toy_tokenizer(folder)
    return folder


def first_token(engine: InferenceEngine, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """Seconds to the first token of an answer, and the answer's tokens."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    began, seconds, tokens = time.perf_counter(), 0.0, list[int]()
    engine.add_request(prompt, params)
    while len(tokens) < count:
        for piece in engine.step():
            tokens += piece.token_ids
            seconds = seconds or time.perf_counter() - began
    while engine.has_unfinished_requests:
        engine.step()
    return seconds, tokens


Asked = Callable[[list[int], int], tuple[float, list[int]]]


@contextlib.contextmanager
def llama_server(program: str, model: str, length: int, threads: int | None) -> Iterator[Asked]:
    """A function like `first_token` that asks llama.cpp's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["-m", model, "-c", str(length), "-np", "1", "--port", str(port), "--no-warmup"]
    options += ["-t", str(threads)] if threads else []
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(url + "/health"):  # noqa: S310
                break
            time.sleep(0.1)
        yield lambda prompt, count: _asked(url + "/completion", prompt, count)
    finally:
        process.terminate()
        process.wait(20)


def _asked(url: str, prompt: list[int], count: int) -> tuple[float, list[int]]:
    body: dict[str, Any] = {"prompt": prompt, "n_predict": count, "temperature": 0, "stream": True}
    body |= {"cache_prompt": True, "ignore_eos": True, "return_tokens": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    began, seconds, tokens = time.perf_counter(), 0.0, list[int]()
    with urllib.request.urlopen(request, timeout=600) as answer:  # noqa: S310
        for line in answer:
            if line.startswith(b"data: {"):
                tokens += json.loads(line[6:]).get("tokens", [])
                seconds = seconds or time.perf_counter() - began
    return seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-0.8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--more", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--llama-server")
    given = parser.parse_args()
    longest = given.tokens + 2 * given.answer + given.more + 64
    settings: dict[str, Any] = {"threads": given.threads, "max_model_len": longest, "max_num_seqs": 2}
    with tempfile.TemporaryDirectory() as folder:
        if given.model is None:
            settings |= {"load_format": "dummy", "isq": "q4_0"}
        model = given.model or str(write_shape(Path(folder), given.shape, given.layers))
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(InferenceEngine(model, **settings))
            peer = None
            if given.llama_server:
                peer = stack.enter_context(llama_server(given.llama_server, model, longest, given.threads))
            measure(engine, peer, given)


def measure(engine: InferenceEngine, peer: Asked | None, given: argparse.Namespace) -> None:
    """Prints a line for each round, and the medians."""
    chance, rows = random.Random(0), list[dict[str, float]]()  # noqa: S311
    first_token(engine, [chance.randrange(97, 123) for _ in range(100)], 4)  # not counted
    for _ in range(given.rounds):
        prompt = [chance.randrange(32, 123) for _ in range(given.tokens)]
        more = [chance.randrange(32, 123) for _ in range(given.more)]
        first, answer = first_token(engine, prompt, given.answer)
        turn, before = [*prompt, *answer, *more], engine.stats()
        second, _ = first_token(engine, turn, given.answer)
        found = engine.stats().cached_prompt_tokens - before.cached_prompt_tokens
        row = {"first_s": first, "second_s": second, "ratio": second / first, "computed": len(turn) - found}
        if peer is not None:
            row["peer_first_s"], answer = peer(prompt, given.answer)
            row["peer_second_s"], _ = peer([*prompt, *answer, *more], given.answer)
            row["beside_peer"] = second / row["peer_second_s"]
        rows.append(row)
        print(json.dumps({name: round(value, 4) for name, value in row.items()}), flush=True)
    print(json.dumps({name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}), flush=True)


if __name__ == "__main__":
    main()
