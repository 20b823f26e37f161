# SPDX-License-Identifier: MIT
"""Tokenizer: the two ways in, what hostile files and wrong calls lead to, and the bytes behind tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, ModelLoadError, UnsupportedModelError
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.gguf_vocab import read_gguf_vocab
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from candle_vllm.core.text.tokenizer import Tokenizer

PRE = "tokenizer.ggml."


def byte_alphabet() -> list[str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in printable]
    letters = {value: chr(value) for value in printable} | {value: chr(256 + i) for i, value in enumerate(rest)}
    return [letters[value] for value in range(256)]


def gpt2(**changes: Any) -> dict[str, Any]:
    """A byte-level vocabulary: 256 bytes, then "he", "\u0120he", then <|end|> and <unused>."""
    tokens = [*byte_alphabet(), "he", "\u0120he", "<|im_end|>", "<pad>"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([1] * 258 + [3, 3], dtype=np.int32),
        "merges": ["h e", "\u0120 he"],
        "eos_token_id": 258,
        "padding_token_id": 259,
    }
    return {PRE + key: value for key, value in (metadata | changes).items() if value is not None}


def spm(**changes: Any) -> dict[str, Any]:
    words = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab", "c"]
    metadata = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), *words],
        "scores": np.array([0.0] * 259 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0, -13.0], dtype=np.float32),
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
    }
    return {PRE + key: value for key, value in (metadata | changes).items() if value is not None}


def test_byte_level() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2())
    assert tokenizer.encode("he he<|im_end|>") == [256, 257, 258]
    assert tokenizer.vocab_size == 260
    assert tokenizer.eos_token_ids == (258,)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<pad>"}
    euro = tokenizer.encode("€")
    assert [tokenizer.token_bytes(token) for token in euro] == [b"\xe2", b"\x82", b"\xac"]
    assert tokenizer.decode(euro) == "€"
    assert tokenizer.decode(euro[:2]) == tokenizer.token_text(euro[0]) == "\ufffd"
    assert tokenizer.is_special(258)
    assert not tokenizer.is_special(256)
    assert tokenizer.encode_batch(["he", ""]) == [[256], []]


def test_special_text_as_plain_words() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2())
    plain = tokenizer.encode("<|im_end|>", parse_special=False)
    assert 258 not in plain
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [258]  # the other way is not disturbed


def test_a_merge_may_begin_with_a_space() -> None:
    metadata = gpt2(merges=["h e", "  he"])
    assert read_gguf_vocab(metadata).merges == [("h", "e"), (" ", "he")]
    with pytest.raises(InvalidFileError, match=r"^tokenizer\.ggml\.merges\[1\] is '  he'; its parts"):
        Tokenizer.from_gguf(metadata)


def test_sentence_piece_merges_by_score() -> None:
    tokenizer = Tokenizer.from_gguf(spm())
    ids = {text: index for index, text in enumerate(spm()[PRE + "tokens"])}
    # "\u2581a" scores higher than "ab", so the merge of "ab" never happens.
    assert tokenizer.encode("ab", add_special_tokens=False) == [ids["\u2581ab"]]
    assert tokenizer.encode("cab", add_special_tokens=False) == [ids["\u2581"], ids["c"], ids["ab"]]
    assert tokenizer.encode("a") == [1, ids["\u2581a"]]
    assert tokenizer.encode("é", add_special_tokens=False) == [ids["\u2581"], ids["<0xC3>"], ids["<0xA9>"]]
    assert tokenizer.token_bytes(ids["<0xC3>"]) == b"\xc3"
    assert tokenizer.decode(tokenizer.encode("é ab")) == "é ab"
    # llama.cpp starts anew behind each special token.
    assert tokenizer.encode("a</s>a", add_special_tokens=False) == [ids["\u2581a"], 2, ids["\u2581a"]]


def test_wordpiece() -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2581play", "ing", "\u2581."]
    metadata = {
        PRE + "model": "bert",
        PRE + "tokens": tokens,
        PRE + "token_type": [3, 3, 3, 3, 1, 1, 1],
        PRE + "cls_token_id": 2,
        PRE + "seperator_token_id": 3,
        PRE + "unknown_token_id": 1,
        PRE + "padding_token_id": 0,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("Playing.") == [2, 4, 5, 6, 3]
    assert tokenizer.encode("xyz", add_special_tokens=False) == [1]
    assert tokenizer.decode([2, 4, 5, 6, 3]) == "playing."


def test_unigram() -> None:
    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("\u2581a", -1.0, 1),
        ("b", -2.0, 1),
        ("\u2581", -3.0, 1),
    ]
    metadata = {
        PRE + "model": "t5",
        PRE + "tokens": [text for text, _, _ in pieces],
        PRE + "scores": [score for _, score, _ in pieces],
        PRE + "token_type": [kind for _, _, kind in pieces],
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("ab a") == [3, 4, 3, 1]
    assert tokenizer.decode([3, 4, 3, 1]) == "ab a"


@pytest.mark.parametrize("name", sorted(name for name, entry in PRE_TOKENIZERS.items() if entry.byte_level))
def test_every_pre_tokenizer_compiles_and_loses_nothing(name: str) -> None:
    tokenizer = Tokenizer.from_gguf(gpt2(pre=name))
    text = "he HE'll  said: 12345 Größe 世界 かな 한국어\r\n\n\t(x²)  🦙 "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_grouped_from_the_right() -> None:
    tokens = [*byte_alphabet(), "12", "34", "345", "<e>"]
    changes = {"tokens": tokens, "merges": ["1 2", "3 4", "34 5"], "token_type": None, "eos_token_id": 259}
    for name in ("afmoe", "tiny_aya", "superbpe"):
        tokenizer = Tokenizer.from_gguf(gpt2(pre=name, padding_token_id=None, **changes))
        assert tokenizer.encode("12345") == [256, 258]


def test_unknown_pre_tokenizer_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Tokenizer.from_gguf(gpt2(pre="no-such-cut"))
    assert "no-such-cut" in caplog.text


def test_end_of_turn_rules() -> None:
    names = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "</s>"]

    def ends(count: int) -> set[str]:
        tokens = [*byte_alphabet(), *names[:count]]
        changes = {"tokens": tokens, "token_type": [1] * 256 + [3] * count, "merges": []}
        tokenizer = Tokenizer.from_gguf(gpt2(eos_token_id=None, padding_token_id=None, **changes))
        assert all(tokenizer.is_special(token) for token in tokenizer.eos_token_ids)
        return {tokens[token] for token in tokenizer.eos_token_ids}

    assert ends(1) == {"<|end|>"}
    assert ends(3) == {"<|return|>", "<|call|>"}  # then <|end|> only closes one message
    assert ends(5) == {"<|return|>", "<|call|>", "</s>"}


@pytest.mark.parametrize("kind", [1, 4])
def test_the_html_tag_as_plain_text_ends_nothing(kind: int) -> None:
    """It is a normal token of Qwen's vocabulary, and a user-defined token of Gemma 2's and 3's."""
    tokens = [*byte_alphabet(), "</s>", "<|im_end|>"]
    changes = {"tokens": tokens, "token_type": [1] * 256 + [kind, 3], "merges": []}
    tokenizer = Tokenizer.from_gguf(gpt2(eos_token_id=257, padding_token_id=None, **changes))
    assert tokenizer.eos_token_ids == (257,)
    assert tokenizer.decode([256, 257]) == "</s>"
    tokenizer = Tokenizer.from_gguf(gpt2(eos_token_id=256, padding_token_id=None, **changes))
    assert tokenizer.eos_token_ids == (256, 257)
    assert tokenizer.decode([256, 257]) == "", "the end-of-sequence token of the file is no tag"


