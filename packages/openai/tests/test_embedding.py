# SPDX-License-Identifier: MIT
"""Vectors, scores and rankings over a scripted engine, judged by the official client's types."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from array import array
from functools import partial
from typing import Any

import msgspec
import numpy as np
import openai.types as official
import pytest
from openai.types.embedding_create_params import EmbeddingCreateParams

from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.outputs import EmbeddingOutput
from candle_vllm.core.errors import (
    CandleVllmError,
    EngineDeadError,
    EngineOverloadedError,
    EngineSleepingError,
    InvalidParameterError,
    PromptTooLongError,
    RequestError,
)
from candle_vllm.core.pooling import PoolingParams
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.testing.scripted_engine import SIZE
from candle_vllm.openai import (
    GenerationFailedError,
    InvalidBodyError,
    ModelNotServedError,
    OpenAIAdapter,
    UnknownParameterError,
    UnsupportedParameterError,
    embedding,
    to_error,
    to_json_bytes,
)
from candle_vllm.openai.embedding import (
    EmbeddingAdapter,
    octets,
    parse_classify_request,
    parse_embedding_request,
    parse_pooling_request,
    parse_rerank_request,
    parse_score_request,
)
from candle_vllm.openai.fair_threads import asker
from candle_vllm.openai.json_body import parse_body
from candle_vllm.openai.protocol.cohere import CohereEmbedRequest, cohere_answer
from candle_vllm.openai.protocol.embeddings import (
    MAX_DESCRIBED,
    EmbeddingRequest,
    LlamaEmbedding,
    ModerationRequest,
    moderated,
)
from candle_vllm.openai.protocol.pooling import (
    MAX_INPUTS,
    MAX_PAIRS,
    MAX_POOLED_TOKENS,
    POOLING_REFUSED_FIELDS,
)
from candle_vllm.openai.serving import WorkerThreads
from tests.waiting import PATIENCE


async def embed(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    body = to_json_bytes(await EmbeddingAdapter(engine).embed(parse_embedding_request(fields)))
    if fields.get("encoding_format") != "base64":
        official.CreateEmbeddingResponse.model_validate_json(body, strict=True)
    return json.loads(body)


async def score(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    return json.loads(to_json_bytes(await EmbeddingAdapter(engine).score(parse_score_request(fields))))


async def rerank(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    return json.loads(to_json_bytes(await EmbeddingAdapter(engine).rerank(parse_rerank_request(fields))))


# ---- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("ab", [[256, 97, 98]]),
        (["ab"], [[256, 97, 98]]),
        (["ab", "c"], [[256, 97, 98], [256, 99]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
async def test_every_form_of_input(given: Any, texts: list[list[int]]) -> None:
    engine = ScriptedEngine()
    answer = await embed(engine, input=given, model="scripted")
    assert engine.pooling_calls[0].inputs == texts
    assert [entry["index"] for entry in answer["data"]] == list(range(len(texts)))
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    assert (answer["object"], answer["model"]) == ("list", "scripted")
    count = sum(map(len, texts))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}


BYTES = {"float32": "f4", "float16": "f2", "bfloat16": "u2", "fp8_e4m3": "u1", "fp8_e5m2": "u1"}


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("order", ["native", "little", "big"])
async def test_vectors_are_bytes_of_the_requested_type(dtype: str, order: str) -> None:
    """Against torch; in a body of bytes too, where the header says which vector is where."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}.get(dtype, dtype))
    engine = ScriptedEngine()
    plain = await embed(engine, input=["one", "two"])
    wanted = [torch.tensor(each["embedding"]).to(kind).float() for each in plain["data"]]
    asked = {"input": ["one", "two"], "embed_dtype": dtype, "endianness": order}
    packed = await embed(engine, encoding_format="base64", **asked)
    given = [base64.b64decode(each["embedding"]) for each in packed["data"]]

    def read(raw: bytes) -> Any:
        elements = np.frombuffer(raw, (">" if order == "big" else "<") + BYTES[dtype])
        return torch.from_numpy(elements.astype(elements.dtype.newbyteorder("="))).view(kind).float()

    assert all(torch.equal(read(raw), numbers) for raw, numbers in zip(given, wanted, strict=True))
    for form in ("bytes", "bytes_only"):
        request = parse_embedding_request({**asked, "encoding_format": form})
        made = await EmbeddingAdapter(engine).embed(request)
        body, headers = octets(request, made)
        assert body == b"".join(given)
    assert not headers
    _, headers = octets(parse_embedding_request({**asked, "encoding_format": "bytes"}), made)
    told = json.loads(headers["metadata"])
    assert {name: told[name] for name in ("model", "usage")} == {name: plain[name] for name in ("model", "usage")}
    places = [(each["index"], each["start"], each["end"], each["shape"]) for each in told["data"]]
    size = len(given[0])
    assert places == [(0, 0, size, [SIZE]), (1, size, 2 * size, [SIZE])]
    assert {(each["embed_dtype"], each["endianness"]) for each in told["data"]} == {(dtype, order)}


async def test_jinas_name_of_the_format_is_taken() -> None:
    """`embedding_type` of Jina's API is a format, and the same name of the Rust candle-vllm's is a pooling."""
    engine = ScriptedEngine()
    for form in ("float", "base64"):
        wanted = await embed(engine, input="one", encoding_format=form)
        for given in ({"embedding_type": form}, {"embedding_type": form, "encoding_format": form}):
            asked = parse_embedding_request({"input": "one", **given})
            made = json.loads(to_json_bytes(await EmbeddingAdapter(engine).embed(asked)))
            assert made["data"] == wanted["data"]
            assert asked.pooling_params() == PoolingParams()
    with pytest.raises(InvalidParameterError, match="and encoding_format") as caught:
        parse_embedding_request({"input": "one", "embedding_type": "base64", "encoding_format": "float"})
    assert caught.value.param == "embedding_type"
    with pytest.raises(InvalidParameterError, match="must be one of 'mean'"):
        parse_embedding_request({"input": "one", "embedding_type": ["float"]})


