# SPDX-License-Identifier: MIT
"""An adapter's tensors grouped by module, and operations on them that need no model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.adapter_base import decoded
from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.lora import Delta
from candle_vllm.core.loading.adapters import StoredAdapter
from candle_vllm.core.loading.views import computed
from candle_vllm.core.quantization.tensors import StoredTensor

_KINDS = (
    ("lora_A.weight", "a"), ("lora_B.weight", "b"), ("lora_B.bias", "bias of b"), ("lora_embedding_A", "table a"),
    ("lora_embedding_B", "table b"), ("lora_magnitude_vector", "magnitude"), ("lora_a", "a"), ("lora_b", "b"),
    ("lora_magnitude_vector.weight", "magnitude"), ("token_adapter.trainable_tokens_delta", "tokens"),
    ("base_layer.weight", "copy"), ("base_layer.bias", "bias"), ("bias", "bias"), ("weight", "full"),
)  # fmt: skip
"""Suffixes of tensor names, and the kind of tensor for each."""
_NAMED = tuple(f".{end.partition('.')[0]}." for end, _ in _KINDS if end.startswith("lora_"))

Parts: TypeAlias = dict[str, StoredTensor]
"""Tensors of a module by kind."""


def refuse(stored: StoredAdapter, name: str, why: str) -> NoReturn:
    """Raise AdapterError for a tensor."""
    raise AdapterError(f"{stored.path}: tensor {name!r:.300}: {why}")


def modules_of(stored: StoredAdapter) -> dict[str, Parts]:
    """Group an adapter's tensors by module, and by kind."""
    found: defaultdict[str, Parts] = defaultdict(dict)
    for name, tensor in stored.tensors.items():
        plain = name
        for marker in _NAMED:
            plain = plain.replace(f"{marker}default", marker.rstrip("."))  # some tools save names in this form
        end, kind = next(((end, kind) for end, kind in _KINDS if plain.endswith(f".{end}")), ("", ""))
        if not kind:
            refuse(stored, name, "it is not a known part of an adapter")
        module = plain.removesuffix(f".{end}")
        if kind in found[module]:
            refuse(stored, name, "it appears twice")
        found[module][kind] = tensor
    return dict(found)


@np.errstate(over="ignore", invalid="ignore")  # infinite elements are refused below
def norm_of(stored: StoredAdapter, deltas: Mapping[str, Mapping[str, Delta]]) -> float:
    """Return the Frobenius norm of all s B A; ||B A||^2 sums the elements of (B^T B) * (A A^T). Refuse inf and NaN."""
    total, last, products = 0.0, None, np.empty((0, 0))
    for delta in (delta for each in deltas.values() for delta in each.values()):
        if delta.full is not None and not _finite(delta.full):
            refuse(stored, delta.full.name, "it has elements that are not finite")
        if delta.a is None or delta.b is None:
            continue
        if delta.a is not last:
            a = delta.a.load("F32")
            last, products = delta.a, a @ a.T
        b = delta.b.load("F32")
        of_b = b.T @ b
        for tensor, product in ((delta.a, products), (delta.b, of_b)):
            if not math.isfinite(float(np.trace(product))):
                refuse(stored, tensor.name, "it has elements that are not finite, or beyond 1e19")
        total += delta.scale**2 * float(np.vdot(products.astype(np.float64), of_b))
    return math.sqrt(max(total, 0.0))


def unwrapped(module: str) -> tuple[str, int]:
    """Return a module without PEFT's wrappers (`.base_layer`), and their number."""
    plain = module
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    return plain, module.removeprefix(plain).count(".base_layer")


def picked(stored: StoredTensor, rows: NDArray[np.int64]) -> StoredTensor:
    """Select rows of B; a range of rows stays a view of the file."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    if last - first != len(rows) or not np.array_equal(rows, np.arange(first, last)):
        return stored.select(rows)
    return stored if last - first == stored.shape[0] else stored.rows(first, last)


def turned(stored: StoredTensor) -> StoredTensor:
    """Transpose a matrix."""
    return computed(stored, stored.shape[::-1], lambda values: values.T)


def _finite(stored: StoredTensor) -> bool:
    if len(stored.shape) < 2:
        return bool(np.isfinite(stored.load("F32")).all())
    return all(np.isfinite(rows).all() for _, rows in decoded(stored))
