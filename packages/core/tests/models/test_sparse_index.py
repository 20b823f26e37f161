# SPDX-License-Identifier: MIT
"""The index of DeepSeek V3.2 and GLM-5: every cut against transformers, few tokens, configs, and the engine."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.axk2.modeling_axk2 import AXK2TopkRouter

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidFileError,
    LoRARequest,
    SamplingParams,
    memory,
)
from candle_vllm.core.assembly.stages import stage_of
from candle_vllm.core.engine import build
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner, StepLimits
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.latent_attention import reference
from candle_vllm.core.memory import Room, plan_cache
from candle_vllm.core.models import deepseek, sparse_index
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.peft_adapters import trained
from packages.core.tests.models.rows import answers_twice
from packages.core.tests.models.tiny import (
    BLOCK,
    LENGTH,
    eager_logits,
    eager_runner,
    error,
    load,
    recorded_logits,
    some_tokens,
    step_logits,
    their_logits,
    tiny_config,
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


def changed_top(folder: Path, top: int = LENGTH) -> Path:
    """The same model that attends to every position."""
    to = folder.with_name(f"{folder.name}-{top}")
    return to if to.exists() else changed(folder, to, index_topk=top)


def test_few_tokens_are_plain_latent_attention(folder: Path, tmp_path: Path) -> None:
    """To the bit, and op by op too: the same weights without the index, as a DeepSeek-V3."""
    named = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    plain = changed(folder, tmp_path / "plain", without=".indexer.", **named, first_k_dense_replace=1)
    tokens = some_tokens()
    for logits in (eager_logits, recorded_logits):
        assert torch.equal(logits(folder, tokens[:TOP], [TOP]), logits(plain, tokens[:TOP], [TOP]))
        assert torch.equal(logits(changed_top(folder), tokens, [40, 30]), logits(plain, tokens, [40, 30]))
    assert not torch.equal(recorded_logits(folder, tokens, [LENGTH]), recorded_logits(plain, tokens, [LENGTH]))


def test_norms_of_a_x_k2_have_gates() -> None:
    config = tiny_config("axk2", **ROWS["A.X K2"].config).to_dict() | {"architectures": ["AXK2ForCausalLM"]}
    found: Any = family_from_hf(config, Path("config.json"))[1]
    assert (found.gate_rank, found.mixture.groups, found.index_layers) == (8, 1, {0, 1})
    for keys, said in (
        ({"gated_norm": False}, "gated_norm is False"),
        ({"rope_interleave": False}, "rope_interleave is False"),
        ({"gated_norm_rank": 1 << 13}, "gated_norm_rank is 8192; it must be at most 4096"),
        ({"q_lora_rank": None}, "an indexer without q_lora_rank"),
    ):
        with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
            family_from_hf(config | keys, Path("config.json"))


def test_a_x_k2_never_leaves_the_chosen_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' class does where a correction makes the scores of a chosen group negative: there 0 is larger."""
    folder, tokens = write_tiny(tmp_path, "axk2", **ROWS["A.X K2 groups"].config), some_tokens(LENGTH)
    stored = load_file(folder / "model.safetensors")
    lower = {name: each - 1 for name, each in stored.items() if name.endswith("correction_bias")}
    save_file(stored | lower, folder / "model.safetensors", {"format": "pt"})
    ours = eager_logits(folder, tokens, [LENGTH])
    assert error(ours, their_logits(folder, tokens)) > 0.1
    monkeypatch.setattr(AXK2TopkRouter, "apply_group_scoring", within_groups)
    assert error(ours, their_logits(folder, tokens)) < 1e-5


def within_groups(router: Any, scores: torch.Tensor) -> torch.Tensor:
    """As the router of DeepSeek-V3.2: experts outside the chosen groups have minus infinity in place of 0."""
    by_group = scores.view(len(scores), router.num_group, -1)
    chosen = by_group.topk(2)[0].sum(-1).topk(router.topk_group)[1]
    outside = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, chosen, False)
    return by_group.masked_fill(outside[..., None], float("-inf")).flatten(1)


# ---- the cache, and the engine ---------------------------------------------------------------------------------------


def test_index_keys_stand_beside_latent_rows(folder: Path) -> None:
    config: Any = load(folder, op_by_op=True).config
    plan = plan_cache(EngineConfig(model=str(folder), block_size=16), config, lambda _: 2, 4, Room(1 << 30, 0.5))
    keys = 32 * len(config.index_layers)
    assert plan.block_bytes == 16 * 2 * (config.num_layers * (32 + 16) + keys)


