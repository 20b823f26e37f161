# SPDX-License-Identifier: MIT
"""DeepSeek V4: closeness to transformers for every cut, published and wrong configs, caches, an engine's answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config as TransformersConfig

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.kernels.offloading import tensors_in
from candle_vllm.core.loading.cache_specs import PagedSpec, SharedKVSpec
from candle_vllm.core.models.deepseek_v4_config import DeepseekV4Config
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import (
    LENGTH,
    config_of,
    cuts,
    eager_logits,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    typical_spread,
    write_tiny,
)
from tests.common_run import few

PATH = Path("config.json")
NAMES = [name for name in ROWS if name.startswith("DeepSeek-V4")]
FLASH: dict[str, Any] = {  # as it is published
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


PUBLISHED = (
    ("model.", ""),
    ("lm_head", "head"),
    ("embed_tokens", "embed"),
    ("hc_head.hc_", "hc_head_"),
    ("attn.norm", "attn.kv_norm"),
)


def read(**changes: Any) -> DeepseekV4Config:
    config = family_from_hf(FLASH | changes, PATH, impl="native")[1]
    assert isinstance(config, DeepseekV4Config)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers_closely(name: str, tmp_path: Path) -> None:
    """In torch and compiled, where the caches are float32: whole, in chunks, and token by token."""
    folder, tokens = write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert spread(eager_logits(folder, tokens, chunks), theirs) < 1e-5, chunks
        assert spread(recorded_logits(folder, tokens, chunks), theirs) < 1e-5, chunks


@pytest.mark.parametrize("cut", few(range(1, LENGTH), 1, 4, 31, 32, 33, 63))
def test_every_cut_of_the_prompt(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    row, tokens = ROWS["DeepSeek-V4"], some_tokens()
    folder = write_tiny(tmp_path_factory.mktemp("model"), row.model_type, **row.config)
    theirs = their_logits(folder, tokens)
    assert spread(eager_logits(folder, tokens, [cut, LENGTH - cut]), theirs) < 1e-5


def test_a_published_config_is_read() -> None:
    config = read()
    assert config.ratios == (0, 0, *[4, 128] * 20, 4)
    assert config.indexed == frozenset(range(2, 43, 2))
    assert config.hash_layers == frozenset(range(3))
    assert (config.rope.theta, config.rope.kind, config.rope.dim, config.rope.attention_factor) == (
        1.6e5,
        "yarn",
        64,
        1,
    )
    assert config.local_rope is not None
    assert (config.local_rope.theta, config.local_rope.kind, config.local_rope.dim) == (1e4, "default", 64)
    assert (config.max_position, config.sliding_windows[:3], config.index_top) == (1 << 20, (128, 128, None), 512)
    assert config.mixture.scoring == "sqrt_softplus"


def test_transformers_reads_a_published_config_so() -> None:
    theirs = TransformersConfig(**{key: value for key, value in FLASH.items() if key != "architectures"}).to_dict()
    assert theirs["rope_parameters"]["compress"]["factor"] == 16
    assert family_from_hf(theirs | {"architectures": FLASH["architectures"]}, PATH, impl="native")[1] == read()


def test_what_a_token_takes_in_the_cache() -> None:
    """Rows and inputs of groups within a window of 128 tokens, beside 160 or 32 elements of the logs for each token."""
    specs = read().cache_specs
    assert specs[1] == PagedSpec(1, 512, 0, 128)
    assert specs[2] == PagedSpec(1, 512, 2 * 2 * 512 + 2 * 2 * 128, 128)
    assert specs[3] == PagedSpec(1, 512, 2 * 512, 128)
    assert specs[43:47] == (SharedKVSpec(0), SharedKVSpec(1), PagedSpec(1, 128, 32), PagedSpec(1, 32, 0))
    assert sum(spec.elements for spec in specs if isinstance(spec, PagedSpec) and spec.window is None) == 21 * 160 + 640


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"swiglu_limit": 7.0}, UnsupportedModelError, "swiglu_limit is 7.0; implemented: 10.0"),
        ({"scoring_func": "softmax"}, UnsupportedModelError, "scoring_func is 'softmax'"),
        ({"n_shared_experts": 2}, UnsupportedModelError, "n_shared_experts is 2; implemented: 1"),
        ({"num_key_value_heads": 2}, UnsupportedModelError, "num_key_value_heads is 2; implemented: 1"),
        ({"attention_bias": True}, UnsupportedModelError, "attention_bias is True"),
        ({"norm_topk_prob": False}, UnsupportedModelError, "norm_topk_prob is False"),
        ({"compress_ratios": [8] * 43}, UnsupportedModelError, "layers of other kinds"),
        ({"compress_rate_csa": 6}, InvalidFileError, "groups of 6 tokens"),
        ({"compress_rate_hca": 1 << 20}, InvalidFileError, "groups of 1048576 tokens"),
        ({"compress_ratios": [[4]] * 43}, UnsupportedModelError, "layers of other kinds"),
        ({"compress_rate_csa": 0}, InvalidFileError, "not positive whole numbers"),
        ({"compress_rates": {"heavily_compressed_attention": 0}}, InvalidFileError, "not positive whole numbers"),
        ({"compress_rates": {"heavily_compressed_attention": "x"}}, InvalidFileError, "not positive whole numbers"),
        ({"topk_method": "greedy"}, UnsupportedModelError, "topk_method is 'greedy'; implemented: 'noaux_tc'"),
        ({"mlp_layer_types": ["dense"] * 43}, UnsupportedModelError, "mlp_layer_types other than hash_moe and moe"),
        ({"o_groups": 7}, InvalidFileError, "64 heads cannot be divided into 7 groups"),
        ({"o_groups": 128}, InvalidFileError, "o_groups is 128; it must be 1 to 64"),
        ({"hc_mult": 17}, InvalidFileError, r"config.json: hc_mult is 17; it must be 1 to 16"),
        ({"hc_sinkhorn_iters": 1000}, InvalidFileError, "hc_sinkhorn_iters is 1000; it must be 1 to 100"),
        ({"hc_eps": 0.0}, InvalidFileError, "hc_eps is 0.0"),
        ({"index_head_dim": 32}, InvalidFileError, "index keys of 32 elements are smaller than the 64 that rotate"),
        ({"index_n_heads": 1025}, InvalidFileError, "index_n_heads is 1025; it must be 1 to 1024"),
        ({"num_experts_per_tok": 300}, InvalidFileError, "300 experts of 256"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(**changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = ROWS["DeepSeek-V4"]
    return write_tiny(tmp_path_factory.mktemp("model"), row.model_type, **row.config)


def test_a_table_with_wrong_experts_is_refused(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (name, *_) = [name for name in weights if name.endswith("tid2eid")]
    for wrong in (8, -1, weights[name][5, 1].item()):
        changed = weights[name].clone()
        changed[5, 0] = wrong
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        save_file(weights | {name: changed}, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match="does not name 3 distinct experts"):
            load(tmp_path)


def test_weights_as_they_are_published(folder: Path, tmp_path: Path) -> None:
    """FP8 in blocks with scales of powers of two, experts in packed FP4, a table of int64 and other matrices as floats:
    the logits of what transformers decodes them to."""
    decode, generator = Fp8Dequantize(None)._dequantize_one, torch.Generator().manual_seed(0)
    stored, plain = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, weight in load_file(folder / "model.safetensors").items():
        for old, new in PUBLISHED:
            name = name.replace(old, new)
        quantised, block = weight, (1, 1)
        if ".experts." in name:
            rows, columns = weight.shape
            quantised = torch.randint(-128, 128, (rows, columns // 2), generator=generator, dtype=torch.int8)
            block = (1, 32)
        elif re.search(r"(wq_[ab]|wo_a|wkv|shared_experts\.w\d)\.weight", name) and "compressor" not in name:
            quantised, block = (weight * 64).to(torch.float8_e4m3fn), (32, 32)
        plain[name] = stored[name] = quantised
        if quantised is not weight:
            shape = [-(-size // each) for size, each in zip(weight.shape, block, strict=True)]
            scales = torch.randint(119, 123, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)
            stored[name.replace(".weight", ".scale")] = scales
            plain[name] = decoded(decode, quantised, scales, block)
    stored["mtp.0.norm.weight"] = torch.ones(8)  # a layer that is not loaded
    method = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    for to, tensors, more in (("published", stored, {"quantization_config": method}), ("plain", plain, {})):
        (tmp_path / to).mkdir()
        (tmp_path / to / "config.json").write_text(json.dumps(config_of(folder) | more | {"expert_dtype": "fp4"}))
        (tmp_path / to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        save_file(tensors, tmp_path / to / "model.safetensors")
    tokens = some_tokens()
    wanted = eager_logits(tmp_path / "plain", tokens, [LENGTH])
    assert spread(eager_logits(tmp_path / "published", tokens, [LENGTH]), wanted) < 1e-5
    assert typical_spread(recorded_logits(tmp_path / "published", tokens, [LENGTH]), wanted) < 0.05


def decoded(decode: Any, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """transformers' decoding, of a matrix that whole blocks cover."""
    rows, columns = codes.shape
    padded = torch.zeros(scales.shape[0] * block[0], columns, dtype=torch.float32).to(codes.dtype)
    padded[:rows] = codes
    return decode(padded, scales, torch.float32)[:rows]