def test_what_describes_no_bytes_is_refused() -> None:
    for name, value in (("embed_dtype", "float16"), ("endianness", "big")):
        with pytest.raises(RequestError, match="needs encoding_format base64, bytes or bytes_only") as caught:
            parse_embedding_request({"input": "a", name: value})
        assert caught.value.param == name
    assert parse_embedding_request({"input": "a", "embed_dtype": "float32", "endianness": "native"})
    many = {"input": ["a"] * (MAX_DESCRIBED + 1)}
    with pytest.raises(RequestError, match="bytes describes 256 inputs at most"):
        parse_embedding_request({**many, "encoding_format": "bytes"})
    assert parse_embedding_request({**many, "encoding_format": "bytes_only"})


async def test_base64_holds_the_same_numbers() -> None:
    engine = ScriptedEngine()
    floats = await embed(engine, input=["one", "two"], encoding_format="float")
    packed = await embed(engine, input=["one", "two"], encoding_format="base64")
    for plain, other in zip(floats["data"], packed["data"]):
        numbers = array("f")
        numbers.frombytes(base64.b64decode(other["embedding"], validate=True))
        assert numbers.tolist() == plain["embedding"]
        assert len(numbers) == SIZE


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({}, PoolingParams()),
        ({"dimensions": 4}, PoolingParams(dimensions=4)),
        ({"pooling": "cls", "normalize": False}, PoolingParams(pooling="cls", normalize=False)),
        ({"embedding_type": "last"}, PoolingParams(pooling="last")),
        ({"embedding_type": "mean", "pooling": "mean"}, PoolingParams(pooling="mean")),
        ({"dimensions": None, "user": "u", "pooling": None}, PoolingParams()),
    ],
)
async def test_fields_reach_the_engine(fields: dict[str, Any], params: PoolingParams) -> None:
    engine = ScriptedEngine()
    answer = await embed(engine, input="x", request_id="mine", priority=3, **fields)
    call = engine.pooling_calls[0]
    assert (call.params, call.priority, call.request_id) == (params, 3, "embd-mine")
    assert answer["id"] == "embd-mine"
    assert len(answer["data"][0]["embedding"]) == (params.dimensions or SIZE)


async def test_special_tokens_can_be_left_out() -> None:
    engine = ScriptedEngine()
    await embed(engine, input="a", add_special_tokens=False)
    assert engine.pooling_calls[0].inputs == [[97]]


def test_every_official_field_is_known() -> None:
    assert set(EmbeddingCreateParams.__annotations__) <= set(EmbeddingRequest.model_fields)


INPUT_FAULTS: list[tuple[Any, str, str]] = [
    ("", "input", "input must not be empty"),
    ([], "input", "input must not be empty"),
    ([""], "input.0", "must not be empty"),
    (["a", ""], "input.1", "must not be empty"),
    ([[]], "input.0", "must not be empty"),
    ([[1], []], "input.1", "must not be empty"),
    (["a", 1], "input.1", "must be a string"),
    ([1, "a"], "input.1", "must be an integer"),
    ([[1], "a"], "input.1", "must be a list"),
    ([[1, "a"]], "input.0.1", "must be an integer"),
    ([1.5], "input.0", "must be an integer"),
    ([True], "input.0", "must be an integer"),
    ([-1], "input.0", "must be at least 0"),
    ([1 << 31], "input.0", "must be at most"),
    (5, "input", "must be a string or a list"),
    (None, "input", "must be a string or a list"),
    ({}, "input", "must be a string or a list"),
    ([None], "input.0", "must be a string, not null"),
    ([None, "a"], "input.0", "must be a string, not null"),
    ([{"text": "a"}], "input.0", "must be a string, not an object"),
    (["a"] * (MAX_INPUTS + 1), "input", f"must have at most {MAX_INPUTS} entries"),
]


@pytest.mark.parametrize(("given", "param", "message"), INPUT_FAULTS)
def test_wrong_inputs_name_their_place(given: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        parse_embedding_request({"input": given})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "kind"),
    [
        ({"dimensions": 0}, "dimensions", InvalidParameterError),
        ({"dimensions": "8"}, "dimensions", InvalidParameterError),
        ({"dimensions": 8.0}, "dimensions", InvalidParameterError),
        ({"dimensions": 1 << 40}, "dimensions", InvalidParameterError),
        ({"encoding_format": "int8"}, "encoding_format", InvalidParameterError),
        ({"pooling": "max"}, "pooling", InvalidParameterError),
        ({"pooling": "mean", "embedding_type": "last"}, "embedding_type", InvalidParameterError),
        ({"normalize": 1}, "normalize", InvalidParameterError),
        ({"request_id": "a b"}, "request_id", InvalidParameterError),
        ({"priority": 1 << 40}, "priority", InvalidParameterError),
        ({"truncate": "START"}, "truncate", InvalidParameterError),
        ({"return_multivector": True, "pooling": "mean"}, "return_multivector", InvalidParameterError),
        ({"normalized": True, "normalize": False}, "normalized", InvalidParameterError),
        ({"normalized": True, "use_activation": False}, "use_activation", InvalidParameterError),
        ({"use_activation": True, "normalize": False}, "use_activation", InvalidParameterError),
        ({"truncate": True, "truncate_prompt_tokens": 1}, "truncate", InvalidParameterError),
        ({"embed_dtype": "float16"}, "embed_dtype", InvalidParameterError),
        ({"padding": "max_length"}, "padding", UnsupportedParameterError),
        ({"dimension": 8}, "dimension", UnknownParameterError),
        ({"temperature": 1}, "temperature", UnknownParameterError),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], param: str, kind: type[RequestError]) -> None:
    with pytest.raises(kind, match=param) as caught:
        parse_embedding_request({"input": "a", **fields})
    assert caught.value.param == param


