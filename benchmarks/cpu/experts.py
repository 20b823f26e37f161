# SPDX-License-Identifier: MIT
"""Speed of a mixture of experts beside a dense layer with as many active weights: a JSON line per number of tokens.

    python benchmarks/cpu/experts.py --experts 16 --top-k 4 --hidden 1024 --inner 512 --layers 8 --tokens 1 512

Both stacks are feed-forward layers with residuals and norms, of random weights, and run in turns; the fastest round of
each counts. Each round has other tokens, because a large cache holds the experts of the round before. Each layer's
input is an embedding of its own, so that tokens choose experts independently in all layers. `share` is the dense time
over that of the experts: 1 where experts cost nothing beyond their weights. `gbps` and `median_gbps` are the packed
bytes per second of the experts that the round's tokens are expected to choose, each of which is read once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from candle_vllm.core.kernels import packed_linear, plain_linear
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber
from candle_vllm.core.kernels.cpu_runtime.recorder import Recorder, StepLimits
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.values import step_tokens
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.moe import Routing, combine, expert_linear, route
from candle_vllm.core.kernels.packed_linear import PackedMatrix
from candle_vllm.core.kernels.plain_linear import PlainMatrix
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

INPUTS = 64  # different tokens


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="Q4_K", help="type of the experts' matrices")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    team, weights = ThreadTeam(options.threads), Weights(options.kind)
    stacks = [Stack(weights, options, sparse) for sparse in (True, False)]
    for tokens in options.tokens:
        times: list[list[float]] = [[], []]
        for _ in range(options.rounds + 1):
            for stack, found in zip(stacks, times):
                found.append(stack.run(team, tokens))
        best, dense = (min(found[1:]) for found in times)
        report = {"kernel": "moe", "kind": options.kind, "threads": team.threads, "tokens": tokens}
        report |= {name: getattr(options, name) for name in ("experts", "top_k", "hidden", "inner", "layers")}
        report |= {"us": round(best * 1e6, 1), "median_us": round(statistics.median(times[0][1:]) * 1e6, 1)}
        share = 1 - (1 - options.top_k / options.experts) ** min(tokens, INPUTS)
        gigabytes = stacks[0].expert_bytes * share * 1e-9
        report |= {"tokens_per_s": round(tokens / best), "gbps": round(gigabytes / best, 1)}
        report |= {"median_gbps": round(gigabytes / statistics.median(times[0][1:]), 1)}
        report |= {"dense_us": round(dense * 1e6, 1), "share": round(dense / best, 3)}
        print(json.dumps(report), flush=True)
    team.close()


class Weights:
    """Random matrices."""

    def __init__(self, kind: str) -> None:
        self._kind, self._random, self._memory = GGMLQuantizationType[kind], np.random.default_rng(0), WeightMemory()

    def packed(self, rows: int, columns: int) -> PackedMatrix:
        """Of the kind."""
        size, width = self._kind.block
        raw = self._random.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
        raw[:, :4] = np.full(2, 0.001, np.float16).view(np.uint8)
        return packed_linear.pack(raw.reshape(-1), self._kind, rows, columns, self._memory)

    def plain(self, rows: int, columns: int) -> PlainMatrix:
        """In float32."""
        numbers = self._random.standard_normal((rows, columns)).astype(np.float32) / columns**0.5
        return plain_linear.pack(numbers.view(np.uint8).reshape(-1), "F32", rows, columns, memory=self._memory)


class Stack:
    """A recorded stack of layers."""

    def __init__(self, weights: Weights, options: argparse.Namespace, sparse: bool) -> None:
        hidden, inner, top_k = options.hidden, options.inner, options.top_k
        limits = StepLimits(max(options.tokens), 1, 1, 1, 16, options.threads)
        self._recorder = recorder = Recorder(limits, host_isa())
        self._random = np.random.default_rng(1)
        x = step_tokens(recorder).embedding(weights.plain(INPUTS, hidden))
        self.expert_bytes = 0
        for _ in range(options.layers):
            own = step_tokens(recorder).embedding(weights.plain(INPUTS, hidden))  # tokens choose independently
            normed = own.rms_norm(np.ones(hidden, np.float32), 1e-6)
            if sparse:
                shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
                gate, up, down = ([weights.packed(*shape) for _ in range(options.experts)] for shape in shapes)
                self.expert_bytes += options.experts * sum(of_experts[0].nbytes for of_experts in (gate, up, down))
                pairs = route(normed.linear([weights.plain(options.experts, hidden)], None), Routing(top_k=top_k))
                inner_rows = expert_linear(normed, [gate, up], pairs, activation="silu")
                y = combine(expert_linear(inner_rows, [down], pairs), pairs, None)
            else:
                gate, up = (weights.packed(inner * top_k, hidden) for _ in range(2))
                y = normed.linear([gate, up], None).gate_mul("silu")
                y = y.linear([weights.packed(hidden, inner * top_k)], None)
            x = (x + y).rms_norm(np.ones(hidden, np.float32), 1e-6)
        self._plan = np.array(recorder.plan, np.int64)

    def run(self, team: ThreadTeam, tokens: int) -> float:
        """Seconds."""
        ids = self._recorder.arrays.token_ids
        ids[:] = np.resize(self._random.permutation(INPUTS), len(ids))
        self._recorder.arrays.numbers[StepNumber.TOKENS] = tokens
        start = time.perf_counter()
        team.run(self._plan, self._recorder.num_rows)
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
