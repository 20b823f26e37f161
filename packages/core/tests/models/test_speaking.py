# SPDX-License-Identifier: MIT
"""Two small trained models whose layers keep states: what they say, with whole states and with damaged ones.

`speaking/README.md` says how they were made. Errors that random weights hide show here: a wrong state raises the
perplexity of a text, and a model that speaks is drafted for as a real one is. Texts are docstrings that the models have
not seen, as the Python that runs these tests has them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.train_small import FOLDER, HELD_OUT, docstrings, tokens_of
from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner, StepLimits
from candle_vllm.core.engine.step.sequence import RunState
from candle_vllm.core.loading.cache_specs import StateRoom
from packages.core.tests.engine.test_draft_states import engine as drafting_engine
from packages.core.tests.models.tiny import BLOCK, CPU, load, step_logits

MODELS = ("lfm2", "qwen3.5")
EXACT: dict[str, Any] = {"op_by_op": True, "dtype": "f32"}
LENGTH, SENTENCES, CONTINUED = 512, 10, 32
NEAR = 1e-3  # logits that lie closer are a tie, which rounding in fp32 may decide


@cache
def their_model(name: str) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, **options).eval()


@torch.no_grad()
def their_logits(name: str, tokens: list[int]) -> torch.Tensor:
    """transformers' logits [T, V] in fp32."""
    return their_model(name)(torch.tensor([tokens])).logits[0]


def held_out(part: int) -> list[int]:
    """One of several texts of `LENGTH` tokens."""
    tokens = tokens_of(*HELD_OUT)[part * LENGTH : (part + 1) * LENGTH].tolist()
    assert len(tokens) == LENGTH
    return tokens


def perplexity(logits: torch.Tensor, tokens: list[int], first: int = 1) -> float:
    """Of the tokens from `first` on, by the logits [T, V] before each."""
    wanted = torch.tensor(tokens[first:])
    return math.exp(torch.nn.functional.cross_entropy(logits[first - 1 : -1].double(), wanted).item())


def runner(name: str, kind: str) -> Any:
    """What runs a model, with states of two sequences."""
    room, blocks, loaded = StateRoom(2, 0, 0), LENGTH // BLOCK, load(FOLDER / name, **EXACT if kind == "eager" else {})
    if kind == "eager":
        return EagerRunner(loaded.decoder, blocks, BLOCK, CPU, torch.float32, room=room)
    limits = StepLimits(tokens=LENGTH, sequences=4, logit_rows=64, table_width=blocks, block_size=BLOCK, threads=1)
    return RecordedRunner(loaded.decoder, blocks, limits, room=room)


def sentences() -> list[list[int]]:
    """First lines of docstrings, of the lengths of sentences."""
    lines = [text.partition("\n")[0].encode() for text in docstrings(*HELD_OUT)]
    return [list(line) for line in dict.fromkeys(lines) if 24 <= len(line) <= 72]


def greedy(engine: InferenceEngine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0.0, max_tokens=CONTINUED, ignore_eos=True)
    return [found.outputs[0].token_ids for found in engine.generate(prompts, params, use_tqdm=False)]


# ---- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_perplexity_is_that_of_transformers(name: str, kind: str) -> None:
    """Of a text that is read at once, and in chunks that end within blocks and behind them."""
    tokens = held_out(1)
    theirs = perplexity(their_logits(name, tokens), tokens)
    assert 2 < theirs < 8, "a byte of the text says less than 3 bits: the model has learnt to speak"
    ours = runner(name, kind)
    for chunks in ([LENGTH], [40, 88, *[64] * 6]):
        assert perplexity(step_logits(ours, tokens, chunks), tokens) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_damaged_states_raise_the_perplexity(name: str, kind: str) -> None:
    """States that are lost at the end of each chunk; and those of another text, by the 16 tokens behind."""
    ours, chunks, half, near = runner(name, kind), [16] * (LENGTH // 16), LENGTH // 2, 16

    def taken(start: int) -> RunState:
        return RunState(0, 1 if start else -1)

    def behind(logits: torch.Tensor) -> float:
        return perplexity(logits[: half + near], tokens[: half + near], half)

    for tokens, other in ((held_out(1), held_out(4)), (held_out(2), held_out(5))):
        right = step_logits(ours, tokens, chunks)
        lost = step_logits(ours, tokens, chunks, state=lambda _: RunState(0, -1))
        assert perplexity(lost, tokens) > 1.05 * perplexity(right, tokens)
        step_logits(ours, other, [LENGTH], state=lambda _: RunState(1, -1))
        assert behind(step_logits(ours, tokens, [half, half], state=taken)) > 1.05 * behind(right)


# ---- what they say ---------------------------------------------------------------------------------------------------


def decided(name: str, prompt: list[int], answer: tuple[int, ...]) -> tuple[bool, list[int]]:
    """Whether transformers sees no tie on the way, and what it says behind each token of the prompt and the answer."""
    rows = their_logits(name, [*prompt, *answer[:-1]])[len(prompt) - 1 :]
    best = rows.topk(2).values
    return bool((best[:, 0] - best[:, 1]).min() > NEAR), rows.argmax(-1).tolist()


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("name", MODELS)
def test_sentences_go_on_as_those_of_transformers(name: str) -> None:
    """Token for token, in fp32, several at once; of the first ten on whose way transformers sees no tie."""
    prompts, same = sentences()[: 2 * SENTENCES], 0
    with InferenceEngine(FOLDER / name, block_size=BLOCK, max_num_seqs=4, **EXACT) as engine:
        answers = greedy(engine, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        clear, theirs = decided(name, prompt, answer)
        if clear and same < SENTENCES:
            assert list(answer) == theirs, bytes(prompt)
            same += 1
    assert same == SENTENCES


# ---- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eager", "compiled"])
def test_drafts_of_the_trained_layer_are_exact_and_often_right(kind: str) -> None:
    prompts, how = sentences()[:SENTENCES], EXACT if kind == "eager" else {}
    with drafting_engine(FOLDER / "qwen3.5", "none", **how) as plain:
        expected = greedy(plain, prompts)
    with drafting_engine(FOLDER / "qwen3.5", "mtp", **how) as drafting:
        assert greedy(drafting, prompts) == expected
        counts = drafting.stats()
    assert counts.accepted_draft_tokens > counts.draft_tokens / 4 > 0
    assert counts.accepted_per_position[1] > 0, "the layer goes on from its own result"


# ---- the next turn of a chat -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "mtp"])
def test_the_next_turn_of_a_chat_goes_on_from_a_checkpoint(method: str) -> None:
    """Of 4,000 tokens and an answer, all but those behind the last whole block are found, with their states."""
    text = tokens_of(*HELD_OUT)[:4000].tolist()
    with drafting_engine(FOLDER / "qwen3.5", method, block_size=BLOCK, max_model_len=4400) as engine:
        (answer,) = greedy(engine, [text])
        before = engine.stats()
        turn = [*text, *answer, *b"\n\nAnd then?\n"]
        (again,) = greedy(engine, [turn])
        found = engine.stats().cached_prompt_tokens - before.cached_prompt_tokens
    assert not before.cached_prompt_tokens
    assert found >= (len(text) + len(answer) - 1) // BLOCK * BLOCK - BLOCK
    with drafting_engine(
        FOLDER / "qwen3.5", "none", block_size=BLOCK, max_model_len=4400, enable_prefix_caching=False
    ) as plain:
        assert greedy(plain, [turn]) == [again]
