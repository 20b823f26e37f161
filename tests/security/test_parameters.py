# SPDX-License-Identifier: MIT
"""Huge and hostile requests: each is answered at once by name, and neither the server nor a neighbour notices."""

from __future__ import annotations

import json
import re
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.openai.formats.table import TOOL_FORMATS
from candle_vllm.openai.protocol.fields import WireModel, few_entries
from candle_vllm.server import create_app
from candle_vllm.server.app import OPERATIONS
from candle_vllm.server.routes.adapters import _LIST
from tests.common_run import few
from tests.security.guarded_server import KEY, Guarded, chat_body, guarded, parse_answer, post_bytes

NEIGHBOUR = {"model": "default", "prompt": "a", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
PAUSE = 0.1  # seconds between two requests of the neighbour, which would take half of the processor's time
HUGE = 1 << 70
NUMBERS = [
    -1, 0.5, -0.5, HUGE, -HUGE, 1e308, -1e308, "1", "NaN", True, [], {}, [1], {"a": 1}, "9" * 5000, "\u0661", "0x10",
]  # fmt: skip
FIELDS = [
    "n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p",
    "seed",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs", "prompt_logprobs",
    "stop",
    "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words", "priority", "truncate_prompt_tokens", "n_discard",
    "n_keep", "thinking_token_budget", "repeat_last_n", "stream_interval",
    "top_n_sigma", "mirostat", "mirostat_tau", "dry_multiplier", "dry_base", "dry_penalty_last_n", "xtc_threshold",
    "num_speculative_tokens", "speculative.n_max", "speculative.n_min",
]  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {"n": 129}, {"n": 10**9}, {"n": -1}, {"best_of": 10**9}, {"max_tokens": 10**12}, {"max_tokens": -2},
    {"n_discard": -HUGE}, {"seed": 1 << 64}, {"seed": -(1 << 63) - 1}, {"priority": -1}, {"priority": -HUGE},
    {"logit_bias": {str(i): 1 for i in range(5000)}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"1": 1e308}},
    {"logit_bias": {"99999999999": 1}}, {"logit_bias": {"2147483647": 1}}, {"stop": ["a"] * 10_000},
    {"stop": "a" * 100_000}, {"stop": ""}, {"stop_token_ids": list(range(100_000))}, {"stop_token_ids": [-1]},
    {"allowed_token_ids": [HUGE]}, {"allowed_token_ids": [1 << 31]}, {"bad_words": ["a" * 100_000]},
    {"bad_words": ["a"] * 100_000}, {"top_k": -2}, {"top_k": 1 << 40}, {"temperature": -1e-9}, {"temperature": 1e300},
    {"logprobs": True, "top_logprobs": 10**9}, {"repetition_penalty": 0}, {"repetition_penalty": -1},
    {"min_p": 2}, {"cache_salt": "x" * 100_000}, {"request_id": "x\r\ny"}, {"user": 1}, {"model": "x" * 100_000},
    {"messages": []}, {"messages": [{"role": "user", "content": ""}] * 5000}, {"messages": [{"role": "x" * 99_999}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 5000}]},
    {"messages": [{"role": "user", "content": "a " * 2_000_000}]}, {"tools": [{}] * 5000},
    {"tools": [{"type": "function", "function": {"name": "a" * 9999}}]}, {"x" * 100_000: 1}, {"__class__": 1},
]  # fmt: skip

_DEEP: dict[str, Any] = {"type": "string"}
for _ in range(40):
    _DEEP = {"type": "object", "properties": {"a": _DEEP, "b": _DEEP["type"] and {"type": "null"}}}
_WIDE = {"type": "object", "properties": {f"k{i}": {"type": "string", "pattern": "(a|b){1,200}"} for i in range(3000)}}
_FORK: dict[str, Any] = {"$defs": {}}
for _level in range(30):
    _target = {"$ref": f"#/$defs/d{_level + 1}"}
    _FORK["$defs"][f"d{_level}"] = {
        "type": "object",
        "properties": {"a": _target, "b": _target},
        "anyOf": [_target, _target],
    }
