# SPDX-License-Identifier: MIT
"""An argument that there is not is answered with the nearest name, that of another library with ours."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import (
    LLM,
    ConfigError,
    EngineConfig,
    InferenceEngine,
    InvalidParameterError,
    LoRARequest,
    PoolingParams,
    SamplingParams,
    StructuredOutputsParams,
)
from candle_vllm.core.arguments import foreign_names, unknown_name
from candle_vllm.core.config import SETTINGS

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(toy_model), threads=1, op_by_op=True) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n_ctx", "it is called max_model_len"),
        ("max_model_length", "did you mean max_model_len?"),
        ("n_gpu_layers", "called gpu_layers"),
        ("max_memory", "weights outside the GPU are set by cpu_experts"),
        ("tp_size", "called tensor_parallel_size"),
        ("mem_fraction_static", "it is called gpu_memory_utilization"),
        ("temperature", r"generate\(prompts, SamplingParams"),
    ],
)
@pytest.mark.parametrize("make", [EngineConfig, InferenceEngine])
def test_settings(make: Callable[..., object], name: str, said: str) -> None:
    arguments: dict[str, Any] = {"model": "nowhere", name: 1}
    with pytest.raises(TypeError, match=rf"^EngineConfig has no argument '{name}'.*{said}"):
        make(**arguments)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (SamplingParams, "max_new_tokens", "it is called max_tokens"),
        (SamplingParams, "do_sample", "it is called temperature: 0 takes the likeliest"),
        (SamplingParams, "temperatur", "did you mean temperature?"),
        (SamplingParams, "guided_json", r"structured_outputs=StructuredOutputsParams\(json="),
        (SamplingParams, "best_of", "n answers are generated and returned"),
        (SamplingParams, "stop_strings", "it is called stop"),
        (SamplingParams, "n_ctx", "setting of the engine"),
        (PoolingParams, "dimension", "did you mean dimensions?"),
        (StructuredOutputsParams, "jsn", "did you mean json?"),
        (LoRARequest, "lora_local_path", "it is called lora_path"),
    ],
)
def test_parameters(make: Callable[..., object], name: str, said: str) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^{make.__name__} has no argument "
        f"'{name}'.*{said}",
    ):  # type: ignore[attr-defined]
        make(**{name: 1})


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        ("generate", "max_tokens", "it is a field of SamplingParams"),
        ("generate", "max_new_tokens", "SamplingParams has no argument 'max_new_tokens': it is called max_tokens"),
        ("generate", "stream", "there are generate_stream"),
        ("generate", "params", "it is called sampling_params"),
        ("generate_stream", "priorty", "did you mean priority?"),
        ("agenerate", "top_p", "it is a field of SamplingParams"),
        ("stream", "use_tqdm", "$"),
        ("embed", "dimensions", "it is a field of PoolingParams"),
        ("classify", "use_activation", "it is a field of PoolingParams"),
        ("add_request", "seed", "it is a field of SamplingParams"),
    ],
)
def test_methods(engine: InferenceEngine, method: str, name: str, said: str) -> None:
    with pytest.raises(TypeError, match=rf"^{method} has no argument '{name}'.*{said}"):
        getattr(engine, method)("hi", **{name: 1})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_tokens", "it is a field of SamplingParams"),
        ("max_new_tokens", "it is called max_tokens"),
        ("tool_choice", "enforces a tool_choice"),
        ("functions", "it is called tools"),
        ("reasoning_effort", "and the model's chat template does not read it; to pass it anyway, use"),
        ("foo", "and the model's chat template does not read it"),
        ("chat_template_content_format", "parts of a content are always joined"),
        ("tokenize", "engine.tokenize"),
        ("add_generation_promt", "did you mean add_generation_prompt?"),
    ],
)
@pytest.mark.parametrize("method", ["chat", "chat_stream", "achat_stream", "apply_chat_template"])
def test_parameters_are_not_lost_in_a_template(engine: InferenceEngine, method: str, name: str, said: str) -> None:
    """They would be variables that no template reads."""
    with pytest.raises(TypeError, match=rf"^{method} has no argument '{name}'.*{said}"):
        getattr(engine, method)(MESSAGES, **{name: 1})


def test_variables_for_whatever_template_there_is(engine: InferenceEngine) -> None:
    """As servers get them, and programs that do not know the model."""
    params = SamplingParams(temperature=0, max_tokens=2)
    plain = engine.chat(MESSAGES, params).token_ids
    assert engine.chat(MESSAGES, params, chat_template_kwargs={"enable_thinking": False}).token_ids == plain
    reads = "{{ mood }}{{ messages[0].content }}"
    for given in ({"mood": "so "}, {"chat_template_kwargs": {"mood": "so "}}):
        assert engine.apply_chat_template(MESSAGES, chat_template=reads, **given) == "so hi"
    for wrong, said in (
        (5, "must be variables"),
        ({"tools": []}, "has 'tools', which is an argument of its own"),
        ({"mood": [{(1, 2): 3}]}, "chat_template_kwargs must be JSON data with string keys; this dict is not"),
    ):
        with pytest.raises(InvalidParameterError, match=said):
            engine.chat(MESSAGES, params, chat_template_kwargs=wrong)


def test_a_priority_goes_where_one_is_taken(engine: InferenceEngine) -> None:
    with pytest.raises(TypeError, match="embed has no argument 'priority': agenerate, achat, stream"):
        engine.embed("hi", priority=3)  # type: ignore[call-arg]
    params = SamplingParams(temperature=0, max_tokens=2)
    with pytest.raises(InvalidParameterError, match="2 prompts need as many priorities, not 1"):
        engine.generate(["a", "b"], params, priority=[1])
    with pytest.raises(InvalidParameterError, match=r"prompts\[1\]: priority must be a whole number"):
        engine.generate(["a", "b"], params, priority=[1, 1.5])  # type: ignore[list-item]
    assert engine.chat(MESSAGES, params, priority=-3).token_ids
    assert engine.chat_stream(MESSAGES, params, priority=3, request_id="a").request.priority == 3


def test_explained_methods_keep_their_signatures_and_stay_awaitable(engine: InferenceEngine) -> None:
    assert list(inspect.signature(engine.generate).parameters) == [
        "prompts",
        "sampling_params",
        "use_tqdm",
        "priority",
        "add_special_tokens",
        "lora_request",
    ]
    assert len(asyncio.run(engine.agenerate("hi", SamplingParams(max_tokens=2, ignore_eos=True))).token_ids) == 2


def test_right_arguments_with_wrong_values_keep_their_errors() -> None:
    with pytest.raises(InvalidParameterError, match="max_tokens"):
        SamplingParams(max_tokens=0)
    with pytest.raises(TypeError, match="model"):
        EngineConfig()  # type: ignore[call-arg]


def test_the_tables_speak_of_what_is_there_and_what_is_not() -> None:
    tables = {"EngineConfig": set(SETTINGS), "SamplingParams": set(SamplingParams.__struct_fields__)}
    for owner, known in tables.items():
        rows = foreign_names(owner)
        assert not known & rows.keys()
        called = [name for name in rows if "it is called" in unknown_name(owner, name, known)]
        assert len(called) > 20
        meant = {name for name, answer in rows.items() if " " not in answer}
        assert meant <= set(called), "an answer of one word is a name of ours"
    ours = [name for name, answer in foreign_names("EngineConfig").items() if answer.startswith("requests have it")]
    assert set(ours) - {"max_new_tokens"} <= tables["SamplingParams"]


def test_what_is_so_anyway_may_be_said() -> None:
    settings: dict[str, Any] = {
        "enable_eplb": False,
        "fully_sharded_loras": False,
        "limit_mm_per_prompt": {},
    }
    assert EngineConfig(model="m", **settings) == EngineConfig(model="m")
    params: dict[str, Any] = {"detokenize": False, "skip_clone": True, "guided_decoding": None, "best_of": None}
    assert SamplingParams(**params) == SamplingParams()
    pooling: dict[str, Any] = {"softmax": None, "requires_token_ids": False, "skip_reading_prefix_cache": None}
    assert PoolingParams(**pooling) == PoolingParams()
    form: dict[str, Any] = {"disable_fallback": False, "whitespace_pattern": None}
    assert StructuredOutputsParams(regex="a", **form) == StructuredOutputsParams(regex="a")


def test_what_has_no_effect_is_taken_with_a_remark(caplog: pytest.LogCaptureFixture) -> None:
    assert EngineConfig(model="m", swap_space=4.5) == EngineConfig(model="m")  # type: ignore[call-arg]
    assert caplog.messages == ["swap_space has no effect here: a preempted request is computed again, not swapped"]


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (EngineConfig, {"model": "m", "enable_eplb": True}, r"\(data_parallel_size\) only"),
        (EngineConfig, {"model": "m", "enable_eplb": 1}, r"\(data_parallel_size\) only"),
        (
            EngineConfig,
            {"model": "m", "enable_eplb": False, "fully_sharded_loras": True},
            "each GPU has the whole adapter",
        ),
        (SamplingParams, {"use_cache": False}, "always the case"),
        (PoolingParams, {"task": "embed"}, "the method sets it"),
    ],
)
def test_what_is_not_so_is_refused(make: Callable[..., object], given: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        make(**given)


def test_positions_of_parameters_have_no_meaning() -> None:
    with pytest.raises(TypeError, match=r"^SamplingParams takes its arguments by name \(n, temperature, top_p, top_k"):
        SamplingParams(0.5)  # type: ignore[misc]


def test_a_key_that_is_no_token_is_named_as_a_key() -> None:
    for wrong in ("a", True):
        with pytest.raises(InvalidParameterError, match=r"logit_bias maps token ids.*no token id"):
            SamplingParams(logit_bias={wrong: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize("model", [None, "", 5])
def test_what_is_no_model_is_said(model: Any) -> None:
    for engine in (InferenceEngine, LLM):
        with pytest.raises(ConfigError, match=r"^model"):
            engine(model)


def test_too_many_positional_arguments_are_not_taken_for_missing_names() -> None:
    with pytest.raises(TypeError, match="positional"):
        LoRARequest("a", 1, "folder", None, False, 6)  # type: ignore[call-arg]