HOSTILE: list[tuple[dict[str, Any], str]] = [
    (gpt2(model=None), "model"),
    (gpt2(model=7), "model"),
    (gpt2(tokens=None), "tokens"),
    (gpt2(tokens=[]), "tokens"),
    (gpt2(tokens="abc"), "tokens"),
    (gpt2(tokens=["a", 3]), "tokens[1]"),
    (gpt2(tokens=np.arange(4)), "tokens[0]"),
    (gpt2(tokens=["a", "b", "a"]), "'a' twice"),
    (gpt2(tokens=["a", "\ud800"]), "UTF-8"),
    (gpt2(tokens=["a", "b" * 100_000]), "tokens[1]"),
    (gpt2(token_type=[1, 1]), "token_type"),
    (gpt2(token_type=["x"] * 260), "token_type[0]"),
    (gpt2(token_type=np.zeros((260, 2), dtype=np.int32)), "token_type[0]"),
    (gpt2(merges=None), "merges"),
    (gpt2(merges=["he"]), "merges[0]"),
    (gpt2(merges=["he "]), "merges[0]"),
    (gpt2(merges=[["h", "e"]]), "merges[0]"),
    (gpt2(merges=["h zz"]), "merges[0]"),
    (gpt2(merges=["a b"]), "merges[0]"),
    (gpt2(pre=["x"]), "pre"),
    (gpt2(eos_token_id="x"), "eos_token_id"),
    (gpt2(eos_token_id=True), "eos_token_id"),
    (gpt2(add_bos_token="yes"), "add_bos_token"),
    (spm(scores=None), "scores"),
    (spm(scores=[0.0]), "scores"),
    (spm(scores=[float("nan")] * 266), "scores[0]"),
    (spm(scores=["x"] * 266), "scores[0]"),
    (spm(model="t5", precompiled_charsmap=np.arange(3, dtype=np.uint8)), "precompiled_charsmap"),
    (spm(model="t5", precompiled_charsmap=[255] * 64), "precompiled_charsmap"),
    (spm(model="t5", precompiled_charsmap=["x"] * 64), "precompiled_charsmap"),
    (spm(model="t5", precompiled_charsmap=[4, 0, 0, 0, 255, 255, 255, 255, 255, 255, 0]), "tokenizer"),
    (gpt2() | {"tokenizer.chat_template": 3}, "chat_template"),
]