_FORK["$defs"]["d30"] = {"type": "null"}
_FORK["$ref"] = "#/$defs/d0"
SCHEMAS: dict[str, Any] = {
    "bad type": {"type": "nonsense"},
    "type list": {"type": ["string", {"a": 1}]},
    "type number": {"type": 5},
    "bad pattern": {"type": "string", "pattern": "("},
    "pattern not a text": {"type": "string", "pattern": {"a": 1}},
    "lookahead": {"type": "string", "pattern": "(?=a)(?<!b)\\1"},
    "redos": {"type": "string", "pattern": "^(a+)+$(a|a)*(.*a){30}"},
    "repeat": {"type": "string", "pattern": "((a{1,1000}){1,1000}){1,1000}"},
    "unicode class": {"type": "string", "pattern": "\\p{Nonsense}[z-a]"},
    "lengths": {"type": "string", "minLength": 10**9, "maxLength": 10**12},
    "backwards": {"type": "string", "minLength": 5, "maxLength": 2},
    "items": {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    "multiple": {"type": "integer", "multipleOf": 1e-300, "minimum": -(10**300)},
    "numbers": {"type": "number", "minimum": 1e300, "exclusiveMaximum": -1e300},
    "enum": {"enum": [str(i) * 50 for i in range(20_000)]},
    "any of": {"anyOf": [{"type": "string", "pattern": f"a{{{i},{i + 900}}}"} for i in range(500)]},
    "deep": _DEEP,
    "wide": _WIDE,
    "fork": _FORK,
    "loop": {"$ref": "#"},
    "loops": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "remote": {"$ref": "http://169.254.169.254/schema.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "id": {"$id": "http://127.0.0.1:1/", "$ref": "x.json"},
    "never": {"not": {}},
    "false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "format": {"type": "string", "format": "x" * 100_000},
}
REGEXES = [
    "(", "(?P<x>", "[z-a]", "a{1000000000}", "((a{1,999}){1,999}){1,999}", "(a+)+$", "(a|a)*b" * 100, "\\", "(?=x)",
    "\x00",
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x{500}", "[\U0001f600-\U0001f64f]{1,99999}", "\\p{L}{1,50000}", "a" * 100_000,
]  # fmt: skip
GRAMMARS = [
    "start: start", "start: a\na: b\nb: a", "start: (a", "start: /(/",
    "start: " + "(" * 50_000, "start: " + "a " * 100_000,
    "%import os\nstart: /a/", "start: /((a{1,999}){1,999}){1,999}/", "root ::= root root | \"\"",
    "start: \"a\"~1..1000000000",
    'start: %json {"type": "nonsense"}', "start: " + "|".join(f'"{i}"' for i in range(50_000)), "\x00", "start:",
]  # fmt: skip


@contextmanager
def a_neighbour(server: Guarded) -> Iterator[None]:
    """Somebody else's requests, one after the other, all with the same answer as before, each within 60 s of CPU."""
    expected = stream_text(server)
    ended = threading.Event()
    texts: list[str] = []
    slowest = 0.0

    def go_on() -> None:
        nonlocal slowest
        while not ended.is_set() or not texts:
            began = time.process_time()
            texts.append(stream_text(server))
            slowest = max(slowest, time.process_time() - began)
            ended.wait(PAUSE)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert set(texts) == {expected}
    assert slowest < 60
    with server.http() as client:
        assert client.get("/health").status_code == 200


def stream_text(server: Guarded) -> str:
    """The text of a streamed completion, whole or the test fails."""
    pieces: list[str] = []
    with server.http() as client, client.stream("POST", "/v1/completions", json=NEIGHBOUR) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1] if json.loads(line)["choices"]]
    assert pieces
    return "".join(pieces)


