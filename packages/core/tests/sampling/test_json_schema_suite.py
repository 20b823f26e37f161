"""The JSON-Schema-Test-Suite: what a schema accepts is what its grammar accepts, or the schema is refused.

Instances are written compactly, the keys of an object in any order: a grammar takes them in one, and must take no wrong
instance in any.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ByteTokenizer

MOST_SPELLINGS = 200
# Wrong instances that are let through: file, and why.
LET_THROUGH = {
    "optional/content.json": "what a string contains is an annotation since draft 2019-09",
    "optional/ecmascript-regex.json": "U+FEFF is whitespace in ECMAScript's regular expressions alone",
}
# Right instances that are never written: file, and why.
NEVER_WRITTEN = {
    "format.json": "formats are enforced, which the suite calls an option",
    "optional/ecmascript-regex.json": "ECMAScript's \\s; control characters without a short escape",
    "optional/format/date-time.json": "leap seconds",
    "optional/format/time.json": "leap seconds",
    "optional/format/email.json": "quoted local parts, IPv6 literals",
    "optional/format/ipv6.json": "IPv4 in IPv6",
    "ref.json": "keywords beside $ref count in every draft",
}


def spellings(value: Any) -> Iterator[str]:
    """Texts of an instance, with keys in every order."""
    if isinstance(value, dict):
        inner = [[f"{json.dumps(k, ensure_ascii=False)}:{t}" for t in spellings(v)] for k, v in value.items()]
        for order in itertools.permutations(inner):
            yield from ("{" + ",".join(parts) + "}" for parts in itertools.product(*order))
    elif isinstance(value, list):
        yield from ("[" + ",".join(parts) + "]" for parts in itertools.product(*map(list, map(spellings, value))))
    elif isinstance(value, float):
        yield format(Decimal(repr(value)), "f").removesuffix(".0")
    else:
        yield json.dumps(value, ensure_ascii=False)


def accepts(backend: LlguidanceBackend, spec: StructuredOutputsParams, text: str) -> bool:
    grammar = backend.compile(spec)
    return all(not grammar.exhausted and grammar.accept(byte) for byte in text.encode()) and grammar.may_end


def refused(backend: LlguidanceBackend, spec: StructuredOutputsParams) -> InvalidParameterError | None:
    try:
        backend.compile(spec)
    except InvalidParameterError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("draft", "least", "known"),
    [
        ("draft2020-12", 900, {"LET_THROUGH": 1, "NEVER_WRITTEN": 29}),
        ("draft7", 850, {"LET_THROUGH": 5, "NEVER_WRITTEN": 16}),
    ],
)
def test_suite(json_schema_suite: Path, draft: str, least: int, known: dict[str, int]) -> None:
    tokenizer = ByteTokenizer()
    backend = LlguidanceBackend(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,))
    counts, wrong = Counter[str](), []
    for path in sorted((json_schema_suite / draft).rglob("*.json")):
        name = path.relative_to(json_schema_suite / draft).as_posix()
        for case in json.loads(path.read_text()):
            spec = StructuredOutputsParams(json=case["schema"])
            if refusal := refused(backend, spec):
                assert refusal.param == "structured_outputs"
                assert len(str(refusal)) > 40, "it names something"
                continue
            for test in case["tests"]:
                texts = itertools.islice(spellings(test["data"]), MOST_SPELLINGS)
                found = any(accepts(backend, spec, text) for text in texts)
                kind = "right" if found == test["valid"] else "LET_THROUGH" if found else "NEVER_WRITTEN"
                counts[kind] += 1
                if kind != "right" and name not in {"LET_THROUGH": LET_THROUGH, "NEVER_WRITTEN": NEVER_WRITTEN}[kind]:
                    wrong.append(f"{kind} {name}: {case['description']}: {test['description']}")
    assert not wrong
    assert counts["right"] >= least
    assert {kind: counts[kind] for kind in known} == known
