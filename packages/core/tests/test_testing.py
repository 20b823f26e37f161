# SPDX-License-Identifier: MIT
"""What stands in for the real thing: ScriptedEngine keeps the engine's contract however its script is cut."""

from __future__ import annotations

import asyncio
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core import InferenceEngine
from candle_vllm.core.engine.outputs import FinishReason, OutputCollector, TokenOutput
from candle_vllm.core.errors import (
    CandleVllmError,
    ChatTemplateError,
    EngineOverloadedError,
    InvalidParameterError,
    PromptTooLongError,
)
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing import ByteTokenizer, ScriptedEngine
from packages.core.tests.exact_sums import exact_sums


async def pieces_of(engine: ScriptedEngine, **params: object) -> list[TokenOutput]:
    return [piece async for piece in engine.stream("hi", SamplingParams(**{"max_tokens": 100, **params}))]


def cuts_of(text: str, points: list[int]) -> list[bytes]:
    data = text.encode()
    edges = [0, *sorted(point % (len(data) + 1) for point in points), len(data)]
    return [data[low:high] for low, high in itertools.pairwise(edges)]


@given(st.text(), st.booleans())
def test_byte_tokenizer_gives_text_back(text: str, special: bool) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text, special), skip_special_tokens=special) == text


@pytest.mark.parametrize("token", [-1, 260, 99_999])
def test_byte_tokenizer_refuses_ids_outside_its_vocabulary(token: int) -> None:
    for skip in (True, False):
        with pytest.raises(InvalidParameterError, match=f"there is no token {token}; ids run from 0 to 259"):
            ScriptedEngine().detokenize([97, token], skip)


def test_byte_tokenizer_knows_its_special_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("<|im_start|>a<|eos|>") == [256, 258, 97, 257]
    assert tokenizer.decode([256, 258, 97, 257]) == "a"
    assert tokenizer.decode([256, 258, 97, 257], skip_special_tokens=False) == "<|bos|><|im_start|>a<|eos|>"
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"


async def test_a_special_token_stands_where_its_characters_begin() -> None:
    pieces = await pieces_of(ScriptedEngine(["é<｜end｜>a"], special_tokens=["<｜end｜>"]), skip_special_tokens=False)
    (place, _), *_ = [each for piece in pieces for each in piece.special_tokens]
    assert "".join(piece.text for piece in pieces)[place:].startswith("<｜end｜>a")


@settings(deadline=None, max_examples=60)
@given(
    st.text(alphabet="abc é€😀", max_size=20),
    st.lists(st.integers(0, 100), max_size=8),
    st.sampled_from([None, "b", "ca", "abc", "€😀"]),
    st.integers(1, 30),
    st.booleans(),
)
async def test_text_does_not_depend_on_the_cuts(
    text: str, points: list[int], stop: str | None, max_tokens: int, keep: bool
) -> None:
    params = {"stop": stop, "max_tokens": max_tokens, "include_stop_str_in_output": keep}
    whole = await pieces_of(ScriptedEngine([text]), **params)
    cut = await pieces_of(ScriptedEngine(cuts_of(text, points)), **params)
    assert "".join(piece.text for piece in cut) == "".join(piece.text for piece in whole)
    assert [token for piece in cut for token in piece.token_ids] == [t for piece in whole for t in piece.token_ids]
    assert (cut[-1].finish_reason, cut[-1].stop_reason) == (whole[-1].finish_reason, whole[-1].stop_reason)
    shown = "".join(piece.text for piece in cut)
    if stop is not None and stop in text and cut[-1].stop_reason == stop:
        assert shown == text[: text.index(stop) + (len(stop) if keep else 0)]
    if stop is None and max_tokens > len(text.encode()):
        assert shown == text


async def test_ends_by_end_token_length_and_stop_token() -> None:
    engine = ScriptedEngine("abc")
    ended = await pieces_of(engine)
    assert (ended[-1].finish_reason, ended[-1].stop_reason) == (FinishReason.STOP, None)
    assert [piece.text for piece in ended] == ["a", "b", "c", ""]
    assert (await pieces_of(engine, max_tokens=3))[-1].finish_reason is FinishReason.LENGTH
    stopped = await pieces_of(engine, stop_token_ids=[ord("b")])
    assert "".join(piece.text for piece in stopped) == "a"
    assert stopped[-1].stop_reason == ord("b")
    repeated = await pieces_of(engine, ignore_eos=True, max_tokens=7)
    assert "".join(piece.text for piece in repeated) == "abcabc"  # the end token between them is special
    for stop, text in ((["b"], "abc"), (["c"], "ab")):  # as in the engine, "b" ends before the third token
        longer = await pieces_of(engine, stop=stop, min_tokens=2)
        assert "".join(piece.text for piece in longer) == text


