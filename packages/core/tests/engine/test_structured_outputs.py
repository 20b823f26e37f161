# SPDX-License-Identifier: MIT
"""Structured output end to end: a random model writes valid texts, and its neighbours write what they would anyhow."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from candle_vllm.core import (
    EngineConfig,
    FinishReason,
    InferenceEngine,
    InvalidParameterError,
    RequestError,
    SamplingParams,
    StructuredOutputsParams,
)
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.outputs import CompletionOutput, OutputCollector, TokenOutput
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.sampling import json_schema
from candle_vllm.core.sampling.grammar import GrammarState
from candle_vllm.core.sampling.llguidance_backend import LlguidanceBackend
from candle_vllm.core.sampling.llguidance_grammar import LlguidanceGrammar
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from tests.waiting import PATIENCE

CPU = torch.device("cpu")
SIZE, CONTEXT, EOS = 16, 512, 258
SHORT = {"type": "string", "maxLength": 5}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": 10, "maximum": 99},
    {"type": "string", "pattern": "^[a-f]{2,6}$"},
    {"enum": ["red", "green", 3, None]},
    {"type": "array", "items": SHORT, "minItems": 1, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "name": SHORT,
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"d": {"type": "string", "format": "date"}, "n": {"type": "null"}},
        "required": ["d"],
    },
    {"anyOf": [{"const": {"k": [1, 2]}}, {"type": "array", "prefixItems": [{"type": "boolean"}], "items": False}]},
]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Tokens are compared between steps of different sizes."""
    with exact_sums():
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config(max_position_embeddings=CONTEXT))
    return load_model(EngineConfig(model=str(folder), op_by_op=True), CPU, lambda *_: None)


def make(loaded: LoadedModel, runner: ModelRunner | None = None, blocks: int = 400) -> Engine:
    runner = runner or EagerRunner(loaded.decoder, blocks, SIZE, CPU, torch.float32)
    scheduler = Scheduler(BlockManager(blocks, SIZE), 16, 64)
    return Engine(runner, scheduler, preparation_for(loaded, CONTEXT, seed=0))


@pytest.fixture
def engine(loaded: LoadedModel) -> Iterator[Engine]:
    made = make(loaded)
    yield made
    made.close()


def ask(name: str, **params: Any) -> GenerationRequest:
    prompt = [1 + (7 * len(name) + i) % 90 for i in range(5 + len(name))]
    return GenerationRequest(request_id=name, prompt_token_ids=prompt, params=SamplingParams(**params))


def drive(
    engine: Engine, requests: Iterable[GenerationRequest], failed: list[TokenOutput] | None = None
) -> dict[str, tuple[CompletionOutput, ...]]:
    """Runs requests to their end; the last pieces of those that failed go into `failed`."""
    collectors = {request.request_id: OutputCollector(request) for request in requests}
    for request in requests:
        engine.add(engine.prepare(request))
    while engine.has_work:
        for piece in engine.step():
            collectors[piece.request_id].add(piece)
            if piece.error is not None and failed is not None:
                failed.append(piece)
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    return {name: tuple(collector.result().outputs) for name, collector in collectors.items()}


def batch() -> list[GenerationRequest]:
    """Requests with every schema, and free ones between them."""
    requests = []
    for number, schema in enumerate(SCHEMAS):
        form = StructuredOutputsParams(json=schema, disable_any_whitespace=number != 3)
        requests.append(ask(f"json{number}", seed=number, max_tokens=150, n=2, structured_outputs=form))
        requests.append(ask(f"free{number}", seed=number, max_tokens=20, ignore_eos=True, temperature=number % 2))
    penalties = {"repetition_penalty": 1.2, "logit_bias": {48: 2.0}, "min_tokens": 2, "logprobs": 2}
    digits = StructuredOutputsParams(regex="[0-9]{3,12}")
    requests.append(ask("digits", seed=1, max_tokens=20, structured_outputs=digits, **penalties))
    return requests


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> dict[str, tuple[CompletionOutput, ...]]:
    engine = make(loaded)
    found = drive(engine, batch())
    engine.close()
    return found


def ids(outputs: dict[str, tuple[CompletionOutput, ...]]) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [(tuple(o.token_ids), o.finish_reason) for o in each] for name, each in outputs.items()}


