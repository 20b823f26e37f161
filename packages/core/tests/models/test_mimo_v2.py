# SPDX-License-Identifier: MIT
"""MiMo V2.5 and V2.6 as published: q, k and v in one FP8 matrix of several parts, experts in FP8 or MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.testing.toy_model import write_toy_tokenizer
from packages.core.tests.models.families import MIMO
from packages.core.tests.models.test_renamed import mimo
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    recorded_logits,
    settled,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)
from packages.core.tests.quantization.format_writers import fp8, mxfp4
from tests.common_run import few

TOKENS, BLOCK, TALL = some_tokens(), (32, 32), (40, 32)
PARTS = 2  # as layers without a window have key-value heads; layers with one have twice as many
SIZES = (MIMO["head_dim"], MIMO["head_dim"], MIMO["v_head_dim"])


def fused(parts: list[torch.Tensor], block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The matrix in FP8, its scales, and q, k and v as they are meant."""
    pieces = [torch.cat(each) for each in zip(*(part.chunk(PARTS) for part in parts), strict=True)]
    made = [fp8(piece, block=block) for piece in pieces]
    heights = [len(part) // PARTS for part in parts]
    meant = zip(*(each.weight.split(heights) for each in made), strict=True)
    weight, scales = (torch.cat([each.parts[key] for each in made]) for key in (".weight", ".weight_scale_inv"))
    return weight, scales, [torch.cat(each) for each in meant]


def write(
    folder: Path, experts: str = "fp8", layout: str = "fused", block: tuple[int, int] = BLOCK
) -> tuple[Path, Path]:
    """Folders of transformers' model, of the numbers that FP8 means, and of the published form."""
    own: dict[str, Any] = {
        "num_key_value_heads": PARTS,
        "num_attention_heads": 8,
        "hidden_size": 64,
        "intermediate_size": 96,
    }
    plain = write_tiny(folder / "plain", "mimo_v2_flash", **dict[str, Any](MIMO | own))
    meant = load_file(plain / "model.safetensors")
    config, made = mimo(config_of(plain), dict(meant))
    for name in [name for name in made if name.endswith("_proj.weight") and name in meant]:
        if ".self_attn." in name:
            continue
        written = mxfp4(made[name]) if experts == "mxfp4" and ".experts." in name else fp8(made[name], block=block)
        meant[name] = written.weight
        del made[name]
        for end, tensor in written.parts.items():
            made[name.removesuffix(".weight") + end.replace("_packed", "")] = tensor
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn."
        names = [f"{at}{part}_proj.weight" for part in "qkv"]
        weight, scales, parts = fused([made.pop(name) for name in names], block)
        if layout == "fused":
            made |= {f"{at}qkv_proj.weight": weight, f"{at}qkv_proj.weight_scale_inv": scales}
        else:  # blocks begin anew in each head of keys
            heads = [fp8(head, block=block) for head in meant[names[1]].split(SIZES[1])]
            parts[1] = torch.cat([each.weight for each in heads])
            made |= {names[0]: parts[0], names[2]: parts[2]}
            for key in (".weight", ".weight_scale_inv"):
                made[f"{at}k_proj{key}"] = torch.cat([each.parts[key] for each in heads])
        meant |= dict(zip(names, parts, strict=True))
    save_file({name: each.contiguous() for name, each in meant.items()}, plain / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block,
    } | ({"store_dtype": "mxfp4", "mxfp4_block_size": 32} if experts == "mxfp4" else {})  # fmt: skip
    config["attention_projection_layout"] = "fused_qkv" if layout == "fused" else "split"
    published = folder / "published"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(config))
    save_file({name: each.contiguous() for name, each in made.items()}, published / "model.safetensors")
    write_toy_tokenizer(published)
    return plain, published


