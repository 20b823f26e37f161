# SPDX-License-Identifier: MIT
"""A tokenizer of bytes, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.text.tokenizer import utf8_decoder


class ByteTokenizer:
    """Ids 0 to 255 are bytes; four special tokens follow, and then the given ones.

    Args:
        special_tokens: names of further special tokens.

    Attributes:
        special_tokens: ids of all special tokens by name.
    """

    SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
    bos_token_id = 256
    eos_token_id = 257

    def __init__(self, special_tokens: Sequence[str] = ()) -> None:
        names = (*self.SPECIAL_TOKENS, *special_tokens)
        self.special_tokens = {name: 256 + place for place, name in enumerate(names)}
        self.vocab_size = 256 + len(names)
        self._names = names
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Return UTF-8 bytes as ids. By default the beginning token is first, and special tokens' names become ids."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._split.split(text) if parse_special else (text,):
            if parse_special and part in self.special_tokens:
                ids.append(self.special_tokens[part])
            else:
                ids.extend(part.encode("utf-8"))
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """As in `core.text.tokenizer.Tokenizer`."""
        kept = [token for token in token_ids if not (skip_special_tokens and self.is_special(token))]
        return utf8_decoder("replace").decode(b"".join(map(self.token_bytes, kept)), whole)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, also of a special one; raises InvalidParameterError for an unknown id."""
        if not 0 <= token_id < self.vocab_size:
            raise InvalidParameterError(f"there is no token {token_id}; ids run from 0 to {self.vocab_size - 1}")
        return bytes([token_id]) if token_id < 256 else self._names[token_id - 256].encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is special."""
        return 256 <= token_id < self.vocab_size