@pytest.mark.parametrize("name", ["normalize", "normalized", "use_activation"])
def test_three_names_say_whether_a_vector_is_normalised(name: str) -> None:
    assert parse_embedding_request({"input": "a"}).pooling_params().normalize is None
    for value in (True, False):
        assert parse_embedding_request({"input": "a", name: value}).pooling_params().normalize is value


def test_values_that_ask_for_nothing_may_stand() -> None:
    neutral = {"truncate": False, "embed_dtype": "float32", "endianness": "little", "truncate_prompt_tokens": None}
    assert parse_embedding_request({"input": "a", **neutral}).inputs == ["a"]
    pair = {"text_1": "a", "text_2": "b", "encoding_format": "float"}  # as in vLLM's documentation
    assert parse_score_request(pair).pairs == [("a", "b")]
    with pytest.raises(UnsupportedParameterError, match="scores are numbers"):
        parse_score_request(pair | {"encoding_format": "base64"})


async def test_texts_that_are_too_long_are_cut_where_that_is_asked_for() -> None:
    """vLLM's `truncate_prompt_tokens`: of vectors the end is taken away; -1 leaves as much as the model takes."""
    engine = ScriptedEngine(max_model_len=16)
    long = list(range(20, 60))
    for given, tokens in ((3, 3), (-1, 16)):
        for side, kept in ((None, long[:tokens]), ("right", long[:tokens]), ("left", long[-tokens:])):
            made = await embed(engine, input=[long, [5]], truncate_prompt_tokens=given, truncation_side=side)
            assert made["usage"]["prompt_tokens"] == tokens + 1
            assert made["data"][0] == (await embed(engine, input=kept))["data"][0]
    assert (await embed(engine, input="a" * 4000, truncate_prompt_tokens=4))["usage"]["prompt_tokens"] == 4
    for side, kept in (("left", "ef"), ("right", "ab")):  # the token that begins a text remains
        made = await embed(engine, input="abcdef", truncate_prompt_tokens=3, truncation_side=side)
        assert made["data"][0] == (await embed(engine, input=kept))["data"][0]
    with pytest.raises(InvalidParameterError, match="smaller truncation size") as caught:
        await embed(engine, input="a", truncate_prompt_tokens=17)
    assert caught.value.param == "truncate_prompt_tokens"


async def test_a_conversation_that_is_too_long_is_cut_like_a_text() -> None:
    engine = ScriptedEngine(max_model_len=16)
    whole = {"messages": [{"role": "user", "content": "abcdefghijklmnopqrstuvwxyz"}]}
    text = engine.render_messages(whole["messages"], add_generation_prompt=False)
    ids = engine.tokenize(text, add_special_tokens=False)
    for more in ({"truncate": True}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 16}):
        for side, kept in ((None, ids[:16]), ("right", ids[:16]), ("left", ids[-16:])):
            await OpenAIAdapter(engine).embed({**whole, **more, "truncation_side": side})
            (prompt,) = engine.pooling_calls[-1].inputs
            assert list(prompt["prompt_token_ids"]) == kept
    with pytest.raises(InvalidParameterError, match="smaller truncation size"):
        await OpenAIAdapter(engine).embed({**whole, "truncate_prompt_tokens": 17})


async def test_a_conversation_needs_a_template() -> None:
    """The same words as for a chat would send the caller to the route that was asked."""
    adapter = OpenAIAdapter(ScriptedEngine(tasks=("embed", "score"), has_chat_template=False))
    with pytest.raises(
        RequestError, match="has no chat template: send input, or start it with --chat-template"
    ) as caught:
        await adapter.embed({"messages": [{"role": "user", "content": "Hi"}]})
    assert caught.value.param == "messages"


def test_a_body_is_one_object() -> None:
    for body in (b"[]", b"{", b'{"input": "a", "input": "b"}', b"\xff"):
        with pytest.raises(InvalidBodyError):
            parse_embedding_request(body)
    with pytest.raises(InvalidParameterError, match="input is required"):
        parse_embedding_request(b"{}")


async def test_errors_of_the_engine_name_the_input() -> None:
    engine = ScriptedEngine(max_model_len=8)
    with pytest.raises(
        PromptTooLongError, match="input 1: the text has 10 tokens and the model takes at most 8"
    ) as caught:
        await embed(engine, input=["a", "a" * 9])
    assert caught.value.param == "input.1"
    with pytest.raises(PromptTooLongError, match=r"^the text has 10 tokens") as caught:
        await embed(engine, input="a" * 9)
    assert caught.value.param == "input"
    with pytest.raises(InvalidParameterError, match="token id 5000 is out of vocabulary") as wrong:
        await embed(engine, input=[[1], [5000]])
    assert wrong.value.param == "input.1"
    with pytest.raises(InvalidParameterError, match="17 and the model's vectors have 16") as wrong:
        await embed(engine, input="a", dimensions=17)
    assert wrong.value.param == "dimensions"


async def test_too_many_tokens_in_all() -> None:
    engine = ScriptedEngine(max_model_len=1 << 20)
    text = "a" * (MAX_POOLED_TOKENS // 4)
    with pytest.raises(InvalidParameterError, match=r"more than 1048576 tokens in all \(with text 3\)"):
        await embed(engine, input=[text] * 5)
    assert not engine.pooling_calls


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right"), [("text_1", "text_2"), ("queries", "items"), ("queries", "documents"), ("data_1", "data_2")]
)
async def test_every_name_of_the_two_sides(left: str, right: str) -> None:
    engine = ScriptedEngine(tasks=("score",))
    answer = await score(engine, **{left: "ab", right: ["ab", "xy"]})
    assert engine.pooling_calls[0].inputs == [("ab", "ab"), ("ab", "xy")]
    assert [(entry["index"], entry["score"], entry["object"]) for entry in answer["data"]] == [
        (0, 1.0, "score"),
        (1, pytest.approx(1 / 3), "score"),
    ]
    assert answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert answer["object"] == "list"


