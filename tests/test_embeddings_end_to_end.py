# SPDX-License-Identifier: MIT
"""Vectors, scores and rankings of real engines behind a real server, asked with the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from candle_vllm.core import InferenceEngine
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from tests.live_server import openai_client, serving

TEXTS = ["hello", "the quick brown fox", "jumps over the lazy dog", "x"]


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def engine(
    request: pytest.FixtureRequest, toy_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InferenceEngine]:
    folder = toy_model if request.param == "decoder" else write_toy_encoder(tmp_path_factory.mktemp("encoder"))
    with InferenceEngine(str(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def url(engine: InferenceEngine) -> Iterator[str]:
    with serving(engine) as address:
        yield address


def test_the_clients_default_equals_floats_and_the_engine(engine: InferenceEngine, url: str) -> None:
    with exact_sums(), openai_client(url) as client:  # which texts share a step differs from run to run
        packed = client.embeddings.create(model="default", input=TEXTS)
        plain = client.embeddings.create(model="default", input=TEXTS, encoding_format="float")
        tokens = client.embeddings.create(model="default", input=[engine.tokenize(text) for text in TEXTS])
    vectors = [entry.embedding for entry in plain.data]
    assert [entry.embedding for entry in packed.data] == vectors
    assert np.abs(np.array([entry.embedding for entry in tokens.data]) - np.array(vectors)).max() < 1e-6
    direct = [list(output.embedding) for output in engine.embed(TEXTS, use_tqdm=False)]
    assert np.abs(np.array(direct) - np.array(vectors)).max() < 1e-6
    assert np.allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    assert plain.usage.prompt_tokens == sum(len(engine.tokenize(text)) for text in TEXTS)


def test_scores_and_rankings_agree_with_the_vectors(engine: InferenceEngine, url: str) -> None:
    vectors = np.array([output.embedding for output in engine.embed(TEXTS, use_tqdm=False)])
    cosines = vectors[1:] @ vectors[0]
    with httpx.Client(base_url=url, trust_env=False) as client:
        scores = client.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
        ranking = client.post("/v1/rerank", json={"query": TEXTS[0], "documents": TEXTS[1:], "top_n": 2}).json()
    assert np.abs(np.array([entry["score"] for entry in scores["data"]]) - cosines).max() < 1e-5
    order = np.argsort(-cosines)[:2].tolist()
    assert [entry["index"] for entry in ranking["results"]] == order
    assert [entry["document"]["text"] for entry in ranking["results"]] == [TEXTS[1:][index] for index in order]


def test_what_is_wrong_names_its_place(engine: InferenceEngine, url: str) -> None:
    most = engine.model_info.max_model_len
    with openai_client(url) as client:
        with pytest.raises(openai.BadRequestError, match=f"input 1: the text has {most + 1} tokens") as caught:
            client.embeddings.create(model="default", input=[[1], [1] * (most + 1)])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input.1")
        with pytest.raises(openai.BadRequestError, match="leave dimensions out") as wrong:
            client.embeddings.create(model="default", input="a", dimensions=8)
        assert wrong.value.param == "dimensions"
        with pytest.raises(openai.BadRequestError, match="token id 100000 is out of vocabulary"):
            client.embeddings.create(model="default", input=[100_000])


def test_a_cross_encoder_ranks_and_gives_no_vectors(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with InferenceEngine(str(folder)) as engine, serving(engine) as url, openai_client(url) as client:
        wanted = [output.score for output in engine.score([(TEXTS[0], text) for text in TEXTS], use_tqdm=False)]
        ranking = httpx.post(f"{url}/rerank", json={"query": TEXTS[0], "documents": TEXTS}, trust_env=False).json()
        assert [entry["relevance_score"] for entry in ranking["results"]] == pytest.approx(sorted(wanted, reverse=True))
        assert all(0 < entry["relevance_score"] < 1 for entry in ranking["results"])
        with pytest.raises(openai.BadRequestError, match="does not embed texts: use /v1/score and /v1/rerank"):
            client.embeddings.create(model="default", input="a")
        with pytest.raises(openai.BadRequestError, match="is a cross-encoder and generates no text"):
            client.chat.completions.create(model="default", messages=[{"role": "user", "content": "a"}])
