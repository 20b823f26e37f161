# SPDX-License-Identifier: MIT
"""Engines whose threads are divided into ranks: the bits of one, whatever is placed where."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.assembly import placement
from candle_vllm.core.assembly.placement import resolve_ranks
from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.engine.ranks.nodes import run_node
from candle_vllm.core.engine.runners import recorded_runner
from candle_vllm.core.kernels.cpu_runtime import numa
from candle_vllm.core.kernels.cpu_runtime.numa import CpuRank, CpuRanks
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.remote import ReplicatedEngine
from candle_vllm.core.remote.fleet import replica_configs
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.vllm.llm import LLM
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_gguf import write_toy_gguf

pytest.importorskip("numba")
if sys.platform != "linux":
    pytest.skip("ranks need Linux", allow_module_level=True)

PROMPTS = [[(7 * i) % 256 for i in range(n)] for n in (5, 90, 300)]
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


def dense(folder: Path) -> Path:
    return write_toy_model(folder / "dense", toy_config(head_dim=32, hidden_size=101, intermediate_size=77))


def experts(folder: Path) -> Path:
    return write_tiny(folder / "experts", "qwen3_moe", head_dim=32, norm_topk_prob=True, **EXPERTS)


def gguf(folder: Path) -> Path:
    config = toy_config(head_dim=32, hidden_size=128, intermediate_size=160)
    return write_toy_gguf(folder / "toy.gguf", config, quantization="Q4_1")


def latent(folder: Path) -> Path:
    sizes = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "q_lora_rank": 64}
    mixture = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 32}
    groups = {"n_group": 4, "topk_group": 2, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    return write_tiny(folder / "latent", "deepseek_v3", **sizes, **mixture, **groups)


@functools.cache
def _written(write: Callable[[Path], Path], folder: Path) -> Path:
    return write(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def numbers(model: Path, **settings: Any) -> list[Any]:
    """Tokens and log-probabilities of prompts and of what follows them."""
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1)
        for i in range(len(PROMPTS))
    ]
    given: dict[str, Any] = {"block_size": 16, "max_model_len": 512, **settings}
    with InferenceEngine(str(model), **given) as engine:
        outputs = engine.generate(PROMPTS, params, use_tqdm=False)
    return [
        [
            [(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()],
            [[(t.token_id, t.logprob) for t in (e.chosen, *e.top)] for e in output.prompt_logprobs or () if e],
        ]
        for output in outputs
    ]


@pytest.mark.parametrize("write", [dense, experts, gguf, latent], ids=lambda write: write.__name__)
def test_ranks_change_no_bit(write: Callable[[Path], Path], folder: Path) -> None:
    model = _written(write, folder)
    alone = numbers(model, threads=2, cpu_ranks=1)
    for threads, count in ((2, 2), (4, 2)) if write is not gguf else ((2, 2), (4, 2), (5, 3)):
        assert numbers(model, threads=threads, cpu_ranks=count) == alone, (threads, count)


@pytest.mark.every_case
def test_quantised_caches_of_ranks(folder: Path) -> None:
    kinds = {"key_cache_dtype": "q8_0", "value_cache_dtype": "q5_1"}
    model = _written(gguf, folder)
    assert numbers(model, threads=4, cpu_ranks=2, **kinds) == numbers(model, threads=4, cpu_ranks=1, **kinds)


def two_sockets(bound: list[tuple[int, int, tuple[int, ...]]], error: int = 0) -> CpuRanks:
    """Of four threads, on this machine's CPUs, with a stand-in for what places memory."""

    def bind(address: int, size: int, nodes: Sequence[int]) -> int:
        bound.append((address, size, tuple(nodes)))
        return error

    cpus = frozenset(os.sched_getaffinity(0))
    return CpuRanks((CpuRank(cpus, (0,), (0,)), CpuRank(cpus, (1,), (1,))), (0, 2, 4), bind)


def placed(bound: list[tuple[int, int, tuple[int, ...]]], address: int) -> tuple[int, ...]:
    """The nodes that a page was asked from last."""
    return next(nodes for at, size, nodes in reversed(bound) if at <= address < at + size)


def test_weights_and_heads_lie_on_the_nodes_of_their_ranks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, bound = _written(gguf, folder), list[tuple[int, int, tuple[int, ...]]]()
    alone = numbers(model, threads=4, cpu_ranks=1)
    monkeypatch.setattr(placement, "plan_ranks", lambda *_: two_sockets(bound))
    made: list[Any] = []
    caches = recorded_runner._caches
    monkeypatch.setattr(
        recorded_runner, "_caches", lambda *given, **more: made.append(caches(*given, **more)) or made[-1]
    )
    with caplog.at_level(logging.INFO):
        assert numbers(model, threads=4) == alone
    assert "2 CPU ranks: 2 of 4 threads on node 0 (CPUs " in caplog.text
    assert {nodes for _, _, nodes in bound} == {(0,), (1,), (0, 1)}
    assert all(at % 4096 == 0 == size % 4096 for at, size, _ in bound)
    for of_layers in made[0]:  # keys, values: of two heads, a rank has one
        for layer in of_layers:
            assert layer.shape[1] == 2
            for head in range(2):
                at = layer[0, head].ctypes.data
                assert placed(bound, at + 4096) == (head,)


