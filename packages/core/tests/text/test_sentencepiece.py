# SPDX-License-Identifier: MIT
"""Tokenizers of folders that have SentencePiece's file alone."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest

from candle_vllm.core.errors import CandleVllmError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.tokenizer import Tokenizer

SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["he", f"{SPACE}he", "ll", f"{SPACE}hell", "lo", SPACE * 2, *f"{SPACE}helowrd世"]
PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<|im_end|>", 0.0, 4)]
PIECES += [(text, 0.0, 6) for text in BYTES] + [(text, -float(rank), 1) for rank, text in enumerate(WORDS)]
AT = 4 + 256  # the id of the first word

REFERENCE = {  # of sentencepiece 0.2.3, for this very file
    "hello": [263, 270],
    "hello world": [263, 270, 266, 271, 270, 272, 269, 273],
    " hell": [266, 263],
    "w\xe9 \u4e16\u754c": [266, 271, 199, 173, 266, 274, 235, 153, 144],
    "he<|im_end|>": [261, 3],
}


def varint(value: int) -> bytes:
    """A number as protocol buffers write it; a negative one has ten bytes."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | str | bytes) -> bytes:
    """A field of a message."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def model(*, kind: int = 2, normalizer: bytes = b"", bos: int = 1) -> bytes:
    """A file of the vocabulary above, as SentencePiece's trainer writes it."""
    pieces = [field(1, field(1, text) + field(2, score) + field(3, kind)) for text, score, kind in PIECES]
    trainer = field(3, kind) + field(35, 1) + field(40, 0) + field(41, bos) + field(42, 2) + field(43, -1)
    plain = field(1, "identity") + field(2, b"") + field(3, 1) + field(4, 0) + field(5, 1)
    return b"".join([*pieces, field(2, trainer), field(3, plain + normalizer)])


def test_a_folder_with_the_model_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 3))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.encode("hello") == [1, *REFERENCE["hello"]]
    assert tokenizer.encode("", add_special_tokens=False) == []
    for text, expected in REFERENCE.items():
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.decode(expected) == text.replace("<|im_end|>", "")


def test_the_files_beside_it_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model())
    config = {"add_bos_token": False, "eos_token": "<|im_end|>", "chat_template": "T"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("he") == [AT + WORDS.index(f"{SPACE}he")]
    assert tokenizer.eos_token_ids[0] == 3
    assert tokenizer.is_special(3)
    assert tokenizer.chat_template == "T"


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_space_behind_special_tokens(tmp_path: Path, legacy: bool | None) -> None:
    """`legacy: false` of transformers' LlamaTokenizer: only the first word of a text gets one."""
    (tmp_path / "tokenizer.model").write_bytes(model())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    first, inner, space = (AT + WORDS.index(text) for text in (f"{SPACE}he", "he", SPACE))
    apart, spaced = ([inner], [first]) if legacy is False else ([first], [space, first])
    assert tokenizer.encode("he</s>he", add_special_tokens=False) == [first, 2, *apart]
    assert tokenizer.encode("he</s> he", add_special_tokens=False) == [first, 2, *spaced]
    assert tokenizer.encode("hello world", add_special_tokens=False) == REFERENCE["hello world"]
    assert tokenizer.decode(REFERENCE["hello world"]) == "hello world"


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_the_vocabulary_left_unused_get_their_names(tmp_path: Path, file: str) -> None:
    """InternLM 2: tokenizer.model has [UNUSED_TOKEN_145] where tokenizer_config.json has <|im_end|>."""
    (tmp_path / "tokenizer.model").write_bytes(model())
    unused, last = AT + WORDS.index(SPACE * 2), AT + len(WORDS)
    names = {unused: "<|im_start|>", 3: "<|im_end|>", 2: "</s>", last: "<new>"}
    named = {"special": True, "normalized": False}
    decoder = {index: {"content": text, **named} for index, text in names.items()}
    tokens = {text: index for index, text in names.items()}
    written = {"added_tokens_decoder": decoder} if file == "tokenizer_config.json" else tokens
    (tmp_path / file).write_text(json.dumps(written))
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("<|im_start|>he<|im_end|><new></s>", add_special_tokens=False)
    assert ids == [unused, AT + WORDS.index(f"{SPACE}he"), 3, last, 2]
    assert tokenizer.token_name(unused) == "<|im_start|>"
    assert 3 in tokenizer.eos_token_ids


def test_pieces_may_have_other_names(tmp_path: Path) -> None:
    """InternLM 2 gives pieces that it does not use the names of its marks, and has more tokens behind them."""
    (tmp_path / "tokenizer.model").write_bytes(model())
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_start|>", AT + 1: "<|plugin|>", AT + len(WORDS): "<img>"}
    config = {"added_tokens_decoder": {str(index): {"content": text, "special": True} for index, text in names.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|im_start|><|plugin|><img>") == [3, AT + 1, AT + len(WORDS)]
    assert tokenizer.encode("hello") != REFERENCE["hello"]  # its second piece is gone


def test_a_model_without_bos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(bos=-1))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": True}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("he") == [AT + WORDS.index(f"{SPACE}he"), 2]


@pytest.mark.parametrize("data", [model(kind=1), model(normalizer=field(2, b"abc")), model(normalizer=field(4, 1))])
def test_what_is_no_plain_byte_pair_model_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(UnsupportedModelError, match="convert it once"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the heads changed: an error of ours, or a tokenizer."""
    path, whole = tmp_path / "tokenizer.model", model()
    for data in (b"x", b"\x0b", b"\x80" * 11, field(1, 5), field(1, field(2, 1)), field(1, b"\x08" + b"\xff" * 9), b""):
        path.write_bytes(data)
        with pytest.raises(InvalidFileError, match="is not a SentencePiece model"):
            Tokenizer.from_folder(tmp_path)
    heads = [*range(40), *range(len(whole) - 60, len(whole))]
    for data in [whole[:cut] for cut in heads] + [whole[:at] + b"\xff" + whole[at + 1 :] for at in heads]:
        path.write_bytes(data)
        with contextlib.suppress(CandleVllmError):
            Tokenizer.from_folder(tmp_path)
