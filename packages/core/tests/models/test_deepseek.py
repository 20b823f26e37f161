# SPDX-License-Identifier: MIT
"""DeepSeek's own: older GGUF files, what is ignored, what is refused by name, the cache, and the engine over it."""

from __future__ import annotations

import json
import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, InferenceEngine, InvalidFileError, SamplingParams, UnsupportedModelError
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.errors import WeightsError
from candle_vllm.core.kernels.offloading import tensors_of
from candle_vllm.core.loading.rope import RopeConfig, attention_scale
from candle_vllm.core.memory import Room, plan_cache
from packages.core.tests.models import family_formats, gguf_export
from packages.core.tests.models.families import DEEPSEEK, DEEPSEEK_YARN
from packages.core.tests.models.tiny import (
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    typical_spread,
    write_tiny,
)

DENSE = DEEPSEEK | {
    "first_k_dense_replace": 2,
    "q_lora_rank": 64,
    "rope_parameters": DEEPSEEK_YARN,
}
TOKENS = some_tokens(40)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dense"), "deepseek_v3", **DENSE)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("sparse"), "deepseek_v3", **DEEPSEEK)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_both_forms_of_gguf(
    split: bool,
    quantization: str,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(gguf_export.CONVERTERS, "deepseek2", partial(gguf_export.deepseek2, split=split))
    path = gguf_export.export_gguf(dense, tmp_path / "m.gguf", "deepseek2", quantization=quantization)
    plain, exact = eager_logits(dense, TOKENS, [40]), quantization == "F32"
    assert error(eager_logits(path, TOKENS, [40]), plain) < (1e-5 if exact else 0.05)
    caplog.set_level(logging.INFO)
    whole, cut = recorded_logits(path, TOKENS, [40]), recorded_logits(path, TOKENS, [7, 20, 12, 1])
    assert torch.equal(whole, cut)
    assert spread(whole, plain) < (1e-2 if exact else 0.05)
    decoded = [each for each in caplog.messages if "per-head matrices have no kernel for quantised weights" in each]
    assert len(decoded) == (0 if exact else 2), decoded  # at two loads
    assert exact or ("blk.0.attn_k_b" if split else "blk.0.attn_kv_b") in decoded[0]


def test_matrices_of_older_files_beside_newer_ones_are_ignored(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def both(writer: Any, config: Any, tensors: gguf_export.Tensors) -> gguf_export.Tensors:
        kept = {name: data for name, data in tensors.items() if "kv_b_proj" in name}
        return kept | gguf_export.deepseek2(writer, config, tensors)

    monkeypatch.setitem(gguf_export.CONVERTERS, "deepseek2", both)
    path = gguf_export.export_gguf(dense, tmp_path / "m.gguf", "deepseek2")
    assert error(eager_logits(path, TOKENS, [40]), eager_logits(dense, TOKENS, [40])) < 1e-5


# ---- safetensors -----------------------------------------------------------------------------------------------------


def test_layers_that_predict_further_tokens_are_ignored(sparse: Path, tmp_path: Path) -> None:
    config = json.loads((sparse / "config.json").read_text())
    weights = load_file(sparse / "model.safetensors")
    weights |= {"model.layers.2.eh_proj.weight": torch.ones(2, 2), "model.layers.2.embed_tokens.weight": torch.ones(1)}
    folder = copy(sparse, tmp_path, config | {"num_nextn_predict_layers": 1}, weights)
    assert torch.equal(eager_logits(folder, TOKENS, [40]), eager_logits(sparse, TOKENS, [40]))
    with pytest.raises(WeightsError, match=r"unexpected tensors \(2\): model\.layers\.2\.eh_proj"):
        load(copy(sparse, tmp_path, config | {"num_nextn_predict_layers": 0}, weights))


def copy(source: Path, folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    return folder


def test_a_config_as_published(tmp_path: Path) -> None:
    """Keys of the models' own code: `rope_scaling`, no size of a head, and settings that say what is implemented."""
    made: dict[str, Any] = DEEPSEEK | {"rope_parameters": DEEPSEEK_YARN}
    source = write_tiny(tmp_path / "source", "deepseek_v3", **made)
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "rope_interleave", "qk_head_dim", "num_nextn_predict_layers"):
        config.pop(key, None)
    scaling = {("type" if key == "rope_type" else key): value for key, value in DEEPSEEK_YARN.items()}
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}
    (tmp_path / "published").mkdir()
    published = copy(source, tmp_path / "published", config, load_file(source / "model.safetensors"))
    assert torch.equal(eager_logits(published, TOKENS, [40]), eager_logits(source, TOKENS, [40]))


