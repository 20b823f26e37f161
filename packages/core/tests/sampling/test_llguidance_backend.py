# SPDX-License-Identifier: MIT
"""Grammars of every kind over a small vocabulary: which texts they take, token by token through their masks."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from candle_vllm.core.errors import EngineDeadError, InvalidParameterError
from candle_vllm.core.sampling import llguidance_backend, llguidance_grammar
from candle_vllm.core.sampling.device_edits import mask_flags
from candle_vllm.core.sampling.gbnf import gbnf_to_lark
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from tests.waiting import wait_for

SmallVocabulary = Any  # see conftest.py
SIZE = 300
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ARITHMETIC = r"""root ::= (expr "=" ws term "\n")+
expr ::= term ([-+*/] term)*
term ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num ::= [0-9]+ ws
ws ::= [ \t\n]*"""  # white space may begin in a term and end behind it
WRONG = StructuredOutputsParams(json={"$dynamicRef": "#a"})
PERSON_TEXT = '{"name": "x", "age": 12}'


def allowed(grammar: LlguidanceGrammar) -> set[int]:
    bits = np.zeros(-(-SIZE // 32), np.int32)
    grammar.fill_mask(bits)
    return set(np.flatnonzero(mask_flags(bits, SIZE)).tolist())


class Taker:
    """Takes texts with the small vocabulary; special tokens by their names."""

    def __init__(self, backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
        self.backend = backend
        self.vocabulary = vocabulary

    def __call__(self, text: str, **form: Any) -> bool:
        """Whether the whole text is taken, by its longest tokens and byte by byte alike."""
        by_words = self.walk(self.vocabulary.encode(text), **form)
        special = set(range(self.vocabulary.first_special, 300))
        ids = [
            byte
            for token in self.vocabulary.encode(text)
            for byte in ([token] if token in special else self.vocabulary.token_bytes(token))
        ]
        assert self.walk(ids, **form) == by_words
        return by_words

    def walk(self, ids: list[int], **form: Any) -> bool:
        grammar = self.backend.compile(StructuredOutputsParams(**form))
        for token in ids:
            if token not in allowed(grammar):
                return False
            assert grammar.accept(token)
        return grammar.may_end


@pytest.fixture
def takes(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> Taker:
    return Taker(backend, vocabulary)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"json": PERSON}, [PERSON_TEXT, '{"name":"x","age":-3}'], ['{"age": 1, "name": "x"}', "{}", "[]"]),
        ({"json": '{"type": "integer"}'}, ["12", "-1", "0"], ["1.5", "true", "01"]),
        ({"json": True}, ["null", '{"a": [true, 0.5, "\\n"]}'], ["nul", "{a: 1}", "'a'"]),
        ({"json_object": True}, ["{}", '{"a": {"b": null}}'], ["[]", "1", '{"a"}']),
        ({"regex": r"\d{2}-[a-z]+"}, ["12-abc"], ["1-abc", "12-", "12-aB", " 12-a"]),
        ({"regex": "^(a|b/c)$"}, ["a", "b/c"], ["^a$", "ab/c"]),
        ({"choice": ["yes", "no", 'a"\\b\n\x01\x7f</é']}, ["yes", "no", 'a"\\b\n\x01\x7f</é'], ["yesno", "y", "No"]),
        ({"grammar": 'start: "a" list\nlist: /[0-9]/ ("," list)?'}, ["a1", "a1,2,3"], ["a", "a1,"]),
        ({"grammar": '?start: "a"+'}, ["a", "aa"], ["", "b"]),
        ({"grammar": '%llguidance {}\n !start : "a"+'}, ["a", "aa"], ["", "b"]),
        ({"grammar": 'root ::= "a" [0-9]+ ("x" | "é")?'}, ["a1", "a12x", "a12é"], ["a", "ax"]),
        ({"grammar": 'root ::= word "s"\nword ::= [a-z]+'}, ["cats", "ss"], ["cat", "s"]),
        ({"grammar": 'root ::= [a-z]+ "ing"'}, ["inking", "inning"], ["in", "ing"]),
        ({"grammar": "root ::= [a-c&&b]+ [*--]+ [~~]"}, ["ac&*+,-~"], ["d*~", "a/~"]),
        ({"grammar": 'root ::= "<" .* ">"'}, ["<>", "<a\n>", "<a>b>"], ["<a", "<a>b"]),
        ({"grammar": 'root ::= "a" ([0-9]{2})? ("b"?)+'}, ["a12b", "a", "abb"], ["a1", "a123"]),
        ({"grammar": ARITHMETIC}, ["1+2=3\n", "a = b\n", "(a)=1\n\n(b )= c \n"], ["a=b", "a=(b)", "1a=2\n"]),
        ({"grammar": 'root ::= x ("cb" | "c") root | "."\nx ::= [ab]'}, ["bcbc.", "acbbc."], ["bcb", "cc."]),
        ({"grammar": 'root ::= x ("ccb")? root | "."\nx ::= [ac]'}, ["accc.", "accb."], ["accbb."]),
        ({"grammar": 'root ::= ("cac" | [ab] | x) root | "."\nx ::= "bc"'}, ["bcacb.", "bc."], ["cab.", "cbc."]),
        ({"grammar": 'root ::= ("c" y | y) root | "."\ny ::= "cc" | "b"'}, ["ccc.", "cb."], ["c.", "ac."]),
        (
            {"grammar": r'root ::= x "\xe9z" root | "."' + "\n" + r"x ::= [a\xc0-\xff]+"},
            ["àéz.", "éaééz."],
            ["éz.", "àé."],
        ),
        ({"grammar": 'root ::= "(" [a-z]* "end" root ")" | "."'}, ["(enxend.)", "(endend.)"], ["(en.)", "(end)"]),
        ({"grammar": 'root ::= e\ne ::= "[" e "]" | w "a"\nw ::= "ab"+'}, ["aba", "[ababa]"], ["ab", "abba"]),
        (
            {"grammar": 'root ::= "#" # "x"\n  | "y" [#"]\r\n  b\n# then\n  | c # d ::= "z"\n\nb ::=\n "b"\nc ::= "c"'},
            ["#", "y#b", 'y"b', "c"],
            ["y", "x", "b", "z"],
        ),
        ({"grammar": 'root ::= x "c" root | "."\nx ::= "ab" | "abc"'}, ["abc.", "abcc."], ["ab.", "ac."]),
        ({"grammar": 'root ::= x "c" root | "."\nx ::= "a" [a-c]* "c"'}, ["acc.", "abccacc."], ["ac.", "acb."]),
        ({"grammar": 'root ::= start "x"\nstart ::= "a"'}, ["ax"], ["a", "x"]),
        ({"grammar": 'root ::= ws WS Ws\nws ::= "a"\nWS ::= "b"\nWs ::= "c" Ws?'}, ["abc", "abcc"], ["ab", "cba"]),
        (
            {"grammar": r'root ::= [\u0430-\u044f\u002d]+ "\\u0021" "\u0021\U000000e9"'},
            ["д-а\\u0021!é"],
            ["да!", "da!é"],
        ),
        ({"grammar": 'start: "n=" %json {"type": "boolean"} "!"'}, ["n=true!"], ["n=1!", "n=true"]),
    ],
)
def test_kinds(takes: Taker, form: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert takes(text, **form), text
    for text in wrong:
        assert not takes(text, **form), text


@pytest.mark.parametrize("step", [1, -1])
def test_many_levels_of_rules_keep_terminals_of_several_characters(step: int) -> None:
    levels = [f'e{n} ::= e{n + 1} ("{n}-" e{n + 1})*' for n in range(40)][::step]
    text = "\n".join(['root ::= (e0 "\\n")+', *levels, 'e40 ::= "(" e0 ")" | word', "word ::= [a-z]+"])
    assert "WORD_42: /[a-z]/+" in gbnf_to_lark(text)


def test_whitespace(takes: Taker) -> None:
    assert takes('{ "name":  "x" ,\n    "age":\n\t1}', json=PERSON)
    assert not takes('{   "name": "x", "age": 1}', json=PERSON)
    assert not takes('{\n\n"name": "x", "age": 1}', json=PERSON)
    assert not takes("{\n" + " " * 41 + '"name": "x", "age": 1}', json=PERSON)
    assert takes('{"name":"x","age":1}', json=PERSON, disable_any_whitespace=True)
    assert not takes(PERSON_TEXT, json=PERSON, disable_any_whitespace=True)
    assert takes('{     "name":"x","age":1}', json=PERSON, whitespace_pattern=" {5}")
    assert not takes('{  "name":"x","age":1}', json=PERSON, whitespace_pattern=" {5}")
    for pattern, message in ((".", "nothing but spaces"), ("[ x]", "nothing but"), ("(", "unclosed group")):
        with pytest.raises(InvalidParameterError, match=f"^structured_outputs: whitespace_pattern .*{message}"):
            takes("", json=PERSON, whitespace_pattern=pattern)


def test_keys_are_not_said_twice_by_other_spellings(takes: Taker) -> None:
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}, "type": "object"}
    assert takes('{"a":1,"b":"x"}', json=schema)
    assert not takes('{"\\u0061":"x"}', json=schema)
    assert not takes('{"a":1,"a":"x"}', json=schema)


@pytest.mark.parametrize("mark", ["</think>", "<over>"])
def test_reasoning_up_to_a_mark(takes: Taker, mark: str) -> None:
    """The first is a special token, the second plain text."""
    form = {"json": PERSON, "reasoning_end": mark}
    assert takes(f"any {{thing}} é{mark}{PERSON_TEXT}", **form)
    assert takes(f"{mark}{PERSON_TEXT}", **form)
    assert not takes(PERSON_TEXT, **form)
    assert not takes(f"x{mark}y", **form)
    assert not takes("x<|end|>", **form)


@pytest.mark.parametrize(("start", "end"), [("<think>", "</think>"), ("<reason>", "</reason>")])
def test_reasoning_that_may_be_left_out(takes: Taker, start: str, end: str) -> None:
    form = {"json": PERSON, "reasoning_start": start, "reasoning_end": end}
    assert takes(PERSON_TEXT, **form)
    assert takes(f"{start}well{end}{PERSON_TEXT}", **form)
    assert takes(f"\n {start}well{end}{PERSON_TEXT}", **form)
    assert not takes(f"well{end}{PERSON_TEXT}", **form)
    assert not takes(f"{start}{PERSON_TEXT}", **form)


def test_any_special_token_may_stand_in_reasoning(takes: Taker) -> None:
    assert takes(f"a<|call|><think>b</think>{PERSON_TEXT}", json=PERSON, reasoning_end="</think>")


def test_something_else_instead(takes: Taker) -> None:
    """Also where both begin alike, as an answer and a call in JSON do."""
    call = {
        "type": "object",
        "properties": {"call": {"const": "f"}},
        "required": ["call"],
        "additionalProperties": False,
    }
    form = {"json": PERSON, "around": f"start: @form | %json {json.dumps(call)}"}
    for text in (PERSON_TEXT, '{"call": "f"}'):
        assert takes(text, **form)
        assert takes(f"so</think>{text}", reasoning_end="</think>", **form)
    assert not takes('{"call": "g"}', **form)
    assert not takes('{"name": "x"}', **form)
    assert takes("<call>1", choice=["yes"], around='start: @form | "<call>" /[0-9]/')


def test_marks_around_a_form(takes: Taker) -> None:
    form = {"choice": ["yes"], "around": 'start: ("<a>")? @form ("</a>")?'}
    for text in ("yes", "<a>yes</a>", "<a>yes"):
        assert takes(text, **form)
        assert takes(f"so</think>\n{text}", reasoning_end="</think>", **form)
    assert not takes("<a></a>", **form)
    assert not takes("<a>no</a>", **form)


OLDER = {
    "structures": [
        {"begin": "<f=a>", "schema": PERSON, "end": "</f>"},
        {"begin": "<f=b>", "schema": None, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
TAG = {"begin": "<t>", "content": {"type": "json_schema", "json_schema": PERSON}, "end": "</t>"}
ANY, END = {"type": "any_text"}, {"type": "const_string", "value": "END"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<t>"], "tags": [TAG]}


def newer(**format: Any) -> dict[str, Any]:
    return {"structural_tag": {"type": "structural_tag", "format": format}}


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (
            {"structural_tag": OLDER},
            ["", "free text", f"Hi <f=a>{PERSON_TEXT}</f> and <f=b>[1]</f>.", f"<f=a>{PERSON_TEXT}</f>"],
            ["<f=c>", "<f=a>{}</f>", f"<f=a>{PERSON_TEXT}"],
        ),
        (newer(type="const_string", value="a<|call|>b"), ["a<|call|>b"], ["ab", "a"]),
        (newer(type="json_schema", json_schema={"type": "null"}), ["null"], ["1"]),
        (newer(type="regex", pattern="a/[0-9]"), ["a/1"], ["a/"]),
        (newer(type="grammar", grammar='root ::= "b"+'), ["bb"], ["a"]),
        (newer(type="any_text"), ["", "anything <t>"], []),
        (newer(type="or", elements=[TAG | {"type": "tag"}, {"type": "const_string", "value": "no"}]), ["no"], ["<t>"]),
        (
            newer(
                type="sequence",
                elements=[
                    {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
                    {"type": "any_text"},
                    {"type": "const_string", "value": "END"},
                    {"type": "regex", "pattern": "[0-9]"},
                ],
            ),
            ["<think>so</think>textEND1", "<think></think>END2"],
            ["<think>so</think>text", "textEND1", "<think>so</think>ENDx"],
        ),
        (
            newer(type="tag", begin="<a>", content={"type": "any_text"}, end=["</a>", "<|call|>"]),
            ["<a>x</a>", "<a>x<|call|>"],
            ["<a>x", "<a>x</a>y"],
        ),
        (newer(type="triggered_tags", triggers=["<t"], tags=[TAG]), ["", f"x<t>{PERSON_TEXT}</t>y"], ["x<tt"]),
        (
            newer(type="triggered_tags", triggers=["<t>"], tags=[TAG], at_least_one=True, stop_after_first=True),
            [f"<t>{PERSON_TEXT}</t>"],
            ["", "x", f"<t>{PERSON_TEXT}</t>x"],
        ),
        (
            newer(type="triggered_tags", triggers=["<t>"], tags=[TAG], at_least_one=True),
            [f"<t>{PERSON_TEXT}</t>", f"<t>{PERSON_TEXT}</t>x<t>{PERSON_TEXT}</t>"],
            ["", f"x<t>{PERSON_TEXT}</t>"],
        ),
        (
            newer(type="triggered_tags", triggers=["<t>"], tags=[TAG], stop_after_first=True),
            ["", "free", f"free<t>{PERSON_TEXT}</t>"],
            [f"<t>{PERSON_TEXT}</t>x"],
        ),
        (
            newer(type="triggered_tags", triggers=["<|call|>"], tags=[TAG | {"begin": "<|call|>"}]),
            [f"x<|call|>{PERSON_TEXT}</t>"],
            ["<|call|>x"],
        ),
        (
            newer(type="triggered_tags", triggers=["<tt", "<t"], tags=[TAG, TAG | {"begin": "<tt>"}]),
            [f"x<tt>{PERSON_TEXT}</t>y<t>{PERSON_TEXT}</t>", f"<t>{PERSON_TEXT}</t>"],
            ["<ttt>"],
        ),
        (
            newer(type="sequence", elements=[END, {"type": "sequence", "elements": [ANY, END, ANY]}]),
            ["ENDxENDy"],
            ["ENDx"],
        ),
        (
            newer(type="tag", begin="<a>", content={"type": "or", "elements": [END, ANY]}, end=""),
            ["<a>", "<a>x"],
            ["x"],
        ),
        (
            newer(type="tags_with_separator", tags=[TAG], separator=";"),
            ["", f"<t>{PERSON_TEXT}</t>", f"<t>{PERSON_TEXT}</t>;<t>{PERSON_TEXT}</t>"],
            ["x", f"<t>{PERSON_TEXT}</t><t>"],
        ),
        (
            newer(type="tags_with_separator", tags=[TAG], separator=";", at_least_one=True, stop_after_first=True),
            [f"<t>{PERSON_TEXT}</t>"],
            ["", f"<t>{PERSON_TEXT}</t>;"],
        ),
    ],
)
def test_structural_tags(takes: Taker, form: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert takes(text, **form), text
    for text in wrong:
        assert not takes(text, **form), text


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ({"format": {"type": "any_text"}}, "lacks type"),
        ({"type": "other", "format": {"type": "any_text"}}, "it must be 'structural_tag'"),
        ({"triggers": ["a"]}, "lacks structures"),
        (OLDER | {"more": 1}, "has more, which is not supported"),
        (OLDER | {"triggers": ["<g="]}, "begins with none of the triggers"),
        (OLDER | {"triggers": []}, "triggers must be a list of at least one"),
        (newer(type="star", content={})["structural_tag"], "the format 'star'; supported are const_string"),
        (newer(type="any_text", excludes=["x"])["structural_tag"], "has excludes, which is not supported"),
        (newer(type=["or"])["structural_tag"], "the format "),
        (newer(type="json_schema", json_schema={}, style="qwen_xml")["structural_tag"], "the style 'qwen_xml'"),
        (newer(type="json_schema", json_schema={"$dynamicRef": "#"})["structural_tag"], "keyword '.dynamicRef'"),
        (newer(type="sequence", elements=[{"type": "any_text"}] * 2)["structural_tag"], "any_text in a sequence"),
        (
            newer(type="sequence", elements=[{"type": "or", "elements": [ANY, END]}, END])["structural_tag"],
            "must be the last",
        ),
        (
            newer(type="sequence", elements=[{"type": "sequence", "elements": [END, ANY]}, END])["structural_tag"],
            "the last",
        ),
        (newer(type="sequence", elements=[TRIGGERED, END])["structural_tag"], "must be the last"),
        (
            newer(type="sequence", elements=[TAG | {"type": "tag", "content": ANY, "end": ""}, END])["structural_tag"],
            "last",
        ),
        (
            newer(type="tag", begin="<a>", content=TRIGGERED, end="</a>")["structural_tag"],
            "content that may end with free",
        ),
        (
            newer(type="tag", begin="<a>", content={"type": "sequence", "elements": [END, ANY]}, end="</a>")[
                "structural_tag"
            ],
            "content that may end with free",
        ),
        (newer(type="regex", pattern="(")["structural_tag"], "unclosed group"),
        (newer(type="const_string", value="a" * 5000)["structural_tag"], "at most 4096"),
        (newer(type="tags_with_separator", tags=[{"type": "any_text"}], separator="")["structural_tag"], "a tag"),
    ],
)
def test_wrong_structural_tags(takes: Taker, tag: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        takes("", structural_tag=tag)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "(a"}, "regex is not supported or wrong: unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "a{0}"}, "other than the empty text"),
        ({"regex": r"[^\s\S]"}, "no token is allowed here"),
        (
            {"json": {"type": "string", "pattern": "(?=a)b"}},
            "JSON schema is not supported or wrong: look-around",
        ),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "minLength .3. is greater than maxLength .2."),
        (
            {"json": {"oneOf": [{"pattern": "a+b"}, {"pattern": "b"}]}},
            "'oneOf' .* values that 'pattern' excludes",
        ),
        ({"json": {"patternProperties": {"^a": {}, "b$": {}}}}, "are not disjoint"),
        ({"json": {"required": ["a"], "properties": {"a": False}, "type": "object"}}, "'a' is unsatisfiable"),
        ({"json": {"type": "any"}}, "JSON type 'any' is unknown .at #.; known: null, boolean"),
        ({"json": False}, "must be an object or true"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": r'{"enum": ["\ud800"]}'}, "the JSON schema has half a surrogate pair, which UTF-8 cannot encode"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "root ::= ("}, "neither Lark .* nor GBNF"),
        ({"grammar": 'main ::= "a"'}, "neither Lark .* nor GBNF: there is no rule 'root'"),
        ({"grammar": r'root ::= "\ud800"'}, "neither Lark .* nor GBNF: .*surrogates not allowed"),
        ({"grammar": 'root ::= "a" %json {}'}, "grammar is"),
        ({"grammar": 'start: x\nx[temperature=0.5]: "a"'}, "the option 'temperature', which is not supported"),
        ({"grammar": 'start: x "b"\nx[max_tokens=3]: /a+/'}, "'max_tokens'"),
        ({"grammar": 'start: x "b"\nx[stop="b"]: /a+/'}, "'stop'"),
        ({"grammar": 'start: %json {"$dynamicRef": "#"}'}, "keyword '.dynamicRef'"),
        ({"grammar": 'start: "%json" | %json {}'}, "%json where no schema can be"),
        ({"grammar": "start: %json x"}, "no JSON schema behind %json"),
        ({"grammar": "start: " + "(" * 3000}, "more than 2000 brackets inside each other"),
        ({"grammar": "start: " + '"a"' * 6000}, "5000 in one sequence"),
        ({"grammar": "root ::= " + "(" * 3000}, "3001 rules and brackets; at most 2000"),
    ],
)
def test_what_cannot_be_honoured_is_refused(takes: Taker, form: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        takes("", **form)
    assert caught.value.param == "structured_outputs"
    assert len(str(caught.value)) < 600


def test_a_grammar_may_name_what_its_options_are_called(takes: Taker) -> None:
    grammar = 'start: "stop=" /max_tokens=/ // temperature=1\n'
    assert takes("stop=max_tokens=", grammar=grammar)


def test_end_tokens(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """All of them wherever the text may end, none elsewhere; when it has ended, nothing else."""
    grammar = backend.compile(StructuredOutputsParams(regex="a{1,3}"))
    ends = set(vocabulary.ends)
    assert allowed(grammar) == {ord("a")}
    assert not grammar.may_end
    grammar.accept(ord("a"))
    assert allowed(grammar) == {ord("a"), *ends}
    assert grammar.may_end
    assert not grammar.exhausted
    for _ in range(2):
        grammar.accept(ord("a"))
    assert grammar.exhausted
    assert allowed(grammar) == ends
    assert not grammar.accept(ord("a"))
    assert grammar.accept(vocabulary.ends[1])
    early = backend.compile(StructuredOutputsParams(regex="a{1,3}"))
    early.accept(ord("a"))
    assert early.accept(vocabulary.ends[0])
    assert early.exhausted


def test_end_tokens_are_never_text(vocabulary: SmallVocabulary) -> None:
    """Also where the vocabulary has them as plain text."""
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, (vocabulary.encode("true")[0],))
    grammar = backend.compile(StructuredOutputsParams(json={"type": "boolean"}))
    assert allowed(grammar) == {ord("t"), ord("f"), *vocabulary.encode("false")}


def test_ids_without_a_token_are_never_allowed(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    for form in ({"grammar": "start: <[*]>"}, {"json_object": True, "reasoning_end": "</think>"}):
        found = allowed(backend.compile(StructuredOutputsParams(**form)))
        assert len(found) > 200
        assert max(found) < len(vocabulary.tokens)


def test_a_model_without_end_tokens(vocabulary: SmallVocabulary) -> None:
    for size in (288, 300):
        backend = LlguidanceBackend(vocabulary, size, ())
        grammar = backend.compile(StructuredOutputsParams(regex="a"))
        bits = np.zeros(-(-size // 32), np.int32)
        grammar.fill_mask(bits)
        assert np.flatnonzero(mask_flags(bits, size)).tolist() == [ord("a")]
        grammar.accept(ord("a"))
        assert grammar.exhausted


def test_rollback(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """The masks on the way back are those of the way there; the end is rolled back as well."""
    for form in ({"json": PERSON}, {"json": PERSON, "reasoning_end": "</think>"}):
        text = ("so</think>" if "reasoning_end" in form else "") + PERSON_TEXT
        ids = [*vocabulary.encode(text), vocabulary.ends[0], vocabulary.ends[1]]
        grammar = backend.compile(StructuredOutputsParams(**form))
        masks = []
        for token in ids:
            masks.append(allowed(grammar))
            assert grammar.accept(token)
        for back in (1, 2, 3, 5):
            grammar.rollback(back)
            rest = ids[len(ids) - back :]
            for token, mask in zip(rest, masks[len(ids) - back :]):
                assert allowed(grammar) == mask
                assert grammar.accept(token)
        grammar.rollback(len(ids))
        assert grammar.legal(ids) == grammar.legal([*ids[:-2], 0]) == len(ids) - 2, "the end counts for nothing"
        assert [grammar.legal(ids[:count]) for count in range(len(ids) - 1)] == [*range(len(ids) - 1)]
        assert allowed(grammar) == masks[0], "it stays where it is"


def test_rollback_too_far(backend: LlguidanceBackend) -> None:
    grammar = backend.compile(StructuredOutputsParams(regex="a+"))
    grammar.accept(ord("a"))
    with pytest.raises(ValueError, match="cannot go back by 2"):
        grammar.rollback(2)


def test_ff_tokens(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """What must come is said as the tokenizer says it, without what may be cut in another way; nothing else changes."""
    grammar = backend.compile(StructuredOutputsParams(json=PERSON, disable_any_whitespace=True))
    assert vocabulary.text(grammar.ff_tokens()) in '{"name":"'
    before = allowed(grammar)
    said: list[int] = []
    for token in vocabulary.encode('{"name":"x"'):
        for forced in grammar.ff_tokens():
            assert forced in allowed(grammar)
            break
        assert token in allowed(grammar)
        assert grammar.accept(token)
        said.append(token)
    forced = grammar.ff_tokens()
    assert vocabulary.text(forced) == ',"age'
    mask = allowed(grammar)
    assert grammar.ff_tokens() == forced
    assert allowed(grammar) == mask
    for token in forced:
        assert grammar.accept(token)
    grammar.rollback(len(forced) + len(said))
    assert allowed(grammar) == before
    assert backend.compile(StructuredOutputsParams(regex="[ab]c")).ff_tokens() == []


def test_the_mask_behind_a_forced_special_token(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """Asking what is forced does not change the mask, also if that is a special token."""
    grammar = backend.compile(StructuredOutputsParams(grammar='start: "a"? <|call|> "b"'))
    call = vocabulary.encode("<|call|>")
    assert len(call) == 1
    for token in (97, *call):
        grammar.ff_tokens()
        assert token in allowed(grammar)
        assert grammar.accept(token)
    assert allowed(grammar) == {98}


def test_no_text_is_not_cut_into_tokens(
    backend: LlguidanceBackend, vocabulary: SmallVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where anything may come, which is asked at each step, a tokenizer is not."""
    cut: list[str] = []
    kind, encode = type(vocabulary), type(vocabulary).encode
    monkeypatch.setattr(kind, "encode", lambda self, text, **rest: cut.append(text) or encode(self, text, **rest))
    grammar = backend.compile(StructuredOutputsParams(regex="[ab]ccdcc"))  # which no other test has
    assert grammar.ff_tokens() == []
    assert cut == []
    assert grammar.accept(97)
    grammar.ff_tokens()
    assert cut == ["ccdcc"]