def refused(answer: httpx.Response) -> dict[str, Any]:
    """The error of a request that is the client's fault."""
    assert 400 <= answer.status_code < 500, answer.text[:500]
    error = answer.json()["error"]
    assert len(error["message"]) < 2000
    return error


def _lists_and_objects(schema: Any, path: str, capped: bool = False) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Lists and objects with free names of pydantic's schema, and whether `few_entries` stands before them.

    Models are not entered: each is looked at by itself.
    """
    if isinstance(schema, (list, tuple)):
        for each in schema:
            yield from _lists_and_objects(each, path, capped)
        return
    if not isinstance(schema, dict) or schema.get("type") in ("model", "definition-ref"):
        return
    kind = schema.get("type")
    if kind == "model-fields":
        for name, field in schema["fields"].items():
            yield from _lists_and_objects(field, f"{path}.{name}")
        return
    if kind == "function-before":
        capped = capped or schema["function"]["function"].__qualname__.startswith(few_entries.__qualname__ + ".")
    if kind in ("list", "tuple", "set", "frozenset", "generator", "dict"):
        yield path, schema, capped
        capped = False
    for key in ("schema", "items_schema", "keys_schema", "values_schema", "choices", "lax_schema", "strict_schema"):
        inner = schema.get(key, ())
        yield from _lists_and_objects(list(inner.values()) if key == "choices" and isinstance(inner, dict) else inner,
                                      path, capped)  # fmt: skip


def _wire_models(kind: type[WireModel] = WireModel) -> Iterator[type[WireModel]]:
    for each in kind.__subclasses__():
        if each.__module__.startswith("candle_vllm."):
            yield each
        yield from _wire_models(each)


def _ends_early(schema: Mapping[str, Any], capped: bool) -> bool:
    """Whether it has one error at most, or few entries."""
    if schema["type"] == "dict":
        keys, values = (schema.get(f"{name}_schema", {"type": "any"}) for name in ("keys", "values"))
        return capped or (keys in ({"type": "str"}, {"type": "any"}) and values == {"type": "any"})
    return schema["type"] == "list" and (schema.get("fail_fast") or schema["items_schema"] == {"type": "any"})


def test_every_list_and_object_ends_at_its_first_error() -> None:
    """A million wrong entries are a million errors that pydantic lists, seconds in which no other thread runs."""
    create_app(ScriptedEngine())  # which imports all routes
    models = set(_wire_models())
    assert models >= {each for operation in OPERATIONS.values() for each in operation.bodies}
    assert len(models) > 100
    found = list(_lists_and_objects(_LIST.core_schema, "/lora-adapters"))
    for model in models:
        model.model_rebuild()
        schema: Any = model.__pydantic_core_schema__
        while schema["type"] != "model":
            schema = schema["schema"]
        found += _lists_and_objects(schema["schema"], model.__name__)
    assert {"ChatCompletionRequest.messages", "UserMessage.content", "McpTool.headers"} <= {path for path, *_ in found}
    assert [path for path, *each in found if not _ends_early(*each)] == []


def test_huge_parameters(real: Guarded) -> None:
    """CVE-2026-34756 (`n`), CVE-2026-9540, CVE-2026-44223, llama.cpp's CVE-2026-21869 (negative `n_discard`): every
    number has a cap, and every list a length."""
    with a_neighbour(real), real.http() as client:
        for change in WRONG:
            error = refused(client.post("/v1/chat/completions", json=chat_body(**change)))
            assert error["param"] is not None or error["code"] in ("invalid_body", "context_length_exceeded"), change


def test_numbers_of_every_kind_in_every_field(real: Guarded) -> None:
    """CVE-2026-21869, CVE-2026-9540: negative, huge, fractional and NaN values, in each field that takes a number: a
    right answer or a refusal, and never a failure of ours."""
    with a_neighbour(real), real.http() as client:
        for field in FIELDS:
            for value in NUMBERS:
                answer = client.post("/v1/chat/completions", json=chat_body(**{field: value}))
                assert answer.status_code in (200, 400), (field, value, answer.text[:300])
            for literal in (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 5000, b"00", b"0x1", b"1_0"):
                body = json.dumps(chat_body()).encode()[:-1] + b', "' + field.encode() + b'": ' + literal + b"}"
                answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 400, (field, literal[:20], answer.text[:300])


def test_hostile_schemas(real: Guarded) -> None:
    """CVE-2025-48942, CVE-2025-48943, llama.cpp's #22606: a schema or an expression that does not compile killed the
    server. Here each is refused, or holds, within 30 s of CPU together with its neighbours."""
    with a_neighbour(real), real.http() as client:
        for name, schema in SCHEMAS.items():
            began = time.process_time()
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            answer = client.post("/v1/chat/completions", json=chat_body(response_format=form))
            assert answer.status_code in (200, 400), (name, answer.text[:300])
            assert time.process_time() - began < 30, name
        for kind, forms in (("regex", REGEXES), ("grammar", GRAMMARS)):
            for form in forms:
                began = time.process_time()
                answer = client.post("/v1/chat/completions", json=chat_body(structured_outputs={kind: form}))
                assert answer.status_code in (200, 400), (form[:60], answer.text[:300])
                assert time.process_time() - began < 30, form[:60]


@pytest.mark.parametrize("schema", [{"minimum": 10**400}, {"enum": [-(10**400)]}])
def test_hostile_schema_numbers(real: Guarded, schema: dict[str, Any]) -> None:
    """CVE-2025-48942: whole numbers that no float can hold, in a schema: refused by name, as smaller ones are."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "number", **schema}}}
    with real.http() as client:
        refused(client.post("/v1/chat/completions", json=chat_body(response_format=form)))


