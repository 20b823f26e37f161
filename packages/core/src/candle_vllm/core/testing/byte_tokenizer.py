"""A tokenizer of bytes, for tests."""

from __future__ import annotations

import re
from collections.abc import Sequence


class ByteTokenizer:
    """Ids 0 to 255 are bytes; four special tokens follow. Every text is representable."""

    SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 256 + len(SPECIAL_TOKENS)
    _SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """UTF-8 bytes as ids, special tokens recognised in the text, the beginning token first unless unwanted."""
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._SPLIT.split(text):
            if part in self.SPECIAL_TOKENS:
                ids.append(256 + self.SPECIAL_TOKENS.index(part))
            else:
                ids.extend(part.encode("utf-8"))
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text; bytes that are no whole character become U+FFFD."""
        kept = [token for token in token_ids if token < 256 or not skip_special_tokens]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, also of a special one."""
        return bytes([token_id]) if token_id < 256 else self.SPECIAL_TOKENS[token_id - 256].encode()
