"""The shape of a user's grammar, bounded before it is compiled: the compiler recurses over rules and brackets.

A grammar may be wide, as one of a thousand tools is, but not deep: what is measured is the longest way from rule to
rule, rules that refer to each other in a circle added up, each with its brackets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from candle_vllm.core.sampling.structured import refused

MAX_DEPTH = 2_000
MAX_WORDS = 100_000  # names, strings and expressions of all rules
MAX_SEQUENCE = 5_000  # of them behind each other, without an alternative
MAX_MEETING = 16  # `&` of a terminal and of those inside it: every one may double the time that one takes


class LarkShape:
    """Takes the tokens of a grammar in their order."""

    def __init__(self) -> None:
        self._refers: dict[str, set[str]] = {"": set()}
        self._nested: dict[str, int] = {"": 0}
        self._meeting: Counter[str] = Counter()
        self._rule = ""
        self._lengths = [0]  # of the sequences that are open
        self._words = 0

    def rule(self, name: str) -> None:
        """A rule begins."""
        self._rule = name
        self._refers.setdefault(name, set())
        self._nested.setdefault(name, 0)
        self._lengths = [0]

    def word(self, name: str | None = None) -> None:
        """A name, or something else that a sequence is made of."""
        if name is not None:
            self._refers[self._rule].add(name)
        self._words += 1
        self._lengths[-1] += 1
        if self._words > MAX_WORDS or self._lengths[-1] > MAX_SEQUENCE:
            raise refused(f"the grammar has more than {MAX_WORDS} words, or {MAX_SEQUENCE} behind each other")

    def bracket(self, mark: str) -> None:
        """An opening or closing bracket, the bar between alternatives, or the `&` of what must hold together."""
        if mark == "&":
            self._meeting[self._rule] += 1
        elif mark == "|":
            self._lengths[-1] = 0
        elif mark in "([{":
            self._lengths.append(0)
            self._nested[self._rule] = max(self._nested[self._rule], len(self._lengths) - 1)
        elif len(self._lengths) > 1:
            self._lengths.pop()

    def check(self) -> None:
        """Refuses a grammar that is too deep, or has too many expressions that must hold together."""
        depth: dict[str, int] = {}
        meeting: dict[str, int] = {}
        group: dict[str, int] = {}
        for number, names in enumerate(self._circles()):
            group |= dict.fromkeys(names, number)
            beyond = {other for name in names for other in self._known(name) if group.get(other) != number}
            own = sum(1 + self._nested[name] for name in names)
            reached = own + max((depth[other] for other in beyond), default=0)
            depth |= dict.fromkeys(names, reached)
            if reached > MAX_DEPTH:
                raise refused(
                    f"the grammar's rules lead {reached} deep from one to the next, brackets included; at most "
                    f"{MAX_DEPTH} are allowed"
                )
            inside = beyond if _is_terminal(names[0]) else set()  # a rule's terminals do not meet
            together = sum(self._meeting[name] for name in names) + sum(meeting[other] for other in inside)
            meeting |= dict.fromkeys(names, together)
            if together > MAX_MEETING:
                raise refused(
                    f"the grammar has a terminal with {together} '&', those of the terminals inside it included (at "
                    f"{names[0]:.80}); at most {MAX_MEETING} are allowed"
                )

    def _known(self, name: str) -> list[str]:
        return [other for other in self._refers[name] if other in self._refers]

    def _circles(self) -> Iterator[list[str]]:
        """Rules that refer to each other, those that others refer to first (Tarjan's algorithm, without recursion)."""
        found: dict[str, int] = {}
        lowest: dict[str, int] = {}
        waiting: list[str] = []
        places: dict[str, int] = {}  # in `waiting`
        done: set[str] = set()
        for start in self._refers:
            if start in found:
                continue
            path = [(start, iter(self._known(start)))]
            found[start] = lowest[start] = len(found)
            places[start] = len(waiting)
            waiting.append(start)
            while path:
                name, others = path[-1]
                for other in others:
                    if other not in found:
                        found[other] = lowest[other] = len(found)
                        places[other] = len(waiting)
                        waiting.append(other)
                        path.append((other, iter(self._known(other))))
                        break
                    if other not in done:
                        lowest[name] = min(lowest[name], found[other])
                else:
                    path.pop()
                    if path:
                        lowest[path[-1][0]] = min(lowest[path[-1][0]], lowest[name])
                    if lowest[name] == found[name]:
                        circle = waiting[places[name] :]
                        del waiting[places[name] :]
                        done.update(circle)
                        yield circle


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()
