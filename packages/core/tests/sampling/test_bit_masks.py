# SPDX-License-Identifier: MIT
"""Masks of bits on logits, and states with a grammar in the processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from candle_vllm.core import SamplingParams, StructuredOutputsParams
from candle_vllm.core.kernels import sampling as kernels
from candle_vllm.core.sampling.device_edits import apply_in_torch, mask_flags
from candle_vllm.core.sampling.grammar import GrammarState
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.processors import apply_processors, mask_row
from candle_vllm.core.sampling.state import SamplingState


@pytest.mark.parametrize("size", [1, 31, 32, 33, 123, 4097])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_mask_row(size: int, share: float) -> None:
    rng = np.random.default_rng(size)
    flags = rng.random(size) < share
    padded = np.zeros(32 * -(-size // 32), np.uint8)
    padded[:size] = flags
    bits = np.packbits(padded, bitorder="little").view(np.int32)
    row = rng.standard_normal(size).astype(np.float32)
    expected = np.where(flags, row, -np.inf)
    mask_row(row, bits)
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(mask_flags(bits, size), flags)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_broken_row_stays_broken(value: float, allowed: bool) -> None:
    row = np.zeros(40, np.float32)
    row[7] = value
    mask_row(row, np.array([1 << 7 if allowed else 1, 0], np.int32))
    assert not row.max() < np.inf


def states(backend: LlguidanceBackend, size: int) -> list[SamplingState]:
    """A row with nothing, with a grammar, and with a grammar and everything else."""

    def make(**params: object) -> SamplingState:
        sampling = SamplingParams(seed=1, **params)  # type: ignore[arg-type]
        spec = sampling.structured_outputs
        grammar = None if spec is None else GrammarState(backend, spec, size)
        return SamplingState(sampling, [5], vocab_size=size, eos_token_ids=[273], grammar=grammar)

    digits = StructuredOutputsParams(regex="[0-9]+")
    return [
        make(),
        make(structured_outputs=digits),
        make(structured_outputs=digits, allowed_token_ids=[48, 49, 50, 70], logit_bias={49: 3.0}, min_tokens=3),
        make(allowed_token_ids=[1, 2]),
        make(structured_outputs=digits, repetition_penalty=1.5, bad_words=None),
    ]


def test_processors_do_what_their_reference_does(backend: LlguidanceBackend) -> None:
    if not kernels.can_compile():
        pytest.skip("without Numba there is the reference alone")
    size = 300
    rows = states(backend, size)
    for state in rows[1:]:
        state.append(49 if state.grammar else 1)
    logits = torch.randn(len(rows), size, generator=torch.Generator().manual_seed(0))
    logits[4, 200] = torch.inf
    expected = logits.clone()
    apply_in_torch(expected, rows)
    apply_processors(logits, rows)
    torch.testing.assert_close(logits[:4], expected[:4])
    assert not bool(logits[4].max() < torch.inf)
    assert not bool(expected[4].max() < torch.inf)
    assert torch.isfinite(logits[2]).nonzero().flatten().tolist() == [48, 49, 50]
    assert torch.isfinite(logits[1]).nonzero().flatten().tolist()[:10] == list(range(48, 58))


def test_siblings_have_their_own_grammars(backend: LlguidanceBackend) -> None:
    spec = StructuredOutputsParams(choice=["ab", "cd"])
    state = SamplingState(
        SamplingParams(n=2, structured_outputs=spec),
        [1],
        vocab_size=300,
        eos_token_ids=[],
        grammar=GrammarState(backend, spec, 300),
    )
    other = state.sibling(1)
    assert state.reads_tokens
    assert state.masks_tokens
    state.append(ord("a"))

    def allowed(state: SamplingState) -> list[int]:
        bits = state.mask_bits()
        assert bits is not None
        return np.flatnonzero(mask_flags(bits, 300)).tolist()

    assert allowed(state) == [ord("b")]
    assert allowed(other) == [ord("a"), ord("c")]
    with pytest.raises(RuntimeError, match="does not take token 97"):
        state.append(ord("a"))
    state = other
    for token in b"cd":
        state.append(token)
    assert state.grammar is not None
    assert state.grammar.exhausted


def test_siblings_compile_nothing(backend: LlguidanceBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    state = GrammarState(backend, StructuredOutputsParams(choice=["ab", "cd"]), 300)
    monkeypatch.setattr(backend, "compile", None)
    state.accept(ord("a"))
    assert np.flatnonzero(mask_flags(state.sibling().bits(), 300)).tolist() == [ord("a"), ord("c")]


def test_the_form_wins_over_min_tokens(backend: LlguidanceBackend) -> None:
    """Stop tokens are held back where there is another one, and come where the form has nothing else."""
    spec = StructuredOutputsParams(regex="ab|b?c")
    state = SamplingState(
        SamplingParams(min_tokens=5, stop_token_ids=[ord("b")], structured_outputs=spec),
        [1],
        vocab_size=300,
        eos_token_ids=[],
        grammar=GrammarState(backend, spec, 300),
    )
    assert state.forbidden_ids().tolist() == [ord("b")]
    state.append(ord("a"))
    assert state.forbidden_ids().tolist() == []


def test_masks_made_ahead_are_those_of_one_token_after_another(
    backend: LlguidanceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = StructuredOutputsParams(regex="a[bc]*d?e")
    one, other = (GrammarState(backend, spec, 300, (ord("e"),)) for _ in range(2))
    one.look_ahead(b"abcbxd")
    ahead = one.masks_ahead()
    assert len(ahead) == 4  # an x cannot come
    for token, bits in zip(b"abcb", ahead, strict=True):
        other.accept(token)
        np.testing.assert_array_equal(bits, other.bits())
    before = one.bits().copy()
    with monkeypatch.context() as patched:
        patched.setattr(GrammarState, "_fill", None)  # they are not made again
        one.accept(ord("a"))
        one.accept(ord("b"))
    np.testing.assert_array_equal(one.bits(), ahead[1])
    one.accept(ord("d"))  # another than was expected
    assert np.flatnonzero(mask_flags(one.bits(), 300)).tolist() == [ord("e")]
    assert one.masks_ahead() == []
    one.look_ahead(b"e")  # nothing may follow, so there is no mask behind it
    assert one.masks_ahead() == []
    assert not one.exhausted
    one.rollback(3)
    np.testing.assert_array_equal(one.bits(), before)
    one.look_ahead(b"ab")
    one.rollback(0)
    assert one.masks_ahead() == []


def test_a_look_ahead_that_meets_a_limit_leaves_the_text_where_it_is(backend: LlguidanceBackend) -> None:
    parts = [f'r{place}: "k{place:04d}"' for place in range(1200)]
    wide = "wide: " + " ".join(f"r{place}?" for place in range(1200)) + ' "!"'  # too much to go on with behind an x
    lark = "\n".join(['start: ("a" | "x" wide)+ "."', wide, *parts])
    state = GrammarState(backend, StructuredOutputsParams(grammar=lark), 300)
    state.accept(ord("a"))
    before = state.bits().copy()
    for guess in (b"ax!a", b"x!a"):
        state.look_ahead(guess)
        assert len(state.masks_ahead()) == guess.index(b"x")
        np.testing.assert_array_equal(state.bits(), before)
    state.accept(ord("a"))
    np.testing.assert_array_equal(state.bits(), before)