def test_hostile_tools(real: Guarded) -> None:
    """CVE-2025-48944: `pattern` and `type` in the parameters of a tool killed the server."""
    with a_neighbour(real), real.http() as client:
        for name, schema in SCHEMAS.items():
            for choice in ("auto", "required"):
                parameters = {"type": "object", "properties": {"a": schema}}
                tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
                answer = client.post("/v1/chat/completions", json=chat_body(tools=[tool], tool_choice=choice))
                assert answer.status_code in (200, 400), (name, choice, answer.text[:300])
        for kind in ("nonsense", 5, None, ["object"], {"a": 1}, ""):
            tool = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
            refused(client.post("/v1/chat/completions", json=chat_body(tools=[tool])))
            refused(client.post("/v1/chat/completions", json=chat_body(tools=[{"type": kind, "function": {}}])))


def test_huge_headers(real: Guarded) -> None:
    """CVE-2025-48956: a header without end filled the memory. 64 KB and one more
    piece of a head are read, and then the connection ends."""
    body = json.dumps(chat_body()).encode()
    heads = {
        "one of 1 MB": b"X-Long: " + b"a" * (1 << 20) + b"\r\n",
        "100,000": b"".join(b"X-%d: a\r\n" % number for number in range(100_000)),
        "one name of 1 MB": b"X" * (1 << 20) + b": a\r\n",
        "key of 1 MB": b"Authorization: Bearer " + b"a" * (1 << 20) + b"\r\n",
        "folded": b"X-Long: a\r\n" + b" a\r\n" * 300_000,
    }
    with a_neighbour(real):
        for name, more in heads.items():
            answer = real.raw(post_bytes("/v1/chat/completions", body, more))
            assert not answer or parse_answer(answer).status in (400, 431), name
        many = b"".join(b"X-%d: a\r\n" % number for number in range(10_000))  # 110 KB, of which the last piece is free
        answer = real.raw(post_bytes("/v1/chat/completions", body, many))
        assert not answer or parse_answer(answer).status in (200, 400)
        answer = real.raw(b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert not answer or parse_answer(answer).status in (400, 404, 414)
        answer = real.raw(post_bytes("/v1/chat/completions", body, b"Content-Length: 99999999999999999999\r\n"))
        assert not answer or parse_answer(answer).status in (400, 413)


# What parsers of tool calls have choked on: marks without end, half marks, and brackets.
ENDLESS = {
    "open marks": "<tool_call>" * 5_000,
    "half marks": "<tool_cal" * 6_250,
    "brackets": "[" * 50_000,
    "quotes": '<tool_call>{"name": "f", "arguments": {"a": "' + '\\"' * 25_000,
    "parameters": "<tool_call>\n<function=f>\n" + "<parameter=a>\n" * 3_750,
    "python": "[f(" + "a=1, " * 10_000,
    "commas": "[f(a='" + "," * 50_000,
    "spaces": "<tool_call>" + " " * 50_000 + "{",
    "nested": '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 10_000,
    "redos": "[" + "a.b(c=" * 7_500 + "!",
}


# One format for each way to read a call.
COMMON = ("json", "functionary_v31", "pythonic", "deepseek_v3", "functiongemma", "minimax_m3")


@pytest.mark.parametrize("name", few([row.name for row in TOOL_FORMATS], *COMMON))
def test_redos_in_a_tool_parser(name: str) -> None:
    """CVE-2025-48887: a regular expression of the pythonic parser took exponential time. Each format reads 50,000
    characters of each kind in seconds."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
    kinds = list(ENDLESS.values())

    def script(prompt: str) -> list[str]:
        text = kinds[int(prompt.partition("case ")[2].split("<")[0])]
        return [text[start : start + 4000] for start in range(0, len(text), 4000)]

    engine = ScriptedEngine(script, max_model_len=1 << 21)
    with guarded(engine, tool_parser=name) as server, server.http() as client:
        for number in range(len(kinds)):
            messages = [{"role": "user", "content": f"case {number}"}]
            began = time.process_time()
            answer = client.post(
                "/v1/chat/completions", json=chat_body(messages=messages, tools=[tool], max_tokens=1 << 19)
            )
            assert answer.status_code == 200, answer.text[:300]
            assert time.process_time() - began < 5, list(ENDLESS)[number]


@pytest.mark.parametrize(
    "form",
    [
        b"--x\r\n" + b"a: b\r\n" * 100_000,
        b"--x\r\nContent-Disposition: form-data; name=" + b"a" * 1_000_000 + b"\r\n\r\n\r\n--x--\r\n",
        b"\r\n" * 500_000 + b"--x--\r\n",
    ],
    ids=["many headers", "a long header", "a long preamble"],
)
def test_hostile_forms(locked: Guarded, form: bytes) -> None:
    """CVE-2026-42561, CVE-2026-40347: forms that keep their parser, and with it the event loop, busy for seconds."""
    headers = {"content-type": "multipart/form-data; boundary=x"}
    with locked.http(KEY) as client:
        began = time.process_time()
        assert 400 <= client.post("/v1/files", content=form, headers=headers).status_code < 500
        assert time.process_time() - began < 3


def test_dependencies_of_the_server_have_no_known_faults() -> None:
    """CVE-2026-42561, CVE-2026-40347 in python-multipart, CVE-2026-48710 in Starlette: the first versions without."""
    least = {"python-multipart": "0.0.27", "starlette": "1.0.1", "jinja2": "3.1.6"}
    given: list[str] = []
    for part in ("core", "server"):
        path = Path(__file__).parents[2] / "packages" / part / "pyproject.toml"
        given += tomllib.loads(path.read_text())["project"]["dependencies"]
    bounds = dict(match.groups() for each in given if (match := re.match(r"([\w-]+)>=([\d.]+)", each)))
    for name, version in least.items():
        assert _version(bounds[name]) >= _version(version), name


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
