# SPDX-License-Identifier: MIT
"""Images over HTTP, with the official clients of four APIs: to a scripted engine, and to a small one that sees."""

from __future__ import annotations

import base64
import gc
import io
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import numpy as np
import ollama
import pytest
from PIL import Image

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import EngineOverloadedError
from candle_vllm.core.vision import fetching
from candle_vllm.core.vision.fetching import MAX_HELD_BYTES, ImageSources
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.server import Settings
from candle_vllm.server.models.loader import ModelLoader
from candle_vllm.server.observing.metrics import Observation
from candle_vllm.server.settings.catalogue import ModelEntry
from packages.core.tests.toy_sight import write_toy_sight
from packages.server.tests.server_fakes import PacedEngine
from tests.trusted import trusted

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
FILE = io.BytesIO()
Image.fromarray(PIXELS).save(FILE, "PNG")
DATA = base64.b64encode(FILE.getvalue()).decode()
URL = f"data:image/png;base64,{DATA}"
TEXT: dict[str, Any] = {"type": "text", "text": "What is "}
OPENAI: list[Any] = [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": URL}}]}]
ANTHROPIC: list[Any] = [
    {"role": "user", "content": [TEXT, {"type": "image", "source": {
        "type": "base64", "media_type": "image/png", "data": DATA}}]}
]  # fmt: skip
RESPONSES: list[Any] = [
    {"role": "user", "content": [{"type": "input_text", "text": "What is "}, {"type": "input_image", "image_url": URL}]}
]
OLLAMA: list[Any] = [{"role": "user", "content": "What is ", "images": [DATA]}]


def ask_openai(running: Any) -> tuple[str | None, int]:
    answer = running.openai().chat.completions.create(model="m", messages=OPENAI, max_tokens=6, temperature=0)
    assert answer.usage is not None
    with running.http() as client:
        tokens = client.post("/tokenize", json={"messages": OPENAI}).json()
        counted = client.post("/v1/chat/completions/input_tokens", json={"messages": OPENAI}).json()
    assert tokens["count"] == len(tokens["tokens"]) == counted["input_tokens"] == answer.usage.prompt_tokens
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def ask_anthropic(running: Any) -> tuple[str | None, int]:
    with anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(model="m", messages=ANTHROPIC, max_tokens=6, extra_body={"temperature": 0})
        counted = client.messages.count_tokens(model="m", messages=ANTHROPIC)
    tokens = answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens == tokens
    return getattr(answer.content[0], "text", None), tokens


def ask_responses(running: Any) -> tuple[str | None, int]:
    made = running.openai().responses.create(model="m", input=RESPONSES, max_output_tokens=6, temperature=0)
    return made.output_text, made.usage.input_tokens


def ask_ollama(running: Any) -> tuple[str | None, int]:
    with ollama.Client(host=running.url, trust_env=False, timeout=60, verify=trusted()) as client:
        answer = client.chat("m", OLLAMA, options={"num_predict": 6, "temperature": 0})
    return answer.message.content, answer.prompt_eval_count or 0


ASKING: list[Callable[[Any], tuple[str | None, int]]] = [ask_openai, ask_anthropic, ask_responses, ask_ollama]


@pytest.mark.parametrize("ask", ASKING)
def test_an_engine_is_shown_what_was_sent(ask: Any, start: Callable[..., Any]) -> None:
    engine = PacedEngine("A picture.", sees=True)
    running = start(engine)
    assert (ask(running)[0] or "").startswith("A pict")
    assert {picture.digest for picture in engine.pictures} == {picture_of(PIXELS).digest}
    text = "What is <image>" if ask is not ask_ollama else "<image>What is "
    assert text in engine.detokenize(engine.requests[0].prompt_token_ids)
    assert len(engine.requests[0].images) == 1


def test_llama_cpps_prompts_have_images(start: Callable[..., Any]) -> None:
    engine = PacedEngine("A picture.", sees=True)
    asked = {"prompt_string": "What is <__media__>?", "multimodal_data": [DATA]}
    with start(engine).http() as client:
        one = client.post("/completion", json={"prompt": asked, "n_predict": 50}).json()
        both = client.post("/completions", json={"prompt": [asked, "a", asked], "n_predict": 50}).json()
        assert [one["content"], *(each["content"] for each in both)] == ["A picture."] * 4
        assert {picture.digest for picture in engine.pictures} == {picture_of(PIXELS).digest}
        assert "What is <image>?" in engine.detokenize(engine.requests[0].prompt_token_ids)
        assert [len(request.images) for request in engine.requests] == [1, 1, 0, 1]
        text = client.post("/apply-template", json={"messages": OPENAI}).json()["prompt"]
        assert "What is <__media__>" in text
        seen = {**asked, "prompt_string": text}
        streamed = client.post("/completion", json={"prompt": seen, "n_predict": 50, "stream": True}).text
        assert streamed.count('"stop":true') == 1
        behind_first = engine.requests[-1].prompt_token_ids[1:]  # this engine has one before texts, and none in chats
        assert behind_first == asked_in_chat(client, engine)
        for wrong, said in (
            ({"prompt_string": "What?"}, "Failed to tokenize prompt: 1 images, and <__media__> stands in the text 0"),
            ({"multimodal_data": [DATA, DATA]}, "Failed to tokenize prompt: 2 images"),
            ({"multimodal_data": ["!"]}, "not valid base64"),
            ({"multimodal_data": ["QUJD"]}, "not an image in a supported format"),
        ):
            answer = client.post("/completions", json={"prompt": [{**asked, **wrong}]})
            error = answer.json()["error"]
            assert (answer.status_code, said in error["message"]) == (400, True), error
            assert error["param"].startswith("prompt.0.multimodal_data")
    with start(PacedEngine()).http() as client:
        for data in ([DATA], []):
            answer = client.post("/completion", json={"prompt": {**asked, "multimodal_data": data}})
            assert answer.status_code == 400
            assert "model does not support multimodal requests" in answer.text


def test_a_conversation_with_an_image_has_a_vector(start: Callable[..., Any], tmp_path: Path) -> None:
    """vLLM's `messages` on `/v1/embeddings`: the vector is that of the prompt which the template writes."""
    engine = InferenceEngine(str(write_toy_sight(tmp_path)))
    plain = {"role": "user", "content": "What is it?"}
    texts = [engine.apply_chat_template(each, add_generation_prompt=False) for each in (OPENAI, [plain])]
    asked = [{"prompt": texts[0], "multi_modal_data": {"image": PIXELS}}, texts[1]]
    wanted = [list(each.embedding) for each in engine.embed(asked, use_tqdm=False)]
    with start(engine).http() as client:
        for messages, vector in ((OPENAI, wanted[0]), ([plain], wanted[1])):
            answer = client.post("/v1/embeddings", json={"messages": messages}).json()
            assert answer["data"][0]["embedding"] == vector
            assert answer["usage"]["prompt_tokens"] > 0
        opened = {"messages": OPENAI, "add_generation_prompt": True, "dimensions": None, "encoding_format": "float"}
        assert client.post("/v1/embeddings", json=opened).json()["data"][0]["embedding"] != wanted[0]
        for wrong, param in (
            ({"messages": []}, "messages"),
            ({"messages": OPENAI, "input": "What is it?"}, "messages"),
            ({"messages": OPENAI, "input_type": "query"}, "input_type"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages",
            ),
        ):
            refused = client.post("/v1/embeddings", json=wrong)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"].startswith(param)


def asked_in_chat(client: Any, engine: PacedEngine) -> Any:
    client.post("/v1/chat/completions", json={"messages": OPENAI})
    return engine.requests[-1].prompt_token_ids


def test_a_tools_result_may_be_an_image(start: Callable[..., Any]) -> None:
    engine = PacedEngine("I see.", sees=True)
    call = {"id": "a", "type": "function", "function": {"name": "shot", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "user", "content": "Look"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
    ]
    start(engine).openai().chat.completions.create(model="m", messages=messages)
    assert len(engine.pictures) == 1


def test_a_model_says_what_it_reads(start: Callable[..., Any]) -> None:
    for sees in (False, True):
        running = start(PacedEngine(sees=sees))
        with running.http() as client, ollama.Client(host=running.url, trust_env=False, verify=trusted()) as other:
            card = client.get("/v1/models").json()["data"][0]
            assert card["modalities"] == (["text", "image"] if sees else ["text"])
            props = client.get("/props").json()
            assert (props["modalities"]["vision"], props["media_marker"]) == (sees, "<__media__>")
            assert ("vision" in (other.show(card["id"]).capabilities or ())) is sees


def test_one_that_reads_text_refuses_by_name(start: Callable[..., Any]) -> None:
    running = start(PacedEngine())
    with running.http() as client:
        answer = client.post("/v1/chat/completions", json={"messages": OPENAI})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages.0.content.1.image_url.url"
        assert "takes text only" in answer.text
        answer = client.post("/api/chat", json={"model": "m", "messages": OLLAMA})
        assert answer.status_code == 400
        assert "takes text only" in answer.text


def test_one_that_reads_text_is_told_of_images_in_results(start: Callable[..., Any]) -> None:
    engine = PacedEngine("I see.")
    call = {"id": "a", "type": "function", "function": {"name": "shot", "arguments": "{}"}}
    use = {"type": "tool_use", "id": "a", "name": "shot", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [ANTHROPIC[0]["content"][1]]}
    output = {"type": "function_call_output", "call_id": "a", "output": [RESPONSES[0]["content"][1]]}
    asked: dict[str, Any] = {
        "/v1/chat/completions": {"messages": [
            {"role": "user", "content": "Look"}, {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": [OPENAI[0]["content"][1]]},
        ]},
        "/v1/messages": {"model": "m", "max_tokens": 9, "messages": [
            {"role": "user", "content": "Look"}, {"role": "assistant", "content": [use]},
            {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        ]},
        "/v1/responses": {"input": [
            {"role": "user", "content": "Look"},
            {"type": "function_call", "call_id": "a", "name": "shot", "arguments": "{}"}, output,
        ]},
    }  # fmt: skip
    with start(engine).http() as client:
        for path, body in asked.items():
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert "images in results of tools are not shown" in answer.headers["x-warning"]
            prompt = engine.detokenize(engine.requests[-1].prompt_token_ids)
            assert prompt.count("[an image, which this model cannot see]") == 1
    assert engine.pictures == []


def test_images_are_fetched_where_the_operator_lists_their_host(start: Callable[..., Any]) -> None:
    def asked(url: str) -> list[tuple[str, dict[str, Any]]]:
        image = {"type": "image_url", "image_url": {"url": url}}
        block = {"type": "image", "source": {"type": "url", "url": url}}
        item = {"type": "input_image", "image_url": url}
        chat: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": [image]}]}
        return [
            ("/v1/chat/completions", chat),
            ("/v1/messages", {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}),
            ("/v1/messages/count_tokens", {"model": "m", "messages": [{"role": "user", "content": [block]}]}),
            ("/v1/responses", {"model": "m", "input": [{"role": "user", "content": [item]}]}),
            ("/tokenize", chat),
        ]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = FILE.getvalue() if self.path == "/a" else b"<html>"
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
        host, engine = f"127.0.0.1:{site.server_port}", PacedEngine("A picture.", sees=True)
        with start(engine, allowed_media_domains=(f"a.example, {host}",)).http() as client:
            for number, (path, body) in enumerate(asked(f"http://{host}/a"), 1):
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                assert len(engine.pictures) == number
            assert {picture.digest for picture in engine.pictures} == {picture_of(PIXELS).digest}
            for url, why in ((f"http://{host}/b", "not an image"), ("http://b.example/", "operator does not allow")):
                for path, body in asked(url):
                    answer = client.post(path, json=body)
                    assert answer.status_code == 400
                    assert why in answer.text
        site.shutdown()


async def test_images_count_for_all_models_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stored(file_id: str, path: str) -> bytes:
        return FILE.getvalue()

    images = ImageSources(stored=stored)
    load = ModelLoader(Observation(Settings()).metrics, lambda _: PacedEngine("Seen.", sees=True), images=images)
    models = [load(ModelEntry(name, Settings(model=name)), ()) for name in ("a", "b")]
    said: Any = {"messages": [{"role": "user", "content": [{"type": "input_image", "file_id": "file-1"}]}]}
    here: Any = {"messages": OPENAI}
    images.count(MAX_HELD_BYTES)
    for model in models:
        for request in (said, here):  # a file that came with its request as one that did not
            with pytest.raises(EngineOverloadedError, match="image files of requests take 512 MB"):
                await model.adapter.chat(request)
    images.count(-MAX_HELD_BYTES)
    for model in models:
        assert (await model.adapter.chat(said)).choices[0].message.content == "Seen."
    assert not images._held
    monkeypatch.setattr(fetching, "MAX_PREPARED_BYTES", 1)
    for model in models:  # what the first one's request left counts for the second
        with pytest.raises(EngineOverloadedError, match="the images of other requests take"):
            await model.adapter.chat(here)
        model.watcher.close()


def test_images_may_be_kept_files_of_ones_own(start: Callable[..., Any], tmp_path: Path) -> None:
    store, engine = f"sqlite:///{tmp_path}/kept.sqlite", PacedEngine("A picture.", sees=True)

    def asked(file_id: str) -> list[tuple[str, dict[str, Any], str]]:
        image = {"type": "input_image", "file_id": file_id}
        block = {"type": "image", "source": {"type": "file", "file_id": file_id}}
        block_body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": [block]}]}
        return [
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": [image]}]},
                "messages.0.content.0.file_id",
            ),
            ("/v1/messages", block_body, "messages.0.content.0.source.file_id"),
            (
                "/v1/responses",
                {"model": "m", "input": [{"role": "user", "content": [image]}]},
                "input.0.content.0.file_id",
            ),
        ]

    with start(engine, api_key=("one", "two"), responses_store=store).http() as client:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        files = {"file": ("a.png", FILE.getvalue())}
        kept = client.post("/v1/files", data={"purpose": "vision"}, files=files, headers=mine).json()
        assert (kept["purpose"], kept["bytes"], kept["filename"]) == ("vision", len(FILE.getvalue()), "a.png")
        assert client.get(f"/v1/files/{kept['id']}/content", headers=mine).content == FILE.getvalue()
        assert [one["id"] for one in client.get("/v1/files?purpose=vision", headers=mine).json()["data"]] == [
            kept["id"]
        ]
        for path, body, field in asked(kept["id"]):
            answer = client.post(path, json=body, headers=mine)
            assert answer.status_code == 200, answer.text
            answer = client.post(path, json=body, headers=other)
            assert answer.status_code == 400
            assert field in answer.text
            assert "not found" in answer.text
        assert {picture.digest for picture in engine.pictures} == {picture_of(PIXELS).digest}
        assert len(engine.pictures) == 3
        begun = {"input_file_id": kept["id"], "endpoint": "/v1/responses", "completion_window": "24h"}
        assert "was stored for vision" in client.post("/v1/batches", json=begun, headers=mine).text
    with start(PacedEngine("Again.", sees=True), api_key=("one",), responses_store=store).http(headers=mine) as client:
        path, body, _ = asked(kept["id"])[0]
        assert client.post(path, json=body).status_code == 200  # it outlives the server
        assert client.delete(f"/v1/files/{kept['id']}").json()["deleted"]
        assert client.post(path, json=body).status_code == 400
        text = client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"text")}).json()
        path, body, _ = asked(text["id"])[0]
        assert "not an image" in client.post(path, json=body).text
    with start(PacedEngine(sees=True), responses_store="off").http() as client:
        assert "stores no files" in client.post(*asked("file-1")[0][:1], json=asked("file-1")[0][1]).text


