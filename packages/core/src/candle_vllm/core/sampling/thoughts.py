# SPDX-License-Identifier: MIT
"""Reasoning budget (step 7 of a request's life): count reasoning tokens, and force the end of reasoning at a limit.

Reasoning is between two marks of the model's own format. Tokens between them are counted; when the budget is reached,
the closing mark is forced, token by token, and the answer continues after it. The name of a special token in a mark
means that token, as in `StructuredOutputsParams`. A text may mention a mark without special tokens: such an opening
mark counts only at the beginning of the text or directly after reasoning, such a closing mark only outside quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError

MAX_BUDGET = 1 << 24  # tokens
MAX_MARK = 256  # characters
MAX_MARKS = 32
MAX_MESSAGE = 2048  # characters
THOUGHT_TOKENS = (
    ("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)  # fmt: skip
"""Marks that are single tokens in some vocabularies, for `thinking_token_budget`, which has no marks of its own."""
_QUOTES = (b"`", b'"', b"'")
_SPECIAL = b"\xff"  # begins a special token among bytes of text: UTF-8 has no such byte


class ThoughtBudget(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budget of reasoning tokens for a text.

    Attributes:
        tokens: maximum number of reasoning tokens of the text, without the marks; at 0 reasoning ends where it begins.
        marks: opening mark -> the closing mark, which is forced.
        ends: further marks that end reasoning when the model writes them.
        opened: the opening mark at the end of the prompt; the text then begins within reasoning.
        message: text that is forced before the closing mark, unless `tokens` is 0 or the model has begun the mark.
    """

    tokens: int
    marks: Mapping[str, str]
    ends: Sequence[str] = ()
    opened: str | None = None
    message: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 0 <= self.tokens <= MAX_BUDGET:
            raise _refused(f"tokens must be an integer of 0 to {MAX_BUDGET}")
        if not isinstance(self.marks, Mapping) or not 0 < len(self.marks) <= MAX_MARKS:
            raise _refused(f"marks must map 1 to {MAX_MARKS} opening marks to their closing marks")
        if isinstance(self.ends, (str, bytes)) or not isinstance(self.ends, Sequence) or len(self.ends) > MAX_MARKS:
            raise _refused(f"ends must be a list of at most {MAX_MARKS} texts")
        for mark in (*self.marks, *self.marks.values(), *self.ends):
            if not isinstance(mark, str) or not 0 < len(mark) <= MAX_MARK:
                raise _refused(f"marks must be texts of 1 to {MAX_MARK} characters")
        if self.opened is not None and self.opened not in self.marks:
            raise _refused("opened must be one of the opening marks")
        if not isinstance(self.message, str) or len(self.message) > MAX_MESSAGE:
            raise _refused(f"message must be a text of at most {MAX_MESSAGE} characters")


def budget_in_tokens(
    tokens: int, encode: Callable[[str], Sequence[int]], prompt: Sequence[int], ends: Collection[int]
) -> ThoughtBudget:
    """Make a budget with marks that a vocabulary has as single tokens.

    Args:
        tokens: maximum number of reasoning tokens.
        encode: tokenizes a text; names of special tokens become these tokens.
        prompt: the prompt, whose end determines whether the text begins within reasoning.
        ends: tokens that end a turn; marks before them do not concern the following turn.

    Raises:
        InvalidParameterError: the vocabulary has no pair of `THOUGHT_TOKENS` as single tokens.
    """
    ids = {pair: (encode(pair[0]), encode(pair[1])) for pair in THOUGHT_TOKENS}
    found = {pair: (opening[0], end[0]) for pair, (opening, end) in ids.items() if len(opening) == len(end) == 1}
    if not found:
        raise InvalidParameterError(
            "thinking_token_budget is not supported: this model has no tokens that mark its reasoning; set thoughts "
            "to a ThoughtBudget with the marks around the reasoning instead",
            "thinking_token_budget",
        )
    openings = {opening: pair[0] for pair, (opening, _) in found.items()}
    telling = {*openings, *(end for _, end in found.values()), *ends}
    last = next((token for token in reversed(prompt) if token in telling), None)
    return ThoughtBudget(tokens=tokens, marks=dict(tuple(found)), opened=None if last is None else openings.get(last))


def _refused(text: str) -> InvalidParameterError:
    return InvalidParameterError(f"thoughts: {text}", "thoughts")


