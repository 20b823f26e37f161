# SPDX-License-Identifier: MIT
"""Small models of every family that sees, asked the same in every API, whole and streamed: one text and one count."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.responses import ConversationOptions, McpServerConfig, ResponsesSession
from candle_vllm.server import Settings
from candle_vllm.server.app import create_app
from candle_vllm.server.serve import bind, make_server
from packages.core.tests.models import (
    test_cohere2_vision,
    test_exaone4_5,
    test_glm4v,
    test_got_ocr2,
    test_granite4_vision,
    test_hunyuan_vl,
    test_internvl,
    test_kimi_k25,
    test_minicpmv,
    test_paligemma,
    test_phi3v,
    test_qwen_vl,
    test_sight_families,
)
from packages.core.tests.toy_sight import write_toy_sight
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
FILE = io.BytesIO()
Image.fromarray(PIXELS).save(FILE, "PNG")
DATA = base64.b64encode(FILE.getvalue()).decode()
URL = f"data:image/png;base64,{DATA}"
WORDS = "What is this?"
FAMILIES = (
    "SmolVLM", "Mistral 3", "Pixtral", "Gemma 3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "Llama 4", "glm_ocr",
    "paddleocr_vl", "internvl qwen3", "hunyuan_vl", "kimi_k25", "MiniCPM-V", "paligemma", "command", "aya",
    "qianfan_ocr qwen3", "granite4_vision", "phi3_v", "got_ocr2", "exaone4_5",
)  # fmt: skip
TEXT: dict[str, Any] = {"type": "text", "text": WORDS}
SAID = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, TEXT]}]
ITEM = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": WORDS}]
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
LIMITS = {"num_predict": 6, "temperature": 0}
LLAMA = {"n_predict": 6, "temperature": 0}


def write(folder: Path, family: str) -> Path:
    if family == "SmolVLM":
        return write_toy_sight(folder)
    alone: Any = {"granite4_vision": test_granite4_vision, "phi3_v": test_phi3v, "got_ocr2": test_got_ocr2}
    alone["exaone4_5"] = test_exaone4_5
    if family in alone:
        return alone[family].write(folder)
    if family in ("hunyuan_vl", "kimi_k25"):
        return (test_hunyuan_vl if family == "hunyuan_vl" else test_kimi_k25).write(folder)
    if family == "paligemma":
        return test_paligemma.write(folder, "gemma2")
    if family in test_cohere2_vision.KINDS:
        return test_cohere2_vision.write(folder, family)
    if family in test_glm4v.TEXTS:
        return test_glm4v.write(folder, family)
    if family == "MiniCPM-V":
        return test_minicpmv.write(folder, "middle")
    if family in test_internvl.TEXTS:
        return test_internvl.write(folder, family)
    row = family in test_sight_families.ROWS
    return test_sight_families.write_sight(folder, family) if row else test_qwen_vl.write(folder, family)


@contextlib.contextmanager
def served(engine: InferenceEngine) -> Iterator[str]:
    """A server of the engine in a thread; its address."""
    settings = Settings(port=0, shutdown_timeout=1)
    server, listener = make_server(create_app(engine, settings), settings), bind(settings.address)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


def asked(stream: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    common = {"model": "m", "stream": stream}
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    turn = {"role": "user", "content": WORDS, "images": [DATA]}
    return {
        "chat": ("/v1/chat/completions", {
            **common, **usage, "messages": SAID, "max_tokens": 6, "temperature": 0}),
        "messages": ("/v1/messages", {
            **common, "messages": [{"role": "user", "content": [BLOCK, TEXT]}], "max_tokens": 6, "temperature": 0}),
        "responses": ("/v1/responses", {
            **common, "input": [{"role": "user", "content": ITEM}], "max_output_tokens": 6, "temperature": 0}),
        "ollama chat": ("/api/chat", {**common, "messages": [turn], "options": LIMITS}),
        "ollama generate": ("/api/generate", {**common, "prompt": WORDS, "images": [DATA], "options": LIMITS}),
    }  # fmt: skip


def pieces(body: str) -> list[dict[str, Any]]:
    """The objects of a stream, of server-sent events or of lines."""
    lines = [line.removeprefix("data:").strip() for line in body.splitlines() if not line.startswith(("event:", ":"))]
    return [json.loads(line) for line in lines if line and line != "[DONE]"]


def read(api: str, made: list[dict[str, Any]]) -> tuple[str, int, int]:
    """Text and counts of an answer, whole or in pieces."""
    text, prompt, completion = "", 0, 0
    for each in made:
        if api == "chat":
            for choice in each["choices"]:
                text += (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            usage = each.get("usage") or {}
            prompt, completion = usage.get("prompt_tokens", prompt), usage.get("completion_tokens", completion)
        elif api == "messages":
            text += "".join(block.get("text", "") for block in each.get("content", ()))
            text += each.get("delta", {}).get("text", "")
            usage = each.get("usage") or each.get("message", {}).get("usage") or {}
            if "input_tokens" in usage:
                prompt = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
            completion = usage.get("output_tokens", completion)
        elif api == "responses":
            whole = each if each.get("object") == "response" else each.get("response", {})
            if whole.get("usage"):
                text = "".join(part["text"] for item in whole["output"] for part in item.get("content") or ())
                prompt, completion = whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]
        elif api == "llama":
            text, prompt, completion = each["content"], each["tokens_evaluated"], each["tokens_predicted"]
        else:
            text += each.get("response", "") or each.get("message", {}).get("content", "")
            prompt, completion = each.get("prompt_eval_count", prompt), each.get("eval_count", completion)
    return text, prompt, completion


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_api_shows_a_model_the_same(family: str, tmp_path: Path) -> None:
    with InferenceEngine(write(tmp_path / "model", family)) as engine:
        content: Any = [{"type": "image", "image": PIXELS}, TEXT]
        params = SamplingParams(max_tokens=6, temperature=0)
        output = engine.chat([{"role": "user", "content": content}], params)
        expected = output.outputs[0].text, len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        found = dict[str, tuple[str, int, int]]()
        with served(engine) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            for stream in (False, True):
                for api, (path, body) in asked(stream).items():
                    answer = client.post(path, json=body)
                    assert answer.status_code == 200, answer.text
                    made = pieces(answer.text) if stream else [answer.json()]
                    found[f"{api}, {'streamed' if stream else 'whole'}"] = read(api, made)
            prompt = client.post("/apply-template", json={"messages": SAID}).json()["prompt"]
            assert "<__media__>" in prompt
            seen = {"prompt_string": prompt, "multimodal_data": [DATA]}
            found["llama"] = read("llama", [client.post("/completion", json={"prompt": seen, **LLAMA}).json()])
    assert found == dict.fromkeys(found, expected)
    assert len(found) == 11


SERVER = """
import sys
from mcp.server import MCPServer
from mcp.server.mcpserver import Image

