# SPDX-License-Identifier: MIT
"""Vocabulary of a SentencePiece file, tokenizer.model (loading, before step 3 of a request can run).

The file is a protocol buffer (`ModelProto` of sentencepiece_model.proto). Its values are converted to the metadata of a
GGUF file with a SentencePiece vocabulary, which `gguf_vocab` checks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.gguf_vocab import MAX_TOKENS, PREFIX, GgufVocab, read_gguf_vocab

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_BPE = 2  # of TrainerSpec.model_type
_MODEL_TYPE, _IDS = 3, {40: ("unknown", 0), 41: ("bos", 1), 42: ("eos", 2), 43: ("padding", -1)}  # of TrainerSpec
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # of NormalizerSpec

_Value = int | memoryview


def read_sentencepiece(path: Path) -> GgufVocab:
    """Read the vocabulary of a file whose size the caller has checked.

    Raises:
        InvalidFileError: the file is damaged.
        UnsupportedModelError: the file is not a byte-pair model, or it normalises texts.
    """
    try:
        metadata = _metadata(memoryview(path.read_bytes()), path)
        vocab = read_gguf_vocab(metadata)
    except InvalidFileError as error:
        raise InvalidFileError(f"{path} is not a SentencePiece model: {error}") from None
    # `read_gguf_vocab` replaces a missing id by Llama's; here -1 means that the vocabulary has no such token.
    ids = {name: index for name, index in vocab.ids.items() if metadata.get(f"{PREFIX}{name}_token_id") != -1}
    return replace(vocab, ids=ids, add_bos="bos" in ids)


def _metadata(data: memoryview, path: Path) -> dict[str, object]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_text(piece.get(1, memoryview(b""))))
            scores.append(_float(piece.get(2, memoryview(b"\0\0\0\0"))))
            types.append(_int(piece.get(3, 1)))
            if len(tokens) > MAX_TOKENS:
                raise InvalidFileError(f"it has more than {MAX_TOKENS} pieces")
        elif number in (_TRAINER, _NORMALIZER):
            (trainer if number == _TRAINER else normalizer).update(_fields(_bytes(value)))
    if not tokens:
        raise InvalidFileError("it has no pieces")
    plain = not normalizer.get(_CHARSMAP) and not _int(normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1))
    if not plain or _int(trainer.get(_MODEL_TYPE, 1)) != _BPE:  # ids of unigram models differ from the file's
        raise UnsupportedModelError(
            f"{path} (SentencePiece) is no byte-pair model, or normalises texts, and there is no tokenizer.json; "
            "convert it once with transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or use "
            "a GGUF file"
        )
    found: dict[str, object] = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": bool(_int(normalizer.get(_ADD_DUMMY_PREFIX, 1))),
    }
    found |= {f"{name}_token_id": _int(trainer.get(field, otherwise)) for field, (name, otherwise) in _IDS.items()}
    return {PREFIX + key: value for key, value in found.items()}


def _fields(data: memoryview) -> Iterator[tuple[int, _Value]]:
    """Yield the number and the value of each field of a message; values other than varints are bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise InvalidFileError(f"a field has the wire type {kind}")
        if size > len(data) - at:
            raise InvalidFileError(f"a field of {size} bytes is cut off after {len(data) - at}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[at : at + 10]):
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + shift // 7 + 1
    raise InvalidFileError("a number does not end")


def _int(value: _Value) -> int:
    if not isinstance(value, int):
        raise InvalidFileError("a number is of another type")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: _Value) -> memoryview:
    if isinstance(value, int):
        raise InvalidFileError("a message or a text is a number")
    return value


def _float(value: _Value) -> float:
    if len(raw := bytes(_bytes(value))) != 4:
        raise InvalidFileError("a score does not have 4 bytes")
    return struct.unpack("<f", raw)[0]


def _text(value: _Value) -> str:
    try:
        return bytes(_bytes(value)).decode()
    except UnicodeDecodeError:
        raise InvalidFileError("a piece is not UTF-8") from None
