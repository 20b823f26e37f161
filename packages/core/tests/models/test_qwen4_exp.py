# SPDX-License-Identifier: MIT
"""Qwen4: every cut against transformers, n-grams and blocks of positions in the engine's cache, published configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidFileError,
    SamplingParams,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.assembly.opening import open_model
from candle_vllm.core.conversion import write
from candle_vllm.core.devices import CPU
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import eagle3, qwen4_exp
from candle_vllm.core.models.ngram_table import Parts
from candle_vllm.core.models.registry import family_from_gguf
from candle_vllm.core.models.towers import text_fields
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.rows import answers_twice, require_no_stages, require_other_logits, write_row
from packages.core.tests.models.test_sparse_index import changed
from packages.core.tests.models.tiny import (
    LENGTH,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    tiny_config,
)
from tests.common_run import few

NAMES = ["Qwen4", "Qwen4 plain"]
EOS = 7
TEXT: dict[str, Any] = {
    "model_type": "qwen4_exp_text", "eos_token_id": 248044, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2560, "num_hidden_layers": 48, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
    "num_attention_heads": 24, "num_key_value_heads": 2, "max_position_embeddings": 262144, "rms_norm_eps": 1e-06,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 48, "linear_value_head_dim": 128, "moe_intermediate_size": 640,
    "shared_expert_intermediate_size": 640, "num_experts": 512, "num_experts_per_tok": 10, "hc_count": 4,
    "hc_lowrank": 320, "ple_layer_ids": [2], "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ngram_size": 3,
    "heads_per_ngram": 8, "ngram_vocab_size_base": 20000000, "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 128, "output_gate_type": "sigmoid", "indexer_n_heads": 4, "indexer_kv_heads": 1,
    "indexer_head_dim": 128, "indexer_budget": 2048, "indexer_compress_ratio": 4, "vocab_size": 248320,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000000, "mrope_interleaved": True, "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
"""The sizes of Qwen3.8-Flash-Next."""
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen4ExpForConditionalGeneration"],
    "model_type": "qwen4_exp",
    "text_config": TEXT,
    "vision_config": {"model_type": "qwen4_exp_vision"},
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_row(tmp_path_factory.mktemp("model"), request.param)


def tokens_with_ends() -> list[int]:
    """A prompt of several texts: one ends with its first token, two have no token between them."""
    tokens = some_tokens()
    for place in (0, 20, 33, 34, 36, LENGTH - 1):
        tokens[place] = EOS
    return tokens


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("cut", few(range(1, LENGTH), 1, 2, 27, 28, 35, LENGTH - 1))
def test_every_cut_of_the_prompt(cut: int, folder: Path) -> None:
    """In front of, within and behind n-grams, ends of texts, and the first group that is not chosen; compiled, the same
    bits."""
    tokens = tokens_with_ends()
    ours, theirs = eager_logits(folder, tokens, [cut, LENGTH - cut]), their_logits(folder, tokens)
    assert spread(ours, theirs) < 1e-5
    whole = recorded_logits(folder, tokens, [LENGTH])
    assert spread(whole, theirs) < 1e-5  # caches are float32
    assert torch.equal(recorded_logits(folder, tokens, [cut, LENGTH - cut]), whole)


@pytest.mark.one_of_each(6)
@pytest.mark.parametrize(
    ("keys", "least"),
    [
        ({"indexer_budget": 64}, 1e-3),
        ({"indexer_budget": 16, "indexer_compress_ratio": 8}, 1e-3),
        ({"indexer_compress_ratio": 1}, 1e-3),
        ({"hc_count": 3}, 1e-2),
        ({"output_gate_type": "silu"}, 1e-3),
        ({"norm_topk_prob": False}, 1e-3),
        ({"ple_layer_ids": []}, 1e-2),
        ({"ple_layer_ids": [1]}, 1e-2),
        ({"ple_layer_ids": [2, 1]}, 1e-2),
        ({"ngram_size": 2}, 1e-2),
        ({"ngram_size": 5, "heads_per_ngram": 4}, 1e-2),
        ({"ple_conv_kernel_size": 2}, 1e-3),
        ({"ngram_vocab_size_base": 1000}, 1e-2),
        ({"seed": 1}, 1e-3),
        ({"eos_token_id": [9, 7]}, 1e-4),
        ({"rms_norm_eps": 1e-2}, 1e-4),
        ({"attention_bias": True}, 1e-3),
        ({"linear_conv_kernel_dim": 2}, 1e-3),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}, 1e-4),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "factor": 4.0,
                              "original_max_position_embeddings": 32, "mrope_section": [2, 1, 1]}}, 1e-4),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_change_the_logits(keys: dict[str, Any], least: float, tmp_path: Path) -> None:
    require_other_logits(NAMES[0], keys, least, tmp_path, tokens_with_ends(), [30, LENGTH - 30])


def test_layers_types_by_an_interval(tmp_path: Path) -> None:
    tokens = some_tokens(40)
    folder = write_row(tmp_path, NAMES[0], num_hidden_layers=4, layer_types=None)
    assert load(folder).config.delta_layers == {0, 1, 2}  # type: ignore[attr-defined]
    assert spread(eager_logits(folder, tokens, [40]), their_logits(folder, tokens)) < 1e-5


# ---- n-grams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [{}, {"ngram_size": 4, "heads_per_ngram": 1, "ple_embed_dim": 48, "seed": 99}])
def test_rows_are_those_of_transformers(keys: dict[str, Any]) -> None:
    config = tiny_config("qwen4_exp_text", **dict(ROWS[NAMES[0]].config) | {"ple_layer_ids": [1, 2]} | keys)
    ours = qwen4_exp.config_from_hf(fields_of(config.to_dict()), "qwen4_exp").ngrams
    assert ours is not None
    for number in range(2):
        theirs, found = Qwen4ExpTextNGramEmbedding(config, config.ple_embed_dim, number, number), ours.hashes[number]
        assert [*found.factors] == theirs.layer_multipliers.tolist()
        assert [*found.sizes] == theirs.head_vocab_sizes
        assert [*found.offsets] == theirs.head_offsets
        assert ours.rows[number] == len(theirs.ngram_embedding.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_of_other_types(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """bfloat16 is read from the file, float16 decoded: the numbers of a table in fp32."""
    weights, rounded = load_file(folder / "model.safetensors"), {}
    for name, weight in weights.items():
        rounded[name] = weight.to(dtype) if ".ngram_embedding." in name else weight
    made = changed(folder, tmp_path / "made")
    save_file(rounded, made / "model.safetensors")
    plain = changed(folder, tmp_path / "plain")
    save_file({name: rounded[name].to(weight.dtype) for name, weight in weights.items()}, plain / "model.safetensors")
    for logits in (eager_logits, recorded_logits):
        assert torch.equal(logits(made, some_tokens(20), [20]), logits(plain, some_tokens(20), [20]))


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("isq", [None, "q8_0", "q4k", "w8a8"])
def test_a_table_stays_in_its_file(isq: str | None, folder: Path) -> None:
    """In its own type, and without memory, whatever becomes of the matrices."""
    loaded = load(folder, isq=isq)
    table = next(layer.ngrams.table for layer in loaded.decoder.layers if layer.ngrams is not None)  # type: ignore[attr-defined]
    assert {part.type_name for part in table._parts} == {"F32"}
    assert sum(len(part) for part in table._arrays) == table.shape[0]
    assert not any(part.flags.owndata or part.flags.writeable for part in table._arrays)


@pytest.mark.parametrize("isq", [None, "q8_0"])
def test_a_table_is_written_part_by_part(isq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the same as from a whole table, which is not read."""
    config = EngineConfig(model=str(write_row(tmp_path / "model", NAMES[0])), isq=isq)
    monkeypatch.setattr(write, "_words", lambda *_: {})  # the tokenizer of the tests cannot be written
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "in_parts", lambda table: (table,))
        write.write_gguf(config, tmp_path / "whole.gguf")
    monkeypatch.setattr(Parts, "raw", lambda _: pytest.fail("the whole table is read"))
    write.write_gguf(config, tmp_path / "parts.gguf")
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize(
    "keys", [{"hidden_size": 72, "ple_embed_dim": 72, "heads_per_ngram": 1}, {"indexer_head_dim": 24}]
)
def test_sizes_without_kernels_run_op_by_op(keys: dict[str, Any], tmp_path: Path) -> None:
    tokens = some_tokens(40)
    made = write_row(tmp_path, NAMES[0], **keys)
    assert not load(made).placement.recorded
    assert spread(eager_logits(made, tokens, [40]), their_logits(made, tokens)) < 1e-5


