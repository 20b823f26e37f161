# SPDX-License-Identifier: MIT
"""Every family of encoders against transformers: vectors, scores and classes of small random models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from candle_vllm.core import InferenceEngine, UnsupportedModelError
from candle_vllm.core.pooling import PoolingKind, PoolingParams
from candle_vllm.core.testing.toy_encoder import TOY_ENCODER_VOCAB_SIZE, write_toy_encoder
from candle_vllm.core.text.tokenizer import Tokenizer

TEXTS = ["hello", "a", "the quick brown fox", "jumps over the lazy dog, twice!", "x" * 90, "w " * 70]
SIZES = {"vocab_size": TOY_ENCODER_VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 130, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model class of transformers, and what its config says beside the sizes.

    Attributes:
        folders: published: as `save_pretrained` writes it, with the names of the repositories; plain: with those of the
            class. Of most families these are the same.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    head: str = ""
    architecture: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {self.renamed.get(key, key): value for key, value in SIZES.items()} | self.config


DISTIL = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers"}
DISTIL |= {"num_attention_heads": "n_heads"}
IDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
ROWS = [
    Row("NomicBertModel", head="NomicBertForSequenceClassification"),
    Row("GteModel", head="GteForSequenceClassification"),
    Row("GteModel", {"type_vocab_size": 0, "hidden_act": "gelu_new"}, architecture="NewModel"),
    Row("JinaEmbeddingsV3Model", {"pad_token_id": 1}),
    Row("MPNetModel", {"pad_token_id": 1}, head="MPNetForSequenceClassification"),
    Row("DistilBertModel", renamed=DISTIL, head="DistilBertForSequenceClassification"),
    Row("DistilBertModel", {"activation": "relu"}, renamed=DISTIL),
    Row("ModernBertModel", {"local_attention": 16, **IDS}, head="ModernBertForSequenceClassification"),
    Row("ModernBertModel", {"local_attention": 10, "attention_bias": True, "mlp_bias": True, "norm_bias": True, **IDS}),
]
NAMES = [f"{row.name}-{number}" for number, row in enumerate(ROWS)]


def write(folder: Path, row: Row, name: str, *, plain: bool = False, **more: Any) -> tuple[Path, Any]:
    """A random model of a class in transformers, as a folder, and the model."""
    torch.manual_seed(0)
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(**row.settings | more)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape))
    write_toy_encoder(folder)
    model.save_pretrained(folder)
    if plain:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
    if row.architecture:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [row.architecture]}))
    return folder, model


def states(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].double().numpy()


POOLED: dict[PoolingKind, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda found: found.mean(0),
    "cls": lambda found: found[0],
    "last": lambda found: found[-1],
}


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)


def vectors(engine: InferenceEngine, params: PoolingParams | None = None) -> np.ndarray:
    return np.array([output.embedding for output in engine.embed(TEXTS, params, use_tqdm=False)], np.float64)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_vectors_equal_transformers(row: Row, eager: bool, tmp_path: Path) -> None:
    folder, model = write(tmp_path, row, row.name, plain=eager and not row.architecture)
    ids = [Tokenizer.from_folder(folder).encode(text) for text in TEXTS]
    with InferenceEngine(str(folder), enforce_eager=eager) as engine:
        for kind, pool in POOLED.items():
            wanted = np.stack([pool(states(model, text)) for text in ids])
            found = vectors(engine, PoolingParams(pooling=kind, normalize=False))
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert cosines(found, wanted).min() > 0.99999
        together = vectors(engine)
        alone = np.array([engine.embed([text], use_tqdm=False)[0].embedding for text in TEXTS], np.float64)
        assert np.abs(together - alone).max() <= (1e-6 if eager else 0)


@pytest.mark.parametrize("row", [row for row in ROWS if row.head], ids=lambda row: row.head)
@pytest.mark.parametrize("labels", [1, 3])
def test_heads_equal_transformers(row: Row, labels: int, tmp_path: Path) -> None:
    more = {"classifier_pooling": "mean" if labels == 3 else "cls"} if "ModernBert" in row.head else {}
    folder, model = write(tmp_path, row, row.head, num_labels=labels, **more)
    tokenizer = Tokenizer.from_folder(folder)
    for eager in (False, True):
        with InferenceEngine(str(folder), enforce_eager=eager) as engine:
            found = np.array([output.probs for output in engine.classify(TEXTS, use_tqdm=False)])
            for text, probabilities in zip(TEXTS, found, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([tokenizer.encode(text)])).logits[0]
                wanted = logits.sigmoid() if labels == 1 else logits.softmax(-1)
                assert np.abs(probabilities - wanted.numpy()).max() < 1e-4
            if labels == 1:
                pair = "what is it", "a fox"
                ids, types = tokenizer.encode_pair(*pair)
                typed = (
                    {"token_type_ids": torch.tensor([types])} if getattr(model.config, "type_vocab_size", 1) > 1 else {}
                )
                with torch.no_grad():
                    wanted = model(torch.tensor([ids]), **typed).logits[0, 0].sigmoid()
                assert abs(engine.score([pair], use_tqdm=False)[0].score - float(wanted)) < 1e-4
