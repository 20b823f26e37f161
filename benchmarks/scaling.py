# SPDX-License-Identifier: MIT
"""What ranks cost, measured here, and what a step on several GPUs takes by arithmetic; see docs/scaling.md.

python benchmarks/scaling.py message     what scheduling a step and telling it to 0 to 7 others takes
python benchmarks/scaling.py sum         adding up 8 KB to 8 MB between processes of this machine, by Gloo and by memory
python benchmarks/scaling.py draw        gathering logits of two processes and sampling from them
python benchmarks/scaling.py engine      steps of a small random model by 1 to 3 ranks, op by op
python benchmarks/scaling.py stages      prompts and steps of a larger one by one rank and by 2 stages, and who is busy
python benchmarks/scaling.py model       the tables of 1 to 8 GPUs, as ranks and as stages
python benchmarks/scaling.py machines    the table of 1 to 8 machines with 1 to 16 GPUs together
python benchmarks/scaling.py experts     bytes and time of a layer with whole experts, by sums and by exchanges
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.ranks.message_ring import MessageRing, RingLine
from candle_vllm.core.engine.ranks.rank_line import Line, Ready, ToRank, encoded
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Sequence
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.kernels.collectives import ProcessGroup, VocabularyShare, shared_memory
from candle_vllm.core.kernels.collectives.token_shares import rows_sent
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

ROUNDS = 400
VOCABULARY = 151936
DRAWS = {  # temperature, min_p, top_k, top_p
    "greedy": (0.0, 0.0, 0.0, 1.0),
    "temperature": (0.8, 0.0, 0.0, 1.0),
    "top_k 20, top_p 0.9": (0.8, 0.0, 20.0, 0.9),
    "top_p 0.9": (0.3, 0.0, 0.0, 0.9),  # of which random logits leave a few
}


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
MIXTURES = {  # layers with experts, width, experts of a token, experts
    "R1, V3": (58, 7168, 8, 256),
    "Qwen3-235B-A22B": (94, 4096, 8, 128),
    "gpt-oss-120b": (36, 2880, 4, 128),
}
RDMA = 50.0
"""GB/s of a GPU to others over a network of 400 Gb/s, published for exchanges (DeepEP: 43 to 58)."""
NETWORK = 59.0
"""Microseconds of one sum of a few rows between four machines, published: NCCL over RoCE, 48 KB."""
BANDWIDTH, SHARE, FIXED = 3350.0, 0.7, 0.4
"""GB/s of an H100's memory, how much of it kernels reach, and milliseconds of a step that no rank shortens."""


def message() -> None:
    """Scheduling a step of 64 sequences of some 2,000 tokens and telling it, by turns to nobody, 1, 3 and 7 others."""
    counts, context = (1, 3, 7), multiprocessing.get_context("spawn")
    tells: dict[str, Callable[[Any], object]] = {"nobody": lambda _: None}
    ended, processes, heard = list[Callable[[], object]](), list[Any](), context.SimpleQueue()
    for count in counts:
        ring = MessageRing(count)
        for way in ("ring", "lines"):
            pairs = [socket.socketpair() for _ in range(count)]
            lines = [Line(near) for near, _ in pairs]
            ended += [line.end for line in lines]
            path = f"/proc/{os.getpid()}/fd/{ring.memory.fileno()}" if way == "ring" else None
            name = f"{count} others by {way}"
            for rank, (_, far) in enumerate(pairs, 1):
                processes.append(context.Process(target=_read, args=(far, path, rank, name, heard)))
                processes[-1].start()
                far.close()
            for line in lines:
                line.receive(Ready)
            tells[name] = _by_ring(ring) if way == "ring" else _by_lines(lines)
    scheduler, builder = Scheduler(BlockManager(64 * 128, 32), 64, 1 << 18), BatchBuilder(32)
    for number in range(64):
        request = GenerationRequest(
            request_id=str(number), prompt_token_ids=[number] * (1984 + number), params=SamplingParams(max_tokens=9999)
        )
        scheduler.add(Sequence(request, 0, number))
    ranks, times = RankedRunner(_Nothing(), None), {way: list[tuple[float, float]]() for way in tells}  # type: ignore[arg-type]
    begins = {way: list[float]() for way in tells}
    for _ in range(ROUNDS):
        for way in random.sample(list(tells), len(tells)):
            time.sleep(0.003)  # as long as a short step: who was told has read, and waits
            began = time.perf_counter()
            step = scheduler.schedule()
            batch = builder.build(step)
            built = time.perf_counter()
            if way != "nobody":
                tells[way](ranks._message(batch))
            times[way].append((built - began, time.perf_counter() - began))
            begins[way].append(built)
            scheduler.launched(step)
            scheduler.commit(step)
            for run in step:
                run.sequence.append(7)
    for end in ended:
        end()
    last = {way: [0.0] * ROUNDS for way in tells}
    for _ in processes:
        way, each = heard.get()
        last[way] = list(map(max, last[way], each))
    for process in processes:
        process.join()
    for way, found in times.items():
        scheduled, whole = (statistics.median(each) * 1e6 for each in zip(*found[2:]))
        told = statistics.median(both - first for first, both in found[2:]) * 1e6
        after = statistics.median(there - built for there, built in zip(last[way], begins[way])) * 1e6
        print(f"{way}: {whole:.0f} us a step, {scheduled:.0f} of them to schedule it and {told:.0f} to tell it", end="")
        print(f"; {after:.0f} until the last one has it" if way != "nobody" else "")