def test_stored_hashes_must_be_those_of_the_config(folder: Path, tmp_path: Path) -> None:
    """Files may leave them out."""
    weights, tokens = load_file(folder / "model.safetensors"), some_tokens(20)
    (name, *_) = [name for name in weights if name.endswith("layer_multipliers")]
    made = changed(folder, tmp_path / "made")
    save_file(weights | {name: weights[name] + 2}, made / "model.safetensors")
    with pytest.raises(InvalidFileError, match="layer_multipliers has other numbers than the config's n-grams"):
        load(made)
    plain = {key: value for key, value in weights.items() if value.dtype is not torch.int64}
    save_file(plain, made / "model.safetensors")
    assert torch.equal(eager_logits(made, tokens, [20]), eager_logits(folder, tokens, [20]))


@pytest.mark.parametrize(("part", "message"), [(0, "missing tensors"), (2, "has shape")])
def test_a_part_of_a_table_that_is_missing(part: int, message: str, tmp_path: Path) -> None:
    made = write_row(tmp_path, NAMES[0])
    weights = load_file(made / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if f".shard_{part}." not in key}, made / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=message):
        load(made)


def test_parts_of_a_table_that_do_not_fit(tmp_path: Path) -> None:
    made = write_row(tmp_path, NAMES[0])
    weights = load_file(made / "model.safetensors")
    for name, weight in weights.items():
        if ".shard_1." in name:
            weights[name] = weight[:, :8].contiguous()
    save_file(weights, made / "model.safetensors")
    with pytest.raises(InvalidFileError, match="do not form a matrix"):
        load(made)


