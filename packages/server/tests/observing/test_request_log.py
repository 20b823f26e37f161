# SPDX-License-Identifier: MIT
"""The log of requests: one line each, whatever a client sends."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.shown import LOG_STYLES, MAX_MESSAGE, LogFormatter, escaped, json_line, key_values, log_style
from candle_vllm.server.observing import request_log
from candle_vllm.server.observing.request_log import LogFile, RequestLog
from packages.server.tests.server_fakes import PacedEngine, whole_answer

LOGGER = "candle_vllm.server.generations"
HOSTILE = 'a"b\\ \r\nINFO forged: yes\x1b[2J\u2028next\x85\u202eevil\x7f ünïcode 漢字'


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


async def _ask(setup: Any, prompt: str, **headers: str) -> None:
    async with setup.client() as client:
        answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4}, headers=headers)
        assert answer.status_code == 200


async def test_a_line_has_the_numbers_and_names_of_its_request(noted: Any, log: pytest.LogCaptureFixture) -> None:
    setup = noted(PacedEngine("abcdef", pause=0.01, num_cached_tokens=2), RequestLog())
    await _ask(setup, "secret words", **{"x-request-id": "r-9", "x-key-number": "5"})
    line = json.loads(LogFormatter("json").format(log.records[0]))
    assert line["request_id"].startswith("cmpl-")
    assert (line["http_request_id"], line["route"], line["key"]) == ("r-9", "/v1/completions", "5")
    assert (line["model"], line["operation"], line["status"]) == ("scripted", "generate", "ok")
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (13, 2, 4)
    assert (line["finish_reason"], line["level"], line["logger"]) == ("length", "INFO", LOGGER)
    assert 40 <= line["total_ms"] < 2000
    assert 10 <= line["ttft_ms"] < line["total_ms"]
    assert line["queue_ms"] >= 0
    assert line["tokens_per_s"] == pytest.approx(3 / (line["total_ms"] - line["ttft_ms"]) * 1000, rel=0.05)
    assert "secret" not in str(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    text = LogFormatter("text").format(log.records[0])
    assert re.search(r" INFO candle_vllm\.server\.generations: request_id=cmpl-\w+ http_request_id=r-9 ", text)
    assert " finish_reason=length status=ok" in text
    assert "error=" not in text


@pytest.mark.parametrize("log_format", LOG_STYLES)
async def test_prompts_are_written_on_request_cut_and_escaped(
    noted: Any, log: pytest.LogCaptureFixture, log_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MAX_PROMPT", len(HOSTILE.encode()) + 6)
    setup = noted(None, RequestLog(log_prompts=True))
    await _ask(setup, HOSTILE + "x" * 500)
    line = LogFormatter(log_format).format(log.records[0])
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    if log_format == "json":
        prompt = json.loads(line)["prompt"]
        assert HOSTILE in prompt
        assert "x" * 20 not in prompt
    else:
        assert "漢字" in line
        assert r"\x1b[2J" in line
        assert r"a\"b\\" in line
        assert "x" * 20 not in line


@pytest.mark.parametrize("name", ["x\ny=1", "plain"])
def test_other_records_stay_one_line_too(name: str) -> None:
    record = logging.LogRecord("n", logging.ERROR, "p", 1, "hello %s", (name,), None)
    for style in LOG_STYLES:
        assert len(LogFormatter(style).format(record).splitlines()) == 1
    assert json.loads(LogFormatter("json").format(record))["message"] == f"hello {name}"


def test_tracebacks_are_kept() -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "p", 1, "failed", (), sys.exc_info())
    assert "ValueError: the reason" in json.loads(LogFormatter("json").format(record))["exception"]
    assert LogFormatter("text").format(record).endswith("ValueError: the reason")


@pytest.mark.parametrize(
    ("names", "field", "text"),
    [
        ([], None, ""),
        (["acme/tone"], "acme/tone", " adapter=acme/tone "),
        (["a b", "c"], "a b,c", ' adapter="a b,c" '),
    ],
)
async def test_a_line_has_the_names_of_the_adapters(
    noted: Any, log: pytest.LogCaptureFixture, names: list[str], field: str | None, text: str
) -> None:
    mix = [(LoRARequest(name), 1.0) for name in names]
    async for _ in noted(None, RequestLog()).stream("p", SamplingParams(max_tokens=2), lora_request=mix):
        pass
    line = json.loads(LogFormatter("json").format(log.records[0]))
    assert (line["model"], line.get("adapter")) == ("scripted", field)
    shown = LogFormatter("text").format(log.records[0])
    assert text in shown
    assert ("adapter=" in shown) == bool(names)


async def test_failures_and_aborts_say_so(noted: Any, log: pytest.LogCaptureFixture) -> None:
    setup = noted(PacedEngine(fail_after=1, failure="no\nluck " * 200), RequestLog())
    async for _ in setup.stream("p", SamplingParams(max_tokens=5)):
        pass
    line = json.loads(LogFormatter("json").format(log.records[0]))
    assert (line["status"], line["finish_reason"], len(line["error"])) == ("failed", "error", 500)
    assert len(LogFormatter("text").format(log.records[0]).splitlines()) == 1
    assert "route" not in line
    stream = noted(None, RequestLog()).stream("p", SamplingParams(max_tokens=5, n=2))
    await stream.aclose()
    line = json.loads(LogFormatter("json").format(log.records[1]))
    assert (line["status"], line["finish_reason"]) == ("aborted", "abort,abort")
    assert "ttft_ms" not in line


async def test_nothing_is_made_where_the_log_is_silent(noted: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, LOGGER)
    setup = noted(None, RequestLog(log_prompts=True))
    await whole_answer(setup.engine, "p", SamplingParams(max_tokens=2), watcher=setup.watcher)
    assert not caplog.records
    assert len(setup.requests) == 1


def test_escaping() -> None:
    assert escaped("a\tb\u200b\\n") == r"a\tb\u200b\\n"
    assert escaped("plain ü 漢") == "plain ü 漢"
    assert key_values({"a": "x y", "b": None, "c": 1.5, "d": "", "e": 'q"=1'}) == 'a="x y" c=1.5 d="" e="q\\"=1"'
    assert json.loads(json_line({"a": HOSTILE, "b": None})) == {"a": HOSTILE}
    assert json_line({"a": HOSTILE}).isprintable()
    assert json_line({"a": HOSTILE}).isascii()


@pytest.mark.parametrize("name", LOG_STYLES)
def test_a_message_of_any_length_is_cut(name: str) -> None:
    """A name that a client, a model or an MCP server wrote may stand in it."""
    record = logging.LogRecord("a", logging.WARNING, "", 1, "the tool %r failed", ("x" * 1_000_000,), None)
    line = LogFormatter(name).format(record)
    assert len(line) < MAX_MESSAGE + 200
    assert "the tool 'xxx" in line
    assert f"({1_000_000 + len('the tool  failed') + 2 - MAX_MESSAGE} more characters)" in line


def test_a_log_file_that_cannot_be_written_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk each line would else be a traceback; what is logged later arrives."""
    handler = LogFile(tmp_path / "log", encoding="utf-8")
    said = logging.LogRecord("n", logging.INFO, "p", 1, "hello", (), None)
    for _ in range(2):
        with monkeypatch.context() as full:
            full.setattr(type(handler), "flush", _no_space)
            for _ in range(3):
                handler.emit(said)
        handler.emit(said)
    handler.close()
    told = capsys.readouterr().err
    assert told.count("cannot be written: No space left on device") == 2
    assert told.count("can be written again; 3 lines are missing") == 2
    assert len(told.splitlines()) == 4
    assert "hello\n" in (tmp_path / "log").read_text()