def test_plain_16_bit_weights_run_compiled(dense: Path, tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in load_file(dense / "model.safetensors").items()}
    folder = copy(dense, tmp_path, json.loads((dense / "config.json").read_text()), weights)
    assert spread(recorded_logits(folder, TOKENS, [40]), eager_logits(folder, TOKENS, [40])) < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; implemented: noaux_tc"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; implemented: sigmoid"),
        ({"moe_layer_freq": 2}, "moe_layer_freq other than 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is not implemented"),
        ({"attention_bias": True, "q_lora_rank": None}, "attention_bias without q_lora_rank"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    change: dict[str, Any], message: str, sparse: Path, tmp_path: Path
) -> None:
    folder = copy(sparse, tmp_path, json.loads((sparse / "config.json").read_text()) | change, {})
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"qk_rope_head_dim": 15}, "15 rotary dimensions"),
        ({"qk_nope_head_dim": 0}, "qk_nope_head_dim is 0"),
        ({"v_head_dim": "24"}, "v_head_dim is '24'"),
        ({"n_group": 3}, "cannot choose 2 of 3 groups of 8 experts"),
        ({"num_experts_per_tok": 5}, "cannot choose 5 experts of 4"),
        ({"n_routed_experts": 10**6}, "the model has 1000000 experts"),
        ({"num_nextn_predict_layers": 10**9}, "1000000000 multi-token"),
        ({"num_nextn_predict_layers": -1}, "-1 multi-token"),
        ({"kv_lora_rank": 1 << 20}, "latent vectors of 1048576"),
        ({"v_head_dim": 1 << 20}, "value heads of 1048576 are not possible: each has at most 65536"),
        ({"rope_parameters": DEEPSEEK_YARN | {"mscale": -1.0}}, "rotary mscale is -1"),
        ({"n_shared_experts": -1}, "must not be negative"),
    ],
)
def test_a_wrong_config_names_file_and_key(change: dict[str, Any], message: str, sparse: Path, tmp_path: Path) -> None:
    folder = copy(sparse, tmp_path, json.loads((sparse / "config.json").read_text()) | change, {})
    with pytest.raises(InvalidFileError, match=message) as caught:
        load(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_a_wrong_shape_is_named(dense: Path, tmp_path: Path) -> None:
    weights = load_file(dense / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    with pytest.raises(WeightsError, match=rf"tensor {name} has shape \[223, 32\]"):
        load(copy(dense, tmp_path, json.loads((dense / "config.json").read_text()), weights))


def test_both_yarn_numbers_are_needed_to_leave_cos_and_sin_alone() -> None:
    yarn = {"kind": "yarn", "factor": 40.0}
    assert attention_scale(RopeConfig(**yarn, mscale=0.7, mscale_all_dim=0.7)) == 1.0
    assert attention_scale(RopeConfig(**yarn, mscale=1.0)) == attention_scale(RopeConfig(**yarn)) > 1.3
    assert attention_scale(RopeConfig(**yarn, mscale=1.0, mscale_all_dim=0.5)) > 1.1
    assert attention_scale(RopeConfig(**yarn, mscale=0.7, mscale_all_dim=0.7, attention_factor=2.0)) == 2.0


# ---- the cache, and the engine ---------------------------------------------------------------------------------------


def test_a_token_takes_one_latent_row_in_each_layer(dense: Path) -> None:
    loaded = load(dense, op_by_op=True)
    settings = EngineConfig(model=str(dense), block_size=16)
    plan = plan_cache(settings, loaded.config, lambda _: 2, 4, Room(1 << 30, 0.5))
    assert plan.block_bytes == 16 * 2 * (32 + 16) * 2
    assert "one token takes 2 layers x 1 head x 48 x 2 B = 192 B" in plan.message
    runner = EagerRunner(loaded.decoder, 3, 16, torch.device("cpu"), torch.bfloat16)
    assert sum(part.nbytes for part in tensors_of(runner.caches)) == 3 * plan.block_bytes


def test_prefix_caching_and_preemption_change_nothing(dense: Path) -> None:
    prompts = [[(7 * i) % 256 for i in range(3 + 11 * n)] for n in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=36, ignore_eos=True, logprobs=1)

    def run(**settings: Any) -> tuple[list[Any], int]:
        with InferenceEngine(str(dense), **({"threads": 2, "block_size": 16} | settings)) as engine:
            assert engine.model_info.dtype == "f32"
            found = []
            for _ in range(2):  # the second time with a warm cache
                outputs = engine.generate(prompts, params, use_tqdm=False)
                found += [
                    [(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()]
                    for output in outputs
                ]
            assert found[:6] == found[6:]
            return found, engine.stats().preemptions

    alone, _ = run(enable_prefix_caching=False, max_num_seqs=1)
    small, preemptions = run(kv_cache_memory=192 * 16 * 7, max_model_len=96, max_num_batched_tokens=48, max_num_seqs=6)
    assert small == alone
    assert preemptions > 0


def test_sizes_without_a_kernel_run_op_by_op(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_tiny(tmp_path, "deepseek_v3", **DENSE | {"kv_lora_rank": 40, "qk_nope_head_dim": 20})
    assert not load(folder, block_size=16).placement.recorded
    assert "latent attention of" in caplog.text


def test_eight_bit_blocks_as_published(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of V3 have all matrices but tables and routers in FP8, those of keys and values among them."""
    monkeypatch.setattr(family_formats, "_KEPT_PLAIN", re.compile(r"embed|lm_head|\.gate\.weight|norm"))
    stored, plain = family_formats.write_format(sparse, "FP8", tmp_path)
    assert "model.layers.0.self_attn.kv_b_proj.weight_scale_inv" in load_file(stored / "model.safetensors")
    wanted = eager_logits(plain, TOKENS, [40])
    assert error(eager_logits(stored, TOKENS, [40]), wanted) < 1e-5
    assert typical_spread(recorded_logits(stored, TOKENS, [40]), wanted) < 2e-2
