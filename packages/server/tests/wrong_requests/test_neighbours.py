"""A hostile request holds up nobody else's stream and fills no memory: measured on a server process of its own.

A neighbour in a third process reads a stream of a hundred pieces a second. While a hostile request is served, no gap
between two pieces is more than `MOST_GAP` above the largest one without it, and the server's memory grows by less than
`MOST_MEMORY`. A gap that is the machine's and not the server's does not come again: a request that seems to cause one
is sent up to `TRIES` times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from wrong_requests.rows import deep

HERE = Path(__file__).parent
MOST_GAP = 0.1  # seconds above the baseline
MOST_MEMORY = 200 << 20
TRIES = 3
USER = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": USER, "max_tokens": 1, **fields}).encode()


def schema(value: Any) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": value}})


def tools(count: int, parameters: Any) -> bytes:
    many = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)]
    return chat(tools=many, tool_choice="required")


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MEGABYTES = 8 << 20
BIG_OBJECT = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
WEB = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{j % 60}"} for j in range(i, i + 30)]} for i in range(60)}
# name -> path, body
TEXT = "x" * (MEGABYTES - 100)
LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}"
HOSTILE: dict[str, tuple[str, bytes]] = {
    "nested repeats": (CHAT, chat(structured_outputs={"regex": "((a{1000}){1000}){1000}"})),
    "exploding regex": (CHAT, chat(structured_outputs={"regex": "(a|a)*" * 2000 + "b"})),
    "counted alternatives": (CHAT, chat(structured_outputs={"regex": "(.*a.{200}|.*b.{200}){50}"})),
    "exploding pattern": (CHAT, schema({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$" * 100})),
    "enum of 50,000": (CHAT, schema({"enum": [f"value {i}" for i in range(50_000)]})),
    "choice of 50,000": (CHAT, chat(structured_outputs={"choice": [f"value {i}" for i in range(50_000)]})),
    "minLength above maxLength": (CHAT, schema({"type": "string", "minLength": 1 << 30, "maxLength": 2})),
    "minLength of a billion": (CHAT, schema({"type": "string", "minLength": 1 << 30})),
    "minItems of a billion": (CHAT, schema({"type": "array", "minItems": 1 << 30, "items": {"type": "null"}})),
    "reference to itself": (CHAT, schema({"$ref": "#"})),
    "references in a web": (CHAT, schema({"$ref": "#/$defs/d0", "$defs": WEB})),
    "allOf of many": (CHAT, schema({"allOf": [{"properties": {f"a{i}": {"minLength": i}}} for i in range(2000)]})),
    "anyOf of objects": (CHAT, schema({"anyOf": [BIG_OBJECT] * 20})),
    "2,000 properties": (CHAT, schema(BIG_OBJECT)),
    "deep schema": (CHAT, schema(deep(20))),
    "schema of a megabyte": (CHAT, schema({"type": "object", "description": "x" * (1 << 20)})),
    "grammar of a megabyte": (CHAT, chat(structured_outputs={"grammar": "start: " + '"a" ' * 250_000})),
    "10,000 tools": (CHAT, tools(10_000, {"type": "object"})),
    "1,000 tools": (CHAT, tools(1000, {"type": "object", "properties": {"a": {"type": "string"}}})),
    "8 MB of text": (COMPLETIONS, json.dumps({"prompt": TEXT, "max_tokens": 1}).encode()),
    "8 MB of message": (CHAT, json.dumps({"messages": [{"role": "user", "content": TEXT}]}).encode()),
    "8 MB of white space": (CHAT, chat().ljust(MEGABYTES)),
    "8 MB of brackets": (CHAT, b"[" * MEGABYTES),
    "8 MB of empty objects": (CHAT, b'{"messages": [' + b"{}," * (MEGABYTES // 3 - 10) + b"{}]}"),
    "8 MB of names": (CHAT, b"{" + b",".join(b'"%d":1' % i for i in range(MEGABYTES // 12)) + b"}"),
    "8 MB of numbers": (COMPLETIONS, b'{"prompt": [' + b"1," * (MEGABYTES // 2 - 20) + b"1]}"),
    "900,000 token ids": (COMPLETIONS, b'{"max_tokens": 1, "prompt": [' + b"1," * 900_000 + b"1]}"),
    "8 MB of quotes": (CHAT, b'{"user": "' + b'\\"' * (MEGABYTES // 2 - 20) + b'"}'),
    "8 MB of escapes": (CHAT, b'{"user": "' + b"\\u00e9" * (MEGABYTES // 6 - 20) + b'"}'),
    "9 MB": (CHAT, b" " * (9 << 20)),
    "a number of 4 MB": (CHAT, b'{"n": ' + b"1" * (4 << 20) + b"}"),
    "template without an end": (CHAT, chat(chat_template=LOOPS)),
    "template that grows": (CHAT, chat(chat_template="{{ 'x' * 1000000000 }}")),
    "2,048 messages": (CHAT, chat(messages=USER * 2048)),
    "bad_words of many": (CHAT, chat(bad_words=["x" * 1000] * 256)),
    "2,048 texts": ("/v1/embeddings", json.dumps({"input": ["x" * 500] * 2048}).encode()),
    "2,048 pairs": ("/v1/score", json.dumps({"text_1": "x" * 1000, "text_2": ["x" * 500] * 2048}).encode()),
    "a megabyte of text": (COMPLETIONS, json.dumps({"prompt": "x" * 1_000_000, "max_tokens": 1}).encode()),
    "tokenize a megabyte": ("/tokenize", json.dumps({"prompt": "x" * 1_000_000, "return_token_strs": True}).encode()),
    "tokenize 8 MB": ("/tokenize", json.dumps({"prompt": TEXT}).encode()),
    "detokenize 500,000": ("/detokenize", json.dumps({"tokens": [104] * 500_000}).encode()),
}  # fmt: skip


class Servers(NamedTuple):
    """The server's process and port."""

    process: psutil.Process
    port: int


