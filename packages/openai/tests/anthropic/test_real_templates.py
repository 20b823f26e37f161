# SPDX-License-Identifier: MIT
"""A coding agent's conversation through the chat templates of real models: all of it reaches the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import RequestError
from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import ChatConventions
from candle_vllm.openai import OpenAIAdapter, planning
from candle_vllm.openai.anthropic import MessagesAdapter
from tests.common_run import few

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SCHEMA = {"type": "object", "properties": {"command": {"type": "string", "description": "d"}}}
BODY: dict[str, Any] = {
    "model": "default",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "First instructions."}],
    "tools": [{"name": "Bash", "description": "d", "input_schema": SCHEMA}],
    "thinking": {"type": "adaptive"},
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is here?"}]},
        {"role": "system", "content": "Late instructions."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "tool_use", "id": "toolu_0123456789", "name": "Bash", "input": {"command": "ls"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_0123456789", "content": "README.md"},
                {"type": "text", "text": "And what else?"},
            ],
        },
        {"role": "system", "content": "Last instructions."},
    ],
}
SAID = ("First instructions.", "What is here?", "Late instructions.", "And what else?", "Last instructions.")

REFUSED = {  # whatever the route: the template cannot render tools here
    "fireworks-ai-llama-3-firefunction-v2", "llama-cpp-deepseek-r1",
}  # fmt: skip


class TemplateEngine(ScriptedEngine):
    """Renders with a real template."""

    def __init__(self, source: str) -> None:
        super().__init__("ok", max_model_len=1 << 17)
        self.chat_conventions = ChatConventions(
            chat_template=source, special_tokens=self.tokenizer.special_tokens, token_names=NAMES
        )
        self.template = ChatTemplate(source, NAMES)

    def render_messages(self, messages: Any, **options: Any) -> str:
        return self.template.render(messages, **options)


@pytest.mark.parametrize("part", few(range(3), 0))
async def test_all_that_is_said_is_in_the_prompt(
    llama_cpp_models: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    refused, missing = set[str](), dict[str, list[str]]()
    files = sorted((llama_cpp_models / "templates").glob("*.jinja"))
    chosen = files[part::3]
    for file in chosen:
        engine = TemplateEngine(file.read_text(encoding="utf-8"))
        # Compiled once, which takes most of the test's time.
        monkeypatch.setattr(planning, "_compiled", lambda _conventions, engine=engine: engine.template)
        try:
            await MessagesAdapter(OpenAIAdapter(engine)).create(BODY)
        except RequestError:
            refused.add(file.stem)
            continue
        prompt = engine.detokenize(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)
        if lost := [text for text in (*SAID, "README.md") if text not in prompt]:
            missing[file.stem] = lost
    assert len(files) > 60
    assert refused == REFUSED & {file.stem for file in chosen}
    assert not missing