async def test_sequences_interleave_and_may_differ() -> None:
    texts = iter(["abc", "xyz"])
    engine = ScriptedEngine(lambda prompt: prompt + next(texts))
    output = await engine.agenerate("P", SamplingParams(n=2, max_tokens=50))
    assert [sequence.text for sequence in output.outputs] == ["Pabc", "Pxyz"]
    pieces = [piece async for piece in ScriptedEngine("ab").stream("P", SamplingParams(n=2))]
    assert [piece.index for piece in pieces] == [0, 1] * 3


async def test_logprobs_are_consistent() -> None:
    pieces = await pieces_of(ScriptedEngine("ab"), logprobs=3, prompt_logprobs=1)
    for piece in pieces:
        assert piece.logprobs is not None
        for token, entry in zip(piece.token_ids, piece.logprobs, strict=True):
            assert entry.chosen.token_id == token
            assert entry.top[0] == entry.chosen
            values = [one.logprob for one in entry.top]
            assert values == sorted(values, reverse=True)
            assert sum(map(math.exp, values)) <= 1
    shown = pieces[0].prompt_logprobs
    assert shown is not None
    assert shown[0] is None
    assert [entry.chosen.token_id for entry in shown if entry] == [ord("h"), ord("i")]
    assert all(piece.prompt_logprobs is None for piece in pieces[1:])


async def test_pieces_add_up_in_the_collector() -> None:
    engine = ScriptedEngine("abc", num_cached_tokens=2)
    stream = engine.stream([1, 2, 3])
    collector = OutputCollector(stream.request)
    done = [collector.add(piece) async for piece in stream]
    assert done[-1]
    assert collector.result().text == "abc"
    assert engine.stats().finished == {"stop": 1}
    assert engine.stats().num_running == 0


async def test_closing_and_cancelling_abort() -> None:
    engine = ScriptedEngine("abc")
    never_begun = engine.stream("a", request_id="one")
    await never_begun.aclose()
    await never_begun.aclose()
    endless = SamplingParams(ignore_eos=True, max_tokens=4000)
    task = asyncio.create_task(engine.agenerate("a", endless, request_id="two"))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    finished = engine.stream("a", request_id="three")
    assert [piece async for piece in finished]
    await finished.aclose()
    assert engine.aborted == ["one", "two"]


async def test_refusals_and_scripted_failures() -> None:
    engine = ScriptedEngine(max_model_len=10, has_chat_template=False, submit_error=EngineOverloadedError("full"))
    with pytest.raises(EngineOverloadedError):
        engine.stream("a")
    engine.submit_error = None
    with pytest.raises(PromptTooLongError):
        engine.stream("abcdef", SamplingParams(max_tokens=4))
    with pytest.raises(InvalidParameterError):
        engine.stream([9999])
    with pytest.raises(InvalidParameterError):
        engine.stream([])
    with pytest.raises(ChatTemplateError):
        engine.apply_chat_template([{"role": "user", "content": "x"}])
    first = engine.stream("a", SamplingParams(max_tokens=1), request_id="twin")
    with pytest.raises(InvalidParameterError, match="twin"):
        engine.stream("a", SamplingParams(max_tokens=1), request_id="twin")
    del first  # as with the real engine, a stream that nobody holds is aborted
    assert engine.aborted == ["twin"]
    with pytest.raises(CandleVllmError, match="broken"):
        await ScriptedEngine(fail_after=1, failure="broken").agenerate("a")
    with pytest.raises(OSError, match="gone"):
        await pieces_of(ScriptedEngine(fail_after=1, failure=OSError("gone")))


def test_chat_template_is_chatml() -> None:
    engine = ScriptedEngine()
    messages = [{"role": "user", "content": "hi"}]
    assert engine.apply_chat_template(messages) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    open_end = engine.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert open_end == "<|im_start|>user\nhi"
    assert engine.template_calls[0].messages == messages


def test_exact_sums_give_the_same_bits_alone_and_in_company(toy_model: Path) -> None:
    prompts = [[(7 * i + n) % 256 for i in range(3 + 7 * n)] for n in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=1)

    def numbers(**settings: Any) -> list[list[tuple[int, float]]]:
        with InferenceEngine(str(toy_model), op_by_op=True, **settings) as engine:
            outputs = engine.generate(prompts, params, use_tqdm=False)
        return [[(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()] for output in outputs]

    with exact_sums():
        alone = numbers(max_num_seqs=1)
        assert numbers(max_num_seqs=4) == alone
        assert numbers(max_num_seqs=3, max_num_batched_tokens=5) == alone
    rounded = [[(token, pytest.approx(value, abs=1e-4)) for token, value in row] for row in alone]
    plain = numbers(max_num_seqs=1)
    assert plain == rounded, "what torch computes by itself, but for the last bits"
    assert plain != alone
