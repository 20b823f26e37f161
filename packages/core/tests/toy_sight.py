# SPDX-License-Identifier: MIT
"""A valid checkpoint of a vision model of a few hundred kilobytes: SmolVLM's shape, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.weights import expand, layer_at
from candle_vllm.core.models.siglip import FAMILY, config_from_hf
from candle_vllm.core.testing.toy_model import random_weights, save_plain, toy_config, write_toy_tokenizer

SIGHT_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def toy_sight_config(*, tile: int = 32, patch: int = 4, cell: int = 2, **text: Any) -> dict[str, Any]:
    """A `config.json`; `text` replaces or adds keys of its text model."""
    inner = toy_config("llama", vocab_size=288, pad_token_id=0, **text)
    vision = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": tile,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": 260,
        "scale_factor": cell,
        "tie_word_embeddings": False,
        "eos_token_id": 258,
        "torch_dtype": "float32",
        "text_config": {key: value for key, value in inner.items() if key != "architectures"},
        "vision_config": {"model_type": "smolvlm_vision", **vision},
    }


def write_toy_sight(
    folder: Path, config: Mapping[str, Any] | None = None, *, seed: int = 0, splits: bool = True
) -> Path:
    """Writes a checkpoint that loads like any other.

    Args:
        folder: created if it does not exist.
        config: result of `toy_sight_config`.
        seed: seed of the random weights. Equal arguments give equal files.
        splits: whether images are cut into tiles; their longer side becomes two tiles.

    Returns:
        The folder.
    """
    config = dict(config or toy_sight_config())
    tile = config["vision_config"]["image_size"]
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 2 * tile},
        "max_image_size": {"longest_edge": tile},
        "do_image_splitting": splits,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": 1 / 255,
        "resample": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    text = random_weights(config["text_config"], seed)
    names = {name: name.replace("model.", "model.text_model.", 1) for name in text}
    weights = {names[name]: weight for name, weight in text.items()}
    save_plain(folder / "model.safetensors", weights | _tower(config, processor, seed), "F32")
    write_toy_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(SIGHT_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"chat_template": _TEMPLATE}))
    return folder


def _tower(config: Mapping[str, Any], processor: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Return random weights of the tower; its embeddings have about the norm of token embeddings."""
    path, generator = Path("config.json"), np.random.default_rng(seed + 1)
    size = config["text_config"]["hidden_size"]
    described = config_from_hf(Fields(config, path), Fields(processor, path), size)
    model, weights = FAMILY.build(described, SHAPES), dict[str, np.ndarray]()
    for line in expand(FAMILY.weights, described):
        at, part = line.target.split(":")
        layer = layer_at(model, at)
        assert layer is not None
        shape = layer.parameters()[part].shape
        numbers = generator.standard_normal(shape, np.float32)
        if len(shape) == 2:
            numbers *= np.float32(1.5 * shape[1] ** -0.5)
        else:
            numbers = np.float32("norm" in at and part == "weight") + np.float32(0.1) * numbers
        if at == "patches" and part == "weight":
            numbers = numbers.reshape(-1, 3, described.patch, described.patch)
        weights[f"model.{line.first}"] = numbers
    weights["model.connector.modality_projection.proj.weight"] *= np.float32(2)
    return weights
