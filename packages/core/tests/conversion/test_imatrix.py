# SPDX-License-Identifier: MIT
"""Importance matrices that are measured here: beside transformers' inputs, read back, and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, UnsupportedModelError
from candle_vllm.core.conversion import write_gguf, write_imatrix
from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.loading.imatrix import read_imatrix
from candle_vllm.core.loading.weights import beside_gguf
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.peft_adapters import trained
from packages.core.tests.models.tiny import config_of, write_tiny

TEXT, WINDOW = "The quick brown fox jumps over the lazy dog, and the dog sleeps. " * 4, 50
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "linear_attn.out_proj": "ssm_out",
}  # fmt: skip


def tiny(folder: Path, row: str) -> Path:
    return write_tiny(folder / row, ROWS[row].model_type, **ROWS[row].config)


def tokens_of(words: Path) -> list[int]:
    return Tokenizer.from_file(str(words / "tokenizer.json")).encode(TEXT).ids


def config_of_model(model: Path, words: Path | None, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(model), tokenizer=words, **settings)


def written(model: Path, words: Path | None, out: Path, tokens: int | None = None) -> dict[str, np.ndarray]:
    """All tensors of the file, by name."""
    write_imatrix(config_of_model(model, words), TEXT, "fox.txt", out, WINDOW, tokens)
    return tensors(out)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


@torch.no_grad()
def inputs_in_transformers(folder: Path, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """Sums of squares [experts, columns] of the layers' inputs, by GGUF's names; their number with `.counts`."""
    options: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    found: dict[str, np.ndarray] = {}

    def add(name: str, x: torch.Tensor, expert: int = 0, experts: int = 1) -> None:
        sums = found.setdefault(f"{name}.weight", np.zeros((experts, x.shape[-1])))
        counts = found.setdefault(f"{name}.weight.counts", np.zeros((experts, 1)))
        sums[expert] += x.double().reshape(-1, x.shape[-1]).square().sum(0).numpy()
        counts[expert] += x.numel() // x.shape[-1]

    def of_experts(name: str, module: Any, x: torch.Tensor, chosen: torch.Tensor) -> None:
        x, experts = x.reshape(-1, x.shape[-1]), len(module.gate_up_proj)
        for expert in range(experts):
            own = x[(chosen == expert).any(-1)]
            gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, -1)
            for part, given in (("gate", own), ("up", own), ("down", torch.nn.functional.silu(gate) * up)):
                add(f"{name}.ffn_{part}_exps", given, expert, experts)

    for path, module in model.named_modules():
        if not path.startswith("model.layers."):
            continue
        _, _, number, rest = path.split(".", 3) if path.count(".") > 2 else (*path.split("."), "")
        if rest == "mlp.experts":
            module.register_forward_hook(
                lambda own, given, _, name=f"blk.{number}": of_experts(name, own, given[0], given[1])
            )
        elif rest in NAMES:
            module.register_forward_hook(lambda _, given, __, name=f"blk.{number}.{NAMES[rest]}": add(name, given[0]))
    for window in windows:
        model(torch.tensor([window]))
    return found


@pytest.mark.parametrize("row", ["Llama", "Qwen3-MoE"])
def test_sums_are_those_of_transformers_inputs(row: str, tmp_path: Path, words: Path) -> None:
    """Files may have fused matrices, too, which have their parts' entry."""
    folder, out = tiny(tmp_path, row), tmp_path / "imatrix.gguf"
    found, ids = written(folder, words, out, tokens=120), tokens_of(words)[:120]
    wanted = inputs_in_transformers(folder, [ids[:50], ids[50:100], ids[100:]])
    for name in list(wanted):
        for part, whole in (("attn_q.", "attn_qkv."), ("ffn_gate_exps.", "ffn_gate_up_exps.")):
            if part in name:
                wanted[name.replace(part, whole)] = wanted[name]
    sums = {name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")}
    assert sums == {name for name in wanted if name.endswith(".weight")}
    for name, values in wanted.items():
        if name.endswith(".counts"):
            np.testing.assert_array_equal(found[name], values)
        else:
            np.testing.assert_allclose(found[f"{name}.in_sum2"], values, rtol=2e-4, err_msg=name)
    fields = gguf.GGUFReader(out).fields
    shown = {name: fields[name].contents() for name in fields if name.startswith(("imatrix.", "general.type"))}
    assert shown == {
        "general.type": "imatrix", "imatrix.datasets": ["fox.txt"], "imatrix.chunk_count": 3, "imatrix.chunk_size": 50,
    }  # fmt: skip


def test_a_quantised_file_is_made_by_it(tmp_path: Path, words: Path) -> None:
    """From a folder and from its GGUF file, whose entries are the same."""
    folder, plain = tiny(tmp_path, "Llama"), tmp_path / "plain.gguf"
    write_gguf(config_of_model(folder, words), plain)
    for number, (model, own) in enumerate(((folder, words), (plain, None))):
        out = tmp_path / f"imatrix{number}.gguf"
        found = written(model, own, out)
        entries = read_imatrix(out).entries
        np.testing.assert_array_equal(entries["blk.1.ffn_up.weight"], found["blk.1.ffn_up.weight.in_sum2"].reshape(-1))
    first, second = (tensors(tmp_path / f"imatrix{number}.gguf") for number in range(2))
    assert first.keys() == second.keys()
    assert all(np.allclose(first[name], second[name], rtol=1e-4) for name in first)
    made = []
    for name, more in (("with", {"imatrix": tmp_path / "imatrix0.gguf"}), ("without", {})):
        write_gguf(config_of_model(folder, words, isq="iq4_nl", **more), tmp_path / f"{name}.gguf")
        made.append(tensors(tmp_path / f"{name}.gguf"))
    changed = {name for name in made[0] if not np.array_equal(made[0][name], made[1][name])}
    assert changed == {name for name in made[0] if name.startswith("blk.") and "norm" not in name}


def test_a_merged_model_is_quantised_by_it(tmp_path: Path, words: Path) -> None:
    made, matrix = trained(tmp_path, "Llama"), tmp_path / "imatrix.gguf"
    written(made.model, words, matrix)
    found = []
    for number, more in enumerate(({"imatrix": matrix}, {})):
        config, out = config_of_model(made.model, words, isq="iq4_nl", **more), tmp_path / f"{number}.gguf"
        write_gguf(config, out, adapters=[(made.adapter, 1.0)])
        found.append(tensors(out)["blk.1.ffn_up.weight"])
    assert not np.array_equal(*found)


def test_columns_in_the_order_of_the_file(tmp_path: Path, words: Path) -> None:
    """Files of Qwen3.5 have the columns of a delta net's output in another order than the folder; `--isq` knows it."""
    folder, plain = tiny(tmp_path, "Qwen3.5"), tmp_path / "plain.gguf"
    write_gguf(config_of_model(folder, words), plain)
    found, file = written(folder, words, tmp_path / "imatrix.gguf", tokens=WINDOW), tensors(plain)
    sums = inputs_in_transformers(folder, [tokens_of(words)[:WINDOW]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = next(name for name in sums if "ssm_out" in name and name.endswith("weight"))
    number = int(name.split(".")[1])
    stored = model.model.layers[number].linear_attn.out_proj.weight.detach().numpy()
    order = [int(np.abs(stored - column[:, None]).sum(0).argmin()) for column in file[name].T]
    assert sorted(order) == list(range(len(order))) != order
    np.testing.assert_allclose(found[f"{name}.in_sum2"][0], sums[name][0][order], rtol=2e-4)
    family, config = family_from_hf(config_of(folder), folder / "config.json")
    line = next(line for _, line in beside_gguf(family.weights, config) if line.names and line.first == name)
    own = read_imatrix(tmp_path / "imatrix.gguf").of_line(line, len(order), config)
    np.testing.assert_allclose(own, sums[name] / sums[name].mean(), rtol=2e-4)


def test_a_file_that_is_no_importance_matrix_is_named_alone(tmp_path: Path, words: Path) -> None:
    """Not with the model's file, as if that were damaged."""
    (matrix := tmp_path / "text.txt").write_text(TEXT)
    config = config_of_model(tiny(tmp_path, "Llama"), words, isq="q4k", imatrix=matrix)
    with pytest.raises(InvalidFileError) as caught:
        write_gguf(config, tmp_path / "out.gguf")
    assert str(caught.value).startswith(f"{matrix} is no importance matrix")
    with pytest.raises(InvalidFileError) as caught:
        InferenceEngine(config)
    assert str(caught.value).startswith(f"{matrix} is no importance matrix")


def test_layers_of_transformers_are_refused_by_name(tmp_path: Path, words: Path) -> None:
    folder = write_tiny(tmp_path / "model", "helium", head_dim=16)
    with pytest.raises(UnsupportedModelError, match="layers of transformers, whose matrices have no GGUF names"):
        written(folder, words, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_it_is_refused_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="the inputs of layers are measured, so layers run op by op in torch, which"):
        write_imatrix(EngineConfig(model=str(tmp_path)), TEXT, "fox.txt", tmp_path / "x.gguf")
