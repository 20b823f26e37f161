"""Linear layers with GGUF weights on a GPU: correctness, time and share of the machine, one JSON line per result.

    python benchmarks/gpu/quantised_linear.py                      # the matrices of an 8B model, in minutes
    python benchmarks/gpu/quantised_linear.py --kinds Q4_K --shapes 4096x4096 --rows 1 16 512 --set LARGE_WARPS=4
    TRITON_INTERPRET=1 python benchmarks/gpu/quantised_linear.py --shapes 96x768 --rows 3 20 --dtype float16

The last one checks the script without a GPU; Triton's interpreter cannot multiply bfloat16. Needs torch, triton and
numpy, nothing else: the packages' own `__init__` files are passed over.

Weights are random, in as many copies as do not fit into the GPU's cache, and all of them are read in every replay of a
CUDA graph; a result's time is the median of the replays over the number of copies. `copy_share` is the matrix's bytes
per second over what a large copy moves (read and written, measured first), `torch_copy_share` the same for torch's
product; `matmul_share` the operations over those of a large product of bfloat16 matrices. `torch_us` is torch's product
with the same weights in the activations' type; with `dequantised_us`, for many rows, what writing these weights costs.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).resolve().parents[2] / "packages/core/src"
SHAPES = ("6144x4096", "4096x4096", "28672x4096", "4096x14336")  # N x K: q, k and v; o; gate and up; down
ROWS = (1, 8, 16, 64, 512, 2048)
CACHE_BYTES = 256 << 20  # several times the largest cache


def bare_modules() -> tuple[Any, Any, Any]:
    """Layout, kernels and reference, without what the packages import besides."""
    for name in ("", ".core", ".core.kernels", ".core.kernels.packed_linear", ".core.kernels.gguf_linear"):
        package = types.ModuleType("candle_vllm" + name)
        package.__path__ = [str(SOURCE / package.__name__.replace(".", "/"))]
        sys.modules[package.__name__] = package
    names = ("layout", "triton", "reference")
    layout, kernels, reference = (importlib.import_module(f"candle_vllm.core.kernels.gguf_linear.{x}") for x in names)
    return layout, kernels, reference


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_K", "Q3_K", "Q2_K"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows of activations")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="tile constants of the kernels")
    parser.add_argument("--seconds", type=float, default=0.1, help="spent on measuring each result")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.check |= device.type == "cpu"
    layout, kernels, reference = bare_modules()
    for name, _, number in (setting.partition("=") for setting in options.set):
        assert isinstance(getattr(kernels, name), int), name
        setattr(kernels, name, int(number))
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    machine = machine_rates(device, options.seconds) if not options.check else {}
    print(json.dumps(machine), flush=True)
    for name in options.kinds:
        kind = layout.PackedKind[name]
        for shape in options.shapes:
            rows, columns = (int(part) for part in shape.split("x"))
            measure_matrix(layout, kernels, reference, kind, (rows, columns), machine, options, device)


def measure_matrix(
    layout: Any,
    kernels: Any,
    reference: Any,
    kind: Any,
    shape: tuple[int, int],
    machine: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Prints a line for each number of rows, and one for embedding rows."""
    rows, columns = shape
    dtype = getattr(torch, options.dtype)
    first = random_matrix(layout, kind, rows, columns, device)
    copies = 1 if options.check else max(1, min(64, -(-CACHE_BYTES // first.nbytes)))
    matrices = [first, *(random_matrix(layout, kind, rows, columns, device) for _ in range(copies - 1))]
    weights = reference.dequantise(first)
    plain = [weights.to(dtype)]
    dense_copies = 1 if options.check else max(1, min(64, -(-CACHE_BYTES // plain[0].nbytes)))
    plain += [plain[0].clone() for _ in range(dense_copies - 1)]
    everything = torch.arange(rows, device=device)
    line = {
        "kernel": "gguf_linear",
        "kind": kind.name,
        "n": rows,
        "k": columns,
        "bits": 8 * first.nbytes / weights.numel(),
    }
    for count in options.rows:
        x = torch.randn(count, columns, device=device).to(dtype)
        function = kernels.linear_small if count <= 16 else kernels.linear
        start = time.perf_counter()
        got = function(x, first)
        if device.type == "cuda":
            torch.cuda.synchronize()
        figures = {"rows": count, "form": function.__name__, "compile_s": round(time.perf_counter() - start, 2)}
        figures["error"] = ratio(got, x.float() @ weights.T)
        one = x[count // 2 : count // 2 + 1]
        figures["row_alone_same_bits"] = bool(torch.equal(function(one, first)[0], got[count // 2]))
        if not options.check:
            spent = timed([functools.partial(function, x, m) for m in matrices], options.seconds)
            dense = timed([functools.partial(torch.nn.functional.linear, x, w) for w in plain], options.seconds)
            figures |= {"us": 1e6 * spent, "torch_us": 1e6 * dense, "gbps": first.nbytes / spent / 1e9}
            figures["tflops"] = 2e-12 * count * rows * columns / spent
            figures["torch_copy_share"] = plain[0].nbytes / dense / 1e9 / machine["copy_gbps"]
            figures["copy_share"] = figures["gbps"] / machine["copy_gbps"]
            figures["matmul_share"] = figures["tflops"] / machine["matmul_tflops"]
            if count > 16:
                writing = timed(
                    [functools.partial(kernels.embedding, everything, m, dtype) for m in matrices], options.seconds
                )
                figures["dequantised_us"] = 1e6 * writing
        print(json.dumps(line | rounded(figures)), flush=True)
    ids = torch.randint(0, rows, (64,), device=device)
    error = ratio(kernels.embedding(ids, first, torch.float32), weights[ids])
    print(json.dumps(line | {"rows": 64, "form": "embedding", "error": error}), flush=True)


def random_matrix(layout: Any, kind: Any, rows: int, columns: int, device: torch.device) -> Any:
    """Random codes; scales such that weights are small."""
    planes = layout.PLANES[kind]
    found = planes.empty(rows, columns, device)

    def halves(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, device=device) * 0.01 + 0.001).half().view(torch.int32)

    for name in ("low", "high", "scales"):
        plane = found[name]
        if plane is not None:
            plane.view(torch.uint8).random_(0, 256)
    if found["supers"] is not None:
        found["supers"].copy_(halves(*found["supers"].shape[:-1], 2 * rows))
    else:
        found["scales"].copy_(halves(*found["scales"].shape[:-1], 2 * rows))
    return layout.GgufMatrix(rows, columns, kind, **found)


def machine_rates(device: torch.device, seconds: float) -> dict[str, Any]:
    """What a large copy and a large product reach."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    copy = timed([lambda: target.copy_(source)], seconds)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product = timed([lambda: a @ b], seconds)
    capability = ".".join(str(part) for part in torch.cuda.get_device_capability(device))
    return {
        "machine": torch.cuda.get_device_name(device),
        "capability": capability,
        "torch": torch.__version__,
        "copy_gbps": round(2 * source.nbytes / copy / 1e9, 1),
        "matmul_tflops": round(2e-12 * 8192**3 / product, 1),
    }


def timed(calls: list[Callable[[], Any]], seconds: float) -> float:
    """Median seconds of a call: all of them in one CUDA graph, replayed."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(found) < 5:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(found)


def ratio(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS of the error over the RMS of what is right."""
    return float((got.float() - wanted.float()).pow(2).mean().sqrt() / wanted.float().pow(2).mean().sqrt())


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()}


if __name__ == "__main__":
    main()
