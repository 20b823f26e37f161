# SPDX-License-Identifier: MIT
"""Gemma 4: the ways in which configs say what differs by layer, what is refused, and answers of an engine."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.loading.cache_specs import PagedSpec, SharedKVSpec
from candle_vllm.core.models.gemma4 import FAMILY, Gemma4
from candle_vllm.core.models.gemma4_config import Gemma4Config
from candle_vllm.core.models.gemma_parts import MappedTable
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS, cases
from packages.core.tests.models.gguf_export import CONVERTERS, export_gguf
from packages.core.tests.models.tiny import (
    cuts,
    eager_logits,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)
from tests.common_run import few

PATH = Path("config.json")
NAMES = [name for name in ROWS if name.startswith("Gemma-4")]
E2B: dict[str, Any] = {  # the shape of the smallest published model
    "architectures": ["Gemma4ForCausalLM"],
    "vocab_size": 262144,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}


def read(**changes: Any) -> Gemma4Config:
    config = family_from_hf(E2B | changes, PATH)[1]
    assert isinstance(config, Gemma4Config)
    return config


@pytest.mark.parametrize("name", cases(NAMES))
def test_logits_equal_transformers_closely(name: str, tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunks in cuts():
        assert spread(eager_logits(folder, tokens, chunks), theirs) < 1e-5, chunks


def test_caches_of_the_smallest_model() -> None:
    """Of 35 layers the last 20 keep nothing: they read layer 13 where they have a window, and layer 14 elsewhere."""
    specs = read().cache_specs
    window, full = PagedSpec(1, 256, 256, 512), PagedSpec(1, 512, 512)
    assert specs[:15] == ((window,) * 4 + (full,)) * 3
    assert specs[15:] == ((SharedKVSpec(13),) * 4 + (SharedKVSpec(14),)) * 4
    assert read().widths == (1,) * 15 + (2,) * 20


def test_sizes_of_full_layers_are_told_in_two_ways() -> None:
    """By keys of their own, as first published, and layer by layer, as transformers writes them now."""
    full = [n for n, kind in enumerate(E2B["layer_types"]) if kind == "full_attention"]
    wide = {"num_key_value_heads": 8, "attention_k_eq_v": True}
    older = read(**wide, global_head_dim=384, num_global_key_value_heads=2)
    for digits in (1, 2):  # "4" and "14", or, as transformers writes them, "04" and "14"
        sizes = {str(n).zfill(digits): {"head_dim": 384, "num_key_value_heads": 2} for n in full}
        assert read(**wide, per_layer_config=sizes) == older
    assert [older.shapes[n] for n in (0, full[0])] == [(8, 256), (2, 384)]
    assert older.keys_as_values == frozenset(full[:3]), "the others have neither keys nor values"
    apart = read(num_key_value_heads=8, global_head_dim=384, num_global_key_value_heads=2)
    assert {heads for heads, _ in apart.shapes} == {8}, "the number counts where keys are values"


def test_defaults_are_those_of_transformers() -> None:
    config = read(layer_types=None, num_kv_shared_layers=0, num_hidden_layers=7)
    assert [window is None for window in config.sliding_windows] == [False] * 5 + [True] * 2  # the last one is full
    assert (config.rope.kind, config.rope.theta, config.rope.rotated, config.rope.dim) == (
        "proportional",
        1e6,
        128,
        512,
    )
    assert (config.local_rope.kind, config.local_rope.theta, config.local_rope.dim) == ("default", 1e4, 256)
    assert (config.input_size, read(hidden_size_per_layer_input=None).input_size) == (256, 0)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"use_bidirectional_attention": "all"}, UnsupportedModelError, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, UnsupportedModelError, "hidden_activation is 'silu'"),
        ({"vocab_size_per_layer_input": 1000}, UnsupportedModelError, "vocab_size_per_layer_input"),
        ({"num_kv_shared_layers": 35}, InvalidFileError, "35 of 35 layers share keys"),
        ({"num_kv_shared_layers": 32}, InvalidFileError, "some have no layer to share with"),
        ({"num_kv_shared_layers": -1}, InvalidFileError, "-1 of 35 layers"),
        ({"num_key_value_heads": 3}, InvalidFileError, "8 heads cannot share 3 key-value heads"),
        ({"per_layer_config": {"4": {"head_dim": 0}}}, InvalidFileError, "head_dim is 0"),
        ({"per_layer_config": {"4": 5}}, InvalidFileError, "4 is 5, not a dict"),
        ({"hidden_size_per_layer_input": -1}, InvalidFileError, "per-layer embeddings have -1"),
        ({"final_logit_softcapping": 0.0}, InvalidFileError, "must be above 0"),
        ({"enable_moe_block": True}, InvalidFileError, "num_experts is missing"),
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read(**changes)


def test_keys_that_nothing_reads_may_be_stored(tmp_path: Path) -> None:
    """Published checkpoints have projections of keys and values in layers that read those of others."""
    row, tokens = ROWS["Gemma-4 shared keys"], some_tokens(12)
    folder = write_tiny(tmp_path, row.model_type, **row.config)
    wanted, tensors = eager_logits(folder, tokens, [12]), load_file(folder / "model.safetensors")
    own = {name: data for name, data in tensors.items() if ".layers.0.self_attn.k_" in name}
    unread = {name.replace("layers.0.", "layers.4."): data.clone() for name, data in own.items()}
    assert len(unread.keys() - tensors.keys()) == 2
    save_file(unread | tensors, folder / "model.safetensors", {"format": "pt"})
    assert eager_logits(folder, tokens, [12]).equal(wanted)


def test_stages_are_refused_where_the_first_has_what_others_need(tmp_path: Path) -> None:
    row = ROWS["Gemma-4 shared keys"]
    folder = write_tiny(tmp_path, row.model_type, **row.config | {"num_kv_shared_layers": 0})
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="their own embedding tables"):
        stage_of("model", FAMILY, load(folder).config, checkpoint, line)


@pytest.mark.parametrize("name", few(["Gemma-4 shared keys", "Gemma-4 experts"], "Gemma-4 shared keys"))
def test_neither_cache_nor_chunks_nor_a_folder_changes_an_answer(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model", ROWS[name].model_type, **ROWS[name].config)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    def answers(prompts: list[list[int]], **settings: Any) -> list[tuple[int, ...]]:
        with InferenceEngine(EngineConfig(model=str(source), block_size=16, **settings)) as engine:
            return [tuple(each.outputs[0].token_ids) for each in engine.generate(prompts, params)]

    prompts = [some_tokens(64), [*some_tokens(48), 7, 8, 9], some_tokens(64)]
    alone = [answers([prompt], enable_prefix_caching=False)[0] for prompt in prompts]
    for more in ({}, {"max_num_batched_tokens": 20, "max_num_seqs": 4}):
        assert answers(prompts, prompt_cache_path=tmp_path / "blocks", **more) == alone


@pytest.mark.parametrize("name", ["Gemma-4 shared keys", "Gemma-4"])
def test_rows_left_out_of_a_prompt_change_no_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_tiny(tmp_path, ROWS[name].model_type, **ROWS[name].config))
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)
    prompts, found, make = [some_tokens(64), some_tokens(9), some_tokens(40)[::-1]], [], Gemma4.__init__
    for narrows in (True, False):

        def init(self: Any, *given: Any, narrows: bool = narrows) -> None:
            make(self, *given)
            assert self.narrows, "no experts are in the way"
            self.narrows = narrows

        monkeypatch.setattr(Gemma4, "__init__", init)
        settings: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 50, "max_num_seqs": 4}
        with InferenceEngine(EngineConfig(model=source, **settings)) as engine:
            answers = [each.outputs[0] for each in engine.generate(prompts, params)]
        found.append([(each.token_ids, each.logprobs) for each in answers])
    assert found[0] == found[1]


def test_tokens_that_a_generation_config_suppresses_are_never_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers; a GGUF file says so in its metadata, as llama.cpp's converter writes it."""
    row, prompt = ROWS["Gemma-4"], some_tokens(20)
    source = write_tiny(tmp_path / "model", row.model_type, **row.config)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    def answer(path: Path) -> list[int]:
        with InferenceEngine(EngineConfig(model=str(path), block_size=16)) as engine:
            return list(engine.generate([prompt], params)[0].outputs[0].token_ids)

    banned = sorted({*answer(source)[:3]})
    said = {"suppress_tokens": [*banned, 100_000], "eos_token_id": None, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(said))
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.suppress_tokens = banned
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    assert answer(source) == wanted
    assert not {*wanted} & {*banned}
    convert = CONVERTERS["gemma4"]

    def adds(writer: Any, *given: Any) -> Any:
        writer.add_array("tokenizer.ggml.suppress_tokens", banned)
        return convert(writer, *given)

    monkeypatch.setitem(CONVERTERS, "gemma4", adds)  # type: ignore[arg-type]
    assert answer(export_gguf(source, tmp_path / "model.gguf", "gemma4")) == wanted


