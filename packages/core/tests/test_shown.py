# SPDX-License-Identifier: MIT
"""What a person sees who looks at an object: a line or two, however much it holds."""

from __future__ import annotations

import io
import logging
import time
from array import array
from pathlib import Path

import pytest

from candle_vllm.core import (
    EmbeddingOutput,
    EngineConfig,
    InferenceEngine,
    PoolingParams,
    SamplingParams,
    StructuredOutputsParams,
    TokenOutput,
)
from candle_vllm.core.engine.outputs import CompletionOutput, FinishReason, GenerationOutput
from candle_vllm.core.shown import start_logging, without_secrets


def test_parameters_show_what_was_given() -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(temperature=1.0, stop=["a"])) == "SamplingParams(temperature=1.0, stop=['a'])"
    assert repr(PoolingParams(normalize=False)) == "PoolingParams(normalize=False)"
    allowed = SamplingParams(allowed_token_ids=list(range(1000)))
    assert repr(allowed) == "SamplingParams(allowed_token_ids=[0, 1, 2, 3, 4, 5, ... 1000 in all])"
    assert len(repr(StructuredOutputsParams(regex="a" * 60_000))) < 200
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert len(repr(StructuredOutputsParams(json={"enum": deep}))) < 200


def test_settings_show_what_was_given_and_no_secret() -> None:
    config = EngineConfig(model="m", threads=2, hf_token="secret")
    assert repr(config) == "EngineConfig(model='m', threads=2)"
    config = EngineConfig(model="https://user:secret@h/m.gguf?sig=secret")
    assert repr(config) == "EngineConfig(model='https://h/m.gguf)"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("https://u:SECRET@h.example:8000/m/{name}.tar?sig=SECRET#SECRET", "https://h.example:8000/m/{name}.tar"),
        ("tar=http://SECRET@h/{name}", "tar=http://h/{name}"),
        ("GET http://h?SECRET 200", "GET http://h 200"),
        ("two: https://a:SECRET@h/x, and (s3://h/y?k=SECRET) too", "two: https://h/x, and (s3://h/y too"),
        ("b'https://h/x?Signature=SECRET', (b'Server', b'x')", "b'https://h/x (b'Server', b'x')"),
        ("redis+tls://:SECRET@[::1]:6379/0", "redis+tls://[::1]:6379/0"),
        (
            "Max retries exceeded with url: /v1/traces?sig=SECRET (Caused",
            "Max retries exceeded with url: /v1/traces (Caused",
        ),
        ("https:/u:SECRET@h/m", "https:/h/m"),  # what a path makes of an address
        ("https://u:SECRET", "https://***"),  # cut
        ("https://u:12/SECRET@h/m", "https://u:12/SECRET@h/m"),  # another address: of the host u
        ("https://u:SEC/RET@h/m", "https://***"),
        ("https://u:SEC?RET@h/m", "https://***"),
        ("http://h:2000: cannot be reached", "http://h:2000: cannot be reached"),
        ("'http://h:2000'", "'http://h:2000'"),
        ("http://localhost:*/a unix:///run/x.sock C:/a@b?c sqlite:///x.db", None),
        ("must be redis://user:password@host:port/db, or http://HOST:PORT", None),
        ("a/b?c=d#e and f@g", None),
        ("redis://[user:password@]host[:port][/db], rediss://... or unix://path", None),
        ("postgresql://user:password@host/database or off", None),
        ("https://user:password@h/x?token=SECRET", "https://h/x"),
        ("https://user:password@host/x?token=SECRET", "https://user:password@host/x"),
        ("https://user:password@SECRET@host:port/x", "https://host:port/x"),
        ("see //u:SECRET@h/x, or x://u:SECRET@h/", "see //h/x, or x://h/"),
        (r"https:\\u:SECRET@h/ and 'https:\\\\u:SECRET@h'", r"https:\\h/ and 'https:\\\\h'"),
        ("proxy=u:SECRET@h:80/x?SECRET and ':SE@CRET@[::1]:6379'.", "proxy=h:80/x and '[::1]:6379'."),
        ("(u:SECRET@h.example:8080), https:u:SECRET@h:80", "(h.example:8080), h:80"),
        ("mailto:bob@example.com, cc:a@b.c; git@h.example:a/b.git, 12:30@h:80, 12:30:45", None),
        ("llama3:8b@main, r.example:5000/m:tag@sha256:0123abcd and m@sha256:12345, m:1@sha256:12345", None),
        (r"C:\a:b@c D:/a@b:80 //server/share@x  // a comment, a//b@c", None),
        ("user:password@host:port", None),
    ],
)
def test_addresses_have_no_secrets(text: str, plain: str | None) -> None:
    assert without_secrets(text) == (text if plain is None else plain)


