# SPDX-License-Identifier: MIT
"""Kinds: which texts mean which values, and what the refusals say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.setting_kinds import Boolean, Choice, Device, FilePath, FreeText, Integer, Number, Secret, Text


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("2m", 2_000_000), ("2M", 2 << 20)],
)
def test_integers_take_decimal_and_binary_units(text: str, value: int) -> None:
    assert Integer(0, 1 << 40).from_text(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "1.5", "0.0001k", "1kk", "1e3", "٣", "1_000", "0x10", "9" * 30, "nan", "--1"]
)
def test_integers_refuse_the_rest(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        Integer(0, 1 << 62).from_text(text)


def test_an_integer_without_units_has_none() -> None:
    with pytest.raises(ValueError, match="whole number"):
        Integer(0, 65535, units=False).from_text("2k")


@given(st.integers())
@settings(deadline=None, max_examples=50)
def test_integers_stay_in_range(value: int) -> None:
    kind = Integer(-5, 5)
    if -5 <= value <= 5:
        assert kind.from_text(str(value)) == value
    else:
        with pytest.raises(ValueError, match=r"must be (between -5 and 5|a whole number)"):
            kind.from_text(str(value))


@pytest.mark.parametrize("text", ["inf", "nan", "1.1", "-0.1", "", "1,5", "1e999"])
def test_numbers_refuse_what_is_out_of_range_or_not_finite(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        Number(0, 1).from_text(text)


def test_open_ends_are_refused() -> None:
    kind = Number(0, 1, open_low=True, open_high=True)
    assert kind.from_text(".5") == 0.5
    for text in ("0", "1"):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            kind.from_text(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0", "cuda:0"), ("7", "cuda:7"), ("CPU", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1")]
)
def test_devices(text: str, value: str) -> None:
    assert Device().from_text(text) == value


@pytest.mark.parametrize("text", ["metal", "mps", "MPS"])
def test_apple_s_gpu_is_refused_by_name_with_what_works(text: str) -> None:
    for read in (Device().from_text, Device().taken, Device(several=True).check):
        with pytest.raises(ValueError, match=r"is Apple's GPU.*: set cpu, which auto chooses there"):
            read(text)


@pytest.mark.parametrize("text", ["0,1", "cuda:", "gpu", "cuda:-1", "", "cpu:0"])
def test_one_device_only(text: str) -> None:
    with pytest.raises(ValueError, match="must be auto, cpu, cuda or cuda:N"):
        Device().from_text(text)


def test_choices_know_aliases_and_suggest() -> None:
    kind = Choice(("f32", "bf16"), {"float32": "f32"})
    assert kind.from_text("Float32") == "f32"
    with pytest.raises(ValueError, match=re.escape("did you mean bf16?")):
        kind.from_text("bf61")


def test_switches() -> None:
    assert Boolean().from_text("TRUE") is True
    assert Boolean().from_text("off") is False
    with pytest.raises(ValueError, match="true or false"):
        Boolean().from_text("maybe")


def test_a_secret_is_never_repeated() -> None:
    with pytest.raises(ValueError) as refusal:
        Secret().from_text("s3cret with space")
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "  ", "a\x00b", "a\nb", "a\u202eb", "a\udcff", "x" * 5000])
def test_texts_are_short_and_printable(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Text().from_text(text)


@pytest.mark.parametrize("text", ["モデル\u30001.gguf", "mes\xa0modèles", "می\u200cخواهم", "a b"])
def test_texts_have_spaces_of_any_language(text: str) -> None:
    assert Text().from_text(text) == text
    assert FilePath().from_text(text) == Path(text)


@pytest.mark.parametrize("text", ["\n", " ", "a\nb\t", "\x1b", "é"])
def test_free_texts_are_taken_as_they_are(text: str) -> None:
    assert FreeText().from_text(text) == text


@pytest.mark.parametrize(("text", "message"), [("", "1 to 9 char"), ("x" * 10, "1 to 9 char"), ("a\udcff", "UTF-8")])
def test_free_texts_are_something_not_endless_and_utf8(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FreeText(9).from_text(text)


def test_paths_know_the_home_folder() -> None:
    assert FilePath().from_text("~/x") == Path.home() / "x"
    with pytest.raises(ValueError, match=r"an unknown user, ~no_such_user: write ~/ or \./"):
        FilePath().from_text("~no_such_user/x")


def test_a_list_is_no_choice() -> None:
    with pytest.raises(ValueError, match="must be one of a, b, not"):
        Choice(("a", "b"), absent={"c": "it is not there"}).check(["c"])
