# SPDX-License-Identifier: MIT
"""Beam search, against transformers' and against a search of ten lines over its log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from candle_vllm.core import LLM, BeamSearchParams, InferenceEngine, InvalidParameterError, SamplingParams
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_sight import write_toy_sight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [[5, 6, 7, 8], [70, 71]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("beams"), toy_config(torch_dtype="float32"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(folder), threads=1, op_by_op=True, block_size=4) as made:
        yield made


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (10, 2.0)])
def test_the_beams_are_those_of_transformers(
    engine: InferenceEngine, reference: Any, width: int, penalty: float
) -> None:
    """Without end tokens both searches are the same."""
    params = BeamSearchParams(beam_width=width, max_tokens=7, ignore_eos=True, length_penalty=penalty)
    outputs = LLM(engine).beam_search([{"prompt_token_ids": ids} for ids in PROMPTS], params)
    for ids, output in zip(PROMPTS, outputs, strict=True):
        wanted = reference.generate(
            torch.tensor([ids]), num_beams=width, num_return_sequences=width, max_new_tokens=7, do_sample=False,
            length_penalty=penalty, eos_token_id=-1, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert [each.tokens for each in output.sequences] == wanted.sequences.tolist()
        if width > 1:
            scores = [each.score(penalty) for each in output.sequences]
            assert scores == pytest.approx(wanted.sequences_scores.tolist(), abs=1e-4)
        assert {each.finish_reason for each in output.sequences} == {"length"}


def searched(reference: Any, ids: list[int], width: int, most: int, ends: set[int]) -> list[tuple[float, list[int]]]:
    """vLLM's rules: every one of the 2w likeliest tokens of every beam, complete where it is an end token."""
    beams, complete = [(0.0, ids)], []
    for _ in range(most):
        with torch.no_grad():
            rows = [
                torch.log_softmax(reference(torch.tensor([tokens])).logits[0, -1].double(), -1) for _, tokens in beams
            ]
        found = [
            (total + float(row[token]), [*tokens, token])
            for (total, tokens), row in zip(beams, rows, strict=True)
            for token in row.topk(2 * width).indices.tolist()
        ]
        complete += [each for each in found if each[1][-1] in ends]
        beams = sorted((each for each in found if each[1][-1] not in ends), reverse=True)[:width]
    return sorted(((total / (len(t) - len(ids)), t) for total, t in complete + beams), reverse=True)[:width]


def test_what_ends_is_complete(folder: Path, reference: Any, engine: InferenceEngine) -> None:
    """With end tokens that the model likes; sums over different numbers of tokens are compared."""
    plain = LLM(engine).beam_search([PROMPTS[0]], BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True))
    end = plain[0].sequences[0].tokens[len(PROMPTS[0]) + 2]  # the third token of the best beam
    ended = write_toy_model(folder / "ended", toy_config(torch_dtype="float32", eos_token_id=end))
    with LLM(InferenceEngine(str(ended), threads=1, op_by_op=True)) as llm:
        (output,) = llm.beam_search([PROMPTS[0]], BeamSearchParams(beam_width=3, max_tokens=5))
        ends = set(llm.engine.model_info.eos_token_ids)
        llm.engine.close()
    wanted = searched(reference, PROMPTS[0], 3, 5, ends)
    assert [each.tokens for each in output.sequences] == [tokens for _, tokens in wanted]
    assert [each.score(1.0) for each in output.sequences] == pytest.approx([score for score, _ in wanted], abs=1e-4)
    reasons = ["stop" if each.tokens[-1] in ends else "length" for each in output.sequences]
    assert [each.finish_reason for each in output.sequences] == reasons
    assert "stop" in reasons


def test_a_search_is_the_same_for_prompts_at_a_time_and_ends_with_the_context(engine: InferenceEngine) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    together = LLM(engine).beam_search(["ab", "cde"], params)
    apart = LLM(engine).beam_search(["ab", "cde"], params, concurrency_limit=1, priority=[1, 0])
    assert [[each.tokens for each in output.sequences] for output in together] == [
        [each.tokens for each in output.sequences] for output in apart
    ]
    best = together[0].sequences[0]
    assert best.text == engine.detokenize(best.tokens)
    assert best.cum_logprob == pytest.approx(
        sum(entry[token].logprob for entry, token in zip(best.logprobs, best.tokens[2:], strict=True))
    )
    context = engine.model_info.max_model_len
    (full,) = LLM(engine).beam_search([[5] * (context - 2)], params)
    assert {len(each.tokens) for each in full.sequences} == {context}


def test_a_model_that_sees_searches_behind_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    asked: list[Any] = ["a", *({"prompt": "<image> x", "multi_modal_data": {"image": each}} for each in pixels)]
    with InferenceEngine(write_toy_sight(tmp_path), threads=1, op_by_op=True) as engine:
        params = BeamSearchParams(beam_width=1, max_tokens=3, ignore_eos=True)
        found = [output.sequences[0].tokens for output in LLM(engine).beam_search(asked, params)]
        greedy = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        wanted = engine.generate(asked, greedy, use_tqdm=False)
    assert found == [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in wanted]
    assert found[1] != found[2]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"beam_width": 11}, InvalidParameterError, "beam_width must be a whole number from 1 to 10"),
        ({"max_tokens": 0}, InvalidParameterError, "max_tokens must be"),
        ({"max_tokens": 10**5000}, InvalidParameterError, "max_tokens must be"),
        ({"length_penalty": float("nan")}, InvalidParameterError, "length_penalty must be a number from"),
        ({"ignore_eos": 1}, InvalidParameterError, "ignore_eos must be true or false"),
        ({"temperature": 0.5}, TypeError, "ranked by the model's own"),
        ({"structured_outputs": object()}, TypeError, "whatever tokens are likeliest"),
        ({"num_beams": 3}, TypeError, "it is called beam_width"),
    ],
)
def test_wrong_parameters_are_refused_by_name(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, **given})


def test_wrong_calls(engine: InferenceEngine) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=2, temperature=0.0)  # type: ignore[call-arg]
    with pytest.raises(InvalidParameterError, match="params must be BeamSearchParams, not dict"):
        LLM(engine).beam_search(["a"], {"beam_width": 2})  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="1 prompts need as many priorities, not 2"):
        LLM(engine).beam_search(["a"], params, priority=[1, 2])
    for wrong in (0, "2", 1.5, True):
        with pytest.raises(InvalidParameterError, match="concurrency_limit must be a whole number"):
            LLM(engine).beam_search(["a"], params, concurrency_limit=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match=r"lora_request must be a LoRARequest, or pairs .*, not object"):
        LLM(engine).beam_search(["a"], params, lora_request=object())  # type: ignore[arg-type]