async def test_as_many_on_both_sides() -> None:
    engine = ScriptedEngine()
    answer = await score(engine, text_1=["a", "b"], text_2=["a", "c"], request_id="r")
    assert engine.pooling_calls[0].inputs == [("a", "a"), ("b", "c")]
    assert answer["data"][0]["score"] == pytest.approx(1.0)
    assert answer["id"] == "score-r"
    assert len((await score(engine, text_1="a", text_2="b"))["data"]) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text_1"), ({"text_1": "a"}, "text_1"), ({"items": "a"}, "items"),
        ({"text_1": "a", "items": "b"}, "items"), ({"text_1": "a", "text_2": "b", "items": "c"}, "items"),
        ({"text_1": ["a", "b"], "text_2": "c"}, "text_1"), ({"text_1": ["a", "b"], "text_2": ["c"] * 3}, "text_1"),
        ({"text_1": "", "text_2": "b"}, "text_1"), ({"text_1": "a", "text_2": ["b", ""]}, "text_2.1"),
        ({"text_1": "a", "text_2": []}, "text_2"), ({"text_1": "a", "text_2": [1]}, "text_2.0"),
        ({"text_1": 5, "text_2": "b"}, "text_1"), ({"text_1": "a", "text_2": ["b"] * (MAX_PAIRS + 1)}, "text_2"),
        ({"text_1": "a", "text_2": "b", "activation": False}, "activation"),
        ({"text_1": "a", "text_2": "b", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"text_1": "a", "text_2": "b", "truncation_side": "left"}, "truncation_side"),
    ],
)  # fmt: skip
def test_wrong_pairs_name_their_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_score_request(fields)
    assert caught.value.param == param


async def test_a_pair_that_is_too_long_is_named() -> None:
    engine = ScriptedEngine(max_model_len=8, tasks=("score",))
    with pytest.raises(PromptTooLongError, match="input 1: the text has 12 tokens") as caught:
        await score(engine, text_1="a", text_2=["b", "b" * 9])
    assert caught.value.param == "text_2.1"


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"truncate_prompt_tokens": 6}, ["abc", "xyz"]),  # both texts of this tokenizer have an end token
        ({"truncate_prompt_tokens": 3}, ["a", "x"]),
        ({"truncate_prompt_tokens": -1}, ["abcdefghijk", "xyz"]),
        ({"max_tokens_per_doc": 2}, ["ab", "xy"]),
        ({"max_tokens_per_doc": 5, "truncate_prompt_tokens": 6}, ["abc", "xyz"]),
    ],
)
async def test_texts_that_are_too_long_lose_their_ends(fields: dict[str, int], read: list[str]) -> None:
    texts = ["abcdefghijklmnopqrstuvw", "xyz"]
    engine = ScriptedEngine(max_model_len=14, tasks=("score",))
    await score(engine, text_1="q", text_2=texts, **fields)
    ranked = await rerank(engine, query="q", documents=texts, **fields)
    assert [[b for _, b in call.inputs] for call in engine.pooling_calls] == [read, read]
    assert {each["document"]["text"] for each in ranked["results"]} == set(texts)


@pytest.mark.parametrize("most", [-1, 14])
async def test_a_pair_that_fits_is_not_truncated(most: int) -> None:
    engine = ScriptedEngine(max_model_len=14, tasks=("score",))
    engine._info = msgspec.structs.replace(engine.model_info, pair_marks=3)  # BERT's [CLS] a [SEP] b [SEP]
    await score(engine, text_1="abcde", text_2=["uvwxyz", "uvwxyz1"], truncate_prompt_tokens=most)
    assert [b for _, b in engine.pooling_calls[0].inputs] == ["uvwxyz", "uvwxyz"]


async def test_texts_of_vectors_lose_their_ends_each() -> None:
    engine = ScriptedEngine(max_model_len=8)
    await score(engine, text_1="a" * 20, text_2="b" * 20, truncate_prompt_tokens=-1, max_tokens_per_doc=3)
    assert engine.pooling_calls[0].inputs == [("a" * 7, "bbb")]
    with pytest.raises(InvalidParameterError, match="smaller truncation size") as caught:
        await score(engine, text_1="a", text_2="b", truncate_prompt_tokens=9)
    assert caught.value.param == "truncate_prompt_tokens"


# ---- rankings --------------------------------------------------------------------------------------------------------


DOCUMENTS = ["xyz", "abc", {"text": "abz"}, "abc"]


async def test_documents_best_first() -> None:
    answer = await rerank(ScriptedEngine(tasks=("score",)), query="abc", documents=DOCUMENTS, model="scripted")
    assert [result["index"] for result in answer["results"]] == [1, 3, 2, 0], "equal ones keep their order"
    assert [result["document"] for result in answer["results"]][:3] == [
        {"text": "abc"},
        {"text": "abc"},
        {"text": "abz"},
    ]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert answer["model"] == "scripted"
    assert answer["usage"]["total_tokens"] == 32


