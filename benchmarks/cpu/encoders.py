# SPDX-License-Identifier: MIT
"""Vectors of texts by a compiled encoder, beside the same model in torch: tokens per second, in turns.

    python benchmarks/cpu/encoders.py [--rounds 5] [--threads 2] [--models minilm base]

The models have the sizes of all-MiniLM-L6-v2 and of BERT-base and random weights, in fp32. Both sides get token ids and
give the mean of the hidden states of each text; torch is transformers' `BertModel` with its fastest attention, a batch
as one padded tensor without waste, for all of its texts are of one length. Needs transformers and torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.bert.modeling_bert import BertModel

from candle_vllm.core import InferenceEngine
from packages.core.tests.toy_encoder import TOY_ENCODER_VOCAB_SIZE, toy_encoder_config, write_toy_encoder

MODELS: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
SHAPES = ((1, 16), (1, 128), (1, 512), (32, 16), (32, 128))  # texts, tokens of each


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(folder: Path, rounds: int, threads: int) -> None:
    """One JSON line per shape: medians in tokens per second, and the median of the rounds' ratios."""
    torch.set_num_threads(threads)
    peer = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False).eval()
    numbers = np.random.default_rng(0)
    with InferenceEngine(str(folder), threads=threads) as engine:
        for texts, length in SHAPES:
            ids = numbers.integers(5, TOY_ENCODER_VOCAB_SIZE, (texts, length)).tolist()
            tensor = torch.tensor(ids)

            def ours(ids: list[list[int]] = ids) -> np.ndarray:
                return np.array([output.embedding for output in engine.embed(ids, use_tqdm=False)])

            @torch.inference_mode()
            def theirs(tensor: torch.Tensor = tensor) -> np.ndarray:
                return torch.nn.functional.normalize(peer(tensor).last_hidden_state.mean(1)).numpy()

            away = float(np.abs(ours() - theirs()).max())  # warms up as well
            sides: tuple[list[float], list[float]] = [], []
            for number in range(rounds):
                for side, call in ((0, ours), (1, theirs)) if number % 2 else ((1, theirs), (0, ours)):
                    sides[side].append(min(seconds(call) for _ in range(3)))
            rate, peers = (texts * length / statistics.median(side) for side in sides)
            line = {"model": folder.name, "texts": texts, "tokens": length, "tok_s": round(rate), "torch": round(peers)}
            ratio = statistics.median(b / a for a, b in zip(*sides))
            print(json.dumps(line | {"ratio": round(ratio, 2), "largest_difference": away}), flush=True)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            config = toy_encoder_config(max_position_embeddings=512, **MODELS[name])
            measure(write_toy_encoder(Path(folder) / name, config), options.rounds, options.threads)


if __name__ == "__main__":
    main()