def test_a_torn_line_of_a_log_file_is_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A full disk takes a part of a line; the next record must not be joined with it."""
    path = tmp_path / "log"
    handler = LogFile(path, encoding="utf-8")
    handler.setFormatter(LogFormatter("json"))
    said = logging.LogRecord("n", logging.INFO, "p", 1, "hello", (), None)
    handler.close()
    handler.stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    handler.emit(said)
    path.write_text('{"half of a li')
    handler.emit(said)
    handler.close()
    torn, *lines = path.read_text().splitlines()
    assert torn == '{"half of a li'
    assert [json.loads(line)["message"][:5] for line in lines] == ["hello", "the l"]
    for line in capsys.readouterr().err.splitlines():
        assert str(path) in json.loads(line)["message"]


def test_a_log_file_that_was_moved_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    handler = LogFile(path, encoding="utf-8")
    for message in ("one", "two"):
        handler.emit(logging.LogRecord("n", logging.INFO, "p", 1, message, (), None))
        path.rename(tmp_path / message)
    handler.close()
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["one\n", "two\n"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def _no_space(handler: logging.Handler) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lines_of_another_process_say_which() -> None:
    """A process of the engine logs as its parent does, and in text too, a message stays one line."""
    script = (
        "import logging; from candle_vllm.core import shown; shown.start_logging('INFO', {0!r});"
        "assert shown.log_style() == (20, {0!r}); shown.start_logging(*shown.log_style(), process='rank 1');"
        "[each.setStream(__import__('sys').stdout) for each in logging.getLogger().handlers];"
        "logging.getLogger('n').info('ready %s', '1\\n2')"
    )
    lines = {
        style: subprocess.run(
            [sys.executable, "-c", script.format(style)], capture_output=True, text=True, check=True
        ).stdout
        for style in LOG_STYLES
    }
    line = json.loads(lines["json"])
    assert (line["process"], line["message"], line["level"]) == ("rank 1", "ready 1\n2", "INFO")
    assert lines["text"].endswith("INFO rank 1: n: ready 1\\n2\n")
    for text in lines.values():
        assert "rank 1" in text
        assert text.count("\n") == 1


def test_a_process_without_styles_has_text_in_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's user has handlers of their own."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler()])
    assert log_style()[1] == "text"
