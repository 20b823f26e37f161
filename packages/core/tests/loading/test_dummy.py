# SPDX-License-Identifier: MIT
"""Models of which only the config and the tokenizer are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidFileError,
    ModelLoadError,
    ModelNotFoundError,
    SamplingParams,
    UnsupportedModelError,
)
from candle_vllm.core.assembly.dummy import STD, open_dummy
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.models.any_configs import tiny_config
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_gguf import write_toy_gguf

CPU = torch.device("cpu")


def write(folder: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A model's folder without its weights."""
    write_toy_model(folder, toy_config(model_type, **overrides))
    (folder / "model.safetensors").unlink()
    return folder


def load(folder: Path, **settings: Any) -> LoadedModel:
    config = EngineConfig(model=str(folder), load_format="dummy", **settings)
    return load_model(config, CPU, lambda *_: None)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_those_of_a_real_checkpoint(model_type: str, tied: bool, tmp_path: Path) -> None:
    write_toy_model(tmp_path, toy_config(model_type, tie_word_embeddings=tied))
    with open_safetensors(tmp_path) as real, open_dummy(tmp_path / "config.json", CPU) as dummy:
        assert {name: (x.shape, x.type_name, x.nbytes) for name, x in dummy.tensors.items()} == {
            name: (x.shape, x.type_name, x.nbytes) for name, x in real.tensors.items()
        }


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_numbers(name: str, tmp_path: Path) -> None:
    config = toy_config("qwen2", hidden_size=256, vocab_size=2000, torch_dtype=None) | {name: "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_dummy(tmp_path / "config.json", CPU) as checkpoint:
        table = checkpoint.tensors["model.embed_tokens.weight"]
        values = table.load()
        assert values.dtype == np.float32
        assert values.std() == pytest.approx(STD, rel=0.01)
        assert abs(values.mean()) < 1e-4
        assert np.array_equal(values, table.load(None).astype(np.float32))  # the same every time
        assert table.raw().shape == (2000, 2 * 256)
        assert np.array_equal(table.raw().view(np.float16), table.load(None))
        head = checkpoint.tensors["lm_head.weight"].load()
        assert not np.array_equal(values, head)
        assert (checkpoint.tensors["model.norm.weight"].load() == 1).all()
        assert (checkpoint.tensors["model.layers.0.self_attn.q_proj.bias"].load() == 0).all()


def test_bf16_where_the_config_names_no_type(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, head_dim=64))
    assert loaded.dtype == "f32"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    assert loaded.dtype == "bf16"
    assert loaded.weight_bytes == 2 * loaded.num_parameters


@pytest.mark.parametrize("eager", [True, False])
def test_it_generates(eager: bool, tmp_path: Path) -> None:
    write(tmp_path, head_dim=64)  # a size that recorded steps have kernels for
    params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
    texts = []
    for _ in range(2):
        with InferenceEngine(str(tmp_path), load_format="dummy", op_by_op=eager, device="cpu") as engine:
            assert engine._loaded is not None
            assert engine._loaded.placement.recorded != eager
            output = engine.generate("Once upon a time", params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 5
        texts.append(output.outputs[0].token_ids)
    assert texts[0] == texts[1]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_weights_that_are_named_are_refused(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"load_format 'dummy'.*model\.gguf") as caught:
        load(path)
    assert caught.value.setting == "load_format"
    with pytest.raises(ConfigError, match=r"\*Q4_K\*"):
        load(write(tmp_path / "folder"), weight_file="*Q4_K*")


@pytest.mark.parametrize("name", ["llama", "mamba", "bloom"])
def test_weights_are_those_of_the_layers_that_run(name: str, tmp_path: Path) -> None:
    (write_tiny(tmp_path, name, **tiny_config(name)) / "model.safetensors").unlink()
    for impl in ("native", "transformers"):
        assert load(tmp_path, model_impl=impl).config.implementation.startswith(impl)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load(tmp_path)


def test_weights_that_are_there_are_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert load(tmp_path).num_parameters > 0


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_hidden_layers": None}, InvalidFileError, "num_hidden_layers"),
        ({"torch_dtype": "float8_e4m3fn"}, UnsupportedModelError, "torch_dtype.*float8_e4m3fn"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedModelError, "quantization_config"),
        ({"architectures": ["Nothing"]}, UnsupportedModelError, "Nothing"),
        ({"intermediate_size": 1 << 24, "hidden_size": 1 << 22}, ModelLoadError, r"GB and .* GB are free on cpu"),
    ],
    ids=["missing key", "dtype", "quantised", "architecture", "memory"],
)
def test_configs_that_cannot_be_filled(
    overrides: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(toy_config() | overrides))
    with pytest.raises(error, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_no_weights_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "a/b.json", "model.gguf"]
    monkeypatch.setattr("candle_vllm.core.loading.source._listing", lambda *_: names)
    asked: list[str] = []

    def download(model: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = model_files(EngineConfig(model="some/model", load_format="dummy"))
    assert asked == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert (files.name, files.format, files.weights) == ("some/model", "dummy", ())
