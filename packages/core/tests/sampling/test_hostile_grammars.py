# SPDX-License-Identifier: MIT
"""Forms that are made to take time or memory: refused or compiled in seconds, and their masks bounded."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling import llguidance_compiler
from candle_vllm.core.sampling.gbnf import MAX_GBNF_TEXT
from candle_vllm.core.sampling.json_schema import Budget
from candle_vllm.core.sampling.lark import user_grammar
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import MAX_GRAMMAR, StructuredOutputsParams

SECONDS = 10  # of a slow machine; each takes one or two on a fast one
MEGABYTES = 400


def chain(levels: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Definitions each of which refers to the next one."""
    defs = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": defs | {f"d{levels}": {"type": "object"}}}


def properties(count: int, **schema: Any) -> dict[str, Any]:
    return {f"p{i}": schema for i in range(count)}


def slow(number: int) -> dict[str, Any]:
    """A text that takes long to meet with others of its kind."""
    return {"type": "string", "pattern": f".*a.{{{number + 5}}}b.*"}


def if_in_if(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for level in range(levels):
        schema = {"if": schema, "then": {"const": level}, "else": schema}
    return schema


SCHEMAS: dict[str, Callable[[], Any]] = {
    "enum of 50,000": lambda: {"enum": [f"value_{i}_{i * 7919 % 10007}" for i in range(50_000)]},
    "enum with one beginning": lambda: {"enum": ["x" * 15 + str(i) for i in range(50_000)]},
    "long constant": lambda: {"const": "a" * 900_000},
    "long key": lambda: {"type": "object", "properties": {"a" * 900_000: {}}, "required": ["a" * 900_000]},
    "many properties": lambda: {"type": "object", "properties": properties(4_000)},
    "many required": lambda: {"type": "object", "required": [f"p{i}" for i in range(4_000)]},
    "many definitions": lambda: chain(300, lambda ref: {"anyOf": [{"type": "object", "properties": {"a": ref}}]}),
    "a chain of definitions": lambda: chain(5_000, lambda ref: ref),
    "a chain beside properties": lambda: chain(290, lambda ref: {"type": "object", **ref}),
    "doubling": lambda: chain(60, lambda ref: {"allOf": [ref, ref]}),
    "doubling in properties": lambda: chain(60, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}}),
    "products": lambda: {
        "allOf": [{"anyOf": [{"properties": properties(3, const=i * j)} for i in range(10)]} for j in range(6)]
    },
    "counts": lambda: {"type": "array", "items": {"type": "array", "minItems": 10**9}, "minItems": 10**9},
    "nested counts": lambda: {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}},
    "long strings": lambda: {"type": "string", "minLength": 10**9},
    "counted optional": lambda: {
        "type": "object", "properties": properties(64), "minProperties": 1, "additionalProperties": False
    },
    "multiples": lambda: {"type": "integer", "multipleOf": 49_999, "minimum": 3, "maximum": 10**12},
    "many multiples": lambda: {"type": "object", "properties": {f"p{i}": {"multipleOf": 30_000 + i} for i in range(6)}},
    "many ranges": lambda: {
        "type": "object",
        "properties": {f"p{i}": {"type": "number", "minimum": 0.1234567 + i, "maximum": 1e6 + i} for i in range(4_000)},
    },
    "patterns": lambda: {
        "type": "object",
        "properties": {f"p{i}": {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(900)},
    },
    "patterns with lengths": lambda: {
        "type": "object",
        "properties": {
            f"p{i}": {"type": "string", "pattern": f"^(a|b)*a(a|b){{{i % 9}}}$", "minLength": i} for i in range(900)
        },
    },
    "pattern keys": lambda: {
        "type": "object", "patternProperties": {f"^a{i}(a|b)*a(a|b){{{i}}}$": {} for i in range(64)}
    },
    "patterns that meet": lambda: {"allOf": [slow(i) for i in range(15)]},
    "patterns that meet in a property": lambda: {
        "allOf": [{"type": "object", "properties": {"a": slow(i)}, "required": ["a"]} for i in range(15)]
    },
    "patterns that meet by reference": lambda: {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} | slow(i) for i in range(15)} | {"d15": {"type": "string"}},
    },
    "patterns that meet on any key": lambda: {
        "allOf": [{"type": "object", "additionalProperties": slow(i)} for i in range(15)]
    },
    "patterns that meet in elements": lambda: {"allOf": [{"type": "array", "items": slow(i)} for i in range(15)]},
    "alternatives": lambda: {"oneOf": [{"const": f"v{i}"} for i in range(9_000)]},
    "objects as alternatives": lambda: {
        "oneOf": [{"type": "object", "properties": {"k": {"const": i}}, "required": ["k"]} for i in range(2_500)]
    },
    "if in if": lambda: if_in_if(14),
    "opposites in a circle": lambda: {
        "not": {"$ref": "#/$defs/d0"},
        "$defs": {f"d{i}": {"not": {"$ref": f"#/$defs/d{(i + 1) % 500}"}} for i in range(500)},
    },
    "allOf in a circle": lambda: {
        "oneOf": [{"$ref": "#/$defs/a"}, {"type": "string"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}] * 100}}
    },
    "unique elements in a circle": lambda: {
        "type": "array", "uniqueItems": True, "items": {"$ref": "#/$defs/a"},
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 20}}
    },
    "cases that multiply": lambda: {"allOf": [{"dependentRequired": {f"a{i}": [f"b{i}"]}} for i in range(40)]},
    "many names": lambda: {"propertyNames": {"pattern": "^p"}, "required": [f"p{i}" for i in range(4_000)]},
    "much is contained": lambda: {"contains": {"const": 1}, "minContains": 3, "maxContains": 1 << 30},
    "all orders": lambda: {"uniqueItems": True, "items": {"enum": ["x" * 100 + str(i) for i in range(6)]}},
}  # fmt: skip

OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "50,000 choices": lambda: {"choice": [f"value_{i}_{i * 7919 % 10007}" for i in range(50_000)]},
    "repeats in repeats": lambda: {"regex": "((a{100}){100}){100}"},
    "words in repeats": lambda: {"regex": r"((\w{1,100} ){1,100}){1,100}"},
    "a late decision": lambda: {"regex": "(a|b)*a(a|b){30}"},
    "two late decisions": lambda: {"regex": r"(.*x.{30}|.*y.{31})z"},
    "nested stars": lambda: {"regex": "((a+)+)+b"},
    "a million": lambda: {"regex": "a{1000000}"},
    "unicode": lambda: {"regex": r"(\pL{100}){100}"},
    "brackets": lambda: {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "alternatives": lambda: {"regex": "|".join(f"abc{i}" for i in range(8_000))},
    "rules in brackets in a circle": lambda: {
        "grammar": "start: a0\n" + "\n".join(f'a{i}: (("x" a{(i + 1) % 600})? "y")*' for i in range(600))
    },
    "wide": lambda: {
        "grammar": "start: "
        + " | ".join(f"a{i}" for i in range(12_000))
        + "\n"
        + "\n".join(f'a{i}: "k{i}" (b ("," b)*)?' for i in range(12_000))
        + '\nb: "y"'
    },
    "deep in brackets": lambda: {"grammar": "start: " + "(" * 1_900 + '"a"' + ")?" * 1_900},
    "rules in a chain": lambda: {
        "grammar": "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "x"' for i in range(1_900)) + '\na1900: "y"'
    },
    "rules with brackets": lambda: {
        "grammar": "start: a0\n" + "\n".join(f'a{i}: (((a{i + 1} "x")* "b")? "c")+' for i in range(480)) + '\na480: "y"'
    },
    "too many rules": lambda: {"grammar": "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "x"' for i in range(2_500))},
    "doubling terminals": lambda: {
        "grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "y"'
    },
    "ambiguity": lambda: {"grammar": 'start: s\ns: s s | "a" | ""'},
    "much at once": lambda: {"grammar": "start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(5, 25))},
    "much at once, spread out": lambda: {
        "grammar": "start: T5\n" + "\n".join(f"T{i}: /.*a.{{{i}}}b.*/ & T{i + 1}" for i in range(5, 40)) + "\nT40: /.*/"
    },
    "negation": lambda: {"grammar": "start: A\nA: ~(/(a|b)*a(a|b){20}/ & /(a|b)*b(a|b){22}/) & /[ab]+/"},
    "a long rule": lambda: {"grammar": "start: " + '"a"? ' * 13_000},
    "gbnf in a chain": lambda: {
        "grammar": "root ::= a0\n" + "\n".join(f'a{i} ::= a{i + 1} "x"' for i in range(900)) + '\na900 ::= "y"'
    },
    "gbnf with an open string": lambda: {"grammar": 'root ::= "' + r"\"" * 32_000},
    "gbnf with brackets": lambda: {"grammar": "root ::= " + "(" * 1_500 + '"a"' + ")" * 1_500},
    "a schema in a grammar": lambda: {"grammar": f"start: %json {json.dumps(chain(5_000, lambda ref: ref))}"},
    "many tags": lambda: {
        "structural_tag": {
            "structures": [{"begin": f"<f{i}>", "schema": {"type": "object"}, "end": "</f>"} for i in range(900)],
            "triggers": ["<f"],
        }
    },
}


def check(backend: LlguidanceBackend, make: Callable[[], StructuredOutputsParams]) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, refusal = time.process_time(), None
    try:
        grammar = backend.compile(make())
        bits = np.zeros(10, np.int32)
        for _ in range(40):
            grammar.fill_mask(bits)
            flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
            if grammar.exhausted or not grammar.accept(int(np.flatnonzero(flags)[-1])):
                break
    except InvalidParameterError as error:
        refusal = error
    if refusal is not None:
        assert refusal.param == "structured_outputs"
        assert len(str(refusal)) < 700
    assert time.process_time() - start < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


@pytest.mark.one_of_each(10)
@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(backend: LlguidanceBackend, name: str) -> None:
    check(backend, lambda: StructuredOutputsParams(json=SCHEMAS[name]()))


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name.startswith("patterns that meet")])
def test_patterns_that_meet_are_refused_at_once(backend: LlguidanceBackend, name: str) -> None:
    start = time.process_time()
    with pytest.raises(InvalidParameterError, match=r"put \d+ patterns and formats on one text.*at most 8 may meet"):
        backend.compile(StructuredOutputsParams(json=SCHEMAS[name]()))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("name", "count"), [("much at once", 19), ("much at once, spread out", 17)])
