# SPDX-License-Identifier: MIT
"""Adapters of real files through a real server: by name from a folder, without a restart, several in the same steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core import InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.testing.toy_model import write_toy_model
from candle_vllm.server.cli import main
from packages.core.tests.toy_adapter import linear_shapes, write_adapter
from tests.live_server import serving

PROMPT = "abc" * 10
ASKED = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
NAMES = ("a0", "a1", "a2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, adapters of it in `adapters`, and one more beside."""
    made = tmp_path_factory.mktemp("files")
    write_toy_model(made / "base")
    with InferenceEngine(str(made / "base"), threads=1) as plain:
        shapes = linear_shapes(plain._require()[1].config)  # type: ignore[attr-defined]  # what the files say of the model
    for number, name in enumerate(("adapters/a0", "adapters/a1", "adapters/a2", "later")):
        write_adapter(made / name, shapes, rank=4 << number, seed=number, size=1.0)
    write_adapter(made / "adapters" / "wide", {"model.layers.0.self_attn.q_proj": (4096, 64)}, seed=9)
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(
        str(folder / "base"), threads=1, enable_lora=True, block_size=16, max_model_len=256, max_num_seqs=8
    ) as made:
        yield made


@pytest.fixture(scope="module")
def client(folder: Path, engine: InferenceEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    source = (f"local={folder / 'adapters'}",)
    with (
        serving(engine, enable_lora=True, lora_resolver=source, allow_runtime_lora=True) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        yield client


def ids(answer: httpx.Response) -> Sequence[int]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def ask(client: httpx.Client, model: str | None, **more: Any) -> Sequence[int]:
    return ids(client.post("/v1/completions", json={"model": model, **ASKED, **more}))


def alone(folder: Path, name: str) -> Sequence[int]:
    """The answer of an engine that has never seen another adapter."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with InferenceEngine(str(folder / "base"), threads=1, enable_lora=True, block_size=16, max_model_len=256) as fresh:
        wanted = LoRARequest(name, lora_path=str(folder / "adapters" / name))
        return list(fresh.generate(PROMPT, params, lora_request=wanted, use_tqdm=False)[0].token_ids)


def test_adapters_of_a_folder_answer_by_name_side_by_side(folder: Path, client: httpx.Client) -> None:
    base = ask(client, "base")
    with ThreadPoolExecutor(8) as threads:
        asked = [name for name in (*NAMES, "base") for _ in range(2)]
        answers = list(zip(asked, threads.map(lambda name: ask(client, name), asked), strict=True))
    for name in NAMES:
        first, second = [answer for asked, answer in answers if asked == name]
        assert first == second == ask(client, name)
    assert [answer for asked, answer in answers if asked == "base"] == [base, base]
    assert len({tuple(answer) for _, answer in answers}) == len(NAMES) + 1
    assert ask(client, "a1") == alone(folder, "a1")
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert [cards[name]["parent"] for name in NAMES] == ["base"] * len(NAMES)


def test_a_folder_that_comes_later_is_served_and_unloaded(folder: Path, client: httpx.Client) -> None:
    missing = client.post("/v1/completions", json={"model": "late", **ASKED})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    shutil.copytree(folder / "later", folder / "adapters" / "late")
    found = ask(client, "late")
    assert found != ask(client, "base")
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "mine", "lora_path": str(folder / "later")})
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert ask(client, "mine") == found
    swap = {"lora_name": "mine", "lora_path": str(folder / "adapters" / "a0"), "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=swap).status_code == 200
    assert ask(client, "mine") == ask(client, "a0")
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
    assert client.post("/v1/completions", json={"model": "mine", **ASKED}).status_code == 404


def test_an_adapter_that_does_not_fit_is_named_and_hurts_nobody(client: httpx.Client) -> None:
    before = ask(client, "a0")
    answer = client.post("/v1/completions", json={"model": "wide", **ASKED})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("adapter 'wide' cannot be used: tensor 'base_model.model.model.layers.0")
    assert error["param"] == "model"
    loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "w", "lora_path": "wide"})
    assert (loaded.status_code, loaded.json()["error"]["code"]) == (400, "adapter_refused")
    assert ask(client, "a0") == before


def test_a_stream_and_chat_have_it_too(client: httpx.Client) -> None:
    body = {"model": "a1", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body)
    assert (whole.status_code, whole.json()["model"]) == (200, "a1")
    with client.stream("POST", "/v1/completions", json={"model": "a1", **ASKED, "stream": True}) as streamed:
        assert streamed.status_code == 200
        assert '"model":"a1"' in streamed.read().decode()


@pytest.mark.every_case
def test_run_batch_answers_with_adapters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line with the one that it names, and one that is not there is its line's error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"model": name, **ASKED}}
        for name in ("a0", "base", "a1", "nothing")
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    adapters = [{"name": name, "path": str(folder / "adapters" / name)} for name in ("a0", "a1")]
    params = {"threads": 1, "max_model_len": 256, "block_size": 16, "enable_lora": True}
    entry = {"name": "base", "hf_id": str(folder / "base"), "params": params, "adapters": adapters}
    (tmp_path / "models.yaml").write_text(json.dumps({"models": [entry]}), "utf-8")
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    found = [answer["response"]["body"] for answer in answers[:3]]
    texts = [list(body["choices"][0]["token_ids"]) for body in found]
    assert texts[0] == alone(folder, "a0")
    assert texts[2] == alone(folder, "a1")
    assert texts[1] not in (texts[0], texts[2])
    assert "nothing" in json.dumps(answers[3])
    assert answers[3]["response"]["status_code"] == 404
