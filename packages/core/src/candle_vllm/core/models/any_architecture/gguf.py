# SPDX-License-Identifier: MIT
"""GGUF files by transformers' own tables: a config from the metadata, and tensors under the names of parameters.

A table defines how the values of a tensor differ from those of the parameter. If only the order of rows differs, the
tensor stays quantised; a table that changes values or the order of columns is applied to decoded values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers.integrations.gguf as newer
import transformers.modeling_gguf_pytorch_utils as older
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed, entry
from candle_vllm.core.models.any_architecture.experts import Experts
from candle_vllm.core.models.any_architecture.trial import without_memory
from candle_vllm.core.models.any_architecture.weights import named_for
from candle_vllm.core.quantization.tensors import StoredTensor

_MORE = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
"""Sizes that transformers' tables do not read, by their metadata keys; without them a config has its defaults."""

_TABLES = frozenset({*newer.GGUF_CONFIG_ARCHS, *filter(CONFIG_MAPPING.__contains__, older.GGUF_CONFIG_MAPPING)})
_TEXT = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}  # model types for files with the text model only


def reads_gguf(name: str) -> bool:
    """Whether transformers has a table for GGUF files of an architecture."""
    return _table(name) in _TABLES


def _table(name: str) -> str:
    """The name of transformers' table for an architecture."""
    return {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}.get(name, name.replace("-", "_"))


def config_values(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The contents of a `config.json` for a GGUF file of the architecture `name`; errors as in `family_of_gguf`."""
    path, kind = checkpoint.path, _table(name)
    if kind not in _TABLES:
        raise UnsupportedModelError(
            f"{path}: transformers reads no GGUF of architecture {name!r:.80}; it reads {', '.join(sorted(_TABLES))}"
        )
    values: dict[str, Any] = {"model_type": _TEXT.get(kind, kind), **older.GGUF_CONFIG_DEFAULTS_MAPPING.get(kind, {})}
    if name in newer.GGUF_CONFIG_ARCHS:
        try:
            values = newer.get_gguf_config(newer.read_gguf_metadata(str(path))[0], tuple(checkpoint.tensors))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidFileError(f"{path}: transformers cannot read its metadata: {error!s:.200}") from error
    else:
        table = older.GGUF_CONFIG_MAPPING[kind]
        said = {named: checkpoint.metadata.get(f"{name}.{key}") for key, named in table.items()}
        values |= {named: value for named, value in said.items() if isinstance(named, str) and value is not None}
    if isinstance(values.get("scoring_func"), int):
        if not 0 <= values["scoring_func"] < 3:
            raise UnsupportedModelError(f"{path}: expert_gating_func {values['scoring_func']} is not implemented")
        values["scoring_func"] = ("none", "softmax", "sigmoid")[values["scoring_func"]]
    scaling = checkpoint.metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" and not any(values.get(key) for key in ("rope_scaling", "rope_parameters")):
        raise UnsupportedModelError(
            f"{path}: transformers does not read {name}.rope.scaling.type, which is {scaling!r}"
        )
    tied = "output.weight" not in checkpoint.tensors or kind in ("falcon", "bloom")
    table = checkpoint.tensors.get("token_embd.weight")
    sizes = {} if table is None else {"vocab_size": table.shape[0]}  # the table may have more rows than tokens
    known = vars(CONFIG_MAPPING[values["model_type"]]())
    for key, named in _MORE.items():
        size = checkpoint.metadata.get(f"{name}.{key}")
        if isinstance(size, int) and named in known:
            sizes[named] = size
    return values | {"tie_word_embeddings": tied} | sizes


def named_in_gguf(
    name: str, model: Any, shapes: Mapping[str, tuple[int, ...]], experts: Mapping[str, Experts], checkpoint: Checkpoint
) -> Checkpoint:
    """The tensors of a GGUF file under the names of parameters; arguments as in `named_for`."""
    if name in newer.GGUF_ARCHS:
        return named_for(model, shapes, experts, checkpoint, newer.get_gguf_conversion_mapping(name, model.config))
    processor = older.TENSOR_PROCESSORS.get(name, older.TensorProcessor)(config=model.config.to_dict())
    import gguf as package

    if not hasattr(package.get_tensor_name_map, "cache_info"):  # transformers makes the same map for each module
        package.get_tensor_name_map = functools.cache(package.get_tensor_name_map)
    names = older.get_gguf_hf_weights_map(without_memory(model.config, None, torch.float32), processor)
    found, orders = dict[str, StoredTensor](), dict[Any, Any]()
    for each, stored in checkpoint.tensors.items():
        target = names.get(each) or names.get(each.removesuffix(".weight"))
        if target is None or target not in shapes:
            found[each] = stored  # the loader reports it as unexpected
        elif target in experts:
            found |= dict(_of_experts(target, experts[target], each, stored))
        else:
            kind = re.sub(r"^blk\.\d+\.", "", each), stored.shape
            if kind not in orders:
                orders[kind] = _change(processor, each, stored.shape)
            found[target] = _changed(processor, each, stored, orders[kind])
    return checkpoint.with_tensors(found)


def _of_experts(target: str, of: Experts, name: str, stored: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Split a tensor of all experts, which has one piece or all pieces of each; a misshapen piece is left out."""
    piece = next((piece for piece in of.pieces if f".ffn_{piece}_exps." in name), None)
    if piece is None:
        yield from of.split(target, stored)
    elif len(stored.shape) == 3 and stored.shape[0] == of.count:
        yield from ((f"{target}.{expert}.{piece}", entry(stored, expert)) for expert in range(of.count))


def _process(processor: Any, name: str, values: np.ndarray) -> np.ndarray:
    """Compute the values of a parameter from those of a stored tensor."""
    given: dict[str, Any] = {"tensors": {}}
    made = processor.process(weights=values, name=name, tensor_key_mapping={}, parsed_parameters=given)
    return values if made.name is None else made.weights  # a tensor without a name is stored as it is


def _change(processor: Any, name: str, shape: tuple[int, ...]) -> np.ndarray | tuple[int, ...] | None:
    """How a parameter differs from its stored tensor: the order of rows, the shape of changed values, or None.

    None means no difference. A matrix that is only transposed counts as unchanged: layers need it as files store it.
    """
    numbers = np.arange(shape[0] if shape else 1, dtype=np.int32)
    numbers = np.broadcast_to(numbers.reshape(-1, *[1] * (len(shape) - 1)), shape)
    with np.errstate(all="ignore"):
        made = np.asarray(_process(processor, name, numbers))
    if made is numbers or (made.shape == shape and np.array_equal(made, numbers)):
        return None
    if len(shape) == 2 and made.shape == shape[::-1] and np.array_equal(made.T, numbers):
        return None
    flat = made.reshape(len(made), -1)
    rows = made.shape == shape and made.dtype == np.int32 and bool((flat == flat[:, :1]).all())
    if rows and np.array_equal(np.sort(flat[:, 0]), np.arange(len(flat))):
        return flat[:, 0].astype(np.int64)
    return made.shape


def _changed(processor: Any, name: str, stored: StoredTensor, change: Any) -> StoredTensor:
    """Apply `change` to a stored tensor, so that it equals the parameter."""
    if change is None:
        return stored
    if isinstance(change, np.ndarray):
        return stored.select(change)
    return computed(stored, change, lambda values: _process(processor, name, values), "F32")
