# SPDX-License-Identifier: MIT
"""What a person sees who looks at an object: a line or two, however much it holds."""

from __future__ import annotations

from array import array
from pathlib import Path

from candle_vllm.core import (
    EmbeddingOutput,
    EngineConfig,
    InferenceEngine,
    PoolingParams,
    SamplingParams,
    StructuredOutputsParams,
    TokenOutput,
)
from candle_vllm.core.engine.request import CompletionOutput, FinishReason, GenerationOutput


def test_parameters_show_what_was_given() -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(temperature=1.0, stop=["a"])) == "SamplingParams(temperature=1.0, stop=['a'])"
    assert repr(PoolingParams(normalize=False)) == "PoolingParams(normalize=False)"
    allowed = SamplingParams(allowed_token_ids=list(range(1000)))
    assert repr(allowed) == "SamplingParams(allowed_token_ids=[0, 1, 2, 3, 4, 5, ... 1000 in all])"
    assert len(repr(StructuredOutputsParams(regex="a" * 60_000))) < 200


def test_settings_show_what_was_given_and_no_secret() -> None:
    config = EngineConfig(model="m", threads=2, hf_token="secret")
    assert repr(config) == "EngineConfig(model='m', threads=2)"


def test_outputs_are_short() -> None:
    sequence = CompletionOutput(
        index=0, text="word " * 1000, token_ids=tuple(range(1000)), finish_reason=FinishReason.LENGTH
    )
    output = GenerationOutput(
        request_id="r", prompt="p" * 9000, prompt_token_ids=tuple(range(9000)), outputs=(sequence,) * 9
    )
    shown = repr(output)
    assert shown.startswith("GenerationOutput(prompt='ppp")
    assert "prompt_token_ids=(0, 1, 2, 3, 4, 5, ... 9000 in all)" in shown
    assert "CompletionOutput(index=0, text='word word" in shown
    assert "finish_reason='length'" in shown
    assert shown.endswith("... 9 in all))")
    assert len(shown) < 800
    piece = TokenOutput(request_id="r", text="a", token_ids=(5,))
    assert repr(piece) == "TokenOutput(request_id='r', text='a', token_ids=(5,))"


def test_a_vector_shows_its_beginning_and_its_length() -> None:
    vector = array("f", [0.123456789] * 4096)
    shown = repr([EmbeddingOutput(request_id="r", embedding=vector, prompt_token_ids=(1, 2))])
    numbers = ", ".join(["0.1235"] * 6)
    assert shown == f"[EmbeddingOutput(embedding=[{numbers}, ... 4096 in all], prompt_token_ids=(1, 2))]"


def test_an_engine_says_what_it_is(toy_model: Path) -> None:
    with InferenceEngine(str(toy_model), threads=1, enforce_eager=True, max_model_len=256) as engine:
        assert repr(engine) == f"<InferenceEngine '{toy_model.name}', llama on cpu, 256 tokens>"
        shown = repr(engine.model_info)
        assert shown.startswith(f"ModelInfo(name='{toy_model.name}', architecture='llama', num_parameters=")
        assert len(shown) < 400
        stream = engine.generate_stream("a", SamplingParams(max_tokens=2), request_id="r")
        assert repr(stream) == "<TokenIterator of request 'r', running>"
        assert list(stream)
        assert repr(stream) == "<TokenIterator of request 'r', ended>"
    assert repr(engine) == f"<InferenceEngine '{toy_model}', not running>"[:120]
