# SPDX-License-Identifier: MIT
"""Keywords that are said by cases: with a validator as judge, what a grammar takes are the instances of its schema."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.json_dialect import KNOWN
from candle_vllm.core.sampling.json_opposites import OppositeUnknown, lacking
from candle_vllm.core.sampling.json_schema import compilable_schema
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ByteTokenizer
from packages.core.tests.sampling.schema_texts import accepts, checked_schema, spellings, walk

VALUES: list[Any] = [None, True, False, 0, 1, 2, 5, -1, 1.5, "", "a", "ab", "b", "abc", [], [1], [1, 1], [1, "a"], {}]
VALUES += [{"a": 1}, {"b": "a"}, {"a": 1, "b": 2}, {"a": "a", "c": None}, {"a": 1, "b": "b", "c": 2}, [[1], [1]]]
VALUES += [["a", "b"], {"a": []}, [None, 1, "a"], {"b": {"a": 1}}]
SCALARS = [value for value in VALUES if not isinstance(value, (list, dict))]
LEAVES: list[Any] = [
    *(True, False, {"type": "null"}, {"type": "boolean"}, {"type": "integer"}, {"type": "number"}, {"type": "string"}),
    *({"type": "array"}, {"type": "object"}, {"type": ["string", "null"]}, {"type": "array", "maxItems": 1}),
    *({"const": value} for value in VALUES),
    *({"enum": values} for values in (["a", "b"], [1, "a", None], [True, 0], [[1], {"a": 1}, 2])),
    *({"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMaximum": 1.5}, {"minimum": 2}, {"maximum": 1}),
    *({"minLength": 2}, {"maxLength": 1}, {"type": "string", "pattern": "^a"}, {"pattern": "^ab$"}, {"pattern": "b"}),
    *(
        {"required": ["a"]},
        {"required": ["b", "c"]},
        {"minItems": 2},
        {"maxProperties": 1},
        {"type": "object", "minProperties": 1},
    ),
]
KEYWORDS = (
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
    *("propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
)


@st.composite
def schemas(draw: Any, depth: int = 2) -> Any:
    """A schema of a few keywords, and of others inside it."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(LEAVES))
    inner = schemas(depth - 1)
    names = st.sampled_from(["a", "b", "c"])

    def value(keyword: str) -> Any:
        if keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
            return draw(st.lists(inner, min_size=1, max_size=3))
        if keyword in ("properties", "dependentSchemas"):
            return draw(st.dictionaries(names, inner, min_size=1, max_size=2))
        if keyword in ("dependentRequired", "dependencies"):
            return draw(
                st.dictionaries(names, st.lists(names, min_size=1, max_size=2, unique=True), min_size=1, max_size=2)
            )
        if keyword == "required":
            return draw(st.lists(names, max_size=2, unique=True))
        if keyword == "propertyNames":
            return draw(
                st.sampled_from([{"pattern": "^a"}, {"maxLength": 1}, {"enum": ["a", "b"]}, False, {"minLength": 2}])
            )
        if keyword in ("minItems", "maxItems", "minContains", "maxContains"):
            return draw(st.integers(0, 2))
        if keyword == "type":
            return draw(st.sampled_from(["object", "array", "integer", ["object", "null"], ["array", "string"]]))
        return draw(st.booleans()) if keyword in ("uniqueItems", "unevaluatedProperties") else draw(inner)

    return {keyword: value(keyword) for keyword in draw(st.lists(st.sampled_from(KEYWORDS), min_size=1, max_size=4))}


OBJECTS = schemas().filter(lambda schema: isinstance(schema, dict))


@pytest.fixture(scope="module")
def letters() -> LlguidanceBackend:
    tokenizer = ByteTokenizer()
    return LlguidanceBackend(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,), open_objects=True)


def judge(schema: Any) -> Any:
    """Draft 2020-12 has no `dependencies` any more."""

    def today(part: Any) -> Any:
        if isinstance(part, list):
            return [today(one) for one in part]
        if not isinstance(part, dict):
            return part
        found = {name: today(value) for name, value in part.items() if name != "dependencies"}
        if "dependencies" in part:
            found["allOf"] = [*found.get("allOf", []), {"dependentRequired": part["dependencies"]}]
        return found

    return jsonschema.Draft202012Validator(today(schema))