@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_each_drawn_token_has_its_own_embeddings(kind: str | None, tmp_path: Path) -> None:
    """Steps that go on are told no tokens: an answer is what logits of the whole text say."""
    row = ROWS["Gemma-4 shared keys"]
    source = write_tiny(tmp_path / "model", row.model_type, **row.config)
    if kind is not None:
        source = export_gguf(source, tmp_path / "model.gguf", str(row.gguf), quantization=kind)
    prompt, params = some_tokens(20), SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with InferenceEngine(EngineConfig(model=str(source), block_size=16)) as engine:
        (answer,) = engine.generate([prompt], params)
    found = list(answer.outputs[0].token_ids)
    text = [*prompt, *found]
    assert recorded_logits(source, text, [len(text)])[len(prompt) - 1 : -1].argmax(-1).tolist() == found


def test_the_table_of_embeddings_stays_in_its_file(tmp_path: Path) -> None:
    row = ROWS["Gemma-4 shared keys"]
    decoder: Any = load(write_tiny(tmp_path, row.model_type, **row.config), block_size=16).decoder
    table = decoder.inputs.table
    assert isinstance(table, MappedTable)
    mapped = table._stored.raw()
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    assert isinstance(mapped.base, (mmap.mmap, memoryview))
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens_per_layer.weight"]
    wanted = stored[[5, 0, 5]].float().numpy() * np.float32(row.config["hidden_size_per_layer_input"] ** 0.5)
    assert np.array_equal(table.rows(np.array([5, 0, 5])), wanted)
