# SPDX-License-Identifier: MIT
"""What vLLM's tests of its entrypoints import as `tests.utils` and `tests.conftest`: servers of candle-vllm instead of
vLLM's, and models that public packages hold instead of those of Hugging Face.

A server keeps the name that the test gives to its model, so requests and comparisons stay as they are. Where a test
needs facts of the model (its vocabulary, the ids of a text, vectors to compare with), transformers has them from the
same files. Answers are greedy where a test does not say otherwise, and some contexts are shorter: many tests set no
limit, and a small model may not end by itself.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
import requests
import torch
import vllm.config
import vllm.tokenizers
import vllm.transformers_utils.repo_utils
from safetensors.numpy import save_file
from transformers.models.auto.modeling_auto import AutoModel
from transformers.models.auto.tokenization_auto import AutoTokenizer

sys.modules["tests.conftest"] = sys.modules[__name__]
VLLM_PATH = Path(__file__).parent.parent
ROCM_EXTRA_ARGS: list[str] = []
_SECONDS = 240  # until a server is up
_CONTEXTS = {"18192": "2048"}  # tokens
_KEY = "token-abc123"
_MODELS = json.loads(os.environ["SUITE_MODELS"])  # pattern of a name -> path of the model that stands in, in order
_FOLDER = Path(os.environ["SUITE_FOLDER"])


def _stand_in(name: str) -> str:
    return next(path for part, path in _MODELS.items() if part in name)


class RemoteOpenAIServer:
    """`candle-vllm serve` with the flags that the test gives to `vllm serve`."""

    DUMMY_API_KEY = _KEY

    def __init__(
        self, model: str, vllm_serve_args: Sequence[str], *, env_dict: dict[str, str] | None = None, seed: int = 0,
        override_hf_configs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        flags = [*vllm_serve_args, "--seed", str(seed)]
        flags += ["--override-generation-config", '{"temperature": 0}']
        if not any(flag.replace("_", "-") == "--max-model-len" for flag in flags):
            flags += ["--max-model-len", "2048"]
        flags = [_CONTEXTS.get(flag, flag) for flag in flags]
        if not any(flag.startswith("--served-model-name") for flag in flags):
            flags += ["--served-model-name", model]
        if override_hf_configs:
            flags += ["--hf-overrides", json.dumps(override_hf_configs)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host, self.port = "127.0.0.1", free.getsockname()[1]
        command = [
            *json.loads(os.environ["SUITE_COMMAND"]),
            "serve",
            _stand_in(model),
            "--port",
            str(self.port),
            *flags,
        ]
        print("starts", *command)
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_API_KEY")}
        self._process = subprocess.Popen(command, cwd=_FOLDER, env=environment | (env_dict or {}), text=True)
        end = time.monotonic() + _SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        """Whether the model is loaded: vLLM's `/health` says so, and here `/ready` does."""
        try:
            return requests.get(self.url_for("ready"), timeout=10).status_code == 200
        except requests.RequestException:
            return False

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def url_root(self) -> str:
        return f"http://{self.host}:{self.port}"

    def url_for(self, *parts: str) -> str:
        return "/".join((self.url_root, *(part.strip("/") for part in parts if part)))

    def get_client(self, **given: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=_KEY, max_retries=0, **{"timeout": 600, **given})

    def get_async_client(self, **given: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=_KEY, max_retries=0, **{"timeout": 600, **given})

    def get_client_anthropic(self, **given: Any) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url_root, api_key=_KEY, max_retries=0, **{"timeout": 600, **given})

    def get_async_client_anthropic(self, **given: Any) -> anthropic.AsyncAnthropic:
        given = {"timeout": 600, **given}
        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key=_KEY, max_retries=0, **given)


@functools.cache
def _tokenizer(name: str) -> Any:
    path = Path(_stand_in(name))
    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


class _ModelConfig:
    """Of vLLM's, what tests of servers ask: how many tokens the vocabulary has."""

    def __init__(self, model: str, **_: Any) -> None:
        self._model = model

    def get_vocab_size(self) -> int:
        """The rows of the table of embeddings, which may be more than the tokenizer's tokens."""
        from gguf import GGUFReader

        (shape,) = (one.shape for one in GGUFReader(_stand_in(self._model)).tensors if one.name == "token_embd.weight")
        return int(shape[1])


class HfRunner:
    """Vectors of all-MiniLM-L6-v2 by transformers: the mean of the last states, of length 1."""

    def __init__(self, name: str, **_: Any) -> None:
        self._tokenizer, self._model = _tokenizer(name), AutoModel.from_pretrained(_stand_in(name)).eval()

    def __enter__(self) -> HfRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], *_: Any, **__: Any) -> list[list[float]]:
        one = isinstance(prompts, str)
        given = self._tokenizer([prompts] if one else list(prompts), padding=True, return_tensors="pt")
        mask = given["attention_mask"].unsqueeze(-1)
        states = self._model(**given).last_hidden_state
        vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).tolist()
        return vectors[0] if one else vectors


@pytest.fixture(scope="session")
def hf_runner() -> type[HfRunner]:
    """The class, as vLLM's fixture of this name gives it."""
    return HfRunner


class _Adapters:
    """Downloads of LoRA adapters: one that changes nothing, for the model that stands in."""

    def snapshot_download(self, repo_id: str, **_: Any) -> str:
        return str(_adapter("Qwen" if "Qwen" in repo_id or "Alice" in repo_id else "zephyr"))


@functools.cache
def _adapter(name: str) -> Path:
    from gguf import GGUFReader

    folder = Path(tempfile.mkdtemp(dir=_FOLDER))
    weights: dict[str, np.ndarray] = {}
    for tensor in GGUFReader(_stand_in(name)).tensors:
        if tensor.name.endswith("attn_q.weight"):
            module = f"base_model.model.model.layers.{tensor.name.split('.')[1]}.self_attn.q_proj"
            wide, tall = (int(size) for size in tensor.shape)
            weights[f"{module}.lora_A.weight"] = np.full((8, wide), 0.01, np.float32)
            weights[f"{module}.lora_B.weight"] = np.zeros((tall, 8), np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


vllm.tokenizers.get_tokenizer = lambda tokenizer_name, **_: _tokenizer(tokenizer_name)
vllm.transformers_utils.repo_utils.hf_api = _Adapters


@pytest.fixture(autouse=True, scope="module")
def _facts_of_the_model(request: pytest.FixtureRequest) -> None:
    """Constants of a test module that are facts of the model."""
    module = request.module
    if hasattr(module, "get_vocab_size"):
        module.ModelConfig = _ModelConfig
    if hasattr(module, "input_tokens"):
        module.input_tokens = _tokenizer(module.MODEL_NAME)(module.input_text)["input_ids"]
    if hasattr(module, "EMBEDDING_SIZE"):
        module.EMBEDDING_SIZE = 384
