"""Models that the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

sys.path.append(str(Path(__file__).parent))  # for live_server; --import-mode=importlib does not


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a context of 2048 tokens."""
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(max_position_embeddings=2048))


@pytest.fixture(scope="session")
def calling_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template that shows tools and writes calls as Qwen's does."""
    folder = write_toy_model(tmp_path_factory.mktemp("calling"), toy_config(max_position_embeddings=2048))
    (folder / "chat_template.jinja").write_text(
        "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
        "{% for call in message.tool_calls or [] %}<tool_call>\n"
        '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}\n'
        "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return folder