@pytest.mark.parametrize(
    ("experts", "layout", "block"),
    few(
        [("fp8", "fused", BLOCK), ("mxfp4", "fused", BLOCK), ("fp8", "split", BLOCK), ("fp8", "fused", TALL)],
        ("mxfp4", "fused", BLOCK),
        ("fp8", "fused", TALL),
    ),
)
def test_published_matrices_are_those_of_transformers(
    experts: str, layout: str, block: tuple[int, int], tmp_path: Path
) -> None:
    plain, published = write(tmp_path, experts, layout, block)
    scales = load_file(published / "model.safetensors")
    name = "qkv_proj" if layout == "fused" else "k_proj"
    weight, scale = (scales[f"model.layers.0.self_attn.{name}.{end}"] for end in ("weight", "weight_scale_inv"))
    wanted = -(-len(weight) // block[0])  # of one grid of blocks, in whose shape those of tall blocks are
    assert len(scale) == wanted if block == TALL else len(scale) > wanted
    theirs = their_logits(plain, TOKENS)
    for chunks in cuts():
        assert error(eager_logits(published, TOKENS, chunks), theirs) < 1e-5
    assert spread(*settled(recorded_logits(published, TOKENS, [len(TOKENS)]), theirs, 0.1)) < 1e-2


def test_matrices_of_other_forms_are_refused(tmp_path: Path) -> None:
    _, published = write(tmp_path)
    stored, at = load_file(published / "model.safetensors"), "model.layers.0.self_attn.qkv_proj.weight"
    for changed, said in (
        ({at: stored[at].float(), f"{at}_scale_inv": None}, "is F32; qkv_proj is implemented for FP8 alone"),
        ({f"{at}_scale_inv": torch.ones(13, 2)}, r"has shape \[13, 2\]"),
        ({f"{at}_scale_inv": torch.ones(20, 2)}, "scales of tensor .*qkv_proj.weight are not those of 2 equal parts"),
        ({at: stored[at][:320], f"{at}_scale_inv": torch.ones(10, 2)}, "2 parts of"),
    ):
        made = {name: each for name, each in (stored | changed).items() if each is not None}
        save_file(made, published / "model.safetensors")
        with pytest.raises(CandleVllmError, match=said):
            eager_logits(published, TOKENS, [len(TOKENS)])


CONFIG: dict[str, Any] = {
    "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2", "vocab_size": 152576, "hidden_size": 6144,
    "num_hidden_layers": 2, "max_position_embeddings": 1048576, "num_attention_heads": 128, "num_key_value_heads": 8,
    "head_dim": 192, "v_head_dim": 128, "swa_num_attention_heads": 128, "swa_num_key_value_heads": 8,
    "swa_head_dim": 192, "swa_v_head_dim": 128, "partial_rotary_factor": 0.334, "rope_theta": 10000000,
    "swa_rope_theta": 10000, "sliding_window": 128, "sliding_window_size": 128, "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1], "add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False,
    "intermediate_size": 16384, "n_routed_experts": 384, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "routed_scaling_factor": None, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1,
    "norm_topk_prob": True, "layernorm_epsilon": 1e-5, "attention_value_scale": 0.612,
    "attention_projection_layout": "fused_qkv", "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
"""Like V2.6 Pro's, but with two layers."""


def test_a_published_config_is_read() -> None:
    config: Any = family_from_hf(CONFIG, Path("config.json"))[1]
    rope = {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.334}
    assert config == family_from_hf(CONFIG | {"rope_parameters": rope}, Path("config.json"))[1]
    assert (config.groups, config.value_dim, config.value_scale, config.sliding_windows) == (
        (16, 16), 128, 0.612, (None, 129),
    )  # fmt: skip
    assert (config.rope.theta, config.local_rope.theta, config.rope.dim) == (1e7, 1e4, 64)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swa_head_dim": 128}, "swa_head_dim is 128; implemented: head_dim, 192"),
        ({"swa_num_attention_heads": 64}, "swa_num_attention_heads is 64"),
        ({"swa_v_head_dim": 192}, "swa_v_head_dim is 192"),
        ({"add_swa_attention_sink_bias": False}, "without sinks"),
        ({"add_full_attention_sink_bias": True}, "sinks in layers without a window"),
        ({"attention_projection_layout": "other"}, "attention_projection_layout is 'other'"),
        ({"swa_num_key_value_heads": 4}, "key-value heads need attention_projection_layout 'split'"),
        ({"n_shared_experts": 1}, "n_shared_experts is set"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7}}, "rope_parameters is one for all layers"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters is one for all layers"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "type is 'yarn'"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CandleVllmError, match=said):
        family_from_hf(CONFIG | changes, Path("config.json"))
