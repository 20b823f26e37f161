"""Conversations one or many, pieces without an event loop, and what is said of a wrong message."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import (
    EngineDeadError,
    InferenceEngine,
    InvalidParameterError,
    RequestAbortedError,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


def make(folder: Path, **settings: Any) -> InferenceEngine:
    return InferenceEngine(str(folder), threads=1, enforce_eager=True, **settings)


@pytest.fixture(scope="module")
def engine(toy_model: Path) -> Iterator[InferenceEngine]:
    with make(toy_model, block_size=8) as made:
        yield made


def test_a_list_of_conversations_gives_a_list_of_outputs(
    engine: InferenceEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    conversations = [[USER], [{"role": "system", "content": "s"}, {"role": "user", "content": "what?"}]]
    prompts = [engine.tokenize(engine.apply_chat_template(each), False) for each in conversations]
    outputs = engine.chat(conversations, [GREEDY, SamplingParams(max_tokens=3, seed=1, ignore_eos=True)])
    assert "prompts: 100%" in capsys.readouterr().err
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    assert [len(output.token_ids) for output in outputs] == [12, 3]
    assert len(engine.chat([[USER]], GREEDY, use_tqdm=False)) == 1
    assert engine.chat([USER], GREEDY).token_ids == outputs[0].token_ids
    assert "prompts" not in capsys.readouterr().err
    with pytest.raises(InvalidParameterError, match="2 prompts and 1 sampling_params"):
        engine.chat(conversations, [GREEDY])


def test_open_max_tokens_go_to_the_end_of_the_turn_in_lists_and_streams(engine: InferenceEngine) -> None:
    open_end = SamplingParams(temperature=0, ignore_eos=True)
    length = engine.model_info.max_model_len
    (output,) = engine.chat([[USER]], [open_end], use_tqdm=False)
    assert len(output.prompt_token_ids) + len(output.token_ids) == length
    with engine.chat_stream([USER], open_end) as pieces:
        assert tuple(token for piece in pieces for token in piece.token_ids) == output.token_ids


@pytest.mark.parametrize(
    ("messages", "place", "said"),
    [
        ("hi", "messages", "must be a list of messages, not str"),
        (USER, "messages", "must be a list of messages, not dict"),
        ([], "messages", "must hold at least one message"),
        ([USER, "hi"], "messages[1]", "must be an object with role and content, not str"),
        ([{"content": "x"}], "messages[0].role", "is missing"),
        ([{"role": 7, "content": "x"}], "messages[0].role", "must be a text, not int"),
        ([USER, USER, {"role": "user", "content": 5}], "messages[2].content", "must be a list of parts, or a text"),
        ([{"role": "user"}], "messages[0].content", "is missing, and there are no tool_calls"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "must be a text, not None"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]", "is of type 'image_url'"),
        ([{"role": "user", "content": [1]}], "messages[0].content[0]", "must be an object with type and text"),
        ([{**CALL, "tool_calls": "f"}], "messages[0].tool_calls", "must be a list of calls, not str"),
        ([{**CALL, "tool_calls": ["f"]}], "messages[0].tool_calls[0]", "must be an object, not str"),
        ([[USER], [USER, {"role": "user"}]], "messages[1][1].content", "is missing"),
        ([[USER], []], "messages[1]", "must hold at least one message"),
        ([[USER], USER], "messages[1]", "must be a list of messages, not dict"),
    ],
)
def test_a_wrong_message_is_named_by_its_place(engine: InferenceEngine, messages: Any, place: str, said: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        engine.chat(messages, GREEDY)
    assert str(caught.value).startswith(f"{place}: {said}")
    assert caught.value.param == place


@pytest.mark.parametrize("messages", [[USER, CALL], [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]])
def test_what_templates_take_is_let_by(engine: InferenceEngine, messages: Any) -> None:
    assert engine.apply_chat_template(messages)


def test_one_conversation_where_one_is_taken(engine: InferenceEngine) -> None:
    for call in (engine.apply_chat_template, engine.chat_stream):
        with pytest.raises(InvalidParameterError, match="one conversation, not a list"):
            call([[USER]])  # type: ignore[arg-type, list-item]


def test_pieces_without_a_loop_add_up(engine: InferenceEngine) -> None:
    whole = engine.generate("abc", GREEDY, use_tqdm=False)[0]
    pieces = list(engine.generate_stream("abc", GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert len(pieces) > 1
    assert pieces[-1].finish_reason == whole.finish_reason
    answer = engine.chat([USER], GREEDY)
    with engine.chat_stream([USER], GREEDY) as stream:
        assert "".join(piece.text for piece in stream) == answer.text
        assert list(stream) == []


def test_all_sequences_of_a_request_come(engine: InferenceEngine) -> None:
    params = SamplingParams(n=2, max_tokens=5, seed=3, ignore_eos=True)
    pieces = list(engine.generate_stream("abc", params))
    assert {piece.index for piece in pieces if piece.finished} == {0, 1}


def aborted(engine: InferenceEngine) -> int:
    return engine.stats().finished.get("abort", 0)


@pytest.mark.parametrize("how", ["close", "with", "drop", "break", "never read"])
def test_an_early_end_aborts(engine: InferenceEngine, how: str) -> None:
    before = aborted(engine)
    stream = engine.generate_stream("abc", LONG)
    if how == "close":
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with stream:
            next(stream)
    elif how == "break":
        for _ in stream:
            break
    del stream
    gc.collect()
    end = time.monotonic() + 20
    while aborted(engine) == before and time.monotonic() < end:
        time.sleep(0.01)
    assert aborted(engine) == before + 1
    assert engine.stats().num_running == 0


def test_a_wrong_request_raises_at_once(engine: InferenceEngine) -> None:
    with pytest.raises(InvalidParameterError, match="token id"):
        engine.generate_stream([1, "x"], GREEDY)  # type: ignore[list-item]


def test_a_closed_engine_ends_the_pieces(toy_model: Path) -> None:
    with make(toy_model) as engine:
        stream = engine.generate_stream("abc", LONG)
        next(stream)
    with pytest.raises((RequestAbortedError, EngineDeadError)):
        list(stream)
    assert list(stream) == []
    with pytest.raises(EngineDeadError):
        engine.generate_stream("abc", LONG)
