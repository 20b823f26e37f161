# SPDX-License-Identifier: MIT
"""A server with two replicas: one address, one model, and neither a request nor a process too many when one dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil

from tests.live_server import ServerProcess
from tests.waiting import wait_for

ASK = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


def test_a_server_of_two_replicas(toy_model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--m", str(toy_model), "-dp", "2", "--threads", "2")
    try:
        replicas = [each.pid for each in psutil.Process(server.pid).children()]
        assert len(replicas) == 2
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:

            def up() -> list[str]:
                lines = client.get("/metrics").text.splitlines()
                return [line.rsplit(" ", 1)[1] for line in lines if line.startswith("candle_vllm:replica_up{")]

            first = client.post("/v1/completions", json=ASK).json()["choices"][0]["text"]
            assert up() == ["1.0", "1.0"]
            os.kill(replicas[0], signal.SIGKILL)
            for _ in range(4):  # the other one answers, whether or not the death has been noticed
                answer = client.post("/v1/completions", json=ASK)
                assert answer.status_code in (200, 503)
            assert client.post("/v1/completions", json=ASK).json()["choices"][0]["text"] == first
            assert client.get("/health").status_code == 200
            wait_for(lambda: up() == ["1.0", "1.0"])
            replicas += [each.pid for each in psutil.Process(server.pid).children()]
    finally:
        assert server.stop() == 0
    assert len(set(replicas)) == 3
    assert not any(psutil.pid_exists(pid) for pid in replicas)
