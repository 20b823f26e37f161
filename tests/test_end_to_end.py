# SPDX-License-Identifier: MIT
"""The whole way: the `candle-vllm` command in a process of its own, the demo model, and OpenAI's own client."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from candle_vllm.core.config import demo_model
from tests.live_server import COMMAND, ServerProcess, clean_environment, openai_client, run_command
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(600)  # a busy machine is many times slower than an idle one

MODEL = "SmolLM2-135M-Instruct.Q4_1"
ONE_THREAD = ("--threads", "1")  # two that wait for each other lose most of their speed when a core is busy
CAPITAL = "The capital of France is"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture(scope="module")
def server(demo_server: ServerProcess) -> ServerProcess:
    with httpx.Client(base_url=demo_server.url, trust_env=False) as client:
        wait_for(lambda: _healthy(client))
    return demo_server


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.ConnectError:
        return False  # the address is printed a moment before the socket listens


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai_client(server.url) as client:
        yield client


def greedy(client: openai.OpenAI, prompt: str, max_tokens: int = 8) -> str:
    answer = client.completions.create(model="default", prompt=prompt, temperature=0, max_tokens=max_tokens)
    return answer.choices[0].text


# ---- what a client sees ----------------------------------------------------------------------------------------------


def test_the_banner_tells_what_is_served_and_where(server: ServerProcess) -> None:
    assert MODEL in server.banner[0]
    assert f"OpenAI base URL  {server.url}/v1\n" in server.banner
    assert server.url.startswith("http://127.0.0.1:")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_chat_knows_the_capital_and_streams_the_same_text(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**settings)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.model == MODEL

    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason

    assert whole.usage is not None
    assert chunks[-1].usage is not None
    counts = whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens
    assert counts == (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens, chunks[-1].usage.total_tokens)
    assert 0 < whole.usage.completion_tokens <= 12
    assert counts[0] + counts[1] == counts[2]


def test_a_request_sets_how_many_tokens_an_event_has(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": CAPITAL, "temperature": 0, "max_tokens": 33, "stream": True}
    texts = []
    for interval in (1, 8):
        body = {"stream_interval": interval, "ignore_eos": True, "num_speculative_tokens": 0}
        chunks = client.completions.create(**asked, extra_body=body)
        texts.append([chunk.choices[0].text for chunk in chunks if chunk.choices[0].text])
    assert "".join(texts[0]) == "".join(texts[1])
    assert len(texts[1]) == 5 < len(texts[0])


def test_a_completion_echoes_and_scores_its_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=CAPITAL, temperature=0, max_tokens=3, echo=True, logprobs=2
    ).choices[0]
    assert answer.text.startswith(CAPITAL + " Paris")
    scores = answer.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert "".join(scores.tokens) == answer.text
    assert len(scores.tokens) == len(scores.token_logprobs)
    assert scores.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in scores.token_logprobs[1:])


def test_a_seed_gives_the_same_choices_again_and_each_its_own(client: openai.OpenAI) -> None:
    def choices(seed: int) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt="My favourite animal is", temperature=1.5, n=3, seed=seed, max_tokens=6
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = choices(7)
    assert len(set(first)) == 3
    assert choices(7) == first
    assert choices(8) != first


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = greedy(client, CAPITAL)
    stopped = client.completions.create(model=MODEL, prompt=CAPITAL, temperature=0, max_tokens=8, stop="ris")
    assert "ris" in free
    assert stopped.choices[0].text == free[: free.index("ris")]
    assert stopped.choices[0].finish_reason == "stop"


def test_many_clients_get_what_each_would_get_alone(client: openai.OpenAI) -> None:
    prompts = [CAPITAL, "Water is made of", "Once upon a time", "1, 2, 3, 4,"]
    alone = [greedy(client, prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: greedy(client, prompt), prompts))
    assert together == alone


def test_the_only_model_answers_by_its_own_name_whatever_it_is_called(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "Hi"}], max_tokens=2)
    assert answer.model == client.models.list().data[0].id != "gpt-4o"


@pytest.mark.parametrize(
    ("change", "error", "param"),
    [
        ({"temperature": 101}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature"),
        ({"messages": [{"role": "oracle", "content": "?"}]}, openai.BadRequestError, "messages.0.role"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **change})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the server's processor time from /proc")
def test_a_client_that_vanishes_leaves_the_engine_idle(server: ServerProcess, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt=CAPITAL, max_tokens=1900, n=8, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    wait_for(lambda: not idle(server), 10)
    stream.close()
    wait_for(lambda: idle(server), 10)  # the 15,000 tokens that were asked for take longer
    assert "Paris" in greedy(client, CAPITAL)


def idle(server: ServerProcess) -> bool:
    """True when the server used no more than a fifth of a core for a quarter of a second."""
    began, used = time.monotonic(), server.cpu_seconds()
    time.sleep(0.25)
    return server.cpu_seconds() - used < 0.2 * (time.monotonic() - began)


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_sigterm_lets_a_running_answer_finish(toy_model: Path, tmp_path: Path) -> None:
    process = ServerProcess(tmp_path, *ONE_THREAD, "--m", str(toy_model))
    try:
        with httpx.Client(base_url=process.url, trust_env=False) as probe, openai_client(process.url) as client:
            wait_for(lambda: _healthy(probe))
            stream = client.completions.create(
                model="default", prompt="a", max_tokens=500, n=4, seed=1, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = [next(iter(stream))]
            process.terminate()
            chunks += stream
        ends = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert ends == ["length"] * 4
    finally:
        status = process.stop()
    assert status == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url + "/health", trust_env=False)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_generate_continues_a_prompt(tmp_path: Path) -> None:
    text = run_command(tmp_path, "generate", CAPITAL, *ONE_THREAD, "--temperature", "0", "--max-tokens", "4")
    assert "Paris" in text
    assert text.endswith("\n")


def test_chat_talks_through_a_pipe(tmp_path: Path) -> None:
    text = run_command(
        tmp_path,
        *("chat", *ONE_THREAD, "--temperature", "0", "--max-tokens", "8"),
        text=f"{QUESTION[0]['content']}\n/reset\nHow are you?\n/exit\n",
    )
    first, second = text.splitlines()[:2]  # what is no answer goes to standard error
    assert "Paris" in first
    assert second


def test_bench_prints_one_json_object(tmp_path: Path) -> None:
    shape = {"prompt_tokens": 8, "output_tokens": 3, "concurrency": 2, "repeat": 1}
    flags = [text for name, value in shape.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    result = json.loads(run_command(tmp_path, "bench", "--json", *ONE_THREAD, *flags))
    figures = ("prefill_tok_s", "decode_tok_s", "output_tok_s", "ttft_s", "load_s", "start_s", "peak_rss_mb")
    assert all(result[name] > 0 for name in figures)
    assert result["load_s"] < result["start_s"]
    assert {name: result[name] for name in shape} == shape
    assert result["model"] == MODEL
    assert {"torch", "python", "candle-vllm-core"} <= set(result["versions"])
    assert {"architecture", "quantization", "dtype", "device", "cpus", "machine"} <= set(result)


# ---- a model at an address -------------------------------------------------------------------------------------------


class Shelf(http.server.ThreadingHTTPServer):
    """The demo model's file at an address, in ranges; while `stalls`, the last pieces do not come."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Shelf)
        self.content, self.sent, self.stalls = content, 0, threading.Event()


