"""Speed of the plain linear layer: one JSON line per type and number of rows.

    python benchmarks/cpu/plain_linear.py --kinds BF16 F32 --shape 1536 576 --rows 1 8 32 512

A plan of as many different matrices as fill `--megabytes` is run several times; the fastest and the median round count.
`gflops` are multiplications and additions, `gbps` the bytes of the weights. With `--generic`, without the instructions
that only some CPUs have. `packed_linear.py` measures quantised matrices in the same way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from candle_vllm.core.kernels.activation_rows import row_elements
from candle_vllm.core.kernels.cpu_runtime.emit import Isa
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, host_isa
from candle_vllm.core.kernels.cpu_runtime.recorder import aligned
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.plain_linear import PlainKind, PlainMatrix
from candle_vllm.core.kernels.plain_linear.cpu import linear_operation, linear_row
from candle_vllm.core.kernels.plain_linear.layout import ROWS


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in PlainKind], help="types to measure")
    parser.add_argument("--shape", nargs=2, type=int, default=(1536, 768), metavar=("N", "K"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512], help="rows of activations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=128, help="weights per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--generic", action="store_true", help="only instructions that every CPU has")
    options = parser.parse_args()
    team = ThreadTeam(options.threads)
    for name in options.kinds:
        start = time.perf_counter()
        operation = linear_operation(PlainKind[name], Isa.GENERIC if options.generic else host_isa())
        report = {"kernel": "plain_linear", "kind": name, "compile_s": round(time.perf_counter() - start, 2)}
        for rows in options.rows:
            figures = _measure(team, operation, PlainKind[name], rows, options)
            print(json.dumps(report | {"threads": team.threads} | figures), flush=True)
    team.close()


def _measure(team: ThreadTeam, operation: int, kind: PlainKind, rows: int, options: argparse.Namespace) -> dict:
    n, k = options.shape
    tiles, bits = -(-n // ROWS), np.uint32 if kind is PlainKind.F32 else np.uint16
    size = tiles * kind.steps(k) * kind.step_bytes
    copies = max(1, (options.megabytes << 20) // size // max(1, rows // 8))
    memory = WeightMemory()
    matrices = [PlainMatrix(n, k, kind, memory.take(size).reshape(tiles, -1)) for _ in range(copies)]
    one = {PlainKind.BF16: 0x3F80, PlainKind.F16: 0x3C00, PlainKind.F32: 0x3F800000}[kind]
    for matrix in matrices:
        matrix.data.reshape(-1).view(bits)[:] = one
    x = aligned(rows * row_elements(k), np.uint16 if kind is PlainKind.BF16 else np.uint32)
    x[:] = 0x3F80 if kind is PlainKind.BF16 else 0x3F800000
    out, numbers = np.empty((rows, n), np.float32), np.full(8, rows, np.int64)
    plan = []
    for matrix in matrices:
        x_bytes = row_elements(k) * x.itemsize
        arguments = linear_row(matrix, x=address_of(x), x_bytes=x_bytes, out=address_of(out), out_stride=n)
        row = [operation, 0, address_of(numbers), *arguments]
        row[1] = 8 * len(row) << 8 | 1
        plan += row
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
        "gbps": round(1e-9 * size / best, 1),
    }


if __name__ == "__main__":
    main()
