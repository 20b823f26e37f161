# SPDX-License-Identifier: MIT
"""Match the patterns in an adapter's rank_pattern and alpha_pattern with module names, in time linear in the name.

PEFT treats a key as a regular expression and matches `(.*\\.)?(KEY)$`. An adapter is an untrusted file, so a pattern
is compiled to an automaton here, whose state is a set of positions in the pattern. Only letters, classes, groups,
alternatives, repetitions, and ^ and $ at the ends are supported; lookaround and backreferences raise an error.
Source: Glushkov, "The abstract theory of automata", 1961.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping

MAX_LENGTH = 4096
"""Maximum number of characters of a pattern."""
MAX_POSITIONS = 1024
"""Maximum number of letters and classes in a pattern, with repetitions expanded."""
_MOST_PATTERNS = 64  # each is matched with the name of every module

_TOO_LONG = f"written out it has more than {MAX_POSITIONS} letters"
_LETTERS = range(32, 127)
_WORD = frozenset(map(ord, string.ascii_letters + string.digits + "_"))
_DIGITS = frozenset(map(ord, string.digits))
_ALL = frozenset(_LETTERS)
_ESCAPES = {
    "w": _WORD, "W": _ALL - _WORD, "d": _DIGITS, "D": _ALL - _DIGITS, "s": frozenset({32}), "S": _ALL - {32},
}  # fmt: skip
_QUANTIFIERS: Mapping[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_SPECIAL = frozenset("\\[](){}*+?|^$")
_Part = tuple[bool, int, int]  # whether it may be empty; its first positions, and its last positions, as bits


class NamePattern:
    """A regular expression, or a plain name, in which "." is the only special character and means itself.

    Raises:
        ValueError: the pattern is too long, invalid, or has an unsupported feature.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"it has {len(text)} characters, at most {MAX_LENGTH} are allowed")
        self.literal = text if not _SPECIAL & set(text) else None
        self._text, self._at, self._read_atoms = text, 0, 0
        self._follow: list[int] = []
        if self.literal is None:
            self._read()

    @property
    def size(self) -> int:
        """Number of letters and classes of a regular expression; 0 for a plain name."""
        return len(self._follow)

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the name, or its end after a dot."""
        if self.literal is not None:
            return name == self.literal or name.endswith("." + self.literal)
        active = 0
        for index, letter in enumerate(name):
            begins = self._starts if not index else self._inner if name[index - 1] == "." else 0
            active = self._step(active, begins, ord(letter))
        return bool(active & self._ends)

    def _step(self, active: int, begins: int, letter: int) -> int:
        key = (active, begins, letter)
        known = self._known.get(key)
        if known is None:
            follow = begins
            for position in _bits(active):
                follow |= self._follow[position]
            known = follow & self._sets.get(letter, 0)
            if len(self._known) < 65536:
                self._known[key] = known
        return known

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        self._sets: dict[int, int] = {}
        self._known: dict[tuple[int, int, int], int] = {}
        self._starts = self._inner = self._ends = 0
        while True:
            anchored = self._take("^")
            _, first, last = self._sequence(0)
            self._take("$")
            self._starts |= first
            self._inner |= 0 if anchored else first
            self._ends |= last
            if self._at == len(self._text):
                return
            if not self._take("|"):
                raise ValueError(f"{self._text[self._at]!r} at character {self._at} is not allowed there")

    def _take(self, sign: str) -> bool:
        if self._text.startswith(sign, self._at):
            self._at += len(sign)
            return True
        return False

    def _alternatives(self, depth: int) -> _Part:
        empty, first, last = self._sequence(depth)
        while self._take("|"):
            other = self._sequence(depth)
            empty, first, last = empty or other[0], first | other[1], last | other[2]
        return empty, first, last

    def _sequence(self, depth: int) -> _Part:
        empty, first, last = True, 0, 0
        while self._at < len(self._text) and self._text[self._at] not in "|)$":
            start = self._at
            part = self._atom(depth)
            for again in self._repeats(start, part, depth):
                for position in _bits(last):
                    self._follow[position] |= again[1]
                first |= again[1] if empty else 0
                last = again[2] | (last if again[0] else 0)
                empty = empty and again[0]
        return empty, first, last

    def _repeats(self, start: int, part: _Part, depth: int) -> Iterator[_Part]:
        """Expand an atom with its quantifier into repeated parts."""
        least, most = self._counts()
        if (least, most) == (1, 1):
            yield part
            return
        end = self._at
        if most == 0:
            return
        copies = max(least, most or 0, 1)
        for copy in range(copies):
            if copy:
                self._at = start
                part = self._atom(depth)
            if most is None and copy == copies - 1:
                for position in _bits(part[2]):
                    self._follow[position] |= part[1]
            yield (part[0] or copy >= least, part[1], part[2])
        self._at = end

    def _counts(self) -> tuple[int, int | None]:
        sign = self._text[self._at : self._at + 1]
        if sign not in ("*", "+", "?", "{"):
            return 1, 1
        self._at += 1
        found = self._numbers() if sign == "{" else _QUANTIFIERS[sign]
        self._take("?")  # a lazy quantifier: only whether there is a match matters
        if self._text[self._at : self._at + 1] in ("*", "+", "{"):
            raise ValueError(f"a quantifier follows another one at character {self._at}")
        return found

    def _numbers(self) -> tuple[int, int | None]:
        inner, brace, _ = self._text[self._at :].partition("}")
        low, comma, high = inner.partition(",")
        numbers = [low, *([high] if high else [])]
        if not brace or not all(number.isascii() and number.isdigit() and len(number) < 5 for number in numbers):
            raise ValueError(f"the count at character {self._at} is not {{m}}, {{m,}} or {{m,n}}")
        self._at += len(inner) + 1
        least = int(low)
        most = int(high) if high else None if comma else least
        if most is not None and most < least:
            raise ValueError(f"the count {{{inner}}} has a lower bound above its upper bound")
        return least, most

    def _atom(self, depth: int) -> _Part:
        sign = self._text[self._at]
        self._at += 1
        self._read_atoms += 1
        if self._read_atoms > 8 * MAX_POSITIONS:
            raise ValueError(_TOO_LONG)
        if sign == "(":
            if depth > 20:
                raise ValueError("its groups are more than 20 deep")
            if self._take("?") and not self._take(":"):
                raise ValueError(
                    f"the group at character {self._at - 2} is not supported: write it as (...) or (?:...)"
                )
            part = self._alternatives(depth + 1)
            if not self._take(")"):
                raise ValueError("a group is not closed")
            return part
        if sign == "[":
            return self._position(self._class())
        if sign == "\\":
            return self._position(self._escape())
        if sign in "*+?{^":
            raise ValueError(f"{sign!r} at character {self._at - 1} is not allowed there")
        return self._position(_ALL if sign == "." else frozenset({ord(sign)}))

    def _escape(self) -> frozenset[int]:
        letter = self._text[self._at : self._at + 1]
        self._at += 1
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if not letter or letter.isalnum():
            raise ValueError(f"\\{letter} is not supported")
        return frozenset({ord(letter)})

    def _class(self) -> frozenset[int]:
        found, negated, first = set[int](), self._take("^"), True
        while first or not self._take("]"):
            if self._at >= len(self._text):
                raise ValueError("a class is not closed")
            letters, first = self._member(), False
            if len(letters) == 1 and self._text.startswith("-", self._at) and self._text[self._at + 1 :][:1] != "]":
                self._at += 1
                end = self._member() if self._at < len(self._text) else frozenset[int]()
                if len(end) != 1 or min(end) < min(letters):
                    raise ValueError("a class has an invalid range")
                if max(end) - min(letters) > 1024:
                    raise ValueError("a class has a range of more than 1024 letters")
                letters = frozenset(range(min(letters), max(end) + 1))
            found |= letters
        return _ALL - found if negated else frozenset(found)

    def _member(self) -> frozenset[int]:
        letter = self._text[self._at]
        self._at += 1
        return self._escape() if letter == "\\" else frozenset({ord(letter)})

    def _position(self, letters: frozenset[int]) -> _Part:
        bit = 1 << len(self._follow)
        if len(self._follow) >= MAX_POSITIONS:
            raise ValueError(_TOO_LONG)
        self._follow.append(0)
        for letter in letters:
            self._sets[letter] = self._sets.get(letter, 0) | bit
        return False, bit, bit


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def first_match(keys: Mapping[str, float], default: float) -> Callable[[str], float]:
    """Return a function that gives the value of the first pattern in `keys` that matches a name, or `default`.

    Raises ValueError if a pattern is invalid; the message names it.
    """
    literal, others = dict[str, tuple[int, float]](), list[tuple[int, NamePattern, float]]()
    positions = 0
    for order, (key, value) in enumerate(keys.items()):
        try:
            pattern = NamePattern(key)
        except ValueError as error:
            raise ValueError(f"key {key!r:.80}: {error}") from error
        if pattern.literal is not None:
            literal.setdefault(pattern.literal, (order, value))
            continue
        others.append((order, pattern, value))
        if len(others) > _MOST_PATTERNS:
            raise ValueError(f"there are more than {_MOST_PATTERNS} regular expressions")
        positions += pattern.size
        if positions > 4 * MAX_POSITIONS:
            raise ValueError(f"the regular expressions together have more than {4 * MAX_POSITIONS} letters")

    def find(name: str) -> float:
        found = [literal[name]] if name in literal else []
        at = name.find(".")
        while at >= 0:
            if name[at + 1 :] in literal:
                found.append(literal[name[at + 1 :]])
            at = name.find(".", at + 1)
        found += [(order, value) for order, pattern, value in others if pattern.matches(name)]
        return min(found)[1] if found else default

    return find