def test_random_weights_write_valid_json(expected: dict[str, tuple[CompletionOutput, ...]]) -> None:
    for number, schema in enumerate(SCHEMAS):
        for output in expected[f"json{number}"]:
            assert output.finish_reason is FinishReason.STOP
            jsonschema.validate(json.loads(output.text), schema)
    (digits,) = expected["digits"]
    assert digits.text.isdigit()
    assert 3 <= len(digits.text) <= 12


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("seed", range(5))
def test_many_seeds(engine: Engine, seed: int) -> None:
    forms = [StructuredOutputsParams(json=schema, disable_any_whitespace=seed > 0) for schema in SCHEMAS]
    found = drive(
        engine, [ask(str(i), seed=seed, max_tokens=100, structured_outputs=form) for i, form in enumerate(forms)]
    )
    for number, schema in enumerate(SCHEMAS):
        (output,) = found[str(number)]
        if output.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(output.text), schema)
        else:
            assert output.finish_reason is FinishReason.LENGTH


def test_free_neighbours_are_not_affected(loaded: LoadedModel, expected: dict[str, Any]) -> None:
    engine = make(loaded)
    free = drive(engine, [request for request in batch() if request.request_id.startswith("free")])
    assert ids(free) == {name: found for name, found in ids(expected).items() if name.startswith("free")}


def test_preempted_sequences_go_on_where_they_were(loaded: LoadedModel) -> None:
    """Their caches are computed again, their grammars are not."""
    form = StructuredOutputsParams(regex="([a-f][0-9]){30,40}")
    requests = [ask("x" * n, seed=n, max_tokens=90, structured_outputs=form) for n in range(1, 7)]
    found = []
    for blocks in (400, 14):
        engine = make(loaded, blocks=blocks)
        found.append(ids(drive(engine, requests)))
        assert (engine.scheduler.num_preemptions > 0) == (blocks == 14)
        engine.close()
    assert found[0] == found[1]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(("graphs", "prompts"), [(True, 0), (True, 64), (False, 0)])
def test_steps_on_a_late_device(loaded: LoadedModel, expected: dict[str, Any], graphs: bool, prompts: int) -> None:
    limits = DeviceLimits(64, 16, -(-CONTEXT // SIZE), SIZE)
    runner = DeviceRunner(
        loaded.decoder, limits, LazyStream(), torch.float32, graphs=graphs, captured_prompts=prompts, finite_cache=True
    )
    for work in runner.largest_steps():
        work()
    runner.allocate(400)
    engine = make(loaded, runner)
    assert ids(drive(engine, batch())) == ids(expected)
    engine.close()


def test_reasoning_is_free_up_to_its_mark(engine: Engine) -> None:
    """The special token <|im_start|> ends it; it is made likely, so that random weights come to an end."""
    form = StructuredOutputsParams(json=SCHEMAS[0], reasoning_end="<|im_start|>")
    request = ask("a", seed=3, max_tokens=150, n=3, structured_outputs=form, logit_bias={257: 4.0}, ignore_eos=True)
    for output in drive(engine, [request])["a"]:
        assert output.finish_reason is FinishReason.STOP
        tokens = list(output.token_ids)
        assert tokens.count(257) == 1
        assert EOS not in tokens
        answer = bytes(tokens[tokens.index(257) + 1 :])
        jsonschema.validate(json.loads(answer), SCHEMAS[0])


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 30}, {"max_tokens": 3}])
def test_a_sequence_ends_where_nothing_may_follow(engine: Engine, params: dict[str, Any]) -> None:
    """At once: its last token is the last of the text, in as many steps as it has tokens."""
    form = StructuredOutputsParams(choice=["yes", "nah"])
    request = ask("a", **({"max_tokens": 50, "seed": 1, "structured_outputs": form} | params))
    collector, steps = OutputCollector(request), 0
    engine.add(engine.prepare(request))
    while engine.has_work:
        for piece in engine.step():
            collector.add(piece)
        steps += 1
    (output,) = collector.result().outputs
    assert output.text in ("yes", "nah")
    assert output.finish_reason is FinishReason.STOP
    assert output.stop_reason is None
    assert (len(output.token_ids), steps) == (3, 3)


def test_end_tokens_end_a_text_that_may_end(engine: Engine) -> None:
    """Where more may follow, the model's end token decides; `ignore_eos` and `min_tokens` hold it back."""
    form = StructuredOutputsParams(regex="a{1,40}")
    likely = {"max_tokens": 60, "seed": 1, "structured_outputs": form, "logit_bias": {EOS: 100.0}}
    found = drive(
        engine, [ask("a", **likely), ask("bb", **likely, ignore_eos=True), ask("ccc", **likely, min_tokens=7)]
    )
    assert [found[name][0].text for name in ("a", "bb", "ccc")] == ["a", "a" * 40, "a" * 7]
    assert {output.finish_reason for outputs in found.values() for output in outputs} == {FinishReason.STOP}
    assert found["a"][0].token_ids[-1] == EOS