def test_a_refused_token_ends_this_grammar_alone(backend: LlguidanceBackend) -> None:
    spec = StructuredOutputsParams(regex="ab")
    grammar, other = backend.compile(spec), backend.compile(spec)
    assert not grammar.accept(ord("b"))
    with pytest.raises(InvalidParameterError, match="cannot go on here"):
        allowed(grammar)
    assert allowed(other) == {ord("a")}


def test_what_was_compiled_is_kept_within_bounds(vocabulary: SmallVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, vocabulary.ends)
    backend.compile(StructuredOutputsParams(regex="a"))
    compiler = backend._built()
    compiled: list[str] = []
    compile_one = compiler.compile

    def counting(spec: StructuredOutputsParams) -> Any:
        compiled.append(spec.regex or "json")
        return compile_one(spec)

    monkeypatch.setattr(compiler, "compile", counting)
    monkeypatch.setattr(llguidance_backend, "MAX_CACHED", 2)
    for regex in ("a", "b", "a", "c", "a", "b"):
        backend.compile(StructuredOutputsParams(regex=regex))
    assert compiled == ["b", "c", "b"]
    monkeypatch.setattr(llguidance_backend, "MAX_CACHED_CHARACTERS", 1000)
    large = StructuredOutputsParams(json={"enum": ["x" * 2000]})
    for _ in range(3):
        backend.compile(large)
    assert compiled[3:] == ["json"], "the last one stays, however large"
    same = {"b": {"type": "null"}, "a": {"type": "null"}}
    for properties in (same, dict(reversed(same.items()))):
        backend.compile(StructuredOutputsParams(json={"properties": properties}))
    assert len(compiled) == 6, "the order of keys is that of the text"
    backend.close()


