# SPDX-License-Identifier: MIT
"""What ranks cost, measured here, and what a step on several GPUs takes by arithmetic; see docs/scaling.md.

python benchmarks/scaling.py message     what telling 1 to 7 others a step takes
python benchmarks/scaling.py sum         adding up 8 KB to 8 MB between processes of this machine, by Gloo and by memory
python benchmarks/scaling.py engine      steps of a small random model by 1 to 3 ranks, op by op
python benchmarks/scaling.py stages      prompts and steps of a larger one by one rank and by 2 stages, and who is busy
python benchmarks/scaling.py model       the tables of 1 to 8 GPUs, as ranks and as stages
python benchmarks/scaling.py machines    the table of 1 to 8 machines with 1 to 16 GPUs together
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.batch import BatchBuilder
from candle_vllm.core.engine.rank_line import Line, ToldBatches, ToRank
from candle_vllm.core.engine.ranks import RankedRunner
from candle_vllm.core.engine.request import GenerationRequest
from candle_vllm.core.engine.sequence import Run, Sequence
from candle_vllm.core.kernels.collectives import ProcessGroup, shared_memory
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

ROUNDS = 400


class Model(NamedTuple):
    """Layers, width, and bytes of weights that a step of one row reads."""

    layers: int
    width: int
    gigabytes: float


MODELS = {
    "8B, bf16": Model(32, 4096, 15.0),
    "8B, Q4_K": Model(32, 4096, 4.6),
    "32B, Q4_K": Model(64, 5120, 19.0),
    "70B, Q4_K": Model(80, 8192, 40.0),
}
LINKS = {  # microseconds of one sum of a few rows, published: NCCL on eight H100, NCCL on PCIe, host staging
    "NVLink": 21.0,
    "PCIe": 16.0,
    "no peer access": 39.0,
}
LARGE = {  # layers, width, GB that a step of one row reads; and GB of all weights
    "70B, bf16": (Model(80, 8192, 141.0), 141.0),
    "R1 671B, Q4_K, 37B of them active": (Model(61, 7168, 22.4), 404.0),
}
NETWORK = 59.0
"""Microseconds of one sum of a few rows between four machines, published: NCCL over RoCE, 48 KB."""
BANDWIDTH, SHARE, FIXED = 3350.0, 0.7, 0.4
"""GB/s of an H100's memory, how much of it kernels reach, and milliseconds of a step that no rank shortens."""


def message() -> None:
    """A step of 64 sequences at 2,000 tokens each, told to so many others that read it."""
    for others in (1, 3, 7):
        pairs = [socket.socketpair() for _ in range(others)]
        lines = [Line(near) for near, _ in pairs]
        readers = [threading.Thread(target=_read, args=(Line(far),), daemon=True) for _, far in pairs]
        for reader in readers:
            reader.start()
        runs = [_run(number) for number in range(64)]
        builder, ranks = BatchBuilder(64), RankedRunner(_Nothing(), None)  # type: ignore[arg-type]
        times = []
        for _ in range(ROUNDS):
            batch = builder.build(runs)
            began = time.perf_counter()
            told = ranks._message(batch)
            for line in lines:
                line.send(told)
            times.append(time.perf_counter() - began)
        print(f"{others} others: {statistics.median(times) * 1e6:.0f} us a step")
        for line in lines:
            line.socket.close()


class _Nothing:
    fatal, in_flight = (), 1


def _run(number: int) -> Run:
    request = GenerationRequest(request_id=str(number), prompt_token_ids=[1] * 2000, params=SamplingParams())
    sequence = Sequence(request, 0, 0)
    sequence.block_table = array("i", range(32))
    return Run.next(sequence, 1)


def _read(line: Line) -> None:
    batches = ToldBatches()
    try:
        while True:
            told: Any = line.receive(ToRank)
            batches.batch(told)
    except EOFError:
        return


def add_up() -> None:
    """Two processes."""
    for memory in (None, shared_memory(2)):
        print("Gloo" if memory is None else "shared memory")
        path = None if memory is None else f"/proc/{os.getpid()}/fd/{memory.fileno()}"
        with tempfile.TemporaryDirectory() as folder:
            other = multiprocessing.get_context("spawn").Process(target=_sums, args=(1, folder, path))
            other.start()
            _sums(0, folder, path)
            other.join()


class _Notes:
    """Notes in a file, by torch's own store."""

    def __init__(self, path: Path) -> None:
        from torch import distributed

        store = distributed.FileStore(str(path), 2)
        self.set: Any = store.set
        self.get: Any = store.get
        self.add: Any = store.add
        self.has: Any = lambda key: store.check([key])


