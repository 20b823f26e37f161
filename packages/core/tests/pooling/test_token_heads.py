# SPDX-License-Identifier: MIT
"""Encoders that say something of each token against transformers: ColBERT, SPLADE, bge-m3's heads, token classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from candle_vllm.core import InferenceEngine, InvalidParameterError
from candle_vllm.core.errors import WeightsError
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.pooling.test_encoder_families import DISTIL, IDS, TEXTS, Row, states, write

PAIR = "what is it", "a fox, of course"


def modules(folder: Path, **kinds: str) -> None:
    """Writes `modules.json` of modules by their folders."""
    listed = [{"path": path.replace("first", ""), "type": f"some.library.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(listed))


def rows(flat: Any, vectors: int | None) -> np.ndarray:
    assert vectors is not None
    return np.asarray(flat, np.float64).reshape(vectors, -1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def max_sim(query: np.ndarray, document: np.ndarray) -> float:
    return float((query @ document.T).max(1).sum())


def write_colbert(folder: Path, form: str) -> tuple[np.ndarray, Any]:
    """A random ColBERT model as a folder; its matrix [8, E], and the encoder."""
    row = Row("ModernBertModel", {"local_attention": 16, **IDS}) if form != "HF_ColBERT" else Row("BertModel")
    model = write(folder, row, row.name)[1]
    matrix = np.random.default_rng(1).standard_normal((8, 32), np.float32)
    (folder / "modules.json").unlink()
    if form != "HF_ColBERT":
        more = {"mask": "MultiVectorMask", "length": "Normalize"} if form == "multi" else {}
        modules(folder, first="Transformer", dense="Dense", **more)
        (folder / "dense").mkdir()
        settings = {"in_features": 32, "out_features": 8, "bias": False, "use_residual": False}
        settings["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "dense" / "config.json").write_text(json.dumps(settings))
        save_file({"linear.weight": matrix}, folder / "dense" / "model.safetensors")
    else:
        stored = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(stored | {"linear.weight": matrix}, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["HF_ColBERT"]}))
    return matrix, model


@pytest.mark.parametrize("form", ["pylate", "multi", "HF_ColBERT"])
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_colbert_gives_a_vector_of_each_token_and_maxsim(form: str, eager: bool, tmp_path: Path) -> None:
    matrix, model = write_colbert(tmp_path, form)
    tokenizer = Tokenizer.from_folder(tmp_path)

    def wanted(text: str) -> np.ndarray:
        return unit(states(model, tokenizer.encode(text)) @ matrix.T)

    with InferenceEngine(str(tmp_path), op_by_op=eager) as engine:
        assert engine.model_info.tasks == ("embed", "score")
        assert (engine.model_info.pooling, engine.model_info.embedding_size) == ("all", 8)
        for text, output in zip(TEXTS, engine.embed(TEXTS, use_tqdm=False), strict=True):
            assert np.abs(rows(output.embedding, output.vectors) - wanted(text)).max() < 1e-4
        alone = [engine.embed([text], use_tqdm=False)[0].embedding for text in TEXTS]
        if not eager:
            assert alone == [each.embedding for each in engine.embed(TEXTS, use_tqdm=False)], "bits of a batch"
        score = engine.score([PAIR], use_tqdm=False)[0].score
        assert score == pytest.approx(max_sim(wanted(PAIR[0]), wanted(PAIR[1])), abs=1e-4)
        assert score > 1
        plain = engine.embed([TEXTS[2]], PoolingParams(pooling="mean", normalize=False), use_tqdm=False)[0]
        assert plain.vectors is None


SPLADE = [
    (Row("BertModel"), "BertForMaskedLM"),
    (Row("DistilBertModel", renamed=DISTIL), "DistilBertForMaskedLM"),
    (Row("ModernBertModel", {"local_attention": 16, **IDS}), "ModernBertForMaskedLM"),
    (Row("MPNetModel", {"pad_token_id": 1}), "MPNetForMaskedLM"),
]


@pytest.mark.parametrize(("row", "name"), SPLADE, ids=[name for _, name in SPLADE])
def test_splade_weighs_the_vocabulary(row: Row, name: str, tmp_path: Path) -> None:
    model = write(tmp_path, row, name)[1]
    newer = name == "DistilBertForMaskedLM"  # as sentence-transformers 5.4 and later save it
    modules(tmp_path, first="Transformer" if newer else "MLMTransformer", splade="SpladePooling")
    (tmp_path / "splade").mkdir()
    (tmp_path / "splade" / "config.json").write_text(json.dumps({"pooling_strategy": "max"}))
    tokenizer = Tokenizer.from_folder(tmp_path)

    def wanted(text: str) -> np.ndarray:
        with torch.no_grad():
            return functional.relu(model(torch.tensor([tokenizer.encode(text)])).logits[0]).log1p().amax(0).numpy()

    with InferenceEngine(str(tmp_path)) as engine:
        for text, output in zip(TEXTS, engine.embed(TEXTS, use_tqdm=False), strict=True):
            assert np.abs(np.asarray(output.embedding) - wanted(text)).max() < 1e-4
        assert any(0 < np.count_nonzero(wanted(text)) < len(wanted(text)) for text in TEXTS)
        score = engine.score([PAIR], use_tqdm=False)[0].score
        assert score == pytest.approx(float(wanted(PAIR[0]) @ wanted(PAIR[1])), rel=1e-4)
        with pytest.raises(InvalidParameterError, match="dimensions"):
            engine.embed(TEXTS, PoolingParams(dimensions=8), use_tqdm=False)


def test_heads_of_bge_m3_stand_beside_its_vector(tmp_path: Path) -> None:
    row = Row("XLMRobertaModel", {"pad_token_id": 1})
    model, random = write(tmp_path, row, row.name)[1], np.random.default_rng(1)
    heads = {
        name: {
            "weight": random.standard_normal((size, 32), np.float32),
            "bias": random.standard_normal(size, np.float32),
        }
        for name, size in (("colbert_linear", 32), ("sparse_linear", 1))
    }
    tokenizer = Tokenizer.from_folder(tmp_path)
    with InferenceEngine(str(tmp_path)) as engine, pytest.raises(InvalidParameterError, match="no head"):
        engine.embed(TEXTS, PoolingParams(pooling="sparse"), use_tqdm=False)
    for name, head in heads.items():
        for wrong in (head | {"weight": np.zeros((), np.float32)}, {"bias": head["bias"]}):
            save_file(wrong, tmp_path / f"{name}.safetensors")
            with pytest.raises(WeightsError, match=r"tensor (weight|bias) is"):
                InferenceEngine(str(tmp_path))
        save_file(head, tmp_path / f"{name}.safetensors")
    with InferenceEngine(str(tmp_path)) as engine:
        assert engine.model_info.pooling == "mean"
        single = engine.embed(TEXTS, PoolingParams(pooling="all"), use_tqdm=False)
        sparse = engine.embed(TEXTS, PoolingParams(pooling="sparse"), use_tqdm=False)
        assert engine.embed(TEXTS, use_tqdm=False)[0].vectors is None
    for text, each, weights in zip(TEXTS, single, sparse, strict=True):
        ids = tokenizer.encode(text)
        made = {name: states(model, ids) @ head["weight"].T + head["bias"] for name, head in heads.items()}
        assert np.abs(rows(each.embedding, each.vectors) - unit(made["colbert_linear"][1:])).max() < 1e-4
        wanted = np.zeros(len(weights.embedding))
        for token, weight in zip(ids, made["sparse_linear"][:, 0], strict=True):
            wanted[token] = max(wanted[token], weight)
        wanted[:5] = 0  # special tokens
        assert np.abs(np.asarray(weights.embedding) - wanted).max() < 1e-4


TOKEN_CLASSES = [
    Row("BertModel", head="BertForTokenClassification"),
    Row("XLMRobertaModel", {"pad_token_id": 1}, head="XLMRobertaForTokenClassification"),
    Row("DistilBertModel", renamed=DISTIL, head="DistilBertForTokenClassification"),
    Row("ModernBertModel", {"local_attention": 16, **IDS}, head="ModernBertForTokenClassification"),
]


@pytest.mark.one_of_each
@pytest.mark.parametrize("row", TOKEN_CLASSES, ids=lambda row: row.head)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_classes_of_tokens_equal_transformers(row: Row, eager: bool, tmp_path: Path) -> None:
    model = write(tmp_path, row, row.head, num_labels=3)[1]
    tokenizer = Tokenizer.from_folder(tmp_path)
    with InferenceEngine(str(tmp_path), op_by_op=eager) as engine:
        assert engine.model_info.tasks == ("classify",)
        assert engine.model_info.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        logits = engine.classify(TEXTS, PoolingParams(use_activation=False), use_tqdm=False)
        for text, output, raw in zip(TEXTS, engine.classify(TEXTS, use_tqdm=False), logits, strict=True):
            with torch.no_grad():
                wanted = model(torch.tensor([tokenizer.encode(text)])).logits[0]
            assert np.abs(rows(raw.probs, raw.vectors) - wanted.numpy()).max() < 1e-4
            assert np.abs(rows(output.probs, output.vectors) - wanted.softmax(-1).numpy()).max() < 1e-4
        with pytest.raises(InvalidParameterError, match="classifier"):
            engine.embed(TEXTS, use_tqdm=False)
