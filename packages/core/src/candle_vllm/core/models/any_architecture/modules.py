# SPDX-License-Identifier: MIT
"""This engine's products in place of transformers' linear layers, embedding tables and experts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.kernels.torch_numbers import load_tensor
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.weights import Loadable, Parameter
from candle_vllm.core.models.any_architecture.attention import PASS
from candle_vllm.core.models.any_architecture.experts import Experts, has_experts, replace_experts
from candle_vllm.core.models.any_architecture.products import Products, decoded


class _Weight(torch.Tensor):
    """The matrix of a replaced module, for model code that reads it: decoded when an operation uses it."""

    module: Any

    @staticmethod
    def __new__(cls, module: Any) -> _Weight:
        """Make a placeholder for the matrix of a module."""
        kind = {"dtype": module.own_dtype, "device": module.own_device}
        made: Any = torch.Tensor._make_wrapper_subclass(cls, module.stored_shape, **kind)
        made.module = module
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # pyrefly: ignore[bad-override]
        """Decode the matrix for an operation."""
        del types
        plain = lambda value: value.module.decoded() if isinstance(value, _Weight) else value  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class _Own:
    """Base class put before a module's class, so that its matrix [N, K] is one of this engine's.

    Attributes:
        own: the layer that multiplies or looks up.
        products: compiled kernels for the layer; None if torch computes.
    """

    own: Any
    transposed = False  # whether the module stores its matrix as [K, N]

    @property
    def table(self) -> Linear:
        """The `Linear` that has the matrix."""
        return self.own.table if isinstance(self.own, Embedding) else self.own

    @property
    def weight(self) -> torch.Tensor:
        """The matrix for model code that reads it; on the meta device until it is loaded."""
        if "matrices" not in self.table.__dict__:
            return torch.empty(self.stored_shape, dtype=self.own_dtype, device="meta")
        return _Weight(self)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the module gives its matrix."""
        return self.shape[::-1] if self.transposed else self.shape

    def decoded(self) -> torch.Tensor:
        """Decode the matrix, in the module's own orientation."""
        numbers = decoded(self.table.matrices, self.own_dtype, self.products)
        return numbers.T if self.transposed else numbers

    def adapters_of(self, rows: int) -> Any:
        """The adapters of a product with `rows` rows; UnsupportedModelError if these are not the step's tokens."""
        adapters, step = self.table.adapters, getattr(PASS.get(None), "step", None)
        if adapters is not None and adapters.groups and step is not None and len(step.positions) != rows:
            raise UnsupportedModelError(f"an adapter changes {type(self).__name__}, whose rows are not tokens")
        return adapters

    def become(
        self, own: Linear | Embedding, placement: Placement, shape: tuple[int, int], products: Any, parent: str
    ) -> None:
        """Replace the module's parameters by a layer of this engine, with shape [N, K]; `parent` contains it."""
        self.own, self.shape, self.products, self.parent = own, shape, products, parent
        self.own_dtype = torch.float32 if placement.shapes_only else placement.torch_dtype
        self.own_device = torch.empty(0, device="meta" if placement.shapes_only else placement.device).device
        self._parameters: dict[str, Any] = {}


class OwnLinear(_Own, torch.nn.Linear):  # `weight` is no parameter
    """`nn.Linear` over a `Linear` of this engine: x [..., K] to [..., N]."""

    @property
    def bias(self) -> Any:  # pyrefly: ignore[bad-override]
        """The bias [N], or None."""
        return self.table.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """See `nn.Linear`."""
        products, table = self.products, self.table
        if products is not None and products.ready[0] is input and self in products.ready[1]:
            return products.ready[1].pop(self)
        x = input.reshape(-1, self.shape[1])
        adapters = self.adapters_of(len(x))
        if products is None:
            return table(x).view(*input.shape[:-1], self.shape[0])
        if adapters is not None:
            y = adapters.add(table.place, x, products.multiply([table], x, torch.float32), table.bias)
            return y.to(self.own_dtype).view(*input.shape[:-1], self.shape[0])
        group = products.group(self, input)
        y = products.multiply([each.table for each in group], x, self.own_dtype)
        parts = y.split([each.shape[0] for each in group], 1)
        first, *others = (each.contiguous().view(*input.shape[:-1], each.shape[1]) for each in parts)
        if others:
            products.ready = input, dict(zip(group[1:], others, strict=True))
        return first