def test_what_is_around_a_sequence_changes_nothing(folder: Path) -> None:
    """Batches, chunks, blocks found by their prefix, preemption, several answers to a prompt."""
    prompts = [[(7 * i + n) % 256 for i in range(3 + 11 * n)] for n in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, logprobs=1, n=2)

    config: Any = load(folder, op_by_op=True).config
    block = 16 * 2 * (config.num_layers * 48 + 32 * len(config.index_layers))
    alone, _ = answers_twice(folder, prompts, params, enable_prefix_caching=False, max_num_seqs=1)
    few_blocks = {"kv_cache_memory": block * 9, "max_model_len": 96, "max_num_batched_tokens": 48, "max_num_seqs": 6}
    small, stats = answers_twice(folder, prompts, params, **few_blocks)
    assert small == alone
    assert stats.preemptions > 0


both = pytest.mark.parametrize("eager", [False, True], ids=["recorded", "eager"])
with_shared_choices = pytest.mark.parametrize("folder", few(NAMES, "GLM-5"), indirect=True)

# ---- memory ----------------------------------------------------------------------------------------------------------


@both
@with_shared_choices
def test_the_plan_counts_what_a_choice_takes(eager: bool, folder: Path) -> None:
    """Also the status; with as many positions as the context has, there is no choice."""
    settings: dict[str, Any] = {"block_size": 16, "threads": 2, "max_num_batched_tokens": 64, "op_by_op": eager}
    free = 16 << 20 if eager else 1 << 20

    def planned(source: Path) -> memory.CachePlan:
        model = load(source, **settings)
        with mock.patch.object(memory, "tightest_limit", return_value=memory.Limit(free, "this machine")):
            return build._plan_on_cpu(EngineConfig(model=str(source), **settings), model, 64, 0.5)

    def bounded(plan: memory.CachePlan) -> None:
        budget = (free - plan.index_bytes) // 2
        assert budget - plan.block_bytes < plan.num_bytes <= budget

    plan, heads, context = planned(folder), 16, 512
    scores = 2 * 4 * 64 * heads * context if eager else 16 * 4 * context  # of 64 queries in torch, else of 16 tokens
    positions = (8 if eager else 4) * 64 * TOP
    assert scores + positions <= plan.index_bytes < scores + positions + (1 << 18)
    assert "for the indexer" in plan.message
    bounded(plan)
    everything = changed_top(folder, 512)
    assert planned(everything).index_bytes == 0
    bounded(planned(everything))
    with InferenceEngine(str(folder), **settings) as engine:
        assert engine.model_info.index_bytes == plan.index_bytes


