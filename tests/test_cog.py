# SPDX-License-Identifier: MIT
"""The Cog predictor: weights, templates and codes in this process, and its server with a real model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.live_server import clean_environment
from tests.waiting import wait_for

pytest.importorskip("cog", reason="the package cog is not there")

HOME = Path(__file__).parents[1] / "deploy" / "cog"


@pytest.fixture(scope="module")
def predict() -> Iterator[ModuleType]:
    """`predict.py`, as Cog imports it: beside its templates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HOME)
        yield importlib.import_module("predict")
    for name in ("predict", "prompt_templates", "schema"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, predict: ModuleType) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "VOLUME", tmp_path / "none")
    monkeypatch.delenv("COG_WEIGHTS", raising=False)
    return tmp_path


def refused(predict: ModuleType, *weights: str) -> str:
    """The code and sentence with which a setup ends."""
    with pytest.raises(predict.UserError) as caught:
        asyncio.run(predict.Runner().setup(*weights))
    return str(caught.value)


def test_the_document_is_that_of_the_signature(predict: ModuleType) -> None:
    schema = importlib.import_module("schema")
    assert json.loads(schema.SCHEMA.read_text()) == schema.schema()
    inputs = schema.schema()["components"]["schemas"]["Input"]["properties"]
    assert inputs["top_p"] | {"minimum": 0.01, "maximum": 1.0, "default": 0.9, "type": "number"} == inputs["top_p"]
    assert [*inputs][:3] == ["prompt", "image", "system_prompt"]
    assert len(inputs) == 13


def test_codes_are_told_and_one_is_kept_free(predict: ModuleType) -> None:
    page = (HOME / "README.md").read_text()
    for code, name in predict.CODES.items():
        assert f"| {code} | {name or 'none'} |" in page


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((), "E1000 GenericError: no weights: set COG_WEIGHTS"),
        (("nowhere",), "E1000 GenericError: 'nowhere' is no folder or file here"),
        (("empty",), "E1000 GenericError: the folder empty is empty"),
        (("other",), "E1000 GenericError: other holds no folders with a config.json"),
        (
            ("http://127.0.0.1:9/a/model.tar",),
            "E1000 GenericError: http://127.0.0.1:9/a/model.tar cannot be downloaded",
        ),
        (("broken.tar",), "E1000 GenericError: broken.tar cannot be unpacked"),
    ],
)
def test_weights_that_cannot_be_had(
    weights: tuple[str, ...], said: str, folder: Path, predict: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "file").touch()
    (folder / "broken.tar").write_bytes(b"broken")
    assert refused(predict, *weights).startswith(said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{", "E1202 InvalidPredictorConfig: "),
        ('{"engine_args": []}', "E1202 InvalidPredictorConfig: "),
        ('{"engine_args": [1]}', "E1202 InvalidPredictorConfig: engine_args of "),
        ('{"prompt": ""}', "E1202 InvalidPredictorConfig: "),
        ('{"prompt_template": 1}', "E1202 InvalidPredictorConfig: prompt_template of "),
        ('{"engine_args": {"max_model_length": 5}}', "E1201 UnexpectedEngineArg: "),
        pytest.param(
            '{"engine_args": {"tensor_parallel_size": 8}}', "E1200 EngineError: ", marks=pytest.mark.every_case
        ),
        ('{"engine_args": {"block_size": 5}}', "E1202 InvalidPredictorConfig: "),
        ('{"prompt_template": "none"}', "E1003 BadPromptTemplate: "),
        ('{"prompt_template": "{{ messages[0].content"}', "E1004 PromptTemplateError: "),
        ('{"prompt_template": "{nothing}"}', "E1004 PromptTemplateError: {nothing} is neither {prompt}"),
    ],
)
def test_settings_that_cannot_work(config: str, said: str, folder: Path, predict: ModuleType, toy_model: Path) -> None:
    (folder / "predictor_config.json").write_text(config)
    if config == '{"engine_args": []}':
        asyncio.run(predict.Runner().setup(str(toy_model)))  # an empty one says nothing
        return
    assert refused(predict, str(toy_model)).startswith(said)


def test_a_model_that_cannot_be_loaded(folder: Path, predict: ModuleType, toy_model: Path) -> None:
    shutil.copytree(toy_model, folder / "model")
    for path in (folder / "model").glob("*.safetensors"):
        path.write_bytes(b"broken")
    assert refused(predict, "model").startswith("E1200 EngineError: ")