@pytest.mark.parametrize("part", [{}, {"file_id": "f", "image_url": URL}, {"file_id": ""}, {"image_url": None}])
def test_an_image_is_in_one_place(part: dict[str, Any], start: Callable[..., Any]) -> None:
    content = [{"type": "input_image", **part}]
    with start(PacedEngine(sees=True)).http() as client:
        for path, field in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
            answer = client.post(path, json={"model": "m", field: [{"role": "user", "content": content}]})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].startswith(f"{field}.0.content.0.")


@pytest.mark.parametrize("path", ["/api/generate"])
def test_a_prompt_has_images_before_it(path: str, start: Callable[..., Any]) -> None:
    engine = PacedEngine("Yes.", sees=True)
    with start(engine).http() as client:
        asked = {"model": "m", "prompt": "What?", "images": [DATA], "stream": False}
        assert client.post(path, json=asked).json()["response"] == "Yes."
        assert "<image>What?" in engine.detokenize(engine.requests[0].prompt_token_ids)
        assert client.post(path, json={**asked, "raw": True}).status_code == 400


def test_a_damaged_image_hurts_its_request_alone(start: Callable[..., Any]) -> None:
    engine = PacedEngine("Fine.", sees=True)
    with start(engine).http() as client:
        for data in (DATA[:200], "AAAA", DATA[:-5] + "####="):
            broken = [{"role": "user", "content": [{"type": "image_url", "image_url": {
                "url": f"data:image/png;base64,{data}"}}]}]  # fmt: skip
            answer = client.post("/v1/chat/completions", json={"messages": broken})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "messages.0.content.0.image_url.url"
        assert client.post("/v1/chat/completions", json={"messages": OPENAI}).status_code == 200
    assert len(engine.requests) == 1


