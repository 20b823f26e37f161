# SPDX-License-Identifier: MIT
"""Decoding by layers of transformers, beside this engine's own layers and beside transformers' `generate`, in turns.

    python benchmarks/cpu/any_architecture.py MODEL.gguf [--rounds 6] [--tokens 32] [--threads N]

All three compute one stream behind a prompt of 32 tokens: `native` and `transformers` the same file by `model_impl`,
without drafts; `generate` a model of the same configuration with random weights in bfloat16, on as many threads. Each
line is a round in tokens per second; the last one has the medians, and the medians of the rounds' ratios. The model
must have the architecture of Llama.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.threads import physical_cores

PROMPT = list(range(100, 132))


def engine_speed(engine: InferenceEngine, count: int) -> float:
    """Tokens per second behind the first token."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    engine.add_request(PROMPT, params)
    seen, began = 0, 0.0
    while engine.has_unfinished_requests:
        for piece in engine.step():
            seen += len(piece.token_ids)
            began = began or time.perf_counter()
    return (seen - 1) / (time.perf_counter() - began)


def plain_model(path: Path) -> Any:
    """A model of transformers in the file's shape."""
    with open_gguf(path) as file:
        vocabulary = file.tensors["token_embd.weight"].shape[0]
        found: dict[str, Any] = {name.removeprefix("llama."): value for name, value in file.metadata.items()}
    config = LlamaConfig(
        hidden_size=found["embedding_length"],
        intermediate_size=found["feed_forward_length"],
        num_hidden_layers=found["block_count"],
        num_attention_heads=found["attention.head_count"],
        num_key_value_heads=found["attention.head_count_kv"],
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def plain_speed(model: Any, count: int, threads: int) -> float:
    """Tokens per second behind the first token; engines leave one thread to torch."""
    ids, before = torch.tensor([PROMPT]), torch.get_num_threads()
    torch.set_num_threads(threads)

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - began

    speed = (count - 1) / (seconds(count) - seconds(1))
    torch.set_num_threads(before)
    return speed


def main() -> None:
    """Prints a line for each round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=physical_cores())
    given = parser.parse_args()
    options: dict[str, Any] = {"threads": given.threads, "max_model_len": 1024, "max_num_seqs": 1, "device": "cpu"}
    options |= {"enable_prefix_caching": False, "speculative_config": {"method": "none"}}
    model = plain_model(given.model)
    rows = list[dict[str, float]]()
    with (
        InferenceEngine(str(given.model), model_impl="native", **options) as native,
        InferenceEngine(str(given.model), model_impl="transformers", **options) as layers,
    ):
        for number in range(given.rounds + 1):
            row = {
                "native": engine_speed(native, given.tokens),
                "transformers": engine_speed(layers, given.tokens),
                "generate": plain_speed(model, given.tokens, given.threads),
            }
            row |= {f"over_{name}": row["transformers"] / row[name] for name in ("native", "generate")}
            if number:  # the first one is not counted
                rows.append(row)
                print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    print(json.dumps({name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}), flush=True)


if __name__ == "__main__":
    main()