@pytest.mark.parametrize(("metadata", "named"), HOSTILE, ids=[f"{i}-{named}" for i, (_, named) in enumerate(HOSTILE)])
def test_hostile_metadata_is_refused_by_name(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidFileError) as caught:
        Tokenizer.from_gguf(metadata)
    assert named in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", ["bos", "eos", "unknown", "padding", "seperator", "mask", "eot", "fim_pre", "fim_rep"])
@pytest.mark.parametrize("value", [266, 10**9, -5])
def test_an_id_beyond_the_vocabulary_is_ignored_by_name(key: str, value: int, caplog: pytest.LogCaptureFixture) -> None:
    """As in llama.cpp, which takes the default of the kind of tokenizer."""
    tokenizer = Tokenizer.from_gguf(spm(**{f"{key}_token_id": value}))
    assert f"tokenizer.ggml.{key}_token_id is {value}, which is ignored" in caplog.text
    without = Tokenizer.from_gguf({name: each for name, each in spm().items() if not name.endswith(f"{key}_token_id")})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (without.bos_token_id, without.eos_token_ids)
    assert tokenizer.encode("hello") == without.encode("hello")


@pytest.mark.parametrize(("template", "add", "begins"), [
    ("{{ messages[0].content }}", True, True), ("{{ messages[0].content }}", False, False),
    ("{{ bos_token }}{{ messages[0].content }}", True, True), ("{{ bos_token }}{{ messages[0].content }}", False, True),
    ("<s>{{ messages[0].content }}", True, True), ("<s>{{ messages[0].content }}", False, True),
])  # fmt: skip
def test_a_chat_begins_with_the_token_that_the_file_puts_before_texts(template: str, add: bool, begins: bool) -> None:
    tokenizer = Tokenizer.from_gguf(spm(add_bos_token=add) | {"tokenizer.chat_template": template})
    assert isinstance(tokenizer.chat_template, str)
    text = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(
        [{"role": "user", "content": "hello"}]
    )
    assert text == ("<s>hello" if begins else "hello")
    assert Tokenizer.from_gguf(spm(add_bos_token=True) | {"tokenizer.chat_template": ""}).chat_template == ""


