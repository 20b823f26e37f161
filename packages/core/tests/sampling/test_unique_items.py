# SPDX-License-Identifier: MIT
"""Arrays of open values that say nothing twice: no text repeats an element, and every other text can be said."""

from __future__ import annotations

import itertools
import json
import random
import time
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.device_edits import mask_flags
from candle_vllm.core.sampling.json_schema import Budget, compilable_schema
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.sampling.unique_sites import Sites
from packages.core.tests.sampling.schema_texts import accepts

WORDS = (
    *(
        "a",
        "b",
        "ab",
        "ba",
        "aa",
        '"a',
        'a"',
        '"a"',
        '","',
        '", "',
        '",',
        '"]',
        '["',
        '["a',
        '["a"',
        '["a","a"',
        '","a',
    ),
    *('","a"', '"a","', '"a","a"', ',"', ', "', ', "a', ',"a"', ',"a",', ' "', '  "a"', '\\"', "\\", '\\",', '\\\\"'),
    *("1", "12", "2", "-1", "-0", "0", "00", "1,", "1]", "1,1", ",1", ", 1", ",1,", "[1,1", "[1", "1 ", "[[", "],["),
    *('"],["', '"],["a","a"', "true", "false", "null", "true,", ",true", "true,true", ",null,", '{"k":["', '":["a","'),
    *(
        ".",
        ".5",
        "0.",
        ".0",
        "1.0",
        "1.5",
        "1.5,",
        ", 1.5",
        "1e1",
        "e",
        "e5",
        "E+",
        "-",
        "0000000",
        ".00",
        "5]",
        "1.0]",
    ),
    *("é", "éé", ' ",', "],", "]]", "}", '":', '{"'),
)
MARKS = ("<|end|>", "<think>", "</think>")


class Words:
    """Bytes, words that cross the bounds of elements, and special tokens."""

    def __init__(self) -> None:
        self.tokens = [bytes([value]) for value in range(256)] + [word.encode() for word in WORDS]
        self.first_special = len(self.tokens)
        self.tokens += [mark.encode() for mark in MARKS]
        self.vocab_size = len(self.tokens)
        self.end = self.first_special

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id >= self.first_special

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        assert not add_special_tokens
        assert not parse_special
        return [*text.encode()]


@pytest.fixture(scope="module")
def words() -> Words:
    return Words()


@pytest.fixture(scope="module")
def backend(words: Words) -> Any:
    made = LlguidanceBackend(words, words.vocab_size, [words.end])
    yield made
    made.close()


def form(schema: Any, **more: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=schema, **more)


def allowed(grammar: LlguidanceGrammar, words: Words) -> list[int]:
    bits = np.zeros(-(-words.vocab_size // 32), np.int32)
    grammar.fill_mask(bits)
    return np.flatnonzero(mask_flags(bits, words.vocab_size)).tolist()


def unique(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "uniqueItems": True, **more}


TEXTS, INTEGERS = unique({"type": "string"}), unique({"type": "integer"})
FEW = unique({"type": "string", "pattern": "^[ab]{1,2}$"})
SCHEMAS: dict[str, Any] = {
    "texts": TEXTS,
    "integers": INTEGERS,
    "both": unique({"anyOf": [{"type": "string"}, {"type": ["integer", "null", "boolean"]}]}),
    "short": unique({"type": "string", "maxLength": 1}, minItems=3),
    "few": FEW | {"minItems": 6},
    "range": unique({"type": "integer", "minimum": -2, "maximum": 30}, minItems=33),
    "enum": unique({"enum": ["a", "ab", "b", 'a"', 1, 12, None, True, "\\"]}, minItems=5),
    "impossible options": unique({"anyOf": [False, False, {"type": "string", "maxLength": 1}]}, minItems=2),
    "numbers": unique({"type": "number"}, minItems=2),
    "numbers and others": unique({"type": ["number", "string", "boolean"]}, minItems=2),
    "in an object": {"type": "object", "properties": {"k": TEXTS, "o": {"items": {"type": "string"}}},
                     "required": ["k", "o"], "additionalProperties": False},
    "in arrays": {"type": "array", "items": TEXTS, "minItems": 2},
    "or none": {"properties": {"k": {"anyOf": [INTEGERS, {"type": "null"}]}}, "required": ["k"], "type": "object"},
    "by reference": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {
        "s": {"$ref": "#/$defs/s"}, "n": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["s", "n"],
        "additionalProperties": False}, "s": TEXTS | {"maxItems": 3}}},
    "by position": {"type": "array", "prefixItems": [INTEGERS, {"type": "array", "items": {"type": "integer"}}],
                    "items": False, "minItems": 2},
    "by any key": {"type": "object", "additionalProperties": TEXTS, "minProperties": 1},
    "or an object": {"anyOf": [TEXTS, {"type": "array", "items": {"type": "object", "required": ["a"],
                                                                 "additionalProperties": {"type": "null"}}}]},
}  # fmt: skip


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_whatever_is_said_nothing_is_said_twice(schema: Any, backend: LlguidanceBackend, words: Words) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    bare = without(schema)
    likely = {token for token, text in enumerate(words.tokens) if text in map(str.encode, WORDS)} | {words.end}
    likely |= {ord(char) for char in 'ab",[]{}:12-0tn\\ '}
    ended = refused = 0
    for seed in range(60):
        rng = random.Random(seed)
        grammar, plain, said = backend.compile(form(schema)), backend.compile(form(bare)), b""
        for step in range(400):
            may = allowed(grammar, words)
            other = allowed(plain, words)
            assert set(may) <= set(other)
            refused += len(other) - len(may)
            ends = [token for token in may if words.tokens[token][:1] in (b"]", b"}", b'"', b"<")]
            choices = [token for token in may if token in likely] or may
            token = rng.choice(ends if ends and (step > 200 or rng.random() < 0.3) else choices)
            assert grammar.accept(token)
            assert plain.accept(token)
            if token == words.end:
                break
            said += words.tokens[token]
        else:
            continue
        ended += 1
        validator.validate(json.loads(said))
    assert ended > 20
    assert refused > 100