def test_stops_and_lengths_may_cut(engine: Engine) -> None:
    form = StructuredOutputsParams(regex="(ab){20}")
    found = drive(
        engine,
        [
            ask("a", max_tokens=7, structured_outputs=form),
            ask("bb", max_tokens=50, structured_outputs=form, stop=["bab"]),
            ask("ccc", max_tokens=50, structured_outputs=form, stop_token_ids=[ord("b")]),
        ],
    )
    texts = {name: (outputs[0].text, outputs[0].finish_reason) for name, outputs in found.items()}
    assert texts == {
        "a": ("abababa", FinishReason.LENGTH),
        "bb": ("a", FinishReason.STOP),
        "ccc": ("a", FinishReason.STOP),
    }


def test_a_grammar_and_allowed_tokens_hold_together(engine: Engine) -> None:
    digits = StructuredOutputsParams(regex="[0-9]{4}")
    some = [ord("3"), ord("7"), ord("x"), EOS]
    good = ask("a", seed=1, structured_outputs=digits, allowed_token_ids=some)
    bad = ask("bb", seed=1, structured_outputs=digits, allowed_token_ids=[ord("x")])
    failed: list[TokenOutput] = []
    found = drive(engine, [good, bad, ask("free", max_tokens=5, ignore_eos=True)], failed)
    assert set(found["a"][0].text) <= {"3", "7"}
    assert [(piece.request_id, piece.error_kind) for piece in failed] == [("bb", "request")]
    assert "no token may be chosen" in str(failed[0].error)
    assert found["free"][0].finish_reason is FinishReason.LENGTH


