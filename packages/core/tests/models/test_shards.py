# SPDX-License-Identifier: MIT
"""Models divided among ranks, here threads of one process, against the whole ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.collectives import token_shares
from candle_vllm.core.kernels.collectives.token_shares import TokenShares
from candle_vllm.core.kernels.lora.pack import pack_adapter
from candle_vllm.core.kernels.lora.reference import EagerAdapters
from candle_vllm.core.kernels.weight_quant.rows import quantise
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.adapters import read_adapter
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import FORMATS, ROWS, cases
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.peft_adapters import base_of, trained
from packages.core.tests.models.tiny import (
    BLOCK,
    LENGTH,
    eager_logits,
    error,
    room_of,
    some_tokens,
    step_logits,
    write_tiny,
)
from packages.core.tests.thread_ranks import ThreadRanks, in_threads


def adapted_logits(loaded: LoadedModel, source: Path, adapter: Path) -> torch.Tensor:
    """Logits with an adapter, of which a rank has its part."""
    joined = EagerAdapters()
    places = number_places(loaded.decoder, joined)
    with read_adapter(adapter) as stored:
        fitted = fit_adapter(stored, base_of(source))
        fitted = fitted if loaded.shard is None else loaded.shard.cut_adapter(fitted)
        packed = pack_adapter(fitted, places, "F32", compiled=False)
    runner = EagerRunner(loaded.decoder, 32, BLOCK, CPU, torch.float32, joined, room=room_of(loaded.decoder))
    return step_logits(runner, some_tokens(), [30, LENGTH - 30], ((packed, 0.7),))


def logits_of(source: Path, size: int, chunks: list[int], **settings: Any) -> list[torch.Tensor]:
    """Logits of each rank."""

    def work(ranks: ThreadRanks) -> torch.Tensor:
        config = EngineConfig(model=str(source), op_by_op=True, **{"block_size": BLOCK} | settings)
        loaded = load_model(config, CPU, lambda *_: None, ranks=ranks)
        room = room_of(loaded.decoder)
        runner = EagerRunner(loaded.decoder, 32, BLOCK, CPU, loaded.placement.torch_dtype, room=room)
        return step_logits(runner, some_tokens(), chunks)

    return in_threads(size, work)


WHOLE = ("OLMo", "MiniMax-M2", "DeepSeek-V4", "Qwen4")


@pytest.mark.one_of_each(8)
@pytest.mark.parametrize("name", cases(name for name in ROWS if not name.startswith(WHOLE) and name != "Gemma-3n"))
def test_ranks_give_the_logits_of_one(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **row.config)
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    for logits in logits_of(tmp_path, 2, [30, 1, LENGTH - 31]):
        assert error(logits, whole) < 1e-5


@pytest.mark.parametrize(
    ("name", "why"),
    [("OLMo Hybrid", "needs all heads, "), ("Gemma-3n", "needs all heads, "), ("DeepSeek-V4", "compressed entries")],
)
def test_means_of_what_ranks_divide_are_refused(name: str, why: str, tmp_path: Path) -> None:
    write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config)
    with pytest.raises(ConfigError, match=rf"{why}.*\. Set tensor_parallel_size to one of 1"):
        logits_of(tmp_path, 2, [LENGTH])


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
UNEVEN = {  # of three ranks
    "Qwen2-MoE": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    "GLM-4": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "gpt-oss": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "StableLM-2-12B": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
    "DeepSeek-V3": {"num_attention_heads": 6, "num_key_value_heads": 6},
    "LFM2-MoE": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
}


@pytest.mark.one_of_each(5)
@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", UNEVEN)
def test_more_ranks(name: str, size: int, tmp_path: Path) -> None:
    """Three ranks have a head of keys each; of four, two have the same one."""
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **{**row.config, **(UNEVEN[name] if size == 3 else {})})
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    parts = logits_of(tmp_path, size, [LENGTH])
    assert all(torch.equal(part, parts[0]) for part in parts)
    assert error(parts[0], whole) < 1e-5


def test_numbers_that_work_are_named(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="Set tensor_parallel_size to one of 1, 2, 3, 6, 12"):
        logits_of(tmp_path, 5, [LENGTH])


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("isq", ["q8_0", "q4k"])
def test_blocks_stay_whole(isq: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 256 among two ranks are two and one; what is quantised is what a rank has, and nothing else."""
    write_tiny(tmp_path, "llama", hidden_size=256, intermediate_size=768, head_dim=128, vocab_size=512)
    sizes = list[int]()

    def counted(raw: np.ndarray, *given: Any) -> np.ndarray:
        sizes.append(raw.nbytes)
        return quantise(raw, *given)

    monkeypatch.setattr("candle_vllm.core.assembly.isq.quantise", counted)
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH], isq=isq)
    of_all, sizes[:] = sum(sizes), []
    parts = logits_of(tmp_path, 2, [LENGTH], isq=isq)
    assert error(parts[1], whole) < 1e-5
    assert sum(sizes) == of_all


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "StableLM-2-12B"])
def test_rows_of_gguf_are_cut_in_their_order(name: str, tmp_path: Path) -> None:
    """Heads of q and k are stored in pairs of neighbours, experts as one tensor, and so are norms of heads."""
    row = ROWS[name]
    folder = write_tiny(tmp_path / "model", row.model_type, **row.config)
    path = export_gguf(folder, tmp_path / "model.gguf", str(row.gguf), quantization="Q8_0")
    whole = eager_logits(path, some_tokens(), [LENGTH])
    assert error(logits_of(path, 2, [LENGTH])[1], whole) < 1e-5


