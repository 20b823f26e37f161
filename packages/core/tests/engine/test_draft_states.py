# SPDX-License-Identifier: MIT
"""A head beside a model whose layers keep states: whatever is found, cut or preempted, answers are those without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.drafts.draft_head import DraftingHead
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from packages.core.tests.engine.drafted import FreeTimes, same_times
from packages.core.tests.engine.toy_heads import NextTokens
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.families import QWEN3_NEXT, QWEN35, QWEN_MOE
from packages.core.tests.models.tiny import some_tokens, write_tiny
from tests.common_run import few

WORDS, LENGTH = 48, 40
MODELS = {
    "Qwen3.5": ("qwen3_5_text", QWEN35 | {"layer_types": ["linear_attention", "full_attention"] * 2}),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", QWEN35 | QWEN_MOE),
    "Qwen3-Next": ("qwen3_next", QWEN3_NEXT | QWEN_MOE),
}
MODELS["Qwen3.5"][1]["num_hidden_layers"] = 4


def write_counting(folder: Path, name: str, noise: float) -> Path:
    """A model that says after token t that t + 1 follows, but for what its layers add; and a head that says just this.

    The head reads the hidden states alone: their size is that of t, of which its matrix makes that of t + 1.
    """
    model_type, fields = MODELS[name]
    source = write_tiny(folder / "source", model_type, **fields)
    written = NextTokens(source, "mtp").write(folder / "model", source)
    weights = load_file(written / "model.safetensors")
    size = weights["model.embed_tokens.weight"].shape[1]
    for key, tensor in weights.items():
        own = key.startswith("mtp.")
        if key.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight")):
            tensor.mul_(0 if own else noise)
        elif tensor.dim() == 1 and key.endswith("norm.weight"):
            tensor.fill_(1.0 if "linear_attn" in key else 0.0)
    table, head, project = (weights[f"{key}.weight"] for key in ("model.embed_tokens", "lm_head", "mtp.fc"))
    for tensor in (table, head, project):
        tensor.zero_()
    for token in range(WORDS):
        after = (token + 1) % WORDS
        table[token, token] = head[after, token] = project[after, size + token] = 1.0
    save_file(weights, written / "model.safetensors")
    return written


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], Path]:
    made: dict[tuple[str, float], Path] = {}

    def write(name: str, noise: float) -> Path:
        if (name, noise) not in made:
            made[name, noise] = write_counting(tmp_path_factory.mktemp("counting"), name, noise)
        return made[name, noise]

    return write


def engine(source: Path, method: str, **settings: Any) -> InferenceEngine:
    """One that guesses all it can, by its head alone: nothing is found in past answers or in the text."""
    drafts: dict[str, Any] = {"method": method}
    if method == "mtp":
        drafts |= {"num_speculative_tokens": 4, "prompt_lookup_min": 24}
    usual: dict[str, Any] = {"threads": 1, "block_size": 16, "max_num_seqs": 8, "max_model_len": 128}
    made = InferenceEngine(source, speculative_config=drafts, **usual | settings)
    drafter = made._engine and made._engine._drafter
    if drafter is not None:
        assert isinstance(drafter.model, DraftingHead)
        drafter.times = same_times  # type: ignore[method-assign]
        drafter.model.times = FreeTimes()
        drafter._past = None
    return made


def prompts() -> list[list[int]]:
    """Texts with beginnings in common, that end within blocks, with one, and a token behind it."""
    tokens = [token % WORDS for token in some_tokens(70)]
    return [tokens, [*tokens[:40], 7, 8, 9], tokens[:64], tokens[:65], tokens[:3], tokens]


def ask(engine: InferenceEngine, prompts: list[list[int]], **params: Any) -> list[Any]:
    """Each answer's tokens; of the compiled runner their log-probabilities too, whose bits no other row changes."""
    inner = engine._engine
    asked: dict[str, Any] = {"max_tokens": LENGTH, "ignore_eos": True} | params
    if isinstance(inner and inner.runner, RecordedRunner):
        asked["logprobs"] = 0
    found = engine.generate(prompts, SamplingParams(**asked), use_tqdm=False)
    return [(each.token_ids, repr(each.logprobs)) for answer in found for each in answer.outputs]


