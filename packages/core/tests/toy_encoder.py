# SPDX-License-Identifier: MIT
"""Encoders of a few hundred kilobytes: random weights and a WordPiece tokenizer, as sentence-transformers' folders."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.weights import expand, layer_at
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.registry import HF_ENCODERS, encoder_from_hf

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = string.ascii_lowercase + string.digits + string.punctuation
TOY_ENCODER_VOCAB_SIZE = len(_SPECIAL) + 2 * len(_LETTERS)
"""Every letter, digit and punctuation mark at the beginning of a word and inside it."""


def toy_encoder_config(architecture: str = "BertModel", **overrides: Any) -> dict[str, Any]:
    """A `config.json` of a two-layer encoder; `overrides` replace or add keys."""
    model_type, scores = HF_ENCODERS[architecture].hf[architecture]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": TOY_ENCODER_VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "max_position_embeddings": 130,
        "type_vocab_size": 2 if model_type == "bert" else 1,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0 if model_type == "bert" else 1,
    }
    if scores:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config | overrides


def write_toy_encoder(
    folder: Path, config: dict[str, Any] | None = None, *, pooling: str | None = "mean", seed: int = 0
) -> Path:
    """Writes an encoder that loads like any other.

    Args:
        folder: created if it does not exist.
        config: as from `toy_encoder_config`.
        pooling: "mean", "cls" or "lasttoken", written to sentence-transformers' files, with vectors of length 1; None
            omits these files.
        seed: seed of the random weights. Equal arguments give equal files.

    Returns:
        The folder.
    """
    config = config or toy_encoder_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    found = encoder_from_hf(config, folder / "config.json")
    assert found is not None
    save_file(_weights(*found, seed), folder / "model.safetensors", {"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    if pooling is not None:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    return folder


def _weights(family: EncoderFamily, config: EncoderConfig, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    prefix = ("bert." if config.model_type == "bert" else "roberta.") if config.scores else ""
    model = family.build(config, SHAPES)
    made = {}
    for line in expand(family.weights(config, [prefix]), config):
        path, part = line.target.split(":")
        layer = layer_at(model, path)
        if layer is None:
            continue
        shape = layer.parameters()[part].shape
        values = generator.standard_normal(shape, np.float32)
        spread, centre = (1.5 * shape[1] ** -0.5, 0.0) if len(shape) == 2 else (0.1, float("norm:w" in line.target))
        made[line.first] = np.float32(centre) + np.float32(spread) * values
    return made


def _tokenizer() -> Tokenizer:
    """BERT's: lower case, one piece per letter, [CLS] a [SEP] b [SEP]."""
    texts = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS)]
    ids = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(text, ids[text]) for text in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