def test_a_step_leaves_no_tensor_beside_the_weights(folder: Path) -> None:
    """An engine that sleeps moves every tensor of its layers, and level 2 replaces them one by one."""
    mlp: Any = load(folder, op_by_op=True).decoder
    mlp = mlp.layers[0].mlp
    before = len(tensors_in(mlp))
    mlp.by_token(torch.zeros(3, 64), torch.arange(3))
    assert len(tensors_in(mlp)) == before


def test_blocks_hold_an_entry(folder: Path) -> None:
    with pytest.raises(ConfigError, match="blocks of 16 tokens or more"):
        load(folder, block_size=8)


def test_no_cache_chunk_preemption_or_draft_changes_an_answer(folder: Path, tmp_path: Path) -> None:
    """Prompts that share blocks, chunks that cut groups, too few blocks, blocks from a file, ranks; also in torch."""
    shared = [some_tokens(64), [*some_tokens(48), 7, 8, 9], some_tokens(64), some_tokens(70)[3:]]
    apart = [some_tokens(20 + n)[n:] for n in range(8)]

    def answers(given: list[list[int]], **settings: Any) -> tuple[list[Any], Any]:
        params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, logprobs=2)
        config = EngineConfig(model=str(folder), block_size=16, max_model_len=128, threads=2, **settings)
        with InferenceEngine(config) as engine:
            made = engine.generate(given, params, use_tqdm=False)
            return [(each.outputs[0].token_ids, each.outputs[0].logprobs) for each in made], engine.stats()

    alone = [answers([prompt], enable_prefix_caching=False)[0][0] for prompt in (*shared, *apart)]
    in_torch, _ = answers([*shared, *apart], op_by_op=True, max_num_batched_tokens=20, max_num_seqs=8)
    assert [tokens for tokens, _ in in_torch] == [tokens for tokens, _ in alone]
    ranks: dict[str, Any] = {"device": "cpu", "tensor_parallel_size": 2}
    for kept in (ranks, {}, {"prompt_cache_path": tmp_path / "blocks"}, {"prompt_cache_path": tmp_path / "blocks"}):
        found, stats = answers(shared, max_num_batched_tokens=20, max_num_seqs=4, **kept)
        assert found == alone[:4]
        assert stats.cached_prompt_tokens >= 96
    found, stats = answers(apart, max_num_batched_tokens=64, max_num_seqs=8, kv_cache_memory=500 << 10)
    assert found == alone[4:]
    assert stats.preemptions > 0