def without(schema: Any) -> Any:
    """The same schema, where everything may be said twice."""
    if isinstance(schema, dict):
        return {name: without(part) for name, part in schema.items() if name != "uniqueItems"}
    return [without(part) for part in schema] if isinstance(schema, list) else schema


VALUES: dict[str, list[Any]] = {
    "texts": ["", "a", "ab", "b", "é", 'a"', "\\", "a\\", ' ", "', "\n", "a,b", "[", "-0"],
    "integers": [0, 1, 12, -1, -12, 10**20, 10**20 + 1],
    "numbers": [0, 1, 10, 1.5, -1.5, -2, 0.25, 100000000000000, 0.00000000000001, 12.345678901234],
    "numbers and others": [True, 1, "1", "1.5", 1.5, "-0", 0, ""],
    "both": ["1", 1, "null", None, True, "true", False, 0, "", "-0"],
}


@pytest.mark.parametrize("name", VALUES)
def test_every_array_without_a_repetition_can_be_said(name: str, backend: LlguidanceBackend) -> None:
    spec, bare = form(SCHEMAS[name]), form(without(SCHEMAS[name]))
    rng, spec_least = random.Random(name), SCHEMAS[name].get("minItems", 0)
    for length in range(7):
        for _ in range(12):
            values = [*map(rng.choice, [VALUES[name]] * max(length, spec_least))]
            for text in (
                _spelt(values, ", "),
                _spelt(values, ","),
            ):
                assert accepts(backend, bare, text)
                differ = len({json.dumps(value) for value in values}) == len(values)
                assert accepts(backend, spec, text) == differ, text


def _spelt(values: list[Any], between: str) -> str:
    texts = (
        format(Decimal(repr(one)), "f") if isinstance(one, float) else json.dumps(one, ensure_ascii=False)
        for one in values
    )
    return f"[{between.join(texts)}]"


@pytest.mark.parametrize("text", ["-0", "-0.0", "1.0", "1.50", "0.0", "1e1", "10E-1", "0.1000000000000001", "1" * 16])
def test_numbers_are_spelt_in_one_way(text: str, backend: LlguidanceBackend, words: Words) -> None:
    schema = unique({"type": "number"})
    assert accepts(backend, form(without(schema)), f"[{text}]")
    assert not accepts(backend, form(schema), f"[{text}]")
    assert [one for one in compilable_schema(schema, Budget(may_compare=True)).remarks if "15 digits at most" in one]


def test_an_element_ends_with_the_comma_in_one_token(backend: LlguidanceBackend, words: Words) -> None:
    """Models write so; what is kept from them is what would be a repetition."""
    by_word = {text: token for token, text in enumerate(words.tokens)}
    grammar = backend.compile(form(TEXTS))
    for word in (b'["a', b'","', b"b", b'", "'):
        assert by_word[word] in allowed(grammar, words)
        assert grammar.accept(by_word[word])
    now = allowed(grammar, words)
    assert by_word[b"a"] in now
    assert by_word[b'","'] in now  # the empty text
    assert by_word[b'a"'] not in now
    assert not grammar.accept(by_word[b'a"'])


def test_where_nothing_else_is_left_the_array_ends(backend: LlguidanceBackend, words: Words) -> None:
    for order in itertools.islice(itertools.permutations(["a", "b", "aa", "ab", "ba", "bb"]), 0, 720, 37):
        grammar = backend.compile(form(FEW))
        for byte in json.dumps(order, separators=(",", ":"))[:-1].encode():
            assert grammar.accept(byte)
        texts = {words.tokens[token].strip() for token in allowed(grammar, words)} - {b""}
        assert all(text.startswith(b"]") for text in texts)
        assert not grammar.accept(ord(","))


