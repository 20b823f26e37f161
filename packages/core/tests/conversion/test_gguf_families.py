# SPDX-License-Identifier: MIT
"""What families say and store in their own way, beside the tests' own converter (`tests/models/gguf_export.py`)."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, UnsupportedModelError, WeightsError
from candle_vllm.core.conversion import write_gguf
from packages.core.tests.conversion.test_write_gguf import CHANGES
from packages.core.tests.models.families import DEEPSEEK_YARN, LLAMA3, RENAMED, ROWS, cases
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.test_renamed import write_renamed
from packages.core.tests.models.tiny import eager_logits, error, load, some_tokens, write_tiny

TOKENS = some_tokens(40)
LEFT_OUT = ("Yi", "QwQ", "Command R+", "EXAONE 4 windows")  # llamas and Qwens; what llama.cpp does not run
COMPARED = [name for name, row in ROWS.items() if row.gguf is not None and name not in LEFT_OUT]
ELSEWHERE = ("tokenizer.", "general.", "GGUF.")  # the two files have other words, and names
NEXT_TOKENS = ("block_count", "nextn_predict_layers")  # the other converter keeps a layer that is not run


def made(name: str, folder: Path, **changes: Any) -> Path:
    width = {"hidden_size": 128} if name == "GLM-4 chat" else {}  # as wide as its heads
    return write_tiny(folder, ROWS[name].model_type, **(dict(ROWS[name].config) | width | changes))


def written(folder: Path, words: Path, **settings: Any) -> Path:
    out = folder.with_suffix(".gguf")
    write_gguf(EngineConfig(model=str(folder), tokenizer=words, **settings), out, overwrite=True)
    return out


def keys(path: Path) -> dict[str, Any]:
    """The model's own, without the architecture's prefix."""
    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    return {name.partition(".")[2]: value for name, value in fields.items() if not name.startswith(ELSEWHERE)}


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}


@pytest.mark.one_of_each(7)
@pytest.mark.parametrize("name", cases(COMPARED))
def test_keys_and_tensors_are_those_of_another_converter(name: str, tmp_path: Path, words: Path) -> None:
    changes = CHANGES[name] if name == "Gemma-3n" else {}  # the only sizes that llama.cpp has
    folder, architecture = made(name, tmp_path / "m", **changes), ROWS[name].gguf
    assert architecture is not None
    ours = written(folder, words)
    theirs = export_gguf(folder, tmp_path / "theirs.gguf", architecture)
    found, expected = keys(ours), keys(theirs)
    assert GGUFReader(ours).fields["general.architecture"].contents() == architecture
    have, want = tensors(ours), tensors(theirs)
    sparse = any("ffn_gate_inp" in key for key in want)
    for key, value in expected.items():
        if (name, key) == ("Phi-3", "rope.scaling.original_context_length"):
            continue  # it means nothing, as nothing is scaled
        if isinstance(value, list) and "nextn_predict_layers" in expected:
            value = value[: found["block_count"]]
        if key not in NEXT_TOKENS and (sparse or not key.startswith("expert_")):
            alone = value == 1 and key.startswith(("expert_group", "expert_weights_scale"))  # one group is no group
            assert found.get(key, 1 if alone else None) == pytest.approx(value), key
    fused = {key for key in want if ".attn_qkv." in key}  # there in some layers, as in older files
    assert want.keys() - have.keys() <= fused | {key for key in want if ".nextn." in key}
    assert have.keys() - want.keys() <= {key.replace("qkv", part) for key in fused for part in "qkv"}
    for key in have.keys() & want.keys():
        assert [*filter(lambda n: n > 1, have[key].shape)] == [*filter(lambda n: n > 1, want[key].shape)], key
        np.testing.assert_allclose(have[key].reshape(want[key].shape), want[key], rtol=2e-6, err_msg=key)
    for key in fused - have.keys():
        parts = [have[key.replace("qkv", part)] for part in "qkv"]
        np.testing.assert_array_equal(np.concatenate(parts), want[key])


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_keys_that_llama_cpp_asks_for(tmp_path: Path, words: Path) -> None:
    """Found in its source: without them a file is refused."""
    latent = keys(written(made("DeepSeek-V3 dense", tmp_path / "latent"), words))
    sizes = {"attention.q_lora_rank": 0, "attention.kv_lora_rank": 32, "leading_dense_block_count": 2}
    experts = {"expert_feed_forward_length": 96, "expert_shared_count": 0}  # of none
    heads = {"attention.head_count_kv": 1, "attention.key_length_mla": 48, "attention.value_length_mla": 24}
    assert (
        latent.items() >= (sizes | experts | heads | {"attention.key_length": 48, "attention.value_length": 32}).items()
    )
    assert "expert_count" not in latent
    groups = made("GLM-4-MoE groups", tmp_path / "groups", topk_group=4)  # all groups are chosen: there are none
    assert not [key for key in keys(written(groups, words)) if "group" in key]
    plain = keys(written(made("gpt-oss", tmp_path / "oss", layer_types=["full_attention"] * 3), words))
    assert plain["attention.sliding_window"] == 0


def test_a_share_of_yarns_scale_for_scores(tmp_path: Path, words: Path) -> None:
    """DeepSeek's files have a tenth of the number, Mistral's the number."""
    deep = keys(written(made("DeepSeek-V3 halves", tmp_path / "v3", rope_parameters=DEEPSEEK_YARN), words))
    assert deep["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    mistral = keys(written(made("Ministral 3", tmp_path / "m3"), words))
    assert mistral["rope.scaling.yarn_log_multiplier"] == 1
    assert mistral["attention.temperature_scale"] == pytest.approx(0.3)
    assert "rope.scaling.attn_factor" not in deep | mistral
    only = DEEPSEEK_YARN | {"mscale": 0.0}
    with pytest.raises(UnsupportedModelError, match=r"cannot express this model's rope$"):
        written(made("DeepSeek-V3", tmp_path / "only", rope_parameters=only), words)


def test_growing_queries_are_not_lost(tmp_path: Path, words: Path) -> None:
    """Mistral's files, which are Llama's, have no key for them."""
    folder = made("Mistral", tmp_path / "m", rope_parameters=ROWS["Ministral 3"].config["rope_parameters"])
    assert load(folder).decoder.config.rope.query_scale == pytest.approx(0.3)
    with pytest.raises(UnsupportedModelError, match=r"cannot express this model's rope$"):
        written(folder, words)


def test_a_gemma_4_without_windows_is_refused(tmp_path: Path, words: Path) -> None:
    folder = made("Gemma-4", tmp_path / "m", layer_types=["full_attention"] * 3)
    with pytest.raises(UnsupportedModelError, match=r"gemma4 cannot express .*sliding_window is missing$"):
        written(folder, words)


# ---- what llama.cpp has no place for ---------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "biases": ("SmolLM3", {"attention_bias": True, "mlp_bias": True}, r"attn_output\.bias, .* ffn_down\.bias"),
    "Llama 3's scaling": ("SmolLM3", {"rope_parameters": LLAMA3}, r"rope_freqs\.weight"),
    "narrow": ("GLM-4 chat", {"hidden_size": 64}, "heads that together are not as wide as the hidden state"),
    "dense layers": ("Qwen3-MoE", {"decoder_sparse_step": 2}, "layers without experts"),
    "sparse steps": ("Qwen2-MoE sparse steps", {}, "layers without experts, norm_topk_prob true"),
    "scores": ("Qwen3-MoE", {"norm_topk_prob": False}, "norm_topk_prob false"),
    "biases of Seed-OSS": ("Seed-OSS biases", {}, r"attn_output\.bias, .*, ffn_down\.bias"),
    "biases of ERNIE": ("ERNIE 4.5 biases", {}, r"ffn_gate\.bias, .*, ffn_down\.bias"),
    "biases of Step": ("Step 3.5 biases", {}, r"attn_output\.bias"),
    "biases of Mamba 2": ("Nemotron-H biases", {}, r"ssm_in\.bias, ssm_out\.bias"),
    "biases of Mamba 2 alone": ("Mamba 2 biases", {}, r"ssm_in\.bias, ssm_out\.bias"),
    "biases of Mamba 1": ("Jamba dense", {}, r"ssm_in\.bias, ssm_out\.bias"),
    "tables": ("Qwen4", {"ple_layer_ids": [1, 2]}, "several layers with n-grams"),
    "gates": ("Qwen4", {"output_gate_type": "silu"}, "output_gate_type silu"),
    "convolutions": ("LFM2 biases", {}, r"shortconv\.in_proj\.bias, .* shortconv\.out_proj\.bias"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_no_place_for_is_named(case: str, tmp_path: Path, words: Path) -> None:
    name, changes, lacks = REFUSED[case]
    with pytest.raises(
        UnsupportedModelError, match=rf"config\.json: llama\.cpp's \w+ does not support {lacks}; .*`isq`"
    ):
        written(made(name, tmp_path / "m", **changes), words)


def test_numbers_that_llama_cpp_wants(tmp_path: Path, words: Path) -> None:
    folder = made("Gemma-2", tmp_path / "m", attn_logit_softcapping=None)
    with pytest.raises(UnsupportedModelError, match=r"gemma2 needs attn_logit_softcapping, which"):
        written(folder, words)
    with pytest.raises(UnsupportedModelError, match="llama4 has experts, and this model has none"):
        written(made("Llama-4 Guard", tmp_path / "guard"), words)
    with pytest.raises(UnsupportedModelError, match="gemma3n has four streams"):
        written(made("Gemma-3n", tmp_path / "streams", altup_num_inputs=3), words)
    fixed = "laurel_rank 64, hidden_size_per_layer_input 256, num_kv_shared_layers 0, activation_sparsity_pattern 0.95"
    with pytest.raises(UnsupportedModelError, match=f"gemma3n has {fixed} in the first 10 layers alone, and this"):
        written(made("Gemma-3n", tmp_path / "fixed"), words)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("EXAONE 4 windows", {}, "exaone4 has windows only in models of 64 layers$"),
        ("K-EXAONE full layers", {}, "exaone-moe has windows in some layers; this model has none$"),
        ("dots.llm1 windows", {}, "dots1 has as many heads of keys as of queries, and no windows$"),
        ("North softmax", {}, "cohere2moe scores experts by sigmoids, and this model by a softmax$"),
        ("Mamba biases", {}, "Mamba 1 has 2 channels per hidden element, and a convolution's bias$"),
        ("Command R+", {"attention_bias": False}, "command-r has norms of q and k only in models of 64 layers or more"),
        ("Command R", {"tie_word_embeddings": False}, "no head beside the embedding table$"),
        (
            "Ling 3.0 free decays",
            {},
            "bailingmoe3 has a lower bound of decays, as many heads in all layers",
        ),
        ("MiniMax-M3 first", {}, "minimax-m3 has an index and experts in the same layers"),
        ("MiniMax-M3 plain", {}, "of the size of one or several experts"),
        ("ERNIE 4.5 MoE", {"num_hidden_layers": 3, "moe_layer_interval": 2}, "has all dense layers in front"),
    ],
)
def test_wirings_that_llama_cpp_has_not(name: str, changes: Any, message: str, tmp_path: Path, words: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"llama\.cpp's .*{message}"):
        written(made(name, tmp_path / "m", **changes), words)


@pytest.mark.parametrize("kind", RENAMED)
def test_models_that_transformers_does_not_have(kind: str, tmp_path: Path, words: Path) -> None:
    _, folder = write_renamed(kind, tmp_path, attention_bias=False, mlp_bias=False)
    path = written(folder, words)
    assert error(eager_logits(path, TOKENS, [40]), eager_logits(folder, TOKENS, [40])) < 1e-6


def test_scores_that_lfm2moe_has_no_keys_for(tmp_path: Path, words: Path) -> None:
    folder = made("LFM2-MoE", tmp_path / "plain", use_expert_bias=False)
    with pytest.raises(
        UnsupportedModelError, match=r"lfm2moe wants a bias of experts' scores, and this model has none$"
    ):
        written(folder, words)
    for setting in ({"routed_scaling_factor": 1.7}, {"norm_topk_prob": False}):
        with pytest.raises(UnsupportedModelError, match=r"lfm2moe cannot express this model's mixture$"):
            written(made("LFM2-MoE", tmp_path / next(iter(setting)), **setting), words)


def test_numbers_beyond_their_type(tmp_path: Path, words: Path) -> None:
    folder = made("DeepSeek-V2", tmp_path / "m", routed_scaling_factor=1e300)
    with pytest.raises(
        UnsupportedModelError, match=r"deepseek2\.expert_weights_scale cannot store the number 1e\+300$"
    ):
        written(folder, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


# ---- tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableLM", "Phi-2", "gpt-oss", "Qwen2-MoE"])
def test_a_head_that_is_the_embedding_table_is_written_twice(name: str, tmp_path: Path, words: Path) -> None:
    folder = made(name, tmp_path / "tied", tie_word_embeddings=True)
    out = written(folder, words)
    np.testing.assert_array_equal(tensors(out)["output.weight"], tensors(out)["token_embd.weight"])
    assert error(eager_logits(out, TOKENS, [40]), eager_logits(folder, TOKENS, [40])) < 1e-6


def test_rotary_divisors_beside_rows_in_pairs(tmp_path: Path, words: Path) -> None:
    folder = made("Mixtral", tmp_path / "stretched", rope_parameters=LLAMA3)
    out = written(folder, words, isq="q8_0")
    assert "rope_freqs.weight" in tensors(out)
    assert error(eager_logits(out, TOKENS, [40]), eager_logits(folder, TOKENS, [40], isq="q8_0")) < 1e-5


def test_norms_of_heads_and_latent_matrices_stay_plain(tmp_path: Path, words: Path) -> None:
    """Heads of 64 and latent vectors of 32 would fit blocks."""
    stable = written(made("StableLM-2-12B", tmp_path / "stable", hidden_size=256), words, isq="q8_0")
    deep = written(made("DeepSeek-V3", tmp_path / "deep"), words, isq="q8_0")
    for path, plain in ((stable, ["attn_q_norm", "attn_k_norm"]), (deep, ["attn_k_b", "attn_v_b", "ffn_gate_inp"])):
        kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
        assert {kinds[f"blk.1.{part}.weight"] for part in plain} == {"F32"}
        assert kinds["blk.0.ffn_up.weight"] == kinds["blk.1.attn_output.weight"] == "Q8_0"
    halved = written(made("DeepSeek-V3", tmp_path / "bf16"), words, dtype="bf16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(halved).tensors}
    assert kinds["blk.0.attn_k_b.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "BF16"


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, words: Path) -> None:
    folder = made("DeepSeek-V3", tmp_path / "m")
    before, stored = eager_logits(folder, TOKENS, [40]), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored | {"model.layers.2.eh_proj.weight": torch.ones(2, 4)}, folder / "model.safetensors")
    out = written(folder, words)
    assert keys(out)["block_count"] == 2
    assert not [name for name in tensors(out) if name.startswith("blk.2.")]
    assert error(eager_logits(out, TOKENS, [40]), before) < 1e-6


# ---- importance ---


def dat(entries: dict[str, np.ndarray]) -> bytes:
    """llama.cpp's older format."""
    parts = [struct.pack("<i", len(entries))]
    for name, sums in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", 1, sums.size)]
        parts.append(sums.astype("<f4").tobytes())
    return b"".join(parts)


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["Qwen3-MoE"])
def test_an_importance_matrix_means_the_same_at_load_and_in_a_file(name: str, tmp_path: Path, words: Path) -> None:
    """Of every matrix, those of experts with a row for each: the file's blocks are those that a load makes."""
    folder = made(name, tmp_path / "model", hidden_size=256, moe_intermediate_size=256)
    plain, random = tensors(written(folder, words)), np.random.default_rng(0)
    entries = {
        name: np.exp(2 * random.standard_normal((len(data) if data.ndim == 3 else 1, data.shape[-1])))
        for name, data in plain.items()
        if data.ndim > 1 and not name.startswith("token_embd")
    }
    matrix = tmp_path / "imatrix.dat"
    matrix.write_bytes(dat(entries))
    settings = {"isq": "iq4_xs", "imatrix": matrix}
    other = tensors(written(folder, words, isq="iq4_xs"))
    out = written(folder, words, **settings)
    for name, data in tensors(out).items():
        if name in entries and data.dtype == np.uint8:
            assert not np.array_equal(data, other[name])
            kind = next(tensor.tensor_type for tensor in GGUFReader(out).tensors if tensor.name == name)
            errors = [
                float((entries[name][..., None, :] * (quants.dequantize(found, kind) - plain[name]) ** 2).sum())
                for found in (data, other[name])
            ]
            assert errors[0] < errors[1]
    logits = eager_logits(folder, TOKENS, [40], **settings)
    assert error(eager_logits(out, TOKENS, [40]), logits) < 1e-5
    assert error(eager_logits(folder, TOKENS, [40], isq="iq4_xs"), logits) > 1e-3
    matrix.write_bytes(dat({"blk.7.ffn_down.weight": np.ones((1, 256))}))
    for run in (lambda: written(folder, words, **settings), lambda: eager_logits(folder, TOKENS, [40], **settings)):
        with pytest.raises(WeightsError, match="has no entry for a matrix of a type that uses it"):
            run()


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A gpt-oss as it is published: its experts in MXFP4, of every exponent that a number of theirs can have."""
    folder = made("gpt-oss", tmp_path / "published")
    generator, stored = torch.Generator().manual_seed(1), load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_in_mxfp4_stay_in_it(published: Path, words: Path) -> None:
    out = written(published, words)
    assert error(eager_logits(out, TOKENS, [40]), eager_logits(published, TOKENS, [40])) < 1e-6
    found = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    stored, name = load_file(published / "model.safetensors"), "model.layers.1.mlp.experts.gate_up_proj"
    blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()  # the low half of a byte comes first
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])[codes]
    numbers = (numbers * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).numpy()
    for part, first in (("gate", 0), ("up", 1)):
        tensor = found[f"blk.1.ffn_{part}_exps.weight"]
        assert tensor.tensor_type.name == "MXFP4"
        np.testing.assert_array_equal(quants.dequantize(tensor.data, tensor.tensor_type), numbers[:, first::2])
    again = {
        tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written(published, words, isq="q8_0")).tensors
    }
    assert again["blk.0.ffn_down_exps.weight"] == "MXFP4"
    assert again["blk.0.attn_q.weight"] == "Q8_0"


def test_extreme_scales_of_mxfp4(published: Path, tmp_path: Path, words: Path) -> None:
    """The smallest is beyond float32's normal numbers; the largest byte is none."""
    stored, name = load_file(published / "model.safetensors"), "model.layers.0.mlp.experts.down_proj_scales"
    stored[name][0, 0], stored[name][0, 1] = 0, 254
    save_file(stored, published / "model.safetensors")
    data = tensors(written(published, words))["blk.0.ffn_down_exps.weight"]
    assert data[0, :2, 0].tolist() == [0, 254]
    stored[name][0, 0] = 255
    broken = shutil.copytree(published, tmp_path / "broken")
    save_file(stored, broken / "model.safetensors")
    with pytest.raises(WeightsError, match=r"experts\.down_proj has a scale that is not a number"):
        written(broken, words)
