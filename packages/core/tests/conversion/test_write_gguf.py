# SPDX-License-Identifier: MIT
"""Models written as GGUF files: what is read back is the model, to the bit where the type of the numbers allows it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, Keys
from safetensors.torch import load_file, save_file

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.conversion import WrittenFile, write_gguf
from candle_vllm.core.conversion.gguf_metadata import architecture
from candle_vllm.core.models import llama, registry
from candle_vllm.core.models.registry import GGUF_FAMILIES, HF_FAMILIES
from candle_vllm.core.quantization import ggml_types
from candle_vllm.core.quantization.ggml import dequantize
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.models.families import ROWS, first_rows
from packages.core.tests.models.tiny import eager_logits, error, load, recorded_logits, some_tokens, write_tiny
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.common_run import few

TOKENS = some_tokens(40)
UNSAYABLE = {  # what there is no key for
    "OLMo biases": "qkv_bias, output_bias",
    "OLMo 2 biases": "qkv_bias, output_bias",
    "Gemma-4 biases": "attention_bias",
    "Gemma-2 scale": "query_scale",
    "Llama-4 chunks": "sliding_windows, qkv_bias, output_bias, unrotated_layers, same_length, temperature",
    "Ministral": "sliding_windows",
    "DeepSeek-V3 halves": "rope",
    "GPT-2 scales": "activation, scales",
    "Falcon-1B": "parallel, qkv_bias, output_bias, mlp_bias",
    "Falcon-RW": "slopes, parallel, qkv_bias, output_bias, mlp_bias",
    "Arcee biases": "output_bias, mlp_bias",
    "AFMoE biases": "qkv_bias, output_bias, unrotated_layers, embedding_scale",
    "Granite SWA bases": "local_rope",
    "Muse Glimmer bases": "unrotated_layers",
    "Phi-3.5-MoE long": "mixture",
    "MiMo V2 biases": "mixture",
    "EXAONE 4 full layers": "unrotated_layers",
    "Command R7B full layers": r"\S+sliding_window is missing",
    "SmolLM3 windows": "sliding_windows, unrotated_layers",
    "Falcon-H1 gates": "mamba",
    "Falcon Mamba epsilon": "mamba",
}
LLAMA_CPP = (
    "Llama-4 Guard",
    "Gemma-3n own keys",
    "Qwen2-MoE sparse steps",
    "Qwen3-MoE window",
    "Qwen3-Next sparse steps",
    "LFM2 biases",
    "LFM2-MoE plain",
    "Command R+",
    "DeepSeek-OCR 2 groups",
    "EXAONE 4 windows",
    "K-EXAONE full layers",
    "dots.llm1 windows",
    "North softmax",
    "ERNIE 4.5 biases",
    "Seed-OSS biases",
    "Step 3.5 biases",
    "Mamba 2 biases",
    "Mamba biases",
    "Jamba dense",
    "GLM-5.3-Flash pools",
    "Ling 3.0 free decays",
    "Qwen4 plain",
    "MiniMax-M3 first",
    "MiniMax-M3 plain",
)  # refused for its sake: see `test_gguf_families.py`
UNKNOWN = (  # to llama.cpp, and DeepSeek V4, whose GGUF files are not read
    *("Inkling", "Inkling full layers"),
    *("OLMo Hybrid", "OLMo Hybrid turned", "GPT-Neo", "GPT-J", "OPT", "OPT-350m"),
    *("DeepSeek-V4", "DeepSeek-V4 other sizes", "A.X K2", "A.X K2 groups"),
)
WRITTEN = [name for name in ROWS if name not in UNSAYABLE and name not in (*LLAMA_CPP, *UNKNOWN)]
CHANGES = {  # as llama.cpp wants it
    "GLM-4 chat": {"hidden_size": 128},
    "Gemma-2 scale": {"attn_logit_softcapping": 50.0},
    "Nemotron-H biases": {"use_bias": False},
    "Gemma-3n": {
        "num_hidden_layers": 21,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"] * 7,
        "num_kv_shared_layers": 1,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 11,
    },
}


def write(folder: Path, out: Path, words: Path, *, overwrite: bool = False, **settings: Any) -> WrittenFile:
    return write_gguf(EngineConfig(model=str(folder), tokenizer=words, **settings), out, overwrite=overwrite)


def logits(source: Path, **settings: Any) -> torch.Tensor:
    return eager_logits(source, TOKENS, [len(TOKENS)], **settings)


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize(
    "name", few(WRITTEN, *(name for name in first_rows() if name in WRITTEN and ROWS[name].common))
)
def test_a_family_comes_back_as_it_was(name: str, tmp_path: Path, words: Path) -> None:
    row = ROWS[name]
    folder = write_tiny(tmp_path / "model", row.model_type, **(dict(row.config) | CHANGES.get(name, {})))
    plain = write(folder, tmp_path / "plain.gguf", words)
    assert set(plain.types) == {"F32"}
    multiplied = name.startswith("Falcon-H1")  # where it is written
    assert error(logits(plain.path), logits(folder)) < (1e-5 if multiplied else 1e-6)
    quantised = write(folder, tmp_path / "q8_0.gguf", words, isq="q8_0")
    assert "Q8_0" in quantised.types
    most = 4e-2 if name.startswith("Qwen4") else 5e-3 if multiplied else 1e-6  # a written table of n-grams is quantised
    assert error(logits(quantised.path), logits(folder, isq="q8_0")) < most


def test_every_family_says_how_its_models_are_written() -> None:
    """The families that llama.cpp does not know say nothing; what is written, a family reads."""
    rows = {name: row for family in HF_FAMILIES.values() for name, row in family.as_gguf.items()}
    assert {family.hf[name] for name, family in HF_FAMILIES.items()} - rows.keys() == {
        ROWS[name].model_type for name in UNKNOWN
    }
    assert {row.name for row in rows.values()} <= {*GGUF_FAMILIES}


def test_an_installed_family_says_how_it_is_written(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own row, also for a type that another family has too."""
    row = dataclasses.replace(llama.FAMILY.as_gguf["llama"], more=lambda _: {"example": 7})
    family = dataclasses.replace(llama.FAMILY, hf={"ExampleForCausalLM": "llama"}, gguf=(), as_gguf={"llama": row})
    monkeypatch.setattr(registry, "_installed", lambda: (family,))
    folder = write_toy_model(tmp_path / "model", toy_config(architectures=["ExampleForCausalLM"]))
    assert "llama.example" in GGUFReader(write(folder, tmp_path / "m.gguf", words).path).fields


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("isq", ["q4_0", "q4k", "q6k", "w8a8"])
def test_the_compiled_kernels_run_what_was_written(isq: str, tmp_path: Path, words: Path) -> None:
    """Rows of 256 take the type; a file and a model that is quantised while it is loaded have the same blocks."""
    big = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
    folder = write_tiny(tmp_path / "model", "llama", **big)
    written = write(folder, tmp_path / "q.gguf", words, isq=isq)
    ours, theirs = (
        recorded_logits(source, TOKENS, [len(TOKENS)], **settings)
        for source, settings in ((written.path, {}), (folder, {"isq": isq}))
    )
    assert torch.equal(ours, theirs)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(written.path).tensors}
    by_row = isq == "w8a8"  # written as Q8_0
    assert kinds["token_embd.weight"] == ("Q8_0" if by_row else "Q6_K")
    assert kinds["blk.1.ffn_down.weight"] == ("Q8_0" if by_row else isq.upper().replace("K", "_K"))
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}


