# SPDX-License-Identifier: MIT
"""What an index of sparse attention saves of a decoded token: one model with it and without it, in turns.

    python benchmarks/cpu/index.py [--depths 8192 32768] [--threads 1] [--rounds 15] [--layers 8]

The shape is a small DeepSeek: random weights, 16 heads over latent rows of 576 elements, an index of 16 heads and 128
elements that chooses 2,048 positions. The caches hold random rows, because reading a prompt of that length without an
index takes minutes. A figure is the median of a step of one token, in milliseconds: seconds of the clock, and of CPU,
which a busy machine changes less (with several threads they include waiting). The ratio is of CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner, StepLimits
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.testing.toy_model import write_toy_tokenizer

BLOCK = 64
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
    "vocab_size": 512, "kv_lora_rank": 512, "q_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "rms_norm_eps": 1e-6, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "moe_intermediate_size": 256,
    "rope_theta": 10000.0,
}  # fmt: skip
INDEX = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048}
KINDS = {
    "with an index": {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", **INDEX},
    "without": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
}


def prepared(kind: str, layers: int, longest: int, threads: int) -> Callable[[int], Callable[[], None]]:
    """A model with full caches: for a depth, what runs the step of its last token."""
    keys = {"num_hidden_layers": layers, "first_k_dense_replace": layers, "max_position_embeddings": longest}
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps(SHAPE | keys | KINDS[kind]))
        write_toy_tokenizer(Path(made))
        config = EngineConfig(model=made, load_format="dummy", block_size=BLOCK, threads=threads)
        loaded = load_model(config, CPU, lambda *_: None)
    blocks = -(-longest // BLOCK)
    limits = StepLimits(16, 1, logit_rows=1, table_width=blocks, block_size=BLOCK, threads=threads)
    loaded.decoder.prepare(longest)
    runner, numbers = RecordedRunner(loaded.decoder, blocks, limits), np.random.default_rng(0)
    for cache in runner.caches:
        for part in (part for part in cache if part is not None):
            for stretch in part:
                stretch[:] = numbers.standard_normal(stretch.shape, np.float32).view(np.int32) >> 16

    def at(depth: int) -> Callable[[], None]:
        request = GenerationRequest(request_id="r", prompt_token_ids=[5] * depth, params=SamplingParams())
        sequence = Sequence(request, 0, 0)
        sequence.block_table, sequence.num_uncomputed_tokens = array("i", range(-(-depth // BLOCK))), 1
        batch = BatchBuilder(BLOCK, runner.step_memory).build([Run.next(sequence, 1)])
        return lambda: runner.forward(batch, [])

    return at


def measure(depths: list[int], layers: int, threads: int, rounds: int) -> None:
    """Prints a line for each depth and kind."""
    models = {kind: prepared(kind, layers, max(depths), threads) for kind in KINDS}
    print(f"{'depth':>7} {'':14} {'ms':>9} {'CPU ms':>9} {'ratio':>6}   {layers} layers, {threads} threads")
    for depth in depths:
        clock, cpu = {kind: list[float]() for kind in KINDS}, {kind: list[float]() for kind in KINDS}
        for turn in range(rounds + 1):
            for kind, at in models.items():
                step = at(depth)
                began, busy = time.perf_counter(), time.process_time()
                step()
                took = time.perf_counter() - began, time.process_time() - busy
                if turn:  # the first one touches the memory
                    clock[kind].append(took[0])
                    cpu[kind].append(took[1])
        for kind in KINDS:
            ratio = statistics.median(one / other for one, other in zip(cpu["without"], cpu[kind]))
            times = (1e3 * statistics.median(each[kind]) for each in (clock, cpu))
            print(f"{depth:7} {kind:14}", *(f"{each:9.2f}" for each in times), f"{ratio:6.2f}", flush=True)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    if min(*options.depths, options.threads, options.rounds, options.layers) < 1:
        parser.error("every number is 1 or more")
    measure(options.depths, options.layers, options.threads, options.rounds)


if __name__ == "__main__":
    main()
