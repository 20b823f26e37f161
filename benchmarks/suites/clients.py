# SPDX-License-Identifier: MIT
"""Client libraries against `candle-vllm serve`: `python benchmarks/suites/clients.py [NAME ...] [-k EXPRESSION]`.

The scenarios stand in `clients/`, a file for each library, which has an environment of its own; LangChain's are its
standard tests. Qwen2.5-Coder-0.5B answers greedily, all-MiniLM-L6-v2 embeds, and tiny random models classify and see;
failures with a known reason stand in `clients.toml`.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import HERE, environment, expected_of, node_project, run_node, run_pytest

from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from packages.core.tests.toy_sight import write_toy_sight
from tests.live_server import ServerProcess
from tests.real_models import all_minilm, qwen_coder

_PYTEST = ("pytest==9.0.3", "pytest-asyncio==1.3.0", "pytest-timeout==2.4.0")
_PACKAGES = {
    "litellm": ("litellm==1.110.2",),
    "pydantic_ai": ("pydantic-ai-slim[openai,anthropic]==2.32.2", "httpx==0.28.1"),
    "instructor": ("instructor[anthropic]==1.17.0", "jsonref"),
    "langchain": ("langchain-tests==1.1.9", "langchain-openai==1.7.4", "langchain-ollama==1.1.0",
                  "langchain-anthropic==1.7.10"),
    "openai": ("openai[realtime]==3.57.0",),
    "openai_agents": ("openai-agents==0.24.0", "openai==3.57.0"),
    "anthropic": ("anthropic==2.14.0",),
    "ollama": ("ollama==0.6.3",),
    "llama_index": ("llama-index-core==0.14.25", "llama-index-llms-openai==0.8.3",
                    "llama-index-llms-openai-like==0.8.1", "llama-index-llms-ollama==0.11.0",
                    "llama-index-embeddings-openai-like==0.4.0", "llama-index-embeddings-ollama==0.10.0",
                    "openai==2.54.0", "ollama==0.6.3"),
    "open_responses": ("openai==3.57.0", "httpx==0.28.1", "openresponses-types==2.4.0"),
}  # fmt: skip
_NPM = {
    "ai_sdk": ("ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/openai-compatible@2.0.92", "@ai-sdk/anthropic@3.0.140",
               "zod@4"),
}  # fmt: skip


def main() -> int:
    """Runs the tests of the libraries that are named, or of all; returns 0 where each did what is expected of it."""
    names = (*_PACKAGES, *_NPM)
    chosen = [name for name in names if name in sys.argv[1:]]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in names]
    expected, clients = expected_of(HERE / "clients.toml"), HERE / "clients"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = toy_encoder_config("BertForSequenceClassification", id2label={"0": "safe", "1": "toxic"})
        served = {
            "SUITE_ADDRESS": [qwen_coder(), "--served-model-name", "qwen", "other", "--max-model-len", "8192",
                              "--temperature", "0"],
            "SUITE_EMBEDDER": [all_minilm(), "--served-model-name", "minilm"],
            "SUITE_CLASSIFIER": [write_toy_encoder(folder / "model", config, pooling=None), "--served-model-name",
                                 "classifier"],
            "SUITE_SEEING": [write_toy_sight(folder / "seeing"), "--served-model-name", "seeing"],
        }  # fmt: skip
        variables: dict[str, str] = {}
        for variable, flags in served.items():
            (folder / variable).mkdir()
            server = ServerProcess(folder / variable, "--m", *map(str, flags))
            stack.callback(server.stop)
            variables[variable] = server.url
        results: list[int] = []
        for name in chosen or names:
            if name in _NPM:
                results.append(run_node(node_project(name, _NPM[name]), clients / f"{name}.mjs", expected, variables))
            else:
                python = environment(name, (*_PYTEST, *_PACKAGES[name]))
                results.append(run_pytest(python, clients, [f"test_{name}.py"], expected, variables))
    return max(results)


if __name__ == "__main__":
    raise SystemExit(main())