@pytest.mark.parametrize(("stored", "asked", "written"), [
    ("bfloat16", "auto", "BF16"), ("float16", "auto", "F16"), ("float32", "bf16", "BF16"), ("bfloat16", "f32", "F32"),
])  # fmt: skip
def test_plain_types(stored: str, asked: Any, written: str, tmp_path: Path, words: Path) -> None:
    folder = write_toy_model(tmp_path / "model", toy_config(torch_dtype=stored))
    found = write(folder, tmp_path / "plain.gguf", words, dtype=asked)
    assert set(found.types) == {written, "F32"}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[written]
    matrix = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].to(dtype)
    read = next(each for each in GGUFReader(found.path).tensors if each.name == "blk.0.ffn_up.weight")
    assert read.data.tobytes() == matrix.view(torch.uint8).numpy().tobytes()


def test_words_and_template_come_back(tmp_path: Path, words: Path) -> None:
    folder = write_toy_model(tmp_path / "model", toy_config())
    (folder / "generation_config.json").write_text('{"suppress_tokens": [5, 7]}')
    written = load(write(folder, tmp_path / "m.gguf", words).path)
    tokenizer, before = written.tokenizer, load(folder, tokenizer=words).tokenizer
    for text in ("the then 1212 in  the\n\n x <tool> it's", "Ünï 你好 \x00<|im_end|>the"):
        assert tokenizer.encode(text) == before.encode(text)
    assert tokenizer.eos_token_ids == before.eos_token_ids == (258,)
    assert tokenizer.suppressed_token_ids == before.suppressed_token_ids == (5, 7)
    assert tokenizer.chat_template == "{{ messages }}"
    other = load(write(folder, tmp_path / "t.gguf", words, chat_template="{{ 1 }}").path)
    assert other.tokenizer.chat_template == "{{ 1 }}"
    with pytest.raises(ModelLoadError, match=r"the chat_template setting: .* has an error in line 1"):
        write(folder, tmp_path / "u.gguf", words, chat_template="{{ 1")


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temp": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"top_k": -1, "min_p": 0.125, "repetition_penalty": 1.5}, {"top_k": 0, "min_p": 0.125, "penalty_repeat": 1.5}),
        ({"temperature": 0.6, "do_sample": False, "typical_p": 0.5}, {"temp": 0.0}),
        ({"temperature": None, "eos_token_id": 258}, {}),
        ({"max_new_tokens": True, "min_p": 0}, {"min_p": 0.0}),
    ],
    ids=str,
)
def test_sampling_defaults_are_written_and_read(
    said: dict[str, Any], stored: dict[str, float], tmp_path: Path, words: Path
) -> None:
    folder = write_toy_model(tmp_path / "model", toy_config())
    (folder / "generation_config.json").write_text(json.dumps(said))
    path = write(folder, tmp_path / "m.gguf", words).path
    prefix = Keys.General.SAMPLING_TEMP.removesuffix("temp")
    fields = {name: each.contents() for name, each in GGUFReader(path).fields.items() if name.startswith(prefix)}
    assert fields == pytest.approx({prefix + name: value for name, value in stored.items()})
    assert {name: type(value) for name, value in fields.items()} == {
        prefix + name: type(value) for name, value in stored.items()
    }
    names = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
    found = {names.get(name, name): value for name, value in stored.items()}
    assert load(path).default_sampling == pytest.approx(found)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25}')
    assert load(tmp_path).default_sampling == pytest.approx(found | {"temperature": 0.25})


