# SPDX-License-Identifier: MIT
"""Random texts of a grammar: walks over the tokens that core's backend allows."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from candle_vllm.core.sampling.structured import StructuredOutputsParams

END = "<end of text>"
_CLOSING = frozenset(b"\"'}])>,:=<\n")


class Vocabulary:
    """Every byte, some texts, and special tokens.

    Args:
        texts: ordinary tokens of more than a byte.
        special: names of special tokens.
    """

    def __init__(self, texts: Iterable[str], special: Sequence[str] = ()) -> None:
        names = [END, *special]
        self.tokens = [bytes([byte]) for byte in range(256)] + [name.encode() for name in names]
        self.special = {name: 256 + index for index, name in enumerate(names)}
        self.tokens += [text.encode() for text in dict.fromkeys(texts) if len(text.encode()) > 1]
        self.vocab_size = len(self.tokens)
        self.end = self.special[END]
        self._backend = LlguidanceBackend(self, self.vocab_size, [self.end])
        self.weights = {late: np.array([_weight(token, late) for token in self.tokens]) for late in (False, True)}

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        return 256 <= token_id < 256 + len(self.special)

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Tokens of a text: bytes, and special tokens where their names stand."""
        names = sorted(self.special, key=len, reverse=True) if parse_special else [END]
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return [index for part in parts for index in ([self.special[part]] if part in self.special else part.encode())]

    def compiler(self, lark: str) -> Callable[[], LlguidanceGrammar]:
        """Makes grammars at the start of a text."""
        spec = StructuredOutputsParams(grammar=lark)
        return lambda: self._backend.compile(spec)

    def text(self, ids: Iterable[int], characters: Mapping[int, str] | None = None) -> str:
        """The text of tokens; special tokens are the characters that stand for them."""
        found, run = [], b""
        for index in ids:
            if characters and index in characters:
                found += [run.decode(), characters[index]]
                run = b""
            else:
                run += self.tokens[index]
        return "".join([*found, run.decode()])

    def whole(self, ids: list[int]) -> list[int]:
        """Tokens without the beginning of a character at the end."""
        while ids:
            try:
                self.text(ids)
                return ids
            except UnicodeDecodeError:
                ids = ids[:-1]
        return ids


def accepts(grammar: LlguidanceGrammar, ids: Sequence[int]) -> tuple[int, bool]:
    """How many of the tokens may come, and whether the text may end behind them."""
    for taken, token in enumerate(ids):
        if not grammar.accept(token):
            return taken, False
    return len(ids), grammar.may_end


def allowed(grammar: LlguidanceGrammar, size: int) -> list[int]:
    """Ids of the tokens that may come next."""
    bits = np.zeros(-(-size // 32), np.int32)
    grammar.fill_mask(bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:size]).tolist()


def walk(
    grammar: LlguidanceGrammar,
    vocabulary: Vocabulary,
    rng: random.Random,
    *,
    begun: Sequence[int] = (),
    steps: int = 60,
    most: int = 6000,
) -> list[int]:
    """Tokens of a whole text that begins with those in `begun`. After `steps`, what closes something is preferred."""
    ids = list(begun)
    assert all(map(grammar.accept, ids)), vocabulary.text(ids)
    for step in range(most):
        if grammar.exhausted:
            return ids
        choices = allowed(grammar, vocabulary.vocab_size)
        assert choices, f"nothing may follow {vocabulary.text(ids)!r}"
        late = step > steps
        if grammar.may_end:
            assert vocabulary.end in choices
            choices.remove(vocabulary.end)
            if not choices or rng.random() < (0.9 if late else 0.25):
                return ids
        token = rng.choices(choices, vocabulary.weights[late][choices].tolist())[0]
        assert grammar.accept(token)
        ids.append(token)
    raise AssertionError(f"no end: {vocabulary.text(vocabulary.whole(ids))[:3000]!r}")


def _weight(token: bytes, late: bool) -> float:
    if len(token) > 1:
        return 40.0 if late else 4.0
    if token[0] in _CLOSING:
        return 40.0 if late else 4.0
    return 1.0 if 32 <= token[0] < 127 else 0.05
