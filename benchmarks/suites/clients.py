# SPDX-License-Identifier: MIT
"""LiteLLM, pydantic-ai and instructor against `candle-vllm serve`: `python benchmarks/suites/clients.py [NAME ...]`.

The scenarios stand in `clients/`, a file for each library, which has an environment of its own. Qwen2.5-Coder-0.5B
answers greedily, all-MiniLM-L6-v2 embeds; failures with a known reason stand in `clients.toml`.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import HERE, environment, expected_of, run_pytest

from tests.live_server import ServerProcess
from tests.real_models import all_minilm, qwen_coder

_PYTEST = ("pytest==9.0.3", "pytest-asyncio==1.3.0", "pytest-timeout==2.4.0")
_PACKAGES = {
    "litellm": ("litellm==1.110.2",),
    "pydantic_ai": ("pydantic-ai-slim[openai,anthropic]==2.32.2", "httpx==0.28.1"),
    "instructor": ("instructor[anthropic]==1.17.0", "jsonref"),
}  # fmt: skip


def main() -> int:
    """Runs the tests of the libraries that are named, or of all; returns 0 where each did what is expected of it."""
    chosen = [name for name in _PACKAGES if name in sys.argv[1:]]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in _PACKAGES]
    with ExitStack() as stack:
        qwen = [str(qwen_coder()), "--served-model-name", "qwen", "--max-model-len", "8192", "--temperature", "0"]
        minilm = [str(all_minilm()), "--served-model-name", "minilm"]
        variables: dict[str, str] = {}
        for name, flags in (("SUITE_ADDRESS", qwen), ("SUITE_EMBEDDER", minilm)):
            server = ServerProcess(Path(stack.enter_context(tempfile.TemporaryDirectory())), "--m", *flags)
            stack.callback(server.stop)
            variables[name] = server.url
        results = [
            run_pytest(
                environment(name, (*_PYTEST, *_PACKAGES[name])),
                HERE / "clients",
                [f"test_{name}.py"],
                expected_of(HERE / "clients.toml"),
                variables,
            )
            for name in chosen or _PACKAGES
        ]
    return max(results)


if __name__ == "__main__":
    raise SystemExit(main())
