# SPDX-License-Identifier: MIT
"""Heads for scores and classes on decoders, and layers behind the pooling, against transformers and numpy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from candle_vllm.core import EngineConfig, InferenceEngine, InvalidParameterError, UnsupportedModelError, WeightsError
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.toy_encoder import TOY_ENCODER_VOCAB_SIZE, write_toy_encoder

TEXTS = ["hello", "a", "the quick brown fox", "w " * 40]
SIZES: dict[str, Any] = {
    "vocab_size": TOY_ENCODER_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 130, "pad_token_id": 0}


def write(folder: Path, family: str, **more: Any) -> Any:
    """A random model with a head, as a folder; returns that of transformers."""
    torch.manual_seed(0)
    kind: Any = getattr(transformers, f"{family}ForSequenceClassification")
    config = getattr(transformers, f"{family}Config")(**SIZES | more)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(1.5 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape))
    write_toy_encoder(folder, pooling=None)
    model.save_pretrained(folder)
    return model


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.one_of_each
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2"])
@pytest.mark.parametrize("labels", [1, 3])
def test_classes_and_rewards_equal_transformers(family: str, labels: int, tmp_path: Path) -> None:
    model = write(tmp_path, family, num_labels=labels, head_dim=8)
    tokenizer = Tokenizer.from_folder(tmp_path)
    wanted = torch.stack([logits_of(model, tokenizer.encode(text)) for text in TEXTS])
    with InferenceEngine(str(tmp_path), dtype="fp32", max_model_len=128) as engine:
        info = engine.model_info
        assert info.tasks == (("score", "classify") if labels == 1 else ("classify",))
        assert (len(info.labels), info.embedding_size) == (labels, 0)
        found = np.array([each.probs for each in engine.classify(TEXTS, use_tqdm=False)])
        probabilities = wanted.sigmoid() if labels == 1 else wanted.softmax(-1)
        assert np.abs(found - probabilities.numpy()).max() < 1e-4
        raw = engine.classify(TEXTS, PoolingParams(use_activation=False), use_tqdm=False)
        spread = float(wanted.abs().max())
        assert np.abs(np.array([each.probs for each in raw]) - wanted.numpy()).max() < 1e-4 * max(spread, 1)
        again = np.array([each.probs for each in engine.classify(TEXTS, use_tqdm=False)])
        # Heads of 8 are computed op by op in torch, whose last bit depends on how many texts are in a step.
        assert np.abs(again - found).max() < 1e-6, "a cached prefix changes nothing"
        if labels == 1:
            ids, _ = tokenizer.encode_pair("what is it", "a fox")
            score = engine.score([("what is it", "a fox")], use_tqdm=False)[0].score
            assert abs(score - float(logits_of(model, ids).sigmoid()[0])) < 1e-4
        for refused in (engine.embed, engine.generate):
            with pytest.raises(InvalidParameterError):
                refused("hello", use_tqdm=False)


@pytest.mark.one_of_each
@pytest.mark.parametrize("words", [["n", "y"], ["y"]])
@pytest.mark.parametrize("tied", [False, True])
def test_rerankers_that_answer_by_tokens(words: list[str], tied: bool, tmp_path: Path) -> None:
    """Qwen3-Reranker's way: the probability of "yes" among "no" and "yes" behind the last token."""
    write(tmp_path, "Qwen3", head_dim=8)
    torch.manual_seed(1)
    config = transformers.Qwen3Config(**SIZES | {"head_dim": 8, "tie_word_embeddings": tied})
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": words}
    (tmp_path / "config.json").write_text(json.dumps(said))
    tokenizer, pairs = Tokenizer.from_folder(tmp_path), [("what is it", "a fox"), ("a", "b")]
    with InferenceEngine(str(tmp_path), dtype="fp32", max_model_len=128) as engine:
        assert engine.model_info.tasks == ("score", "classify")
        found = [each.score for each in engine.score(pairs, use_tqdm=False)]
    for pair, score in zip(pairs, found, strict=True):
        ids, _ = tokenizer.encode_pair(*pair)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        asked = logits[[tokenizer.backend.token_to_id(word) for word in words]]
        wanted = asked.softmax(-1)[1] if len(words) == 2 else asked.sigmoid()[0]
        assert abs(score - float(wanted)) < 1e-4
    (tmp_path / "config.json").write_text(json.dumps(said | {"classifier_from_token": ["nowhere"]}))
    with pytest.raises(WeightsError, match="one or two tokens of the vocabulary"):
        InferenceEngine(str(tmp_path))