MIXTURES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GLM-4-MoE", "gpt-oss", "DeepSeek-V2", "DeepSeek-V3", "LFM2-MoE"]


OF_STATES = ("Qwen3.5-MoE", "Nemotron 3 latent experts", "Kimi Linear", "GLM-5.3-Flash", "Ling 3.0", "Inkling")
OFTEN = [("gpt-oss", 2), ("Qwen2-MoE", 3)]
CASES = [(name, size) for name in (*MIXTURES, *OF_STATES) for size in (2, 3) if size == 2 or name in UNEVEN]


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.every_case) for case in CASES]
)
def test_whole_experts_on_each_rank(name: str, size: int, tmp_path: Path) -> None:
    """Of three ranks some have an expert more than others; what is shared is cut as ever."""
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **{**row.config, **(UNEVEN[name] if size == 3 else {})})
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    parts = logits_of(tmp_path, size, [30, 1, LENGTH - 31], enable_expert_parallel=True, tensor_parallel_size=size)
    for logits in parts:
        assert error(logits, whole) < 1e-5


def test_tokens_are_not_divided_where_ranks_compute_layers_whole(tmp_path: Path) -> None:
    """What a delta net gives is no part of a sum."""
    write_tiny(tmp_path, "qwen3_5_moe_text", **ROWS["Qwen3.5-MoE"].config)
    settings: dict[str, Any] = {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"the layers of .* with a recurrent state need all tokens") as raised:
        logits_of(tmp_path, 2, [LENGTH], all2all_backend="all_to_all", **settings)
    assert raised.value.setting == "all2all_backend"