def test_a_template_takes_the_place_of_all(tmp_path: Path, words: Path) -> None:
    """Named ones of the folder too."""
    several = shutil.copytree(words, tmp_path / "several")
    named = [{"name": name, "template": name} for name in ("default", "tool_use")]
    settings = {"eos_token": "<|im_end|>", "chat_template": named}
    (several / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = write_toy_model(tmp_path / "model", toy_config())
    for template, found in ((None, {"", ".tool_use", "s"}), ("{{ 1 }}", {""})):
        path = write(folder, tmp_path / "t.gguf", several, chat_template=template, overwrite=True).path
        keys = {name for name in GGUFReader(path).fields if name.startswith("tokenizer.chat_template")}
        assert keys == {f"tokenizer.chat_template{end}" for end in found}


@pytest.mark.parametrize("isq", ["q8_0", "q4k", "w8a8"])
def test_a_gguf_file_is_quantised_as_its_folder_is(isq: str, tmp_path: Path, words: Path) -> None:
    """To the bit, metadata in its types included."""
    big = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
    folder = write_tiny(tmp_path / "model", "llama", **big)
    plain, wanted = (write(folder, tmp_path / f"{kind}.gguf", words, isq=kind) for kind in (None, isq))
    found = write_gguf(EngineConfig(model=str(plain.path), isq=isq), tmp_path / "again.gguf")
    assert found.types == wanted.types
    ours, theirs = GGUFReader(found.path), GGUFReader(wanted.path)
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert (one.name, one.tensor_type, one.data.tobytes()) == (other.name, other.tensor_type, other.data.tobytes())
    assert ours.fields.keys() == theirs.fields.keys()
    for name, field in ours.fields.items():
        assert (field.types, field.contents()) == (theirs.fields[name].types, theirs.fields[name].contents()), name


def test_a_quantised_gguf_file_is_copied_or_quantised_again(
    tmp_path: Path, words: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_toy_model(tmp_path / "model", toy_config())
    source = write(folder, tmp_path / "q8_0.gguf", words, isq="q8_0").path
    same = write_gguf(EngineConfig(model=str(source), isq="q8_0"), tmp_path / "same.gguf").path
    assert same.read_bytes() == source.read_bytes()
    assert not caplog.records
    other = write_gguf(EngineConfig(model=str(source), isq="q4_0", chat_template="{{ 1 }}"), tmp_path / "q4_0.gguf")
    assert {"Q4_0", "F32"} < set(other.types)
    assert "quantised already" in caplog.text
    assert load(other.path).tokenizer.chat_template == "{{ 1 }}"
    plain = write_gguf(EngineConfig(model=str(source), dtype="f32"), tmp_path / "f32.gguf")
    assert set(plain.types) == {"F32"}
    assert error(logits(plain.path), logits(source)) < 1e-2
    at_once = write_gguf(EngineConfig(model=str(plain.path), isq="q4_0"), tmp_path / "at_once.gguf")
    assert error(logits(other.path), logits(at_once.path)) == 0


# ---- bad input -------------------------------------------------------------------------------------------------------


def nvfp4_files(folder: Path) -> tuple[Path, Path]:
    """A file with NVFP4 matrices and scales of their own, as llama.cpp converts modelopt's, and its weights in F32."""
    source = write_toy_gguf(folder / "source.gguf", toy_config(intermediate_size=128), quantization="F32")
    random, reader = np.random.default_rng(0), GGUFReader(source)
    both = folder / "scaled.gguf", folder / "plain.gguf"
    writers = [GGUFWriter(path, "llama") for path in both]
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kinds = field.types[0], field.types[-1] if len(field.types) > 1 else None
            for writer in writers:
                writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=kinds[1])
    for tensor in reader.tensors:
        scaled, plain, data = *writers, np.array(tensor.data)
        if "ffn_down" not in tensor.name:
            scaled.add_tensor(tensor.name, data)
        else:
            blocks = random.integers(0, 256, (*data.shape[:-1], data.shape[-1] // 64, 36), np.uint8)
            blocks[..., :4] = random.integers(0x30, 0x40, blocks[..., :4].shape)
            numbers = dequantize(blocks, ggml_types.GGMLQuantizationType.NVFP4, data.shape)
            scale = np.array([1 / np.abs(numbers).max()], np.float32)
            scaled.add_tensor(tensor.name, blocks.reshape(len(data), -1), raw_dtype=GGMLQuantizationType.NVFP4)
            for end, value in ((".scale", scale), (".input_scale", np.ones(1, np.float32))):
                scaled.add_tensor(tensor.name.replace(".weight", end), value)
            data = numbers * scale
        plain.add_tensor(tensor.name, data)
    for writer in writers:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return both


def test_nvfp4_of_a_gguf_file_has_scales_beside_it(tmp_path: Path) -> None:
    scaled, plain = nvfp4_files(tmp_path)
    assert error(logits(scaled), logits(plain)) < 1e-6
    copied = write_gguf(EngineConfig(model=str(scaled)), tmp_path / "copied.gguf").path
    assert {tensor.name for tensor in GGUFReader(copied).tensors if tensor.name.endswith("down.scale")}
    assert torch.equal(logits(copied), logits(scaled))
    q8_0 = [
        write_gguf(EngineConfig(model=str(path), isq="q8_0"), tmp_path / f"q8_0-{path.name}").path
        for path in (scaled, plain)
    ]
    assert error(logits(q8_0[0]), logits(q8_0[1])) < 1e-6
    assert error(recorded_logits(scaled, TOKENS, [len(TOKENS)]), logits(plain)) < 0.05


def test_a_file_is_not_replaced_unless_asked(tmp_path: Path, words: Path) -> None:
    folder, out = write_toy_model(tmp_path / "model"), tmp_path / "m.gguf"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"m\.gguf exists: .*--force"):
        write(folder, out, words)
    assert out.read_text() == "mine"
    write(folder, out, words, overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path, words: Path) -> None:
    folder, out = write_toy_model(tmp_path / "model"), tmp_path / "m.gguf"
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors")
    out.write_text("mine")
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight cannot be quantised"):
        write(folder, out, words, overwrite=True, isq="q8_0")
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "model"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("m.bin", r"m\.bin does not end in \.gguf"),
        ("no/m.gguf", r"no is not a folder"),
        ("d.gguf", r"is a folder"),
        ("m-00001-of-00002.gguf", "named like one part of a split model"),
    ],
)
def test_places_where_no_file_can_be(out: str, message: str, tmp_path: Path, words: Path) -> None:
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, tmp_path / out, words)


