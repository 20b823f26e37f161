# SPDX-License-Identifier: MIT
"""Every family against transformers: whole prompts, chunks and decoding; op by op, compiled, and from GGUF."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from candle_vllm.core import EngineConfig
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.kernels.cpu_runtime import operation, travelling
from candle_vllm.core.kernels.cpu_runtime.level import host_isa
from packages.core.tests.models.families import ROWS, cases
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    cuts,
    eager_logits,
    error,
    recorded_logits,
    settled,
    some_tokens,
    spread,
    their_logits,
    typical_spread,
    write_tiny,
)
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Written when first asked for, and shared by the tests of a row."""
    return {}


def folder_of(name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if name not in folders:
        row = ROWS[name]
        folders[name] = write_tiny(tmp_path_factory.mktemp("family"), row.model_type, **row.config)
    return folders[name]


@pytest.mark.parametrize("name", cases(ROWS))
def test_logits_equal_transformers(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, tokens = folder_of(name, folders, tmp_path_factory), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert error(eager_logits(folder, tokens, chunks), theirs) < 1e-4, chunks


@pytest.mark.one_of_each(16)
@pytest.mark.parametrize("name", cases(name for name, row in ROWS.items() if row.recorded))
def test_compiled_steps_are_close(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and its cache are bfloat16 there; matrices stay as they are stored, in fp32. All kernels are shipped,
    except attention with the sizes of heads that only these models have."""
    asked, address = set[tuple[object, ...]](), operation._address
    monkeypatch.setattr(operation, "_address", lambda *named: asked.add(named) or address(*named))
    folder, tokens = folder_of(name, folders, tmp_path_factory), some_tokens()
    eager = eager_logits(folder, tokens, [len(tokens)])
    whole, cut = (recorded_logits(folder, tokens, chunks) for chunks in cuts())
    assert spread(*settled(whole, eager, ROWS[name].undecided)) < 1e-2
    assert torch.equal(whole, cut), "what a step holds must not change a token's numbers"
    shipped = {(code, *constants) for code, constants in travelling.functions(host_isa())}
    assert {named for named in asked if "attention" not in str(named)} <= shipped


RUN_ALL = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
from candle_vllm.core import InferenceEngine, SamplingParams

params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=2, repetition_penalty=1.1)
decoders, encoders, cross_encoders = json.load(sys.stdin)
for folder in decoders:
    with InferenceEngine(folder, device="cpu", block_size=16, threads=1, kv_cache_memory=1 << 24) as engine:
        (answer,) = engine.generate([list(range(40))], params, use_tqdm=False)
        print(json.dumps(answer.outputs[0].token_ids))
for folder in encoders:
    with InferenceEngine(folder, device="cpu", threads=1) as engine:
        print(json.dumps([list(output.embedding) for output in engine.embed(["a fox", "b"], use_tqdm=False)]))
        print(json.dumps([output.score for output in engine.score([("a fox", "b")], use_tqdm=False)]))
for folder in cross_encoders:
    with InferenceEngine(folder, device="cpu", threads=1) as engine:
        print(json.dumps([output.score for output in engine.score([("a fox", "b")], use_tqdm=False)]))
"""


@pytest.mark.parametrize(
    "names",
    [
        ["Llama", "gpt-oss", "DeepSeek-V3", "LFM2-MoE"],
        pytest.param([name for name, row in ROWS.items() if row.recorded], marks=pytest.mark.every_case),
    ],
    ids=["some", "all"],
)
def test_what_is_compiled_needs_no_torch(
    names: list[str],
    folders: dict[str, Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Families, blocks of GGUF, and encoders, in a process that cannot import torch: the numbers of one that can."""
    paths = [folder_of(name, folders, tmp_path_factory) for name in names]
    paths.append(export_gguf(paths[0], tmp_path / "model.gguf", "llama", quantization="Q8_0"))
    encoder = write_toy_encoder(tmp_path / "encoder")
    write_gguf(EngineConfig(model=str(encoder)), tmp_path / "encoder.gguf")
    scorer = write_toy_encoder(tmp_path / "scorer", toy_encoder_config("RobertaForSequenceClassification"))
    kinds = [paths, [encoder, tmp_path / "encoder.gguf"], [scorer]]
    given = json.dumps([[str(path) for path in kind] for kind in kinds])
    alone = subprocess.run([sys.executable, "-c", RUN_ALL], input=given, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in alone.stdout.splitlines()]
    assert len(found) == len(paths) + 5
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    with contextlib.redirect_stdout(io.StringIO()) as beside:
        exec(RUN_ALL.replace("sys.meta_path.insert(0, Missing())", "import torch"), {})
    assert beside.getvalue() == alone.stdout


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("name", cases(name for name, row in ROWS.items() if row.gguf))
def test_gguf_equals_safetensors(
    name: str, folders: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, tokens = folder_of(name, folders, tmp_path_factory), some_tokens(24)
    architecture = str(ROWS[name].gguf)
    path = export_gguf(folder, tmp_path / "model.gguf", architecture)
    plain = eager_logits(folder, tokens, [len(tokens)])
    assert error(eager_logits(path, tokens, [len(tokens)]), plain) < 1e-5
    if ROWS[name].recorded:
        path = export_gguf(folder, tmp_path / "quantised.gguf", architecture, quantization="Q8_0")
        decoded = eager_logits(path, tokens, [len(tokens)])
        assert typical_spread(recorded_logits(path, tokens, [len(tokens)]), decoded) < 0.05
