# SPDX-License-Identifier: MIT
"""Ranks that Ray places on two simulated machines: an answer, a machine that goes in mid-stream, and one that comes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine
from candle_vllm.core.engine.ranks import ray_ranks
from candle_vllm.core.errors import NotReadyError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.test_ranks import GREEDY, PROMPTS, dies, engine_of

RAY: dict[str, Any] = {"distributed_executor_backend": "ray", "max_model_len": 512}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One machine with a CPU, on which this process is; the engine finds it by its address."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False)  # read as Ray is imported, which it is
    small = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    found: Any = Cluster(initialize_head=True, head_node_args=small)
    monkeypatch.setenv("RAY_ADDRESS", found.address)
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def add_machine(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20)


def tokens(engine: InferenceEngine) -> list[tuple[int, ...]]:
    return [tuple(output.outputs[0].token_ids) for output in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.every_case
@pytest.mark.timeout(240)
def test_two_machines_one_of_which_goes_and_comes_back(cluster: Any, tmp_path: Path) -> None:
    model = write_toy_model(tmp_path, toy_config(num_attention_heads=6, num_key_value_heads=3))
    with engine_of(model, 1) as engine:
        right = tokens(engine)
    second = add_machine(cluster)
    with engine_of(model, 2, **RAY) as engine:
        assert tokens(engine) == right
        dies(engine, lambda: cluster.remove_node(second), "rank 1 at ")
    with ThreadPoolExecutor(1) as pool:  # the next start waits for a machine
        started = pool.submit(engine_of, model, 2, **RAY)
        time.sleep(2)
        assert not started.done()
        add_machine(cluster)
        with started.result(60) as engine:
            assert tokens(engine) == right


@pytest.mark.every_case
def test_workers_run_in_the_environment_of_their_machine() -> None:
    """Whoever starts the first rank by `uv run` does not have Ray make environments on the machines."""
    pytest.importorskip("ray", reason="Ray is not installed")
    code = """
import contextlib
from candle_vllm.core.engine.ranks import ray_ranks
from candle_vllm.core.errors import ConfigError
with contextlib.suppress(ConfigError):  # there is no cluster
    ray_ranks._connected()
from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV
assert not RAY_ENABLE_UV_RUN_RUNTIME_ENV
"""
    given = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", code], env=given, check=True, timeout=120)


@pytest.mark.parametrize(
    ("settings", "setting", "match"),
    [
        ({"nnodes": 2, "cluster_key": "a key of the nodes"}, "nnodes", "knows its machines"),
        ({"data_parallel_size": 2}, "data_parallel_size", "no replicas"),
        ({"device": "cuda:0,cuda:1"}, "device", "chooses the GPUs"),
        ({"tensor_parallel_size": 1}, "distributed_executor_backend", "there is one"),
    ],
)
def test_what_ray_decides_is_refused(settings: dict[str, Any], setting: str, match: str) -> None:
    asked: dict[str, Any] = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=match) as raised:
        EngineConfig(model="m", **asked | settings)
    assert raised.value.setting == setting


def test_without_a_cluster_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    def nobody(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)
    model = write_toy_model(tmp_path, toy_config())
    with pytest.raises(NotReadyError, match="`ray start --head` starts one") as raised:
        engine_of(model, 2, **RAY)
    assert raised.value.setting == "distributed_executor_backend"


def test_places_that_never_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the cluster lacks is said, and what was asked for is given back."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    removed: list[object] = []

    class Group:
        def ready(self) -> object:
            return self

    class Context:
        def get_node_id(self) -> str:
            return "node"

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Context)
    monkeypatch.setattr(ray, "wait", lambda *_, **__: ([], []))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    groups = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(groups, "placement_group", lambda *_, **__: Group())
    monkeypatch.setattr(groups, "remove_placement_group", removed.append)
    monkeypatch.setattr(ray_ranks, "JOINING", -1.0)
    model = write_toy_model(tmp_path, toy_config())
    with pytest.raises(NotReadyError, match=r"2 times \{'CPU': 1.0\}.* \{'CPU': 1.0\} free"):
        engine_of(model, 2, **RAY)
    assert len(removed) == 1


@pytest.mark.parametrize(
    ("given", "seen", "device"),
    [
        ("3", None, "cuda:3"),
        ("1", "0, 1", "cuda:1"),
        (" 1", "0,1", "cuda:1"),  # Ray divides its own value at commas alone
        ("GPU-b", "GPU-a, GPU-b", "cuda:1"),
        ("0", "GPU-a", None),
        ("GPU-a", None, None),
    ],
)
def test_the_gpu_of_the_first_rank(
    monkeypatch: pytest.MonkeyPatch, given: str, seen: str | None, device: str | None
) -> None:
    ranks = ray_ranks.RayRanks.__new__(ray_ranks.RayRanks)
    actor: Any = SimpleNamespace(device=SimpleNamespace(remote=lambda: given))
    ranks._ray, ranks._actors = SimpleNamespace(get=lambda found: found), [actor]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    config = EngineConfig(model="m")
    if device is not None:
        assert ranks._with_gpu(config).device == device
        return
    with pytest.raises(ConfigError, match="the same value here and for `ray start`"):
        ranks._with_gpu(config)