class _Nothing:
    fatal, in_flight = (), 1
    step_memory = hidden_sum = drop_cache = restore_cache = wake_up = None  # not called


def _by_ring(ring: MessageRing) -> Callable[[Any], None]:
    return lambda told: ring.write(encoded(told), 60)


def _by_lines(lines: list[Line]) -> Callable[[Any], None]:
    def tell(told: Any) -> None:
        data = encoded(told)
        for line in lines:
            line.send_encoded(data)

    return tell


def _read(end: socket.socket, path: str | None, rank: int, name: str, heard: Any) -> None:
    line, times = Line(end), list[float]()
    if path is not None:
        with open(path, "r+b", buffering=0) as memory:
            line = RingLine(end, memory, rank)
    line.send(Ready(0))
    try:
        while True:
            line.receive(ToRank)
            times.append(time.perf_counter())
    except EOFError:
        heard.put((name, times))


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


def draws() -> None:
    """Two processes with half of the columns each: rows are gathered, and the first process samples from them."""
    memory = shared_memory(2)
    assert memory is not None
    path = f"/proc/{os.getpid()}/fd/{memory.fileno()}"
    with tempfile.TemporaryDirectory() as folder:
        other = multiprocessing.get_context("spawn").Process(target=_draws, args=(1, folder, path))
        other.start()
        _draws(0, folder, path)
        other.join()


def _draws(rank: int, folder: str, path: str) -> None:
    import torch

    torch.set_num_threads(1)
    with open(path, "r+b", buffering=0) as memory:
        notes = _Notes(Path(folder) / "store")
        groups = {
            "Gloo": ProcessGroup(rank, 2, "cpu", notes, "gloo", patience=60),
            "shared memory": ProcessGroup(rank, 2, "cpu", notes, "shared", patience=60, memory=memory),
        }
    most = VOCABULARY // 2
    for rows in (1, 32):
        logits = np.random.default_rng(rows).standard_normal((rows, VOCABULARY)).astype(np.float32) * 3
        own = torch.from_numpy(logits[:, rank * most : (rank + 1) * most].copy())
        for name, control in DRAWS.items():
            controls, times = np.tile([*control, 0.46371], (rows, 1)), dict[str, list[float]]()
            for way, group in groups.items():
                share, taken = VocabularyShare(group, rank * most, most, VOCABULARY), times.setdefault(way, [])
                for _ in range(100 if rows == 1 else 20):
                    group.sum(torch.zeros(2))  # they begin at the same time
                    began = time.perf_counter()
                    whole = share.whole(own)
                    if not rank:
                        kernels.draw(whole, controls)
                    taken.append(time.perf_counter() - began)
            if not rank:
                said = ", ".join(f"{way} {statistics.median(each) * 1e3:.2f} ms" for way, each in times.items())
                print(f"{rows} rows, {name}: {said}")