def test_a_reward_head_of_two_matrices(tmp_path: Path) -> None:
    """Qwen2ForRewardModel: a matrix, ReLU and another one behind the last token."""
    model = write(tmp_path, "Qwen2", num_labels=1)
    random, tokenizer = np.random.default_rng(0), Tokenizer.from_folder(tmp_path)
    tensors = {name: value.numpy() for name, value in model.state_dict().items() if name != "score.weight"}
    head = {
        "score.0.weight": random.standard_normal((32, 32)), "score.0.bias": random.standard_normal(32),
        "score.2.weight": random.standard_normal((1, 32)), "score.2.bias": random.standard_normal(1),
    }  # fmt: skip
    head = {name: value.astype(np.float32) for name, value in head.items()}
    save_file(tensors | head, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["Qwen2ForRewardModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with InferenceEngine(str(tmp_path), dtype="fp32", max_model_len=128) as engine:
        found = engine.classify(TEXTS, PoolingParams(use_activation=False), use_tqdm=False)
    for text, output in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            state = model.model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0, -1].numpy()
        inner = np.maximum(head["score.0.weight"] @ state + head["score.0.bias"], 0)
        assert abs(output.probs[0] - float((head["score.2.weight"] @ inner + head["score.2.bias"])[0])) < 1e-3


def test_a_head_that_is_missing_or_cannot_be_written(tmp_path: Path) -> None:
    model = write(tmp_path, "Llama", num_labels=2)
    with pytest.raises(UnsupportedModelError, match="not written for heads of scores and classes"):
        write_gguf(EngineConfig(model=str(tmp_path)), tmp_path / "m.gguf")
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    save_file(tensors | {"score.weight": np.zeros((2, 31), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"score\.weight has shape \[2, 31\]"):
        InferenceEngine(str(tmp_path))
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"score\.weight is missing"):
        InferenceEngine(str(tmp_path))


@pytest.mark.one_of_each
@pytest.mark.parametrize("activation", ["Identity", "Tanh", "GELU"])
def test_dense_layers_behind_the_pooling(activation: str, tmp_path: Path) -> None:
    """As sentence-transformers' folders have them, in order, before the vector is normalised."""
    folder, random = write_toy_encoder(tmp_path), np.random.default_rng(0)
    with InferenceEngine(str(folder)) as engine:
        plain = np.array(
            [each.embedding for each in engine.embed(TEXTS, PoolingParams(normalize=False), use_tqdm=False)]
        )
    modules, sizes, wanted = json.loads((folder / "modules.json").read_text()), [32, 48, 24], plain.astype(np.float64)
    for number, (before, behind) in enumerate(itertools.pairwise(sizes), 2):
        weight = (random.standard_normal((behind, before)) / 4).astype(np.float32)
        bias, path = random.standard_normal(behind).astype(np.float32), folder / f"{number}_Dense"
        path.mkdir()
        kind = f"torch.nn.modules.activation.{activation}"
        config = {"in_features": before, "out_features": behind, "bias": True, "activation_function": kind}
        (path / "config.json").write_text(json.dumps(config))
        save_file({"linear.weight": weight, "linear.bias": bias}, path / "model.safetensors")
        modules.insert(number, {"path": path.name, "type": "sentence_transformers.models.Dense"})
        act = {"Identity": lambda x: x, "Tanh": torch.tanh, "GELU": torch.nn.functional.gelu}[activation]
        wanted = act(torch.from_numpy(wanted @ weight.T + bias)).numpy()
    (folder / "modules.json").write_text(json.dumps(modules))
    with InferenceEngine(str(folder)) as engine:
        assert engine.model_info.embedding_size == 24
        found = np.array([each.embedding for each in engine.embed(TEXTS, use_tqdm=False)])
    assert np.abs(found - wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() < 1e-5
    with pytest.raises(UnsupportedModelError, match="embedding models with Dense layers"):
        write_gguf(EngineConfig(model=str(folder)), tmp_path / "m.gguf")
