# SPDX-License-Identifier: MIT
"""The gated delta rule and Mamba 2 on the CPU beside a copy of the same bytes: one JSON line per result.

Each layer has states of its own, as many as a model has, so that none is in the processor's caches that would not be
there in a step. `us` are microseconds a layer and step, `copy_us` those of copying its states from one place to
another by as many threads, and `ratio` the one by the other; medians of the rounds, which take turns.

    python benchmarks/cpu/states.py [--shape NAME] [--threads N] [--sequences 1 32] [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import StepNumber, address_of
from candle_vllm.core.kernels.cpu_runtime.recorder import Adapted, Recorder, StepLimits, aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.delta_rule.cpu_record import Rows, record_delta_rule
from candle_vllm.core.kernels.delta_rule.layout import DeltaGates, kept_inputs, state_shape
from candle_vllm.core.kernels.states import StateCache
from candle_vllm.core.threads import default_threads

SHAPES = {  # Hk, Hv, Dk, Dv, layers
    "qwen3.5-0.8b": (16, 16, 128, 128, 18),
    "qwen3.5-4b": (16, 32, 128, 128, 24),
    "granite-4-h-tiny": (1, 48, 128, 64, 36),
    "nemotron-3-nano-4b": (8, 96, 128, 80, 21),
}
MAMBA = ("granite-4-h-tiny", "nemotron-3-nano-4b")
MEMORY = 3 << 30  # most bytes of states


def measure(shape: str, sequences: int, threads: int, rounds: int) -> dict[str, object]:
    """A step that decodes so many sequences, in all layers."""
    key_heads, heads, key, value, layers = SHAPES[shape]
    state = state_shape(heads, key, value)
    layers = min(layers, max(1, MEMORY // (8 * sequences * int(np.prod(state)))))
    limits = StepLimits(max(16, sequences), sequences, 1, 1, 64, threads, states=True)
    recorder, team = Recorder(limits, host_isa()), ThreadTeam(threads)
    recorder.begin(Adapted.NOT)
    random = np.random.default_rng(0)
    gates, mamba = DeltaGates(*(-random.random((2, heads), np.float32))), shape in MAMBA
    if mamba:
        gates = gates._replace(skip=random.random(heads, np.float32))
    widths = [(key_heads * key, key), (key_heads * key, key), (heads * value, value), (heads, None), (heads, None)]
    made = [recorder.buffer(width) for width, _ in (*widths, widths[2])]
    for buffer in made:
        buffer.rows[:] = random.standard_normal(buffer.rows.shape, np.float32)
    rows = [
        Rows(address_of(each.array), each.stride, each.width, dim) for each, (_, dim) in zip(made, [*widths, widths[2]])
    ]
    inputs = kept_inputs(key_heads, heads, key, value)
    size = sequences * int(np.prod(state))
    memory = [aligned(size, np.float32).reshape(sequences, *state) for _ in range(layers)]
    copies = [aligned(size, np.float32).reshape(sequences, *state) for _ in range(layers)]
    for states in memory:
        record_delta_rule(
            recorder, rows[:5], rows[5], gates, StateCache(states, np.zeros((sequences, 0, inputs), np.float32)),
            scale=1.0 if mamba else key**-0.5, normed=not mamba,
        )  # fmt: skip
    arrays, each = recorder.arrays, np.arange(sequences)
    arrays.query_start[: sequences + 1] = np.arange(sequences + 1)
    arrays.numbers[StepNumber.TOKENS] = arrays.numbers[StepNumber.SEQUENCES] = sequences
    arrays.states.slots[:], arrays.states.sources[:], arrays.states.stores[:sequences] = each, each, each
    plan, found = np.array(recorder.plan, np.int64), dict[str, list[float]](us=[], copy_us=[])
    parts = [(a.reshape(threads, -1), b.reshape(threads, -1)) for a, b in zip(copies, memory)]

    def copy(thread: int) -> None:
        for there, here in parts:
            np.copyto(there[thread], here[thread])

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds + 1):
            began = time.perf_counter()
            team.run(plan, recorder.num_rows)
            found["us"].append((time.perf_counter() - began) / layers * 1e6)
            began = time.perf_counter()
            list(pool.map(copy, range(threads)))
            found["copy_us"].append((time.perf_counter() - began) / layers * 1e6)
    team.close()
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    ratio = round(medians["us"] / medians["copy_us"], 2)
    return {"shape": shape, "sequences": sequences, "threads": threads, **medians, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-4b")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for sequences in given.sequences:
        print(json.dumps(measure(given.shape, sequences, given.threads, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