@pytest.mark.parametrize(
    ("given", "found", "ranks"),
    [({}, 0, 1), ({}, 4, 4), ({"tensor_parallel_size": 2}, 4, 2), ({"device": "cpu"}, 4, 1)],
)
def test_all_gpus_are_used(
    given: dict[str, Any], found: int, ranks: int, predict: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "gpus", lambda: found)
    monkeypatch.setattr(predict, "InferenceEngine", lambda config: config)
    assert predict.Runner()._load("demo", given).tensor_parallel_size == ranks


@pytest.fixture(scope="module")
def runner(predict: ModuleType, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A predictor that is set up, without a config."""
    with contextlib.chdir(tmp_path_factory.mktemp("cwd")):
        made = predict.Runner()
        asyncio.run(made.setup(str(toy_model)))
    return made


def said(runner: Any, **given: Any) -> str:
    """A whole answer."""

    async def collect() -> str:
        return "".join([piece async for piece in runner.run(**{"max_tokens": 6, "temperature": 0.0, **given})])

    return asyncio.run(collect())


def test_it_answers_the_same_for_the_same_seed(runner: Any) -> None:
    hot = {"prompt": "hello", "temperature": 1.5, "top_k": 0, "top_p": 1.0, "max_tokens": 12}
    assert said(runner, **hot, seed=0) == said(runner, **hot, seed=0)
    assert len({said(runner, **hot) for _ in range(6)}) > 1
    assert runner.healthcheck()


def test_the_order_of_templates(runner: Any, predict: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the request, of the config, of the tokenizer, none."""

    def prompt(given: str = "") -> str:
        return runner._prompt("hello", "be kind", given, None)["prompt"]

    assert runner.chats
    own = runner.engine.apply_chat_template(
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    )
    assert prompt() == own
    monkeypatch.setattr(runner, "config", predict.PredictorConfig("C {system_prompt}: {prompt}"))
    assert prompt() == "C be kind: hello"
    assert prompt("R {{ messages[-1].content }} {{ system_prompt }}") == "R hello be kind"
    assert prompt("LLAMA_2_INSTRUCT") == "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhello [/INST]"
    monkeypatch.setattr(runner, "config", predict.PredictorConfig())
    monkeypatch.setattr(runner, "chats", False)
    assert prompt() == "hello"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"prompt": "hello " * 3000}, "E1002 PromptTooLong: the prompt has "),
        ({"prompt": "a", "prompt_template": "no place"}, "E1003 BadPromptTemplate"),
        ({"prompt": "a", "prompt_template": "{{ 'prompt' }}"}, "E1003 BadPromptTemplate"),
        ({"prompt": "a", "prompt_template": "{prompt} {0}"}, "E1004 PromptTemplateError"),
        ({"prompt": "a", "prompt_template": "{prompt.__class__}"}, "E1004 PromptTemplateError"),
        ({"prompt": "a", "prompt_template": "{prompt"}, "E1004 PromptTemplateError"),
        ({"prompt": "a", "prompt_template": "{% if %}{{ prompt }}"}, "E1004 PromptTemplateError"),
        (
            {"prompt": "a", "prompt_template": "{{ prompt.__class__.__mro__ }} {{ prompt }}"},
            "E1004 PromptTemplateError",
        ),
        ({"prompt": "a", "image": "nowhere.png"}, "E1005 ImageLoadError: the picture cannot be read"),
    ],
)
def test_what_a_request_gets_wrong(given: dict[str, Any], code: str, runner: Any, predict: ModuleType) -> None:
    with pytest.raises(predict.UserError, match=f"^{code}"):
        said(runner, **given)


def test_a_picture_that_is_none(runner: Any, predict: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"none")
    with pytest.raises(predict.UserError, match=r"^E1005 "):
        said(runner, prompt="a", image=tmp_path / "picture.png")


def test_stops(runner: Any, predict: ModuleType) -> None:
    whole = said(runner, prompt="hello", max_tokens=12)
    stop = whole[3:6]
    assert said(runner, prompt="hello", max_tokens=12, stop_sequences=json.dumps([stop])) == whole[: whole.index(stop)]
    assert predict._stops("a,b") == ["a", "b"]
    assert predict._stops('["a,b"]') == ["a,b"]
    assert predict._stops("[a,b") == ["[a", "b"]


# ---- archives --------------------------------------------------------------------------------------------------------


