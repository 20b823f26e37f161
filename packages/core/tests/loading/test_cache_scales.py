# SPDX-License-Identifier: MIT
"""Scales of a float8 cache that are stored beside the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, InvalidFileError
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.config import KvCacheDType
from candle_vllm.core.kernels.attention import reference
from candle_vllm.core.kernels.attention.rows import AttentionRows, PagedCache
from candle_vllm.core.kernels.kv_write import reference as kv_write
from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.models.family import Decoder
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

LAYERS = 2
TOKENS = 24
ONE = torch.ones(1)


def load(folder: Path, dtype: KvCacheDType = "fp8") -> Decoder:
    config = EngineConfig(model=str(folder), kv_cache_dtype=dtype, dtype="f32", op_by_op=True)
    return load_model(config, torch.device("cpu"), lambda *_: None).decoder


def write(folder: Path, scales: dict[str, torch.Tensor], shrink: float = 1.0) -> Path:
    """A toy model with tensors of these names beside it, and the projections of keys and values so much smaller."""
    write_toy_model(folder, toy_config(num_hidden_layers=LAYERS))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] *= shrink
    scales = {f"model.layers.{name}": scale for name, scale in scales.items()}
    save_file(weights | scales, folder / "model.safetensors", {"format": "pt"})
    return folder


def given(decoder: Decoder) -> list[tuple[float, float] | None]:
    """The scales of each layer."""
    pairs = [layer.attention.attend.cache_scales for layer in decoder.layers]
    return [None if pair is None else (pair[0].item(), pair[1].item()) for pair in pairs]


def hidden(decoder: Decoder, dtype: torch.dtype) -> torch.Tensor:
    """What the decoder makes of a prompt whose keys and values go through a cache of `dtype`."""
    shape = (2, 16, decoder.config.num_kv_heads, decoder.config.head_dim)
    caches = tuple(PagedCache(*(torch.zeros(shape).to(dtype) for _ in range(2))) for _ in range(LAYERS))
    at = torch.arange(TOKENS)
    rows = AttentionRows((0, TOKENS), (TOKENS,), torch.tensor([[0, 1]]))
    scales = (ONE, ONE) if dtype == torch.float8_e4m3fn else None
    return decoder.forward(3 * at + 5, StepInput(at, at, rows, caches, scales))


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("self_attn.k_scale", "self_attn.v_scale"), (0.25, 0.5)),
        (("self_attn.attn.k_scale", "self_attn.attn.v_scale"), (0.25, 0.5)),
        (("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"), (0.25, 0.5)),
        (("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"), (0.25, 0.5)),
        (("self_attn.k_scale", "self_attn.v_scale", "self_attn.kv_scale"), (0.25, 0.5)),
        (("self_attn.kv_scale",), (0.25, 0.25)),
        (("self_attn.v_scale",), (0.25, 0.25)),
    ],
)
def test_names(tmp_path: Path, names: tuple[str, ...], wanted: tuple[float, float]) -> None:
    """Of one layer; the other keeps the step's. Both shapes of a single number."""
    numbers = (torch.tensor(0.25), torch.tensor([0.5]), torch.tensor(7.0))
    folder = write(tmp_path, {f"1.{name}": number for name, number in zip(names, numbers)})
    assert given(load(folder)) == [None, wanted]
    assert given(load(folder, "auto")) == [None, None]


@pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf"), [0.5, 0.5]])
def test_what_is_no_scale_is_refused_where_it_would_be_used(tmp_path: Path, number: float | list[float]) -> None:
    folder = write(tmp_path, {"0.self_attn.k_scale": torch.tensor(number)})
    with pytest.raises(InvalidFileError, match=r"model\.layers\.0\.self_attn\.k_scale: .*one finite number above 0"):
        load(folder)
    assert given(load(folder, "auto")) == [None, None]


def test_layers_that_are_not_loaded_are_passed_over(tmp_path: Path) -> None:
    assert given(load(write(tmp_path, {f"{LAYERS}.self_attn.k_scale": ONE}))) == [None, None]


def test_scales_bring_a_float8_cache_closer(tmp_path: Path) -> None:
    """Keys and values so small that e4m3 has hardly a number for them, unless they are scaled."""
    scales = {f"{layer}.self_attn.{kind}_scale": torch.tensor(2.0**-14) for layer in range(LAYERS) for kind in "kv"}
    plain, scaled = (load(write(tmp_path / name, parts, 2.0**-12)) for name, parts in (("a", {}), ("b", scales)))
    wanted = hidden(plain, torch.float32)
    assert torch.equal(hidden(scaled, torch.float32), wanted)
    errors = [float((hidden(decoder, torch.float8_e4m3fn) - wanted).norm()) for decoder in (plain, scaled)]
    assert errors[1] < errors[0] / 4


def test_a_layers_own_scales_stand_for_those_of_the_step() -> None:
    """To the bit what the reference makes of a cache that was written with them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOKENS, 2, 16, generator=generator) for _ in range(3))
    rows, at = AttentionRows((0, TOKENS), (TOKENS,), torch.tensor([[0, 1]])), torch.arange(TOKENS)
    own = (torch.tensor([0.01]), torch.tensor([0.02]))
    attend = PagedAttention(0, 16, None)
    attend.cache_scales = own
    caches = [torch.zeros(2, 16, 2, 16).to(torch.float8_e4m3fn) for _ in range(4)]
    got = attend(q, k, v, StepInput(at, at, rows, (PagedCache(*caches[:2]),), (ONE, ONE)))
    kv_write.kv_write(k, v, caches[2], caches[3], at, cache_scales=own)
    assert torch.equal(got, reference.paged_attention(q, caches[2], caches[3], rows, scale=0.25, cache_scales=own))
    attend.cache_scales = None
    caches = [torch.zeros(2, 16, 2, 16).to(torch.float8_e4m3fn) for _ in range(2)]
    assert not torch.equal(attend(q, k, v, StepInput(at, at, rows, (PagedCache(*caches[:2]),), (ONE, ONE))), got)