server = MCPServer("camera")

@server.tool()
def look() -> Image:
    return Image(path=sys.argv[1])

server.run(transport="stdio")
"""


async def test_a_small_model_is_shown_what_a_tool_returns(tmp_path: Path) -> None:
    (tmp_path / "camera.py").write_text(SERVER)
    (tmp_path / "picture.png").write_bytes(FILE.getvalue())
    arguments = [str(tmp_path / "camera.py"), str(tmp_path / "picture.png")]
    camera = McpServerConfig(name="camera", command=sys.executable, args=arguments, auto_approve=["*"])
    call = {"id": "call_1", "type": "function", "function": {"name": "camera__look", "arguments": "{}"}}
    said = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with InferenceEngine(write(tmp_path / "model", "SmolVLM")) as engine:
        async with ResponsesSession(engine, said, mcp_servers=camera) as session:
            options = ConversationOptions(max_turns=1, request={"max_tokens": 6, "temperature": 0})
            result = await session.run_conversation(options=options)
            given: Any = session.messages[:3]
        assert given[2]["content"] == [{"type": "image_url", "image_url": {"url": URL}}]
        whole: Any = [
            *said,
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "image", "image": PIXELS}]},
        ]
        output = engine.chat(whole, SamplingParams(max_tokens=6, temperature=0))
        assert result.final_message == output.outputs[0].text
        assert result.usage.prompt_tokens == len(output.prompt_token_ids)
        assert output.prompt_token_ids.count(260) == 5 * 16  # tiles
