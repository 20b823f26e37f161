# SPDX-License-Identifier: MIT
"""Encoders and decoders of vectors written as GGUF files: the vectors of the file are those of the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from candle_vllm.core import EngineConfig, InferenceEngine, UnsupportedModelError
from candle_vllm.core.conversion import WrittenFile, write_gguf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder

TEXTS = ["hello", "the quick brown fox's 2nd jump!", "x" * 90, "a b"]
POOLINGS = {"mean": 1, "cls": 2, "lasttoken": 3}


def write(folder: Path, out: Path, **settings: Any) -> WrittenFile:
    return write_gguf(EngineConfig(model=str(folder), **settings), out)


def vectors(source: Path, *, eager: bool = False) -> np.ndarray:
    with InferenceEngine(str(source), op_by_op=eager) as engine:
        return np.stack([np.asarray(output.embedding) for output in engine.embed(TEXTS, use_tqdm=False)])


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


@pytest.mark.parametrize(("architecture", "pooling"), [
    ("BertModel", "cls"), ("RobertaModel", "lasttoken"), ("XLMRobertaModel", "mean"),
])  # fmt: skip
def test_an_encoder_comes_back(architecture: str, pooling: str, tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path / "m", toy_encoder_config(architecture), pooling=pooling)
    plain = write(folder, tmp_path / "plain.gguf")
    assert set(plain.types) == {"F32"}
    for eager in (False, True):
        np.testing.assert_allclose(vectors(plain.path, eager=eager), vectors(folder, eager=eager), atol=1e-6)
    found = keys(plain.path)
    rows = 130 if architecture == "BertModel" else 128  # RoBERTa's begin behind the padding token
    assert (found["general.architecture"], found["bert.context_length"]) == ("bert", rows)
    assert (found["bert.pooling_type"], found["bert.attention.causal"]) == (POOLINGS[pooling], False)
    assert found["bert.attention.layer_norm_epsilon"] == pytest.approx(1e-12)
    assert found["tokenizer.ggml.token_type_count"] == (2 if architecture == "BertModel" else 1)
    table = load_file(folder / "model.safetensors")["embeddings.position_embeddings.weight"][-rows:]
    stored = {tensor.name: tensor for tensor in GGUFReader(plain.path).tensors}
    np.testing.assert_array_equal(stored["position_embd.weight"].data, table)


def test_a_quantised_encoder(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path / "m")
    quantised = write(folder, tmp_path / "q8_0.gguf", isq="q8_0")
    for eager in (False, True):
        assert 0 < np.abs(vectors(quantised.path, eager=eager) - vectors(folder)).max() < 0.03
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(quantised.path).tensors}
    assert {kinds[f"{name}.weight"] for name in ("position_embd", "token_types", "token_embd_norm")} == {"F32"}
    assert {kinds[f"{name}.weight"] for name in ("token_embd", "blk.1.attn_q", "blk.1.ffn_up")} == {"Q8_0"}
    plain = write(folder, tmp_path / "plain.gguf").path
    again = write(plain, tmp_path / "again.gguf", isq="q8_0").path
    assert again.read_bytes() == quantised.path.read_bytes()


def test_words_of_bytes(tmp_path: Path) -> None:
    """RoBERTa's own: byte pairs, with a token on either side."""
    folder = write_toy_encoder(tmp_path / "m", toy_encoder_config("RobertaModel", vocab_size=262))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    listed = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    backend = Tokenizer(models.BPE({text: index for index, text in enumerate(listed)}, [("t", "h"), ("th", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    frame = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    np.testing.assert_allclose(vectors(write(folder, tmp_path / "m.gguf").path), vectors(folder), atol=1e-6)


def test_encoders_that_gguf_cannot_say(tmp_path: Path) -> None:
    cross = write_toy_encoder(tmp_path / "cross", toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with pytest.raises(UnsupportedModelError, match=r"config\.json: GGUF files are not written for cross-encoders"):
        write(cross, tmp_path / "m.gguf")
    relu = write_toy_encoder(tmp_path / "relu", toy_encoder_config(hidden_act="relu"))
    with pytest.raises(UnsupportedModelError, match=r"GGUF's bert cannot express this model's activation$"):
        write(relu, tmp_path / "m.gguf")
    splade = write_toy_encoder(tmp_path / "splade", toy_encoder_config())
    parts = [{"type": "x.MLMTransformer", "path": ""}, {"type": "x.SpladePooling", "path": "1_Pooling"}]
    (splade / "modules.json").write_text(json.dumps(parts))
    (splade / "1_Pooling" / "config.json").write_text('{"pooling_strategy": "max"}')
    with pytest.raises(UnsupportedModelError, match=r"splade: GGUF has no pooling_type for pooling 'sparse'$"):
        write(splade, tmp_path / "m.gguf")


def test_vectors_of_other_lengths_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_toy_encoder(tmp_path / "m")
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))
    write(folder, tmp_path / "m.gguf")
    assert "cannot express that this model's vectors are not normalised" in caplog.text


@pytest.mark.parametrize("headless", [False, True])
def test_a_decoder_of_vectors(headless: bool, tmp_path: Path, words: Path) -> None:
    """The pooling is said; a trunk's file has the embedding table for a head, as llama.cpp takes it."""
    folder = write_tiny(tmp_path / "m", "qwen3", **ROWS["Qwen3"].config)
    if headless:
        stored = load_file(folder / "model.safetensors")
        kept = {name.removeprefix("model."): tensor for name, tensor in stored.items() if name != "lm_head.weight"}
        save_file(kept, folder / "model.safetensors")
    else:
        write_toy_encoder(tmp_path / "parts", pooling="mean")
        for name in ("modules.json", "1_Pooling"):
            (tmp_path / "parts" / name).rename(folder / name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((words / name).read_bytes())
    out = write(folder, tmp_path / "m.gguf").path
    assert keys(out)["qwen3.pooling_type"] == (3 if headless else 1)
    np.testing.assert_allclose(vectors(out, eager=True), vectors(folder, eager=True), atol=1e-6)