def test_a_small_model_sees_the_same_through_every_api(tmp_path: Path, start: Callable[..., Any]) -> None:
    with InferenceEngine(write_toy_sight(tmp_path / "sight")) as engine:
        running: Any = start(engine)
        answers = {ask.__name__: ask(running) for ask in ASKING}
        asked: Any = [{"role": "user", "content": [TEXT, {"type": "image", "image": PIXELS}]}]
        expected = engine.chat(asked, SamplingParams(max_tokens=6, temperature=0))
    images = answers.pop("ask_ollama")
    assert {tokens for _, tokens in answers.values()} == {len(expected.prompt_token_ids)} == {images[1]}
    assert len({text for text, _ in answers.values()}) == 1


def test_prompts_that_exceed_the_context_are_counted(tmp_path: Path, start: Callable[..., Any]) -> None:
    with InferenceEngine(write_toy_sight(tmp_path / "sight")) as engine, start(engine).http() as client:
        many, blocks = ({"model": "m", "messages": messages * 9} for messages in (OPENAI, ANTHROPIC))
        counted = client.post("/tokenize", json=many).json()
        assert counted["count"] > counted["max_model_len"]
        same = (
            client.post("/v1/chat/completions/input_tokens", json=many).json(),
            client.post("/v1/messages/count_tokens", json=blocks).json(),
        )
        assert [each["input_tokens"] for each in same] == [counted["count"]] * 2
        assert client.post("/apply-template", json=many).json()["prompt"].count("<__media__>") == 9
        assert client.post("/v1/chat/completions", json=many).json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_to_images_has_no_context_that_would_lack_them(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("A picture.", sees=True))
    with ollama.Client(host=running.url, trust_env=False, timeout=60, verify=trusted()) as client:
        assert client.generate("m", "What?", images=[DATA]).context is None
        assert client.generate("m", "What?").context


