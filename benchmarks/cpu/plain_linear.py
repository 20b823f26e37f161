# SPDX-License-Identifier: MIT
"""Speed of linear layers that read rows of activations: one JSON line per type and number of rows.

    python benchmarks/cpu/plain_linear.py --kinds BF16 F32 --shape 1536 576 --rows 1 8 32 512
    python benchmarks/cpu/plain_linear.py --kinds BF16 E4M3 E2M1 --span 128 --shape 4096 4096 --megabytes 512

Plain types are those of `kernels/plain_linear`, small floats with scales those of `kernels/scaled_linear`.

A plan of as many different matrices as fill `--megabytes` is run several times; the fastest and the median round count.
`gflops` are multiplications and additions, `gbps` the bytes of the weights. With `--generic`, without the instructions
that only some CPUs have. `packed_linear.py` measures quantised matrices in the same way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import numpy as np

from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, linear_arguments, operation, plan_row
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.plain_linear import PlainKind, PlainMatrix
from candle_vllm.core.kernels.plain_linear.layout import ROWS
from candle_vllm.core.kernels.scaled_linear import ScaledKind, ScaledMatrix
from candle_vllm.core.kernels.scaled_linear import pack as pack_scaled
from candle_vllm.core.quantization.scaled_codes import GROUP, ScaledCodes

KINDS = (*PlainKind, *ScaledKind)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in KINDS], help="types to measure")
    parser.add_argument("--shape", nargs=2, type=int, default=(1536, 768), metavar=("N", "K"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512], help="rows of activations")
    parser.add_argument("--span", type=int, help="inputs that share a scale, of small floats; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=128, help="weights per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--generic", action="store_true", help="only instructions that every CPU has")
    options = parser.parse_args()
    team = ThreadTeam(options.threads)
    for name in options.kinds:
        start = time.perf_counter()
        kind = next(kind for kind in KINDS if kind.name == name)
        folder = "plain_linear" if isinstance(kind, PlainKind) else "scaled_linear"
        address = operation(f"{folder}.cpu:make_linear", kind, Isa.GENERIC if options.generic else host_isa())
        report = {
            "kernel": folder,
            "kind": name,
            "compile_s": round(time.perf_counter() - start, 2),
        }
        for rows in options.rows:
            figures = _measure(team, address, kind, rows, options)
            print(json.dumps(report | {"threads": team.threads} | figures), flush=True)
    team.close()


def _plain(n: int, k: int, kind: PlainKind) -> PlainMatrix:
    tiles, bits = -(-n // ROWS), np.uint32 if kind is PlainKind.F32 else np.uint16
    one = {PlainKind.BF16: 0x3F80, PlainKind.F16: 0x3C00, PlainKind.F32: 0x3F800000}[kind]
    data = np.full(tiles * kind.steps(k) * ROWS * kind.step_columns, one, bits).view(np.uint8)
    return PlainMatrix(n, k, kind, data.reshape(tiles, -1))


def _scaled(n: int, k: int, kind: ScaledKind, span: int | None) -> ScaledMatrix:
    scales = np.full((n, 1 if span is None else -(-k // span)), 0.5, np.float32)
    if kind is ScaledKind.E2M1:
        groups = np.full((n, k // GROUP), 0x38, np.uint8)  # 1
        return pack_scaled(ScaledCodes("e2m1", np.full((n, k // 2), 0x44, np.uint8), scales, span or k, groups))
    name, code = ("e4m3", 0x40) if kind is ScaledKind.E4M3 else ("e5m2", 0x40)
    return pack_scaled(ScaledCodes(name, np.full((n, k), code, np.uint8), scales, span or k))


def _measure(team: ThreadTeam, address: int, kind: Any, rows: int, options: argparse.Namespace) -> dict:
    n, k = options.shape
    memory = WeightMemory()
    matrix = _plain(n, k, kind) if isinstance(kind, PlainKind) else _scaled(n, k, kind, options.span)
    copies = max(1, (options.megabytes << 20) // matrix.nbytes // max(1, rows // 8))
    matrices = []
    for _ in range(copies):
        data = memory.take(matrix.nbytes).reshape(matrix.data.shape)
        data[:] = matrix.data
        matrices.append(dataclasses.replace(matrix, data=data))
    wide = kind in (PlainKind.F16, PlainKind.F32) and isinstance(kind, PlainKind)
    x = aligned(rows * row_elements(k), np.uint32 if wide else np.uint16)
    x[:] = 0x3F800000 if wide else 0x3F80
    out, numbers = np.empty((rows, n), np.float32), np.full(8, rows, np.int64)
    plan = []
    for matrix in matrices:
        x_bytes = row_elements(k) * x.itemsize
        arguments = linear_arguments(matrix, x=address_of(x), x_bytes=x_bytes, out=address_of(out), out_stride=n)
        plan += plan_row(address, address_of(numbers), arguments, barrier=True)
    table, times = np.array(plan, np.int64), []
    for _ in range(options.rounds + 1):
        start = time.perf_counter()
        team.run(table, copies)
        times.append((time.perf_counter() - start) / copies)
    best, median = min(times[1:]), statistics.median(times[1:])
    return {
        "n": n,
        "k": k,
        "rows": rows,
        "us": round(best * 1e6, 1),
        "median_us": round(median * 1e6, 1),
        "gflops": round(2e-9 * rows * n * k / best, 1),
        "gbps": round(1e-9 * matrix.nbytes / best, 1),
    }


if __name__ == "__main__":
    main()
