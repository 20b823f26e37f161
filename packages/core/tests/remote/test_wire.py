# SPDX-License-Identifier: MIT
"""What is written is read as it was, and what is not a message is refused."""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from candle_vllm.core import EngineConfig, SamplingParams, StructuredOutputsParams, errors
from candle_vllm.core.engine.outputs import (
    FinishReason,
    PositionLogprobs,
    PromptProgress,
    RequestMetrics,
    TokenLogprob,
    TokenOutput,
)
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.stats import EngineStats
from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError, InvalidParameterError, RequestError
from candle_vllm.core.remote import payloads, wire
from candle_vllm.core.remote.link import RemoteLink
from candle_vllm.core.remote.serving import Outbox
from candle_vllm.core.remote.wire import (
    Check,
    Ended,
    FromChild,
    MalformedMessageError,
    Pieces,
    Reader,
    Refused,
    Submit,
    ToChild,
    describe_error,
    encode,
    make_error,
)
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.inputs import ImageInput

STATS = EngineStats(
    num_running=1,
    num_waiting=0,
    num_blocks=4,
    num_free_blocks=2,
    block_size=8,
    prompt_tokens=3,
    cached_prompt_tokens=0,
    generation_tokens=9,
    finished={"stop": 2},
    preemptions=0,
    steps=12,
)


def through(message: Any, kinds: Any) -> Any:
    return Reader(kinds).read(encode(message))


@contextmanager
def linked(*names: str) -> Iterator[tuple[RemoteLink, list[bytes]]]:
    """A link with these requests, whose tickets are their indices; the list has the messages of each step."""
    context, messages = zmq.Context(), list[bytes]()
    socket, alive = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    process: Any = SimpleNamespace(
        socket=socket, alive=alive, send=lambda _: None, received=lambda _: messages, has_more=lambda: True
    )
    ready: Any = SimpleNamespace(info=SimpleNamespace(max_model_len=9), max_step_tokens=9, stats=STATS)
    link = RemoteLink(process, ready, SimpleNamespace(prepare=None))  # type: ignore[arg-type]
    for ticket, name in enumerate(names):
        request = GenerationRequest(request_id=name, prompt_token_ids=(1, 2, 3), params=SamplingParams())
        link.add([payloads.Payload(request, str(ticket), b"")])
    link.wake()
    yield link, messages
    link.close()
    context.destroy()


def test_the_parent_s_tokenizer_is_the_child_s() -> None:
    """With the marks that only a GGUF file's ids name, and without types of a pair's texts, if the model has none."""
    vocabulary = {text: index for index, text in enumerate(["<unk>", "a", "b", "<A>", "<B>"])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    own = Tokenizer(backend, bos_token_id=1, types_pairs=False, named_ids={"fim_pre": 3, "fim_suf": 4})
    own.cover(9)
    sent = wire.Reader(wire.TokenizerParts).read(encode(wire.TokenizerParts.of(own))).tokenizer()
    assert (sent.vocab_size, sent.bos_token_id, sent.types_pairs) == (9, 1, False)
    assert sent.infill == own.infill is not None


def test_a_refused_request_has_no_outputs() -> None:
    """Those that came in the same round are dropped, because nobody waits for them any more."""
    refused = list[str]()
    outputs = [TokenOutput(request_id=ticket, index=0, num_prompt_tokens=3) for ticket in "0100"]
    refusal = Refused("0", describe_error(InvalidParameterError("no", "prompt_logprobs")))
    with linked("refused", "other") as (link, messages):
        messages[:] = [encode(each) for each in (Pieces(outputs[:3]), refusal, Pieces(outputs[3:]))]
        link.on_refused = lambda request_id, _: refused.append(request_id)
        assert [output.request_id for output in link.step()] == ["other"]
        assert refused == ["refused"]


def test_a_report_of_progress_is_no_first_output() -> None:
    """The router counts a prompt as computed when its first output arrives."""
    begun = list[str]()
    progress = TokenOutput(request_id="0", index=0, num_prompt_tokens=3, progress=PromptProgress(1, 0.5))
    with linked("a") as (link, messages):
        link.on_begun = begun.append
        messages[:] = [encode(Pieces([progress]))]
        assert [output.progress for output in link.step()] == [progress.progress]
        assert not begun
        messages[:] = [encode(Pieces([TokenOutput(request_id="0", index=0, num_prompt_tokens=3)] * 2))]
        link.wake()
        assert len(link.step()) == 2
        assert begun == ["a"]


def test_outputs_before_the_end_of_the_engine_are_delivered() -> None:
    last = TokenOutput(request_id="0", index=0, num_prompt_tokens=3, finish_reason=FinishReason.STOP)
    with linked("a", "b") as (link, messages):
        messages[:] = [encode(Pieces([last])), encode(Ended("no memory"))]
        assert [output.request_id for output in link.step()] == ["a"]
        messages.clear()
        link.wake()
        with pytest.raises(EngineDeadError, match="no memory"):
            link.step()


def test_the_reason_that_a_process_sent_before_its_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked("a") as (link, messages):
        fate = Mock(side_effect=EngineDeadError("the engine process ended"))
        for name, value in (("has_more", lambda: False), ("alive", link._bell.descriptor), ("check", fate)):
            monkeypatch.setattr(link._process, name, value, raising=False)
        messages[:] = [encode(Ended("no memory"))]
        link.step()
        monkeypatch.setattr(link._process, "send", fate)
        for act in (link.step, link.reset_prefix_cache, lambda: link.abort("a")):
            with pytest.raises(EngineDeadError, match="no memory"):
                act()


def test_a_piece_with_everything_in_it() -> None:
    entry = TokenLogprob(5, -0.25, 1, "x", b"\xff")
    piece = TokenOutput(
        request_id="1",
        index=2,
        text="\ufffd é",
        token_ids=(1, 2),
        special_tokens=((3, 4),),
        logprobs=(PositionLogprobs(entry, (entry, entry)),),
        prompt_logprobs=(None, PositionLogprobs(entry, ())),
        finish_reason=FinishReason.STOP,
        stop_reason="x",
        metrics=RequestMetrics(arrival_time=1.5, finished_time=2.5),
        pooled=array("f", [0.5, -1.25]),
    )
    assert through(Pieces([piece], STATS), FromChild) == Pieces([piece], STATS)


def test_parameters_of_any_kind_of_sequence_and_number() -> None:
    params = SamplingParams(
        temperature=np.float64(0.5),
        stop=("a",),
        allowed_token_ids=range(3),
        logit_bias={4: np.float64(1.0)},
        seed=(1 << 64) - 1,
    )
    request = GenerationRequest(request_id="1", prompt_token_ids=[1], params=params)
    read = through(Submit(request), ToChild).request.params
    assert (read.temperature, read.stop, read.allowed_token_ids) == (0.5, ["a"], [0, 1, 2])
    assert (read.logit_bias, read.seed) == ({4: 1.0}, (1 << 64) - 1)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    for kinds in (ToChild, FromChild):
        try:
            Reader(kinds).read(data)
        except MalformedMessageError:
            continue


@given(st.data())
def test_damaged_messages_are_read_or_refused(data: st.DataObject) -> None:
    form = StructuredOutputsParams(choice=["a", "b"])
    request = GenerationRequest(request_id="1", prompt_token_ids=[1, 2], params=SamplingParams(structured_outputs=form))
    frame = bytearray(encode(data.draw(st.sampled_from([Submit(request), Check(3, form)]))))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] = data.draw(st.integers(0, 255))
    try:
        read = Reader(ToChild).read(bytes(frame))
    except MalformedMessageError:
        return
    assert isinstance(read, ToChild)