def test_many_threads(vocabulary: SmallVocabulary) -> None:
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, vocabulary.ends)
    failures = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                grammar = backend.compile(StructuredOutputsParams(choice=[f"a{(number + turn) % 5}", "b"]))
                assert backend.workers.submit(allowed, grammar).result() == {ord("a"), ord("b")}
                assert grammar.accept(ord("a"))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    backend.close()
    backend.close()


def test_equal_forms_at_the_same_time_are_compiled_once(
    vocabulary: SmallVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, vocabulary.ends)
    compiler = backend._built()
    begun, go_on, count, compile_one = threading.Event(), threading.Event(), [0], compiler.compile
    arrived, awaited = list[Any](), llguidance_backend._awaited

    def slow(spec: StructuredOutputsParams) -> Any:
        count[0] += 1
        begun.set()
        assert go_on.wait(60)
        return compile_one(spec)

    def waiting(other: Any) -> Any:
        arrived.append(other)
        return awaited(other)

    monkeypatch.setattr(compiler, "compile", slow)
    monkeypatch.setattr(llguidance_backend, "_awaited", waiting)
    for number, (form, right) in enumerate(((StructuredOutputsParams(regex="ab"), True), (WRONG, False)), 1):
        begun.clear()
        go_on.clear()
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(backend.compile, form)
            assert begun.wait(60)
            others = [pool.submit(backend.compile, form) for _ in range(3)]
            wait_for(lambda number=number: len(arrived) == 3 * number)
            go_on.set()
            for made in (first, *others):
                if right:
                    assert allowed(made.result()) == {ord("a")}
                else:
                    assert isinstance(made.exception(), InvalidParameterError)
        assert count[0] == number
        assert not backend._under_way
    assert len({id(made.exception()) for made in (first, *others)}) == 4, "each has a trace of its own"
    backend.close()