# ---- the cache, and the engine ---------------------------------------------------------------------------------------


def test_keys_and_states_have_caches_of_their_own(tmp_path: Path) -> None:
    config: Any = load(write_row(tmp_path, NAMES[0]), op_by_op=True).config
    plan = plan_cache(EngineConfig(model="m", block_size=16), config, lambda _: 2, 4, Room(1 << 30, 0.5))
    assert plan.block_bytes == 16 * 2 * (2 * 2 * 32 + 16 + 8)
    assert (config.index_top, config.index_pool, config.ngrams.span) == (27, 4, 10)
    assert [part.shape for part in config.cache_specs[4].parts] == [(9, 256), (2, 2)]


def test_what_is_around_a_sequence_changes_nothing(folder: Path) -> None:
    """Batches, chunks that end within an n-gram, prefixes, preemption, several answers, rejected drafts, ranks."""
    prompts = [[(7 * i + n) % 256 for i in range(3 + 33 * n)] for n in reversed(range(6))]
    greedy = {
        "temperature": 0.0,
        "max_tokens": 70,
        "ignore_eos": True,
        "logprobs": 1,
        "allowed_token_ids": [*range(6)],
    }
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2}

    def run(n: int = 2, **settings: Any) -> tuple[list[Any], Any]:
        return answers_twice(folder, prompts, SamplingParams(n=n, **greedy), **settings)

    alone, _ = run(enable_prefix_caching=False, max_num_seqs=1, speculative_config=None)
    few_blocks: dict[str, Any] = {
        "speculative_config": {"method": "none"},
        "kv_cache_memory": 950 << 10,
        "state_cache_gb": 4e-4,
        "max_model_len": 256,
    }
    small, stats = run(n=1, max_num_batched_tokens=45, max_num_seqs=4, **few_blocks)
    assert small == alone
    assert stats.preemptions > 0
    drafted, stats = run(speculative_config=ngram, max_num_batched_tokens=45, max_num_seqs=4, tensor_parallel_size=2)
    assert drafted == alone
    assert stats.accepted_draft_tokens > 0
    repeats = load(folder).config.tie_embeddings  # a model with one table repeats a token
    assert repeats or stats.accepted_draft_tokens < stats.draft_tokens
    assert stats.cached_prompt_tokens > 0


def test_a_block_has_whole_groups(folder: Path) -> None:
    with pytest.raises(ConfigError, match="block_size"):
        InferenceEngine(str(folder), block_size=8, device="cpu")


# ---- configs ---------------------------------------------------------------------------------------------------------


def fields_of(text: dict[str, Any]) -> Any:
    architecture, fields = text_fields(
        PUBLISHED["architectures"][0], PUBLISHED | {"text_config": text}, Path("config.json")
    )
    assert architecture == "Qwen4ExpForCausalLM"
    return fields


def read(**changes: Any) -> Any:
    return qwen4_exp.config_from_hf(fields_of(TEXT | changes), "qwen4_exp")


