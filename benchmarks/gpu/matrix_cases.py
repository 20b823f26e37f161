# SPDX-License-Identifier: MIT
"""What matrices are measured on: plain, GGUF and grouped weights, and mixtures of experts. See `cases.py`.

`torch` among the peers is torch's own product with the same weights in bfloat16.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import BF16, Case, Plan, Planned
from torch.nn.functional import linear as torch_linear

from candle_vllm.core.kernels import gguf_linear
from candle_vllm.core.kernels import linear as plain_linear
from candle_vllm.core.kernels.gguf_linear import reference as gguf_reference
from candle_vllm.core.kernels.gguf_linear.layout import PLANES, GgufMatrix
from candle_vllm.core.kernels.packed_linear.layout import PackedKind

MATRICES = {  # rows x columns
    "8B gate, up": (28672, 4096),
    "8B o": (4096, 4096),
    "8B down": (4096, 14336),
    "0.6B gate, up": (6144, 1024),
}
PLAIN_MATRICES = {"8B qkv": (6144, 4096), "8B head": (128256, 4096)}
"""Besides those; what the products of a plain 8B are, is these five."""

EXPERTS = {"30B-A3B": (128, 8, 2048, 768)}
"""Experts X, those of a token k, hidden E, inner F."""

_USUAL = ("Q4_K", "Q6_K", "Q8_0")


def kernel_exists(name: str) -> bool:
    """Whether `candle_vllm.core.kernels` has a kernel or module of that name."""
    return importlib.util.find_spec(f"candle_vllm.core.kernels.{name}") is not None


def matrices(plan: Plan) -> dict[str, tuple[int, int]]:
    """Those of the plan."""
    return {"toy": (96, 512)} if plan.quick else MATRICES


# ---- plain -----------------------------------------------------------------------------------------------------------


def linear_cases(plan: Plan) -> Iterator[Planned]:
    """Whatever serves by default, our own kernel, and the one whose rows do not depend on each other."""
    kinds: dict[str, Callable[..., torch.Tensor]] = {"linear": plain_linear.linear}
    if plan.device == "cuda":
        own = importlib.import_module("candle_vllm.core.kernels.linear.triton")
        kinds["linear, own"] = own.linear
    kinds["linear, invariant"] = functools.partial(plain_linear.linear, invariant=True)
    for name, (rows, columns) in (matrices(plan) | ({} if plan.quick else PLAIN_MATRICES)).items():
        for tokens in plan.sizes(1, 8, 16, 64, 512, 4096):
            for kind, function in kinds.items():
                build = functools.partial(_linear, plan, function, rows, columns, tokens)
                yield Planned(kind, f"{name} T={tokens}", build)


def _linear(plan: Plan, function: Callable[..., torch.Tensor], rows: int, columns: int, tokens: int) -> Case:
    x = plan.normal(tokens, columns)
    weights = plan.copies(2 * rows * columns, lambda: plan.normal(rows, columns) * 0.02)
    return Case(
        [functools.partial(function, x, weight) for weight in weights],
        lambda: x.float() @ weights[0].float().T,
        2 * (rows * columns + tokens * (rows + columns)),
        2 * tokens * rows * columns,
        peers={"torch": [functools.partial(torch_linear, x, weight) for weight in weights]},
        rows_alone=lambda: _row_alone(lambda rows: function(rows, weights[0]), x),
    )


def _row_alone(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    middle = len(x) // 2
    return torch.equal(function(x)[middle], function(x[middle : middle + 1])[0])


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_cases(plan: Plan) -> Iterator[Planned]:
    """The usual types at every matrix, the others at one."""
    kinds = [kind for kind in PLANES if not plan.quick or kind.name in ("Q4_K", "Q8_0")]
    for kind in sorted(kinds, key=lambda kind: (kind.name not in _USUAL, kind)):
        for name, (rows, columns) in list(matrices(plan).items())[: None if kind.name in _USUAL else 1]:
            for tokens in plan.sizes(1, 8, 16, 64, 512, 4096):
                at = f"{kind.name} {name} T={tokens}"
                build = functools.partial(_gguf, plan, kind, rows, columns, tokens)
                yield Planned("gguf_linear", at, build)
                if kind.name == "Q4_K":
                    yield Planned("gguf_linear, invariant", at, functools.partial(build, invariant=True))
        build = functools.partial(_gguf_rows, plan, kind, *next(iter(matrices(plan).values())), 64)
        yield Planned("gguf embedding", f"{kind.name} T=64", build)


def _gguf(plan: Plan, kind: PackedKind, rows: int, columns: int, tokens: int, **options: Any) -> Case:
    x = plan.normal(tokens, columns)
    first = random_gguf(kind, rows, columns, plan.device)
    packed = [first, *plan.copies(first.nbytes, lambda: random_gguf(kind, rows, columns, plan.device))[1:]]
    plain = gguf_reference.dequantise(first).to(BF16)
    dense = plan.copies(plain.nbytes, plain.clone)
    return Case(
        [functools.partial(gguf_linear.linear, x, matrix, **options) for matrix in packed],
        lambda: x.float() @ gguf_reference.dequantise(first).T,
        first.nbytes + 2 * tokens * (rows + columns),
        2 * tokens * rows * columns,
        peers={"torch": [functools.partial(torch_linear, x, weight) for weight in dense]},
        rows_alone=lambda: _row_alone(lambda rows: gguf_linear.linear(rows, first, **options), x),
    )


def _gguf_rows(plan: Plan, kind: PackedKind, rows: int, columns: int, tokens: int) -> Case:
    matrix = random_gguf(kind, rows, columns, plan.device)
    ids = torch.randint(0, rows, (tokens,), device=plan.device)
    return Case(
        [functools.partial(gguf_linear.embedding, ids, matrix, BF16)],
        lambda: gguf_reference.dequantise(matrix)[ids],
        tokens * (2 * columns + matrix.nbytes // rows),
    )


def random_gguf(kind: PackedKind, rows: int, columns: int, device: torch.device | str) -> GgufMatrix:
    """Random codes; scales such that weights are small."""
    found = PLANES[kind].empty(rows, columns, torch.device(device))

    def halves(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, device=device) * 0.01 + 0.001).half().view(torch.int32)

    for name in ("low", "high", "scales"):
        plane = found[name]
        if plane is not None:
            plane.view(torch.uint8).random_(0, 256)
    floats = found["scales"] if found["supers"] is None else found["supers"]
    assert floats is not None
    floats.copy_(halves(*floats.shape[:-1], 2 * rows))
    return GgufMatrix(rows, columns, kind, **found)  # pyrefly: ignore[bad-argument-type]  # the names are its own


# ---- groups of 4 and 8 bits ------------------------------------------------------------------------------------------


def group_cases(plan: Plan) -> Iterator[Planned]:
    """4 and 8 bits in groups of 128 with zero points."""
    for bits in (4, 8):
        for name, (rows, columns) in matrices(plan).items():
            for tokens in plan.sizes(1, 16, 64, 512, 4096):
                build = functools.partial(_group, plan, bits, rows, columns, tokens)
                yield Planned("group_linear", f"{bits} bits {name} T={tokens}", build)


def _group(plan: Plan, bits: int, rows: int, columns: int, tokens: int) -> Case:
    kernel = importlib.import_module("candle_vllm.core.kernels.group_linear")
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, device=plan.device)
    groups = columns // 128
    scales = (torch.rand(rows, groups, device=plan.device) * 0.01 + 0.001).to(BF16)
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, device=plan.device)
    x = plan.normal(tokens, columns)
    nbytes = rows * columns * bits // 8 + 3 * rows * groups
    packed = plan.copies(nbytes, lambda: kernel.pack(codes, scales, zeros, bits, plan.device))

    def wanted() -> torch.Tensor:
        shifted = codes.float().unflatten(1, (groups, 128)) - zeros.float()[:, :, None]
        return x.float() @ (shifted * scales.float()[:, :, None]).flatten(1).T

    return Case(
        [functools.partial(kernel.linear, x, matrix, None) for matrix in packed],
        wanted,
        nbytes + 2 * tokens * (rows + columns),
        2 * tokens * rows * columns,
    )


# ---- experts ---------------------------------------------------------------------------------------------------------


def moe_cases(plan: Plan) -> Iterator[Planned]:
    """Routing, and the experts' products."""
    for name, sizes in ({"toy": (8, 2, 64, 32)} if plan.quick else EXPERTS).items():
        for tokens in plan.sizes(1, 8, 64, 512, 4096):
            yield Planned("moe route", f"{name} T={tokens}", functools.partial(_route, plan, sizes, tokens))
            yield Planned("moe", f"{name} T={tokens}", functools.partial(_moe, plan, sizes, tokens))