def test_a_closed_backend_makes_no_new_threads(vocabulary: SmallVocabulary) -> None:
    backend = LlguidanceBackend(vocabulary, vocabulary.vocab_size, vocabulary.ends)
    assert backend.workers is backend.workers
    backend.close()
    with pytest.raises(EngineDeadError, match="was closed"):
        _ = backend.workers


def test_a_fresh_grammar_is_at_the_start(backend: LlguidanceBackend) -> None:
    grammar = backend.compile(StructuredOutputsParams(regex="ab"))
    assert grammar.accept(ord("a"))
    other = grammar.fresh()
    assert (allowed(grammar), allowed(other)) == ({ord("b")}, {ord("a")})


_ENDING = """
import contextlib, itertools, threading
from candle_vllm.core.errors import EngineDeadError
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ByteTokenizer

tokenizer = ByteTokenizer()
backend = LlguidanceBackend(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,))
begun = threading.Event()
compiler = backend._built()
compile = compiler.compile

def compile_at_the_end(spec):
    begun.set()
    threading.main_thread().join()
    for _ in range(20):
        found = compile(spec)
    print("compiled", flush=True)
    return found

def work():
    compiler.compile = compile_at_the_end
    backend.compile(StructuredOutputsParams(regex="a+"))
    compiler.compile = compile
    with contextlib.suppress(EngineDeadError):
        for length in itertools.count(1):
            backend.compile(StructuredOutputsParams(regex="b" * length))

threading.Thread(target=work, daemon=True).start()
begun.wait()
print("main is over", flush=True)
"""