@pytest.mark.parametrize(("top_n", "count"), [(None, 4), (0, 4), (1, 1), (3, 3), (99, 4)])
async def test_the_best_few(top_n: int | None, count: int) -> None:
    engine = ScriptedEngine()
    answer = await rerank(engine, query="abc", documents=DOCUMENTS, top_n=top_n, return_documents=False)
    assert len(answer["results"]) == count
    assert all(set(result) == {"index", "relevance_score"} for result in answer["results"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"), ({"query": ["a"]}, "query"), ({"documents": []}, "documents"),
        ({"documents": ["a", ""]}, "documents.1"), ({"documents": ["a", {"text": ""}]}, "documents.1.text"),
        ({"documents": [{"txt": "a"}]}, "documents.0.txt"), ({"documents": [{"image": "a"}]}, "documents.0.image"),
        ({"documents": [1]}, "documents.0"), ({"documents": "a"}, "documents"),
        ({"documents": [{}]}, "documents.0.text"),
        ({"documents": ["a"] * (MAX_PAIRS + 1)}, "documents"), ({"top_n": -1}, "top_n"), ({"top_n": "1"}, "top_n"),
        ({"return_documents": 1}, "return_documents"), ({"max_tokens_per_doc": -1}, "max_tokens_per_doc"),
        ({"rank_fields": ["a"]}, "rank_fields"), ({"document": ["a"]}, "document"),
    ],
)  # fmt: skip
def test_wrong_rankings_name_their_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        parse_rerank_request({"query": "a", "documents": ["b"], **fields})
    assert caught.value.param == param


async def test_a_document_that_is_too_long_is_named() -> None:
    engine = ScriptedEngine(max_model_len=8, tasks=("score",))
    with pytest.raises(PromptTooLongError, match="input 2") as caught:
        await rerank(engine, query="a", documents=["b", "c", "b" * 9])
    assert caught.value.param == "documents.2"


async def test_a_query_that_is_too_long_is_named() -> None:
    engine = ScriptedEngine(max_model_len=8)
    with pytest.raises(PromptTooLongError) as caught:
        await rerank(engine, query="q" * 9, documents=["b", "c"])
    assert caught.value.param == "query"
    with pytest.raises(PromptTooLongError) as caught:
        await score(engine, text_1=["a", "b" * 9], text_2=["b", "c"])
    assert caught.value.param == "text_1.1"
    with pytest.raises(PromptTooLongError) as caught:
        await score(engine, text_1="b" * 9, text_2=["b", "c"])
    assert caught.value.param == "text_1"
    engine = ScriptedEngine(max_model_len=8, tasks=("score",))  # which reads a query with each document
    for more in ({}, {"truncate_prompt_tokens": -1}):
        with pytest.raises(PromptTooLongError, match="the query has 10 tokens") as caught:
            await rerank(engine, query="q" * 9, documents=["b", "c"], **more)
        assert caught.value.param == "query"
    with pytest.raises(PromptTooLongError, match="input 1: the query has 8 tokens") as caught:
        await score(engine, text_1=["a", "b" * 7], text_2=["b", "c"])
    assert caught.value.param == "text_1.1"


# ---- what all have in common -----------------------------------------------------------------------------------------


CALLS = {
    "embed": (embed, {"input": "a"}),
    "score": (score, {"text_1": "a", "text_2": "b"}),
    "rerank": (rerank, {"query": "a", "documents": ["b"]}),
}


@pytest.mark.parametrize("name", CALLS)
async def test_models_are_served_by_name(name: str) -> None:
    call, fields = CALLS[name]
    for model in (None, "default", "scripted"):
        assert (await call(ScriptedEngine(), model=model, **fields))["model"] == "scripted"
    assert (await call(ScriptedEngine(), model="other", **fields))["model"] == "scripted"


async def test_names_of_models_may_be_strict() -> None:
    strict = EmbeddingAdapter(ScriptedEngine(), strict_model_names=True)
    with pytest.raises(ModelNotServedError, match="'other' is not served here; served models are: scripted"):
        await strict.embed(parse_embedding_request({"input": "a", "model": "other"}))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "error", [EngineOverloadedError("full"), EngineDeadError("dead"), EngineSleepingError("asleep")]
)
async def test_an_engine_that_takes_nothing(name: str, error: CandleVllmError) -> None:
    call, fields = CALLS[name]
    with pytest.raises(type(error)):
        await call(ScriptedEngine(submit_error=error), **fields)


@pytest.mark.parametrize("name", CALLS)
async def test_an_engine_that_fails_keeps_its_words_to_the_log(name: str) -> None:
    call, fields = CALLS[name]
    with pytest.raises(GenerationFailedError) as caught:
        await call(ScriptedEngine(fail_after=0, failure="NaN in /secret/path"), **fields)
    answer = to_error(caught.value)
    assert answer.status == 500
    assert "secret" not in answer.body.error.message


@pytest.mark.parametrize("name", CALLS)
async def test_priority_where_it_is_not_allowed(name: str) -> None:
    parse = {"embed": parse_embedding_request, "score": parse_score_request, "rerank": parse_rerank_request}[name]
    adapter = EmbeddingAdapter(ScriptedEngine(), allow_priority=False)
    _, fields = CALLS[name]
    with pytest.raises(UnsupportedParameterError, match="--enable-request-priority"):
        await getattr(adapter, name)(parse({**fields, "priority": -1}))
    assert await getattr(adapter, name)(parse({**fields, "priority": 1}))


async def test_the_wrong_task_names_the_right_route() -> None:
    with pytest.raises(InvalidParameterError, match="does not embed texts: use /v1/score and /v1/rerank"):
        await embed(ScriptedEngine(tasks=("score",)), input="a")
    with pytest.raises(InvalidParameterError, match="does not score pairs of texts: use /v1/chat/completions"):
        await score(ScriptedEngine(tasks=("generate",)), text_1="a", text_2="b")
    with pytest.raises(InvalidParameterError, match="does not embed texts: use /v1/chat/completions"):
        await pool(ScriptedEngine(tasks=["generate"]))


