# SPDX-License-Identifier: MIT
"""An installed package adds a model family, a tool-call format and a logits processor by its entry points."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

EXTENSION = Path(__file__).parents[1] / "examples" / "extension"
PROGRAM = """
import sys
import msgspec
from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.remote.engine import RemoteEngine
from candle_vllm.openai.formats.layout import Layout
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name

with InferenceEngine(sys.argv[1], device="cpu", threads=1, kv_cache_memory=1 << 20) as engine:
    (output,) = engine.generate(["a"], SamplingParams(max_tokens=3, ignore_eos=True))
    print(engine.model_info.architecture, len(output.token_ids))
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logit_bias={97: 100})
    (same,) = engine.generate(["a"], params)
    named = msgspec.structs.replace(params, logits_processors=["no_repeat"])
    (other,) = engine.generate(["a"], named)
    print(set(same.token_ids) == {97}, any(a == b for a, b in zip(other.token_ids, other.token_ids[1:])))
with RemoteEngine(sys.argv[1], device="cpu", threads=1, kv_cache_memory=1 << 20) as engine:
    (remote,) = engine.generate(["a"], named)
    print(remote.token_ids == other.token_ids)
parser = OutputParser(Layout(None, by_name(TOOL_FORMATS)["example"]), tools={"add": {}}, make_id=str)
events = [*parser.feed('[[call]]{"name": "add", "arguments": {}}[[/call]]'), *parser.finish(True)]
print([event.name for event in events if hasattr(event, "name")])
"""


def test_a_package_adds_a_family_a_format_and_a_processor(tmp_path: Path) -> None:
    """Without the package the same folder is refused: nothing is loaded from it."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv installs the package")
    source, target = tmp_path / "extension", tmp_path / "installed"
    shutil.copytree(EXTENSION, source)
    install = [uv, "pip", "install", "--offline", "--no-deps", "--python", sys.executable, "--target", str(target)]
    subprocess.run([*install, str(source)], check=True, capture_output=True, timeout=120)
    model = write_toy_model(tmp_path / "model", toy_config(architectures=["ExampleForCausalLM"]))
    with pytest.raises(CandleVllmError, match="ExampleForCausalLM"):
        InferenceEngine(str(model), device="cpu")
    program, environment = [sys.executable, "-c", PROGRAM, str(model)], os.environ | {"PYTHONPATH": str(target)}
    found = subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["llama 3", "True False", "True", "['add']"]
