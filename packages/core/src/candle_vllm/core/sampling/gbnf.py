# SPDX-License-Identifier: MIT
"""GBNF, llama.cpp's grammars, converted to llguidance's dialect of Lark.

llguidance ends a terminal only where it cannot be longer, whereas a rule of GBNF may end anywhere. Rules without
recursion become terminals, which is fast. A grammar in which a terminal could take characters that may also follow it
(trailing white space before a line break), or in which a literal could begin with another text, has terminals of one
character only: its masks take several times as long. Two terminals that begin alike are not compared.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import lru_cache, reduce
from operator import or_
from typing import NamedTuple

from llguidance import gbnf_to_lark as gbnf

from candle_vllm.core.sampling.structured import refused

MAX_GBNF = 2_000  # rules and opening brackets of a grammar, in literals and comments too
MAX_GBNF_TEXT = 1 << 16  # its characters: the converter's time grows with the square of the number of comments or rules
_MAX_ROUNDS = 20  # over all rules; a grammar that needs more has terminals of one character
_RULE = re.compile(r"^(?=[ \t]*+[\w-]++[ \t]*+::=)", re.MULTILINE)
_BREAK = re.compile(r'("(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?)|#[^\n]*+|\r?\n')  # takes linear time
_CODES = re.compile(r"\\\\|\\x([89a-fA-F][0-9a-fA-F])|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")
_SET_OPERATORS = re.compile(r"([&~-])\1")  # of classes in Rust's regular expressions
_LITERAL = re.compile(r"(\\x..|\\.)|.", re.DOTALL)  # a character of the converter's literals


def gbnf_to_lark(text: str) -> str:
    """Convert a grammar. Raises InvalidParameterError if the text is too long, or not GBNF."""
    if len(text) > MAX_GBNF_TEXT:
        raise refused(
            f"the grammar has no rule 'start:', so it is read as GBNF, and has {len(text)} characters; at most "
            f"{MAX_GBNF_TEXT} are allowed"
        )
    brackets = len(re.findall(r"[(\[{]|::=", text))
    if brackets > MAX_GBNF:
        raise refused(f"the GBNF grammar has {brackets} rules and brackets; at most {MAX_GBNF} are allowed")
    try:
        # As in vLLM, a rule ends where the next one begins, not with its line.
        rules = (_BREAK.sub(lambda found: found[1] or " ", rule) for rule in _RULE.split(text))
        return _converted(gbnf.GrammarParser().parse(_CODES.sub(_character, "\n".join(rules))))
    except RecursionError:
        raise refused("the grammar is nested too deeply") from None
    except Exception as error:  # the converter raises any exception; an incomplete text is an IndexError
        raise refused(f"the grammar is neither Lark (no rule 'start:') nor GBNF: {error}") from None


def _character(code: re.Match[str]) -> str:
    """Spell a code as its character, or `\\xNN` if ASCII: the converter drops leading zeros of codes."""
    if not (digits := code[1] or code[2] or code[3]):
        return code[0]  # an escaped backslash
    character = chr(int(digits, 16))
    character.encode()  # refuses half a surrogate pair
    return character if character > "\x7f" else f"\\x{ord(character):02x}"


def _converted(rules: Mapping[str, gbnf.RuleNode]) -> str:
    """Return the rules in Lark, with names that stay unique when the converter changes their case.

    A rule around `root` is added, because the converter makes no terminal of `root`.
    """
    if "root" not in rules:
        raise ValueError("there is no rule 'root'")
    top = gbnf.RuleNode("root", gbnf.AlternativeNode([gbnf.RuleRefNode("root")]), "")
    nodes: list[gbnf.ASTNode] = [top, *rules.values()]
    for number, rule in enumerate(rules.values()):
        rule.name += f"-{number}"
    for node in nodes:
        nodes += node.children()
        if isinstance(node, gbnf.RuleRefNode) and node.name in rules:
            node.name = rules[node.name].name
        elif isinstance(node, gbnf.RegexNode):  # a class or `.`, which matches line breaks too
            node.rx = "(?s:.)" if node.rx == "." else _SET_OPERATORS.sub(r"\1\\\1", node.rx)
    gbnf.resolve(named := {rule.name: rule for rule in (top, *rules.values())})
    one_by_one = _may_end_early([*named.values()])
    for node in nodes:
        if isinstance(node, gbnf.RepetitionNode) and isinstance(node.node, (gbnf.RepetitionNode, gbnf.LiteralNode)):
            node.node = gbnf.AlternativeNode([node.node])  # which is written in brackets
        if one_by_one and isinstance(node, gbnf.RuleNode):
            node.name = node.name.lower()  # a rule, not a terminal
        elif one_by_one and isinstance(node, gbnf.LiteralNode):
            node.value = '" "'.join(found[0] for found in _LITERAL.finditer(node.value))
    return "\n".join(["%llguidance {}", *map(str, named.values())])


class _Ends(NamedTuple):
    """Where texts of an expression begin and end. Sets of characters are bits: ASCII, and bit 128 for all others."""

    empty: bool = False  # whether the empty text is one of them
    first: int = 0  # their first characters
    more: int = 0  # characters with which a text may become a longer one
    every: int = 0  # all their characters


def _may_end_early(rules: list[gbnf.RuleNode]) -> bool:
    """Return whether a terminal may be followed by a character with which it, or a longer literal, could also go on."""
    ends: dict[str | int, _Ends] = {rule.name: _Ends() for rule in rules}  # of rules, and of what is repeated
    after = {rule.name: 0 for rule in rules}
    terminals = {rule.name for rule in rules if rule.rule_is_terminal and not _of_literals(rule.alternatives)}
    literals, classes = dict[str, int](), dict[int, int]()  # not within terminals: what may follow them

    def spread(node: gbnf.ASTNode, following: int) -> _Ends:
        """Return the ends of `node`, and add what may follow each rule in it to `after`."""
        if isinstance(node, gbnf.LiteralNode):
            codes = _codes(node.value)
            if codes and not in_terminal:
                literals[node.value] = literals.get(node.value, 0) | following
            return _Ends(not codes, codes[0] if codes else 0, every=reduce(or_, codes, 0))
        if isinstance(node, gbnf.RegexNode):
            code = _first(node.rx)
            if not in_terminal:
                classes[code] = classes.get(code, 0) | following
            return _Ends(first=code, every=code)
        if isinstance(node, gbnf.RuleRefNode) and node.target is not None:
            after[node.target.name] |= following
            return ends[node.target.name]
        if isinstance(node, gbnf.RepetitionNode):
            again = ends[id(node)].first if node.max_times != 1 and id(node) in ends else 0  # of the last round
            ends[id(node)] = found = spread(node.node, following | again)
            more = found.more | (found.first if found.empty or node.max_times != node.min_times else 0)
            more |= found.every if found.more & found.first else 0  # a text may be divided in several ways
            return _Ends(found.empty or not node.min_times, found.first, more, found.every)
        if isinstance(node, gbnf.SequenceNode):
            total = _Ends(empty=True)
            for each in reversed(node.nodes):
                found = spread(each, total.first | (following if total.empty else 0))
                every, more = found.every | total.every, total.more | (found.more if total.empty else 0)
                more |= every if found.more & total.first else 0
                first = found.first | (total.first if found.empty else 0)
                total = _Ends(found.empty and total.empty, first, more, every)
            return total
        parts = [spread(each, following) for each in node.children()]
        empty, first, more, every = any(part.empty for part in parts), 0, 0, 0
        for part in parts:
            every |= part.every
            more |= part.more | (every if part.first & first else 0)  # a text may begin with another one
            first |= part.first
        return _Ends(empty, first, more | (first if empty else 0), every)

    for number in range(_MAX_ROUNDS):  # ends spread from the leaves, what may follow spreads from the root
        before = ends | {}, after | {}
        for rule in rules[:: -1 if number % 2 else 1]:
            in_terminal = rule.name in terminals
            ends[rule.name] = spread(rule.alternatives, after[rule.name])
        if before == (ends, after):
            others = [(ends[rule.name], after[rule.name]) for rule in rules if rule.name in terminals]
            if any(end.more & following for end, following in others):
                return True
            return _begin_literals(
                literals, [*others, *((_Ends(False, *[code] * 3), classes[code]) for code in classes)]
            )
    return True


def _begin_literals(literals: Mapping[str, int], others: list[tuple[_Ends, int]]) -> bool:
    """Return whether a literal may begin with another one, or with a text of `others`, that could also end there.

    Both are given with the characters that may follow them.
    """
    lengths, every, after = sorted({len(value) for value in literals}), [0] * 129, [0] * 129  # by first character
    for (end, following), code in itertools.product(others, range(129)):
        if end.first >> code & 1:
            every[code] |= end.every
            after[code] |= following
    for value in literals:
        first, *codes = _codes(value)
        begin = first.bit_length() - 1
        for code in codes:
            if code & after[begin]:
                return True
            if not code & every[begin]:
                break
        for length in lengths:
            if length < len(value) and literals.get(value[:length], 0) & _codes(value[length:])[0]:
                return True
    return False


def _of_literals(node: gbnf.ASTNode) -> bool:
    """Whether a rule is one literal, or one of several: it is compared as a literal, not as other terminals are."""
    parts = node.children() if isinstance(node, gbnf.AlternativeNode) else [node]
    return all(isinstance(part, gbnf.LiteralNode) for part in parts)


def _codes(literal: str) -> list[int]:
    """Return the bits of a literal's characters, as in `_Ends`."""
    return [_first(found[1] or re.escape(found[0])) for found in _LITERAL.finditer(literal)]


@lru_cache(1 << 10)
def _first(character: str) -> int:
    """Return the characters that a regular expression of one character matches, as in `_Ends`."""
    found = sum(1 << code for code in range(129) if re.fullmatch(character, chr(code)))
    return found if character.isascii() else found | 1 << 128