@pytest.mark.parametrize(
    ("parse", "fields", "reason"),
    [
        (parse_classify_request, {"input": "a", "truncate": True}, "use truncate_prompt_tokens"),
        (parse_classify_request, {"input": "a", "softmax": False}, "send use_activation"),
        (parse_pooling_request, {"input": "a", "softmax": False}, "send use_activation"),
        (partial(parse_body, CohereEmbedRequest), {"texts": ["a"], "truncate_prompt_tokens": 5}, "use truncate"),
        (partial(parse_body, CohereEmbedRequest), {"texts": ["a"], "truncation_side": "left"}, "use truncate"),
    ],
)
def test_a_refusal_names_the_field_that_the_route_has(parse: Any, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedParameterError, match=reason):
        parse(fields)


def test_refused_names_have_reasons() -> None:
    assert all(refusal.reason and not refusal.reason.endswith(".") for refusal in POOLING_REFUSED_FIELDS.values())


async def test_the_tokens_of_all_pairs_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cross-encoder reads a text in each of its pairs, a model of vectors reads it once."""
    monkeypatch.setattr(embedding, "MAX_POOLED_TOKENS", 20)
    cross = ScriptedEngine(tasks=("score",))
    await rerank(cross, query="ab", documents=["cd", "ef", "gh"])  # 3 tokens each
    for fields in ({"query": "ab", "documents": ["cd"] * 4}, {"query": "ab", "documents": ["cd", "ef", "gh", "ij"]}):
        with pytest.raises(InvalidParameterError, match=r"documents has more than 20 tokens .*with text 3") as caught:
            await rerank(cross, **fields)
        assert caught.value.param == "documents"
    with pytest.raises(InvalidParameterError, match="text_2 has more than 20 tokens") as caught:
        await score(cross, text_1="ab", text_2=["cd"] * 4)
    assert caught.value.param == "text_2"
    assert len(cross.pooling_calls) == 1, "what is refused is not run"
    await rerank(ScriptedEngine(), query="ab", documents=["cd"] * 9)
    with pytest.raises(InvalidParameterError, match="more than 20 tokens"):
        await rerank(ScriptedEngine(), query="ab", documents=["cd", "ef", "gh", "ij", "kl", "mn"])


@pytest.mark.parametrize("name", CALLS)
async def test_one_key_has_half_of_the_threads_that_tokenize(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has its own work done in these threads too."""
    engine, begun, may_go = ScriptedEngine(), threading.Semaphore(0), threading.Event()
    tokenize = engine.tokenize

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        if asker.get() == "alice":
            begun.release()
            assert may_go.wait(PATIENCE)
        return tokenize(text, add_special_tokens)

    parse = {"embed": parse_embedding_request, "score": parse_score_request, "rerank": parse_rerank_request}[name]
    work = WorkerThreads()
    answer = partial(getattr(EmbeddingAdapter(engine, work=work), name), parse(CALLS[name][1]))
    monkeypatch.setattr(engine, "tokenize", slow)

    async def asked(who: str) -> Any:
        asker.set(who)
        return await answer()

    alice = [asyncio.create_task(asked("alice")) for _ in range(4)]
    for _ in range(2):
        assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE)
    assert await asyncio.create_task(asked("bob"))
    assert not begun.acquire(blocking=False)
    may_go.set()
    await asyncio.gather(*alice)
    assert {call.apart for call in engine.pooling_calls} == {work.prepare}


async def test_a_long_text_is_not_tokenized_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, longest = ScriptedEngine(max_model_len=512), 0
    tokenize = engine.tokenize

    def measured(text: str, add_special_tokens: bool = True) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return tokenize(text, add_special_tokens)

    monkeypatch.setattr(engine, "tokenize", measured)
    for call, fields in ((embed, {"input": "a" * 100_000}), (rerank, {"query": "a", "documents": ["a" * 100_000]})):
        with pytest.raises(PromptTooLongError, match="more than 512 tokens"):
            await call(engine, **fields)
    assert longest <= 16_384


class TokenVectors(ScriptedEngine):
    """An engine whose model gives a vector of each token, or classes of each, by its tasks; it has prompts."""

    def __init__(self, *tasks: str, pooling: str = "all") -> None:
        super().__init__(tasks=tasks)
        self.more: dict[str, Any] = {"pooling": pooling, "prompts": {"query": "q: ", "passage": "p: "}}

    @property
    def model_info(self) -> ModelInfo:
        return msgspec.structs.replace(super().model_info, **getattr(self, "more", {}))

    async def aembed(self, inputs: Any, params: Any = None, **options: Any) -> Any:
        made = await super().aembed(inputs, params, **options)
        if params.pooling != "all" and self.model_info.pooling != "all":
            return made
        return [
            msgspec.structs.replace(each, embedding=array("f", range(2 * each.num_tokens)), vectors=each.num_tokens)
            for each in made
        ]

    async def aclassify(self, inputs: Any, params: Any = None, **options: Any) -> Any:
        made = await super().aclassify(inputs, params, **options)
        if self.model_info.pooling != "all":
            return made
        return [msgspec.structs.replace(each, probs=array("f", [0.5] * 4), vectors=2) for each in made]


async def pool(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    made = await EmbeddingAdapter(engine).pool(parse_pooling_request({"input": ["ab"], **fields}))
    return [each.data for each in made.data]


WANTED = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]  # "ab" has a token in front