def test_terminals_that_meet_are_refused_at_once(backend: LlguidanceBackend, name: str, count: int) -> None:
    start = time.process_time()
    with pytest.raises(InvalidParameterError, match=f"a terminal with {count} '&'.*at most 16 are allowed"):
        backend.compile(StructuredOutputsParams(**OTHERS[name]()))
    assert time.process_time() - start < 1


def test_patterns_apart_do_not_meet(backend: LlguidanceBackend) -> None:
    """In different properties, beside references with a description, and terminals of one rule."""
    apart = {f"p{i}": {"type": "string", "pattern": f"^x{i}$"} for i in range(30)}
    parts = [{"type": "object", "properties": dict([item])} for item in apart.items()]
    backend.compile(StructuredOutputsParams(json={"allOf": parts}))
    defs = {name: {"type": "object", "properties": {"id": schema}} for name, schema in apart.items()}
    named = {name: {"$ref": f"#/$defs/{name}", "description": "one"} for name in defs}
    backend.compile(StructuredOutputsParams(json={"type": "object", "properties": named, "$defs": defs}))
    rules = "\n".join(f"T{i}: /[a-z]+/ & ~/x{i}/" for i in range(30))
    rule = " | ".join(f'"<{i}" T{i}' for i in range(30))
    backend.compile(StructuredOutputsParams(grammar=f"start: {rule}\n{rules}"))