class OwnConv1D(OwnLinear, Conv1D):  # pyrefly: ignore[inconsistent-inheritance]
    """transformers' `Conv1D`, which stores its matrix transposed, over a `Linear` of this engine."""

    transposed = True


class OwnEmbedding(_Own, torch.nn.Embedding):
    """`nn.Embedding` over an `Embedding` of this engine: ids [...] to rows [..., K]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """See `nn.Embedding`."""
        ids, own = input.reshape(-1), self.own
        adapters = self.adapters_of(len(ids))
        if self.products is None:
            return own(ids).view(*input.shape, self.shape[1])
        rows = self.products.take(own.table.matrices[0], ids, self.own_dtype if adapters is None else torch.float32)
        rows = rows if adapters is None else adapters.look_up(own.place, ids, rows).to(self.own_dtype)
        return rows.view(*input.shape, self.shape[1])


class PlainTensor:
    """A parameter or buffer `name` that stays in its module and keeps its type, as a layer with one part, "tensor"."""

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
        """The only part."""
        return {"tensor": _PlainParameter(self._tensor.detach())}


class _PlainParameter(TensorParameter):
    """A tensor of torch of any type."""

    def fill(self, stored: Any) -> str | None:
        """Decode the tensor and copy it."""
        if self._tensor.is_floating_point():
            return super().fill(stored)
        self._tensor.copy_(load_tensor(stored, None))
        return None


_BASES: Mapping[Any, Any] = {torch.nn.Linear: OwnLinear, torch.nn.Embedding: OwnEmbedding, Conv1D: OwnConv1D}


def _base_of(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """`type(module)` if it is in `_BASES`, or its base there whose `forward` its own calls; None for other modules."""
    kind = type(module)
    if kind in _BASES:
        return kind
    base = next((base for base in _BASES if isinstance(module, base)), None)
    calls = base is not None and "super().forward(" in inspect.getsource(kind.forward)
    return base if calls else None


def replace_products(
    model: torch.nn.Module, placement: Placement, tied: Mapping[str, str], products: Products | None
) -> tuple[dict[str, Loadable], dict[str, Experts]]:
    """Replace linear layers, embedding tables and experts of a model on the meta device by layers of this engine.

    `tied` has for each tied parameter the name of the parameter that it shares; `products` is None if torch computes.
    The first result maps names of modules to layers, and "module.parameter" to other modules' parameters and stored
    buffers and to matrices of experts; the second has only these matrices.
    """
    parts: dict[str, Loadable] = {}
    experts: dict[str, Experts] = {}
    tables: dict[str, Linear] = {}
    found = [(name, module, _base_of(module)) for name, module in model.named_modules()]
    modules: list[tuple[str, Any, Any]] = [each for each in found if each[2] is not None]
    for name, module, base in sorted(modules, key=lambda item: item[2] is not torch.nn.Embedding):  # tables first
        rows, columns = shape = tuple(module.weight.shape[::-1] if base is Conv1D else module.weight.shape)
        source = tied.get(f"{name}.weight", "").removesuffix(".weight")
        if base is torch.nn.Embedding:
            parts[name] = own = Embedding(rows, columns, placement)
            tables[name] = own.table
        elif source in tables and module.bias is None:
            own = tables[source]
        else:
            parts[name] = own = Linear(columns, rows, placement, bias=module.bias is not None)
        kind, mine = type(module), _BASES[base]  # a subclass calls this engine's method wherever it calls its base's
        module.__class__ = mine if kind is base else type(f"Own{kind.__name__}", (kind, mine), {})
        module.become(own, placement, shape, products, name.rpartition(".")[0])
    for name, module in model.named_modules():
        if has_experts(module):
            experts |= {f"{name}.{part}": each for part, each in replace_experts(module, placement, products).items()}
    parts |= {name: each.linear for name, each in experts.items()}
    for name, module in model.named_modules():
        for part in [*module._parameters, *module._buffers]:
            if getattr(module, part) is not None and part not in module._non_persistent_buffers_set:
                path = f"{name}.{part}" if name else part
                if path not in tied:
                    parts[path] = PlainTensor(module, part, placement)
    for path, source in tied.items():
        owner, _, part = path.rpartition(".")
        if source in parts and not isinstance(model.get_submodule(owner), _Own):  # if neither was replaced
            setattr(model.get_submodule(owner), part, model.get_parameter(source))
    return parts, experts