def test_a_mask_that_cannot_be_made_ends_its_sequence_alone(
    engine: Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {request.request_id: request for request in batch()}
    fill = LlguidanceGrammar.fill_mask
    calls = []

    def failing(self: LlguidanceGrammar, bits: Any) -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 4:
            raise InvalidParameterError("the grammar takes too long here", "structured_outputs")
        fill(self, bits)

    engine.check_structured_outputs(StructuredOutputsParams(regex="[0-9]{3,12}"))
    monkeypatch.setattr(LlguidanceGrammar, "fill_mask", failing)
    failed: list[TokenOutput] = []
    found = drive(engine, [requests["digits"], requests["free1"]], failed)
    assert [(piece.request_id, piece.error_kind) for piece in failed] == [("digits", "request")]
    assert failed[0].error == "the grammar takes too long here"
    assert ids(found)["free1"] == ids(expected)["free1"]
    assert all(name.startswith("candle-vllm-grammar") for name in calls)


def test_a_token_that_is_not_taken_is_an_error_of_its_sequence(
    engine: Engine, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = {request.request_id: request for request in batch()}
    monkeypatch.setattr(LlguidanceGrammar, "accept", lambda self, token: False)
    failed: list[TokenOutput] = []
    found = drive(engine, [requests["digits"], requests["free1"]], failed)
    assert [(piece.request_id, piece.error_kind) for piece in failed] == [("digits", "engine")]
    assert "does not take token" in str(failed[0].error)
    assert ids(found)["free1"] == ids(expected)["free1"]


class SlowBackend(LlguidanceBackend):
    """Fills masks when it is told to."""

    gate = threading.Event()

    def compile(self, spec: StructuredOutputsParams) -> LlguidanceGrammar:
        grammar = super().compile(spec)
        fill = grammar.fill_mask

        def waiting(bits: Any) -> None:
            assert self.gate.wait(PATIENCE)
            fill(bits)

        grammar.fill_mask = waiting  # type: ignore[method-assign]
        return grammar


def test_masks_are_filled_beside_the_engine(loaded: LoadedModel) -> None:
    """Neither the start nor a token waits for the next mask; the mask itself is waited for."""
    backend = SlowBackend(loaded.tokenizer, 272, (EOS,))
    state = GrammarState(backend, StructuredOutputsParams(regex="ab+"), 272)
    backend.gate.set()
    assert np.unpackbits(state.bits().view(np.uint8), bitorder="little").nonzero()[0].tolist() == [ord("a")]
    backend.gate.clear()
    state.accept(ord("a"))
    assert not state._filling.done()
    threading.Timer(0.05, backend.gate.set).start()
    assert np.unpackbits(state.bits().view(np.uint8), bitorder="little").nonzero()[0].tolist() == [ord("b")]
    backend.close()


def test_the_front_door(toy_model: Path) -> None:
    before = set(threading.enumerate())
    with InferenceEngine(str(toy_model)) as engine:
        form = StructuredOutputsParams(json=SCHEMAS[0])
        params = SamplingParams(seed=1, max_tokens=20, structured_outputs=form)
        for output in engine.generate(["a", "b"], params, use_tqdm=False):
            jsonschema.validate(json.loads(output.text), SCHEMAS[0])
        engine.check_structured_outputs(form)
        wrong = StructuredOutputsParams(json={"not": {}, "unevaluatedItems": False})
        for call in (
            lambda: engine.check_structured_outputs(wrong),
            lambda: engine.generate("a", SamplingParams(structured_outputs=wrong), use_tqdm=False),
        ):
            with pytest.raises(InvalidParameterError, match="keyword 'unevaluatedItems'") as caught:
                call()
            assert caught.value.param == "structured_outputs"
    new = {thread.name for thread in set(threading.enumerate()) - before}
    new -= {"candle-vllm-compiling"}  # awaits the second process of a first start, which may outlive the engine
    assert not [name for name in new if name.startswith("candle-vllm")]


async def test_the_scripted_engine_refuses_what_the_real_one_refuses() -> None:
    engine = ScriptedEngine("free text")
    form = StructuredOutputsParams(json=SCHEMAS[4])
    engine.check_structured_outputs(form)
    output = await engine.agenerate("a", SamplingParams(structured_outputs=form))
    assert output.text == "free text"
    wrong = StructuredOutputsParams(json={"not": {}, "unevaluatedItems": False})
    with pytest.raises(RequestError, match="keyword 'unevaluatedItems'"):
        engine.check_structured_outputs(wrong)
    with pytest.raises(RequestError, match="keyword 'unevaluatedItems'"):
        engine.stream("a", SamplingParams(structured_outputs=wrong))


def test_a_limit_of_the_grammar_is_an_error_of_the_request(
    loaded: LoadedModel, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A form that the parser takes, and whose text it cannot follow: no failure of ours, and no neighbour is hurt."""
    monkeypatch.setattr(json_schema, "MAX_OPTIONAL", 10_000)
    wide = {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(700)}}
    form = StructuredOutputsParams(json=wide, disable_any_whitespace=True)
    failed: list[TokenOutput] = []
    wanted = ask("wide", n=2, max_tokens=60, logit_bias={ord("}"): -100.0}, structured_outputs=form)
    found = drive(engine, [wanted, ask("free", max_tokens=5)], failed)
    assert [(piece.request_id, piece.error_kind) for piece in failed] == [("wide", "request")] * 2
    for piece in failed:
        assert str(piece.error).startswith("structured_outputs: the grammar cannot go on here")
        assert "fewer optional properties" in str(piece.error)
    assert len(found["free"][0].token_ids) > 0
    assert not [record for record in caplog.records if record.exc_info]


def test_an_answer_that_uses_up_a_form_ends_alone(engine: Engine) -> None:
    """Answers in the same form, running and later ones, are not touched; see the backend's tests."""
    terms = " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(5, 11))
    form = StructuredOutputsParams(grammar=f'start: ("ok ")~40 "done" | "x" T\nT: {terms}')
    bad = ask("bad", max_tokens=60, n=2, allowed_token_ids=[*b"xab"], seed=1, structured_outputs=form)
    good = ask("good", max_tokens=200, n=2, allowed_token_ids=[*b"ok done", EOS], seed=2, structured_outputs=form)
    for number in range(2):
        failed: list[TokenOutput] = []
        found = drive(engine, [good, bad, ask("free", max_tokens=5, ignore_eos=True)], failed)
        assert [(piece.request_id, piece.error_kind) for piece in failed] == [("bad", "request")] * 2, number
        for piece in failed:
            assert str(piece.error).startswith("structured_outputs: the grammar cannot go on here: a token needs more")
        assert [output.text for output in found["good"]] == ["ok " * 40 + "done"] * 2
        assert [output.finish_reason for output in found["good"]] == [FinishReason.STOP] * 2


@pytest.mark.parametrize("field", ["structured_outputs", "allowed_token_ids"])
def test_a_dead_end_begins_with_the_field(engine: Engine, field: str) -> None:
    form = {"structured_outputs": StructuredOutputsParams(regex="a+")} if field == "structured_outputs" else {}
    failed: list[TokenOutput] = []
    drive(engine, [ask("x", max_tokens=3, allowed_token_ids=[98], bad_words=[] if form else ["b"], **form)], failed)
    assert [piece.error_kind for piece in failed] == ["request"]
    assert str(failed[0].error).startswith(f"{field}: no token may be chosen")
