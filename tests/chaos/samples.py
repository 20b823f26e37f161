# SPDX-License-Identifier: MIT
"""What clients ask: valid requests whose answers are determined, wrong ones, and bytes that are no requests."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.wire import request_bytes

CLIENT_KEYS = ("sk-chaos-1", "sk-chaos-2", "sk-chaos-3")
OPERATOR_KEY = "op-chaos"
CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Sample:
    """One request whose answer is the same whenever it is asked.

    Attributes:
        name: of this sample.
        path, method, headers: where to and how; the key is added.
        content: the body; an object gets the name of a model, bytes are sent as they are.
        sequences: how many the engine makes of it.
        key: None is one of the clients' keys; "" is none.
    """

    name: str
    path: str
    content: dict[str, Any] | bytes
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    sequences: int = 1
    key: str | None = None

    @property
    def takes_model(self) -> bool:
        """Whether the answer is the same from each of the models."""
        return isinstance(self.content, dict) and "model" not in self.content

    @property
    def streamed(self) -> bool:
        """Whether it asks for a stream."""
        return isinstance(self.content, dict) and self.content.get("stream") is True

    def encode(self, model: str, key: str) -> bytes:
        """The request as bytes."""
        body = self.content
        if isinstance(body, dict):
            body = json.dumps({"model": model, **body} if self.takes_model else body).encode()
        own = key if self.key is None else self.key
        return request_bytes(
            self.method, self.path, body, self.headers | ({"authorization": f"Bearer {own}"} if own else {})
        )


_QUESTIONS = (
    "What is the capital of France? Answer with one word.",
    "Write one sentence about rain.",
    "Count from one to ten.",
    "Name three colours, and say which of them you like best. " * 4,
)
_PREFIXES = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "1, 2, 3, 4,",
    "Water is made of two parts, and each of them is made of smaller ones. " * 5,
)
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
_COLOUR = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["colour", "size"],
    "additionalProperties": False,
}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _both(name: str, path: str, content: dict[str, Any], sequences: int = 1) -> list[Sample]:
    """A request for a whole answer and the same for a stream."""
    streamed = {**content, "stream": True} | ({} if path == MESSAGES else {"stream_options": {"include_usage": True}})
    return [
        Sample(name, path, content, sequences=sequences),
        Sample(f"{name}, streamed", path, streamed, sequences=sequences),
    ]


def generations() -> list[Sample]:
    """Requests for text: greedy or seeded, so that the text is determined."""
    made: list[Sample] = []
    for number, text in enumerate(_QUESTIONS):
        made += _both(f"chat {number}", CHAT, {"messages": _user(text), "temperature": 0, "max_tokens": 6 + 3 * number})
        made += _both(f"message {number}", MESSAGES, {"messages": _user(text), "temperature": 0, "max_tokens": 8})
    for number, text in enumerate(_PREFIXES):
        made += _both(f"text {number}", COMPLETIONS, {"prompt": text, "temperature": 0, "max_tokens": 4 + 6 * number})
    seeded = {"messages": _user(_QUESTIONS[1]), "temperature": 1.3, "seed": 7, "n": 3, "max_tokens": 8}
    scored = {"messages": _user(_QUESTIONS[0]), "temperature": 0, "logprobs": True, "top_logprobs": 4, "max_tokens": 5}
    echoed = {"prompt": _PREFIXES[0], "temperature": 0, "max_tokens": 3, "echo": True, "logprobs": 2}
    several = {"prompt": list(_PREFIXES[:3]), "temperature": 0.8, "seed": 5, "max_tokens": 5}
    stopped = {"prompt": _PREFIXES[0], "temperature": 0, "max_tokens": 9, "stop": ["ris", "."]}
    long = {"prompt": _PREFIXES[1], "temperature": 1.0, "seed": 3, "n": 4, "max_tokens": 40, "ignore_eos": True}
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": _COLOUR, "strict": True}}
    shaped = {"messages": _user("Give me a colour and a size."), "temperature": 0, "max_tokens": 32}
    called = {
        "messages": _user("What is the weather in Rome?"),
        "temperature": 0,
        "max_tokens": 40,
        "tools": [_WEATHER],
    }
    made += _both("seeded", CHAT, seeded, 3) + _both("scored", CHAT, scored) + _both("echoed", COMPLETIONS, echoed)
    made += _both("several", COMPLETIONS, several, 3) + _both("stopped", COMPLETIONS, stopped)
    made += _both("long", COMPLETIONS, long, 4) + _both("longer", COMPLETIONS, {**long, "max_tokens": 60}, 4)
    made += _both("schema", CHAT, {**shaped, "response_format": form})
    made += _both("choice", CHAT, {**shaped, "structured_outputs": {"choice": ["yes", "no"]}})
    made += _both("call", CHAT, {**called, "tool_choice": "required"})
    return made


def cheap() -> list[Sample]:
    """Valid requests that generate nothing."""
    return [
        Sample("embedding", "/v1/embeddings", {"input": _QUESTIONS[0]}),
        Sample(
            "embeddings",
            "/v1/embeddings",
            {"input": [*_PREFIXES, "x"], "encoding_format": "base64"},
            sequences=len(_PREFIXES) + 1,
        ),
        Sample("score", "/v1/score", {"text_1": "rain", "text_2": ["water", "a stone"]}, sequences=2),
        Sample("rerank", "/v1/rerank", {"query": "rain", "documents": ["water", "a stone", "the sea"]}, sequences=3),
        Sample("tokens", "/tokenize", {"prompt": "Once upon a time " * 50}),
        Sample("many tokens", "/tokenize", {"prompt": "A long text, word by word. " * 4000}),
        Sample("text", "/detokenize", {"tokens": [1, 2, 3, 1000, 2000]}),
        Sample("counted", f"{MESSAGES}/count_tokens", {"messages": _user(_QUESTIONS[3])}),
        Sample("version", "/version", b"", method="GET", headers={}),
        Sample("document", "/openapi.json", b"", method="GET", headers={}),
    ]


def wrong() -> list[Sample]:
    """Requests that are to be refused, each for what is wrong with it."""
    chat = {"messages": _user("Hello"), "max_tokens": 4}
    fields: dict[str, dict[str, Any]] = {
        "unknown field": {**chat, "temprature": 1},
        "temperature": {**chat, "temperature": 101},
        "negative": {**chat, "max_tokens": -2},
        "too many tokens": {**chat, "max_tokens": 100_000},
        "too many sequences": {**chat, "n": 100_000},
        "no messages": {"messages": []},
        "role": {"messages": [{"role": "oracle", "content": "?"}]},
        "type": {**chat, "messages": 5},
        "text as number": {**chat, "top_p": "high"},
        "unknown model": {**chat, "model": "gpt-4o"},
        "bias": {**chat, "logit_bias": {"999999999": 5}},
        "too long": {"messages": _user("word " * 600), "max_tokens": 4},
        "schema": {
            **chat,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}},
        },
        "regex": {**chat, "structured_outputs": {"regex": "(((" * 50}},
        "stop": {**chat, "stop": ["x"] * 1000},
        "tool": {**chat, "tools": [{"type": "function", "function": {"name": "no spaces here"}}]},
        "tool choice": {**chat, "tool_choice": "required"},
        "null": {**chat, "messages": None},
    }
    bodies = {
        "empty": b"",
        "broken": b'{"messages": [{"role": "user", ',
        "array": b"[1, 2, 3]",
        "latin-1": '{"prompt": "é"}'.encode("latin-1"),
        "deep": b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "infinite": b'{"prompt": "x", "temperature": 1e999}',
        "not a number": b'{"prompt": "x", "temperature": NaN}',
        "long number": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        "zero": b'{"prompt": "a\\u0000b", "max_tokens": 0.5}',
        "surrogate": b'{"prompt": "\\ud800", "max_tokens": 1e3}',
    }
    made = [Sample(f"wrong {name}", CHAT, content) for name, content in fields.items()]
    made += [Sample(f"{name} body", COMPLETIONS, body) for name, body in bodies.items()]
    made += [Sample(f"{name} message", MESSAGES, body) for name, body in list(bodies.items())[:4]]
    form = {"content-type": "application/x-www-form-urlencoded"}
    return [
        *made,
        Sample("wrong message", MESSAGES, {"messages": _user("Hello"), "max_tokens": 0}),
        Sample("no input", "/v1/embeddings", {"input": []}),
        Sample("no token", "/detokenize", {"tokens": [-1]}),
        Sample("form", COMPLETIONS, b"prompt=x", headers=form),
        Sample("no key", CHAT, chat, key=""),
        Sample("wrong key", CHAT, chat, key="sk-chaos-4"),
        Sample("client as operator", "/v1/models/unload", {"model": "chaos-a"}),
        Sample("no such route", "/v1/../../etc/passwd", b"", method="GET", headers={}),
        Sample("no such method", CHAT, b"", method="PATCH", headers={}),
    ]


def hostile(rng: random.Random) -> bytes:
    """Bytes that are no request, or one that a proxy and a server might read differently."""
    key = f"authorization: Bearer {CLIENT_KEYS[0]}\r\n"
    post = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\n{key}content-type: application/json\r\n"
    chunked = f"{post}transfer-encoding: chunked\r\n"
    texts = (
        "GET / HTTP/9.9\r\n\r\n",
        "GET /health HTTP/1.1\r\nno colon here\r\n\r\n",
        "GET /health HTTP/1.1\r\nhost: a\r\n folded: b\r\n\r\n",
        "GET /health HTTP/1.1\r\nhost: a\x00b\r\n\r\n",
        "GET /health HTTP/1.1\nhost: bare line feeds\n\n",
        f"GET /{'a' * 20_000} HTTP/1.1\r\nhost: x\r\n\r\n",
        f"GET /health HTTP/1.1\r\nx: {'y' * 200_000}\r\n\r\n",
        "GET /health HTTP/1.1\r\n" + "".join(f"x{n}: y\r\n" for n in range(3000)) + "\r\n",
        "GET http://169.254.169.254/latest HTTP/1.1\r\nhost: 169.254.169.254\r\n\r\n",
        "CONNECT example.com:443 HTTP/1.1\r\nhost: example.com\r\n\r\n",
        "BREW /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\r\n",
        f"GET /v1/models/%00%2e%2e%2f HTTP/1.1\r\nhost: x\r\n{key}\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        f"{post}content-length: -5\r\n\r\n{{}}",
        f"{post}content-length: 5, 6\r\n\r\n{{}}",
        f"{post}content-length: 2\r\ncontent-length: 30\r\n\r\n{{}}",
        f"{post}content-length: 99999999999999999999\r\n\r\n{{}}",
        f"{post}content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
        f"{post}transfer-encoding: gzip, identity\r\n\r\n{{}}",
        f"{chunked}\r\nzz\r\n{{}}\r\n0\r\n\r\n",
        f"{chunked}\r\n-2\r\n{{}}\r\n0\r\n\r\n",
        f"{chunked}\r\nffffffffffffffff\r\n{{}}",
        f"{chunked}\r\n2\r\n{{}}\r\n0\r\n" + "trailer: x\r\n" * 9000 + "\r\n",
        f"{post}expect: 100-continue\r\ncontent-length: 2\r\n\r\n{{}}",
        "\r\n" * 5000,
    )
    noise = (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
        rng.randbytes(3000),
        b"\x00" * 70_000,
    )
    return rng.choice((*(text.encode("latin-1") for text in texts), *noise))
