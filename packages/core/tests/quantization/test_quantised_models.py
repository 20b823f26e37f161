# SPDX-License-Identifier: MIT
"""A small Llama stored in every quantised safetensors format gives the logits of its decoded weights, on every path."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig, quantization
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.placement import choose_placement, memory_of
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels import plain_linear
from candle_vllm.core.kernels.cpu_runtime.level import Isa
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.kernels.packed_linear import layout as packed_layout
from candle_vllm.core.kernels.scaled_linear import ScaledMatrix
from candle_vllm.core.layers.parameters import MatrixParameter, Placement
from candle_vllm.core.loading import quantised
from candle_vllm.core.loading.quantised import read_quantised
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.quantization.finding import Found, StoredTensors, layers_with
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.group_codes import GroupCodes
from candle_vllm.core.quantization.stored import QuantisedTensor, WeightSource
from candle_vllm.core.quantization.tensors import Backend, Packed, StoredTensor
from packages.core.tests.kernels import packed_reference, plain_reference, scaled_reference
from packages.core.tests.models.tiny import (
    BLOCK,
    CPU,
    config_of,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    step_logits,
    typical_spread,
)
from packages.core.tests.models.tiny import write_tiny as write_model
from packages.core.tests.quantization.format_writers import WRITERS, Writer, Written, fp8, marlin, mxfp4, quantise_model

TOKENS = some_tokens(20)
CHUNKS = [13, 6, 1]
MODELS: Mapping[str, Writer] = {
    **{name: WRITERS[name] for name in ("gptq", "gptq asymmetric", "gptq 8 bits", "gptq act order", "awq")},
    **{name: WRITERS[name] for name in ("ct int4 asymmetric", "ct int8", "fp8 blocks", "mxfp4", "nvfp4")},
    **{name: WRITERS[name] for name in ("fp8", "fp8 e5m2", "ct fp8 channel", "ct nvfp4")},
    "fp8 odd blocks": lambda weight: fp8(weight, block=(16, 20)),
    "marlin": lambda weight: marlin(weight, group=-1),
}


DECODED = {"fp8 odd blocks"}
"""What the compiled CPU kernels multiply as bf16."""

FLOATS = {"fp8", "fp8 blocks", "fp8 e5m2", "ct fp8 channel", "nvfp4", "ct nvfp4"}
"""What they multiply as it is stored, with activations in bf16."""


Folders = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A quantised model and the one that it means, written when first asked for; no test may change them."""
    known: dict[str, tuple[Path, Path]] = {}
    plain = write_model(tmp_path_factory.mktemp("plain"), "llama", num_key_value_heads=4, intermediate_size=128)

    def find(name: str) -> tuple[Path, Path]:
        if name not in known:
            known[name] = quantise_model(plain, tmp_path_factory.mktemp("model"), MODELS[name], head=name == "gptq")
        return known[name]

    return find


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def device_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """As on a GPU, in the kernels' references and in fp32."""

    def placed(*arguments: Any) -> Any:
        return dataclasses.replace(choose_placement(*arguments), keeps_quantised=True)

    monkeypatch.setattr(loading, "choose_placement", placed)
    loaded = load(folder, op_by_op=True)
    return step_logits(EagerRunner(loaded.decoder, -(-len(TOKENS) // BLOCK), BLOCK, CPU, torch.float32), TOKENS, CHUNKS)


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_decoded_weights(name: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, decoded = folders(name)
    wanted = eager_logits(decoded, TOKENS, CHUNKS)
    assert torch.equal(eager_logits(folder, TOKENS, CHUNKS), wanted)
    limit = 1e-2 if name in DECODED | FLOATS else 2.5e-2  # of activations in 8 bits
    assert spread(recorded_logits(folder, TOKENS, CHUNKS), wanted) < limit
    assert error(device_logits(folder, monkeypatch), wanted) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_compiled_kernels_multiply_the_same_numbers(name: str, folders: Folders) -> None:
    folder, decoded = folders(name)
    loaded = load(folder)
    assert loaded.placement.recorded
    assert loaded.dtype == ("bf16, f32" if name in DECODED | FLOATS else "int8, f32")
    assert loaded.quantization is not None
    wanted = load_file(decoded / "model.safetensors")
    for index, layer in enumerate(loaded.decoder.layers):  # type: ignore[attr-defined]
        for end, matrix in (("down", layer.mlp.down.pieces[""]), ("up", layer.mlp.gate_up.pieces["up."])):
            weight = wanted[f"model.layers.{index}.mlp.{end}_proj.weight"]
            if name in FLOATS:
                assert isinstance(matrix, ScaledMatrix)
                found = torch.from_numpy(scaled_reference.unpack(matrix))
                if "nvfp4" in name:  # a weight meets the two scales in another order: roundings of fp32
                    assert torch.allclose(found, weight, rtol=2**-22, atol=0)
                else:
                    assert torch.equal(found, weight)
            elif name in DECODED:
                assert torch.equal(torch.from_numpy(plain_reference.unpack(matrix)), weight.bfloat16().float())
            elif isinstance(matrix, plain_linear.PlainMatrix):  # a row has one scale
                assert matrix.kind is plain_linear.PlainKind.W8A8
                assert torch.equal(torch.from_numpy(plain_reference.unpack(matrix)), weight)
            else:
                meant = weight if matrix.order is None else weight[:, matrix.order]
                assert (matrix.order is not None) == ("act order" in name)
                assert np.array_equal(packed_reference.dequantise(matrix), meant.numpy())


@pytest.mark.parametrize("dtype", ["auto", "f32", "f16"])
def test_small_floats_stay_what_they_are(dtype: str, folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever plain matrices become, and nothing is said of decoding."""
    folder, decoded = folders("fp8 blocks")
    with caplog.at_level(logging.INFO):
        loaded = load(folder, dtype=dtype)
    assert loaded.dtype == {"auto": "bf16, f32", "f32": "bf16, f32", "f16": "bf16, f16"}[dtype]
    assert isinstance(loaded.decoder.layers[0].mlp.down.pieces[""], ScaledMatrix)  # type: ignore[attr-defined]
    assert not [line for line in caplog.messages if "multiplied as" in line]
    if dtype == "f32":
        wanted = eager_logits(decoded, TOKENS, CHUNKS)
        assert spread(recorded_logits(folder, TOKENS, CHUNKS, dtype="f32"), wanted) < 1e-2


def test_what_is_decoded_is_said(folders: Folders, caplog: pytest.LogCaptureFixture) -> None:
    load(folders("fp8 odd blocks")[0])
    lines = [line for line in caplog.messages if "decoded, which takes more memory" in line]
    assert len(lines) == 1, "a line for each reason"
    assert "14 quantised tensors" in lines[0]
    assert "a scale for 20 columns has no kernel" in lines[0]


@pytest.mark.parametrize(("name", "bits"), [("Q4_K", 4.625), ("IQ3_S", 4.375), ("IQ2_XXS", 3.375)])
def test_memory_of_gguf_types_is_that_of_their_layouts(name: str, bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_layout, "host_isa", lambda: Isa.AVX2)
    tensor = SimpleNamespace(
        name="weight",
        dtype=None,
        block_type=GGMLQuantizationType[name],
        shape=(32, 512),
        numel=32 * 512,
        stays_in_file=False,
    )
    tensor.decodes = lambda unit: unit < 0

    checkpoint: Any = SimpleNamespace(tensors={"weight": tensor})
    assert memory_of(Placement(CPU, "F32", WeightMemory()), checkpoint) == 32 * 512 * bits / 8


def test_memory_is_that_of_what_is_kept(folders: Folders) -> None:
    """Matrices take 16 bits where all are decoded, in torch."""
    for name in ("gptq", "fp8 blocks", "fp8 odd blocks", "nvfp4", "gptq act order"):
        config = EngineConfig(model=str(folders(name)[0]), block_size=BLOCK)
        opened = loading.open_model(model_files(config), CPU)
        tensors = opened.checkpoint.tensors.values()
        plain = sum(tensor.nbytes for tensor in tensors if tensor.dtype is not None)
        codes = [tensor for tensor in tensors if tensor.dtype is None]
        stored, wide = sum(tensor.nbytes for tensor in codes), 2 * sum(tensor.numel for tensor in codes)
        recorded = Placement(CPU, "F32", WeightMemory())
        assert memory_of(recorded, opened.checkpoint) == plain + (wide if "odd" in name else stored)
        assert memory_of(Placement(CPU, "BF16"), opened.checkpoint) == plain // 2 + wide
        device = Placement(CPU, "BF16", keeps_quantised=True)
        assert memory_of(device, opened.checkpoint) == plain // 2 + (wide if "blocks" in name else stored)
        opened.checkpoint.close()


class Fractions(WeightSource[GroupCodes]):
    """A scratch format that no kernel takes: bytes, less a zero of their row that is no integer."""

    decodes = True

    def pack_for(self, backend: Backend[Packed], tensor: QuantisedTensor) -> Packed:
        return backend.decoded(tensor, f"{tensor.type_name} has no kernel")

    def __init__(self, codes: StoredTensor, zeros: StoredTensor) -> None:
        self._codes, self._zeros = codes, zeros

    def read(self, first: int, last: int) -> GroupCodes:
        zeros = self._zeros.rows(first, last).load()
        return GroupCodes(self._codes.raw()[first:last], np.full_like(zeros, 2**-8), zeros, 8, "F32")


def fractions(config: Fields, stored: StoredTensors) -> Found:
    for parts in layers_with(stored, ".codes"):
        codes, zeros = parts.get(".codes", "U8"), parts.get(".zeros", "F32")
        yield parts, parts.tensor("FRACTIONS", codes.shape, Fractions(codes, zeros))


def test_a_format_without_a_kernel_is_one_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is decoded on every path, and planned for with the size of plain elements."""

    def written(weight: torch.Tensor) -> Written:
        zeros = 128 + torch.rand(len(weight), 1)
        codes = (256 * weight + zeros).round().clamp(0, 255).byte()
        return Written({".codes": codes, ".zeros": zeros}, (codes - zeros) / 256, {"quant_method": "fractions"})

    (tmp_path / "fractions.py").write_text(f"from {__name__} import fractions as layers\nMETHODS = ('fractions',)\n")
    monkeypatch.setattr(quantization, "__path__", [*quantization.__path__, str(tmp_path)])
    monkeypatch.setattr(quantised, "collected", quantised.collected.__wrapped__)
    monkeypatch.setitem(sys.modules, f"{quantization.__name__}.fractions", None)  # removed again after the test
    del sys.modules[f"{quantization.__name__}.fractions"]
    source = write_model(tmp_path / "plain", "llama", num_key_value_heads=4, intermediate_size=128)
    folder, decoded = quantise_model(source, tmp_path, written)
    wanted = eager_logits(decoded, TOKENS, CHUNKS)
    assert torch.equal(eager_logits(folder, TOKENS, CHUNKS), wanted)
    with caplog.at_level(logging.INFO):
        assert spread(recorded_logits(folder, TOKENS, CHUNKS), wanted) < 1e-2
    assert "14 quantised tensors" in caplog.text
    assert "FRACTIONS has no kernel" in caplog.text
    opened = loading.open_model(model_files(EngineConfig(model=str(folder), block_size=BLOCK)), CPU)
    with opened.checkpoint as checkpoint:
        tensors = checkpoint.tensors.values()
        least = sum(2 * tensor.numel for tensor in tensors if tensor.dtype is None)
        for placement in (Placement(CPU, "F32", WeightMemory()), Placement(CPU, "BF16", keeps_quantised=True)):
            assert memory_of(placement, checkpoint) > least
        part = next(tensor for tensor in tensors if tensor.dtype is None).columns(0, 8)
        assert part.decodes(1)
    assert error(device_logits(folder, monkeypatch), wanted) < 1e-5


def test_biases_of_zeros_need_no_place(folders: Folders, tmp_path: Path) -> None:
    """As AutoGPTQ once wrote them; any other bias is an unexpected tensor."""
    folder = copied(folders("gptq")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.mlp.up_proj.bias": torch.zeros(128)}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(eager_logits(folder, TOKENS, CHUNKS), eager_logits(folders("gptq")[1], TOKENS, CHUNKS))
    tensors["model.layers.0.mlp.up_proj.bias"][5] = 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected tensors \(1\): model\.layers\.0\.mlp\.up_proj\.bias"):
        load(folder)


def test_leftovers_of_a_layer_are_named(folders: Folders, tmp_path: Path) -> None:
    folder = copied(folders("gptq")[0], tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing tensors \(1\): .*up_proj\.weight; unexpected tensors \(3\): .*up_proj"
    ) as caught:
        load(folder)
    assert "up_proj.scales" in str(caught.value)


def test_another_shape_than_the_model_has_is_named(folders: Folders, tmp_path: Path) -> None:
    folder = copied(folders("gptq")[0], tmp_path)
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(WeightsError, match=r"gate_proj\.weight has shape \[128, 64\].*\[96, 64\]"):
        load(folder)


def test_quantised_weights_on_a_gpu_have_no_f32(folders: Folders) -> None:
    config = EngineConfig(model=str(folders("gptq")[0]), dtype="f32")
    opened = loading.open_model(model_files(config), CPU)
    with opened.checkpoint, pytest.raises(ConfigError, match="dtype f32 is not supported with quantised weights"):
        choose_placement(config, torch.device("cuda"), opened.checkpoint, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (
            {"quant_method": "bitsandbytes"},
            UnsupportedModelError,
            "'bitsandbytes', which is not implemented; implemented: auto-round, awq",
        ),
        ({"bits": 4}, UnsupportedModelError, "the method ''"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 32}, UnsupportedModelError, "bits 3 .*implemented: 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, InvalidFileError, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 10**30}, InvalidFileError, "group_size is 1000"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -2}, InvalidFileError, "group_size is -2"),
        ({"quant_method": "gptq", "bits": 4}, InvalidFileError, "group_size is missing"),
        ({"quant_method": "gptq", "group_size": 32}, InvalidFileError, "bits is missing"),
        ({"quant_method": "gptq", "bits": "4", "group_size": 32}, InvalidFileError, "bits is '4', not a int"),
        ({"quant_method": ["gptq"]}, InvalidFileError, "quant_method is"),
        (
            {"quant_method": "gptq", "bits": 8, "group_size": 32},
            InvalidFileError,
            r"scales has shape .* 8 bits and group_size 32",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 64},
            InvalidFileError,
            r"scales has shape .* and group_size 64",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "bitblas"},
            UnsupportedModelError,
            "bitblas",
        ),
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedModelError, "version is 'gemv'; implemented: gemm"),
        ({"quant_method": "awq", "q_group_size": 0}, InvalidFileError, "q_group_size is 0"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round"},
            UnsupportedModelError,
            "is 'auto_round'",
        ),
        ({"quant_method": "awq", "bits": 3}, UnsupportedModelError, "AWQ with bits 3"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            UnsupportedModelError,
            "format is 'marlin-24'; implemented: pack",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8"},
            UnsupportedModelError,
            "quant_algo is 'W4A8'; implemented: NVFP4, FP8",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, InvalidFileError, "weight_block_size is"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, InvalidFileError, "weight_block_size is"),
    ],
)
def test_a_config_that_cannot_be_read_names_file_and_key(
    settings: dict[str, Any], kind: type[Exception], message: str, folders: Folders
) -> None:
    folder, _ = folders("gptq")
    with open_safetensors(folder) as checkpoint, pytest.raises(kind, match=message) as caught:
        read_quantised(checkpoint, {"quantization_config": settings}, folder / "config.json")
    assert str(folder) in str(caught.value)


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """MXFP4 with the bytes of all experts in one tensor, against the plain weights that they mean."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    source = write_model(tmp_path / "plain", "gpt_oss", head_dim=16, sliding_window=16, **sizes)
    stored, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            written = mxfp4(tensor.transpose(1, 2).contiguous(), ct=False)
            stored |= {name + end: part.contiguous() for end, part in written.parts.items()}
            meant[name] = written.weight.transpose(1, 2).contiguous()
        else:
            stored[name] = meant[name] = tensor
    save_file(meant, source / "model.safetensors")
    wanted = eager_logits(source, TOKENS, CHUNKS)
    save_file(stored, source / "model.safetensors")
    config = config_of(source) | {
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    }
    (source / "config.json").write_text(json.dumps(config))
    assert torch.equal(eager_logits(source, TOKENS, CHUNKS), wanted)
    assert spread(recorded_logits(source, TOKENS, CHUNKS), wanted) < 2.5e-2


def test_a_layer_without_an_order_of_its_own_decodes(tmp_path: Path) -> None:
    """Experts and tables read their input as it lies."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    written = WRITERS["gptq act order"](weight)
    parts = {f"l{end}": part.contiguous() for end, part in written.parts.items()}
    save_file(parts, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as stored:
        checkpoint = read_quantised(stored, {"quantization_config": written.config}, tmp_path / "config.json")
        matrices: dict[str, Any] = {}
        recorded = Placement(CPU, "F32", WeightMemory())
        for name, ordered in (("plain", False), ("ordered", True)):
            part = MatrixParameter(matrices, name, (16, 64), partial(recorded.backend, groups=ordered))
            why = part.fill(checkpoint.tensors["l.weight"])
            assert (why is None) == ordered
            assert why is None or why.endswith("has exactly these values in the order of their inputs")
        device = Placement(CPU, "F32", keeps_quantised=True)
        for name, groups in (("decoded", False), ("groups", True)):
            part = MatrixParameter(matrices, name, (16, 64), partial(device.backend, groups=groups))
            why = part.fill(checkpoint.tensors["l.weight"])
            assert (why is None) == groups
    assert [type(matrix).__name__ for matrix in matrices.values()] == [
        "PlainMatrix",
        "PackedMatrix",
        "TensorMatrix",
        "CodeMatrix",
    ]
    assert torch.equal(matrices["decoded"].data, written.weight)
    assert torch.equal(torch.from_numpy(plain_reference.unpack(matrices["plain"])), written.weight.bfloat16().float())


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4"])
def test_experts_of_small_floats(name: str, tmp_path: Path) -> None:
    """Experts are multiplied as they are stored, and the router in fp32."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    plain = write_model(tmp_path / "plain", "qwen3_moe", **sizes)
    folder, decoded = quantise_model(plain, tmp_path, WRITERS[name])
    loaded = load(folder)
    for layer in loaded.decoder.layers:  # type: ignore[attr-defined]
        experts = layer.mlp.experts
        matrices = experts.gate_up.pieces | experts.down.pieces
        assert len(matrices) == 12
        assert all(isinstance(matrix, ScaledMatrix) for matrix in matrices.values())
        (router,) = layer.mlp.router.scores.pieces.values()
        assert router.kind is plain_linear.PlainKind.F32
    assert typical_spread(recorded_logits(folder, TOKENS, CHUNKS), eager_logits(decoded, TOKENS, CHUNKS)) < 1e-2
