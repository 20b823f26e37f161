# SPDX-License-Identifier: MIT
"""Random weights for a model of which only `config.json` exists: `load_format="dummy"`.

The result is a `Checkpoint`, so kernels, memory and step times are those of real weights; only the text is noise.

Elements of matrices have a normal distribution with standard deviation 0.02, biases are zeros, and norms and other
vectors ones, in the config's type. A tensor's elements depend on its name and device, and are generated on the device.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from candle_vllm.core.config import ModelImpl
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import ModelLoadError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor, MappedFile, closed_on_error
from candle_vllm.core.loading.weights import expand, finder
from candle_vllm.core.memory import free_memory
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.quantization.plain import ELEMENTS, convert

STD = 0.02
"""Standard deviation of the elements of a matrix, as in newly initialised models."""

_CHUNK = 1 << 18
"""Number of elements that are generated at a time."""

_NAMES = MappingProxyType({"float32": "F32", "bfloat16": "BF16", "float16": "F16"})
"""Names of weight types in config.json."""


@dataclass(frozen=True, slots=True, eq=False)
class DummyTensor(FileTensor):
    """A tensor that is in no file: elements are generated on `device`. `file` is the config; `dtype` is always set."""

    device: Device

    def tensor(self) -> Any:
        """See `MadeByTorch` in `kernels/torch_numbers.py`."""
        from candle_vllm.core.kernels.torch_numbers import normal, tensor_of

        if self.device.type == "cpu":
            return tensor_of(self.raw().view(ELEMENTS[self.type_name]).reshape(self.shape), self.type_name)
        spread, middle = self._distribution()
        return normal(self.shape, self.type_name, self.device, spread, middle, seed=zlib.crc32(self.name.encode()))

    def raw(self) -> np.ndarray:
        """See `StoredTensor.raw`; generated at each call."""
        made = np.empty(self.numel, ELEMENTS[self.type_name])
        spread, middle = self._distribution()
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        for first in range(0, made.size, _CHUNK):
            part = made[first : first + _CHUNK]
            numbers = generator.standard_normal(part.size, np.float32) if spread else np.zeros(part.size, np.float32)
            convert(numbers * np.float32(spread) + np.float32(middle), "F32", part, self.type_name)
        return made.view(np.uint8).reshape(math.prod(self.shape[:-1]), -1)

    def _distribution(self) -> tuple[float, float]:
        """Return standard deviation and mean."""
        if len(self.shape) > 1:
            return STD, 0.0
        return 0.0, 0.0 if self.name.endswith("bias") else 1.0

    def release(self) -> None:
        """Do nothing: the tensor is in no file."""


def open_dummy(config: Path, device: Device, impl: ModelImpl = "auto") -> Checkpoint:
    """Return the tensors that a model of this `config.json` would have on a device, with Hugging Face's names.

    Parts of one stored tensor (the experts of a fused tensor) are separate tensors, named by their target in the model.
    For `impl` see `family_from_hf`.

    Raises:
        ModelLoadError: the config cannot be read or its model is not implemented, as with real weights; the weights
            exceed the device's free memory; or the config requires quantised weights.
    """
    values = read_json(config)
    fields = Fields(values, config)  # transformers 5 calls the weights' type dtype, older versions torch_dtype
    type_name = _NAMES[fields.choice("dtype" if "dtype" in fields else "torch_dtype", "bfloat16", *_NAMES)]
    for key in ("quantization_config", "compression_config"):
        if values.get(key):
            raise UnsupportedModelError(
                f"{config}: load_format 'dummy' makes unquantised weights, but {key} requires quantised ones: remove "
                "the key to measure the unquantised model"
            )
    file = MappedFile(config)
    with closed_on_error([file]):
        tensors = {
            name: DummyTensor(name, shape, type_name, math.prod(shape) * ELEMENTS[type_name].itemsize, file, 0, device)
            for name, shape in _shapes(config, impl)
        }
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), free_memory(device)
        if needed > free:  # a config may claim any size
            raise ModelLoadError(
                f"{config}: the model's weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on "
                f"{device}: lower num_hidden_layers, or use a device with more memory"
            )
    return Checkpoint(config, "safetensors", [file], tensors, {})


def _shapes(path: Path, impl: ModelImpl) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the model's tensors, by building the model without memory."""
    family, config = family_from_hf(read_json(path), path, impl=impl)
    nothing = Checkpoint(path, "safetensors", (), {}, {})
    model = family.build(config, SHAPES, nothing)
    lines = [line for line in expand(family.weights, config) if line.names]
    uses = Counter(line.first for line in lines)
    find = finder(model)
    for line in lines:
        if (place := find(line.target)) is not None:
            yield line.first if uses[line.first] == 1 else line.target, place.shape