class _Shelf(http.server.BaseHTTPRequestHandler):
    server: Shelf

    def do_GET(self) -> None:
        whole = len(self.server.content)
        first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("content-range", f"bytes {first}-{last}/{whole}")
        self.send_header("content-length", str(last - first + 1))
        self.end_headers()
        if first > whole // 2 and self.server.stalls.is_set():
            wait_for(lambda: not self.server.stalls.is_set(), 120)
            return
        self.wfile.write(self.server.content[first : last + 1])
        self.server.sent += last - first + 1

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_model_at_an_address_is_fetched_once_also_behind_a_kill(tmp_path: Path) -> None:
    file = demo_model()
    assert file is not None
    content = file.read_bytes()
    with Shelf(content) as shelf, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=shelf.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"http://127.0.0.1:{shelf.server_port}/tiny.gguf?signature=me#sha256={sha256(content).hexdigest()}"
        flags = ["--m", address, "--download-dir", str(tmp_path / "cache"), *ONE_THREAD]
        fetching = [*flags, "--no-offline"]

        shelf.stalls.set()
        first = subprocess.Popen([COMMAND, *fetching, "--p", "0"], cwd=tmp_path, env=clean_environment(tmp_path))
        journal = tmp_path / "cache" / "archives" / ".tiny.partial.pieces"
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\1") >= 2, 60)
        first.kill()
        first.wait()
        come = shelf.sent
        shelf.stalls.clear()

        server = ServerProcess(tmp_path, *fetching)
        try:
            with openai_client(server.url) as client:
                assert [model.id for model in client.models.list()] == ["tiny"]
                assert "Paris" in greedy(client, CAPITAL)
        finally:
            assert server.stop() == 0
        assert shelf.sent < len(content) + come / 2
        assert "signature" not in (tmp_path / "server.log").read_text()
        shelf.shutdown()
    assert "Paris" in run_command(tmp_path, "generate", CAPITAL, "--max-tokens", "4", "--temperature", "0", *flags)


@pytest.mark.every_case
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_nodes_serve_one_model_and_come_back(tmp_path: Path, toy_model: Path) -> None:
    """The original's way to several machines; when a rank dies, the server starts the model anew with another one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = ["--cpu", *ONE_THREAD, "--m", str(toy_model), "--num-nodes", "2", "-pp", "2", "--master-port", port]
    flags += ["--cluster-key", "what-both-of-them-know", "--max-model-len", "256", "--op-by-op"]
    ask = {"prompt": "The quick brown", "max_tokens": 8, "temperature": 0.0}
    (tmp_path / "second").mkdir()
    with (tmp_path / "second.log").open("w") as log:
        second = subprocess.Popen(
            [COMMAND, *flags, "--node-rank", "1", "--p", "0"],
            stdin=subprocess.DEVNULL, stderr=log, cwd=tmp_path / "second", env=clean_environment(tmp_path / "second"),
        )  # fmt: skip
    try:
        process = ServerProcess(tmp_path, *flags)
        try:
            with httpx.Client(base_url=process.url, timeout=60, trust_env=False) as client:
                first = client.post("/v1/completions", json=ask).json()["choices"][0]["text"]
                (rank,) = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
                os.kill(int(rank), signal.SIGKILL)

                def answered() -> bool:
                    again = client.post("/v1/completions", json=ask)
                    if again.status_code != 200:
                        assert again.json()["error"]["code"] in ("engine_dead", "model_loading"), again.text
                        return False
                    assert again.json()["choices"][0]["text"] == first
                    return True

                wait_for(answered)
        finally:
            assert process.stop() == 0
    finally:
        second.terminate()
        assert second.wait(60) == 0
