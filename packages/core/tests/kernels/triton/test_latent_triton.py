# SPDX-License-Identifier: MIT
"""Latent attention of the GPU against the reference: scattered pages, NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.attention import triton_decode as attention_decode
from candle_vllm.core.kernels.attention.backend import AttentionNeeds
from candle_vllm.core.kernels.attention.backends import choose_latent
from candle_vllm.core.kernels.attention.rows import AttentionRows, DeviceRows
from candle_vllm.core.kernels.latent_attention import head_linear, reference, triton_decode, triton_prefill
from candle_vllm.core.kernels.latent_attention.triton import latent_attention
from candle_vllm.core.kernels.latent_attention.triton_heads import head_linear as heads_on_gpu
from candle_vllm.core.kernels.latent_attention.triton_write import latent_write
from tests.common_run import few

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS(error) / RMS(wanted)."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Step:
    """A cache with some sequences, and the queries of their last tokens.

    A sequence of a given length always holds the same numbers, wherever its blocks and its neighbours are. The parts of
    queries lie as a model gives them: the rotated one as a tensor, the other with heads outermost.
    """

    def __init__(
        self,
        device: torch.device,
        contexts: tuple[int, ...],
        queries: tuple[int, ...],
        *,
        heads: int = 5,
        rope: int = 16,
        latent: int = 32,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
        shuffle: int = 1,
    ) -> None:
        blocks = [-(-context // size) for context in contexts]
        order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(shuffle))
        cache = torch.full((sum(blocks) + 3, size, 1, rope + latent), math.nan, dtype=dtype)
        tables, used, q = torch.full((len(contexts), max(blocks) + 2), 10**6), 0, []
        for row, context in enumerate(contexts):
            tables[row, : blocks[row]] = order[used : used + blocks[row]]
            used += blocks[row]
            at = torch.arange(context)
            slots = tables[row, at // size] * size + at % size
            cache.flatten(0, 2)[slots] = random(context, rope + latent, dtype=dtype, seed=2 * context)
            q.append(random(context, heads, rope + latent, dtype=dtype, seed=3 * context)[context - queries[row] :])
        self.scale = (rope + latent) ** -0.5
        both = torch.cat(q).to(device)
        self.q_rope = both[..., :rope].contiguous()
        self.q_latent = both[..., rope:].transpose(0, 1).contiguous().transpose(0, 1)
        self.cache = cache.to(device)
        self.rows = AttentionRows(tuple(itertools.accumulate(queries, initial=0)), contexts, tables.to(device))

    def run(self, rows: DeviceRows | None = None) -> torch.Tensor:
        rows = rows or self.rows.on_device()
        return latent_attention(self.q_rope, self.q_latent, self.cache, rows, scale=self.scale)

    def check(self, decodes: int | None = None) -> None:
        rows = self.rows.on_device()
        got = self.run(rows if decodes is None else replace(rows, decodes=decodes))
        wanted = reference.latent_attention(self.q_rope, self.q_latent, self.cache, self.rows, scale=self.scale)
        assert got.dtype == self.cache.dtype
        assert error(got, wanted) < TOLERANCE[got.dtype]


@pytest.mark.parametrize("dtype", few(TOLERANCE, torch.bfloat16))
def test_a_mixed_step(device: torch.device, dtype: torch.dtype) -> None:
    """Decodes, a whole prompt, chunks with context before them, and the last token of a prompt."""
    step = Step(device, (1, 260, 20, 25, 29, 17), (1, 1, 20, 4, 13, 1), dtype=dtype)
    assert step.rows.on_device().decodes == 2
    step.check()
    step.check(decodes=0)


@pytest.mark.parametrize(("heads", "rope", "latent"), [(16, 24, 48), (70, 16, 16), (5, 0, 48)])
def test_shapes(device: torch.device, heads: int, rope: int, latent: int) -> None:
    """Parts that are no powers of two; more heads than a tile has rows."""
    shape = {"heads": heads, "rope": rope, "latent": latent, "dtype": torch.bfloat16}
    Step(device, (40, 1, 9, 12), (1, 1, 3, 1), **shape).check()


@pytest.mark.parametrize("size", few([16, 32, 256], 16, 256))
def test_block_sizes(device: torch.device, size: int) -> None:
    Step(device, (257, 100), (1, 40), size=size, dtype=torch.bfloat16).check()


def test_long_contexts_are_split_and_merged(device: torch.device) -> None:
    Step(device, (3, 256, 257, 600), (1, 1, 1, 1), heads=4).check()


def test_a_sequence_has_the_same_bits_alone_and_beside_others(device: torch.device) -> None:
    whole = Step(device, (300, 40, 90), (1, 1, 33))
    alone = Step(device, (300,), (1,), shuffle=5), Step(device, (90,), (33,), shuffle=7)
    got = whole.run()
    assert torch.equal(got[:1], alone[0].run())
    assert torch.equal(got[2:], alone[1].run())


def test_chunks_of_a_prompt_have_the_bits_of_the_whole(device: torch.device) -> None:
    whole = Step(device, (70,), (70,)).run()
    parts = [Step(device, (end,), (count,)) for end, count in ((70, 37), (70, 1))]
    for step in parts:
        count = len(step.q_latent)
        rows = replace(step.rows.on_device(), decodes=0)
        assert torch.equal(step.run(rows), whole[-count:])


def test_a_filler_of_a_captured_step_gets_zeros(device: torch.device) -> None:
    step = Step(device, (20, 30), (1, 1))
    rows = step.rows.on_device()
    got = step.run(replace(rows, context_lens=torch.tensor([20, 0], dtype=torch.int32, device=device)))
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert torch.equal(got[0], step.run()[0])


@pytest.mark.parametrize(
    ("contexts", "queries", "decoding"),
    few(
        [
            ((20, 25, 17), (20, 4, 1), 0),
            ((1, 300, 17), (1, 1, 1), 3),
            ((1, 300, 20, 25, 17), (1, 1, 20, 4, 1), 2),
            ((1,), (1,), 0),
        ],
        ((1, 300, 20, 25, 17), (1, 1, 20, 4, 1), 2),
        ((1,), (1,), 0),
    ),
)
def test_how_many_decode_is_a_number_on_the_device(
    device: torch.device,
    contexts: tuple[int, ...],
    queries: tuple[int, ...],
    decoding: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bits of launches that are told on the host, with fillers behind sequences and tokens."""
    step = Step(device, contexts, queries)
    whole, count = step.rows.on_device(), len(step.q_rope)
    wanted = step.run(replace(whole, decodes=decoding))
    step.q_rope, step.q_latent = (
        torch.cat([x, torch.full((9, *x.shape[1:]), math.nan, device=device)]) for x in (step.q_rope, step.q_latent)
    )
    rows = DeviceRows(
        torch.cat([whole.query_start, whole.query_start[-1:].expand(3)]),
        torch.cat([whole.context_lens, whole.context_lens.new_zeros(3)]),
        torch.cat([whole.block_tables, whole.block_tables.new_full((3, whole.block_tables.shape[1]), 10**6)]),
        min(len(contexts) + 1, count),
        decoding=torch.tensor([decoding], dtype=torch.int32, device=device),
    )
    for most in (256, 2):  # rows of a launch
        for module in (triton_decode, triton_prefill):
            monkeypatch.setattr(module, "_ROWS", most)
        assert torch.equal(step.run(rows)[:count], wanted)
    assert torch.equal(step.run(replace(rows, decodes=decoding, decoding=None))[:count], wanted)