# A text behind x runs out of the lexer's fuel within a dozen tokens; a text of many ok does not.
RUNS_OUT = 'start: ("ok ")* "done" | "x" T\nT: ' + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(5, 11))
RAN_OUT = (
    "the grammar cannot go on here: a token needs more states of the grammar's regular expressions than are allowed"
)


def run_out(grammar: LlguidanceGrammar) -> None:
    """Writes a text that runs out."""

    def write() -> None:
        for byte in itertools.chain(b"x", itertools.cycle(b"aabaabbb")):
            allowed(grammar)
            assert grammar.accept(byte)

    with pytest.raises(InvalidParameterError, match=RAN_OUT):
        write()


def go_on(grammar: LlguidanceGrammar, vocabulary: SmallVocabulary, text: str) -> None:
    for token in vocabulary.encode(text):
        assert token in allowed(grammar)
        assert grammar.accept(token)


@pytest.mark.parametrize(
    "form",
    [
        {"grammar": RUNS_OUT},
        {"structural_tag": {"type": "structural_tag", "format": {"type": "grammar", "grammar": RUNS_OUT}}},
        {"choice": ["yes"], "around": RUNS_OUT.replace('"done"', '"done" | @form')},
    ],
    ids=["grammar", "structural_tag", "around"],
)
def test_a_text_that_runs_out_fails_alone(
    backend: LlguidanceBackend, vocabulary: SmallVocabulary, form: dict[str, Any]
) -> None:
    """Others of the same form, wherever they are, go on; so does the next one."""
    spec = StructuredOutputsParams(**form)
    started, halfway, sibling = (backend.compile(spec) for _ in range(3))
    go_on(halfway, vocabulary, "ok ok o")
    for _ in range(2):
        run_out(backend.compile(spec))
        run_out(sibling.fresh())
        ahead = halfway.copy()
        assert ahead is not None
        assert ahead.legal([ord("k")]) in (0, 1)
    for grammar in (started, sibling.fresh(), backend.compile(spec)):
        go_on(grammar, vocabulary, "ok ok done")
        assert grammar.exhausted
    assert halfway.accept(ord("k")), "a token is taken though its mask was made before the lexer was lost"
    go_on(halfway, vocabulary, " ok ")
    halfway.rollback(4)
    go_on(halfway, vocabulary, " done")
    assert halfway.exhausted


