# SPDX-License-Identifier: MIT
"""MiniMax M3: the choice of blocks for each key-value head, its caches, its config and the names of its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.kernels.latent_attention import reference
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import minimax_m3_index
from candle_vllm.core.models.minimax_m3_index import BlockIndex
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.engine.drafted import same_times
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import (
    LENGTH,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)
from tests.common_run import few

ROW, FIRST = ROWS["MiniMax-M3"], ROWS["MiniMax-M3 first"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), ROW.model_type, **ROW.config)


# ---- choice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", few(range(1, LENGTH), 16, 48, 63))
def test_every_cut_of_the_prompt(cut: int, folder: Path) -> None:
    """In front of, within and behind the first block that is not chosen; compiled, the same bits."""
    tokens, chunks = some_tokens(), [cut, LENGTH - cut]
    assert spread(eager_logits(folder, tokens, chunks), their_logits(folder, tokens)) < 1e-5
    assert torch.equal(recorded_logits(folder, tokens, chunks), recorded_logits(folder, tokens, [LENGTH]))


@pytest.mark.parametrize(
    "keys",
    [
        {"index_block_size": 16, "index_topk_blocks": 4},
        {"index_block_size": 16, "index_topk_blocks": 4, "index_local_blocks": 4},
        {"index_block_size": 16, "index_topk_blocks": 5, "index_local_blocks": 2, "index_head_dim": 48},
        {"index_block_size": 32, "index_topk_blocks": 1},
        {"index_block_size": 64, "index_topk_blocks": 2, "num_key_value_heads": 1, "index_n_heads": 1},
        {"num_attention_heads": 10, "num_key_value_heads": 5, "index_n_heads": 5, "index_topk_blocks": 3},
    ],
    ids=str,
)
def test_compiled_choices_are_those_of_torch(keys: dict[str, Any], tmp_path: Path) -> None:
    """In the first layer, whose input is the same in both; the logits are transformers'."""
    folder = write_tiny(tmp_path, FIRST.model_type, **dict(FIRST.config) | keys)
    tokens, record, choose = some_tokens(200), BlockIndex._record, minimax_m3_index.choose
    assert spread(eager_logits(folder, tokens, [200]), their_logits(folder, tokens)) < 1e-5
    made, found = list[Any](), list[Any]()

    def recorded(*arguments: Any) -> Any:
        made.append(record(*arguments))
        return made[-1]

    def chosen(*arguments: Any) -> Any:
        found.append(choose(*arguments))
        return found[-1]

    config: Any = load(folder, op_by_op=True).config
    blocks, heads = config.blocks, config.num_kv_heads
    with mock.patch.object(BlockIndex, "_record", recorded), mock.patch.object(minimax_m3_index, "choose", chosen):
        recorded_logits(folder, tokens, [200])
        eager_logits(folder, tokens, [200])
    (row, (tables, contexts)), chosen_blocks = made[-1], found[0]
    tables = tables.reshape(-1, heads, row.count)
    assert np.array_equal(contexts[:200], chosen_blocks._contexts)
    apart = 0  # tokens whose heads attend to different blocks
    for t, context in enumerate(chosen_blocks._contexts):
        count = -(-context // 16)
        assert context == t + 1 - max(0, t // blocks.size + 1 - blocks.top) * blocks.size
        assert np.array_equal(tables[t, :, :count], chosen_blocks._tables[t, :, :count].numpy())
        apart += len({tuple(of_head) for of_head in tables[t, :, :count].tolist()}) > 1
    assert (apart > 0) == (blocks.local < blocks.top and heads > 1)


def test_few_tokens_attend_to_all(tmp_path: Path) -> None:
    """With as many blocks as the text has, a choice changes nothing; with fewer it does."""
    tokens, logits = some_tokens(), list[torch.Tensor]()
    for n, top in enumerate((5, 32, 2)):
        folder = write_tiny(tmp_path / str(n), ROW.model_type, **dict(ROW.config) | {"index_topk_blocks": top})
        logits.append(eager_logits(folder, tokens, [LENGTH]))
    assert torch.equal(logits[0], logits[1])
    assert error(logits[2], logits[0]) > 1e-2


def test_scores_in_torch_fit_into_what_the_plan_counts(folder: Path) -> None:
    """With a longer context, fewer queries are scored at a time."""
    tokens, counts = some_tokens(), list[int]()

    def few_at_once(scores: int) -> int:
        counts.append(scores)
        return 7

    wanted = eager_logits(folder, tokens, [LENGTH])
    with mock.patch.object(reference, "queries_at_once", few_at_once):
        assert spread(eager_logits(folder, tokens, [LENGTH]), wanted) < 1e-5
    assert counts == [2 * LENGTH] * 2


# ---- caches ----------------------------------------------------------------------------------------------------------


def test_index_keys_are_float32_beside_any_cache(folder: Path) -> None:
    config: Any = load(folder, op_by_op=True).config
    plan = plan_cache(EngineConfig(model="m", block_size=16), config, lambda _: 1, 4, Room(1 << 30, 0.5))
    assert plan.block_bytes == 16 * (3 * 2 * 2 * 32 + 2 * 32 * 4)
    assert "2 x 3 layers x 2 heads x 32 x 1 B + 2 layers x 1 head x 32 x 4 B" in plan.message


@pytest.mark.parametrize("cache", ["auto", "q8_0", "q4_0"])
def test_what_is_around_a_sequence_changes_nothing(cache: str, folder: Path, tmp_path: Path) -> None:
    """Batches, chunks, prefixes, preemption, drafts that are rejected, blocks from a file."""
    prompts = [[(7 * i + n) % 256 for i in range(3 + 33 * n)] for n in reversed(range(6))]
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 50, "ignore_eos": True, "logprobs": 1}
    params = SamplingParams(**greedy, allowed_token_ids=[*range(6)])
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}

    def run(**settings: Any) -> tuple[list[Any], Any]:
        given: dict[str, Any] = {"threads": 2, "block_size": 16, "device": "cpu", "kv_cache_dtype": cache}
        with InferenceEngine(str(folder), max_model_len=256, **given, **settings) as engine:
            if (drafter := engine._engine and engine._engine._drafter) is not None:
                drafter.times = same_times  # type: ignore[method-assign]
            found = [
                [(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()]
                for _ in range(2)  # the second time with a warm cache
                for output in engine.generate(prompts, params, use_tqdm=False)
            ]
            assert found[:6] == found[6:]
            return found, engine.stats()

    alone, _ = run(enable_prefix_caching=False, max_num_seqs=1, speculative_config={"method": "none"})
    small, stats = run(
        max_num_batched_tokens=45,
        max_num_seqs=4,
        kv_cache_memory={"auto": 700, "q8_0": 420, "q4_0": 320}[cache] << 10,
        speculative_config={"method": "none"},
    )
    assert small == alone
    assert stats.preemptions > 0
    for _ in range(2):
        drafted, stats = run(
            speculative_config=ngram, max_num_batched_tokens=45, max_num_seqs=4, prompt_cache_path=tmp_path / "kept"
        )
        assert drafted == alone
        assert stats.accepted_draft_tokens > 0
        assert stats.accepted_draft_tokens < stats.draft_tokens
        assert stats.cached_prompt_tokens > 0


def test_a_quantised_cache_changes_little(folder: Path) -> None:
    tokens, found = some_tokens(200), list[Any]()
    for cache in ("auto", "q8_0"):
        with InferenceEngine(str(folder), block_size=16, threads=1, device="cpu", kv_cache_dtype=cache) as engine:
            (output,) = engine.generate([tokens], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
            found.append([each.chosen.logprob for each in output.prompt_logprobs or () if each is not None])
    assert 0 < float(np.median(np.abs(np.subtract(*found)))) < 0.05


def test_blocks_of_the_cache_divide_blocks_of_the_choice(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"blocks of 16 tokens, which block_size must divide: set block_size to 16"):
        load(folder, block_size=32)


# ---- configs and names -----------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "architectures": ["MiniMaxM3SparseForCausalLM"], "model_type": "minimax_m3_vl_text", "hidden_size": 6144,
    "intermediate_size": 3072, "dense_intermediate_size": 12288, "shared_intermediate_size": 3072,
    "n_shared_experts": 1, "num_hidden_layers": 60, "num_attention_heads": 64, "num_key_value_heads": 4,
    "head_dim": 128, "hidden_act": "swigluoai", "max_position_embeddings": 524288, "rms_norm_eps": 1e-6,
    "rope_theta": 5000000, "rotary_dim": 64, "partial_rotary_factor": 0.5, "vocab_size": 200064,
    "tie_word_embeddings": False, "num_local_experts": 128, "num_experts_per_tok": 4, "scoring_func": "sigmoid",
    "use_routing_bias": True, "use_qk_norm": True, "use_gemma_norm": True, "qk_norm_type": "per_head",
    "routed_scaling_factor": 2.0, "moe_layer_freq": [0] * 3 + [1] * 57, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
}  # fmt: skip
INDEX: dict[str, Any] = {
    "use_sparse_attention": True, "sparse_index_dim": 128, "sparse_num_index_heads": 4, "sparse_topk_blocks": 16,
    "sparse_block_size": 128, "sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1,
    "sparse_attention_freq": [0] * 3 + [1] * 57,
}  # fmt: skip


def read(index: dict[str, Any] | None = None, **changes: Any) -> Any:
    given = PUBLISHED | {"sparse_attention_config": INDEX | (index or {})} | changes
    return family_from_hf(given, Path("config.json"), impl="native")[1]


def test_a_published_description() -> None:
    config = read()
    assert config.index_layers == config.sparse_layers == frozenset(range(3, 60))
    assert (config.blocks, config.index.heads, config.index.nope) == ((128, 16, 1), 4, 128)
    assert (config.index_top, config.index_block, config.rope.dim) == (2048, 128, 64)
    assert (config.intermediate_size, config.mixture.inner_size, config.mixture.shared_size) == (12288, 3072, 3072)
    assert (config.mixture.experts, config.mixture.top_k, config.mixture.scale) == (128, 4, 2.0)
    assert set(config.mlp_gates) == {("swiglu_oai", "swiglu_oai")}
    assert read({"sparse_attention_freq": [0] * 60}).index is None
    assert read(moe_layer_freq=None).sparse_layers == frozenset(range(60))
    assert read(partial_rotary_factor=None, rotary_dim=32).rope.dim == 32
    assert read(partial_rotary_factor=None, rotary_dim=None).rope.dim == 64
    in_transformers = {"partial_rotary_factor": None, "rope_parameters": {"rope_theta": 5e6}}
    assert read(**in_transformers, rotary_dim=32).rope.dim == 128


@pytest.mark.parametrize(
    ("index", "changes", "message"),
    [
        ({}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({}, {"rotary_dim": 10**400}, "rotary_dim is 1000.*; it must be 1 to"),
        ({}, {"rotary_dim": 0}, "rotary_dim is 0; it must be 1 to"),
        ({}, {"swiglu_limit": 6.0}, "swiglu_limit is 6.0; implemented: 7.0"),
        ({}, {"swiglu_beta": 0.5}, "swiglu_beta is 0.5; implemented: 1.0"),
        ({}, {"use_gemma_norm": False}, "use_gemma_norm is False"),
        ({}, {"attention_output_gate": True}, "attention_output_gate is True"),
        ({}, {"qk_norm_type": "per_layer"}, "qk_norm_type is 'per_layer'"),
        ({}, {"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({}, {"moe_layer_freq": [1] * 59}, "59 flags does not cover the 60 layers"),
        ({"sparse_attention_freq": [1]}, {}, "1 flags does not cover the 60 layers"),
        ({"sparse_score_type": "mean"}, {}, "sparse_score_type is 'mean'"),
        ({"sparse_init_block": 1}, {}, "sparse_init_block is 1"),
        ({"sparse_num_index_heads": 8}, {}, "an index of 8 heads of 128 elements for 4 key-value heads"),
        ({"sparse_num_index_heads": 2048}, {"num_key_value_heads": 2048, "num_attention_heads": 2048}, "of 2048 heads"),
        ({"sparse_index_dim": 72}, {}, "an index of 4 heads of 72 elements"),
        ({"sparse_index_dim": 48}, {}, "an index of 4 heads of 48 elements"),
        ({"sparse_block_size": 96}, {}, "KeyBlocks.size=96"),
        ({"sparse_local_block": 17}, {}, "local=17"),
        ({"sparse_topk_blocks": 1 << 20}, {}, "top=1048576"),
        ({"sparse_local_block": 0}, {}, "sparse_local_block is 0; it must be 1"),
    ],
    ids=str,
)
def test_what_is_refused(index: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        read(index, **changes)


def test_names_of_published_files(folder: Path, tmp_path: Path) -> None:
    """Experts one by one, gate and up apart, and the index's parts beside those of attention."""
    stored, made = load_file(folder / "model.safetensors"), dict[str, torch.Tensor]()
    for name, data in stored.items():
        sparse = "layers.0." not in name
        if sparse:
            name = name.replace(".mlp.", ".block_sparse_moe.").replace("gate.e_score", "e_score")
        name = name.replace("self_attn.indexer.", "self_attn.index_")
        if ".experts." in name:
            names = ("w1", "w3") if "gate_up" in name else ("w2",)
            for expert, matrix in enumerate(data):
                parts = matrix.chunk(len(names))
                at = f"{name.rpartition('.')[0]}.{expert}."
                made |= {f"{at}{part}.weight": each.clone() for part, each in zip(names, parts, strict=True)}
        elif "gate_up_proj" in name:
            for part, half in zip(("gate_proj", "up_proj"), data.chunk(2), strict=True):
                made[name.replace("gate_up_proj", part)] = half.clone()
        else:
            made[name] = data
    assert "model.layers.1.self_attn.index_q_norm.weight" in made
    for each in folder.iterdir():
        if each.suffix != ".safetensors":
            (tmp_path / each.name).write_bytes(each.read_bytes())
    save_file(made, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = some_tokens()
    assert torch.equal(eager_logits(tmp_path, tokens, [LENGTH]), eager_logits(folder, tokens, [LENGTH]))
