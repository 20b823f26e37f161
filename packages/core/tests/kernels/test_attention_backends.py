# SPDX-License-Identifier: MIT
"""Choosing what computes attention, and what FlashAttention is told, by stand-ins that compute what it documents."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.attention.varlen as varlen

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.attention import backend as contract
from candle_vllm.core.kernels.attention import flash_attn, reference, torch_flash
from candle_vllm.core.kernels.attention.backend import AttentionNeeds, Backend
from candle_vllm.core.kernels.attention.backends import choose, choose_latent
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows

HOPPER = AttentionNeeds(capability=(9, 0), dtype=torch.bfloat16, head_dim=128, block_size=256)
PACKAGES = {"triton": False, "flash_attn.cute": False, "flash_attn_2_cuda": False, "flash_attn_interface": False}


def change(**fields) -> AttentionNeeds:
    return dataclasses.replace(HOPPER, **fields)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Which packages this machine has; a test changes it."""
    found = dict(PACKAGES)
    for module in (contract, flash_attn, torch_flash):
        monkeypatch.setattr(module, "installed", found.__getitem__)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.3.post1")
    return found


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch, packages: dict[str, bool]) -> ModuleType:
    """The reference in the place of the Triton kernels, so that nothing needs triton."""
    module = ModuleType("candle_vllm.core.kernels.attention.triton")

    def paged_attention(q, key_cache, value_cache, rows, **options):
        assert rows.decodes == len(q) == len(rows.context_lens)
        out = torch.zeros_like(q)  # as it must be for fillers
        used = int((rows.context_lens > 0).sum())
        first = AttentionRows(tuple(range(used + 1)), tuple(rows.context_lens[:used].tolist()), rows.block_tables)
        out[:used] = reference.paged_attention(q[:used], key_cache, value_cache, first, **options)
        return out

    module.paged_attention = paged_attention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["candle_vllm.core.kernels.attention"], "triton", module, raising=False)
    packages["triton"] = True
    return module


# ---- choosing --------------------------------------------------------------------------------------------------------


def test_auto_is_triton_on_a_gpu_and_the_reference_elsewhere(triton_kernels: ModuleType) -> None:
    gpu, cpu = choose("auto", HOPPER), choose("auto", change(capability=None))
    assert (gpu.name, gpu.capturable) == ("triton", True)
    assert gpu.attend is triton_kernels.paged_attention
    assert (cpu.name, cpu.capturable) == ("torch", False)
    assert choose("torch", HOPPER).name == "torch"


@pytest.mark.parametrize(
    ("name", "needs", "reason", "works"),
    [
        ("triton", change(capability=(7, 0)), "compute capability 7.5", "'torch'"),
        ("triton", change(capability=(7, 5)), "bf16 needs compute capability 8.0", "'torch'"),
        ("torch_flash", change(capability=(7, 5), dtype=torch.float16), "8.0", "'triton'"),
        ("triton", change(capability=(7, 5), dtype=torch.float16, cache_dtype="fp8"), "8.9", "'torch'"),
        ("auto", change(head_dim=640), "head size of at most 512, not 640", "'torch'"),
        (
            "triton",
            change(capability=(7, 5), dtype=torch.float16, head_dim=512),
            "8.0 for head sizes above 256",
            "'torch'",
        ),
        ("triton", change(block_size=8), "block_size is 8", "block_size=16"),
        ("triton", change(capability=(8, 6), cache_dtype="fp8"), "8.9", "'torch'"),
        ("triton", change(dtype=torch.float64), "float64", "'torch'"),
        ("triton", change(dtype=torch.float64, deterministic=True), "float64", "without 'deterministic'"),
        ("triton", change(capability=None), "needs a GPU", "'auto' or 'torch'"),
        ("torch_flash", change(soft_caps=True), "no soft cap", "'triton'"),
        ("torch_flash", change(sinks=True), "not support attention sinks", "'triton'"),
        ("flash_attn", change(sinks=True), "not support attention sinks", "'triton'"),
        ("flash_attn", change(slopes=True), "ALiBi", "'triton'"),
        ("torch_flash", change(dtype=torch.float32), "float32", "'triton'"),
        ("torch_flash", change(deterministic=True), "'deterministic'", "'triton'"),
        ("torch_flash", change(capability=(7, 0)), "8.0", "'torch'"),
        ("flash_attn", HOPPER, "flash-attn-4: it is not installed; flash-attn: it is not installed", "'triton'"),
        ("flash_attn", change(cache_dtype="fp8"), "a cache of fp8", "'triton'"),
        ("torch_flash", change(cache_dtype="int8_per_token_head"), "a cache of int8_per_token_head", "'triton'"),
        ("flash_attn", change(head_dim=100), "multiple of 8", "'triton'"),
        ("torch", change(deterministic=True), "'deterministic'", "'triton'"),
        ("fast", HOPPER, "not one of", "triton"),
    ],
)
def test_what_cannot_serve_is_refused(
    name: str, needs: AttentionNeeds, reason: str, works: str, triton_kernels: ModuleType
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(name, needs)
    assert caught.value.setting == "attention_backend"
    message = str(caught.value)
    assert message.startswith("attention_backend")
    assert reason in message
    assert works in message


def test_without_triton_the_reference_is_advised(packages: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match=r"triton is not installed; set attention_backend to 'torch'"):
        choose("auto", HOPPER)
    with pytest.raises(ConfigError, match="triton is not installed: run this model on the CPU"):
        choose_latent("auto", HOPPER)  # which refuses 'torch'


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (change(capability=(8, 0), block_size=64), "multiples of 256 tokens, and block_size is 64"),
        (change(capability=(12, 0), block_size=64), "Hopper or Blackwell"),
    ],
)
def test_flash_attn_says_why_each_package_is_no_choice(
    needs: AttentionNeeds, reason: str, packages: dict[str, bool]
) -> None:
    packages.update({"flash_attn.cute": True, "flash_attn_2_cuda": True})
    with pytest.raises(ConfigError, match=reason):
        choose("flash_attn", needs)