def test_a_text_that_can_only_become_a_repetition_is_not_begun(backend: LlguidanceBackend, words: Words) -> None:
    grammar = backend.compile(form(FEW))
    for byte in b'["a","aa","ab",':
        assert grammar.accept(byte)
    assert grammar.legal([*b'"a']) == 1
    assert grammar.legal([*b'"ba"']) == 4
    assert {token for token in allowed(grammar, words) if words.tokens[token].startswith(b'"a')} == set()


def test_more_than_there_is_cannot_be_asked_for(backend: LlguidanceBackend, words: Words) -> None:
    grammar = backend.compile(form(FEW | {"minItems": 7}))
    for byte in b'["a","b","aa","ab","ba","bb"  ':  # and no more white space
        assert grammar.accept(byte)
    with pytest.raises(InvalidParameterError, match="the array already has every element"):
        allowed(grammar, words)


def test_going_back_and_looking_ahead(backend: LlguidanceBackend) -> None:
    grammar = backend.compile(form(TEXTS))
    assert grammar.legal([*b'["a","a"']) == 7
    assert grammar.legal([*b'["a","b"']) == 8
    for byte in b'["a","b"':
        assert grammar.accept(byte)
    assert not grammar.fresh().accept(ord('"'))
    grammar.rollback(2)
    assert grammar.legal([ord("a"), ord('"')]) == 1
    assert grammar.legal([ord("b"), ord('"')]) == 2
    assert grammar.accept(ord("b"))
    grammar.rollback(6)
    assert grammar.legal([*b'["b","b"]'[1:]]) <= 7


@pytest.mark.parametrize(
    ("marks", "before"),
    [
        ({"reasoning_end": "</think>"}, [b'["a","a"]', b"</think>", b"\n"]),
        ({"reasoning_start": "<think>", "reasoning_end": "</think>"}, [b"<think>", b'"', b"</think>"]),
        ({"reasoning_start": "<think>", "reasoning_end": "</think>"}, []),
        ({"reasoning_start": "[T]", "reasoning_end": "[/T]"}, [b"[", b"T", b"]", b'["a","a"]', b"[/", b"T", b"]\n"]),
        ({"reasoning_start": "[T]", "reasoning_end": "[/T]"}, []),
    ],
)
def test_what_is_thought_before_may_repeat_itself(
    marks: dict[str, str], before: list[bytes], backend: LlguidanceBackend, words: Words
) -> None:
    grammar = backend.compile(form(TEXTS, **marks))
    for text in before:
        for token in [words.tokens.index(text)] if text in words.tokens[256:] else [*text]:
            assert grammar.accept(token), text
    assert grammar.legal([*b'["a","a"']) == 7
    for byte in b'["a","ab"]':
        assert grammar.accept(byte)
    assert grammar.may_end


def test_keys_that_nobody_named_are_one_place() -> None:
    sites = Sites(SCHEMAS["by any key"])
    assert len({id(sites.member(sites.root, f"key {number}")) for number in range(100)}) == 1
    assert sites.member(sites.root, "key").differing == {"string"}


def test_long_arrays_cost_no_more_by_the_element(backend: LlguidanceBackend, words: Words) -> None:
    grammar, bits = backend.compile(form(TEXTS)), np.zeros(-(-words.vocab_size // 32), np.int32)
    seconds: list[float] = []
    for number in range(1000, 2600):
        start = time.thread_time()
        for byte in (f'["{number}"' if number == 1000 else f',"{number}"').encode():
            grammar.fill_mask(bits)
            assert grammar.accept(byte)
        seconds.append(time.thread_time() - start)
    first, last = sorted(seconds[100:300]), sorted(seconds[-200:])
    assert last[100] < 5 * first[100]


@pytest.mark.parametrize(
    "schema",
    [
        unique({"type": "number", "minimum": 0}),
        unique({"type": "object"}),
        unique({"items": {}}),
        unique({}),
        unique({"type": "string"}, prefixItems=[{"type": "string"}]),
    ],
)
def test_what_cannot_be_compared_is_refused(schema: Any, backend: LlguidanceBackend) -> None:
    with pytest.raises(InvalidParameterError, match=r"'uniqueItems' is not supported here .*texts, integers, booleans"):
        backend.compile(form(schema))


def test_so_is_a_form_that_is_not_alone(backend: LlguidanceBackend) -> None:
    for spec in (
        form(TEXTS, around='start: "x" @form'),
        StructuredOutputsParams(
            structural_tag={"structures": [{"begin": "<a>", "schema": TEXTS, "end": "</a>"}], "triggers": ["<a"]}
        ),
        StructuredOutputsParams(grammar="start: %json " + json.dumps(TEXTS)),
    ):
        with pytest.raises(InvalidParameterError, match="'uniqueItems' is not supported here"):
            backend.compile(spec)