_PRODUCT = "/(.{0,50}a){0,50}/ & /(.{0,51}b){0,51}/"


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": f'start: "x" T\nT: {_PRODUCT}'},
        {"choice": ["y"], "around": f'start: @form "x" T\nT: {_PRODUCT}', "reasoning_end": "</think>"},
    ],
    ids=["grammar", "around"],
)
def test_what_llguidance_would_compile_for_ever_is_ended(
    backend: LlguidanceBackend, monkeypatch: pytest.MonkeyPatch, form: dict[str, Any]
) -> None:
    """None of its limits counts this; it is tried in a process, and this one has nothing to do."""
    monkeypatch.setattr(llguidance_compiler, "MOST_COMPILING", 1)
    start = time.process_time()
    with pytest.raises(InvalidParameterError, match="takes more than the 1 seconds or 2 GB that compiling"):
        backend.compile(StructuredOutputsParams(**form))
    assert time.process_time() - start < 1
    backend.compile(StructuredOutputsParams(regex="a"))


@pytest.mark.parametrize("program", [sys.executable, None])  # None: Python in another application, without a trial
def test_a_trial_changes_nothing(
    program: str | None, backend: LlguidanceBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is right passes it, special tokens included, and what is wrong is told by the compiler itself."""
    monkeypatch.setattr(sys, "executable", program)
    fine = "start: <think> T </think>\nT: /[a-z]{3,20}/ & /.*x.*/"
    assert backend.compile(StructuredOutputsParams(grammar=fine, reasoning_end="</think>")).legal([ord("a")]) == 1
    with pytest.raises(InvalidParameterError, match="not supported or wrong"):
        backend.compile(StructuredOutputsParams(grammar="start: T\nT: /a{2,3/ & /(b{1,2}/"))


@pytest.mark.one_of_each(7)
@pytest.mark.parametrize("name", OTHERS)
def test_others(backend: LlguidanceBackend, name: str) -> None:
    check(backend, lambda: StructuredOutputsParams(**OTHERS[name]()))


UNENDING = {  # how a grammar begins, what is repeated to a megabyte, and what the refusal says
    "a string": ('start: "', '\\"', "a string without an end"),
    "an expression": ("start: /", "\\/", "an expression without an end"),
    "quotes and slashes": ("start: ", '"/', "100000 names and strings"),
    "a word": ('start: "a"\n', "a", ""),
    "words in lines": ('start: "a"\n', "a\n", "100000 names and strings"),
    "empty lines": ("", "\n", "no rule 'start:'"),
    "tokens": ("start: ", "<a", "100000 names and strings"),
    "comments": ('start: "a"\n', "#\n", ""),
    "schemas": ("start: ", '%json "a" ', "must be an object or true"),
}


@pytest.mark.parametrize(("begin", "again", "why"), UNENDING.values(), ids=UNENDING)
def test_a_megabyte_of_a_grammar_is_looked_through_in_time(begin: str, again: str, why: str) -> None:
    """One search of `re` holds all threads up, so none may go to the end of the text from every place."""
    text = begin + again * ((MAX_GRAMMAR - len(begin)) // len(again))
    start, said = time.process_time(), ""
    try:
        user_grammar("g", text, StructuredOutputsParams(grammar=text), Budget())
    except InvalidParameterError as error:
        said = str(error)
    assert time.process_time() - start < 2
    assert why in said
    assert bool(why) == bool(said)
    assert len(said) < 700


def test_a_gbnf_grammar_of_comments() -> None:
    """The converter adds each comment to a text of all before it."""
    end = 'root ::= "a"'
    text = "#\n" * ((MAX_GBNF_TEXT - len(end)) // 2) + end
    start = time.process_time()
    user_grammar("g", text, StructuredOutputsParams(grammar=text), Budget())
    assert time.process_time() - start < 2
    with pytest.raises(InvalidParameterError, match="read as GBNF, and has 65542 characters"):
        user_grammar("g", "#\n" * 3 + text, StructuredOutputsParams(grammar=text), Budget())
