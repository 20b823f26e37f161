"""Vocabularies of encoders as GGUF metadata: WordPiece is "bert", SentencePiece's unigram model "t5".

GGUF names no normaliser and no cut of theirs, so the result is read again, and must cut a text as the original does.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import ModelLoadError, UnsupportedModelError
from candle_vllm.core.text.gguf_backend import SPACE
from candle_vllm.core.text.gguf_vocab import CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED
from candle_vllm.core.text.tokenizer import Tokenizer

_INSIDE = "##"  # before a piece that begins no word
_NEVER = -10000.0  # score of a row without a token


def wordpiece(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The keys of a WordPiece vocabulary, in which a word's first piece is marked and the others are bare.

    Args:
        data: a `tokenizer.json`.
        texts: of every id.
    """
    model, kinds = data["model"], _kinds(data, texts, data["model"]["vocab"])
    named = (CONTROL, USER_DEFINED)
    normaliser = data.get("normalizer") or {}
    lowercase = bool(normaliser.get("lowercase", True))
    accents = normaliser.get("strip_accents")
    return {
        "model": "bert",
        "pre": "default",
        "tokens": [text if kind in named else _phantom(text) for text, kind in zip(texts, kinds)],
        "token_type": kinds,
        "unknown_token_id": model["vocab"][model["unk_token"]],
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
    }


def _phantom(text: str) -> str:
    inside = text.startswith(_INSIDE) and text != _INSIDE
    return text.removeprefix(_INSIDE) if inside else SPACE + text


def unigram(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The keys of a unigram vocabulary; arguments as of `wordpiece`."""
    pieces = data["model"]["vocab"]
    kinds = _kinds(data, texts, {text: index for index, (text, _) in enumerate(pieces)})
    unknown = data["model"].get("unk_id")
    if unknown is not None:
        kinds[unknown] = UNKNOWN
    scores = [float(score) for _, score in pieces]
    found: dict[str, Any] = {
        "model": "t5",
        "pre": "default",
        "tokens": list(texts),
        "token_type": kinds,
        "scores": [*scores, *[_NEVER] * (len(texts) - len(scores))],
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
    }
    if unknown is not None:
        found["unknown_token_id"] = unknown
    if charsmap := _charsmap(data.get("normalizer")):
        found["precompiled_charsmap"] = charsmap
    return found


def _kinds(data: Mapping[str, Any], texts: Sequence[str], known: Mapping[str, int]) -> list[int]:
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in data["added_tokens"]}
    words = [NORMAL if known.get(text) == index else UNUSED for index, text in enumerate(texts)]
    return [added.get(index, kind) for index, kind in enumerate(words)]


def _charsmap(normaliser: Mapping[str, Any] | None) -> bytes:
    """SentencePiece's normalisation, where the tokenizer has it."""
    steps = [] if normaliser is None else normaliser.get("normalizers") or [normaliser]
    maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return base64.b64decode(maps[0]) if maps and maps[0] else b""


def check_pieces(tokenizer: Tokenizer, metadata: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Cuts texts with the original and with what its metadata gives.

    Raises:
        UnsupportedModelError: they differ.
    """
    try:
        read = Tokenizer.from_gguf(metadata)
    except ModelLoadError as error:
        raise UnsupportedModelError(f"GGUF has no form for this tokenizer: {error}") from error
    if read.encode_batch(texts) != tokenizer.encode_batch(texts):
        raise UnsupportedModelError(
            f"GGUF's {metadata[PREFIX + 'model']} tokenizer cuts texts otherwise than this one does: use the folder as "
            "it is"
        )
