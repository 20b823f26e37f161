# SPDX-License-Identifier: MIT
"""Plain weights quantised while they are loaded: the same blocks, numbers and memory as a file that holds them."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams, WeightsError, threads
from candle_vllm.core.assembly.isq import in_situ, quantised_in_situ
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.config import ISQ_NAMES
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.gguf_linear import GgufMatrix
from candle_vllm.core.kernels.gguf_linear.reference import dequantise
from candle_vllm.core.kernels.torch_numbers import NAMES
from candle_vllm.core.kernels.weight_quant.rows import ISQ_TYPES, quantise
from candle_vllm.core.kernels.weight_quant.searches import SIMPLE
from candle_vllm.core.layers.parameters import MatrixParameter, Placement
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.views import row_part, transposed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.quantization import ggml
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.quantization.format_writers import WRITERS, quantise_model
from packages.core.tests.toy_encoder import write_toy_encoder
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.common_run import few

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, logprobs=5, ignore_eos=True)
BIG: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Counts:
    """A model of one layer."""

    num_experts: int
    num_layers: int = 1


def answer(model: Path, **settings: Any) -> Any:
    with InferenceEngine(str(model), max_model_len=128, kv_cache_memory=1 << 24, **settings) as engine:
        output = engine.generate(list(b"Once upon a time"), GREEDY, use_tqdm=False)[0]
        scores = [[candidate.logprob for candidate in entry.top] for entry in output.outputs[0].logprobs or ()]
        return list(output.token_ids), np.array(scores), engine.model_info.quantization


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("eager", [False, True])
def test_answers_are_those_of_a_gguf_file_of_the_same_type(family: str, eager: bool, tmp_path: Path) -> None:
    config = toy_config(family, torch_dtype="float32")
    folder = write_toy_model(tmp_path / "plain", config)
    file = write_toy_gguf(tmp_path / "q8_0.gguf", config, quantization="Q8_0")
    ours, theirs = answer(folder, isq="q8_0", op_by_op=eager), answer(file, op_by_op=eager)
    assert ours[0] == theirs[0]
    assert np.array_equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "name", few(ISQ_NAMES, *(name for name in ISQ_NAMES if name not in ("iq4_nl", "q2k", "q3k", "q5k")))
)
def test_every_type_loads_and_its_kernels_agree_with_the_decoded_weights(name: str, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(**BIG))
    compiled, decoded = answer(folder, isq=name), answer(folder, isq=name, op_by_op=True)
    assert f"{ISQ_TYPES[name].name} x" in compiled[2] == decoded[2]
    assert abs(compiled[1][0] - decoded[1][0]).max() < 0.2  # the compiled kernels have 8-bit activations


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("name", few(ISQ_NAMES, *(name for name in ISQ_NAMES if name not in ("q8_0", "q4k", "iq4_xs"))))
@pytest.mark.parametrize("weighed", [False, True])
def test_a_part_is_quantised_as_the_whole_is(name: str, weighed: bool, tmp_path: Path) -> None:
    """Rows in any order, and columns at the borders of blocks, have the bytes of the whole; nothing else is read."""
    kind, numbers = ISQ_TYPES[name], np.random.default_rng(7)
    size, width = kind.block
    weights = torch.from_numpy(numbers.standard_normal((6, 4 * 256), np.float32)).to(torch.bfloat16)
    importance = numbers.random((1, 4 * 256), np.float32) + 0.1 if weighed and kind.name not in SIMPLE else None
    bad = weights.clone()
    bad[[0, 4]] = torch.nan  # rows of others
    bad[:, :256] = torch.nan
    bad[:, 768:] = torch.nan
    save_file({"w": weights, "bad": bad}, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as checkpoint:
        whole, hurt = (in_situ(checkpoint.tensors[each], kind, importance) for each in ("w", "bad"))
        blocks = slice(256 // size * width, 768 // size * width)
        with pytest.raises(WeightsError, match="cannot be quantised"):
            hurt.rows(1, 4).raw()
        right = whole.raw()
        for cut, rows_of in (
            (hurt.rows(1, 4).columns(256, 768), slice(1, 4)),
            (hurt.columns(256, 768).rows(1, 4), slice(1, 4)),
            (hurt.select(np.array([5, 2, 3])).columns(256, 768), [5, 2, 3]),
        ):
            part = right[rows_of][:, blocks]
            assert np.array_equal(cut.raw(), part)
            assert (cut.shape, cut.nbytes, cut.type_name) == ((3, 512), part.nbytes, whole.type_name)
        with pytest.raises(WeightsError, match="cannot be cut"):
            whole.columns(16, 512)


def test_w8a8_has_one_scale_for_each_row(tmp_path: Path) -> None:
    """Tables keep blocks. A CPU with byte products multiplies such rows by 8-bit segments, another one as Q8_0."""
    weights = {"a": torch.randn(64, 256), "head": torch.randn(300, 256)}
    save_file(weights, tmp_path / "model.safetensors")
    table, matrices = [WeightName("a:weight", "a", None), WeightName("head:weight", "head", None)], dict[str, Any]()
    placement = Placement(CPU, "F32", WeightMemory())
    with open_safetensors(tmp_path) as checkpoint:
        found = quantised_in_situ("w8a8", table, checkpoint, Counts(num_experts=0))
        for name, weight in weights.items():
            blocks = found.tensors[f"{name}:weight"].raw().reshape(len(weight), 8, 34)
            scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16).astype(np.float32)
            assert (scales == scales[:, :1]).all() == (name == "a")
            decoded = ggml.dequantize(blocks, GGMLQuantizationType.Q8_0, tuple(weight.shape))
            assert (np.abs(decoded - weight.numpy()).reshape(len(weight), 8, 32) <= 0.6 * scales).all()
            MatrixParameter(matrices, name, tuple(weight.shape), placement.backend).fill(
                found.tensors[f"{name}:weight"]
            )
    assert matrices["a"].kind.name == ("W8A8" if host_isa() & (Isa.VNNI | Isa.AVX_VNNI) else "Q8_0")
    assert matrices["head"].kind.name == "Q8_0"


def test_what_becomes_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows of 256 take the type, the tables at least Q6_K, rows of 96 Q8_0, rows of 40 nothing."""
    names = {
        "embed": (300, 256), "head": (300, 256), "a": (64, 256), "router": (8, 256), "b": (64, 96), "c": (64, 40),
        "norm": (256,), "bias": (256,), "unused": (4, 256),
    }  # fmt: skip
    weights = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in names.items()}
    save_file(weights, tmp_path / "model.safetensors")
    table = [WeightName(f"{name}:weight", name, None) for name in names if name not in ("bias", "unused")]
    table.append(WeightName("a:bias", "bias", None))
    with open_safetensors(tmp_path) as checkpoint, caplog.at_level(logging.INFO):
        found = quantised_in_situ("q4k", table, checkpoint, Counts(num_experts=0))
        kinds = {name: tensor.type_name for name, tensor in found.tensors.items()}
        assert kinds == {
            "unused": "BF16", "embed:weight": "Q6_K", "head:weight": "Q6_K", "a:weight": "Q4_K", "b:weight": "Q8_0",
            "router:weight": "BF16", "c:weight": "BF16", "norm:weight": "BF16", "a:bias": "BF16",
        }  # fmt: skip
        stored = found.tensors["a:weight"]
        kind = GGMLQuantizationType.Q4_K
        wanted = quantise(weights["a"].float().view(torch.uint8).numpy(), "F32", 256, kind)
        assert np.array_equal(stored.raw(), wanted)
        assert stored.nbytes == wanted.size
        assert np.array_equal(stored.load(), ggml.dequantize(wanted, kind, (64, 256)))
    assert [record.message for record in caplog.records] == [
        "isq q4k: 2 matrices: Q6_K (embedding and head)",
        "isq q4k: 1 matrices: Q4_K",
        "isq q4k: 1 matrices: Q8_0, because their rows are no multiple of 256",
        "isq q4k: 1 matrices: unquantised, because their rows are no multiple of 32",
    ]