def test_an_archive_is_fetched_once_to_the_volume_or_beside_it(
    folder: Path, predict: ModuleType, toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (folder / "site" / "tiny").mkdir(parents=True)
    with tarfile.open(folder / "site" / "tiny" / "model.tar", "w") as tar:
        tar.add(toy_model, ".")
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder / "site"))) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/tiny/model.tar"
        assert Path(predict.resolve_weights(url)) == Path("checkpoints/tiny")
        first = len(asked)
        assert predict.resolve_weights(url) == "checkpoints/tiny"
        assert len(asked) == first > 0
        volume = folder / "weights"
        volume.mkdir()
        monkeypatch.setattr(predict, "VOLUME", volume)
        assert predict.resolve_weights(url) == "checkpoints/tiny"  # it is there
        shutil.rmtree("checkpoints")
        assert Path(predict.resolve_weights(url)) == volume / "vllm" / "tiny"
        monkeypatch.setenv("COG_WEIGHTS_SHA256", "0" * 64)
        with pytest.raises(predict.UserError, match="has the SHA-256"):
            predict.resolve_weights(url)
        server.shutdown()
    monkeypatch.delenv("COG_WEIGHTS_SHA256")
    runner = predict.Runner()
    asyncio.run(runner.setup(url))  # with nobody there to ask
    assert said(runner, prompt="hello")


# ---- the server ------------------------------------------------------------------------------------------------------


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This environment's programs first, no network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {**clean_environment(folder), "PATH": path, "PORT": str(port), "COG_WEIGHTS": "demo", **more}


def test_the_script(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(HOME / "test.sh")], env=environment(tmp_path), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "stopped"
    assert "Paris" in done.stdout


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """`python -m cog.server.http` with the demo model and 32 places."""
    given = environment(tmp_path, COG_MAX_CONCURRENCY="32", COG_PREDICT_TYPE_STUB="predict.py:Predictor")
    command = [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=HOME, env=given, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{given['PORT']}", trust_env=False, timeout=60) as client:
        try:
            wait_for(lambda: state(client) not in ("", "STARTING"), 120)
            assert state(client) == "READY", (tmp_path / "log").read_text()
            yield client, process
        finally:
            process.terminate()
            process.wait(30)


def state(client: httpx.Client) -> str:
    """What the health route says."""
    try:
        return client.get("/health-check").json()["status"]
    except httpx.TransportError:
        return ""


LONG = {"prompt": "Count to a thousand", "max_tokens": 6000, "min_tokens": 6000}


@pytest.mark.every_case
def test_many_at_once_none_too_many_cancelled_and_a_dead_worker(
    server: tuple[httpx.Client, subprocess.Popen[bytes]],
) -> None:
    client, process = server

    def begun(body: dict[str, Any], **headers: str) -> httpx.Response:
        """The answer of Cog's server, which may refuse a request by 409 although a place is free.

        It does so where several requests look for a place at once, or where a place was left a moment ago.
        """
        for _ in range(100):
            if (answer := client.post("/predictions", json=body, headers=headers)).status_code != 409:
                break
            time.sleep(0.02)
        return answer

    def ask(number: int) -> Any:
        given = {"prompt": f"Say {number}", "max_tokens": 8, "temperature": 0, "seed": number}
        return begun({"input": given}).json()

    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(ask, range(32)))
    assert [each["status"] for each in together] == ["succeeded"] * 32
    assert all(1 <= each["metrics"]["output_token_count"] <= 8 for each in together)
    assert ["".join(each["output"]) for each in together[:3]] == ["".join(ask(n)["output"]) for n in range(3)]

    for number in range(32):
        assert begun({"id": f"p{number}", "input": LONG}, prefer="respond-async").status_code == 202
    assert client.post("/predictions", json={"input": LONG}).status_code == 409
    assert state(client) == "BUSY"
    for number in range(32):
        assert client.post(f"/predictions/p{number}/cancel").status_code == 200
    wait_for(lambda: state(client) == "READY")
    assert ask(1)["status"] == "succeeded"

    wrong = client.post("/predictions", json={"input": {"top_p": 7}})
    assert (wrong.status_code, "greater than the maximum" in wrong.text) == (422, True)
    worker = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(worker[0]), 9)
    wait_for(lambda: state(client) not in ("READY", "BUSY"))
    assert state(client) in ("UNHEALTHY", "DEFUNCT")
