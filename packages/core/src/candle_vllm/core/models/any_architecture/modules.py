# SPDX-License-Identifier: MIT
"""This engine's products in the places of transformers' linear layers and embedding tables."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Loadable, Parameter


class _Own:
    """What is put before a module's class, so that its matrix [N, K] is one of this engine's.

    Attributes:
        own: what multiplies, or is looked up.
    """

    own: Any

    @property
    def table(self) -> Linear:
        """The matrix, as a layer."""
        return self.own.table if isinstance(self.own, Embedding) else self.own

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [N, K] as plain numbers, for model code that looks at it; before it is filled without memory."""
        if "matrices" not in self.table.__dict__:
            return torch.empty(self.shape, dtype=self.own_dtype, device="meta")
        (matrix,) = self.table.matrices
        return matrix.decoded(self.own_dtype)

    def become(self, own: Linear | Embedding, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        """Takes the layer of this engine, for activations of a type; the module's own parameters go."""
        self.own, self.own_dtype, self.shape = own, dtype, shape
        self._parameters: dict[str, Any] = {}


class OwnLinear(_Own, torch.nn.Linear):  # type: ignore[misc]  # `weight` is no parameter
    """`nn.Linear` by a `Linear`: x [..., K] to [..., N]."""

    @property
    def bias(self) -> Any:
        """The bias [N]; None without a bias."""
        return self.table.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """See `nn.Linear`."""
        x = input
        if x.is_meta:
            return x.new_empty(*x.shape[:-1], self.shape[0])
        return self.table(x.reshape(-1, self.shape[1])).view(*x.shape[:-1], self.shape[0])


class OwnEmbedding(_Own, torch.nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding` by an `Embedding`: ids [...] to rows [..., K]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """See `nn.Embedding`."""
        ids = input
        if ids.is_meta:
            return torch.empty(*ids.shape, self.shape[1], dtype=self.own_dtype, device=ids.device)
        return self.own(ids.reshape(-1)).view(*ids.shape, self.shape[1])


def _own_class(kind: type[torch.nn.Module], own: type[Any]) -> type[Any]:
    """A class by which a module of `kind` calls `own` wherever it would call torch's."""
    base = own.__mro__[2]
    return own if kind is base else type(f"Own{kind.__name__}", (kind, own), {})


class PlainTensor:
    """A parameter or buffer that stays transformers' own, as a layer with one part, "".

    Args:
        module, name: where it is.
        placement: where it goes; it keeps its type.
    """

    def __init__(self, module: torch.nn.Module, name: str, placement: Placement) -> None:
        tensor = getattr(module, name)
        if not placement.shapes_only:
            tensor = torch.empty_like(tensor, device=placement.device)
            if name in module._parameters:
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[name] = tensor
        self._tensor = tensor

    def parameters(self) -> Mapping[str, Parameter]:
        """The one part."""
        return {"tensor": _PlainParameter(self._tensor.detach())}


class _PlainParameter(TensorParameter):
    """A tensor of torch whatever its type."""

    def fill(self, stored: Any) -> str | None:
        """Decodes the tensor and copies it."""
        if self._tensor.is_floating_point():
            return super().fill(stored)
        from candle_vllm.core.kernels.torch_numbers import load_tensor

        self._tensor.copy_(load_tensor(stored, None))
        return None


def _multiplies(module: torch.nn.Module) -> bool:
    """Whether it does what torch's linear layer or embedding table does, and perhaps more around it."""
    kind = type(module)
    if kind in (torch.nn.Linear, torch.nn.Embedding):
        return True
    return isinstance(module, torch.nn.Embedding) and "super().forward(" in inspect.getsource(kind.forward)


def replace_products(model: torch.nn.Module, placement: Placement, tied: Mapping[str, str]) -> dict[str, Loadable]:
    """Put this engine's layers in the places of linear layers and embedding tables.

    Args:
        model: of transformers, without memory.
        placement: where the layers go.
        tied: names of parameters by the names of those that are the same.

    Returns:
        every layer with parameters by its module's name, the parts of a module that stays as "module.parameter".
    """
    dtype = torch.float32 if placement.shapes_only else placement.torch_dtype
    parts: dict[str, Loadable] = {}
    tables: dict[str, Linear] = {}
    modules: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if _multiplies(module)]
    for name, module in sorted(modules, key=lambda item: isinstance(item[1], torch.nn.Linear)):  # tables come first
        rows, columns = shape = module.weight.shape[0], module.weight.shape[1]
        source = tied.get(f"{name}.weight", "").removesuffix(".weight")
        if isinstance(module, torch.nn.Embedding):
            parts[name] = own = Embedding(rows, columns, placement)
            tables[name] = own.table
        elif source in tables and module.bias is None:
            own = tables[source]
        else:
            parts[name] = own = Linear(columns, rows, placement, bias=module.bias is not None)
        kind = OwnEmbedding if isinstance(module, torch.nn.Embedding) else OwnLinear
        module.__class__ = _own_class(type(module), kind)
        replaced: Any = module
        replaced.become(own, dtype, shape)
    for name, module in model.named_modules():
        for part in [*module._parameters, *module._buffers]:
            if getattr(module, part) is not None and part not in module._non_persistent_buffers_set:
                path = f"{name}.{part}" if name else part
                if path not in tied:
                    parts[path] = PlainTensor(module, part, placement)
    for path, source in tied.items():
        owner, _, part = path.rpartition(".")
        if source in parts and not isinstance(model.get_submodule(owner), _Own):  # where neither is this engine's
            setattr(model.get_submodule(owner), part, model.get_parameter(source))
    return parts
