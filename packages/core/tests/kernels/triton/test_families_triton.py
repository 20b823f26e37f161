# SPDX-License-Identifier: MIT
"""Every family of `tests/models/families.py` over the GPU's path: steps by the Triton kernels equal those in torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.kernels import delta_rule, dispatch
from candle_vllm.core.kernels.delta_rule import triton
from candle_vllm.core.kernels.device_stream import CudaStream
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models.families import CUDA_ISQ, FORMATS, ROWS, cuda_rows, first_rows
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    eager_logits,
    error,
    room_of,
    some_tokens,
    step_logits,
    typical_spread,
    write_tiny,
)
from tests.common_run import few

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK = 16
CHUNKS = {"f32": [6, 1, 1], "bf16": [5]}  # quantised products take the interpreter long


# Of what launches differ by: caps and windows, norms of heads, latents, sinks, experts, halves that turn, shared norms,
# biases, states, gates apart. Mixtral and Qwen3-MoE are among those of quantised matrices below.
KINDS = ["Llama", "Gemma-2", "Gemma-3", "GLM-4", "DeepSeek-V3", "Qwen2-MoE", "Phi-2", "StableLM", "gpt-oss", "LFM2"]
KINDS += ["Qwen3.5", "Gemma-4"]


def in_formats() -> list[tuple[str, str]]:
    return [(name, format) for format in FORMATS for name in cuda_rows(format)]


def logits(
    source: Path,
    device: torch.device,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    chunks: list[int] | None = None,
    **settings: Any,
) -> Any:
    """Logits [T, V] of a model as it lies on a GPU, wherever the test runs."""
    chunks = chunks or CHUNKS[dtype]
    usual = loading.choose_placement

    def placed(config: EngineConfig, _: torch.device, checkpoint: Any, *others: Any) -> Any:
        quantised = any(tensor.dtype is None for tensor in checkpoint.tensors.values())
        return dataclasses.replace(usual(config, device, checkpoint, *others), keeps_quantised=quantised)

    settings = {"dtype": dtype, "max_model_len": 160, "block_size": BLOCK} | settings
    config = EngineConfig(model=str(source), op_by_op=True, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(loading, "choose_placement", placed)
        loaded = loading.load_model(config, device, lambda *_: None)
    stream = LazyStream() if device.type == "cpu" else CudaStream(device)
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}
    runner = DeviceRunner(loaded.decoder, DeviceLimits(max(chunks), 2, 10, BLOCK), stream, dtypes[dtype], graphs=False)
    runner.allocate(10, room_of(loaded.decoder))
    return step_logits(runner, some_tokens(sum(chunks)), chunks).cpu()


def reference(source: Path, like: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> torch.Tensor:
    """What `logits` gives in the type `like`, in torch and fp32."""
    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "interpreted", lambda: False)
        return eager_logits(source, some_tokens(sum(CHUNKS[like])), CHUNKS[like], max_model_len=64, **settings)


def written(name: str, folder: Path) -> Path:
    return write_tiny(folder / "model", ROWS[name].model_type, **ROWS[name].config)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", few([name for name, row in ROWS.items() if row.interpreted], *KINDS))
def test_steps_equal_torch(name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(name, tmp_path)
    assert error(logits(source, device, "f32", monkeypatch), reference(source, "f32", monkeypatch)) < 1e-4


@pytest.mark.parametrize("name", few(["Qwen3.5", "Granite 4 H", "Kimi Linear", "GLM-5.3-Flash"], "Kimi Linear"))
def test_prompts_have_whole_chunks(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model tells the kernels of states where a prompt's multiples of 64 are: 0 and 64, in steps of 64 and 72."""
    source, told, scan = written(name, tmp_path), list[tuple[int, ...]](), triton.scan_chunks

    def counted(*given: Any) -> None:
        told.append(tuple(given[2].tolist()))
        scan(*given)

    monkeypatch.setattr(triton, "scan_chunks", counted)
    found = logits(source, device, "bf16", monkeypatch, [64, 72])
    assert set(told) == {tuple(range(64)), tuple(range(64, 136))}
    monkeypatch.setattr(delta_rule, "on_gpu", lambda _: False)
    assert error(found, logits(source, device, "bf16", monkeypatch, [64, 72])) < 0.03


@pytest.mark.parametrize(("name", "top"), few([("DeepSeek-V3.2", 3), ("GLM-5.3-Flash", 4)], ("DeepSeek-V3.2", 3)))
def test_an_index_chooses(
    name: str, top: int, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three positions of up to eight, or one group of four positions of two."""
    source = write_tiny(tmp_path, ROWS[name].model_type, **{**ROWS[name].config, "index_topk": top})
    found, wanted = logits(source, device, "f32", monkeypatch), reference(source, "f32", monkeypatch)
    assert error(found, wanted) < 1e-4
    config = source / "config.json"
    config.write_text(config.read_text().replace(f'"index_topk": {top}', '"index_topk": 8'))
    assert error(found[top:], reference(source, "f32", monkeypatch)[top:]) > 1e-3


@pytest.mark.every_case
def test_heads_attend_to_blocks_of_their_own(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two blocks of five, in one step and token by token."""
    row = ROWS["MiniMax-M3"]
    source = write_tiny(tmp_path, row.model_type, **{**row.config, "index_topk_blocks": 2})
    wanted = eager_logits(source, some_tokens(70), [70])
    assert error(logits(source, device, "f32", monkeypatch, [64, 5, 1]), wanted) < 1e-4
    config = source / "config.json"
    config.write_text(config.read_text().replace('"index_topk_blocks": 2', '"index_topk_blocks": 5'))
    assert error(eager_logits(source, some_tokens(70), [70]), wanted) > 1e-2


@pytest.mark.every_case
@pytest.mark.parametrize("name", few([name for name in first_rows() if ROWS[name].gguf], "gpt-oss"))
def test_gguf(name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised matrices as they are, activations in bf16, against the decoded weights in fp32."""
    path = export_gguf(written(name, tmp_path), tmp_path / "model.gguf", str(ROWS[name].gguf), quantization="Q8_0")
    assert typical_spread(logits(path, device, "bf16", monkeypatch), reference(path, "bf16", monkeypatch)) < 0.05


@pytest.mark.every_case
@pytest.mark.parametrize("name", few(CUDA_ISQ, "Mixtral"))
def test_in_situ_quantisation(name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(name, tmp_path)
    ours = logits(source, device, "bf16", monkeypatch, isq="q8_0")
    assert typical_spread(ours, reference(source, "bf16", monkeypatch, isq="q8_0")) < 0.05


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("name", "format"), few(in_formats(), *((cuda_rows(format)[-1], format) for format in FORMATS))
)
def test_formats(name: str, format: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, plain = write_format(written(name, tmp_path), format, tmp_path)
    assert typical_spread(logits(stored, device, "bf16", monkeypatch), reference(plain, "bf16", monkeypatch)) < 0.05
