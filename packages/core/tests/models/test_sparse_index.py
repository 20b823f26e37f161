# SPDX-License-Identifier: MIT
"""The index of DeepSeek V3.2 and GLM-5: every cut against transformers, few tokens, configs, and the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, InvalidFileError, SamplingParams
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import deepseek, sparse_index
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import (
    LENGTH,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    their_logits,
    write_tiny,
)
from tests.common_run import few

NAMES = ["DeepSeek-V3.2", "GLM-5"]
TOP = 24


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = ROWS[request.param]
    return write_tiny(tmp_path_factory.mktemp("model"), row.model_type, **row.config)


def changed(folder: Path, to: Path, *, without: str = "", **keys: Any) -> Path:
    """A copy with other keys in its config, without the tensors whose names have a part."""
    to.mkdir()
    weights = load_file(folder / "model.safetensors")
    save_file({k: x for k, x in weights.items() if not without or without not in k}, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | keys))
    (to / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    return to


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("cut", few(range(1, LENGTH), 1, TOP - 1, TOP, TOP + 1, LENGTH - 17, LENGTH - 1))
def test_every_cut_of_the_prompt(cut: int, folder: Path) -> None:
    tokens = some_tokens()
    theirs, ours = their_logits(folder, tokens), eager_logits(folder, tokens, [cut, LENGTH - cut])
    assert error(ours, theirs) < 1e-5
    assert error(ours[TOP:], eager_logits(changed_top(folder), tokens, [LENGTH])[TOP:]) > 1e-3, "the index is idle"
    assert torch.equal(recorded_logits(folder, tokens, [cut, LENGTH - cut]), recorded_logits(folder, tokens, [LENGTH]))


def changed_top(folder: Path) -> Path:
    """The same model that attends to every position."""
    to = folder.with_name(folder.name + "-all")
    return to if to.exists() else changed(folder, to, index_topk=LENGTH)


def test_few_tokens_are_plain_latent_attention(folder: Path, tmp_path: Path) -> None:
    """To the bit, and op by op too: the same weights without the index, as a DeepSeek-V3."""
    named = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    plain = changed(folder, tmp_path / "plain", without=".indexer.", **named, first_k_dense_replace=1)
    tokens = some_tokens()
    for logits in (eager_logits, recorded_logits):
        assert torch.equal(logits(folder, tokens[:TOP], [TOP]), logits(plain, tokens[:TOP], [TOP]))
        assert torch.equal(logits(changed_top(folder), tokens, [40, 30]), logits(plain, tokens, [40, 30]))
    assert not torch.equal(recorded_logits(folder, tokens, [LENGTH]), recorded_logits(plain, tokens, [LENGTH]))


# ---- the cache, and the engine ---------------------------------------------------------------------------------------


def test_index_keys_stand_beside_latent_rows(folder: Path) -> None:
    config: Any = load(folder, enforce_eager=True).config
    plan = plan_cache(EngineConfig(model=str(folder), block_size=16), config, lambda _: 2, 4, Room(1 << 30, 0.5))
    keys = 32 * len(config.index_layers)
    assert plan.block_bytes == 16 * 2 * (config.num_layers * (32 + 16) + keys)


def test_what_is_around_a_sequence_changes_nothing(folder: Path) -> None:
    """Batches, chunks, blocks found by their prefix, preemption, several answers to a prompt."""
    prompts = [[(7 * i + n) % 256 for i in range(3 + 11 * n)] for n in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=1, n=2)

    def run(**settings: Any) -> tuple[list[Any], int]:
        given: dict[str, Any] = {"threads": 2, "block_size": 16, "device": "cpu"} | settings
        with InferenceEngine(str(folder), **given) as engine:
            found = []
            for _ in range(2):  # the second time with a warm cache
                for output in engine.generate(prompts, params, use_tqdm=False):
                    answers = [
                        [(e.chosen.token_id, e.chosen.logprob) for e in answer.logprobs or ()]
                        for answer in output.outputs
                    ]
                    assert answers[0] == answers[1]
                    found.append(answers[0])
            assert found[:6] == found[6:]
            return found, engine.stats().preemptions

    config: Any = load(folder, enforce_eager=True).config
    block = 16 * 2 * (config.num_layers * 48 + 32 * len(config.index_layers))
    alone, _ = run(enable_prefix_caching=False, max_num_seqs=1)
    small, preemptions = run(kv_cache_memory=block * 9, max_model_len=96, max_num_batched_tokens=48, max_num_seqs=6)
    assert small == alone
    assert preemptions > 0


# ---- configs ---------------------------------------------------------------------------------------------------------

INDEX = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048, "q_lora_rank": 2048}


@pytest.mark.parametrize(
    ("keys", "full"),
    [
        ({}, range(10)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, (0, 1, 2, 6)),
        ({"index_topk_pattern": "FSFSSSSSSF"}, (0, 2, 9)),
        ({"indexer_types": ["full"] + ["shared"] * 10}, (0,)),  # one for the layer that predicts further tokens
    ],
)
def test_layers_with_an_index(keys: dict[str, Any], full: tuple[int, ...]) -> None:
    found = sparse_index.from_hf(Fields(INDEX | keys, Path("config.json")), "glm_moe_dsa", 10, 64)
    assert (found["index_layers"], found["index_top"]) == (frozenset(full), 2048)


@pytest.mark.parametrize(("context", "full"), [(202752, range(10)), (1 << 20, (0, 1, 2, 6))])
def test_gguf_files_that_do_not_name_the_layers(context: int, full: tuple[int, ...]) -> None:
    index = {"head_count": 32, "key_length": 128, "top_k": 2048}
    values = {f"glm-dsa.attention.indexer.{key}": value for key, value in index.items()}
    values |= {"glm-dsa.context_length": context, "glm-dsa.attention.q_lora_rank": 2048}
    found = sparse_index.from_gguf(Fields(values, Path("m.gguf"), "glm-dsa."), "glm-dsa", 10, 64)
    assert found["index_layers"] == frozenset(full)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    shared = ["shared", "full", "full"]
    with pytest.raises(InvalidFileError, match="the index of the layers is incomplete"):
        sparse_index.from_hf(Fields(INDEX | {"indexer_types": shared}, Path("config.json")), "glm_moe_dsa", 3, 64)
    turned = Fields(INDEX | {"indexer_rope_interleave": True}, Path("config.json"))
    with pytest.raises(UnsupportedModelError, match="indexer_rope_interleave other than False"):
        sparse_index.from_hf(turned, "deepseek_v32", 3, 64)
    with pytest.raises(UnsupportedModelError, match="an index without q_lora_rank"):
        load(changed(folder, tmp_path / "m", q_lora_rank=None))


def test_a_stage_cannot_read_what_another_chose(tmp_path: Path) -> None:
    config = load(write_tiny(tmp_path, "glm_moe_dsa", **ROWS["GLM-5"].config)).config
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="chosen positions of other layers"):
        stage_of("GLM", deepseek.FAMILY, config, checkpoint, line)
