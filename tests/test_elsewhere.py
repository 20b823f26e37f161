# SPDX-License-Identifier: MIT
"""Windows and macOS as far as this machine shows them: without what they lack, by the stand-ins of `elsewhere.py`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core import InferenceEngine, SamplingParams
from tests.common_run import few
from tests.live_server import PATIENCE, clean_environment
from tests.waiting import wait_for

ELSEWHERE = Path(__file__).with_name("elsewhere.py")
SYSTEMS = ["win32", "darwin"]

# Every module, and then an engine in this process: its first argument is a model, its second the prompts.
LIFE = textwrap.dedent(
    """
    import importlib, json, pkgutil, sys
    import candle_vllm

    known, absent = 0, set()
    for package in ("core", "openai", "responses", "server"):
        root = importlib.import_module(f"candle_vllm.{package}")
        for found in pkgutil.walk_packages(root.__path__, root.__name__ + ".", onerror=lambda name: None):
            if found.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                absent.add(error.name)
            known += 1

    from candle_vllm.core import InferenceEngine, SamplingParams
    from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
    from candle_vllm.core.memory import tightest_limit
    from candle_vllm.core.threads import physical_cores

    team = ThreadTeam(3)
    facts = {"known": known, "absent": sorted(absent), "team": team.threads, "cores": physical_cores()}
    team.close()
    with InferenceEngine(MODEL, threads=2) as engine:
        answers = engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    print(json.dumps(facts | {"left": tightest_limit().left, "answers": [one.token_ids for one in answers]}))
    """
)
PROMPTS = ["Once upon a time", "The sky is"]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_module_is_imported_and_an_engine_answers_as_here(system: str, toy_model: Path, tmp_path: Path) -> None:
    code = f"MODEL, PROMPTS = {str(toy_model)!r}, {PROMPTS!r}\n{LIFE}"
    done = subprocess.run(
        [sys.executable, "-P", ELSEWHERE, system, "-c", code],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["known"] > 500
    assert set(said["absent"]) <= {"torch", "triton"}  # what a GPU takes, which a plain installation has not
    assert said["team"] == 3  # with the system's own semaphores
    assert 1 <= said["cores"] <= 2
    if system == "win32":
        assert said["left"] <= 8 << 30  # what Windows says is free, or less: a limit of this machine
    with InferenceEngine(str(toy_model), threads=2) as engine:
        here = engine.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))
    assert said["answers"] == [list(one.token_ids) for one in here]


@pytest.mark.parametrize("system", few(SYSTEMS, "win32"))  # whose ends are told otherwise
def test_a_server_with_its_engine_process_answers_and_drains(system: str, toy_model: Path, tmp_path: Path) -> None:
    arguments = ["--m", str(toy_model), "--port", "0", "--threads", "1", "--engine-process"]
    server = subprocess.Popen(
        [sys.executable, "-P", ELSEWHERE, system, "candle_vllm.server.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(tmp_path),
        cwd=tmp_path,
    )
    log: list[str] = []
    readers = [threading.Thread(target=log.extend, args=(pipe,)) for pipe in (server.stdout, server.stderr)]
    try:
        for reader in readers:
            reader.start()
        wait_for(lambda: server.poll() is not None or any("http://" in line for line in list(log)), PATIENCE)
        assert server.poll() is None, log
        url = next(word for line in log for word in line.split() if word.startswith("http://"))
        body: dict[str, Any] = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        text, ended = 0, ""
        with httpx.stream("POST", f"{url.rstrip('/')}/v1/completions", json=body, timeout=PATIENCE) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += 1
                    if text == 1:  # it is in the midst of the answer: what Windows' supervisors send, or a service's
                        server.send_signal(signal.SIGUSR1 if system == "win32" else signal.SIGTERM)
                ended = line or ended
        assert ended == "data: [DONE]", log
        assert server.wait(PATIENCE) == 0, log
    finally:
        server.kill()
        server.wait()
        for reader in readers:
            reader.join()
        for pipe in (server.stdout, server.stderr):
            assert pipe is not None
            pipe.close()
    assert text >= 1000  # of 1,500 tokens: it was not cut off (several may come in one piece)
