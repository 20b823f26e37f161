# SPDX-License-Identifier: MIT
"""Vocabularies of encoders as GGUF metadata: WordPiece is "bert", SentencePiece's unigram model "t5".

GGUF names neither the normaliser nor the pre-tokenizer of these, so the tokenizer that the metadata gives must tokenize
texts like the original. Byte-pair tokenizers are checked in the same way.
"""

from __future__ import annotations

import base64
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from candle_vllm.core.errors import ModelLoadError, UnsupportedModelError
from candle_vllm.core.text.gguf_backend import SPACE
from candle_vllm.core.text.gguf_vocab import CONTROL, NORMAL, PREFIX, UNKNOWN, UNUSED, USER_DEFINED
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from candle_vllm.core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_INSIDE = "##"  # prefix of a token that does not begin a word
_PRE = f"{PREFIX}pre"
_OLDER = {"granite-embed-multi-97m": "gpt-4o"}  # a name that more readers know, if it gives the same tokens
_NEVER = -10000.0  # score of a row without a token


def wordpiece(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a WordPiece vocabulary; in GGUF, the tokens that begin a word have a prefix, not the others.

    Args:
        data: a `tokenizer.json`.
        texts: text of every token id.
    """
    model, kinds = data["model"], _kinds(data, texts, data["model"]["vocab"])
    named = (CONTROL, USER_DEFINED)
    normaliser = data.get("normalizer") or {}
    lowercase = bool(normaliser.get("lowercase", True))
    accents = normaliser.get("strip_accents")
    unknown = model["vocab"].get(model["unk_token"])
    if unknown is None:
        raise UnsupportedModelError(
            f"this WordPiece tokenizer's unk_token is {model['unk_token']!r:.80}, which its vocabulary lacks"
        )
    return {
        "model": "bert",
        "pre": "default",
        "tokens": [text if kind in named else _with_word_mark(text) for text, kind in zip(texts, kinds)],
        "token_type": kinds,
        "unknown_token_id": unknown,
        "normalizer.lowercase": lowercase,
        "normalizer.strip_accents": lowercase if accents is None else bool(accents),
    }


def _with_word_mark(text: str) -> str:
    inside = text.startswith(_INSIDE) and text != _INSIDE
    return text.removeprefix(_INSIDE) if inside else SPACE + text


def unigram(data: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """Return the keys of a unigram vocabulary; see `wordpiece` for the arguments."""
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
    """Return SentencePiece's normalisation, if the tokenizer has it."""
    steps = [] if normaliser is None else normaliser.get("normalizers") or [normaliser]
    maps = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    return base64.b64decode(maps[0]) if maps and maps[0] else b""


def check_pieces(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], texts: Sequence[str], *, framed: bool = True
) -> None:
    """Tokenize texts with the original tokenizer and with the one that its metadata gives, and compare.

    Args:
        metadata: metadata with the keys of its vocabulary.
        texts: texts to tokenize.
        framed: compare the special tokens around a text too.

    Raises:
        UnsupportedModelError: the tokens differ, or GGUF has no form for the tokenizer.
    """
    try:
        same = Tokenizer.from_gguf(metadata).encode_batch(texts, framed) == tokenizer.encode_batch(texts, framed)
    except ModelLoadError as error:
        raise UnsupportedModelError(f"GGUF cannot express this tokenizer: {error}") from error
    if not same:
        raise UnsupportedModelError(
            f"GGUF's {metadata[PREFIX + 'model']} tokenizer splits texts differently from this one: serve the model "
            "from its safetensors folder instead"
        )


def check_byte_pair(
    tokenizer: Tokenizer, metadata: dict[str, Any], probe: str, ignore_merges: bool, behind: str = ""
) -> dict[str, Any]:
    """Check and return a byte-pair tokenizer's metadata, with an older pre-tokenizer name if it gives the same tokens.

    A normaliser that composes characters (Qwen's) cannot be stored in GGUF and is left out. If the name implies another
    value of `ignore_merges`, the text of every token is tried, not only the probe.

    Args:
        metadata: metadata with the keys of its vocabulary.
        probe: a text with many kinds of words.
        ignore_merges: whether the original uses the token of a whole word without merges.
        behind: special token that is put before each text of the probe; "" for none.

    Raises:
        UnsupportedModelError: the tokens of a text differ.
    """
    probe = unicodedata.normalize("NFC", probe)
    texts, pre = [behind + text for text in (probe, probe.lower(), *probe.split(" "))], metadata[_PRE]
    if (older := _OLDER.get(pre)) is not None:
        try:
            check_pieces(tokenizer, metadata | {_PRE: older}, [*texts, *_token_texts(tokenizer)], framed=False)
        except UnsupportedModelError:
            logger.warning("the file names the pre-tokenizer %s, which older programs do not know", pre)
        else:
            return metadata | {_PRE: older}
    elif metadata[f"{PREFIX}model"] == "gpt2" and PRE_TOKENIZERS[pre].ignore_merges != ignore_merges:
        texts += _token_texts(tokenizer)
    check_pieces(tokenizer, metadata, texts, framed=False)
    return metadata


def _token_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the text of every token."""
    texts = tokenizer.backend.decode_batch([[index] for index in tokenizer.backend.get_vocab().values()])
    return [unicodedata.normalize("NFC", text) for text in texts]
