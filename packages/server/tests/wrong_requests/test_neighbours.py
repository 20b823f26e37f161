# SPDX-License-Identifier: MIT
"""A hostile request holds up nobody else's stream and fills no memory: measured on a server process of its own.

A neighbour in a third process reads a stream of a hundred pieces a second all the while. While a hostile request is
served, the server computes no more than `MOST_WORK` between two pieces, nobody waits for one much longer than that, and
the server's memory grows by less than `MOST_MEMORY`. The limit of work counts the server's processor time in a gap,
since a gap may be the machine's; what the server computes beside the stream, on another core, counts too, so a request
that seems to go too far is sent up to `TRIES` times.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest

from packages.server.tests.wrong_requests.rows import deep
from tests.waiting import PATIENCE

HERE = Path(__file__).parent
MOST_WORK = 0.15  # seconds of a gap in which the server computes, counted in hundredths
MOST_GAP = 2.0  # seconds without a piece, whatever the server does
MOST_MEMORY = 200 << 20
TRIES = 8  # each counts what a pause of the machine adds
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
            process.wait(60)


class Piece(NamedTuple):
    """When a piece of the neighbour's stream came, and the processor time that the server had used by then."""

    time: float
    used: float


class Neighbour:
    """Reads a stream of the server from `with` to its end."""

    def __init__(self, server: Servers) -> None:
        self._server = server
        self.pieces: list[Piece] = []

    def __enter__(self) -> Neighbour:
        command = [sys.executable, str(HERE / "neighbour.py"), str(self._server.port), str(self._server.process.pid)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait_for_piece(0)
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()  # with it the neighbour ends
            assert process.wait(PATIENCE) == 0
            self._reader.join(60)

    def wait_for_piece(self, moment: float) -> None:
        """Waits for a piece that came after a moment."""
        while not self.pieces or self.pieces[-1].time <= moment:
            assert self._reader.is_alive(), "the neighbour's stream ended"
            time.sleep(0.002)

    def gaps(self, begin: float, end: float) -> tuple[float, float]:
        """The largest time without a piece that touches these moments, and the most that the server computed in one."""
        pairs = [(one, other) for one, other in pairwise(self.pieces) if other.time >= begin and one.time <= end]
        waits = [other.time - one.time for one, other in pairs]
        return max(waits), max(min(wait, other.used - one.used) for wait, (one, other) in zip(waits, pairs))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.pieces.append(Piece(*map(float, line.split())))


@pytest.fixture(scope="module")
def neighbour(server: Servers) -> Iterator[Neighbour]:
    with Neighbour(server) as neighbour:
        yield neighbour


@contextmanager
def memory(process: psutil.Process) -> Iterator[list[int]]:
    """The growth of a process's memory while the block runs, in a list of one at the end."""
    over, sizes, grown = threading.Event(), [process.memory_info().rss], []

    def sample() -> None:
        while not over.wait(0.01):
            sizes.append(process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield grown
    finally:
        over.set()
        sampler.join(60)
        grown.append(max(sizes) - sizes[0])


def send(port: int, path: str, body: bytes) -> int:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client:
        return client.post(path, content=body, headers={"content-type": "application/json"}).status_code


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_neighbour_does_not_notice(server: Servers, neighbour: Neighbour, name: str) -> None:
    path, body = HOSTILE[name]
    for _ in range(TRIES):
        with memory(server.process) as grown:
            begin = time.monotonic()
            status = send(server.port, path, body)
            end = time.monotonic()
            neighbour.wait_for_piece(end)
        assert status < 500 or status == 503
        gap, work = neighbour.gaps(begin, end)
        if gap < MOST_GAP and work < MOST_WORK and grown[0] < MOST_MEMORY:
            break
    told = f"{name}: {status}, {end - begin:.2f} s, gap {gap:.3f} s, of it work {work:.3f} s, {grown[0] >> 20} MB more"
    sys.stderr.write(told + "\n")
    assert gap < MOST_GAP, told
    assert work < MOST_WORK, told
    assert grown[0] < MOST_MEMORY, told
