# SPDX-License-Identifier: MIT
"""The JSON-Schema-Test-Suite: what a schema accepts is what its grammar accepts, or the schema is refused.

Instances are written compactly, the keys of an object in any order: a grammar takes them in one, and must take no wrong
instance in any.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.structured import StructuredOutputsParams
from candle_vllm.core.testing import ByteTokenizer
from packages.core.tests.sampling.schema_texts import accepts, refused, spellings

MOST_SPELLINGS = 200
# Wrong instances that are let through: file, and why.
LET_THROUGH = {
    "optional/content.json": "what a string contains is an annotation since draft 2019-09",
    "optional/ecmascript-regex.json": "U+FEFF is whitespace in ECMAScript's regular expressions alone",
    "ref.json": "an $id beside a $ref counts, as since draft 2019-09",
    **{
        f"optional/format/{name}.json": "formats that nobody holds are annotations"
        for name in (
            *("idn-email", "idn-hostname", "iri", "iri-reference", "uri-reference", "uri-template"),
            *("json-pointer", "relative-json-pointer", "regex", "ecmascript-regex"),
        )
    },
}
# Right instances that are never written: file, and why.
NEVER_WRITTEN = {
    "format.json": "formats are enforced, which the suite calls an option",
    "optional/bignum.json": "bounds beyond 2^63 are held within what is exact",
    "optional/ecmascript-regex.json": "ECMAScript's \\s",
    "optional/format/email.json": "quoted local parts, IPv6 literals",
    "optional/format/ipv6.json": "IPv4 in IPv6",
    "ref.json": "keywords beside $ref count in every draft",
}


@pytest.mark.parametrize(
    ("draft", "least", "known"),
    [
        ("draft2020-12", 1490, {"LET_THROUGH": 67, "NEVER_WRITTEN": 21}),
        ("draft7", 1240, {"LET_THROUGH": 71, "NEVER_WRITTEN": 9}),
    ],
)
def test_suite(json_schema_suite: Path, draft: str, least: int, known: dict[str, int]) -> None:
    tokenizer = ByteTokenizer()
    backend = LlguidanceBackend(tokenizer, tokenizer.vocab_size, (tokenizer.eos_token_id,), open_objects=True)
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