def test_too_little_room(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_toy_model(tmp_path / "model")
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("candle_vllm.core.conversion.write.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"takes about \d+ MB and .* has 1 MB left: free some space"):
        write(folder, tmp_path / "m.gguf", words)


def test_models_that_cannot_be_written(tmp_path: Path, words: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        write(tmp_path / "nothing", tmp_path / "m.gguf", words)
    gguf = write_toy_gguf(tmp_path / "toy.gguf")
    with pytest.raises(ConfigError, match="a GGUF file's tokenizer is copied with it"):
        write(gguf, tmp_path / "m.gguf", words)
    with pytest.raises(ConfigError, match="adapters are merged into safetensors"):
        write_gguf(EngineConfig(model=str(gguf)), tmp_path / "m.gguf", adapters=[(tmp_path, 1.0)])
    cross = write_toy_encoder(tmp_path / "cross", toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with pytest.raises(UnsupportedModelError, match="not written for cross-encoders"):
        write(cross, tmp_path / "m.gguf", words)
    codes = write_toy_model(tmp_path / "codes")
    weights = load_file(codes / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights |= {name: weights[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}
    save_file(weights, codes / "model.safetensors")
    settings = toy_config(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    (codes / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"isq q4k needs .*up_proj\.weight is FP8.* quantize .*--isq q4k"):
        write(codes, tmp_path / "m.gguf", words, isq="q4k")
    with pytest.raises(
        ConfigError, match=r"^a written file needs .*up_proj\.weight is FP8: name the unquantised model$"
    ):
        write(codes, tmp_path / "m.gguf", words)
    dynamic = toy_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match=r"GGUF's llama cannot express this model's .*rope"):
        write(write_toy_model(tmp_path / "dynamic", dynamic), tmp_path / "m.gguf", words)


@pytest.mark.parametrize("name", sorted(UNSAYABLE))
def test_what_gguf_cannot_say_is_named(name: str, tmp_path: Path, words: Path) -> None:
    row = ROWS[name]
    folder = write_tiny(tmp_path / "model", row.model_type, **(dict(row.config) | CHANGES.get(name, {})))
    with pytest.raises(UnsupportedModelError, match=rf"GGUF's .* cannot express this model.* {UNSAYABLE[name]}$"):
        write(folder, tmp_path / "m.gguf", words)


def test_a_family_without_a_row_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path / "model")
    unknown = dataclasses.replace(load(folder).decoder.config, model_type="other")
    with pytest.raises(UnsupportedModelError, match=r"other cannot be converted .*: llama, mistral, .*`isq`"):
        architecture(llama.FAMILY, unknown, folder)