def test_unsupported_model_says_what_is() -> None:
    with pytest.raises(UnsupportedModelError, match=r"rwkv.*gpt2, llama, bert"):
        Tokenizer.from_gguf(gpt2(model="rwkv"))


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=4), st.lists(st.text(max_size=3)),
    st.lists(st.integers(-1, 7), max_size=300), st.binary(max_size=20), st.lists(st.floats(), max_size=3),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([gpt2, spm]),
    st.sampled_from(["gpt2", "llama", "bert", "t5", "gemma4"]),
    st.dictionaries(
        st.sampled_from(
            ["tokens", "scores", "token_type", "merges", "pre", "bos_token_id", "eos_token_id", "unknown_token_id",
             "add_bos_token", "add_space_prefix", "precompiled_charsmap", "remove_extra_whitespaces"]
        ),
        VALUES,
        max_size=3,
    ),
)  # fmt: skip
def test_whatever_the_metadata_nothing_but_our_errors(make: Any, model: str, changes: dict[str, Any]) -> None:
    try:
        tokenizer = Tokenizer.from_gguf(make(model=model, **changes))
    except ModelLoadError:
        return
    ids = tokenizer.encode("ab he <s> é\n")
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(range(tokenizer.vocab_size))


def test_wrong_calls() -> None:
    tokenizer = Tokenizer.from_gguf(gpt2())
    with pytest.raises(InvalidParameterError, match="U\\+D83D"):
        tokenizer.encode("half \ud83d")
    with pytest.raises(InvalidParameterError):
        tokenizer.encode(b"bytes")  # type: ignore[arg-type]
    for wrong in (260, -1):
        with pytest.raises(InvalidParameterError, match="0 to 259"):
            tokenizer.decode([wrong])


def write_folder(folder: Path, **files: Any) -> Path:
    vocab = {"<s>": 0, "</s>": 1, "\u2581a": 2, "a": 3, "\u2581": 4, "<eot>": 5}
    backend = Backend(models.BPE(vocab, [("\u2581", "a")], unk_token="</s>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_folder(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
        "added_tokens_decoder": {
            "6": {"content": "<|im_end|>", "special": True},
            "7": {"content": "\u2581\u2581", "special": False},
        },
    }
    folder = write_folder(tmp_path, tokenizer_config__json=config, generation_config__json={"eos_token_id": [1, 5]})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("aaa") == [0, 3, 3, 3]  # the truncation in the file is switched off
    assert tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_ids == (1, 6)  # the generation config is the model's, not the tokenizer's
    assert tokenizer.is_special(6)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.chat_template == {"default": "D", "tool_use": "T"}
    assert tokenizer.decode([0, 2, 2]) == "a a"
    assert tokenizer.decode([3, 7, 3]) == "a  a"
    (folder / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(folder).chat_template == "J"


def test_marks_that_are_text_are_known_by_their_names() -> None:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "[TOOL_CALLS]", "\n\n", "<a b>")])
    assert Tokenizer(backend).mark_ids == {"<tool_call>": 2, "[TOOL_CALLS]": 3}


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer__json": "{"},
        {"tokenizer__json": {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}},
        {"tokenizer_config__json": "[]"},
        {"tokenizer_config__json": {"bos_token": 3}},
        {"tokenizer_config__json": {"chat_template": 3}},
        {"tokenizer_config__json": {"chat_template": [{"name": "x"}]}},
        {"tokenizer_config__json": {"added_tokens_decoder": {"x": {}}}},
        {"chat_template__json": "nonsense"},
        {"special_tokens_map__json": "[" * 100_000},
    ],
    ids=str,
)
def test_damaged_folder(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(InvalidFileError):
        Tokenizer.from_folder(write_folder(tmp_path, **files))