SENT = [("Mixtral", 4), ("DeepSeek-V3", 3), ("LFM2-MoE", 2)]
SENT_CASES = [(name, size) for name in MIXTURES for size in (2, 3, 4) if size != 3 or name in UNEVEN]


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(*case, marks=() if case in SENT else pytest.mark.every_case) for case in SENT_CASES]
)
def test_tokens_are_sent_to_the_ranks_of_their_experts(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps with fewer tokens than ranks every rank has all; what is shared is whole on each.

    Bits are those of steps that are not divided, whatever the chunks are.
    """
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **{**row.config, **(UNEVEN[name] if size == 3 else {})})
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    settings: dict[str, Any] = {"enable_expert_parallel": True, "tensor_parallel_size": size}
    settings |= {"all2all_backend": "all_to_all"}
    rows, begin = list[int](), TokenShares.begin
    add_up = TokenShares.sum

    def summed(self: TokenShares, y: Any) -> Any:
        found = add_up(self, y)
        rows.append(len(found))
        return found

    monkeypatch.setattr(TokenShares, "sum", summed)
    with exact_sums():
        parts = logits_of(tmp_path, size, [30, 1, 3, LENGTH - 34], **settings)
        assert {30 // size, 1, (LENGTH - 34) // size} <= set(rows)
        rows.clear()
        monkeypatch.setattr(TokenShares, "begin", lambda self, tokens, **_: begin(self, tokens, may_divide=False))
        right = logits_of(tmp_path, size, [LENGTH], **settings)
        assert set(rows) == {LENGTH}
    for logits in parts:
        assert error(logits, whole) < 1e-5
        assert torch.equal(logits, right[0])


@pytest.mark.parametrize(("name", "divides"), [("Mixtral", True), ("Qwen2-MoE", False)])
def test_tokens_are_sent_by_themselves_where_that_pays(
    name: str, divides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; not where what all tokens share would be whole on each rank for it."""
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **row.config)
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=4, enable_expert_parallel=True, op_by_op=True)

    def load(ranks: ThreadRanks) -> Any:
        return load_model(config, CPU, lambda *_: None, ranks=ranks).decoder

    assert [decoder.shares for decoder in in_threads(4, load)] == [None] * 4
    monkeypatch.setattr(loading, "_exchanges", lambda *_: "auto")
    monkeypatch.setattr(token_shares, "MOST_SHARE", 0.99)
    decoders = in_threads(4, load)
    assert [decoder.shares is not None for decoder in decoders] == [divides] * 4
    shared = {None if each.mlp.shared is None else each.mlp.shared.down.in_features for each in decoders[0].layers}
    assert shared == ({None} if divides else {row.config["shared_expert_intermediate_size"] // 4})


def test_where_bits_are_promised_on_a_gpu_no_step_is_divided() -> None:
    asked: dict[str, Any] = {"model": "m", "tensor_parallel_size": 2, "enable_expert_parallel": True}
    gpu = dataclasses.replace(SHAPES, device=torch.device("cuda"))
    fixed = dataclasses.replace(gpu, invariant=True)
    auto, always = EngineConfig(**asked), EngineConfig(**asked, all2all_backend="all_to_all")
    assert [loading._exchanges(auto, each) for each in (gpu, fixed)] == ["auto", "allgather_reducescatter"]
    assert loading._exchanges(always, gpu) == "all_to_all"
    with pytest.raises(ConfigError, match="leave 'deterministic' out") as raised:
        loading._exchanges(always, fixed)
    assert raised.value.setting == "all2all_backend"


@pytest.mark.parametrize("dtype", ["f32", pytest.param("bf16", marks=pytest.mark.every_case)])
def test_all_tokens_on_the_experts_of_one_rank(dtype: str, tmp_path: Path) -> None:
    """Seven experts of three ranks, of which the first two are always chosen: two ranks get nothing."""
    row = ROWS["Mixtral"]
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "num_local_experts": 7}
    write_tiny(tmp_path, row.model_type, **{**row.config, **heads})
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("gate.weight", "router.weight")) and tensor.shape[0] == 7:
            tensor.zero_()
    assert not all(tensor.any() for tensor in tensors.values())
    save_file(tensors, path, {"format": "pt"})
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    settings: dict[str, Any] = {"enable_expert_parallel": True, "tensor_parallel_size": 3, "dtype": dtype}
    for logits in logits_of(tmp_path, 3, [30, LENGTH - 30], all2all_backend="all_to_all", **settings):
        assert error(logits, whole) < (1e-5 if dtype == "f32" else 0.05)