class _Notes:
    """Notes in a file, by torch's own store."""

    def __init__(self, path: Path, ranks: int = 2) -> None:
        from torch import distributed

        store = distributed.FileStore(str(path), ranks)
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
            settings: dict[str, Any] = {"device": "cpu", "threads": 1, "op_by_op": True}
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
    settings: dict[str, Any] = {"device": "cpu", "threads": 1, "op_by_op": True, "kv_cache_memory": 1 << 29}
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
            pieces += engine._collect()
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


def experts() -> None:
    """What a rank sends in a layer, by arithmetic; and the time of 2 and 4 ranks here whose experts compute nothing."""
    print("| model | " + " | ".join(f"{n} ranks" for n in (8, 16, 32, 64)) + " |")
    print("|" + "---|" * 5)
    for name, (layers, width, top_k, count) in MIXTURES.items():
        cells = []
        for n in (8, 16, 32, 64):
            rows = rows_sent([count // n] * n, top_k)
            sums, exchanges = (each * width * 2 * 8192 / 1e6 for each in rows)  # bf16
            saved = (sums - exchanges) * layers / RDMA  # MB by GB/s are milliseconds
            cells.append(f"{sums:.0f}, {exchanges:.0f} ({exchanges / sums:.0%}), {saved:.0f} ms")
        print(f"| {name} | " + " | ".join(cells) + " |")
    for size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            start = multiprocessing.get_context("spawn").Process
            others = [start(target=_layers, args=(rank, size, folder)) for rank in range(1, size)]
            for other in others:
                other.start()
            _layers(0, size, folder)
            for other in others:
                other.join()


def _layers(rank: int, size: int, folder: str) -> None:
    import torch

    from candle_vllm.core.kernels.collectives.token_shares import TokenShares
    from candle_vllm.core.kernels.moe import Pairs

    torch.set_num_threads(1)
    group: Any = ProcessGroup(rank, size, "cpu", _Notes(Path(folder) / "store", size), "layers", patience=60)
    width, top_k, held = 1024, 2, [32 // size] * size
    shares, counted, exchange = TokenShares(group, held, 0.0), [0], group.exchange

    def exchanged(x: Any, sent: Any, received: Any) -> Any:
        counted[0] += (sum(sent) - sent[rank]) * x.shape[1] * x.itemsize
        return exchange(x, sent, received)

    group.exchange = exchanged
    for tokens in (64, 512, 2048):
        made = torch.Generator().manual_seed(tokens)
        y = torch.randn(tokens, width, generator=made)
        chosen = torch.rand(tokens, sum(held), generator=made).topk(top_k).indices.to(torch.int32)
        line, own = [], slice(rank * tokens // size, (rank + 1) * tokens // size)
        for divided in (False, True):
            pairs = Pairs(torch.ones(tokens, top_k), chosen, sum(held))
            if divided:
                pairs = Pairs(pairs.weights[own].contiguous(), chosen[own].contiguous(), sum(held))
            times = []
            for _ in range(30):
                counted[0] = 0
                began = time.perf_counter()
                shares.begin(tokens, may_divide=divided)
                x = shares.sum(y.clone())
                shares.whole(shares.experts(x, pairs, lambda rows, _: rows), None)
                times.append(time.perf_counter() - began)
            share = (size - 1) / size * tokens * width * 4
            sent = counted[0] + share if divided else 4 * share
            line.append(f"{sent / 1e6:.2f} MB, {statistics.median(times) * 1e3:.2f} ms")
        if not rank:
            print(f"{size} ranks, {tokens} tokens: by sums {line[0]}; by exchanges {line[1]}", flush=True)
    group.least(0)  # nobody ends before the others have what they wait for
    group.close()


if __name__ == "__main__":
    works = {
        "message": message,
        "sum": add_up,
        "draw": draws,
        "engine": engine,
        "stages": stages,
        "model": model,
        "machines": machines,
        "experts": experts,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=works)
    works[parser.parse_args().what]()