def test_partial_results_are_bounded_for_any_number_of_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's bits do not depend on the rows of a launch."""
    assert attention_decode.PARTIALS // (triton_decode.splits(128, 2).splits * 128 * 512 * 4) == 64  # DeepSeek V3
    step, sizes, empty = Step(device, (600, 3, 257), (1, 1, 1), heads=4), list[int](), torch.empty
    wanted = step.run()
    monkeypatch.setattr(attention_decode, "PARTIALS", 4 * 64 * 4 * 32 + 1)  # of one row
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **given: sizes.append(math.prod(shape)) or empty(*shape, **given)
    )
    assert torch.equal(step.run(), wanted)
    assert 64 * 4 * 32 in sizes


@pytest.mark.parametrize("numbers", [torch.int32, torch.int64])
def test_rows_are_written_to_their_slots(device: torch.device, numbers: torch.dtype) -> None:
    both = random(4, 7 + 20, dtype=torch.bfloat16).to(device)
    slots = torch.tensor([9, -1, 0, 31], dtype=numbers, device=device)
    ours, theirs = (torch.full((2, 16, 1, 26), 5.0, dtype=torch.bfloat16, device=device) for _ in range(2))
    latent_write(both[:, :6], both[:, 7:], ours, slots)
    reference.latent_write(both[:, :6], both[:, 7:], theirs, slots.long())
    assert torch.equal(ours, theirs)
    latent_write(both[:0, :6], both[:0, 7:], ours, slots[:0])


@pytest.mark.one_of_each
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "inputs", "outputs"), [(3, 32, 48), (2, 100, 7)])
def test_a_matrix_for_every_head(
    device: torch.device, dtype: torch.dtype, heads: int, inputs: int, outputs: int
) -> None:
    x = random(heads, 19, inputs, dtype=dtype).to(device).transpose(0, 1)
    weight = random(heads, outputs, inputs, dtype=dtype, seed=1).to(device)
    got, wanted = heads_on_gpu(x, weight), reference.head_linear(x.float(), weight.float())
    assert error(got, wanted) < TOLERANCE[dtype]
    assert torch.equal(heads_on_gpu(x[17:18], weight), got[17:18])
    assert torch.equal(head_linear(x, weight, invariant=True), got)


def test_backends() -> None:
    needs = AttentionNeeds(capability=(9, 0), dtype=torch.bfloat16, head_dim=192, block_size=64)
    assert choose_latent("auto", replace(needs, head_dim=576)).name == "triton"
    for name, change, message in (
        ("torch_flash", {}, "does not support this model's latent attention: leave it out"),
        (
            "auto",
            {"cache_dtype": "int8_per_token_head"},
            "kv_cache_dtype='int8_per_token_head' is not supported with latent attention",
        ),
        ("triton", {"block_size": 8}, "block_size=16"),
        ("auto", {"head_dim": 1088}, "latent rows of at most 640 elements, not 1088"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_latent(name, replace(needs, **change))