def test_a_system_that_places_no_memory_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, bound = _written(gguf, folder), list[tuple[int, int, tuple[int, ...]]]()
    monkeypatch.setattr(placement, "plan_ranks", lambda *_: two_sockets(bound, error=1))
    numa._say_refused.cache_clear()
    assert numbers(model, threads=4) == numbers(model, threads=4, cpu_ranks=1)
    assert caplog.text.count("Operation not permitted") == 1
    assert "SYS_NICE" in caplog.text


def test_ranks_sleep_and_wake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given back is asked of the same nodes again, for its addresses stay."""
    bound = list[tuple[int, int, tuple[int, ...]]]()
    monkeypatch.setattr(placement, "plan_ranks", lambda *_: two_sockets(bound))
    asked = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)
    with InferenceEngine(str(_written(gguf, folder)), threads=4, max_model_len=512) as engine:
        before = [engine.generate(PROMPTS, asked, use_tqdm=False)[n].outputs[0].logprobs for n in range(3)]
        calls = len(bound)
        engine.sleep(2)
        engine.wake_up()
        assert [engine.generate(PROMPTS, asked, use_tqdm=False)[n].outputs[0].logprobs for n in range(3)] == before
    assert len(bound) == calls


def test_threads_of_ranks_run_on_their_cpus() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU")
    before, here = set(threading.enumerate()), os.sched_getaffinity(0)
    divided = CpuRanks((CpuRank(frozenset(cpus[:1]), (0,), (0,)), CpuRank(frozenset(cpus[1:]), (1,), (1,))), (0, 1, 3))
    team = ThreadTeam(3, divided)
    try:
        helpers = {t.name: t.native_id for t in threading.enumerate() if t not in before}
        plan = np.zeros(1, np.int64)
        seen = list[set[int]]()

        def call() -> None:
            team.run(plan, 0)
            seen.append(set(os.sched_getaffinity(0)))

        caller = threading.Thread(target=call)
        caller.start()
        caller.join()
        team.run(plan, 0)  # the main thread, whose children would be bound
        assert seen == [set(cpus[:1])]
        assert os.sched_getaffinity(0) == here
        assert {frozenset(os.sched_getaffinity(at or 0)) for at in helpers.values()} == {frozenset(cpus[1:])}
    finally:
        team.close()


def test_more_ranks_than_threads_are_refused_with_what_works(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu_ranks=4 .* there are 2: set cpu_ranks=2 or less, or threads=4 or more"):
        InferenceEngine(str(_written(gguf, folder)), threads=2, cpu_ranks=4)


def without_kernels(folder: Path) -> Path:
    return write_toy_model(folder / "without", toy_config(hidden_size=128, head_dim=8))


@pytest.mark.parametrize(
    ("write", "settings", "reason"),
    [
        (gguf, {"cpu_ranks": 2, "op_by_op": True}, "op_by_op is set"),
        (without_kernels, {"tensor_parallel_size": 2}, "head size 8"),
    ],
)
def test_ranks_of_kernels_that_are_not_compiled_are_refused(
    write: Callable[[Path], Path], settings: dict[str, Any], reason: str, folder: Path
) -> None:
    said = f"cpu_ranks=2 needs the compiled CPU kernels, but {reason}.*: leave out cpu_ranks, or tensor_parallel_size"
    with pytest.raises(ConfigError, match=said):
        InferenceEngine(str(_written(write, folder)), device="cpu", threads=2, **settings)


# ---- what tensor_parallel_size and its like mean without a GPU -------------------------------------------------------

TWO_NODES: dict[str, Any] = {"nnodes": 2, "tensor_parallel_size": 2, "cluster_key": "0123456789abcdef"}
RAY: dict[str, Any] = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
FOR_GPUS: dict[str, tuple[dict[str, Any], str]] = {
    "stages": ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    "stages of ranks": ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
    "nodes": (TWO_NODES, "nnodes=2"),
    "second node": (TWO_NODES | {"node_rank": 1}, "nnodes=2"),
    "ray": (RAY, "distributed_executor_backend='ray'"),
    "experts": ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, "enable_expert_parallel=True"),
    "both": (
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True},
        "pipeline_parallel_size=2 and enable_expert_parallel=True",
    ),
    "replicas": ({"data_parallel_size": 2, "pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, on which no other process starts."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("candle_vllm.core.devices._driver_has_gpu", lambda: False)
    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_tensor_parallel_size_means_cpu_ranks(
    device: str, folder: Path, no_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = _written(dense, folder)
    with caplog.at_level(logging.INFO):
        divided = numbers(model, device=device, threads=2, tensor_parallel_size=2)
    assert divided == numbers(model, threads=2, cpu_ranks=1)
    assert caplog.text.count("no GPU is used: tensor_parallel_size=2 means cpu_ranks=2 (docs/scaling.md)") == 1
    assert "2 CPU ranks: 1 of 2 threads" in caplog.text


def test_the_same_under_the_names_of_vllm(folder: Path, no_gpu: None) -> None:
    texts = []
    for size in (1, 2):
        with LLM(str(_written(dense, folder)), tensor_parallel_size=size, threads=2, max_model_len=128) as llm:
            asked = SamplingParams(temperature=0.0, max_tokens=12)
            texts.append([each.outputs[0].text for each in llm.generate(["the quick", "fox"], asked, use_tqdm=False)])
    assert texts[0] == texts[1] != ["", ""]


@pytest.mark.parametrize("case", FOR_GPUS)
def test_what_divides_among_gpus_alone_is_refused_before_anything_starts(case: str, no_gpu: None) -> None:
    """The model is nowhere: who looked for it would say so."""
    settings, named = FOR_GPUS[case]
    start: Callable[[EngineConfig], object] = InferenceEngine
    if "data_parallel_size" in settings:
        start = ReplicatedEngine
    elif "node_rank" in settings:
        start = run_node
    with pytest.raises(ConfigError) as refused:
        start(EngineConfig(model="/nowhere", **settings))
    assert str(refused.value) == (
        f"{named} would divide the model among GPUs, but no GPU is used: leave it out (docs/scaling.md)"
    )
    assert refused.value.setting == named.partition("=")[0]
    kept = resolve_ranks(EngineConfig(model="/nowhere", op_by_op=True, **settings))  # processes, in torch
    assert (kept.device, kept.ranks) == ("cpu", EngineConfig(model="/nowhere", **settings).ranks)


@pytest.mark.parametrize(
    ("settings", "system", "message"),
    [
        ({"threads": 2, "cpu_ranks": 3}, "linux", "cpu_ranks=3 contradicts it: leave one of them out"),
        ({"threads": 1}, "linux", "each rank needs a thread, and there are 1: .* threads=2 or more"),
        ({"threads": 3, "data_parallel_size": 2}, "linux", "each rank of 2 replicas .* are 3: .* threads=4 or more"),
        ({"threads": 2}, "darwin", "CPU ranks need Linux: leave it out"),
    ],
)
def test_cpu_ranks_that_cannot_be_are_refused_as_they_were_asked_for(
    settings: dict[str, Any], system: str, message: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "sys", SimpleNamespace(platform=system))
    with pytest.raises(ConfigError, match=f"tensor_parallel_size=2 means 2 CPU ranks, .*{message}") as refused:
        resolve_ranks(EngineConfig(model="/nowhere", tensor_parallel_size=2, **settings))
    assert refused.value.setting == "tensor_parallel_size"


def test_replicas_have_as_many_cpu_ranks_each(no_gpu: None, toy_model: Path) -> None:
    config = EngineConfig(model=str(toy_model), tensor_parallel_size=2, data_parallel_size=2, threads=5)
    each = [(one.device, one.tensor_parallel_size, one.cpu_ranks, one.threads) for one in replica_configs(config)]
    assert each == [("cpu", 1, 2, 3), ("cpu", 1, 2, 2)]


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_ranks_in_torch_without_torch_are_refused_with_what_installs_it(
    device: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"^op_by_op is set, so layers .* torch, .* `uv run --extra torch "):
        InferenceEngine("/nowhere", device=device, op_by_op=True, tensor_parallel_size=2)


@pytest.mark.parametrize("case", FOR_GPUS)
def test_with_a_gpu_nothing_is_changed(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that only starts others opens no GPU: it would take memory there, or a GPU that Ray gave another."""
    settings, _ = FOR_GPUS[case]
    opened = list[str]()
    monkeypatch.setattr("candle_vllm.core.devices._driver_has_gpu", lambda: True)
    monkeypatch.setattr(placement, "choose_device", lambda wanted: opened.append(wanted) or Device("cuda:0"))
    config = EngineConfig(model="/nowhere", **settings)
    assert resolve_ranks(config) is config
    assert opened == ([] if case in ("second node", "ray", "replicas") else ["auto"])


def test_a_gpu_that_cannot_be_used_is_as_none(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, or its CUDA, is missing."""
    monkeypatch.setattr("candle_vllm.core.devices._driver_has_gpu", lambda: True)
    monkeypatch.setattr("candle_vllm.core.devices.gpu_obstacle", lambda index: "torch is not installed")
    resolved = resolve_ranks(EngineConfig(model="/nowhere", tensor_parallel_size=2, threads=2))
    assert (resolved.device, resolved.ranks, resolved.cpu_ranks) == (CPU, 1, 2)
    with pytest.raises(ConfigError, match="device 'cuda:0' cannot be used: torch is not installed"):
        InferenceEngine("/nowhere", device="cuda:0,cuda:1")
    node: dict[str, Any] = TWO_NODES | {"tensor_parallel_size": 4, "node_rank": 1}
    with pytest.raises(ConfigError, match="device names one GPU, cuda:3, but 2 ranks are configured"):
        run_node(EngineConfig(model="/nowhere", device="cuda:3", **node))