class ThoughtLimit:
    """Budget for one vocabulary, shared by the texts of a request.

    Args:
        encode: tokenizes a text; the second argument is whether names of special tokens become these tokens.
        token_bytes: returns a token's bytes.
        special_tokens: ids by name.
    """

    def __init__(
        self,
        budget: ThoughtBudget,
        encode: Callable[[str, bool], Sequence[int]],
        token_bytes: Callable[[int], bytes],
        special_tokens: Mapping[str, int],
    ) -> None:
        self.tokens = budget.tokens
        self.message = tuple(encode(budget.message, False)) if budget.message and budget.tokens else ()
        marks = (*budget.marks, *budget.marks.values(), *budget.ends)
        names = [name for name in special_tokens if name and any(name in mark for mark in marks)]
        names.sort(key=len, reverse=True)
        self._special = {special_tokens[name]: _named(special_tokens[name]) for name in names}
        written = {name: self._special[special_tokens[name]] for name in names}
        self.starts = {_written(opening, written): tuple(encode(end, True)) for opening, end in budget.marks.items()}
        self.ends = tuple(_written(mark, written) for mark in (*budget.marks.values(), *budget.ends))
        self.longest = 1 + max(map(len, (*self.starts, *self.ends)))  # bytes of a mark and of a quote beside it
        self.opened = None if budget.opened is None else self.starts[_written(budget.opened, written)]
        self._token_bytes = token_bytes

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes in the form in which marks are searched."""
        return self._special.get(token) or self._token_bytes(token)


def _named(token: int) -> bytes:
    return _SPECIAL + token.to_bytes(4, "little")


def _written(mark: str, names: Mapping[str, bytes]) -> bytes:
    """Return a mark with its special tokens in the form of `_named`; `names` are sorted, longest first."""
    parts: list[str | bytes] = [mark]
    for name, data in names.items():
        cut: list[str | bytes] = []
        for part in parts:
            if isinstance(part, bytes):
                cut.append(part)
                continue
            first, *rest = part.split(name)
            cut.append(first)
            for text in rest:
                cut += [data, text]
        parts = cut
    return b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)


class ThoughtCount:
    """Count of one text's reasoning tokens.

    `inside` says whether the next token is within reasoning; `spent` counts reasoning tokens, but not forced ones.
    """

    def __init__(self, limit: ThoughtLimit) -> None:
        self._limit = limit
        self._start_over()

    def _start_over(self) -> None:
        self.inside = self._limit.opened is not None
        self.spent = 0
        self._closing = self._limit.opened or ()  # closing mark of the current reasoning
        self._tail = b""  # end of the text, in which no mark was found yet
        self._said: list[int] = []  # the last tokens of the current reasoning, enough for any mark
        self._fresh = True  # whether the text, or the text after reasoning, is only space or the beginning of a mark
        self._forced: tuple[int, ...] = ()  # the tokens that are still to be forced
        self._decide()

    def sibling(self) -> ThoughtCount:
        """Return the count for another text of the request, at its start."""
        return ThoughtCount(self._limit)

    @property
    def next_token(self) -> int | None:
        """The forced next token, or None."""
        return self._forced[0] if self._forced else None

    def add(self, token: int) -> None:
        """Count the next token."""
        if self.next_token == token:
            self._forced = self._forced[1:]
            if not self._forced:
                self._leave(b"")
            return
        if 0 < len(self._forced) < len(self._closing):  # a grammar forced a different token within the closing mark
            self._leave(b"")
        self._see(token)
        self._decide()

    def replay(self, tokens: Sequence[int]) -> None:
        """Restart the count with these tokens as the text."""
        self._start_over()
        for token in tokens:
            self.add(token)

    def _see(self, token: int) -> None:
        """Search for a mark that this token completes."""
        limit = self._limit
        data = limit.bytes_of(token)
        text = self._tail[-limit.longest :] + data
        if self.inside:
            self.spent += 1
            self._said = [*self._said, token][-limit.longest :]
        marks = limit.ends if self.inside else self._starts(text.lstrip())
        place, mark = max(((text.rfind(mark), mark) for mark in marks), default=(-1, b""))
        if place < 0:
            self._tail = text
            return
        quote, rest = text[place - 1 : place], text[place + len(mark) :]
        if not self.inside:
            self.inside, self._closing, self._tail = True, limit.starts[mark], rest
        elif quote in _QUOTES and _SPECIAL not in mark and rest[:1] in (b"", quote):
            self._tail = rest or text  # the next token determines whether the mark is in quotes
        else:
            self.spent -= self._tokens_of(mark + rest)  # tokens of a mark are not reasoning
            self._leave(rest)

    def _starts(self, text: bytes) -> list[bytes]:
        """Return the opening marks that count in a text, which begins without white space."""
        starts = self._limit.starts
        found = [mark for mark in starts if _SPECIAL in mark or (self._fresh and text.startswith(mark.lstrip()))]
        self._fresh = self._fresh and any(mark.lstrip().startswith(text) for mark in starts)
        return found

    def _leave(self, rest: bytes) -> None:
        self.inside, self._closing, self._tail, self._said, self._forced = False, (), rest, [], ()
        self._fresh = True

    def _tokens_of(self, text: bytes) -> int:
        """Return how many of the last tokens belong to a text that ends with them."""
        left = len(text)
        for count, token in enumerate(reversed(self._said), 1):
            left -= len(self._limit.bytes_of(token))
            if left <= 0:
                return count
        return len(self._said)

    def _decide(self) -> None:
        """When the budget is spent, force the rest of the closing mark that the model has not written itself."""
        if not self.inside or self.spent < self._limit.tokens or self._forced:
            return
        if self._tail.endswith(self._limit.ends):  # perhaps in quotes
            return
        closing = self._closing
        begun = next((n for n in range(len(closing) - 1, 0, -1) if tuple(self._said[-n:]) == closing[:n]), 0)
        self._forced = closing[begun:] if begun else (*self._limit.message, *closing)