def test_a_rank_reads_its_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven experts, of one block of 256 each, which cannot be cut."""
    row = ROWS["Mixtral"]
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "head_dim": 64,
        "num_local_experts": 7,
    }
    write_tiny(tmp_path, row.model_type, **{**row.config, **sizes})
    settings: dict[str, Any] = {"isq": "q4k", "tensor_parallel_size": 2}
    with pytest.raises(ConfigError, match="inner elements of experts can only be divided in units of 256"):
        logits_of(tmp_path, 2, [LENGTH], **settings)
    counts, loaded = list[int](), loading.load_weights

    def load(model: Any, *others: Any, **more: Any) -> None:
        counts.append(sum(len(layer.mlp.experts.down._places) for layer in model.layers))
        loaded(model, *others, **more)

    whole = eager_logits(tmp_path, some_tokens(), [LENGTH], isq="q4k")
    monkeypatch.setattr(loading, "load_weights", load)
    parts = logits_of(tmp_path, 2, [LENGTH], enable_expert_parallel=True, **settings)
    assert error(parts[1], whole) < 1e-5
    assert sorted(counts) == [6, 8]


def test_whole_experts_are_refused_where_there_are_none_or_few(tmp_path: Path) -> None:
    write_tiny(tmp_path / "dense", "llama")
    with pytest.raises(ConfigError, match="has no experts") as raised:
        logits_of(tmp_path / "dense", 2, [LENGTH], enable_expert_parallel=True, tensor_parallel_size=2)
    assert raised.value.setting == "enable_expert_parallel"
    row = ROWS["Mixtral"]
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    write_tiny(tmp_path / "few", row.model_type, **{**row.config, **sizes})
    with pytest.raises(ConfigError, match="its 2 experts can only be divided in units of 1"):
        logits_of(tmp_path / "few", 4, [LENGTH], enable_expert_parallel=True, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="set tensor_parallel_size"):
        EngineConfig(model="m", enable_expert_parallel=True)
    with pytest.raises(ConfigError, match="set enable_expert_parallel") as raised:
        EngineConfig(model="m", tensor_parallel_size=2, all2all_backend="all_to_all")
    assert raised.value.setting == "all2all_backend"


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_matrices_are_cut_as_a_gpu_holds_them(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64}
    write_tiny(tmp_path / "model", "llama", **size)
    stored, plain = write_format(tmp_path / "model", format, tmp_path)
    whole, usual = eager_logits(plain, some_tokens(), [LENGTH]), loading.choose_placement

    def placed(*arguments: Any) -> Any:
        return dataclasses.replace(usual(*arguments), keeps_quantised=True)

    monkeypatch.setattr(loading, "choose_placement", placed)
    assert error(logits_of(stored, 2, [LENGTH])[1], whole) < 1e-5


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama", {"target_modules": ["q_proj", "o_proj", "embed_tokens", "lm_head"]}),
        ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("Llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 100, 200]}),
        ("Qwen2", {"use_dora": True, "bias": "all"}),
        ("GLM-4", {}),
        (
            "Qwen3-MoE",
            {"target_modules": ["k_proj"], "target_parameters": [f"mlp.experts.{n}_proj" for n in ("gate_up", "down")]},
        ),
        ("DeepSeek-V2", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]}),
    ],
)
def test_adapters_are_cut_as_their_matrices_are(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    made = trained(tmp_path, name, **config)
    engine = EngineConfig(model=str(made.model), op_by_op=True)
    whole = adapted_logits(load_model(engine, CPU, lambda *_: None), made.model, made.adapter)
    plain = eager_logits(made.model, some_tokens(), [LENGTH])
    assert error(whole, plain) > 1e-3

    def part(ranks: ThreadRanks) -> torch.Tensor:
        return adapted_logits(load_model(engine, CPU, lambda *_: None, ranks=ranks), made.model, made.adapter)

    for logits in in_threads(2, part):
        assert error(logits, whole) < 1e-5


@pytest.mark.parametrize("exchanges", ["allgather_reducescatter", "all_to_all"])
def test_adapters_of_whole_experts(exchanges: str, tmp_path: Path) -> None:
    """Each rank has what is done to its own. Steps with adapters, which know tokens by their rows, are not divided."""
    parameters = [f"mlp.experts.{n}_proj" for n in ("gate_up", "down")]
    made = trained(tmp_path, "Qwen3-MoE", target_modules=["k_proj"], target_parameters=parameters)
    whole, part = (
        EngineConfig(model=str(made.model), op_by_op=True, **more)
        for more in ({}, {"tensor_parallel_size": 2, "enable_expert_parallel": True, "all2all_backend": exchanges})
    )
    right = adapted_logits(load_model(whole, CPU, lambda *_: None), made.model, made.adapter)

    def adapted(ranks: ThreadRanks) -> torch.Tensor:
        return adapted_logits(load_model(part, CPU, lambda *_: None, ranks=ranks), made.model, made.adapter)

    for logits in in_threads(2, adapted):
        assert error(logits, right) < 1e-5
