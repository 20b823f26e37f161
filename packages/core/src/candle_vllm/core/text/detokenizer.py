# SPDX-License-Identifier: MIT
"""Decode one sequence's tokens incrementally to text, and find stop strings in it (step 9 of a request).

Every token stands for bytes (`Tokenizer.token_bytes`), and the text is their decoding as UTF-8. Incremental decoding of
bytes gives the same characters as decoding all at once, so that no token is decoded twice, and the deltas add up to
`Tokenizer.decode` of the whole output, in which an incomplete character at the end is U+FFFD.

The stop string that is complete first ends the text; of several that end at the same character, the longest counts. So
the result does not depend on how the text is split into chunks, and only text that may begin a stop string is held
back. With `StopMarks`, stop strings are ignored in reasoning and tool calls and in the marks around them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from candle_vllm.core.arguments import ExplainedStruct
from candle_vllm.core.errors import InvalidParameterError

if TYPE_CHECKING:  # settings import this module, and must not import the tokenizers library
    from candle_vllm.core.text.tokenizer import Tokenizer

MAX_MARK = 1024  # characters
MAX_MARKS = 1 << 14  # number of marks of all states
_MOST_BEGUN = 3  # maximum number of tokens in an incomplete character, which has at most three bytes


class Detokenizer:
    """Incremental detokenizer of one sequence, with stop strings.

    Tokenizers like SentencePiece write a space before every word and omit it at the very start of a text. Whether an
    output is at the start depends on the prompt: after a prompt with visible text the space is kept (prompt and output
    then join as in one text); after an empty prompt, or one of hidden special tokens only, it is omitted, and the
    deltas add up to `tokenizer.decode(output)`.

    Attributes:
        is_plain: a next token in `Tokenizer.plain_texts` yields exactly its own text: there are no stop strings, no
            incomplete character is pending, no space is omitted.
        stopped_by: the stop string that ended the text, or None.
        special_tokens: (offset, id) of each special token in the text, with offsets in characters of the whole text;
            the caller removes entries. They distinguish a special token from a text that looks like it.
    """

    _num_tokens = 0
    _length = 0  # characters decoded
    _begun = False  # the decoder holds an incomplete character

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
        self.special_tokens: list[tuple[int, int]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if continues_prompt:
            self._decode(b"".join(map(tokenizer.token_bytes, prompt_token_ids[-_MOST_BEGUN:])))
        self._scanner = stops or NO_STOPS
        self._shows_all = stops is None
        self._strip_space = tokenizer.strips_leading_space and not self._any_visible(prompt_token_ids)
        self.is_plain = self._shows_all and not self._strip_space and not self._begun

    @property
    def stopped_by(self) -> str | None:
        return self._scanner.found

    def add(self, token_id: int) -> str:
        """Add one token and return the text that can be shown now; "" once a stop string was found.

        Raises InvalidParameterError if the vocabulary has no such token.
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
        if self._shows_all:
            return tail
        return self._scanner.feed(tail, armed=self._num_tokens > self._min_tokens) + self._scanner.flush()

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