def test_a_value_that_is_an_address_ends_where_it_ends() -> None:
    secret = "https://u:SEC RET's<>@h/a b/m.gguf?sig=SEC RET'"
    assert without_secrets(secret, alone=True) == "https://h/a b/m.gguf"
    assert without_secrets(f'{{"name": "a", "path": "{secret}"}}', alone=True).startswith(
        '{"name": "a", "path": "https://'
    )
    assert "RET" not in without_secrets(f'{{"name": "a", "path": "{secret}"}}', alone=True)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("u:SECRET@proxy.example", "proxy.example"),
        (":SECRET@localhost", "localhost"),
        ("u:SEC RET@10.0.0.1/x", "u:SEC RET@10.0.0.1/x"),  # no address: a user's name and a blank
        ("//u:SEC RET@h/x?SECRET", "//h/x"),
        (r"https:\\u:SECRET@h\x", r"https:\\h\x"),
        ("https://u:12/SECRET@h/m", "https://***"),
        ("http://localhost:80/m@v1.tar", "http://localhost:80/m@v1.tar"),
        ("http://h.example:80/m@v1.tar", "http://h.example:80/m@v1.tar"),
        ("https://h/m@v1.tar", "https://h/m@v1.tar"),
        ("org/m:tag@v1", "org/m:tag@v1"),
        ("m:tag@main", "m:tag@main"),
        ("m:tag@v1.0", "m:tag@v1.0"),
    ],
)
def test_values_without_secrets(value: str, plain: str) -> None:
    assert without_secrets(value, alone=True) == plain


def test_looking_for_addresses_is_linear() -> None:
    began = time.process_time()
    for piece in (
        "a",
        "aa:/",
        "aa://",
        "aa:///",
        "aa://u:p@",
        "aa://a?",
        "://",
        "'",
        "@",
        "aa://x:y/",
        ":",
        ":@",
        "a:b@",
        " //a",
        "a:[",
        "a:b@1.",
        "\\\\",
        "aa:\\\\a@",
    ):
        text = ":/" + piece * (250_000 // len(piece))
        without_secrets(text)
        without_secrets(text, alone=True)
    assert time.process_time() - began < 20


def test_a_log_has_no_secrets_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what this process writes nor what a library does with a handler of its own."""
    before, written = logging.getLogRecordFactory(), io.StringIO()
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    library = logging.Logger("library")
    library.addHandler(logging.StreamHandler(written))
    try:
        start_logging("DEBUG")
        library.warning("GET %s of %r", "https://SECRET@h/x", ["https://h/y?SECRET"])
        library.warning("no %s", "arguments")
        library.addFilter(lambda record: record.msg != "filtered %s")
        library.warning("filtered %s", "http://h/")
        try:
            raise OSError("cannot connect to http://u:SECRET@h/z?sig=SECRET")
        except OSError:
            library.exception("%s", "wss://SECRET@h/")
    finally:
        logging.setLogRecordFactory(before)
    lines = written.getvalue().splitlines()
    assert lines[:3] == ["GET https://h/x of ['https://h/y", "no arguments", "wss://h/"]
    assert lines[-1] == "OSError: cannot connect to http://h/z"
    assert "SECRET" not in written.getvalue()
    # which write targets and the heads of answers, session ids, arguments and outputs of tools
    for name in ("httpcore", "httpcore2", "urllib3", "mcp.client"):
        assert not logging.getLogger(name + ".connection").isEnabledFor(logging.INFO)
    assert not logging.getLogger("mcp.client.sse").isEnabledFor(logging.ERROR)  # a traceback where a server ends


def test_outputs_are_short() -> None:
    sequence = CompletionOutput(
        index=0, text="word " * 1000, token_ids=tuple(range(1000)), finish_reason=FinishReason.LENGTH
    )
    output = GenerationOutput(
        request_id="r", prompt="p" * 9000, prompt_token_ids=tuple(range(9000)), outputs=(sequence,) * 9
    )
    shown = repr(output)
    assert shown.startswith("GenerationOutput(prompt='ppp")
    assert "prompt_token_ids=(0, 1, 2, 3, 4, 5, ... 9000 in all)" in shown
    assert "CompletionOutput(index=0, text='word word" in shown
    assert "finish_reason='length'" in shown
    assert shown.endswith("... 9 in all))")
    assert len(shown) < 800
    piece = TokenOutput(request_id="r", text="a", token_ids=(5,))
    assert repr(piece) == "TokenOutput(request_id='r', text='a', token_ids=(5,))"


def test_a_vector_shows_its_beginning_and_its_length() -> None:
    vector = array("f", [0.123456789] * 4096)
    shown = repr([EmbeddingOutput(request_id="r", embedding=vector, prompt_token_ids=(1, 2))])
    numbers = ", ".join(["0.1235"] * 6)
    assert shown == f"[EmbeddingOutput(embedding=[{numbers}, ... 4096 in all], prompt_token_ids=(1, 2))]"


def test_an_engine_says_what_it_is(toy_model: Path) -> None:
    with InferenceEngine(str(toy_model), threads=1, max_model_len=256) as engine:
        assert repr(engine) == f"<InferenceEngine '{toy_model.name}', llama on cpu, 256 tokens>"
        shown = repr(engine.model_info)
        assert shown.startswith(f"ModelInfo(name='{toy_model.name}', architecture='llama', num_parameters=")
        assert len(shown) < 400
        stream = engine.generate_stream("a", SamplingParams(max_tokens=2), request_id="r")
        assert repr(stream) == "<TokenIterator of request 'r', running>"
        assert list(stream)
        assert repr(stream) == "<TokenIterator of request 'r', ended>"
    assert repr(engine) == f"<InferenceEngine '{toy_model}', not running>"[:120]
