# SPDX-License-Identifier: MIT
"""Speed of the packed linear layer: one JSON line per type and number of rows.

    python benchmarks/cpu/packed_linear.py --kinds Q4_1 Q4_K --shape 1536 576 --rows 1 8 32 512 [--ahead 0 2048]
        [--level avx2]

A plan of as many different matrices as fill `--megabytes` is run several times; the fastest and the median round count.
`gops` are multiplications and additions, `gbps` the packed bytes of the weights, `file_gbps` the file's, `blocks` the
rows of the panels in which the kernel takes them. A type is measured as it is packed here, or a layout (IQ3_S_CODES).
`--ahead` measures several distances at which weights are asked for, in turns (this CPU's alone, unless given);
`of_first` is the median of the rounds' ratios to the first. With `--pack`, the time to pack a GGUF
matrix of 16 million weights of each type as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.level import bytes_ahead, host_isa, host_level
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, linear_arguments, operation, plan_row, use_level
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.packed_linear import PackedKind, PackedMatrix, host_kind, pack
from candle_vllm.core.kernels.packed_linear.cpu_panel import blocks, cut_rows, most_panels, record_bytes
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, ROWS
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=[kind.name for kind in PackedKind], help="types to measure")
    parser.add_argument("--shape", nargs=2, type=int, default=(1536, 768), metavar=("N", "K"))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 512], help="rows of activations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=128, help="weights per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ahead", nargs="+", type=int, default=[bytes_ahead()], help="bytes; 0 leaves it to the CPU")
    parser.add_argument("--level", help="instructions: a level of docs/kernels.md that this CPU has")
    parser.add_argument("--pack", action="store_true", help="measure packing too")
    options = parser.parse_args()
    use_level(options.level)
    team = ThreadTeam(options.threads)
    for name in options.kinds:
        types = GGMLQuantizationType.__members__
        kind = host_kind(types[name]) if name in types else PackedKind[name]
        start = time.perf_counter()
        address = operation("packed_linear.cpu:make_linear", kind, host_isa())
        compiled = time.perf_counter() - start
        report = {
            "kernel": "packed_linear",
            "kind": kind.name,
            "level": host_level().name,
            "compile_s": round(compiled, 2),
        }
        if options.pack:
            report["pack_s_per_16M"] = round(_pack_time(kind), 4)
        for rows in options.rows:
            for figures in _measure(team, address, kind, rows, options):
                print(json.dumps(report | {"threads": team.threads} | figures), flush=True)
    team.close()


def _measure(team: ThreadTeam, address: int, kind: PackedKind, rows: int, options: argparse.Namespace) -> list[dict]:
    n, k = options.shape
    size = -(-n // ROWS) * LAYOUTS[kind].tile_bytes(k)
    copies = max(1, (options.megabytes << 20) // size // max(1, rows // 8))
    memory = WeightMemory()
    matrices = [_random_matrix(kind, n, k, memory) for _ in range(copies)]
    x = np.random.default_rng(0).standard_normal((rows, k // GROUP, GROUP)).astype(np.float32)
    xs = np.abs(x).max(2) / np.float32(127)
    groups = np.rint(x / xs[:, :, None]).astype(np.int8)
    xq, xsum = groups.reshape(rows, k), xs * groups.sum(2, dtype=np.int32).astype(np.float32)
    out, numbers = np.empty((rows, n), np.float32), np.full(8, rows, np.int64)
    plans: dict[int, list[int]] = {ahead: [] for ahead in options.ahead}
    for matrix in matrices:
        arguments = linear_arguments(
            matrix,
            x=address_of(xq),
            scales=address_of(xs),
            sums=address_of(xsum),
            out=address_of(out),
            out_stride=n,
        )
        for ahead, plan in plans.items():
            plan += plan_row(address, address_of(numbers), arguments._replace(ahead=ahead), barrier=True)
    tables = {ahead: np.array(plan, np.int64) for ahead, plan in plans.items()}
    times: dict[int, list[float]] = {ahead: [] for ahead in tables}
    for _ in range(options.rounds + 1):
        for ahead, table in tables.items():
            start = time.perf_counter()
            team.run(table, copies)
            times[ahead].append((time.perf_counter() - start) / copies)
    block, stored = kind.type.block
    firsts, reports = times[options.ahead[0]], []
    for ahead, found in times.items():
        best = min(found[1:])
        reports.append(
            {
                "n": n,
                "k": k,
                "rows": rows,
                "blocks": _blocks(kind, k, rows),
                "ahead": ahead,
                "us": round(best * 1e6, 1),
                "median_us": round(statistics.median(found[1:]) * 1e6, 1),
                "of_first": round(statistics.median(one / first for one, first in zip(found[1:], firsts[1:])), 3),
                "gops": round(2e-9 * rows * n * k / best, 1),
                "gbps": round(1e-9 * size / best, 1),
                "file_gbps": round(1e-9 * (n * k // block * stored) / best, 1),
                "bits_per_weight": size * 8 / (-(-n // ROWS) * ROWS * k),
            }
        )
    return reports


def _blocks(kind: PackedKind, k: int, rows: int) -> list[int]:
    """The rows of the panels in which `packed_linear.cpu.make_linear` takes so many."""
    layout, found = LAYOUTS[kind], list[int]()
    full, most = blocks(host_isa(), layout)[0], most_panels(host_isa(), layout)
    while (left := rows - sum(found)) > 0:
        block, panels = cut_rows(left, k // GROUP, full, most, record_bytes(layout, full))
        found += [block] * panels
    return found


def _random_matrix(kind: PackedKind, n: int, k: int, memory: WeightMemory) -> PackedMatrix:
    """Random codes under plain scales, without the detour over GGUF bytes."""
    layout, tiles = LAYOUTS[kind], -(-n // ROWS)
    data = memory.take(tiles * layout.tile_bytes(k)).reshape(tiles, -1)
    data[:] = np.random.default_rng(1).integers(0, 256, layout.tile_bytes(k), dtype=np.uint8)
    blocks = data.reshape(tiles, -1, layout.block_bytes)
    blocks[:, :, : layout.floats_bytes] = np.full(layout.floats_bytes // 2, 0.01, np.float16).view(np.uint8)
    return PackedMatrix(n, k, kind, data)


def _pack_time(kind: PackedKind) -> float:
    """Seconds to pack 4096 x 4096 weights, best of three."""
    ggml_type = kind.type
    size, width = ggml_type.block
    raw = np.zeros(4096 * 4096 // size * width, np.uint8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pack(raw, ggml_type, 4096, 4096, kind=kind)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
