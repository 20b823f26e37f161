# SPDX-License-Identifier: MIT
"""Find the quantised layers of a checkpoint; each format's module has a function `layers` that reads them.

`loading/quantised.py` collects these modules by their `METHODS`, the values of `quant_method` that they read, and by
their `FILES`, names of files beside `config.json` in which older writers store the settings of `METHODS[0]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from candle_vllm.core.fields import Fields
from candle_vllm.core.quantization.stored import FLOATS, LayerTensors, QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor

Found: TypeAlias = Iterator[tuple[LayerTensors, QuantisedTensor]]  # the parts of each layer, and its weight


class StoredTensors(Protocol):
    """A checkpoint's tensors by name, and the path that errors name."""

    tensors: Mapping[str, StoredTensor]
    path: Path


def layers_with(stored: StoredTensors, *ends: str) -> Iterator[LayerTensors]:
    """Yield the layers that have a tensor whose name ends with one of these suffixes."""
    seen: set[str] = set()
    for name in stored.tensors:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None and (layer := name.removesuffix(end)) not in seen:
            seen.add(layer)
            yield LayerTensors(stored.tensors, layer, stored.path)


def is_dense(stored: StoredTensors, layer: str) -> bool:
    """Whether the weight of a layer is stored in F16, BF16 or F32; scales of such a layer are not used."""
    weight = stored.tensors.get(f"{layer}.weight")
    return weight is not None and weight.type_name in FLOATS


def group_size(config: Fields, default: int | None = None, key: str = "group_size") -> int:
    """Read the number of inputs in a group; -1 means all inputs."""
    known = () if default is None else (default,)
    return -1 if config.get(key, int, *known) == -1 else config.count(key, *known)
