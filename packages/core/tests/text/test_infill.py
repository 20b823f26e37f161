# SPDX-License-Identifier: MIT
"""Filling in the middle: marks by the names of tokens or a file's ids, and the prompts made with them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.testing import ByteTokenizer
from candle_vllm.core.text.infill import infill_marks, infill_prompt

QWEN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
CODESTRAL = ("[PREFIX]", "[MIDDLE]", "[SUFFIX]")
SEED = ("<[fim-suffix]>", "<[fim-prefix]>", "<[fim-middle]>")


def text_of(names: Sequence[str], **named: int) -> str:
    tokenizer = ByteTokenizer(names)
    prompt = infill_prompt(tokenizer, infill_marks(tokenizer.special_tokens.get, named), "a(", ")b")
    return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (QWEN, "<|bos|><|fim_prefix|>a(<|fim_suffix|>)b<|fim_middle|>"),
        (DEEPSEEK, "<|bos|><｜fim▁begin｜>a(<｜fim▁hole｜>)b<｜fim▁end｜>"),
        (CODESTRAL, "<|bos|>[SUFFIX])b[PREFIX]a("),
        (SEED, "<|bos|><[fim-suffix]>)b<[fim-prefix]>a(<[fim-middle]>"),
        (("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"), "<|bos|>▁<PRE>a(▁<SUF>)b▁<MID>"),
    ],
)
def test_the_marks_and_the_order_are_the_model_s(names: Sequence[str], text: str) -> None:
    assert text_of(names) == text


def test_a_file_s_ids_are_marks_too() -> None:
    """As in GGUF files whose tokens have names that nobody else has."""
    names, text = ("<A>", "<B>", "<C>"), "<|bos|><A>a(<B>)b<C>"
    assert text_of(names, fim_pre=260, fim_suf=261, fim_mid=262) == text
    assert text_of(names, prefix=260, suffix=261, middle=262) == text  # by their older names


def test_answers_end_at_every_mark_of_filling_in() -> None:
    tokenizer = ByteTokenizer(QWEN)
    prompt = infill_prompt(tokenizer, infill_marks(tokenizer.special_tokens.get, {}), "a", "b")
    assert set(prompt.stop_token_ids) == {tokenizer.special_tokens[name] for name in QWEN}


def test_names_of_marks_in_a_text_are_text() -> None:
    tokenizer = ByteTokenizer(QWEN)
    marks = infill_marks(tokenizer.special_tokens.get, {})
    ids = infill_prompt(tokenizer, marks, "<|fim_suffix|>", "<|fim_middle|>").token_ids
    assert [token for token in ids if token >= 256] == [
        256,
        *(tokenizer.special_tokens[n] for n in (QWEN[0], QWEN[2], QWEN[1])),
    ]


def test_tokens_may_stand_before_the_gap() -> None:
    tokenizer = ByteTokenizer(QWEN)
    marks = infill_marks(tokenizer.special_tokens.get, {})
    assert infill_prompt(tokenizer, marks, [97, 40], ")b") == infill_prompt(tokenizer, marks, "a(", ")b")


def test_what_goes_on_begins_without_the_space_of_a_text_s_start() -> None:
    """SentencePiece writes a space before every text; what stands behind a gap is no beginning."""

    class Spaced(ByteTokenizer):
        def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
            spaced = text if not text or parse_special else f" {text}"
            return super().encode(spaced, add_special_tokens, parse_special=parse_special)

    tokenizer = Spaced(QWEN)
    marks = infill_marks(tokenizer.special_tokens.get, {})
    prompt = infill_prompt(tokenizer, marks, "a", "b")
    assert tokenizer.decode(prompt.token_ids) == " ab"
    assert tokenizer.decode(infill_prompt(tokenizer, marks, "a", " b").token_ids) == " a b"


def test_a_vocabulary_without_marks_is_refused() -> None:
    for names in ((), QWEN[:2], ("[PREFIX]",)):
        tokenizer = ByteTokenizer(names)
        assert infill_marks(tokenizer.special_tokens.get, {"eot": 3}) is None
        with pytest.raises(InvalidParameterError, match="suffix: this model cannot fill in") as caught:
            infill_prompt(tokenizer, None, "a", "b")
        assert caught.value.param == "suffix"