DRAWN: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8, "seed": 5},
    "several answers": {"temperature": 0.8, "seed": 5, "n": 2},
}
HOW: dict[str, dict[str, Any]] = {"eager": {"op_by_op": True, "dtype": "f32"}, "compiled": {}}
SIZES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"max_num_batched_tokens": 20},
    "preemption": {"max_num_seqs": 3, "state_cache_gb": 1e-4},
}
BLOCKS = 14  # which three texts need more than


def sized(source: Path, kind: str, size: str) -> dict[str, Any]:
    """Settings of an engine that drafts; of one that preempts, with memory for its states and those blocks."""
    settings = HOW[kind] | SIZES[size]
    if size != "preemption":
        return settings
    with engine(source, "mtp", **settings) as large:
        inner = large._engine
        assert inner is not None
        assert inner.sleeper is not None
        runners: Any = inner.sleeper.runners  # of the model and of its head
        block = sum(each.block_bytes for each in runners)
        memory = inner.cache_bytes - (inner.stats().num_blocks - BLOCKS) * block
    return settings | {"kv_cache_memory": memory}


EAGER = [(name, "eager", size) for name, size in zip(MODELS, SIZES, strict=True)]  # which takes long
COMPILED = [(name, "compiled", size) for name in MODELS for size in SIZES]


@pytest.mark.parametrize(
    ("name", "kind", "size"), few([*EAGER, *COMPILED], (next(iter(MODELS)), "compiled", next(reversed(SIZES))))
)
def test_a_head_beside_states_changes_no_answer(
    name: str, kind: str, size: str, counting: Callable[[str, float], Path]
) -> None:
    """Drafts are right and wrong by turns, prompts are found in the cache, several sequences run at once."""
    given, folder = prompts(), counting(name, 0.2)
    with exact_sums():
        with engine(folder, "none", enable_prefix_caching=False, **HOW[kind]) as plain:
            expected = {key: ask(plain, given, **params) for key, params in DRAWN.items()}
        with engine(folder, "mtp", **sized(folder, kind, size)) as drafting:
            for key, params in DRAWN.items():
                for _ in range(2 if key == "greedy" else 1):
                    assert ask(drafting, given, **params) == expected[key], key
            counts = drafting.stats()
    assert counts.num_free_blocks == counts.num_blocks
    assert 20 < counts.accepted_draft_tokens < counts.draft_tokens
    assert counts.cached_prompt_tokens
    assert bool(counts.preemptions) == (size == "preemption")


def test_ranks_change_no_answer(counting: Callable[[str, float], Path]) -> None:
    """The first one drafts; each has the delta nets whole."""
    given, folder, ranks = prompts(), counting("Qwen3.5-MoE", 0.2), dict[str, Any](cpu_ranks=2, threads=2)
    with engine(folder, "none", enable_prefix_caching=False, **ranks) as plain:
        expected = ask(plain, given, temperature=0.0)
    with engine(folder, "mtp", **ranks) as drafting:
        assert ask(drafting, given, temperature=0.0) == expected
        assert drafting.stats().accepted_draft_tokens > 20


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", HOW)
def test_a_head_that_knows_the_model_is_always_right(
    kind: str, size: str, counting: Callable[[str, float], Path]
) -> None:
    """The hidden states that it reads are those of its position, whatever is found, cut or preempted."""
    given, folder = prompts(), counting("Qwen3.5", 0.0)
    with engine(folder, "mtp", **sized(folder, kind, size)) as drafting:
        for _ in range(2):
            for prompt, (tokens, _) in zip(given, ask(drafting, given, temperature=0.0), strict=True):
                assert tokens == tuple((prompt[-1] + 1 + n) % WORDS for n in range(LENGTH))
        counts = drafting.stats()
    assert counts.draft_tokens == counts.accepted_draft_tokens > 200
    assert counts.cached_prompt_tokens
    assert bool(counts.preemptions) == (size == "preemption")
