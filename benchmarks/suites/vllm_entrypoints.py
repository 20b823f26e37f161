# SPDX-License-Identifier: MIT
"""vLLM's own tests of its entrypoints, run against `candle-vllm serve`: `python benchmarks/suites/vllm_entrypoints.py`.

The tests come with vLLM's sdist, with the modules of vLLM that they import. SmolLM2-135M, Qwen2.5-Coder-0.5B and
all-MiniLM-L6-v2 stand in for their models. Arguments go to pytest (`-k logprobs`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from suite import CACHE, HERE, environment, expected_of, run_pytest

from candle_vllm.server.settings.derived import demo_model
from tests.live_server import COMMAND
from tests.real_models import all_minilm, qwen_coder
from tests.registry_packages import pypi_tree

_VERSION = "0.32.0"
_SHA256 = "d2c957d5eee3d0985012151315ddc62cbe0cd368fc96a5fc3510438d9dddf2ad"
_PACKAGES = (  # what vLLM's modules import, and this workspace does not have
    "aiohttp==3.14.5", "blake3==1.0.11", "cachetools==8.0.2", "cbor2==6.3.0", "cloudpickle==3.1.3", "depyf==0.20.0",
    "einops==0.8.2", "ijson==3.6.0", "lark==1.3.1", "opencv-python-headless==5.0.0.93", "oss-harmony==0.0.11",
    "partial-json-parser==0.2.1.1.post7", "py-cpuinfo==9.0.0", "pybase64==1.5.1", "sentencepiece==0.2.3",
    "setproctitle==1.3.8", "tblib==3.2.2", "tiktoken==0.14.0", "watchfiles==1.3.0",
    "model-hosting-container-standards==0.1.16", "prometheus-fastapi-instrumentator==8.1.0",
    "python-json-logger==4.2.0", "apache-tvm-ffi==0.1.15.post2",
)  # fmt: skip
_ALONE = ("xgrammar==0.2.8",)  # without torch, which the workspace has
FILES = (
    "openai/completion/test_completion", "openai/completion/test_prompt_validation", "openai/chat_completion/test_chat",
    "openai/chat_completion/test_chat_completion", "openai/chat_completion/test_chat_logit_bias_validation",
    "openai/chat_completion/test_root_path", "openai/chat_completion/test_chat_echo",
    "openai/chat_completion/test_completion_with_function_calling", "openai/chat_completion/test_logprob_token_ids",
    "openai/test_return_token_ids", "openai/test_return_tokens_as_ids", "openai/test_stop_token_ids",
    "openai/test_tool_choice_content_none", "openai/test_chunked_prompt", "openai/responses/test_simple",
    "openai/responses/test_function_call", "openai/responses/test_stateful", "anthropic/test_messages",
    "serve/tokenize/test_tokenization", "serve/instrumentator/test_basic", "pooling/embed/test_online",
    "pooling/embed/test_online_dimensions", "pooling/scoring/test_bi_encoder_online", "pooling/basic/test_truncation",
)  # fmt: skip


def _wanted(name: str) -> bool:
    """The modules of vLLM, and its tests but for those modules of them that the plugin stands for."""
    below = name.startswith(("vllm/", "tests/entrypoints/", "tests/models/"))
    here = name in ("tests/__init__.py", "tests/ci_envs.py")
    return (below and name.endswith((".py", ".json", ".jinja"))) or here


def main() -> int:
    """Runs the tests; returns 0 where each did what is expected of it."""
    requirement = f"vllm=={_VERSION}"
    folder = pypi_tree(requirement, _SHA256, _wanted, CACHE / "vllm-entrypoints")
    shutil.copy(HERE / "vllm_entrypoints_plugin.py", folder / "tests" / "utils.py")
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = -p tests.utils\nasyncio_default_fixture_loop_scope = function\n"
    )
    python = environment("vllm-entrypoints", _PACKAGES, _ALONE)
    models = {"MiniLM": all_minilm(), "e5-small": all_minilm(), "bge-": all_minilm(), "arctic": all_minilm(),
              "Qwen": qwen_coder(), "": demo_model()}  # fmt: skip
    path = os.environ.get("PYTHONPATH")
    command = ["env", *([f"PYTHONPATH={path}"] if path else ["-u", "PYTHONPATH"]), str(COMMAND)]
    with tempfile.TemporaryDirectory() as temporary:
        return run_pytest(
            python,
            folder,
            ["--timeout=400", *(f"tests/entrypoints/{name}.py" for name in FILES)],
            expected_of(HERE / "vllm_entrypoints.toml"),
            {
                "SUITE_COMMAND": json.dumps(command),
                "SUITE_MODELS": json.dumps({part: str(model) for part, model in models.items()}),
                "SUITE_FOLDER": temporary,
                "PYTHONPATH": f"{folder}:{sysconfig.get_path('purelib')}",
                "VLLM_TARGET_DEVICE": "cpu",
            },
        )


if __name__ == "__main__":
    raise SystemExit(main())