def spec_of(schema: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(json=json.loads(json.dumps(schema)), disable_any_whitespace=True)


@example({"properties": {"a": True}, "additionalProperties": {"type": "null"}, "propertyNames": {"pattern": "^a"}}, [])
@example({"allOf": [True], "propertyNames": {"pattern": "^a"}}, [])
@example({"oneOf": [{"type": "number", "exclusiveMaximum": 1.5}, {"allOf": [{"const": 1}]}]}, [])
@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(schema=OBJECTS, values=st.lists(st.sampled_from(VALUES), max_size=4))
def test_a_grammar_takes_the_instances_of_its_schema(
    letters: LlguidanceBackend, schema: Any, values: list[Any]
) -> None:
    spec = spec_of(schema)
    try:
        letters.compile(spec)
    except InvalidParameterError as error:
        if "no text that" in str(error) or "Unsatisfiable" in str(error):
            assert not any(map(judge(schema).is_valid, VALUES))
        assume(False)
    narrowed = compilable_schema(json.loads(json.dumps(schema))).remarks
    for value in [*VALUES, *values]:
        texts = itertools.islice(spellings(value), 30)
        found = any(accepts(letters, spec, text) for text in texts)
        valid = judge(schema).is_valid(value)
        assert found == valid or (valid and narrowed), value


@pytest.mark.one_of_each
@pytest.mark.parametrize(("whole", "fraction"), [(0, 0.5), (1, 1.5), (-1, -1.5), (0, -0.5), (3, 3.25), (-2, -2.125)])
@pytest.mark.parametrize("other", ["m", "exclusiveM"])
@pytest.mark.parametrize("apart", [False, True])
def test_an_open_end_at_a_whole_number_is_no_member(
    letters: LlguidanceBackend, whole: int, fraction: float, other: str, apart: bool
) -> None:
    """Also where the fraction at the other end is in the same unit, said there or elsewhere."""
    low, high = ("exclusiveMinimum", f"{other}aximum") if whole < fraction else ("exclusiveMaximum", f"{other}inimum")
    parts = [{"type": "number", low: whole}, {"type": "number", high: fraction}]
    schema = {"allOf": parts} if apart else parts[0] | parts[1]
    spec, judged = spec_of(schema), judge(schema)
    near = (whole + tenth / 10 for tenth in range(-10, 11))
    for text in {spelling for number in near for spelling in (f"{number:.2f}", f"{number:.1f}", f"{number:.0f}")}:
        if accepts(letters, spec, text):
            assert judged.is_valid(json.loads(text)), text
    assert accepts(letters, spec, str(round((whole + fraction) / 2, 4)))


EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"  # zod 4
HOST = r"^(?=.{1,9}\.?$)[a-z](?:[a-z-]{0,61}[a-z])?(?:\.[a-z](?:[-a-z]{0,61}[a-z])?)*\.?$"


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (EMAIL, ["a.b@c.com", "x+y@z.co.uk"], [".a@b.com", "a..b@c.com", "a@b", "a.b@c..com"]),
        (HOST, ["a.b", "abcd.efgh."], ["abcde.efghi", "-a"]),
        (r"^(?=.*[A-Z])(?=.*\d).{4,}$", ["aB1x", "1--B"], ["abc1", "AB1", "ABCD"]),
        (r"^(?!foo|bar)[a-z]+$", ["fo", "baz", "xbar"], ["foo", "foox", "bar"]),
        (r"^(?!foo$)[a-z]+$", ["fo", "foox"], ["foo"]),
        (r"^(?!-)(?!.*--)[a-z-]+$", ["a-b", "a-"], ["-a", "a--b"]),
        (r"^(?!.*ab)[a-z\n]+$", ["aa", "a\nab", "ba"], ["ab", "xaab"]),
        (r"^(?!\()[(a]+$", ["a("], ["(a"]),
        (r"^(?=[(\])])[()\]]+$", ["((", "]("], ["x"]),
    ],
)
def test_look_aheads_at_the_beginning_of_a_pattern_hold(
    backend: LlguidanceBackend, pattern: str, right: list[str], wrong: list[str]
) -> None:
    judged = judge({"pattern": pattern})
    for schema in ({"type": "string", "pattern": pattern}, {"pattern": pattern}):
        for text in (*right, *wrong):
            assert accepts(backend, spec_of(schema), json.dumps(text)) == (text in right) == judged.is_valid(text), text
    assert accepts(backend, spec_of({"pattern": pattern}), "null")