async def test_each_token_has_a_vector_of_its_own() -> None:
    engine = TokenVectors("embed", "score")
    made = await EmbeddingAdapter(engine).embed(parse_embedding_request({"input": "ab"}))
    assert made.data[0].embedding == WANTED
    packed = await EmbeddingAdapter(engine).embed(parse_embedding_request({"input": "ab", "encoding_format": "base64"}))
    assert [array("f", base64.b64decode(str(each))).tolist() for each in packed.data[0].embedding] == WANTED
    request = parse_embedding_request({"input": "ab", "encoding_format": "bytes", "embed_dtype": "float16"})
    body, headers = octets(request, await EmbeddingAdapter(engine).embed(request))
    assert np.frombuffer(body, np.float16).reshape(3, 2).tolist() == WANTED
    assert [(each["end"], each["shape"]) for each in json.loads(headers["metadata"])["data"]] == [(12, [3, 2])]
    nothing = msgspec.structs.replace(
        (await engine.aembed(["a"], PoolingParams(pooling="all")))[0], embedding=array("f"), vectors=0
    )  # bge-m3 of a single token, which has no vector

    async def of_nothing(*_: Any, **__: Any) -> Any:
        return [nothing]

    engine_of_nothing = TokenVectors("embed", "score")
    engine_of_nothing.aembed = of_nothing  # type: ignore[method-assign]
    request = parse_embedding_request({"input": [1], "encoding_format": "bytes"})
    body, headers = octets(request, await EmbeddingAdapter(engine_of_nothing).embed(request))
    assert (body, json.loads(headers["metadata"])["data"][0]["shape"]) == (b"", [0, 0])
    assert await pool(engine) == await pool(engine, task="token_embed") == [WANTED]
    plain = TokenVectors("embed", "score", pooling="mean")
    assert await pool(plain, task="token_embed") == [WANTED]
    assert len((await pool(plain, task="embed"))[0]) == SIZE
    await pool(plain, task="embed", use_activation=False)  # vLLM's name of normalize
    assert plain.pooling_calls[-1].params == PoolingParams(normalize=False)
    jina = await EmbeddingAdapter(plain).embed(parse_embedding_request({"input": "ab", "return_multivector": True}))
    assert jina.data[0].embedding == WANTED
    assert LlamaEmbedding.of(jina.data[0]).embedding == WANTED
    assert LlamaEmbedding.of(packed.data[0]).embedding == packed.data[0].embedding
    asked = [
        parse_embedding_request({"content": "ab", **more}) for more in ({}, {"normalize": False}, {"normalized": False})
    ]
    assert [each.pooling_params().normalize for each in asked] == [True, False, False]
    for of, task in ((engine, "embed"), (plain, "classify"), (plain, "token_classify")):
        with pytest.raises(InvalidParameterError, match=f", not {task}") as caught:
            await pool(of, task=task)
        assert caught.value.param == "task"


async def test_vectors_of_tokens_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MAX_NUMBERS", 4 * SIZE)
    engine = TokenVectors("embed", "score")
    engine.more["embedding_size"] = SIZE
    await pool(engine, input=["abc"])
    with pytest.raises(InvalidParameterError, match="send fewer texts at once") as caught:
        await pool(engine, input=["ab", "cd"])
    assert caught.value.param == "input"
    with pytest.raises(InvalidParameterError, match="send fewer texts at once") as caught:
        await score(engine, text_1="ab", text_2="cd")
    assert caught.value.param == "text_2"
    classes = TokenVectors("classify")
    classes.more["labels"] = ("person",) * 2 * SIZE
    with pytest.raises(InvalidParameterError, match="send fewer texts at once"):
        await pool(classes, input=["ab"])


async def test_classes_of_tokens_are_asked_of_pooling() -> None:
    engine = TokenVectors("classify")
    wanted = [[[0.5, 0.5], [0.5, 0.5]]]
    assert await pool(engine) == await pool(engine, task="token_classify", activation=False) == wanted
    assert engine.pooling_calls[-1].params == PoolingParams(use_activation=False)
    for of, field in ((engine, "dimensions"), (TokenVectors("embed"), "activation")):
        with pytest.raises(InvalidParameterError, match="has no effect on the task") as caught:
            await pool(of, **{field: 2 if field == "dimensions" else True})
        assert caught.value.param == field
    with pytest.raises(InvalidParameterError, match="POST /pooling"):
        await EmbeddingAdapter(engine).classify(parse_classify_request({"input": "ab"}))
    with pytest.raises(InvalidParameterError, match="does not classify texts: use /v1/embeddings"):
        await EmbeddingAdapter(TokenVectors("embed")).classify(parse_classify_request({"input": "ab"}))


async def test_input_types_put_the_models_words_before_texts() -> None:
    engine = TokenVectors("embed", "score", pooling="mean")
    for given in ({"input": ["ab"], "input_type": "query"}, {"input": ["q: ab"]}):
        await embed(engine, **given)
    first, second = engine.pooling_calls
    assert first.inputs == second.inputs
    with pytest.raises(InvalidParameterError, match="is not a prompt of the model, which has query, passage") as caught:
        await embed(engine, input=["ab"], input_type="weather")
    assert caught.value.param == "input_type"
    with pytest.raises(InvalidParameterError, match="this input is token ids"):
        await embed(engine, input=[1, 2], input_type="query")
    assert await embed(ScriptedEngine(), input=["ab"], input_type="query"), "a model without prompts wants no words"
    engine.more["prompts"] = {"query": "", "document": ""}  # what sentence-transformers writes for a model without any
    for kind in ("classification", "clustering", "search_query"):
        assert (await cohere(engine, input_type=kind))["embeddings"] == (await cohere(engine))["embeddings"]


async def cohere(engine: ScriptedEngine, version: str = "2", **fields: Any) -> dict[str, Any]:
    asked = parse_body(CohereEmbedRequest, {"texts": ["ab", "abc"], **fields})
    return json.loads(to_json_bytes(await EmbeddingAdapter(engine).embed_cohere(asked, version)))