@pytest.fixture(scope="module")
def server() -> Iterator[Servers]:
    command = [sys.executable, str(HERE / "scripted_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
                warm = schema({"type": "object", "properties": {"a": {"type": "string"}}})
                for path, body in ((CHAT, warm), ("/tokenize", b'{"prompt": "a"}')):
                    client.post(path, content=body, headers={"content-type": "application/json"})
            yield Servers(psutil.Process(process.pid), port)
        finally:
            process.terminate()
            process.wait(20)


class Watch:
    """A neighbour's stream and the server's memory, from `with` to its end."""

    def __init__(self, server: Servers) -> None:
        self._server = server
        self._over = threading.Event()
        self.times: list[float] = []
        self.memory: list[int] = []

    def __enter__(self) -> Watch:
        command = [sys.executable, str(HERE / "neighbour.py"), str(self._server.port)]
        self._reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._reader.stdout is not None
        assert self._reader.stdout.readline() == "begun\n"
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._sampler.join(5)
        printed, _ = self._reader.communicate("", timeout=30)
        self.times = [float(line) for line in printed.split()]

    def gap(self, begin: float, end: float) -> float:
        """The largest time without a piece between two moments, to its end also where that is later."""
        pairs = zip(self.times, self.times[1:])
        return max(later - earlier for earlier, later in pairs if later >= begin and earlier <= end)

    def _sample(self) -> None:
        while not self._over.wait(0.01):
            self.memory.append(self._server.process.memory_info().rss)


def send(port: int, path: str, body: bytes) -> int:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client:
        return client.post(path, content=body, headers={"content-type": "application/json"}).status_code


@pytest.mark.parametrize("name", HOSTILE)
def test_a_neighbour_does_not_notice(server: Servers, name: str) -> None:
    path, body = HOSTILE[name]
    excess, grown = 0.0, 0
    for _ in range(TRIES):
        with Watch(server) as watch:
            begin = time.monotonic()
            time.sleep(0.5)
            before, middle = server.process.memory_info().rss, time.monotonic()
            status = send(server.port, path, body)
            end = time.monotonic()
            time.sleep(0.1)
        assert status < 500 or status == 503
        assert len(watch.times) > 25, "the neighbour's stream ended"
        excess = watch.gap(middle, end) - watch.gap(begin, middle)
        grown = max(watch.memory) - before
        if excess < MOST_GAP and grown < MOST_MEMORY:
            break
    sys.stderr.write(f"{name}: {status}, {end - middle:.2f} s, gap +{excess * 1000:.0f} ms, memory +{grown >> 20} MB\n")
    assert excess < MOST_GAP, f"the neighbour waited {excess * 1000:.0f} ms more"
    assert grown < MOST_MEMORY, f"{grown >> 20} MB more"
