# SPDX-License-Identifier: MIT
"""Speed and error of quantising weights: one JSON line per type.

    python benchmarks/cpu/quantise.py --types q4k q8_0
    python benchmarks/cpu/quantise.py --ggml PATH/libggml-base.so

Normally distributed fp32 weights, on one thread; the fastest of several rounds counts. `mbps` are MB of fp32 weights in
a second, `error` the root mean square of what the blocks are off, relative to that of the weights. With `--ggml`, the
same of llama.cpp's reference quantisers beside them: `ggml_mbps`, `ggml_error`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from functools import partial

import gguf
import numpy as np

from candle_vllm.core.config import ISQ_NAMES
from candle_vllm.core.kernels.weight_quant import quantiser
from candle_vllm.core.kernels.weight_quant.rows import ISQ_TYPES
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=ISQ_NAMES, choices=ISQ_NAMES, metavar="TYPE")
    parser.add_argument("--millions", type=int, default=4, help="weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ggml", help="llama.cpp's libggml-base.so")
    options = parser.parse_args()
    library = None if options.ggml is None else ctypes.CDLL(options.ggml)
    weights = np.random.default_rng(0).standard_normal((options.millions * 1000, 1024)).astype(np.float32) * 0.02
    for name in options.types:
        kind = ISQ_TYPES[name]
        size, width = kind.block
        blocks, out = weights.reshape(-1, size), np.empty((weights.size // size, width), np.uint8)
        report = {"kernel": "weight_quant", "type": name, "threads": 1}
        report |= _measure(partial(quantiser(kind), blocks, out), options.rounds, weights, out, kind)
        if library is not None:
            reference = _reference(library, kind, weights, out)
            figures = _measure(reference, options.rounds, weights, out, kind)
            report |= {f"ggml_{key}": value for key, value in figures.items()}
        print(json.dumps(report), flush=True)


def _measure(
    run: Callable[[], object], rounds: int, weights: np.ndarray, out: np.ndarray, kind: GGMLQuantizationType
) -> dict[str, float]:
    run()  # once to compile, and to touch the memory
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    back = gguf.quants.dequantize(out, gguf.GGMLQuantizationType(kind)).reshape(weights.shape)
    error = float(np.sqrt(((back - weights) ** 2).mean() / (weights**2).mean()))
    return {"mbps": round(weights.nbytes / min(times) / 1e6), "error": round(error, 5)}


def _reference(
    library: ctypes.CDLL, kind: GGMLQuantizationType, weights: np.ndarray, out: np.ndarray
) -> Callable[[], object]:
    function = library[f"quantize_row_{kind.name.lower().replace('_k', '_K')}_ref"]
    source, target = (ctypes.c_void_p(array.ctypes.data) for array in (weights, out))
    return lambda: function(source, target, ctypes.c_int64(weights.size))


if __name__ == "__main__":
    main()