async def test_vectors_in_coheres_words() -> None:
    engine = TokenVectors("embed", "score", pooling="mean")
    wanted = [each["embedding"] for each in (await embed(engine, input=["p: ab", "p: abc"]))["data"]]
    types = ["float", "base64", "int8", "uint8", "binary", "ubinary"]
    made = await cohere(engine, input_type="search_document", embedding_types=types)
    assert made["embeddings"]["float"] == wanted
    assert [array("f", base64.b64decode(each)).tolist() for each in made["embeddings"]["base64"]] == wanted
    assert made["embeddings"]["int8"] == [[round(127 * number) for number in each] for each in wanted]
    assert made["embeddings"]["uint8"] == [[number + 128 for number in each] for each in made["embeddings"]["int8"]]
    bits = [int("".join(str(int(number > 0)) for number in each).ljust(-(-SIZE // 8) * 8, "0"), 2) for each in wanted]
    assert [int.from_bytes(bytes(each)) for each in made["embeddings"]["ubinary"]] == bits
    assert made["embeddings"]["binary"] == [[byte - 128 for byte in each] for each in made["embeddings"]["ubinary"]]
    assert (made["texts"], made["response_type"]) == (["ab", "abc"], "embeddings_by_type")
    assert made["meta"]["billed_units"]["input_tokens"] > 0
    first = await cohere(engine, "1")
    assert first["response_type"] == "embeddings_floats"
    assert first["embeddings"] == (await cohere(engine))["embeddings"]["float"]
    assert len((await cohere(engine, output_dimension=2))["embeddings"]["float"][0]) == 2
    engine.more["max_model_len"] = 64
    long: dict[str, Any] = {"texts": ["a" * 100]}
    assert (await cohere(engine, truncate="START", **long))["embeddings"]
    with pytest.raises(PromptTooLongError) as caught:
        await cohere(engine, truncate="NONE", **long)
    assert caught.value.param == "texts"
    for field, value in {"images": ["x"], "max_tokens": 5, "input_type": "x"}.items():
        with pytest.raises(RequestError) as refused:
            await cohere(engine, **{field: value})
        assert refused.value.param == field
    with pytest.raises(InvalidParameterError, match="each token"):
        await cohere(TokenVectors("embed"))


async def test_small_integers_are_of_a_vector_of_length_1() -> None:
    """The vectors of some models are longer; as they are, their integers would all be -127 or 127."""
    made = cohere_answer(
        parse_body(CohereEmbedRequest, {"texts": ["a"], "embedding_types": ["int8", "uint8", "float"]}),
        "id",
        [EmbeddingOutput(request_id="a", embedding=array("f", [3.0, -4.0, 0.0]), prompt_token_ids=(1,))],
        "2",
    )
    assert made.embeddings == {"int8": [[76, -102, 0]], "uint8": [[204, 26, 128]], "float": [[3.0, -4.0, 0.0]]}


async def test_a_task_is_an_adapters_name() -> None:
    asked = parse_embedding_request({"input": "a", "model": "m", "task": "retrieval.query"})
    assert (asked.lora_path, asked.model) == ("retrieval_query", "m:retrieval_query")
    with pytest.raises(InvalidParameterError, match="name two adapters"):
        parse_embedding_request({"input": "a", "task": "retrieval.query", "lora_path": "other"})
    with pytest.raises(InvalidParameterError, match="served without adapters"):
        await embed(ScriptedEngine(), input="a", task="separation")


async def test_a_task_puts_its_prompt_before_texts() -> None:
    """As Jina's API and the model card of jina-embeddings-v3, whose prompts have the names of the tasks."""

    class Tasks:
        def is_known(self, name: str) -> bool:
            return True

        def uses(self, name: str | None, scales: Any) -> Any:
            return ()

    engine = TokenVectors("embed", "score", pooling="mean")
    engine.more["prompts"] = {"retrieval.query": "q: ", "separation": ""}
    adapter = EmbeddingAdapter(engine, adapters=Tasks())
    for given in ({"input": ["q: ab"]}, {"input": ["ab"], "task": "retrieval.query"}):
        await adapter.embed(parse_embedding_request(given))
    for given in ({"input": ["ab"]}, {"input": ["ab"], "task": "separation"}, {"input": ["ab"], "task": "other"}):
        await adapter.embed(parse_embedding_request(given))
    prompted, plain = engine.pooling_calls[:2], engine.pooling_calls[2:]
    assert prompted[0].inputs == prompted[1].inputs
    assert plain[0].inputs == plain[1].inputs == plain[2].inputs
    chosen = parse_embedding_request({"input": ["ab"], "task": "retrieval.query", "input_type": "separation"})
    await adapter.embed(chosen)
    assert engine.pooling_calls[-1].inputs == plain[0].inputs, "input_type names another prompt"


async def test_moderation_by_the_labels_of_a_classifier() -> None:
    async def moderate(engine: ScriptedEngine, **fields: Any) -> Any:
        body = to_json_bytes(await EmbeddingAdapter(engine).moderate(parse_body(ModerationRequest, fields)))
        return json.loads(body)

    engine, labels = TokenVectors("classify", pooling="cls"), ("BENIGN", "unsafe", "non-toxic")
    for harmless in (("LABEL_0", "LABEL_1"), ("safe", "OK")):
        engine.more["labels"] = harmless
        with pytest.raises(InvalidParameterError, match="not a moderation model"):
            await moderate(engine, input="ab")
    engine.more["labels"] = labels
    shares = [each.probs.tolist() for each in await engine.aclassify([[1, 1, 4], [0, 0, 1], [2]])]
    made = await moderate(engine, input=["ab", "c"], priority=3)
    assert engine.pooling_calls[-1].priority == 3
    assert len(made["results"]) == 2
    assert set(made["results"][0]["categories"]) == set(made["results"][0]["category_scores"]) == {"unsafe"}
    for share, flagged in zip(shares, (True, False, False), strict=True):
        said = moderated(labels, share)
        assert (said.flagged, said.categories, said.category_scores) == (
            flagged, {"unsafe": flagged}, {"unsafe": share[1]},
        )  # fmt: skip
    for wrong in ([{"type": "image_url", "image_url": {"url": "x"}}], [], [1]):
        with pytest.raises(RequestError) as caught:
            await moderate(engine, input=wrong)
        assert str(caught.value.param).startswith("input")
