# SPDX-License-Identifier: MIT
"""A model on several GPUs, divided in every way, each beside the others: one JSON line per result.

    python benchmarks/gpu/several.py [--gpus 2] [--model llama-3.1-8b] [--ways one tp pp ...] [--batches 1 16 64]
        [--prompts 8] [--depth 2048] [--output 64] [--no-cuda-graphs] [--seconds 570] [--commit HASH]
        [--quick --device cpu]

The ways, on n GPUs (docs/scaling.md says what they do and what arithmetic expects of each):

one     one GPU, where the model fits it: what the others are compared with
tp      n ranks                          pp      n stages, as many steps in flight
pp-1    n stages, a step at a time       tp-pp   stages of two ranks each, from four GPUs on
dp      n replicas, which get n times as many sequences and prompts at once
moe-tp  a mixture of experts, n ranks    moe-ep  the same with whole experts

`what` says which result a line is. decode: `batch` sequences, `ms_token` of each and `tok_s` of all, without their
prompts. prefill: `prompts` of `tokens` each at once, `tok_s`. load: seconds until the engine stands. failed: why a way
gave nothing. Weights are random ones; answers are checked by the tests. No machine with two GPUs has run it yet.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from measure import Deadline, report
from models import SHAPES, Shape, write_folder

from candle_vllm.core import EngineConfig, InferenceEngine, ReplicatedEngine, SamplingParams

_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
_MIXTURE = ("mixtral", "MixtralForCausalLM")
MIXTURES: Mapping[bool, Shape] = MappingProxyType(
    {
        False: Shape(*_MIXTURE, 16, 4096, 14336, 32, 8, 128, 32000, 32768, False, _MIXTRAL),
        True: Shape(*_MIXTURE, 2, 256, 512, 4, 2, 64, 512, 2048, False, _MIXTRAL),
    }
)
"""Half of Mixtral 8x7B's layers, 46 GB, so that two GPUs hold it; and one for checking this script."""


def ways(gpus: int) -> dict[str, dict[str, Any]]:
    """Settings of an engine, by the names above."""
    found: dict[str, dict[str, Any]] = {
        "one": {},
        "tp": {"tensor_parallel_size": gpus},
        "pp": {"pipeline_parallel_size": gpus},
        "pp-1": {"pipeline_parallel_size": gpus},
        "dp": {"data_parallel_size": gpus},
        "moe-tp": {"tensor_parallel_size": gpus},
        "moe-ep": {"tensor_parallel_size": gpus, "enable_expert_parallel": True},
    }
    if gpus >= 4 and gpus % 2 == 0:
        found["tp-pp"] = {"tensor_parallel_size": 2, "pipeline_parallel_size": gpus // 2}
    return found


def main() -> None:
    """Measures each way in turn, while there is time."""
    options = _arguments()
    deadline, shape = Deadline(options.seconds), SHAPES[options.model]
    every, skipped = ways(options.gpus), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        plain, mixture = (write_folder(Path(folder) / name, each) for name, each in
                          (("plain", shape), ("mixture", MIXTURES[options.quick])))  # fmt: skip
        for way in options.ways or every:
            if way not in every:
                say = functools.partial(report, "several", options.device, options.commit, way=way, gpus=options.gpus)
                say(what="failed", failed=f"{options.gpus} GPUs cannot be divided so")
            elif deadline.over:
                skipped.append(way)
            else:
                _measure(way, mixture if way.startswith("moe") else plain, every[way], options)
    if skipped:
        report("several", options.device, options.commit, skipped=skipped)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="how many; all that there are, where it is left out")
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--ways", nargs="*", help="some of the ways; all of them, where it is left out")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16, 64])
    parser.add_argument("--prompts", type=int, default=8, help="read at once")
    parser.add_argument("--depth", type=int, default=2048, help="tokens of each of them")
    parser.add_argument("--output", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--seconds", type=float, default=570.0, help="no way is begun later than this")
    parser.add_argument("--quick", action="store_true", help="toy models, to check this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    if options.quick:
        options.model, options.batches, options.prompts, options.depth, options.output = "toy", [2], 2, 40, 6
    if options.gpus is None:
        options.gpus = 2 if options.device == "cpu" else torch.cuda.device_count()
    if options.gpus < 2:
        parser.error(f"{options.gpus} GPU: several are needed, or --device cpu --quick")
    return options


def _measure(way: str, model: Path, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """The lines of one way."""
    say = functools.partial(report, "several", options.device, options.commit, way=way, gpus=options.gpus,
                            model=model.name if way.startswith("moe") else options.model)  # fmt: skip
    times, numbers = settings.get("data_parallel_size", 1), random.Random(0)  # noqa: S311 - the same in every run
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        device=options.device,
        cuda_graphs=not options.no_cuda_graphs,
        op_by_op=options.device == "cpu",
        threads=1 if options.quick else None,
        max_model_len=options.depth + options.output + 64,
        max_num_seqs=max([*options.batches, options.prompts]),
        kv_cache_memory=(16 << 20) if options.quick else None,
        enable_prefix_caching=False,
        seed=0,
        **settings,
    )

    def answered(count: int, length: int, output: int) -> float:
        prompts = [[numbers.randrange(2, 500) for _ in range(length)] for _ in range(times * count)]
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        start = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    start = time.perf_counter()
    try:
        engine = ReplicatedEngine(config) if times > 1 else InferenceEngine(config)
    except Exception as error:
        say(what="failed", failed=f"{type(error).__name__}: {error}"[:500])
        return
    with engine:
        say(what="load", seconds=time.perf_counter() - start)
        if way == "pp-1":
            _one_at_a_time(engine)
        try:
            answered(1, 8, 4)
            for batch in options.batches:
                first, whole = (_median(lambda n=n, b=batch: answered(b, 16, n)) for n in (1, 1 + options.output))
                seconds = (whole - first) / options.output
                rate = times * batch / seconds
                say(what="decode", batch=times * batch, ms_token=1e3 * seconds, tok_s=rate)
            seconds = _median(lambda: answered(options.prompts, options.depth, 1))
            count = times * options.prompts
            say(what="prefill", prompts=count, tokens=options.depth, tok_s=count * options.depth / seconds)
        except Exception as error:
            say(what="failed", failed=f"{type(error).__name__}: {error}"[:500])


def _median(call: Callable[[], float]) -> float:
    call()
    return statistics.median(call() for _ in range(3))


def _one_at_a_time(engine: Any) -> None:
    """Has every step land before the next one begins, in batches of all that run."""
    inside = engine._engine
    step = inside.step
    inside.scheduler.in_flight = 1

    def landed() -> Any:
        pieces = step()
        while inside._flights:
            pieces += inside._collect()
        return pieces

    inside.step = landed
    inside.scheduler._go_on = lambda _: None


if __name__ == "__main__":
    main()
