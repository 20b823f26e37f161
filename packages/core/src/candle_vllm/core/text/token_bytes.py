# SPDX-License-Identifier: MIT
"""Convert tokens to bytes by the rules of the tokenizer's decoder (steps 3 and 9 of a request).

The `tokenizers` package decodes lists of tokens to text, and cannot decode a single token that is half a character. The
same rules applied to bytes have no such limit: the joined bytes of the tokens, decoded as UTF-8, are the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Spaces around English punctuation that WordPiece's decoder removes, in one token at a time.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class ByteRule:
    """Rule that converts token texts to bytes.

    Attributes:
        convert: converts the text of an ordinary token to its bytes.
        strips_leading_space: a whole text begins without the space of its first token.
        spells_added: added tokens that are not special are converted too; otherwise their bytes are their text.
    """

    convert: Callable[[str], bytes]
    strips_leading_space: bool = False
    spells_added: bool = False


def byte_rule(backend: Backend) -> ByteRule:
    """Return the rule of `backend`'s decoder.

    Raises UnsupportedModelError for a type of decoder with which single tokens have no bytes.
    """
    if backend.decoder is None:
        return ByteRule(lambda text: f" {text}".encode(), strips_leading_space=True)
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return ByteRule(_from_byte_alphabet)
    if "WordPiece" in kinds:
        return ByteRule(_wordpiece(steps[kinds.index("WordPiece")]), strips_leading_space=True)
    if "BPEDecoder" in kinds:
        suffix = steps[kinds.index("BPEDecoder")]["suffix"]
        return ByteRule(lambda text: text.replace(suffix, " ").encode())
    return _sentence_piece(steps)


def _sentence_piece(steps: list[dict[str, Any]]) -> ByteRule:
    replacements: list[tuple[str, str]] = []
    byte_fallback = strips = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
            strips = strips or step.get("prepend_scheme", "always") != "never"
        elif kind == "ByteFallback":
            byte_fallback = True
        elif kind == "Strip" and step["content"] == " " and step["stop"] == 0 and step["start"] <= 1:
            strips = strips or step["start"] == 1
        elif kind != "Fuse":
            raise UnsupportedModelError(
                f"tokenizer.json has a decoder of type {kind!r} that cannot be used here; supported are ByteLevel, "
                "WordPiece, BPEDecoder, Metaspace, ByteFallback, Fuse, and Replace and Strip of plain texts"
            )

    def convert(text: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        for old, new in replacements:
            text = text.replace(old, new)
        return text.encode()

    return ByteRule(convert, strips, spells_added=True)


def _wordpiece(step: dict[str, Any]) -> Callable[[str], bytes]:
    prefix, clean_up = step["prefix"], step["cleanup"]

    def convert(text: str) -> bytes:
        text = text.removeprefix(prefix) if text.startswith(prefix) else f" {text}"
        if clean_up:
            for old, new in _CLEAN_UP:
                text = text.replace(old, new)
        return text.encode()

    return convert


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 characters are their own byte, the other bytes begin at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(value): value for value in printable}
    others = (value for value in range(256) if chr(value) not in alphabet)
    alphabet |= {chr(0x100 + index): value for index, value in enumerate(list(others))}
    return alphabet


BYTE_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(text: str) -> bytes:
    try:
        return bytes([BYTE_ALPHABET[character] for character in text])
    except KeyError:
        return text.encode()  # a token outside the alphabet is plain text
