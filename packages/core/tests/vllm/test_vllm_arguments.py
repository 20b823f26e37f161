# SPDX-License-Identifier: MIT
"""vLLM's arguments as settings of an engine: taken, translated, or refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from candle_vllm.core import LLM, AsyncEngineArgs, ConfigError, EngineArgs, EngineConfig, InferenceEngine
from candle_vllm.core.vllm.arguments import translated


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {}),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8_e4m3"}, {"dtype": "bf16", "kv_cache_dtype": "fp8"}),
        ({"dtype": "half"}, {"dtype": "f16"}),
        ({"dtype": "float32", "load_format": "safetensors"}, {"dtype": "f32"}),
        ({"enforce_eager": True}, {"cuda_graphs": False}),
        ({"enforce_eager": False, "max_model_len": -1, "block_size": None}, {}),
        ({"max_model_len": 100, "max_num_seqs": 4}, {"max_model_len": 100, "max_num_seqs": 4}),
        ({"tokenizer": "m", "hf_token": True, "revision": None}, {}),
        ({"tokenizer": "other"}, {"tokenizer": Path("other")}),
        ({"kv_cache_memory_bytes": 1 << 20, "seed": 7}, {"kv_cache_memory": 1 << 20, "seed": 7}),
        (
            {"spec_model": "small", "spec_tokens": 4},
            {"speculative_config": {"model": "small", "num_speculative_tokens": 4}},
        ),
        (
            {"spec_method": "ngram", "spec_tokens": 4, "speculative_config": {"prompt_lookup_max": 3}},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
        ),
        ({"attention_backend": "FLASH_ATTN"}, {"attention_backend": "flash_attn"}),
        ({"attention_backend": "TRITON_ATTN"}, {"attention_backend": "triton"}),
        ({"attention_backend": "TORCH_SDPA"}, {"attention_backend": "torch"}),
        ({"limit_mm_per_prompt": {"image": 2, "video": 0}}, {"max_images": 2}),
        ({"limit_mm_per_prompt": {"image": {"count": 3, "width": 512}}}, {"max_images": 3}),
        ({"limit_mm_per_prompt": {"image": {"width": 512}}, "mm_encoder_tp_mode": "data"}, {}),
        ({"limit_mm_per_prompt": {}}, {}),
        ({"enable_chunked_prefill": False}, {"max_num_batched_tokens": 0}),
        ({"enable_sleep_mode": True, "async_scheduling": True, "enable_chunked_prefill": True}, {}),
        ({"swap_space": 4, "compilation_config": 3, "max_seq_len_to_capture": 1024}, {}),
        ({"num_scheduler_steps": 8, "structured_outputs_config": {"backend": "xgrammar"}}, {}),
        ({"served_model_name": "m"}, {}),
        ({"offload_group_size": 0, "offload_num_in_group": 1, "offload_prefetch_step": 1, "offload_params": None}, {}),
        ({"prefix_caching_hash_algo": "sha256", "num_gpu_blocks_override": None, "worker_extension_cls": ""}, {}),
        ({"max_num_partial_prefills": 1, "scheduler_reserve_full_isl": True, "stream_interval": 1}, {}),
        ({"mm_processor_cache_gb": 4, "video_pruning_rate": 0.0, "code_revision": None}, {}),
        ({"ignore_patterns": "original/**/*"}, {}),
        ({"kv_offloading_backend": "native", "ignore_patterns": ["original/**/*"], "mamba_cache_mode": "none"}, {}),
        ({"use_v2_block_manager": True, "worker_use_ray": False, "disable_async_output_proc": True}, {}),
        (
            {"pipeline_parallel_size": 1, "trust_remote_code": True, "runner": "pooling", "disable_log_stats": False},
            {},
        ),
        ({"chat_template": "{{ messages }}"}, {"chat_template": "{{ messages }}"}),
        ({"device": "cpu", "threads": 1, "isq": "q4k"}, {"device": "cpu", "threads": 1, "isq": "q4k"}),
    ],
)
def test_what_vllms_arguments_mean_here(given: dict[str, Any], settings: dict[str, Any]) -> None:
    assert translated("m", given).config == EngineConfig(model="m", **{"seed": 0, **settings})


def test_a_type_of_torchs_goes_by_its_name() -> None:
    class Half:
        def __str__(self) -> str:
            return "torch.float16"

    assert translated("m", {"dtype": Half()}).config == EngineConfig(model="m", seed=0, dtype="f16")


def test_a_template_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages[0].content }}")
    for given in (path, str(path)):
        assert translated("m", {"chat_template": given}).config.chat_template == "{{ messages[0].content }}"
    (tmp_path / "latin").write_bytes(b"\xe9")
    for wrong in ("nowhere.jinja", "a" * 300, "a\0", str(tmp_path), str(tmp_path / "latin")):
        with pytest.raises(ConfigError, match="neither a file nor Jinja source: "):
            translated("m", {"chat_template": wrong})


def test_how_vectors_are_made() -> None:
    pooling = translated("m", {"pooler_config": {"seq_pooling_type": "MEAN", "use_activation": False}}).pooling
    assert (pooling.pooling, pooling.use_activation) == ("mean", False)
    assert translated("m", {"pooler_config": {"pooling_type": "ALL"}}).pooling.pooling == "all"
    for name, value in (("step_tag_id", 5), ("normalise", False)):
        with pytest.raises(ConfigError, match=name):
            translated("m", {"pooler_config": {name: value}})
    off = {"pooling_type": "CLS", "enable_chunked_processing": False}
    assert translated("m", {"pooler_config": off}).pooling.pooling == "cls"


@pytest.mark.parametrize(
    "names",
    [("enable_chunked_prefill", "max_num_batched_tokens"), ("max_num_batched_tokens", "enable_chunked_prefill")],
)
def test_prompts_in_one_piece_whatever_the_order(names: tuple[str, str]) -> None:
    given = {"enable_chunked_prefill": False, "max_num_batched_tokens": 100}
    assert translated("m", {name: given[name] for name in names}).config.max_num_batched_tokens == 0


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"decode_context_parallel_size": 2}, TypeError, r"\(data_parallel_size\) only"),
        ({"fully_sharded_loras": True}, TypeError, "each GPU has the whole adapter"),
        ({"spec_model": "draft", "spec_method": "ngram"}, ConfigError, "model is for the method draft_model"),
        ({"speculative_config": 5, "spec_tokens": 3}, ConfigError, "speculative_config 5 is not a dict"),
        ({"pooler_config": '{"pooling_type": "CLS"}'}, ConfigError, "pooler_config must be values by name"),
        ({"spec_method": "eagle"}, ConfigError, "speculative_config: method must be one of .*EAGLE-3"),
        ({"device_ids": [1]}, TypeError, r"\(data_parallel_size\) only"),
        ({"limit_mm_per_prompt": {"video": 1}}, ConfigError, "limit_mm_per_prompt has 'video': images are"),
        ({"limit_mm_per_prompt": {"video": {"num_frames": 9}}}, ConfigError, "limit_mm_per_prompt has 'video': images"),
        ({"limit_mm_per_prompt": 2}, ConfigError, "limit_mm_per_prompt must be a JSON object of counts"),
        ({"logits_processors": [object]}, TypeError, "requests have them, as functions"),
        ({"quantization": "bitsandbytes"}, ConfigError, "quantization 'bitsandbytes' is not supported: leave it out"),
        ({"temperature": 1}, TypeError, "requests have it"),
        ({"max_modle_len": 5}, TypeError, "did you mean max_model_len"),
        ({"dtype": "int8"}, ConfigError, "dtype 'int8'"),
        ({"enforce_eager": "yes"}, ConfigError, "enforce_eager must be true or false"),
        ({"generation_config": "/x"}, ConfigError, "auto, for the model's own, vllm, for none, or a folder"),
        ({"override_generation_config": {"beams": 2}}, ConfigError, "'beams'; it may have temperature"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        translated("m", given)
    with pytest.raises(error, match=said):
        EngineArgs("m", **given)


def test_a_quantisation_that_the_checkpoint_does_not_have(toy_model: Path) -> None:
    watched = mock.patch.object(InferenceEngine, "close", autospec=True, side_effect=InferenceEngine.close)
    wrong = pytest.raises(ConfigError, match="quantization 'awq': the checkpoint is not quantised")
    with watched as close, wrong:
        LLM(str(toy_model), quantization="awq", threads=1, max_model_len=64)
    assert close.call_count == 1


def test_arguments_from_a_command_line(toy_model: Path) -> None:
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser())
    parser.set_defaults(model="m", runner="pooling")
    parser.add_argument("--top-k", type=int)
    args = parser.parse_args(
        ["--max-model-len", "64", "--no-enable-prefix-caching", "--dtype", "half", "--enforce-eager", "--threads", "1",
         "--enable-chunked-prefill", "--limit-mm-per-prompt", '{"image": 2}', "--tensor-parallel-size", "1",
         "--no-trust-remote-code"]
    )  # fmt: skip
    wanted = EngineConfig(
        model="m",
        seed=0,
        max_model_len=64,
        enable_prefix_caching=False,
        dtype="f16",
        cuda_graphs=False,
        threads=1,
        max_images=2,
    )
    kept = AsyncEngineArgs.from_cli_args(args)
    assert translated(vars(kept).pop("model"), {**vars(kept)}).config == wanted
    plain = vars(args)
    assert plain.pop("top_k") is None
    assert translated(plain.pop("model"), plain).config == wanted
    with LLM.from_engine_args(EngineArgs(str(toy_model), max_model_len=64, threads=1)) as llm:
        assert llm.engine.model_info.max_model_len == 64


def test_a_key_is_not_written_out() -> None:
    assert "hf_secret" not in repr(EngineArgs("m", hf_token="hf_secret", max_model_len=5))