def test_images_are_not_lost_where_there_is_no_template(start: Callable[..., Any]) -> None:
    running = start(PacedEngine("A picture.", has_chat_template=False))
    with (
        ollama.Client(host=running.url, trust_env=False, timeout=60, verify=trusted()) as client,
        pytest.raises(ollama.ResponseError, match="images: the model has no chat template"),
    ):
        client.generate("m", "What?", images=[DATA])


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/completion", {"prompt": "a", "image_data": [{"id": 1, "data": DATA}]}, "send images in the prompt"),
        ("/v1/responses", {"model": "m", "input": "a", "image": {"url": URL}}, "as input_image"),
        ("/v1/chat/completions", {"messages": OPENAI, "mm_processor_kwargs": {"a": 1}}, "as the model's files define"),
        ("/tokenize", {"messages": OPENAI, "mm_processor_kwargs": {"a": 1}}, "as the model's files define"),
    ],
)
def test_one_that_sees_says_where_images_stand(
    path: str, body: dict[str, Any], said: str, start: Callable[..., Any]
) -> None:
    with start(PacedEngine("A picture.", sees=True)).http() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_the_pixels_of_a_request_are_bounded(start: Callable[..., Any]) -> None:
    file = io.BytesIO()
    Image.new("1", (8192, 8192)).save(file, "PNG")  # 8 kB
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    large, small = ({"type": "image_url", "image_url": {"url": each}} for each in (url, URL))
    engine = PacedEngine("I see.", sees=True)
    with start(engine).http() as client:
        answer = client.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": [small] + [large] * 4}]}
        )
        assert answer.status_code == 400
        assert "at most 268435456 are allowed" in answer.text
        assert not engine.pictures  # none was decoded
        assert client.post("/v1/chat/completions", json={"messages": OPENAI}).status_code == 200


