# SPDX-License-Identifier: MIT
"""bench serve, throughput and latency: what is sent and when, what is counted, and what is told of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.config import demo_model
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.server.bench import offline, serve
from candle_vllm.server.bench.client import EventClient, Target, WholeClient
from candle_vllm.server.bench.datasets import DataOptions, LocalWords, Sample, make_samples
from candle_vllm.server.bench.figures import Seen, read_goals, read_metrics, read_percentiles, summary, table
from candle_vllm.server.cli import main
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import PacedEngine


class Letters:
    """A token is a letter."""

    def draw(self, count: int, chance: random.Random) -> list[int]:
        return [chance.randrange(97, 123) for _ in range(count)]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# ---- from end to end -------------------------------------------------------------------------------------------------


def test_a_server_is_measured(start: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = PacedEngine("abcdefgh", pause=0.01, first_pause=0.05)
    running = start(engine, api_key=("k",))
    line = ["bench", "serve", "--base-url", running.url, "--api-key", "k", "--num-prompts", "6", "--input-len", "20"]
    more = [
        "--output-len",
        "8",
        "--goodput",
        "ttft:10000",
        "tpot:5000",
        "--save-detailed",
        "--result-filename",
        "r.json",
    ]
    names = ["--metric-percentiles", "50,99.9", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metadata", "a=b"]
    names += ["--result-filename", "r.json"]
    assert main([*line, *more, *names, "--max-concurrency", "2", "--num-warmups", "1", "--temperature", "0"]) == 0
    result = json.loads((folder / "r.json").read_text())
    assert (result["completed"], result["failed"], result["model_id"], result["a"]) == (6, 0, "scripted", "b")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 21, 6 * 8)  # and a first token each
    assert result["request_goodput"] == result["request_throughput"]
    assert result["output_throughput"] == pytest.approx(48 / result["duration"])
    assert result["max_concurrent_requests"] == 2
    assert result["generated_texts"] == ["abcdefgh"] * 6
    assert 50 <= result["p50_ttft_ms"] < result["mean_e2el_ms"]
    assert result["mean_tpot_ms"] >= 10
    assert {"p99.9_itl_ms", "std_e2el_ms", "median_ttft_ms"} <= set(result)
    assert [len(gaps) for gaps in result["itls"]] == [7] * 6
    assert len(engine.requests) == 7
    assert len({tuple(request.prompt_token_ids) for request in engine.requests}) == 6  # the warm-up has the first
    assert all(request.params.ignore_eos and request.params.temperature == 0 for request in engine.requests)
    out = capsys.readouterr().out
    assert "Request goodput (req/s):" in out
    assert "P99.9 E2EL (ms):" in out


@pytest.mark.parametrize("backend", ["openai-chat", "openai-embeddings", "vllm"])
def test_each_backend(backend: str, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    port = str(start(PacedEngine("abc")).port)
    line = ["bench", "serve", "--port", port, "--backend", backend, "--dataset-name", "sonnet", "--num-prompts", "3"]
    assert main([*line, "--input-len", "200", "--output-len", "3"]) == 0
    out = capsys.readouterr().out
    assert "Successful requests:                     3" in out
    assert ("TTFT" in out) == (backend != "openai-embeddings")


def test_failed_requests_are_counted_and_have_no_latency(
    start: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = start(PacedEngine("abc", max_model_len=64))
    lines = [{"prompt": "x"}, {"prompt": "y" * 100}, {"prompt": "z", "output_tokens": 2}]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    line = ["bench", "serve", "--base-url", running.url + "/", "--dataset-name", "custom", "--dataset-path", "in.jsonl"]
    assert main([*line, "--num-prompts", "3", "--save-detailed", "--result-filename", "r.json"]) == 0
    result = json.loads((folder / "r.json").read_text())
    assert (result["completed"], result["failed"]) == (2, 1)
    assert [bool(error) for error in result["errors"]].count(True) == 1
    assert "1 of 3 requests failed; the first: HTTP/1.1 400" in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", "http://user:HIDDEN@127.0.0.1:9"]) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9 was not reached ([Errno 111] Connection refused): start the server" in error
    assert "HIDDEN" not in error


def test_a_base_url_that_is_one_of_a_client(start: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", start(PacedEngine("abc")).url + "/v1"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "/v1/v1/models names no model (Client error '404 Not Found'" in error


def test_a_server_that_needs_a_key(start: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--base-url", start(PacedEngine("abc"), api_key=("k",)).url]) == 2
    assert "give its key with --api-key" in capsys.readouterr().err


def test_a_model_that_is_not_served(start: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    url = start(PacedEngine("abc", name="base"), enable_lora=True).url
    assert main(["bench", "serve", "--base-url", url, "--model", "nope"]) == 2
    assert "/tokenize: The model 'nope' is not served here; served models are: base" in capsys.readouterr().err


def test_an_address_of_ipv6_gets_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--host", "::1", "--port", "9"]) == 2
    assert "http://[::1]:9 was not reached" in capsys.readouterr().err


RAMP = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "2", "--ramp-up-end-rps", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base-url", "ftp://x"], "--base-url must be http://HOST:PORT"),
        (["--base-url", "http://x", "--port", "3"], "leave --host and --port out"),
        (["--goodput", "speed:3"], "--goodput must be NAME:MILLISECONDS"),
        (["--goodput", "ttft:-3"], "--goodput must be NAME:MILLISECONDS"),
        (["--backend", "openai-embeddings", "--goodput", "ttft:3"], "--goodput can only limit e2el"),
        (["--percentile-metrics", "ttft,x"], "--percentile-metrics must be of"),
        (["--metric-percentiles", "50,101"], "--metric-percentiles must be numbers from 0 to 100"),
        (["--request-rate", "0"], "--request-rate must be a number above 0"),
        (["--request-rate", "nan"], "--request-rate must be a number above 0"),
        (["--extra-body", "[]"], "--extra-body must be a JSON object"),
        (["--extra-body", "[" * 4000], "--extra-body must be a JSON object"),
        (["--header", "a\r\nb=c"], "--header"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1"], "belong together"),
        (["--ramp-up-strategy", "sine"], "--ramp-up-strategy"),
        ([*RAMP, "--ramp-up-start-rps", "9"], "--ramp-up-start-rps (9) must not be above --ramp-up-end-rps (8)"),
        ([*RAMP, "--request-rate", "3"], "leave one of them out"),
        (["--metadata", "x"], "--metadata must be NAME=VALUE"),
        (["--backend", "tgi"], "--backend"),
        (["--dataset-name", "hf", "--model", "m"], "data sets are not downloaded"),
        (["--dataset-name", "sharegpt", "--model", "m"], "needs --dataset-path FILE"),
        (["--dataset-path", "x", "--model", "m"], "random is generated"),
        (["--dtype", "bf16"], "--dtype does not apply"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def _engine(monkeypatch: pytest.MonkeyPatch) -> PacedEngine:
    engine = PacedEngine("x" * 200)
    vars(engine)["generate"] = lambda prompts, params, **_: asyncio.run(_all(engine, prompts, params))
    monkeypatch.setattr(offline, "load_engine", lambda *_, **__: engine)
    return engine


async def _all(engine: PacedEngine, prompts: Sequence[Any], params: Any) -> list[Any]:
    from packages.server.tests.server_fakes import whole_answer

    each = params if isinstance(params, list) else [params] * len(prompts)
    return [await whole_answer(engine, *one) for one in zip(prompts, each, strict=True)]


def test_throughput(monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = _engine(monkeypatch)
    line = ["bench", "throughput", "--num-prompts", "5", "--random-input-len", "12", "--output-len", "4"]
    assert main([*line, "--random-range-ratio", "0", "--output-json", "new/t.json"]) == 0
    result = json.loads((folder / "new/t.json").read_text())
    made = sum(len(request.prompt_token_ids) for request in engine.requests) + 5 * 4
    assert (result["num_requests"], result["total_num_tokens"]) == (5, made)
    assert result["tokens_per_second"] == pytest.approx(made / result["elapsed_time"])
    assert "Total num output tokens:  20" in capsys.readouterr().out


def test_latency(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    engine = _engine(monkeypatch)
    line = ["bench", "latency", "--input-len", "7", "--output-len", "3", "--batch-size", "2", "--num-iters", "4"]
    assert main([*line, "--num-iters-warmup", "1", "--output-json", "l.json"]) == 0
    result = json.loads((folder / "l.json").read_text())
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert [len(request.prompt_token_ids) for request in engine.requests] == [7] * 10


def test_what_guesses_gain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_toy_model(folder / "toy", toy_config())
    lines = [{"prompt": "abcabcabc", "output_tokens": 20}, {"prompt": "x", "output_tokens": 12}]
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = ["bench", "speculation", "--m", str(model), "--threads", "1", "--dataset-path", "own.jsonl"]
    assert main([*line, "--num-prompts", "2", "--pairs", "2", "--output-json", "s.json"]) == 0
    result = json.loads((folder / "s.json").read_text())
    assert (result["num_prompts"], result["different_answers"], result["pairs"]) == (2, 0, 2)
    assert 0 < result["output_tokens"] <= 2 * (19 + 11)
    assert result["draft_tokens"] >= result["accepted_draft_tokens"]
    steps = result["output_tokens"] - result["accepted_draft_tokens"]
    assert result["tokens_per_step"] == pytest.approx(result["output_tokens"] / steps)
    assert 0 < result["bound"] <= result["tokens_per_step"] + 1e-9
    assert "Answers that differ: 0" in capsys.readouterr().out


def test_the_bound_is_what_tokens_and_times_of_steps_allow() -> None:
    seconds = [0.010, 0.012, 0.014, 0.016]
    assert offline.bound_of(1.0, 1.0, seconds) == 1.0
    assert offline.bound_of(3.0, 4.0, seconds) == pytest.approx(3 / 1.6)
    assert offline.bound_of(2.0, 2.5, seconds) == pytest.approx(2 / 1.3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--speculative-config", '{"method": "none"}', "--dataset-path", "own.jsonl"], "there is nothing to measure"),
        ([], "--dataset-name custom needs --dataset-path FILE"),
    ],
)
def test_nothing_to_measure_is_said(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    _engine(monkeypatch)
    assert main(["bench", "speculation", *given]) == 2
    assert said in capsys.readouterr().err


# ---- arriving --------------------------------------------------------------------------------------------------------


async def test_requests_arrive_at_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample(str(n), 1, 1) for n in range(200)]
    target = Target("http://127.0.0.1:9")
    load = serve.Load(target, "/", "openai", "m", {}, rate=1000.0)
    began = time.monotonic()
    arrived = [sample async for sample in serve._arriving(load, samples)]
    assert arrived == samples
    assert time.monotonic() - began > 0.1  # 0.2 s, and what a Poisson process of 200 differs by
    everything = serve.Load(target, "/", "openai", "m", {}, rate=math.inf)
    monkeypatch.setattr(asyncio, "sleep", None)  # nobody is waited for
    assert [sample async for sample in serve._arriving(everything, samples)] == samples


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
async def test_a_rate_grows_with_the_requests(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [0.0]

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(serve.asyncio, "sleep", sleep)
    monkeypatch.setattr(serve.time, "monotonic", lambda: 0.0)  # so that each wait is told from the beginning
    samples = [Sample(str(n), 1, 1) for n in range(5)]
    ramp = serve.Ramp(strategy, 1, 16)
    load = serve.Load(Target("http://127.0.0.1:9"), "/", "openai", "m", {}, burstiness=1e9, ramp=ramp)
    assert [sample async for sample in serve._arriving(load, samples)] == samples
    rates = [1 / (late - early) for early, late in itertools.pairwise(waits)]  # nothing is waited for after the last
    expected = {"linear": [4.75, 8.5, 12.25, 16], "exponential": [2, 4, 8, 16]}
    assert rates == pytest.approx(expected[strategy], rel=1e-3)


def test_figures_are_appended(start: Callable[..., Any], folder: Path) -> None:
    port = str(start(PacedEngine("abc")).port)
    line = ["bench", "serve", "--port", port, "--num-prompts", "2", "--input-len", "5", "--append-result"]
    fast = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "1000", "--ramp-up-end-rps", "2000"]
    assert main([*line, "--result-filename", "r.jsonl"]) == 0
    assert main([*line, *fast, "--result-filename", "r.jsonl"]) == 0
    first, second = map(json.loads, (folder / "r.jsonl").read_text().splitlines())
    assert (first["completed"], second["completed"]) == (2, 2)
    assert "ramp_up_strategy" not in first
    assert (second["ramp_up_strategy"], second["ramp_up_start_rps"], second["ramp_up_end_rps"]) == (
        "exponential", 1000, 2000,
    )  # fmt: skip
    assert main([*line, *fast, "--save-result"]) == 0
    assert [path.name[:41] for path in folder.glob("openai-*")] == ["openai-ramp-up-exponential-1000qps-2000qp"]


# ---- answers ---------------------------------------------------------------------------------------------------------

EVENTS = (
    b'data: {"choices":[{"delta":{"role":"assistant"}}]}\n\n'
    b'data: {"choices":[{"delta":{"reasoning_content":"th"}}]}\r\n\r\n'
    b': comment\n\ndata: {"choices":[{"delta":{"content":"\xc3\xa4"}}]}\n\n'
    b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{}"}}]},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("way", ["chunks", "length", "end"])
async def test_events_are_read_however_they_are_cut(way: str, size: int) -> None:
    client = EventClient(b"")
    head = {"chunks": b"Transfer-Encoding: chunked", "length": b"content-length: %d" % len(EVENTS), "end": b"a: b"}[way]
    body = EVENTS
    if way == "chunks":
        pieces = [EVENTS[at : at + 50] for at in range(0, len(EVENTS), 50)]
        body = b"".join(b"%x;ext\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + body
    for at in range(0, len(answer), size):
        client.data_received(answer[at : at + size])
    if way == "end":
        assert not client.done.done()
        client.connection_lost(None)
    assert math.isfinite(await client.done)
    assert client.whole()
    assert (client.text, client.usage["completion_tokens"]) == (["th", "ä", "{}"], 4)
    assert len(client.times) == 3


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"HTTP/1.1 429 Too Many\r\ncontent-length: 4\r\n\r\nfull", "HTTP/1.1 429 Too Many: full"),
        (b"HTTP/1.1 500 Error\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 500 Error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\ndata: {}", "the connection was closed"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {\n\n", "not JSON"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: " + b"[" * 100_000 + b"\n\n", "not JSON"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"error":{"message":"died"}}\n\n', "died"),
        (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices":[{"text":"a"}]}\n\n', "before its last event"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (2 << 20), "an event is larger than 1 MB"),
        (b"x" * (2 << 20), "the head or a chunk is larger than 1 MB"),
        (b"", "the connection was closed"),
    ],
)
async def test_what_is_no_whole_answer_is_a_failure(answer: bytes, failure: str) -> None:
    client = EventClient(b"")
    if answer:
        client.data_received(answer)
    client.connection_lost(None)
    await client.done
    assert not client.whole()
    assert failure in (client.failure or "")


def test_a_user_in_the_address_is_sent_with_each_request() -> None:
    request = Target("http://me:p%40ss@127.0.0.1:9", {"authorization": "Bearer k"}).post("/", {})
    assert b"\r\nauthorization: Basic bWU6cEBzcw==\r\n" in request  # as httpx sends it
    assert b"Bearer" not in request


async def test_a_refusal_is_told_however_it_is_cut() -> None:
    client, closed = EventClient(b""), EventClient(b"")
    for part in (b"HTTP/1.1 400 Bad\r\ncontent-length: 4\r\n\r\n", b"full"):  # as vLLM sends them
        client.data_received(part)
    closed.connection_lost(None)
    assert (client.failure, closed.failure) == ("HTTP/1.1 400 Bad: full", "the connection was closed")
    for head in (b"content-length: 4", b"transfer-encoding: chunked"):
        cut = EventClient(b"")
        cut.data_received(b"HTTP/1.1 503 Busy\r\n" + head + b"\r\n\r\n")
        cut.connection_lost(ConnectionResetError())
        assert cut.failure == "HTTP/1.1 503 Busy"
    nowhere = EventClient(b"")
    await Target("http://a..b").send(nowhere)
    assert "no connection: " in (nowhere.failure or "")


async def test_answers_that_are_no_stream() -> None:
    good, wrong, deep = WholeClient(b""), WholeClient(b""), WholeClient(b"")
    good.data_received(b'HTTP/1.1 200 OK\r\ncontent-length: 29\r\n\r\n{"usage":{"prompt_tokens":7}}')
    wrong.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n{")
    assert (good.whole(), good.usage) == (True, {"prompt_tokens": 7})
    deep.data_received(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000)
    for client in (wrong, deep):
        assert (client.whole(), client.failure) == (False, "the answer is not JSON")


def test_a_server_without_usage_or_tokenizer_is_told_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = b'data: {"choices":[{"text":"four","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
            self.send_response(200 if self.path == "/prefix/v1/completions" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/prefix"
    try:
        assert main(["bench", "serve", "--base-url", url, "--model", "m", "--num-prompts", "2"]) == 2
        assert "name a tokenizer of this machine with --tokenizer" in capsys.readouterr().err
        assert serve._counted(Seen(0, 1, 0, 1, (0.5,), "four"), Letters()).output_len == 4
        assert serve._counted(Seen(0, 1, 9, 1, (0.5,), "four"), Letters()).output_len == 9
    finally:
        server.shutdown()
        server.server_close()


def test_a_tokenizer_of_this_machine_counts() -> None:
    path = demo_model()
    assert path is not None
    words = LocalWords(path)
    text = "Once upon a time"
    assert words.decode(words.encode(text)) == text
    [sample] = make_samples(DataOptions(num_prompts=1, input_len=40), lambda: words)
    assert len(words.encode(sample.prompt)) == sample.prompt_len == pytest.approx(40, abs=2)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figures() -> None:
    seen = [
        Seen(start=0.0, input_len=10, output_len=3, latency=0.5, times=(0.1, 0.2, 0.5)),
        Seen(start=0.2, input_len=20, output_len=1, latency=0.3, times=(0.3,)),
        Seen(start=0.9, input_len=20, output_len=0, latency=0.0, error="full"),
    ]
    made = summary(seen, 2.0, ["ttft", "tpot", "itl", "e2el"], [50.0], {"ttft": 200.0})
    assert (made["completed"], made["failed"], made["max_concurrent_requests"]) == (2, 1, 2)
    assert (made["total_input_tokens"], made["total_output_tokens"], made["output_throughput"]) == (30, 4, 2.0)
    assert (made["request_throughput"], made["request_goodput"]) == (1.0, 0.5)
    assert made["mean_ttft_ms"] == pytest.approx(200)
    assert made["mean_tpot_ms"] == pytest.approx(200)  # of the first alone: (0.5 - 0.1) / 2
    assert made["p50_itl_ms"] == pytest.approx(200)
    assert made["mean_e2el_ms"] == pytest.approx(400)
    nothing = summary(seen[1:2], 1.0, ["tpot"], [99.0])
    assert nothing["mean_tpot_ms"] is None
    assert "Mean TPOT (ms):                          -" in table(nothing)
    assert nothing["request_goodput"] is None


def test_what_is_asked_of_the_figures() -> None:
    assert read_percentiles("25, 99.9") == [25.0, 99.9]
    assert read_metrics("ttft, itl") == ["ttft", "itl"]
    assert (read_goals(["ttft:200 tpot:5", "e2el:1"]), read_goals([])) == ({"ttft": 200, "tpot": 5, "e2el": 1}, None)


# ---- data sets -------------------------------------------------------------------------------------------------------


def make(name: str, path: Path | None = None, count: int = 20, seed: int = 0, **more: Any) -> list[Sample]:
    options = DataOptions(dataset_name=name, dataset_path=path, num_prompts=count, seed=seed, **more)
    return make_samples(options, Letters)


def test_random_prompts_have_their_length_and_come_again_with_the_seed() -> None:
    made = make("random", input_len=50, output_len=10, random_prefix_len=8)
    assert {(each.prompt_len, each.output_len) for each in made} == {(58, 10)}
    assert len({each.prompt[:8] for each in made}) == 1
    assert len({each.prompt for each in made}) == 20
    assert make("random", input_len=50, output_len=10, random_prefix_len=8) == made
    assert make("random", input_len=50, output_len=10, random_prefix_len=8, seed=1) != made
    ranged = make("random", count=300, input_len=100, output_len=10, random_range_ratio=0.5)
    lengths = {each.prompt_len for each in ranged}
    assert (min(lengths), max(lengths)) == (pytest.approx(50, abs=3), pytest.approx(150, abs=3))


def test_sonnets_stay_within_their_length() -> None:
    made = make("sonnet", input_len=300)
    assert all(250 < each.prompt_len <= 300 and each.output_len == 150 for each in made)
    assert len({each.prompt for each in made}) > 15


def test_files(folder: Path) -> None:
    path = folder / "file"
    turns = [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello!"}]
    path.write_text(json.dumps([{"conversations": turns}, {"conversations": turns[:1]}, 3, {"conversations": "x"}]))
    assert make("sharegpt", path, count=2) == [Sample("Hi?", 3, 6)] * 2
    assert make("sharegpt", path, count=1, output_len=9) == [Sample("Hi?", 3, 9)]
    path.write_text('{"prompt": "a"}\n\n{"prompt": "bc", "output_tokens": 5}\n')
    assert sorted(make("custom", path, count=2), key=lambda each: each.prompt) == [
        Sample("a", 1, None),
        Sample("bc", 2, 5),
    ]
    path.write_text('\ufeff{"prompt": "a\u2028b"}\r\n', "utf-8", newline="")  # as an editor of Windows writes it
    assert [each.prompt for each in make("custom", path, count=1)] == ["a\u2028b"]
    path.write_text('{"question_id": 1, "turns": ["ab", "c"]}\n{"turns": ["ab"]}\n')
    assert make("mt_bench", path, count=2) == make("spec_bench", path, count=2) == [Sample("ab", 2, 256)] * 2
    (folder / "qualitative.jsonl").write_text('{"messages": [{"role": "user", "content": "abc"}]}\n')
    assert make("speed_bench", folder, count=1, output_len=3) == [Sample("abc", 3, 3)]
    path.write_text('{"prompt": "a"}')
    with pytest.raises(UsageError, match=r'line 1: {"turns": \[TEXT\]} is wanted'):
        make("mt_bench", path)
    deep = "[" * 100_000
    for text, message in (("[]", "has no request"), ("{", "is not JSON"), (deep, "is not JSON: maximum recursion")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            make("sharegpt", path)
    for text, message in (
        ("", "has no request"),
        *((x, "line 1: it is not JSON") for x in ("x", deep)),
        ("\n{}", "line 2: "),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            make("custom", path)