def _sums(rank: int, folder: str, path: str | None) -> None:
    import torch

    torch.set_num_threads(1)
    memory = None if path is None else open(path, "r+b", buffering=0)  # noqa: SIM115 - for as long as the process is
    group = ProcessGroup(rank, 2, "cpu", _Notes(Path(folder) / "store"), "sums", patience=60, memory=memory)
    assert group.sum(torch.full((1, 3), rank + 1.0)).tolist() == [[3.0] * 3]
    for size in (8 << 10, 64 << 10, 1 << 20, 8 << 20):
        x, times = torch.zeros(1, size // 4), []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            group.sum(x)
            times.append(time.perf_counter() - began)
        if not rank:
            print(f"{size >> 10} KB: {statistics.median(times) * 1e6:.0f} us")


def engine() -> None:
    """A step that decodes 8 sequences."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_toy_model(Path(folder), toy_config(num_attention_heads=6, num_key_value_heads=3))
        for size in (1, 2, 3):
            settings: dict[str, Any] = {"device": "cpu", "threads": 1, "enforce_eager": True}
            with InferenceEngine(model, tensor_parallel_size=size, **settings) as made:
                params = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True)
                made.generate(["a"] * 8, params)
                began = time.perf_counter()
                made.generate(["a"] * 8, params)
                print(f"{size} ranks: {(time.perf_counter() - began) / 128 * 1e3:.2f} ms a step")


def stages() -> None:
    """Seconds of one rank, and of two stages with one step at a time and with two in flight; and how busy each is."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = toy_config(**sizes, head_dim=64, num_hidden_layers=8, max_position_embeddings=1024)
    answer = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    works = {
        "8 prompts of 480 tokens": ([f"{n}" * 480 for n in range(8)], SamplingParams(max_tokens=1)),
        "32 sequences": (["a"] * 32, answer),
        "8 sequences": (["a"] * 8, answer),
    }
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "enforce_eager": True, "kv_cache_memory": 1 << 29}
    settings |= {"enable_prefix_caching": False, "max_num_batched_tokens": 256}
    with tempfile.TemporaryDirectory() as folder:
        model = write_toy_model(Path(folder), config)
        for count, flying in ((1, 1), (2, 1), (2, 2)):
            with InferenceEngine(model, pipeline_parallel_size=count, **settings) as made:
                engine: Any = made._engine
                if flying < count:
                    engine.scheduler.in_flight, engine.step = 1, _one_at_a_time(engine)
                    engine.scheduler._go_on = lambda _: None
                others = made._ranks._others.values() if made._ranks else ()
                ranks = [os.getpid(), *(each.process.pid for each in others if each.process is not None)]
                for name, (prompts, params) in works.items():
                    seconds, busy = min(_worked(made, ranks, prompts, params) for _ in range(3))
                    shares = " ".join(f"{share:.2f}" for share in busy)
                    print(f"{count} stages, {flying} in flight, {name}: {seconds:.2f} s, busy {shares}")


def _one_at_a_time(engine: Any) -> Callable[[], Any]:
    step = engine.step

    def landed() -> Any:
        pieces = step()
        while engine._flights:
            pieces += engine._land()
        return pieces

    return landed


def _worked(made: InferenceEngine, ranks: list[int], prompts: list[str], params: Any) -> tuple[float, list[float]]:
    """Seconds, and what share of them each rank was busy."""

    def times() -> list[float]:
        lines = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in ranks]
        return [(int(line[11]) + int(line[12])) / os.sysconf("SC_CLK_TCK") for line in lines]

    before, began = times(), time.perf_counter()
    made.generate(prompts, params)
    seconds = time.perf_counter() - began
    return seconds, [(now - then) / seconds for now, then in zip(times(), before)]


def model() -> None:
    """Tokens a second of one sequence."""
    print("| model | link | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in (1, 2, 4, 8)) + " |")
    print("|" + "---|" * 6)
    for name, each in MODELS.items():
        for link, cost in LINKS.items():
            rates = []
            for n in (1, 2, 4, 8):
                reading = each.gigabytes / (n * BANDWIDTH * SHARE) * 1e3
                summing = 0.0 if n == 1 else 2 * each.layers * cost / 1e3
                rates.append(f"{1e3 / (reading + summing + FIXED):.0f}")
            print(f"| {name} | {link} | " + " | ".join(rates) + " |")
    print("\nthe same by stages, where a border costs no more than a sum")
    for name, each in MODELS.items():
        for link, cost in LINKS.items():
            reading = each.gigabytes / (BANDWIDTH * SHARE) * 1e3
            rates = [f"{1e3 / (reading + (n > 1) * n * cost / 1e3 + FIXED):.0f}" for n in (1, 2, 4, 8)]
            print(f"| {name} | {link} | " + " | ".join(rates) + " |")


def machines() -> None:
    """Tokens a second of one sequence, of machines with NVLink inside; a stage for each, or ranks over all of them."""
    shapes = [(1, 2), (1, 4), (1, 8), (2, 1), (2, 4), (2, 8), (4, 1), (4, 4), (8, 1), (8, 2)]
    print(
        "| machines x GPUs | flags on each | "
        + " | ".join(f"{each}: GB a GPU, as stages, as ranks" for each in LARGE)
        + " |"
    )
    print("|" + "---|" * (2 + len(LARGE)))
    for count, gpus in shapes:
        flags = f"-tp {gpus}" + (f" -pp {count} --nnodes {count}" if count > 1 else "")
        cells = []
        for each, whole in LARGE.values():
            inside = 0.0 if gpus == 1 else 2 * each.layers * LINKS["NVLink"] / 1e3
            reading = each.gigabytes / (gpus * BANDWIDTH * SHARE) * 1e3
            staged = 1e3 / (reading + inside + (count > 1) * count * NETWORK / 1e3 + FIXED)
            across = each.gigabytes / (count * gpus * BANDWIDTH * SHARE) * 1e3 + 2 * each.layers * NETWORK / 1e3
            ranked = f", {1e3 / (across + FIXED):.0f}" if count > 1 else ""
            cells.append(f"{whole / count / gpus:.0f}, {staged:.0f}{ranked}")
        print(f"| {count} x {gpus} | `{flags}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    works = {
        "message": message,
        "sum": add_up,
        "engine": engine,
        "stages": stages,
        "model": model,
        "machines": machines,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=works)
    works[parser.parse_args().what]()