def _route(plan: Plan, sizes: tuple[int, int, int, int], tokens: int) -> Case:
    from candle_vllm.core.kernels.moe import Routing, route

    experts, chosen = sizes[:2]
    logits = plan.normal(tokens, experts, dtype=torch.float32)

    def wanted() -> tuple[torch.Tensor, torch.Tensor]:
        weights, numbers = logits.softmax(1).topk(chosen, dim=1)
        return weights / weights.sum(1, keepdim=True), numbers

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        pairs = route(logits, Routing(top_k=chosen))
        return pairs.weights, pairs.experts

    return Case([run], wanted, tokens * (4 * experts + 8 * chosen), tolerance=1e-5)


def _moe(plan: Plan, sizes: tuple[int, int, int, int], tokens: int) -> Case:
    from candle_vllm.core.kernels.matrices import TensorMatrix
    from candle_vllm.core.kernels.moe import Pairs, combine, expert_linear

    count, chosen, hidden, inner = sizes
    x = plan.normal(tokens, hidden)
    gate_up, down = plan.normal(count, 2 * inner, hidden) * 0.02, plan.normal(count, hidden, inner) * 0.02
    weights, experts = torch.rand(tokens, count, device=plan.device).softmax(1).topk(chosen, dim=1)
    experts = experts.int()

    def wanted() -> torch.Tensor:
        y = torch.zeros(tokens, hidden, device=plan.device)
        for expert in range(count):
            at, slot = (experts == expert).nonzero(as_tuple=True)
            gate, up = (x[at].float() @ gate_up[expert].float().T).chunk(2, dim=1)
            rows = (torch.nn.functional.silu(gate) * up) @ down[expert].float().T
            y.index_add_(0, at, rows * weights[at, slot, None])
        return y

    matrices = [TensorMatrix(data.flatten(0, 1)) for data in (gate_up, down)]

    def run() -> torch.Tensor:
        pairs = Pairs(weights, experts, count)
        inner_rows = expert_linear(x, matrices[:1], pairs, activation="silu")
        return combine(expert_linear(inner_rows, matrices[1:], pairs), pairs, x.dtype)

    touched = len(experts.unique())
    return Case(
        [run],
        wanted,
        6 * touched * hidden * inner + 4 * tokens * hidden,
        6 * tokens * chosen * hidden * inner,
    )