@with_shared_choices
def test_the_memory_of_a_choice_is_free_after_the_step(folder: Path) -> None:
    """In torch as soon as a later layer chooses; in a recorded step one array serves all layers and all plans."""
    found, chosen, choose = list[weakref.ref[Any]](), 0, reference.choose

    def watched(*arguments: Any) -> Any:
        nonlocal chosen
        assert not [ref for ref in found if ref() is not None], "the last choice still takes memory"
        positions = choose(*arguments)
        found.append(weakref.ref(positions))
        chosen += 1
        return positions

    tokens, loaded = some_tokens(), load(folder, op_by_op=True)
    runner, config = eager_runner(loaded, -(-LENGTH // BLOCK)), cast(Any, loaded.decoder.config)
    with mock.patch.object(reference, "choose", watched):
        step_logits(runner, tokens, [LENGTH])
    assert chosen == len(config.index_layers)
    assert not [ref for ref in found if ref() is not None]
    loaded = load(folder, block_size=BLOCK)
    limits = StepLimits(tokens=80, sequences=4, logit_rows=64, table_width=8, block_size=BLOCK, threads=1)
    recorded = RecordedRunner(loaded.decoder, 8, limits)
    try:
        logits = step_logits(recorded, tokens, [LENGTH])
        positions = [x for x in recorded._recorder.allocated if (x.dtype, x.size) == (np.int32, 80 * TOP)]
        assert len(positions) == 1
        if sys.platform == "linux":
            whole = [x for x in recorded._recorder.allocated if x.nbytes >= 8192 and x.any()]
            recorded.drop_cache()
            assert whole
            assert not [x for x in whole if x.view(np.uint8)[4096:-4096].any()], "their pages stay"
        assert torch.equal(step_logits(recorded, tokens, [LENGTH]), logits)
    finally:
        recorded.close()


# ---- tiers, sleep, adapters ------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"threads": 1, "block_size": 16, "kv_cache_memory": 4 << 20}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
OF_INDEX = ["wq_b", "wk", "weights_proj"]


def answers(engine: InferenceEngine, adapter: Path | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and logprobs of two prompts that are longer than a choice."""
    prompts = [some_tokens(), [9, *some_tokens(50)]]
    lora = None if adapter is None else LoRARequest("one", lora_path=str(adapter))
    found = [each.outputs[0] for each in engine.generate(prompts, GREEDY, lora_request=lora, use_tqdm=False)]
    tokens = [list(each.token_ids) for each in found]
    return tokens, [[entry.chosen.logprob for entry in each.logprobs or ()] for each in found]


@both
@with_shared_choices
def test_blocks_on_disk_have_index_keys(eager: bool, folder: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "op_by_op": eager}
    with InferenceEngine(folder, **settings) as engine:
        right = answers(engine)
    for read in (0, 4 + 3):
        with InferenceEngine(folder, prompt_cache_path=tmp_path / "blocks", **settings) as engine:
            tokens, logprobs = answers(engine)
            assert engine.stats().kept_blocks_read == read
        assert tokens == right[0]  # in torch, sums depend on where a prompt begins
        assert np.allclose(logprobs, right[1], rtol=0, atol=1e-4) if eager else logprobs == right[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine on the CPU does not sleep")
@both
@with_shared_choices
def test_answers_are_the_same_after_sleep(eager: bool, folder: Path) -> None:
    with InferenceEngine(folder, op_by_op=eager, **SETTINGS) as engine:
        right = answers(engine)
        for level in (1, 2):
            engine.sleep(level)
            engine.wake_up()
            assert answers(engine) == right


@both
def test_adapters_of_an_index(eager: bool, tmp_path: Path) -> None:
    """As PEFT merges them; they change what is chosen alone, and nothing where every position is."""
    made = trained(tmp_path, "GLM-5", target_modules=OF_INDEX)
    merged = tmp_path / "merged"
    made.peft.merge_and_unload().save_pretrained(merged)
    (merged / "tokenizer.json").write_bytes((made.model / "tokenizer.json").read_bytes())
    settings = {**SETTINGS, "op_by_op": eager}

    def run(model: Path, adapter: Path | None = None) -> tuple[list[list[int]], list[list[float]]]:
        with InferenceEngine(model, enable_lora=True, **settings) as engine:
            return answers(engine, adapter)

    (tokens, logprobs), (wanted, likely) = run(made.model, made.adapter), run(merged)
    assert tokens == wanted
    assert np.allclose(logprobs, likely, rtol=0, atol=1e-4 if eager else 2e-2)
    plain = run(made.model)
    assert not np.allclose(logprobs, plain[1], rtol=0, atol=0.1)
    everything = changed(made.model, tmp_path / "everything", index_topk=LENGTH + 20)
    (tokens, logprobs), (wanted, likely) = run(everything, made.adapter), run(everything)
    assert tokens == wanted  # in torch, sums depend on which prompts share a step
    assert np.allclose(logprobs, likely, rtol=0, atol=1e-4) if eager else logprobs == likely


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
    with pytest.raises(InvalidFileError, match="layer 0 has no indexer, indexer types"):
        sparse_index.from_hf(Fields(INDEX | {"indexer_types": shared}, Path("config.json")), "glm_moe_dsa", 3, 64)
    for key, kinds in (("index_topk_pattern", 5), ("index_topk_pattern", "FXS"), ("indexer_types", [["full"]] * 3)):
        with pytest.raises(InvalidFileError, match=f"{key} is .*, not full or shared for each layer"):
            sparse_index.from_hf(Fields(INDEX | {key: kinds}, Path("config.json")), "glm_moe_dsa", 3, 64)
    turned = Fields(INDEX | {"indexer_rope_interleave": True}, Path("config.json"))
    with pytest.raises(UnsupportedModelError, match="indexer_rope_interleave other than False"):
        sparse_index.from_hf(turned, "deepseek_v32", 3, 64)
    with pytest.raises(UnsupportedModelError, match="an indexer without q_lora_rank"):
        load(changed(folder, tmp_path / "m", q_lora_rank=None))


def test_a_stage_cannot_read_what_another_chose(tmp_path: Path) -> None:
    config = load(write_tiny(tmp_path, "glm_moe_dsa", **ROWS["GLM-5"].config)).config
    line, checkpoint = mock.Mock(size=2, rank=0), mock.Mock(tensors={})
    with pytest.raises(ConfigError, match="chosen positions of other layers"):
        stage_of("GLM", deepseek.FAMILY, config, checkpoint, line)