class StopMarks(ExplainedStruct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """State machine of the parts of a text (answer, reasoning, tool call) and the marks between them.

    Stop strings are searched only in the state "" (the answer), after the whitespace that follows another state. The
    name of a special token in a mark means that token, as in `ThoughtBudget`.

    Attributes:
        states: state -> mark that ends it -> the next state. A state without marks lasts to the end of the text.
        fresh: mark -> the next state, for marks that count only at the beginning of a part in the state "".
        first: the state at the beginning of the text.
        behind: the prompt ends directly after another state, so leading whitespace is not searched for stop strings.
    """

    states: Mapping[str, Mapping[str, str]]
    fresh: Mapping[str, str] = {}
    first: str = ""
    behind: bool = False

    def __post_init__(self) -> None:
        marks = [mark for state in (*self.states.values(), self.fresh) for mark in state]
        if len(marks) > MAX_MARKS or not all(isinstance(mark, str) and 0 < len(mark) <= MAX_MARK for mark in marks):
            raise InvalidParameterError(
                f"stop_marks: at most {MAX_MARKS} marks of 1 to {MAX_MARK} characters are allowed", "stop_marks"
            )
        reached = {self.first, *self.fresh.values(), *(to for state in self.states.values() for to in state.values())}
        if unknown := sorted(reached - {"", *self.states}):
            raise InvalidParameterError(f"stop_marks: there is no state {unknown[0]!r:.80}", "stop_marks")


class _Prefix:
    """Matches a literal against the end of the text (Knuth, Morris and Pratt), in amortised constant time."""

    __slots__ = ("_borders", "length", "text", "then")

    def __init__(self, text: str, then: str = "") -> None:
        self.text = text
        self.then = then  # for a mark: the state after it
        self.length = 0  # length of the longest proper prefix of the literal that ends the text
        self._borders = [0]
        for character in text[1:]:
            border = self._borders[-1]
            while border and text[border] != character:
                border = self._borders[border - 1]
            self._borders.append(border + (text[border] == character))

    def advance(self, character: str) -> bool:
        """Add one character; True if it completes the literal."""
        length = self.length
        while length and self.text[length] != character:
            length = self._borders[length - 1]
        length += self.text[length] == character
        complete = length == len(self.text)
        self.length = self._borders[length - 1] if complete else length
        return complete


class _State:
    """Literals that are searched in one state."""

    __slots__ = ("_all", "_begins", "fresh", "marks", "stops")

    def __init__(self, stops: list[_Prefix], marks: Mapping[str, str], fresh: Mapping[str, str]) -> None:
        self.stops, self.fresh = stops, list(fresh.items())  # `fresh` marks match only at the beginning
        self.marks = [_Prefix(mark, then) for mark, then in marks.items()]
        self._all = [*stops, *self.marks]
        firsts = {one.text[0] for one in self._all}
        self._begins = re.compile("[" + "".join(map(re.escape, sorted(firsts))) + "]" if firsts else "(?!)")

    def idle(self, text: str) -> bool:
        """Whether no literal, apart from `fresh` marks, has begun or begins in the text."""
        return not (self._begins.search(text) or any(one.length for one in self._all))

    def enter(self) -> None:
        """Reset the partial matches from the last time in this state."""
        for one in self._all:
            one.length = 0


class StopScanner:
    """Pass text through until a stop string is complete.

    With `include_stop` the text ends after the stop string. `marks` limit the parts of the text in which stop strings
    count; they may contain names of `special_tokens`. `found` is the stop string that was found, or None.
    """

    def __init__(
        self,
        stops: Sequence[str],
        *,
        include_stop: bool = False,
        marks: StopMarks | None = None,
        special_tokens: Iterable[str] = (),
    ) -> None:
        self.found: str | None = None
        found = [_Prefix(stop) for stop in dict.fromkeys(stops) if stop]
        self._include_stop = include_stop
        self._held = ""
        self._pending: tuple[int, str] | None = None  # (characters after it, stop string); a mark may cancel it
        self._names = dict[str, str]()  # special tokens in marks -> placeholder characters
        states = {"": _State(found, {}, {})}
        if marks is not None and found:
            self._name(marks, special_tokens)
            states |= {name: _State([], self._named(ends), {}) for name, ends in marks.states.items()}
            states[""] = _State(found, self._named(marks.states.get("", {})), self._named(marks.fresh))
        self._states = states
        self._state = states[marks.first if marks is not None and found else ""]
        self._answer = states[""]
        self._skips = marks is not None and (marks.behind or bool(marks.first))  # whether leading whitespace is skipped
        self._part = 0  # characters of this part of the answer, without leading whitespace
        self._fresh = self._answer.fresh  # `fresh` marks that this part may still begin with

    def feed(self, text: str, *, armed: bool = True, special: str = "") -> str:
        """Add text and return the text that can be shown now.

        Args:
            text: the text; it may be the text of a special token.
            armed: whether a stop string that ends in this text counts.
            special: name of the special token that was sampled; its text may be hidden, and `text` is then empty.
        """
        if self.found is not None:
            return ""
        stands = self._names.get(special) if special and self._names else None
        if not text:
            if stands is not None:
                for character in stands:
                    self._read_mark(character)
            return ""
        if stands is None and not self._held and self._is_plain and self._state.idle(text):
            return text
        start, whole = len(self._held), self._held + text
        named = len(whole) - len(stands) if stands is not None else len(whole)  # index of the special token's name
        for position in range(start, len(whole)):
            character = whole[position]
            if self._pending is not None:
                self._pending = (self._pending[0] + 1, self._pending[1])
            if self._state is self._answer and not (self._skips and character.isspace()):
                self._skips = False
                stop = self._advance(character)
                if stop is not None and armed and self._pending is None:
                    self._pending = (0, stop)
            covers = self._read_mark(character if stands is None or position < named else stands[0])
            if self._pending is not None and self._pending[0] >= covers:
                return self._ends(whole[: position + 1])
        back = max((prefix.length for prefix in self._state.stops), default=0)
        if self._pending is not None:
            back = max(back, self._pending[0] + len(self._pending[1]))
        safe = len(whole) - back
        self._held = whole[safe:]
        return whole[:safe]

    def flush(self) -> str:
        """End the text and return what was held back."""
        if self._pending is not None:
            return self._ends(self._held)
        held, self._held = self._held, ""
        return held

    @property
    def _is_plain(self) -> bool:
        """Whether neither leading whitespace nor `fresh` marks matter now."""
        return self._state is not self._answer or not (self._skips or self._fresh)

    def _ends(self, whole: str) -> str:
        """Return the text up to the found stop string, which it includes if `include_stop` is set."""
        assert self._pending is not None
        back, stop = self._pending
        self.found, self._held, self._pending = stop, "", None
        return whole[: len(whole) - back - (0 if self._include_stop else len(stop))]

    def _advance(self, character: str) -> str | None:
        """Return the longest stop string that `character` completes."""
        longest: str | None = None
        for prefix in self._answer.stops:
            if prefix.advance(character) and (longest is None or len(prefix.text) > len(longest)):
                longest = prefix.text
        return longest

    def _read_mark(self, character: str) -> int:
        """Match marks at one character or placeholder; return how many of the last characters may begin a mark.

        A complete mark cancels a stop string that ends in it.
        """
        state, begun = self._state, 0
        longest: tuple[str, str] | None = None
        if self._fresh and state is self._answer and (self._part or not character.isspace()):
            self._part += 1
            self._fresh = [one for one in self._fresh if one[0].startswith(character, self._part - 1)]
            longest = next((one for one in self._fresh if len(one[0]) == self._part), None)
            begun = self._part if self._fresh else 0
        for prefix in state.marks:
            if prefix.advance(character) and (longest is None or len(prefix.text) > len(longest[0])):
                longest = prefix.text, prefix.then
            begun = max(begun, prefix.length)
        if longest is None:
            return begun
        if self._pending is not None and self._pending[0] < len(longest[0]):
            self._pending = None
        self._state = self._states[longest[1]]
        self._state.enter()
        self._skips, self._part, self._fresh = True, 0, self._answer.fresh
        return 0

    def _name(self, marks: StopMarks, special_tokens: Iterable[str]) -> None:
        """Choose placeholders for the special tokens in marks: lone surrogates, which no text contains."""
        literals = "\n".join(mark for state in (*marks.states.values(), marks.fresh) for mark in state)
        used = [name for name in sorted(special_tokens, key=len, reverse=True) if name and name in literals]
        self._names = {name: chr(0xD800 + place) * len(name) for place, name in enumerate(used[:0x800])}

    def _named(self, marks: Mapping[str, str]) -> Mapping[str, str]:
        """Return the marks with placeholders for their special tokens."""
        for name, stands in self._names.items():
            marks = {mark.replace(name, stands): then for mark, then in marks.items()}
        return marks


NO_STOPS = StopScanner(())
"""The scanner of every request without stop strings; it has no state, so they share it."""