def test_guesses_do_not_use_up_a_text(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """A look ahead that runs out costs the text no more than its guesses."""
    grammar = backend.compile(StructuredOutputsParams(grammar=RUNS_OUT))
    ahead = grammar.copy()
    assert ahead is not None
    run_out(ahead)
    go_on(grammar, vocabulary, "ok")
    assert grammar.copy() is None
    assert grammar.legal([ord(" ")]) == 0
    go_on(grammar, vocabulary, " done")


def test_texts_that_run_out_at_the_same_time(vocabulary: SmallVocabulary) -> None:
    """In several threads with others of the same form between them."""
    backend, spec = LlguidanceBackend(vocabulary, SIZE, vocabulary.ends), StructuredOutputsParams(grammar=RUNS_OUT)
    grammars = [backend.compile(spec) for _ in range(16)]

    def write(number: int) -> None:
        if number % 2:
            run_out(grammars[number])
        else:
            go_on(grammars[number], vocabulary, "ok " * 12 + "done")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(len(grammars))))
    backend.close()


def test_lexers_are_renewed_for_a_bounded_time(vocabulary: SmallVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind it texts of the form are refused, and the form is compiled anew for the next request."""
    backend, spec = LlguidanceBackend(vocabulary, SIZE, vocabulary.ends), StructuredOutputsParams(grammar=RUNS_OUT)
    monkeypatch.setattr(llguidance_grammar, "_MOST_RENEWING", 0.0)
    first, second, third = (backend.compile(spec) for _ in range(3))
    run_out(first)
    with pytest.raises(InvalidParameterError, match="cannot go on here"):
        go_on(third, vocabulary, "ok")
    assert len(allowed(backend.compile(spec))) > 1
    go_on(backend.compile(spec), vocabulary, "ok done")
    with pytest.raises(InvalidParameterError, match="cannot go on here"):
        go_on(second, vocabulary, "ok")
    backend.close()


def test_compared_elements_outlive_their_lexer(backend: LlguidanceBackend, vocabulary: SmallVocabulary) -> None:
    """Arrays without repetitions are followed by a grammar of their own, whose lexer is shared too."""
    text = {"type": "string", "pattern": "^(o|k| )*$"}
    words = {"type": "array", "uniqueItems": True, "items": text}
    spec = StructuredOutputsParams(json=words, disable_any_whitespace=True)
    grammar = backend.compile(spec)
    go_on(grammar, vocabulary, '["ok","')
    for lost, tokens in (  # type: ignore[attr-defined]
        (grammar._text, grammar._trie.ll),
        (grammar._arrays._twin, LLTokenizer("byte")),
    ):
        lost._start = lost.matcher = broken(tokens)
    go_on(grammar, vocabulary, 'k"')
    assert ord("]") in allowed(grammar)


def broken(tokens: LLTokenizer) -> LLMatcher:
    """A matcher whose lexer is lost for all its copies."""
    matcher = LLMatcher(tokens, RUNS_OUT, log_level=0)
    text = matcher.deep_copy()
    for byte in itertools.chain(b"x", b"aabaabbb" * 8):
        text.compute_bitmask()
        text.consume_token(byte)
    matcher.compute_bitmask()
    assert matcher.is_error()
    return matcher


def test_the_end_of_the_interpreter_waits_for_what_is_compiled_in_a_daemon_thread() -> None:
    """Threads that want the interpreter's lock when it ends are made to unwind, which llguidance does not survive."""
    done = subprocess.run([sys.executable, "-c", _ENDING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["main is over", "compiled"]