def test_more_images_than_a_model_takes_are_not_fetched(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = list[str]()

    async def fetch(sources: ImageSources, image: Any, room: Any) -> bytes:
        fetched.append(image.source)
        return FILE.getvalue()

    monkeypatch.setattr(ImageSources, "_fetch", fetch)
    with start(PacedEngine("I see.", sees=True), allowed_media_domains=("a.example",)).http() as client:
        for count in (64, 65):
            parts = [{"type": "image_url", "image_url": {"url": f"http://a.example/{i}"}} for i in range(count)]
            answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
            assert answer.status_code == (200 if count == 64 else 400)
            assert len(fetched) == 64
    assert "the prompt has 65 images; at most 64 are allowed" in answer.text


def test_images_that_wait_are_bounded(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_PREPARED_BYTES", PIXELS.nbytes + 10)
    engine = PacedEngine("I see.", sees=True)
    with start(engine).http() as client:
        assert client.post("/v1/chat/completions", json={"messages": OPENAI}).status_code == 200
        answer = client.post("/v1/chat/completions", json={"messages": OPENAI})
        assert answer.status_code == 503  # the scripted engine keeps its requests
        assert "the images of other requests take" in answer.text
        engine.requests.clear()
        gc.collect()
        assert client.post("/v1/chat/completions", json={"messages": OPENAI}).status_code == 200