@pytest.mark.parametrize("pattern", ["^(?!a)b|c$", "^(?=a", "^(?!)a", "^(?!.*)a", "^(?![0-9])a", "^a(?=b)b", "(?=a)a"])
def test_other_look_around_is_refused(backend: LlguidanceBackend, pattern: str) -> None:
    with pytest.raises(InvalidParameterError, match="look-around"):
        backend.compile(spec_of({"type": "string", "pattern": pattern}))


@pytest.mark.parametrize("text", ["a", "..", "ab", "aa", "aba", "aab", "abab", "abcab"])
@pytest.mark.parametrize("line", [False, True])
def test_the_opposite_of_containing_a_text(text: str, line: bool) -> None:
    pattern = lacking(text, line=line).replace(r"\x{a}", r"\n").replace(r"\x{2e}", r"\.")
    found = re.compile(pattern.replace("(?s:.*)", r"[\s\S]*"))
    for size in range(6):
        for letters in itertools.product(sorted({*text, "x", "\n"}), repeat=size):
            said = "".join(letters)
            assert (found.fullmatch(said) is None) == (text in (said.split("\n")[0] if line else said)), said


def test_a_long_text_has_no_opposite() -> None:
    with pytest.raises(OppositeUnknown):
        lacking("a" * 65)


def test_a_format_beside_a_pattern_of_names_is_not_lost(backend: LlguidanceBackend) -> None:
    schema = {"type": "object", "propertyNames": {"format": "date", "pattern": "^2"}}
    with pytest.raises(InvalidParameterError, match="'propertyNames' is not supported here"):
        backend.compile(spec_of(schema))


@pytest.mark.parametrize(
    ("names", "message"),
    [({"pattern": "^(?!x)[a-z]+$"}, "look-ahead"), ({"pattern": "("}, "unclosed group"), (5, "at #/propertyNames")],
)
def test_names_that_cannot_be_checked_are_refused(backend: LlguidanceBackend, names: Any, message: str) -> None:
    schema = {"type": "object", "properties": {"ab": {}}, "propertyNames": names, "additionalProperties": False}
    with pytest.raises(InvalidParameterError, match=message):
        backend.compile(spec_of(schema))


def test_names_are_checked_behind_many_references(backend: LlguidanceBackend) -> None:
    defs = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(12)} | {"a12": {"pattern": "^x+$"}}
    schema = {"type": "object", "propertyNames": {"$ref": "#/$defs/a0"}, "$defs": defs}
    assert not accepts(backend, spec_of(schema), '{"y": 1}')


def test_names_that_no_text_matches_leave_the_empty_object(backend: LlguidanceBackend) -> None:
    spec = spec_of({"type": "object", "properties": {"a": {}}, "propertyNames": {"enum": [5]}})
    assert accepts(backend, spec, "{}")
    assert not accepts(backend, spec, '{"a": 1}')


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(schema=OBJECTS, seed=st.integers(0, 1000))
def test_whatever_is_said_is_an_instance(backend: LlguidanceBackend, vocabulary: Any, schema: Any, seed: int) -> None:
    spec = spec_of(schema)
    try:
        text = walk(backend, vocabulary, spec, seed)
    except InvalidParameterError:
        assume(False)
    if text is not None:
        judge(schema).validate(json.loads(text))


NONSENSE: list[Any] = [
    None,
    1,
    1.5,
    "a",
    [],
    ["a"],
    [1],
    [None],
    {},
    {"a": 1},
    {"a": None},
    {"a": ["b", 1]},
    True,
    [[]],
]
NONSENSE += [{"type": 5}, {"$ref": 1}, 10**400, -(10**400), float("inf"), 1 << 63]


@pytest.mark.one_of_each(12)
@pytest.mark.parametrize("keyword", sorted(KNOWN))
def test_nonsense_is_followed_or_refused(keyword: str) -> None:
    for value in NONSENSE:
        wrong = {keyword: value}
        for schema in (
            *(wrong, {"not": wrong}, {"if": wrong, "then": wrong}, {"oneOf": [wrong, {"type": "string"}]}),
            *({"uniqueItems": True, "items": wrong}, {"propertyNames": wrong}, {"contains": wrong, "maxContains": 1}),
        ):
            with contextlib.suppress(InvalidParameterError):
                checked_schema(copy.deepcopy(schema))