def test_views_come_before_quantisation(tmp_path: Path) -> None:
    """Experts of one tensor, parts of a fused one, transposed: each is quantised as the model wants it."""
    fused = torch.randn(3, 256, 64)  # experts, in, out (gate above up)
    save_file({"experts": fused}, tmp_path / "model.safetensors")

    def part(index: int) -> Any:
        return lambda stored, config: row_part(index, 2)(transposed(stored, config), config)

    table = [WeightName(f"mlp:{n}.{{e}}.weight", "experts", None, part(i)) for i, n in enumerate(("gate", "up"))]
    with open_safetensors(tmp_path) as checkpoint:
        found = quantised_in_situ("q5k", table, checkpoint, Counts(num_experts=3))
        assert len(found.tensors) == 6
        for e in range(3):
            for i, name in enumerate(("gate", "up")):
                plain = fused[e].T.contiguous()[32 * i : 32 * (i + 1)]
                wanted = quantise(plain.view(torch.uint8).numpy(), "F32", 256, GGMLQuantizationType.Q5_K)
                assert np.array_equal(found.tensors[f"mlp:{name}.{e}.weight"].raw(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_threads_and_dtypes_make_the_same_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(700, 768).to(dtype)
    kind = GGMLQuantizationType.Q4_K
    wanted = quantise(x.float().view(torch.uint8).numpy(), "F32", 768, kind)
    monkeypatch.setattr(threads, "loading_threads", lambda: 3)
    assert np.array_equal(quantise(x.view(torch.uint8).numpy(), NAMES[dtype], 768, kind), wanted)


def test_gpus_keep_the_blocks(tmp_path: Path) -> None:
    """The part of a layer on a GPU takes them as it takes a GGUF file's; here its tensors are on the CPU."""
    weights = torch.randn(64, 256)
    save_file({"a": weights}, tmp_path / "model.safetensors")
    placement = Placement(CPU, "BF16", keeps_quantised=True)
    matrices: dict[str, Any] = {}
    with open_safetensors(tmp_path) as checkpoint:
        found = quantised_in_situ("q4k", [WeightName("a:weight", "a", None)], checkpoint, Counts(num_experts=0))
        MatrixParameter(matrices, "a", (64, 256), placement.backend).fill(found.tensors["a:weight"])
        wanted = torch.from_numpy(found.tensors["a:weight"].load())
    assert isinstance(matrices["a"].data, GgufMatrix)
    assert torch.allclose(dequantise(matrices["a"].data), wanted, atol=0.0, rtol=1e-6)


# ---- bad input -------------------------------------------------------------------------------------------------------


def load(folder: Path, **settings: Any) -> Any:
    return load_model(EngineConfig(model=str(folder), **settings), CPU, lambda *_: None)


def test_a_gguf_file_is_refused_with_the_alternative(tmp_path: Path) -> None:
    file = write_toy_gguf(tmp_path / "toy.gguf")
    with pytest.raises(ConfigError, match=r"q4k needs unquantised .*toy\.gguf is a GGUF file.* quantize .*--isq q4k"):
        load(file, isq="q4_k")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e9])
