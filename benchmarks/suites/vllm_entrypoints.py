# SPDX-License-Identifier: MIT
"""vLLM's own tests of its server, against `candle-vllm serve`: `python benchmarks/suites/vllm_entrypoints.py`.

The tests come with vLLM's sdist; vLLM itself is not installed (`vllm_plugin.py` stands for what the tests import).
Their models cannot be had without Hugging Face: SmolLM2-135M stands for them, all-MiniLM-L6-v2 for encoders, and
Qwen2.5-Coder-0.5B where tools are called. Arguments are names of files below, or go to pytest (`-k echo`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import CACHE, HERE, environment, expected_of, run_pytest

from tests.real_models import all_minilm, qwen_coder
from tests.registry_packages import CACHE as DOWNLOADS
from tests.registry_packages import checked, unpacked

_VERSION = "0.33.0"
_SHA256 = "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112"
_BUILDING = ("pip", "setuptools", "setuptools-scm", "setuptools-rust", "wheel", "packaging", "jinja2")
_PACKAGES = ("pybase64==1.4.2", "tblib==3.1.0", "openai-harmony==0.0.8", "regex")
FILES = (
    "openai/completion/test_completion", "openai/completion/test_prompt_validation",
    "openai/chat_completion/test_chat", "openai/chat_completion/test_chat_completion",
    "openai/chat_completion/test_chat_logit_bias_validation", "openai/chat_completion/test_root_path",
    "openai/chat_completion/test_chat_echo", "openai/chat_completion/test_completion_with_function_calling",
    "openai/chat_completion/test_logprob_token_ids", "openai/test_return_token_ids",
    "openai/test_return_tokens_as_ids", "openai/test_stop_token_ids", "openai/test_tool_choice_content_none",
    "openai/test_chunked_prompt", "openai/responses/test_simple", "openai/responses/test_function_call",
    "openai/responses/test_stateful", "anthropic/test_messages", "serve/tokenize/test_tokenization",
    "serve/instrumentator/test_basic", "pooling/embed/test_online", "pooling/embed/test_online_dimensions",
    "pooling/scoring/test_bi_encoder_online", "pooling/basic/test_truncation",
)  # fmt: skip
"""What is left out: tests that want a GPU, weights of one model, LoRA files of the hub, or no server at all."""


def main() -> int:
    """Runs the tests; returns 0 where each did what is expected of it."""
    folder = CACHE / "vllm-entrypoints"
    unpacked(
        sdist(),
        f"vllm-{_VERSION}/tests/",
        lambda name: (name.endswith(".py") and name.startswith(("entrypoints/", "models/"))) or name == "__init__.py",
        folder / "tests",
    )
    shutil.copy(HERE / "vllm_server.py", folder / "tests" / "utils.py")
    chosen = [name for name in FILES if name.rpartition("/")[2] in sys.argv[1:]]
    sys.argv[1:] = [word for word in sys.argv[1:] if word not in {name.rpartition("/")[2] for name in FILES}]
    return run_pytest(
        environment("vllm-entrypoints", _PACKAGES, over=True),
        folder,
        ["-p", "vllm_plugin", "--timeout=300", *(f"tests/entrypoints/{name}.py" for name in chosen or FILES)],
        expected_of(HERE / "vllm_entrypoints.toml"),
        {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(folder)]),
            "SUITE_EMBEDDING_MODEL": str(all_minilm()),
            "SUITE_QWEN": str(qwen_coder()),
        },
    )


def sdist() -> Path:
    """vLLM's sdist. pip asks it for its metadata, so setuptools and this environment's torch are lent to it."""
    path = DOWNLOADS / f"vllm-{_VERSION}.tar.gz"
    if not path.exists():
        lent = {"PYTHONPATH": sysconfig.get_path("purelib"), "VLLM_TARGET_DEVICE": "empty"}
        command = [str(environment("vllm-sdist", _BUILDING)), "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", "vllm", "--no-build-isolation", "--dest", str(DOWNLOADS), f"vllm=={_VERSION}"]
        subprocess.run(command, check=True, env={**os.environ, **lent, "VLLM_VERSION_OVERRIDE": _VERSION})
    return checked(path, _SHA256)


if __name__ == "__main__":
    raise SystemExit(main())
