# SPDX-License-Identifier: MIT
"""Stands for `tests/utils.py` of vLLM's tests: the server that they start is `candle-vllm serve`, with their flags."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from vllm_plugin import local_model  # pyright: ignore[reportMissingImports]

ROCM_EXTRA_ARGS: list[str] = []
ROCM_ENV_OVERRIDES: dict[str, str] = {}
VLLM_PATH = Path(__file__).parents[1]


class RemoteOpenAIServer:
    """A server that runs while the context is open."""

    DUMMY_API_KEY = "token-abc123"

    def __init__(
        self,
        model: str,
        vllm_serve_args: Sequence[str],
        *,
        env_dict: Mapping[str, str] | None = None,
        seed: int = 0,
        override_hf_configs: Mapping[str, Any] | None = None,
        **_: object,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.host = "127.0.0.1"
        overrides = ["--hf-overrides", json.dumps(override_hf_configs)] if override_hf_configs else []
        names = [] if "--served-model-name" in vllm_serve_args else ["--served-model-name", model]
        command = [sys.executable, "-m", "candle_vllm", "serve", local_model(model), *names, "--port", str(self.port)]
        command += ["--seed", str(seed), *vllm_serve_args, *overrides]
        self.proc = subprocess.Popen(command, env={**os.environ, **(env_dict or {})})
        try:
            self._wait()
        except BaseException:
            self._end()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end:
            if self.proc.poll() is not None:
                raise RuntimeError(f"the server ended with {self.proc.returncode}")
            try:
                if httpx.get(self.url_for("health"), timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise RuntimeError("the server did not start in time")

    def _end(self) -> None:
        self.proc.terminate()
        try:
            self.proc.wait(20)
        except subprocess.TimeoutExpired:
            self.proc.kill()

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def url_root(self) -> str:
        """The address without a path."""
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        """The address of a path."""
        return "/".join([self.url_root, *(part.strip("/") for part in parts)])

    def _given(self, arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
        given = {"timeout": 240, "max_retries": 0, **arguments}
        return {"base_url": self.url_root + path, "api_key": self.DUMMY_API_KEY, **given}

    def get_client(self, **arguments: Any) -> Any:
        """OpenAI's client."""
        import openai

        return openai.OpenAI(**self._given(arguments, "/v1"))

    def get_async_client(self, **arguments: Any) -> Any:
        """OpenAI's client for an event loop."""
        import openai

        return openai.AsyncOpenAI(**self._given(arguments, "/v1"))

    def get_client_anthropic(self, **arguments: Any) -> Any:
        """Anthropic's client."""
        import anthropic

        return anthropic.Anthropic(**self._given(arguments, ""))

    def get_async_client_anthropic(self, **arguments: Any) -> Any:
        """Anthropic's client for an event loop."""
        import anthropic

        return anthropic.AsyncAnthropic(**self._given(arguments, ""))