@pytest.mark.parametrize("isq", ["q8_0", "w8a8"])
def test_numbers_that_cannot_be_quantised_are_named(isq: str, bad: float, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight .* finite"
    ):
        load(folder, isq=isq)


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "llama", num_key_value_heads=4, intermediate_size=128)
    folder, _ = quantise_model(plain, tmp_path, WRITERS["gptq"])
    with pytest.raises(ConfigError, match=r"isq q4k .* is quantised already: .* is GPTQ"):
        load(folder, isq="q4k")


def test_encoders_are_refused(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"isq q4k is for models that generate text.*--dtype bf16"):
        InferenceEngine(str(folder), isq="q4k")


# ---- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from candle_vllm.core import EngineConfig
from candle_vllm.core.threads import LOADING_THREADS
LOADING_THREADS.set(2)
from candle_vllm.core.assembly.model import load_model
def load(folder, isq):
    return load_model(EngineConfig(model=folder, isq=isq), torch.device("cpu"), lambda *_: None)
def peak():
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith("VmHWM"))
load(sys.argv[1], "q4k")  # compiles, and takes what any model takes
open("/proc/self/clear_refs", "w").write("5")
before = peak()
loaded = load(sys.argv[2], "q4k")
print(json.dumps({"bytes": loaded.weight_bytes, "grown": peak() - before}))
"""


def write_wide_model(folder: Path, seed: int = 0) -> Path:
    """Six layers of 25 MB each in bf16."""
    config = toy_config(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, head_dim=64,
        num_hidden_layers=6,
    )  # fmt: skip
    write_toy_model(folder, config | {"num_hidden_layers": 1, "torch_dtype": "bfloat16"}, seed=seed)
    weights = load_file(folder / "model.safetensors")
    layer = {name: tensor for name, tensor in weights.items() if ".layers.0." in name}
    for i in range(1, 6):
        weights |= {name.replace(".layers.0.", f".layers.{i}."): tensor.clone() for name, tensor in layer.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.every_case
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
def test_loading_takes_little_more_than_the_quantised_weights(tmp_path: Path) -> None:
    small = write_toy_model(tmp_path / "small", toy_config(**BIG))
    wide = write_wide_model(tmp_path / "wide")
    plain = (wide / "model.safetensors").stat().st_size
    run = subprocess.run([sys.executable, "-c", MEASURE, small, wide], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["bytes"] < 0.3 * plain
    # One tensor, and what the threads touch, which is the same for a model of any size.
    assert found["grown"] < found["bytes"] * 1.05 + 2816 * 1024 * 2 + (48 << 20) < 0.8 * plain, found