def test_a_published_description() -> None:
    config = read()
    assert [n for n in range(48) if n not in config.delta_layers] == [*range(3, 48, 4)]
    assert (config.index.heads, config.index.nope, config.index_top, config.index_pool) == (4, 128, 2051, 4)
    assert (config.rope.dim, config.rope.axes[:4], config.gate) == (64, (0, 1, 2, 0), "sigmoid")
    assert (config.mixture.experts, config.mixture.top_k, config.mixture.shared_gate) == (512, 10, True)
    assert (config.streams, config.mix_rank, config.sparse_layers) == (4, 320, frozenset(range(48)))
    ngrams = config.ngrams
    assert (ngrams.size, ngrams.longest, ngrams.taps, ngrams.rows) == (2560, 3, 4, {1: 128 * 2500012})
    assert (ngrams.hashes[1].sizes[0], ngrams.hashes[1].eos, len(ngrams.hashes[1].sizes)) == (20000003, 248044, 16)
    assert max(ngrams.hashes[1].factors) * 248319 < 1 << 63
    assert read(ple_layer_ids=None).ngrams is None
    assert read(decoder_sparse_step=2, mlp_only_layers=[0]).sparse_layers == frozenset(range(48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hc_count": 1}, "1 residual streams; 2 to 16"),
        ({"hc_count": 17}, "17 residual streams; 2 to 16"),
        ({"indexer_compress_ratio": 3}, "groups of 3 positions are not implemented"),
        ({"indexer_compress_ratio": 256}, "groups of 256 positions are not implemented"),
        ({"indexer_budget": 2050}, "2050 positions in groups of 4, is not possible"),
        ({"indexer_budget": None}, "indexer_budget is missing"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads other than 1"),
        ({"indexer_head_dim": 32}, "of 32 elements, .* 64 to 1024 elements"),
        ({"indexer_n_heads": 4096}, "an indexer of 4096 heads"),
        ({"output_gate_type": "tanh"}, "output_gate_type is 'tanh'; implemented: silu, sigmoid"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types must name"),
        ({"ple_layer_ids": [4]}, "ple_layer_ids is .4., not layers with delta nets"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids is .0., not layers with delta nets"),
        ({"ple_layer_ids": ["2"]}, "ple_layer_ids is"),
        ({"ple_embed_dim": 2561}, "ple_embed_dim 2561 cannot be divided into 16 heads"),
        ({"ngram_size": 1}, "cannot be divided into 0 heads"),
        ({"ngram_size": 6}, "4 taps .ple_conv_kernel_size., 6 tokens apart .ngram_size., is not implemented"),
        ({"ple_conv_kernel_size": 1}, "a convolution of 1 taps"),
        ({"heads_per_ngram": 1024, "ple_embed_dim": 2048}, "cannot be divided into 2048 heads"),
        ({"ngram_vocab_size_base": 1 << 29}, "ngram_vocab_size_base is 536870912; it must be 1 to"),
        ({"eos_token_id": None}, "eos_token_id that is a token, not .-1."),
        ({"eos_token_id": 248320}, "eos_token_id that is a token, not .248320."),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
        read(**changes)


def test_the_texts_own_end_begins_n_grams() -> None:
    _, fields = text_fields(PUBLISHED["architectures"][0], PUBLISHED | {"eos_token_id": 5}, Path("config.json"))
    config = qwen4_exp.config_from_hf(fields, "qwen4_exp")
    assert config.eos_token_ids == (5, 248044)
    assert config.ngrams is not None
    assert config.ngrams.hashes[1].eos == 248044


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.compress_ratios", [[4]] * 3, "groups of several sizes"),
        ("attention.compress_ratios", [0, 0, 0], "attention without an indexer"),
        ("ple.layers", [[1]], "not one layer with a delta net"),
        ("ple.layers", [True], "not one layer with a delta net"),
        ("ple.head_vocab_sizes", [0] * 4, "do not fit 4 heads"),
        ("ple.head_offsets", [1 << 40] * 4, "too few for its hashes"),
        ("ple.eos_token_id", 1 << 30, "eos_token_id that is a token"),
    ],
    ids=str,
)
def test_wrong_metadata_is_named(key: str, value: Any, message: str, tmp_path: Path) -> None:
    export_gguf(write_row(tmp_path / "m", NAMES[0]), tmp_path / "m.gguf", "qwen4exp")
    with open_model(model_files(EngineConfig(model=str(tmp_path / "m.gguf"))), CPU).checkpoint as checkpoint:
        metadata = dict(checkpoint.metadata) | {f"qwen4exp.{key}": value}
        with pytest.raises((UnsupportedModelError, InvalidFileError), match=message):
            family_from_gguf(metadata, checkpoint)


def test_stages_are_refused(tmp_path: Path) -> None:
    require_no_stages(tmp_path, NAMES[0], qwen4_exp.FAMILY)


def test_a_head_cannot_read_several_streams() -> None:
    with pytest.raises(UnsupportedModelError, match="EAGLE-3 head of a model with several residual streams"):
        eagle3._fitted({}, read())


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """They are not loaded, and drafts by them are refused by name."""
    tokens = some_tokens(20)
    folder = write_row(tmp_path / "m", NAMES[0])
    wanted = eager_logits(folder, tokens, [20])
    weights = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(8, 8)}
    save_file(weights, folder / "model.safetensors")
    said = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(said))
    assert error(eager_logits(folder, tokens, [20]), wanted) == 0
    with pytest.raises(UnsupportedModelError, match="are not implemented"):
        InferenceEngine(str(folder), speculative_config={"method": "mtp"}, device="cpu")
