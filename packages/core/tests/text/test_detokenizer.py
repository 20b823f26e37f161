# SPDX-License-Identifier: MIT
"""Detokenizer: pieces add up to the whole text, whatever the tokens and the stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.text.detokenizer import Detokenizer, StopMarks, StopScanner
from candle_vllm.core.text.tokenizer import Tokenizer

WORDS = ["ab", "aab", " a", "  ", "\u20ac", "\U0001f999", "STOP", "end. "]


def make(*, sentence_piece: bool) -> Tokenizer:
    """256 single bytes, then WORDS, then <end>."""
    if sentence_piece:
        texts = [f"<0x{value:02X}>" for value in range(256)] + [word.replace(" ", "\u2581") for word in WORDS]
    else:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = [value for value in range(256) if value not in printable]
        letter = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(rest)}
        texts = [letter[value] for value in range(256)]
        texts += ["".join(letter[value] for value in word.encode()) for word in WORDS]
    backend = Backend(models.BPE({text: index for index, text in enumerate(texts)}, []))
    backend.add_special_tokens(["<end>"])
    backend.decoder = (
        decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if sentence_piece
        else decoders.ByteLevel()
    )
    return Tokenizer(backend)


TOKENIZERS = {True: make(sentence_piece=True), False: make(sentence_piece=False)}
SIZE = 257 + len(WORDS)
IDS = st.lists(
    st.one_of(
        st.integers(0, SIZE - 1),
        st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xA6, 0x99, 0xC3, 0x61, 0x62, 0x20]),
        st.integers(256, SIZE - 1),
    ),
    max_size=40,
)
STOPS = st.lists(st.text("ab S\u20ac\ufffd\n", min_size=1, max_size=4), max_size=4)


def word(text: str) -> int:
    return 256 + WORDS.index(text)


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """(start, end, stop) of the stop that is complete first, the longest of several."""
    hits = [(start + len(stop), start, stop) for stop in stops if (start := text.find(stop)) >= 0]
    return next(((start, end, stop) for end, start, stop in sorted(hits)), None)


@settings(deadline=None, max_examples=300)
@given(st.booleans(), IDS, st.booleans())
def test_pieces_are_the_whole_text(sentence_piece: bool, ids: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[sentence_piece]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=400)
@given(st.booleans(), IDS, STOPS, st.booleans())
def test_text_is_cut_at_the_first_stop(sentence_piece: bool, ids: list[int], stops: list[str], include: bool) -> None:
    tokenizer = TOKENIZERS[sentence_piece]
    detokenizer = Detokenizer(tokenizer, stops=StopScanner(stops, include_stop=include))
    shown = ""
    for token in ids:
        shown += detokenizer.add(token)
    shown += detokenizer.finish()
    whole = tokenizer.decode(ids)
    hit = first_stop(whole, stops)
    if hit is None:
        assert shown == whole
        assert detokenizer.stopped_by is None
    else:
        start, end, stop = hit
        assert shown == whole[: end if include else start]
        assert detokenizer.stopped_by == stop
        assert detokenizer.add(0x61) == detokenizer.finish() == ""


@settings(deadline=None, max_examples=200)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_the_beginning_of_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for character in text:
        shown += scanner.feed(character)
    if scanner.found is None:
        sizes = [size for size in range(1, 5) if any(stop[:size] == text[-size:] != stop for stop in stops)]
        assert text[len(shown) :] == text[len(text) - max(sizes, default=0) :]


def test_half_a_character_waits() -> None:
    detokenizer = Detokenizer(TOKENIZERS[False])
    assert [detokenizer.add(value) for value in "\u20ac".encode()] == ["", "", "\u20ac"]
    assert detokenizer.add(0xE2) == ""
    assert detokenizer.add(0x61) == "\ufffda"
    assert detokenizer.add(0xF0) == ""
    assert detokenizer.finish() == "\ufffd"


def test_stop_in_the_middle_of_a_token() -> None:
    detokenizer = Detokenizer(TOKENIZERS[False], stops=StopScanner(["TO"]))
    assert [detokenizer.add(0x61), detokenizer.add(word("STOP"))] == ["a", "S"]
    assert detokenizer.stopped_by == "TO"


def test_stop_before_min_tokens_does_not_count() -> None:
    for minimum, expected in ((0, ""), (1, ""), (2, "ab"), (3, "ab"), (4, "abab")):
        detokenizer = Detokenizer(TOKENIZERS[False], stops=StopScanner(["ab"]), min_tokens=minimum)
        shown = "".join(detokenizer.add(value) for value in b"ababab")
        assert (shown, detokenizer.stopped_by) == (expected, "ab"), minimum


def test_special_tokens_are_shown_on_request() -> None:
    tokenizer = TOKENIZERS[True]
    end = tokenizer.backend.token_to_id("<end>")
    ids = [word(" a"), end, word(" a")]
    for skip, expected in ((True, "a a"), (False, "a<end> a")):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        assert "".join(map(detokenizer.add, ids)) + detokenizer.finish() == expected


def test_no_such_token() -> None:
    with pytest.raises(InvalidParameterError):
        Detokenizer(TOKENIZERS[False]).add(1 << 20)


def test_cost_does_not_grow_with_the_text() -> None:
    scanner = StopScanner(["x" * 1000 + "y"])
    assert scanner.feed("x" * 200_000) == "x" * 199_000
    assert scanner.flush() == "x" * 1000


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_a_mark_whether_it_is_shown_or_not(skip: bool) -> None:
    """A text that reads like its name is none, and no stop string is looked for in the name of one."""
    marks = StopMarks(states={"": {}, "within": {"<end>": ""}}, first="within")
    end = TOKENIZERS[False].backend.token_to_id("<end>")
    ids = [*b"x.<end>x.", end, *b" \n", word("ab"), *b".x"]
    for stop, shown in ((".", "ab"), ("a", ""), (" ", "ab.x"), ("e", "ab.x"), ("b.", "a")):
        scanner = StopScanner([stop], marks=marks, special_tokens=["<end>"])
        detokenizer = Detokenizer(TOKENIZERS[False], stops=scanner, skip_special_tokens=skip)
        text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert text == "x.<end>x." + ("" if skip else "<end>") + " \n" + shown
        assert detokenizer.stopped_by == (stop if shown != "ab.x" else None)


MARKED = StopMarks(states={"": {"<a>": "within"}, "within": {"</a>": ""}, "rest": {}}, fresh={"[f(": "rest"})


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("x<a>y</a>z", ["y"], "x<a>y</a>z"),
        ("x<a>y</a>z", ["<"], "x<a>y</a>z"),
        ("x<b>", ["<"], "x"),  # the mark does not go on, and the stop string stands
        ("x<a", ["<"], "x"),  # nor does it where the text ends
        ("x<a>", ["x<"], "x<a>"),
        ("x<a>", ["<", "x"], ""),
        ("x<a>y</a>\n\nz\n\n", ["\n\n"], "x<a>y</a>\n\nz"),
        ("xz<a>y</a>xyz", ["zx", "xyz"], "xz<a>y</a>"),
        ("<a>y</a><a>y</a>y", ["y"], "<a>y</a><a>y</a>"),
        ("\n[f(y)]", ["y", "f"], "\n[f(y)]"),
        ("\n[fy", ["[f"], "\n"),
        ("x[f(y)]", ["y"], "x[f("),
        ("<a></a> [f(y)]", ["y"], "<a></a> [f(y)]"),
    ],
)
def test_stop_strings_count_in_the_answer_alone(text: str, stops: list[str], shown: str) -> None:
    for size in (1, 2, len(text)):
        scanner = StopScanner(stops, marks=MARKED)
        pieces = [scanner.feed(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join([*pieces, scanner.flush()]) == shown, size
        assert (scanner.found is None) == (shown == text)


def test_marks_that_lead_nowhere_are_refused() -> None:
    for wrong in ({"states": {"": {"<a>": "b"}}}, {"states": {}, "first": "b"}, {"states": {"": {"": ""}}}):
        with pytest.raises(InvalidParameterError, match="stop_marks"):
            StopMarks(**wrong)
    with pytest.raises(InvalidParameterError, match="stop_marks"):
        StopMarks(states={}, fresh={"x" * 1025: ""})


@pytest.mark.parametrize("sentence_piece", [False, True])
def test_a_text_goes_on_with_the_character_that_its_prompt_begins(sentence_piece: bool) -> None:
    tokenizer, euro = TOKENIZERS[sentence_piece], "\u20ac".encode()
    for begun in range(4):
        for continues in (False, True):
            detokenizer = Detokenizer(
                tokenizer, prompt_token_ids=[0x61, *euro[:begun]], continues_prompt=continues
            )  # fmt: skip
            text = "".join(map(detokenizer.add, [*euro[begun:], 0x62])) + detokenizer.finish()
            before = euro[:begun] if continues and begun < 3 else b""
            assert text == (before + euro[begun:] + b"b").decode("utf-8", "replace")