def test_every_error_comes_back_as_itself() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CandleVllmError)]
    assert len(kinds) > 12
    for kind in kinds:
        error = kind("what happened \ud800")
        if isinstance(error, RequestError):
            error = kind("what happened", "field")
            assert make_error(describe_error(error)).param == "field"  # type: ignore[attr-defined]
        if isinstance(error, ConfigError):
            error = kind("what happened", "setting")
            assert make_error(describe_error(error)).setting == "setting"  # type: ignore[attr-defined]
        made = make_error(describe_error(error))
        assert type(made) is kind
        assert str(made).startswith("what happened")


def test_an_unknown_class_becomes_the_nearest_known_one() -> None:
    class SpecialError(errors.ModelLoadError):
        pass

    assert type(make_error(describe_error(SpecialError("x")))) is errors.ModelLoadError
    assert type(make_error(wire.WireError("Exception", "x"))) is CandleVllmError


def test_a_configuration_comes_back_as_itself() -> None:
    config = EngineConfig(model="m", tokenizer=Path("/a"), seed=3, kv_fraction=0.5, hf_token="secret")
    assert EngineConfig(**config.plain()) == config


class FakeSocket:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, data: bytes) -> None:
        self.sent.append(Reader(FromChild).read(data))


class FakeEngine:
    has_work = True

    def stats(self) -> EngineStats:
        return STATS


def test_a_step_is_one_message_and_a_piece_that_fits_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    socket = FakeSocket()
    outbox, engine = Outbox(socket), FakeEngine()  # type: ignore[arg-type]
    small = [TokenOutput(request_id=str(number), text="x") for number in range(5)]
    for piece in small:
        outbox.put(piece)
    assert outbox.flush(engine) == []  # type: ignore[arg-type]
    assert socket.sent == [Pieces(small, STATS)]
    assert outbox.flush(engine) == []  # type: ignore[arg-type]
    assert len(socket.sent) == 1  # neither pieces nor news

    monkeypatch.setattr(wire, "MAX_FRAME", 1000)
    large = TokenOutput(request_id="7", text="x" * 2000)
    for piece in (*small[:2], large):
        outbox.put(piece)
    assert outbox.flush(engine) == ["7"]  # type: ignore[arg-type]
    assert socket.sent[1:3] == [Pieces([piece]) for piece in small[:2]]
    refusal = socket.sent[3]
    assert isinstance(refusal, Refused)
    assert refusal.ticket == "7"
    assert isinstance(make_error(refusal.error), RequestError)


def test_images_that_are_too_many_for_a_message_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME", 1000)
    image = ImageInput(key=bytes(32), tiles=bytes(3 * 400), sizes=((20, 20),), whole=(20, 20))
    request = GenerationRequest(request_id="1", prompt_token_ids=(1,), params=SamplingParams(), images=(image, image))
    with pytest.raises(InvalidParameterError, match="image: the 2 images of the request take") as caught:
        payloads._written(Submit(request))
    assert caught.value.param == "image"
