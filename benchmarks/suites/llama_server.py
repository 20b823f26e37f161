# SPDX-License-Identifier: MIT
"""llama.cpp's own tests of llama-server, run against `candle-vllm serve`: `python benchmarks/suites/llama_server.py`.

The tests come with the sdist of llama-cpp-python. Their models cannot be had without Hugging Face, so SmolLM2-135M,
Qwen2.5-Coder-0.5B and all-MiniLM-L6-v2 stand in, and generated texts are not compared. Arguments go to pytest
(`-k infill`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import CACHE, HERE, environment, expected_of, run_pytest

from tests.real_models import all_minilm, qwen_coder
from tests.registry_packages import pypi_file, unpacked

_VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_INSIDE = f"llama_cpp_python-{_VERSION}/vendor/llama.cpp/"
_TESTS = "tools/server/tests/"
_PACKAGES = (
    "pytest==8.3.5", "pytest-timeout==2.4.0", "openai==2.14.0", "requests==2.32.5", "wget==3.2", "aiohttp==3.12.15",
    "numpy==2.2.6", "prometheus-client==0.20.0", "filelock==3.20.0",
)  # fmt: skip
FILES = (
    "basic", "chat_completion", "compat_anthropic", "compat_oai_responses", "completion", "ctx_shift", "embedding",
    "ignore_eos", "infill", "metrics", "proxy", "rerank", "security", "stream", "template", "tokenize", "vision_api",
)  # fmt: skip
"""What is left out: tests of the router, slots saved to files, LoRA, drafts, sleeping and MCP, which want models or
flags that cannot be had here, and `tool_call`, whose 202 cases want large models."""


def _is_used(name: str) -> bool:
    """Whether the tests need this file of llama.cpp: they, the templates, and a picture."""
    tests = name.startswith(_TESTS) and name.endswith((".py", ".ini"))
    return tests or name.startswith("models/templates/") or name == "tools/mtmd/test-1.jpeg"


def main() -> int:
    """Runs the tests; returns 0 where each did what is expected of it."""
    archive = pypi_file(f"llama-cpp-python=={_VERSION}", f"llama_cpp_python-{_VERSION}.tar.gz", _SHA256, sdist=True)
    source = unpacked(archive, _INSIDE, _is_used, CACHE / f"llama.cpp-{_VERSION}")
    folder = source / _TESTS
    shutil.copy(HERE / "llama_server_plugin.py", folder / "unit" / "conftest.py")
    launcher = folder / "llama-server"
    launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{HERE / "llama_server_launcher.py"}" "$@"\n')
    launcher.chmod(0o755)
    return run_pytest(
        environment("llama-server", _PACKAGES),
        folder,
        ["--timeout=60", *(f"unit/test_{name}.py" for name in FILES)],
        expected_of(HERE / "llama_server.toml"),
        {
            "LLAMA_SERVER_BIN_PATH": str(launcher),
            "SUITE_EMBEDDING_MODEL": str(all_minilm()),
            "SUITE_INFILL_MODEL": str(qwen_coder()),
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
