# SPDX-License-Identifier: MIT
"""Read how a model's embeddings are pooled, from its files (loading, before step 1 of a request).

A folder of sentence-transformers lists its parts in `modules.json`, such as the transformer, a pooling with its own
`config.json`, dense layers and a normalisation. GGUF has `<architecture>.pooling_type`. A file with an unsupported
setting is refused, because every embedding would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_any_json, read_json
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.pooled_head import Dense, DenseActivation
from candle_vllm.core.pooling import MAX_DIMENSIONS, POOLING_METHODS, ModelPooling, PoolingKind
from candle_vllm.core.quantization.tensors import StoredTensor

MAX_MODULES = 16
MAX_PROMPTS, MAX_PROMPT = 256, 1 << 14
_PART_FOLDER = re.compile(r"[\w-][\w.-]{0,63}", re.ASCII)  # a single folder in the model's folder
_MODES: Mapping[str, PoolingKind] = {row.mode: kind for kind, row in POOLING_METHODS.items() if row.mode is not None}
_OLD_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_GGUF_KINDS: Mapping[int, PoolingKind] = {
    row.gguf: kind for kind, row in POOLING_METHODS.items() if row.gguf is not None
}


def read_pooling(
    files: ModelFiles, metadata: Mapping[str, Any], size: int, default: PoolingKind, config: Fields | None = None
) -> ModelPooling:
    """Read the pooling of a model, whose hidden states have `size` elements.

    `metadata` is a GGUF file's, `config` is `config.json`, if it exists. `default` is the pooling for files without a
    pooling setting, and for GGUF files whose setting is 0 (none).

    Raises:
        InvalidFileError, UnsupportedModelError: the files are damaged, or need a feature that is not implemented.
    """
    if files.format == "gguf":
        return ModelPooling(size, _gguf_pooling(files, metadata) or default)
    matryoshka, dimensions = (False, ()) if config is None else _matryoshka(config, size)
    modules = files.folder / "modules.json"
    pooling, normalize = _folder_pooling(modules) if modules.is_file() else (default, True)
    prompts = _prompts(files.folder / "config_sentence_transformers.json")
    return ModelPooling(size, pooling, normalize, matryoshka, dimensions, prompts=prompts)


def _prompts(path: Path) -> dict[str, str]:
    """Read the prompts (prefixes of texts) of a sentence-transformers folder."""
    stored = Fields(read_json(path), path).get("prompts", dict, {}) if path.is_file() else {}
    found = {name: "" if text is None else text for name, text in stored.items()}
    fit = all(isinstance(text, str) and len(name) < 256 and len(text) < MAX_PROMPT for name, text in found.items())
    if len(found) > MAX_PROMPTS or not fit:
        said = f"prompts must be up to {MAX_PROMPTS} texts below {MAX_PROMPT} characters, with names below 256"
        raise InvalidFileError(f"{path}: {said}")
    return found


def longest_text(folder: Path) -> int | None:
    """Return the maximum number of tokens of a text that a sentence-transformers folder sets; None if it sets none.

    Version 5.4 and later set it in `tokenizer_config.json`, to a very large number if there is no limit.
    """
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        found = Fields(read_json(folder / name), folder / name) if (folder / name).is_file() else None
        if found is None or (length := found.count(key, None, most=1 << 100)):
            return None if found is None else length
    return None


def _gguf_pooling(files: ModelFiles, metadata: Mapping[str, Any]) -> PoolingKind | None:
    architecture = metadata.get("general.architecture")
    kind = Fields(metadata, files.weights[0], prefix=f"{architecture}.").get("pooling_type", int, 0)
    if kind and kind not in _GGUF_KINDS:
        known = ", ".join(f"{number} ({name})" for number, name in sorted(_GGUF_KINDS.items()))
        said = f"{architecture}.pooling_type is {kind}; implemented: 0 (none), {known}"
        raise UnsupportedModelError(f"{files.weights[0]}: {said}")
    return _GGUF_KINDS.get(kind)


def _matryoshka(config: Fields, size: int) -> tuple[bool, tuple[int, ...]]:
    lengths = config.get("matryoshka_dimensions", list, [])
    if not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= min(size, MAX_DIMENSIONS) for n in lengths):
        raise InvalidFileError(
            f"{config.path}: matryoshka_dimensions is {lengths!r:.80}, not a list of whole numbers from 1 to "
            f"{min(size, MAX_DIMENSIONS)}"
        )
    return config.get("is_matryoshka", bool, bool(lengths)), tuple(lengths)


def _folder_pooling(path: Path) -> tuple[PoolingKind, bool]:
    """Read the kind of pooling, and whether vectors are normalised, from the list of modules.

    A Transformer with Dense layers and no Pooling embeds each token (ColBERT). SPLADE's embedding has the size of the
    vocabulary.
    """
    parts = _modules(path)
    kinds = [kind for kind, _ in parts]
    if kinds in (["Transformer", "SpladePooling"], ["MLMTransformer", "SpladePooling"]):
        fields = Fields(read_json(file := path.parent / parts[1][1] / "config.json"), file)
        fields.choice("pooling_strategy", "max", "max")
        fields.choice("activation_function", "relu", "relu")
        return "sparse", False
    if kinds[:1] == ["Transformer"] and {"Dense"} <= set(kinds[1:]) <= {"Dense", "MultiVectorMask", "Normalize"}:
        return "all", True
    rest = kinds[2 : -1 if kinds[-1:] == ["Normalize"] else None]
    if kinds[:2] != ["Transformer", "Pooling"] or not set(rest) <= {"Dense"}:
        raise UnsupportedModelError(
            f"{path}: the modules are {', '.join(kinds) or 'missing'}; implemented: a Transformer, a Pooling, and "
            "perhaps Dense layers and a Normalize; a Transformer and Dense layers (ColBERT); a Transformer and a "
            "SpladePooling"
        )
    return _pooling_config(path.parent / parts[1][1] / "config.json"), "Normalize" in kinds


def dense_layers(files: ModelFiles, checkpoint: Checkpoint) -> tuple[Dense, ...]:
    """Read the dense layers after the pooling or, without one (ColBERT), after the transformer.

    They are folders of a sentence-transformers model, or tensors of a GGUF file.

    Raises:
        InvalidFileError, UnsupportedModelError: a layer's files are damaged, or need a feature that is not implemented.
        ModelNotFoundError: a layer's safetensors file is missing.
    """
    if files.format == "gguf":
        found = (checkpoint.tensors.get(f"dense_{number}.weight") for number in range(2, 2 + MAX_MODULES))
        return tuple(Dense(weight=_matrix(tensor)) for tensor in found if tensor is not None)
    path = files.folder / "modules.json"
    parts = _modules(path) if path.is_file() else []
    return tuple(_dense(path.parent / folder) for kind, folder in parts if kind == "Dense")


def _dense(folder: Path) -> Dense:
    fields = Fields(read_json(folder / "config.json"), folder / "config.json")
    if fields.get("use_residual", bool, False):
        raise UnsupportedModelError(f"{fields.path}: use_residual is true, which is not implemented")
    name = fields.get("activation_function", str, "torch.nn.modules.activation.Tanh")
    kinds: Mapping[str, DenseActivation] = {
        "Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu",
    }  # fmt: skip
    if (kind := name.rpartition(".")[2]) not in kinds:
        raise UnsupportedModelError(
            f"{fields.path}: activation_function is {name!r:.80}; implemented: {', '.join(kinds)}"
        )
    with open_safetensors(folder) as checkpoint:
        weight, bias = checkpoint.tensors.get("linear.weight"), checkpoint.tensors.get("linear.bias")
        sizes = fields.count("out_features", most=MAX_DIMENSIONS), fields.count("in_features", most=MAX_DIMENSIONS)
        if weight is None or tuple(weight.shape) != sizes or (bias is not None and tuple(bias.shape) != sizes[:1]):
            raise InvalidFileError(
                f"{folder}: linear.weight must have shape {list(sizes)}, and the optional linear.bias {list(sizes[:1])}"
            )
        own = None if bias is None else np.array(bias.load("F32"))
        return Dense(weight=_matrix(weight), bias=own, activation=kinds[kind])


def _matrix(stored: StoredTensor) -> NDArray[np.float32]:
    if len(stored.shape) != 2 or max(stored.shape) > MAX_DIMENSIONS:
        said = f"tensor {stored.name} has shape {list(stored.shape)}"
        raise InvalidFileError(f"{stored.path}: {said}; it must be a matrix with sides up to {MAX_DIMENSIONS}")
    return np.array(stored.load("F32"))


def _modules(path: Path) -> list[tuple[str, str]]:
    """Return class name and folder of each module."""
    value, found = read_any_json(path), list[tuple[str, str]]()
    if not isinstance(value, list) or len(value) > MAX_MODULES:
        raise InvalidFileError(f"{path}: must hold a list of at most {MAX_MODULES} modules")
    for entry in value:
        kind, folder = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(folder, str) or (folder and not _PART_FOLDER.fullmatch(folder)):
            said = "each entry must have a type, and a path that is empty or a folder beside this file"
            raise InvalidFileError(f"{path}: {said}, not {entry!r:.80}")
        found.append((kind.rpartition(".")[2], folder))
    return found


def _pooling_config(path: Path) -> PoolingKind:
    if not path.is_file():
        raise InvalidFileError(f"{path} is missing: it sets the model's pooling; download it too")
    fields = Fields(read_json(path), path)
    if not fields.get("include_prompt", bool, True):
        raise UnsupportedModelError(f"{path}: include_prompt is false, which is not implemented")
    modes = [mode for flag, mode in _OLD_FLAGS.items() if fields.get(flag, bool, False)]
    if "pooling_mode" in fields:
        modes = [fields.get("pooling_mode", str)]
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UnsupportedModelError(
            f"{path}: the pooling is {' and '.join(modes) or 'not named'}; implemented: one of {', '.join(_MODES)}"
        )
    return _MODES[modes[0]]
