# SPDX-License-Identifier: MIT
"""Steps in torch whose results do not depend on what else is in a step, for tests that compare tokens.

Torch guarantees no equal bits across shapes: the order of a sum depends on the CPU and on the number of rows that are
computed together, and so do the last bits of logits. If two tokens are nearly as likely, an engine that runs a request
alone may then sample another token than one that runs it in a batch, and both are correct. Here sums are computed in
float64 and rounded once: of some hundred million sums in two orders, about one differs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from candle_vllm.core.engine.runners.eager_runner import EagerRunner, EncoderRunner
from packages.core.tests.lazy_stream import LazyStream

# Functions that sum, and functions whose last bits differ between a vector's lanes and the elements after the last one.
_WIDE = (
    "addmm", "bmm", "gelu", "layer_norm", "linear", "matmul", "mean", "mm", "native_layer_norm", "rsqrt",
    "scaled_dot_product_attention", "sigmoid", "silu", "softmax", "_softmax", "sum", "tanh", "tanh_",
)  # fmt: skip
_STEPS = ((EagerRunner, "run"), (EagerRunner, "score"), (EncoderRunner, "run"), (LazyStream, "run_next"))
_KEY = "TESTING_ONLY_GenericMode"  # a dispatch key of torch; no tensor has it


@functools.cache
def _register() -> tuple[torch.library.Library, ...]:
    """Register the functions `_WIDE` for `_KEY`; return the registrations, which end with their objects.

    Each other function passes this key without entering Python. A `TorchDispatchMode` would enter it for each of them,
    although most only select a part of a tensor.
    """
    functions, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, _KEY)
    for name in _WIDE:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            functions.impl(f"{name}.{overload}".removesuffix(".default"), _widened(getattr(packet, overload)), _KEY)
    return functions, others


def _widened(func: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return a function that computes `func` in float64 if its tensors are float32."""
    below = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(_KEY))
    in_place = func._schema.name.endswith("_")

    def compute(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            if not _all_float32([*args, *kwargs.values()]):
                return func(*args, **kwargs)
            out = kwargs.pop("out", args[0] if in_place else None)
            result = func.overloadpacket(*map(_doubled, args), **{key: _doubled(kwargs[key]) for key in kwargs})
            return out.copy_(result) if out is not None else _rounded(result)

    return compute


def _all_float32(values: list[Any]) -> bool:
    """Whether all floats are float32, and no other type is requested."""
    if any(isinstance(value, torch.dtype) for value in values):
        return False
    return {x.dtype for x in values if isinstance(x, torch.Tensor) and x.is_floating_point()} == {torch.float32}


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _rounded(result: Any) -> Any:
    return result.float() if isinstance(result, torch.Tensor) else tuple(part.float() for part in result)


@contextlib.contextmanager
def exact_sums() -> Iterator[None]:
    """In this context, every step that any thread of this process runs op by op computes its sums in float64.

    These are the steps of `EagerRunner`, `EncoderRunner`, and of a `DeviceRunner` on a `LazyStream`. Compiled kernels
    guarantee their bits, and are not changed.
    """

    _register()
    key = torch._C._dispatch_key_parse(_KEY)

    def widened(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._IncludeDispatchKeyGuard(key):
                return step(*args, **kwargs)

        return run

    with contextlib.ExitStack() as patches:
        for owner, name in _STEPS:
            patches.enter_context(mock.patch.object(owner, name, widened(getattr(owner, name))))
        yield
