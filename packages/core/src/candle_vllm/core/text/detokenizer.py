# SPDX-License-Identifier: MIT
"""Decode one sequence's tokens incrementally to text (step 9 of a request).

Every token stands for bytes (`Tokenizer.token_bytes`), and the text is their decoding as UTF-8. Incremental decoding of
bytes gives the same characters as decoding all at once, so that no token is decoded twice, and the deltas add up to
`Tokenizer.decode` of the whole output, in which an incomplete character at the end is U+FFFD.
"""

from __future__ import annotations

from collections.abc import Sequence

from candle_vllm.core.text.stop_scanner import StopScanner
from candle_vllm.core.text.tokenizer import Tokenizer, utf8_decoder

_MOST_BEGUN = 3  # maximum number of tokens in an incomplete character, which has at most three bytes


class Detokenizer:
    """Incremental detokenizer of one sequence, with stop strings.

    Tokenizers like SentencePiece write a space before every word and omit it at the very start of a text. Whether an
    output is at the start depends on the prompt: after a prompt with visible text the space is kept (prompt and output
    then join as in one text); after an empty prompt, or one of special tokens only, it is omitted, and the deltas add
    up to `tokenizer.decode(output)`.

    Attributes:
        is_plain: a next token in `Tokenizer.plain_texts` yields exactly its own text: no stop string may begin in it,
            no incomplete character is pending, no space is omitted.
        stopped_by: the stop string that ended the text, or None.
        special_tokens: (offset, id) of each special token in the text, with offsets in characters of the whole text;
            the caller removes entries. So a special token differs from a text that looks like it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        stops: StopScanner | None = None,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        continues_prompt: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._length = 0  # characters decoded
        self.special_tokens: list[tuple[int, int]] = []
        self._decoder = utf8_decoder("replace")
        self._begun = False  # the decoder holds an incomplete character
        if continues_prompt:
            self._decode(b"".join(map(tokenizer.token_bytes, prompt_token_ids[-_MOST_BEGUN:])))
        self._scanner = StopScanner(()) if stops is None else stops
        self._shows_all = self._scanner.idle
        self._strip_space = tokenizer.strips_leading_space and not self._any_visible(prompt_token_ids)
        self.is_plain = self._shows_all and not self._strip_space and not self._begun

    @property
    def stopped_by(self) -> str | None:
        return self._scanner.found

    def add(self, token_id: int) -> str:
        """Add one token and return the text that can be shown now; "" once a stop string was found.

        Raises:
            InvalidParameterError: the vocabulary has no such token.
        """
        self._num_tokens += 1
        if self.is_plain:
            text = self._tokenizer.plain_text(token_id)
            if text is not None:  # as nearly always
                self._length += len(text)
                return text
        data, special = self._tokenizer.token_bytes(token_id), self._tokenizer.is_special(token_id)
        if not data or (self._skip_special_tokens and special):
            return self._scanner.feed("", special=data.decode("utf-8", "replace") if special else "")
        if self._strip_space:
            self._strip_space = False
            data = data.removeprefix(b" ")
        text = self._decode(data)
        self.is_plain = self._shows_all and not self._begun
        self._length += len(text)
        name = ""
        if special:
            name = data.decode("utf-8", "replace")
            self.special_tokens.append((self._length - len(name), token_id))
        if self._shows_all:
            return text
        return self._scanner.feed(text, armed=self._num_tokens > self._min_tokens, special=name)

    def note_plain(self, text: str) -> None:
        """Account for a plain token's text that the caller showed without calling `add`."""
        self._length += len(text)

    def finish(self) -> str:
        """End the sequence and return the text that was held back. An incomplete character becomes U+FFFD."""
        tail = self._decoder.decode(b"", True)
        shown = self._scanner.feed(tail, armed=self._num_tokens > self._min_tokens)
        return shown + self._scanner.flush()

    def _decode(self, data: bytes) -> str:
        if not self._begun:
            try:
                return data.decode()  # whole characters, as nearly always
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(data)
        self._begun = bool(self._decoder.getstate()[0])
        return text

    def _any_visible(self, token_ids: Sequence[int]) -> bool:
        # From the end: the last token of a prompt is nearly always visible.
        return any(
            self._tokenizer.token_bytes(token_id)
            and not (self._skip_special_tokens and self._tokenizer.is_special(token_id))
            for token_id in reversed(token_ids)
        )