def test_an_old_or_broken_package_is_refused(packages: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    packages["flash_attn_2_cuda"] = True
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.5.9.post1")
    with pytest.raises(ConfigError, match=r"version 2\.6 is needed, and 2\.5\.9\.post1"):
        choose("flash_attn", HOPPER)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails
    with pytest.raises(ConfigError, match="flash_attn cannot be imported"):
        choose("flash_attn", HOPPER)


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, candle_vllm.core.kernels.attention.backends as b, candle_vllm.core.kernels.attention.flash_attn\n"
        "import candle_vllm.core.kernels.attention.torch_flash, torch\n"
        "b.choose('auto', b.AttentionNeeds(capability=None, dtype=torch.float32, head_dim=64, block_size=64))\n"
        "bad = {'flash_attn', 'triton', 'torch.nn.attention.varlen'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def attention(q, k, v, *, causal: bool, left: int, right: int, scale: float, softcap: float) -> torch.Tensor:
    """One sequence, q [Q, H, D], k and v [C, K, D]; masks are aligned to the last query and key; without keys 0."""
    queries, context = len(q), len(k)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("qhd,chd->hqc", q.double(), k) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    at = torch.arange(queries).unsqueeze(1) + context - queries
    keys = torch.arange(context)
    hidden = torch.zeros(queries, context, dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        hidden |= keys > at + right
    if left >= 0:
        hidden |= keys < at - left
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqc,chd->qhd", weights, v).to(q.dtype)


def sequences(q, starts, contexts, keys_of: Callable[[int, int], tuple], **options) -> torch.Tensor:
    """Rows of no sequence stay NaN."""
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    for row, context in enumerate(contexts):
        start, end = starts[row], starts[row + 1]
        out[start:end] = attention(q[start:end], *keys_of(row, context), **options)
    return out


def pages_of(key_cache, value_cache, table) -> Callable[[int, int], tuple]:
    def keys_of(row: int, context: int) -> tuple:
        blocks = table[row, : -(-context // key_cache.shape[1])].long()
        return tuple(cache[blocks].flatten(0, 1)[:context] for cache in (key_cache, value_cache))

    return keys_of


def check_bounds(starts, contexts, max_q: int, max_k: int) -> None:
    assert max(b - a for a, b in itertools.pairwise(starts)) <= max_q
    assert max(contexts) <= max_k


def check_integers(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.int32
        assert tensor.stride(-1) == 1


def varlen_of_2_15(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip  # noqa: E501
    assert enable_gqa == (query.shape[1] != key.shape[-2])
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert block_table is not None
    assert seqused_k is not None
    check_integers(cu_seq_q, seqused_k, block_table)
    contexts, starts = seqused_k.tolist(), cu_seq_q.tolist()
    if cu_seq_k is None:
        assert num_splits in (1, None)
    else:  # FlashAttention 2
        assert num_splits == 1
        assert key.shape[1] % 256 == 0
        assert cu_seq_k.tolist() == list(itertools.accumulate(contexts, initial=0))
        assert max_q > 1 or len(query) == len(contexts)
    check_bounds(starts, contexts, max_q, max_k)
    options = {"causal": False, "left": window_size[0], "right": window_size[1], "scale": scale, "softcap": 0.0}
    return sequences(query, starts, contexts, pages_of(key, value, block_table), **options)


def package_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip  # noqa: E501
    check_integers(cu_seqlens_q, cu_seqlens_k, block_table)
    assert k.shape[1] % 256 == 0
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    contexts = [b - a for a, b in itertools.pairwise(ends)]
    assert max_seqlen_q > 1 or len(q) == len(contexts)
    check_bounds(starts, contexts, max_seqlen_q, max_seqlen_k)
    left, right = window_size
    options = {"causal": causal, "left": left, "right": right, "scale": softmax_scale, "softcap": softcap}
    return sequences(q, starts, contexts, pages_of(k, v, block_table), **options)


def package_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1):  # fmt: skip  # noqa: E501
    assert cu_seqlens_k is None
    check_integers(cu_seqlens_q, seqused_k, page_table)
    starts, contexts = cu_seqlens_q.tolist(), seqused_k.tolist()
    check_bounds(starts, contexts, max_seqlen_q, max_seqlen_k)
    left, right = (-1 if x is None else x for x in window_size)
    options = {"causal": causal, "left": left, "right": right, "scale": softmax_scale, "softcap": softcap}
    return sequences(q, starts, contexts, pages_of(k, v, page_table), **options), None


def pretend(name: str, function: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name with `flash_attn_varlen_func`."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.flash_attn_varlen_func = function
    monkeypatch.setitem(sys.modules, name, module)


# ---- what they are told ----------------------------------------------------------------------------------------------

KINDS = ("torch 2.15", "torch 2.15 with 3", "flash-attn", "flash-attn-4")


@pytest.fixture(params=KINDS)
def backend(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    triton_kernels: ModuleType,
    packages: dict[str, bool],
) -> Backend:
    kind: str = request.param
    if kind.startswith("torch"):
        monkeypatch.setattr(varlen, "varlen_attn", varlen_of_2_15)
        monkeypatch.setattr(torch_flash, "_generation", lambda _: 3 if kind.endswith("3") else 2)
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda _: None)
        made = choose("torch_flash", change(block_size=64 if kind.endswith("3") else 256))
    elif kind == "flash-attn":
        packages["flash_attn_2_cuda"] = True
        pretend("flash_attn", package_2, monkeypatch)
        made = choose("flash_attn", HOPPER)
    else:
        packages["flash_attn.cute"] = packages["flash_attn_2_cuda"] = True
        pretend("flash_attn.cute", package_4, monkeypatch)
        made = choose("flash_attn", change(block_size=64))
    assert made.capturable
    assert made.finite_cache == (kind in (KINDS[1], KINDS[3]))
    return made


class Step(NamedTuple):
    """The first arguments of `paged_attention`."""

    q: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    rows: AttentionRows


def make_step(contexts: tuple[int, ...], queries: tuple[int, ...], heads: int, kv_heads: int) -> Step:
    size = 256
    blocks = [-(-context // size) for context in contexts]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(1))
    tables = torch.full((len(contexts), max(blocks) + 1), 10**6)
    for row, used in enumerate(itertools.accumulate(blocks, initial=0)):
        if row < len(blocks):
            tables[row, : blocks[row]] = order[used : used + blocks[row]]
    generator = torch.Generator().manual_seed(2)
    caches = [torch.randn(len(order), size, kv_heads, 16, generator=generator).bfloat16() for _ in range(2)]
    starts = tuple(itertools.accumulate(queries, initial=0))
    q = torch.randn(starts[-1], heads + 3, 16, generator=generator).bfloat16()[:, :heads]
    return Step(q, caches[0], caches[1], AttentionRows(starts, contexts, tables))


def check(backend: Backend, step: Step, rows: DeviceRows, wanted: torch.Tensor, **options) -> None:
    got = backend.attend(*step[:3], rows, scale=0.3, **options)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    error = (got.double() - wanted.double()).square().mean().sqrt() / wanted.double().square().mean().sqrt()
    assert error < 5e-3


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "bounds"), [(4, 4, True), (6, 2, True), (6, 2, False)])
def test_a_mixed_step(backend: Backend, window: int | None, heads: int, kv_heads: int, bounds: bool) -> None:
    """Decodes, a whole prompt, a chunk behind its context, the last token of a prompt; with and without bounds."""
    step = make_step((1, 300, 40, 290, 17), (1, 1, 40, 33, 1), heads, kv_heads)
    wanted = reference.paged_attention(*step, scale=0.3, window=window)
    rows = step.rows.on_device()
    assert (rows.decodes, rows.most_tokens, rows.most_context) == (2, 40, 300)
    if not bounds:
        rows = dataclasses.replace(rows, most_tokens=None, most_context=None, host=None)
    for decodes in (2, 0):
        check(backend, step, dataclasses.replace(rows, decodes=decodes), wanted, window=window)


def test_soft_cap(backend: Backend) -> None:
    step = make_step((300, 40), (1, 40), 4, 2)
    wanted = reference.paged_attention(*step, scale=0.3, softcap=0.5)
    if backend.name == "torch_flash":
        with pytest.raises(AssertionError):
            backend.attend(*step[:3], step.rows.on_device(), scale=0.3, softcap=0.5)
    else:
        check(backend, step, step.rows.on_device(), wanted, softcap=0.5)


def test_a_step_of_single_tokens_with_fillers(backend: Backend) -> None:
    """As a captured step has them: fillers behind the sequences, whose query_start stands still."""
    step = make_step((300, 17, 1, 1), (1, 1, 1, 1), 4, 2)
    rows = dataclasses.replace(
        step.rows.on_device(),
        query_start=torch.tensor([0, 1, 2, 2, 2]),
        context_lens=torch.tensor([300, 17, 0, 0]),
        most_context=512,
        host=None,
    )
    assert rows.decodes == 4
    wanted = reference.paged_attention(*step, scale=0.3)
    wanted[2:] = 0
    check(backend, step, rows, wanted)


def test_prompts_that_are_one_token_long(backend: Backend) -> None:
    step = make_step((30, 280), (1, 1), 4, 2)
    rows = dataclasses.replace(step.rows.on_device(), decodes=0)
    check(backend, step, rows, reference.paged_attention(*step, scale=0.3))


@pytest.mark.parametrize(
    ("capability", "found", "generation"),
    [
        ((8, 0), {"flash_attn_interface", "flash_attn.cute"}, 2),
        ((9, 0), set(), 2),
        ((9, 0), {"flash_attn_interface", "flash_attn.cute"}, 3),
        ((9, 0), {"flash_attn.cute"}, 2),
        ((10, 0), {"flash_attn_interface", "flash_attn.cute"}, 4),
    ],
)
def test_newer_generations_are_activated_where_their_package_is(
    capability: tuple[int, int],
    found: set[str],
    generation: int,
    triton_kernels: ModuleType,
    packages: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages.update(dict.fromkeys(found, True))
    active: list[str] = []
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu132")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_2_15)
    made = choose("torch_flash", change(capability=capability, block_size=64 if generation > 2 else 256))
    assert active == ([f"FA{generation}"] if generation > 2 else [])
    assert f"FlashAttention {generation}" in made.note
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    assert "FlashAttention 2" in choose("torch_flash", change(capability=capability, block_size=256)).note


def test_the_flash_attention_of_torch_needs_its_pages(
    packages: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_2_15)
    with pytest.raises(ConfigError, match=r"multiples of 256 tokens, and block_size is 64; set block_size=256"):
        choose("torch_flash", change(block_size=64))
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, starts, ends, max_q, max_k, **_: q)
    with pytest.raises(ConfigError, match=r"torch 2\.13 is needed, whose FlashAttention reads pages"):
        choose("torch_flash", HOPPER)


def test_a_generation_that_cannot_be_activated_is_refused(
    triton_kernels: ModuleType, packages: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(torch_flash, "_generation", lambda _: 3)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fail)
    with pytest.raises(ConfigError, match=r"FlashAttention 3 .* cannot be used \(undefined symbol\)"):
        choose("torch_flash", HOPPER)


def test_the_reference_takes_rows_from_the_device() -> None:
    step = make_step((300, 40), (1, 40), 4, 2)
    rows = dataclasses.replace(step.rows.on_device(), host=None)
    made = choose("torch", HOPPER)
    check(made, step, rows, reference.paged_attention(*step, scale=0.3, softcap=3.0), softcap=3.0)


def test_the_stand_in_has_the_arguments_of_this_torch() -> None:
    ours, theirs = (list(inspect.signature(of).parameters) for of in (varlen_of_2_15, varlen.varlen_attn))
    if "block_table" not in theirs:
        pytest.skip("this torch's FlashAttention reads no pages")
    assert ours == theirs


@torch.inference_mode()
def test_this_torch_takes_the_arguments() -> None:
    """The real function, on tensors without numbers."""
    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        pytest.skip("this torch's FlashAttention reads no pages")
    q = torch.empty(45, 4, 64, dtype=torch.bfloat16, device="meta")
    caches = [torch.empty(9, 256, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    host = AttentionRows((0, 1, 2, 42, 45), (1, 300, 40, 290), torch.empty(4, 2, dtype=torch.int64, device="meta"))
    for generation in (2, 3):
        paged = flash_attn.PagedFlash(torch_flash.paged_call(varlen.varlen_attn, generation))
        assert paged(q, *caches, host.on_device(), scale=0.125, window=None).shape == q.shape
