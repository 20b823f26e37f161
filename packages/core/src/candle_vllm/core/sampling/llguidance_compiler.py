# SPDX-License-Identifier: MIT
"""Compile the form of a text to llguidance's matcher (step 7 of a request's life).

The matcher is made from a list of named grammars: "top", with the free text of the reasoning; the grammar of the form;
the grammars that it refers to; and one for the text around it. The option `no_forcing` allows every tokenization of a
text: to force the tokenizer's own, llguidance would call Python for every mask.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from candle_vllm.core.sampling import lark
from candle_vllm.core.sampling.json_schema import Budget
from candle_vllm.core.sampling.llguidance_grammar import Form, LlguidanceGrammar, cannot_go_on
from candle_vllm.core.sampling.structural_tag import structural_tag_grammars
from candle_vllm.core.sampling.structured import StructuredOutputsParams, check_whole, parsed_json, refused, shortened
from candle_vllm.core.sampling.token_trie import TokenTrie

if TYPE_CHECKING:
    from candle_vllm.core.sampling.unique_items import Compared

_OPTIONS = '%llguidance {"no_forcing": true}'
_NAMES = MappingProxyType({"json": "JSON schema", "json_object": "JSON object", "structural_tag": "structural tag"})


class Compiled(NamedTuple):
    """A form that was compiled for one vocabulary.

    Attributes:
        form: makes llguidance's matchers.
        size: characters of the grammars; twice as many with `compared`.
        compared: data to compare the elements of arrays (uniqueItems), which llguidance does not do; None without need.
    """

    form: Form
    size: int
    compared: Compared | None

    @property
    def is_spent(self) -> bool:
        """See `Form`."""
        return self.form.is_spent or (self.compared is not None and self.compared.twin.is_spent)


class Compiler:
    """Compiler of forms for one vocabulary. Thread-safe. `open_objects`: see `Budget`."""

    def __init__(self, trie: TokenTrie, open_objects: bool = False) -> None:
        self._trie = trie
        self._open_objects = open_objects

    def compile(self, spec: StructuredOutputsParams) -> Compiled:
        """Compile a form, at the start of a text. Raises InvalidParameterError: see `LlguidanceBackend`."""
        if spec.whitespace_pattern is not None:
            self._check_whitespace(spec.whitespace_pattern)
        name = _NAMES.get(spec.kind, spec.kind)
        may_compare = spec.kind == "json" and spec.around is None and self._are_plain(spec)
        budget = Budget(may_compare, self._open_objects)
        grammars = self._grammars(spec, budget)
        text = json.dumps({"grammars": grammars}, ensure_ascii=False)
        check_whole(f"the {name}", text)
        check_time(name, text)
        form = Form(partial(LLMatcher, self._trie.ll, text, log_level=0, limits=LIMITS))
        matcher = form.start()
        if matcher.is_error():
            raise refused(f"the {name} is not supported or wrong: {shortened(matcher.get_error())}")
        warnings = matcher.get_grammar_warnings()
        if warnings:
            raise refused(f"the {name} is not supported as it is: {shortened(' '.join(warnings))}")
        if not self._may_begin(matcher):
            raise refused(f"the {name} matches no text that this model can generate, other than the empty text")
        compared = self._compared(spec, grammars[1]) if budget.compared else None
        return Compiled(form, len(text) if compared is None else 2 * len(text), compared)

    def grammar(self, compiled: Compiled) -> LlguidanceGrammar:
        """Return a grammar of a compiled form, at the start of a text."""
        if compiled.compared is None:
            return LlguidanceGrammar(compiled.form, self._trie)
        from candle_vllm.core.sampling.unique_items import ComparedGrammar

        return ComparedGrammar(compiled.form, compiled.compared, self._trie)

    def _compared(self, spec: StructuredOutputsParams, form: lark.Grammar) -> Compared:
        from candle_vllm.core.sampling.unique_items import Compared
        from candle_vllm.core.sampling.unique_sites import Sites

        assert spec.json is not None
        alone = [{"name": "top", "lark_grammar": f"{_OPTIONS}\nstart: @form"}, form]
        text = json.dumps({"grammars": alone})
        twin = Form(partial(LLMatcher, LLTokenizer("byte"), text, log_level=0, limits=LIMITS))
        marks = (None if mark is None else self._mark(mark) for mark in (spec.reasoning_start, spec.reasoning_end))
        return Compared(Sites(parsed_json("json", spec.json)), twin, *marks)

    def _mark(self, mark: str) -> bytes | int:
        (piece,) = self._trie.literals.pieces(mark)
        return int(piece[2:-2]) if lark.is_token(piece) else mark.encode()

    def _are_plain(self, spec: StructuredOutputsParams) -> bool:
        """Return whether each mark of the reasoning is either a plain text or one token."""
        marks = filter(None, (spec.reasoning_start, spec.reasoning_end))
        return all(len(self._trie.literals.pieces(mark)) == 1 for mark in marks)

    def _may_begin(self, matcher: LLMatcher) -> bool:
        """Return whether any token except an end token may come first.

        Raises InvalidParameterError if the first mask alone exceeds llguidance's limits.
        """
        first, bits = matcher.deep_copy(), np.zeros(self._trie.words, np.int32)
        first.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if first.is_error():
            raise cannot_go_on(first)
        usable = self._trie.usable
        others = np.unpackbits((bits[: len(usable)] & usable).view(np.uint8), bitorder="little")
        others[list(self._trie.eos_ids)] = 0
        return bool(others.any())

    def _check_whitespace(self, pattern: str) -> None:
        """Refuse a pattern that matches more than JSON's whitespace: the text would not be JSON."""
        more = f"start: MORE\nMORE: /{regex_to_lark(pattern, '')}/ & ~/[ \\t\\r\\n]*/"
        check_time("whitespace_pattern", more)
        matcher = LLMatcher(self._trie.ll, more, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise refused(f"whitespace_pattern is not supported or wrong: {shortened(matcher.get_error())}")
        bits = np.zeros(self._trie.words, np.int32)
        matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if not matcher.is_error():  # a mask without an allowed token is an error
            raise refused("whitespace_pattern may match nothing but spaces, tabs and newlines, as in [ \\n]{0,4}")

    def _grammars(self, spec: StructuredOutputsParams, budget: Budget) -> list[lark.Grammar]:
        grammars = self._form(spec, budget)
        if spec.around is not None:
            grammars.append(lark.user_grammar("around", spec.around, spec, budget))
        answer = "@form" if spec.around is None else "@around"
        if spec.reasoning_end is None:
            rules = [f"start: {answer}"]
        else:
            rules = [f"answer: {answer}", *self._reasoning(spec.reasoning_start, spec.reasoning_end)]
        return [{"name": "top", "lark_grammar": "\n".join([_OPTIONS, *rules])}, *grammars]

    def _form(self, spec: StructuredOutputsParams, budget: Budget) -> list[lark.Grammar]:
        if spec.json is not None:
            return [lark.json_grammar("form", parsed_json("json", spec.json), spec, budget)]
        if spec.json_object:
            return [lark.json_grammar("form", {"type": "object"}, spec, budget)]
        if spec.regex is not None:
            return [{"name": "form", "lark_grammar": f"start: /{regex_to_lark(spec.regex, '')}/"}]
        if spec.choice is not None:
            return [
                {"name": "form", "lark_grammar": f"start: CHOICE\nCHOICE: {' | '.join(map(lark.quoted, spec.choice))}"}
            ]
        if spec.grammar is not None:
            return [lark.user_grammar("form", spec.grammar, spec, budget)]
        return structural_tag_grammars(spec, "form", self._trie.literals, budget)

    def _reasoning(self, start: str | None, end: str) -> list[str]:
        """Return rules for free text up to a mark, the whitespace that models write after it, then the answer."""
        first, *rest = self._trie.literals.pieces(end)
        if lark.is_token(first):  # any tokens except the mark and the end tokens
            stops = ",".join(map(str, sorted({int(first[2:-2]), *self._trie.eos_ids})))
            rules = [f"thought: <[^{stops}]>* {' '.join([first, *rest])}"]
        else:
            rules = [f"said[lazy]: TEXT {first}", f"thought: {' '.join(['said', *rest])}", f"TEXT: {lark.ANY_TEXT}"]
        rules += [r"SPACE: /[ \t\r\n]{1,16}/", r"GAP: /\n{1,2}/"]
        if start is None:
            return ["start: thought GAP? answer", *rules]
        opening = f"opening: SPACE? {self._trie.literals.expression(start)}"
        return ["start: opening thought GAP? answer | answer", opening, *rules]


# ---- limits of llguidance's work for one form ------------------------------------------------------------------------


_LIMITS: Mapping[str, Any] = MappingProxyType({
    "max_lexer_states": 60_000,  # of each form; a state takes up to 2 kB
    "max_grammar_size": 200_000,
    "verbose_errors": False,
})  # fmt: skip
LIMITS = LLParserLimits(**_LIMITS)
"""The limits that llguidance enforces."""
MOST_COMPILING = 10
"""Maximum seconds of a trial compilation, see `check_time`."""
_FEW = 1024  # a grammar of at most this many characters, without repetitions such as `{3,9}`, compiles in time
_COUNTED = re.compile(r"\{\d")
_TOKEN = re.compile(r"<\[[\d,^-]+\]>")
_TRIAL = """
import json, sys
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, 2 * (int(sys.argv[2]),))
    resource.setrlimit(resource.RLIMIT_AS, 2 * (1 << 31,))
except (ImportError, OSError, ValueError):
    pass
limits = LLParserLimits(**json.loads(sys.argv[1]))
LLMatcher(LLTokenizer("byte"), sys.stdin.buffer.read().decode(), log_level=0, limits=limits)
"""


def check_time(name: str, text: str) -> None:
    """Refuse grammars with intersections that llguidance would compile for too long, or with more than 2 GB.

    llguidance's limits do not count its work on the first byte of a terminal, for which it intersects large regular
    expressions of a user's grammar. Patterns of a schema are not affected, because they follow a quotation mark.
    """
    meets = "&" in text or "~" in text
    if meets and (len(text) > _FEW or _COUNTED.search(text)) and not _ends_in_time(text):
        raise refused(
            f"the {name} takes more than the {MOST_COMPILING} seconds or 2 GB that compiling may take: regular "
            "expressions that must hold together meet in too many ways; shorten their repetitions"
        )


def _ends_in_time(text: str) -> bool:
    """Return whether grammars compile within the limits: a trial over single bytes, in a process that can be killed.

    The compiler's errors are reported when the grammars are compiled in this process.
    """
    if getattr(sys, "frozen", False) or not sys.executable:  # it is not Python, or unknown
        return True
    known = _TOKEN.sub("<[256]>", text)  # a special token of the trial's vocabulary of bytes
    program = [sys.executable, "-P", "-c", _TRIAL, json.dumps(dict(_LIMITS)), str(MOST_COMPILING)]
    try:
        tried = subprocess.run(program, input=known.encode(), timeout=MOST_COMPILING, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode >= 0  # else a limit of the process has ended it
