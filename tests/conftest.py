# SPDX-License-Identifier: MIT
"""Models that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from tests.live_server import ServerProcess

if TYPE_CHECKING:
    from candle_vllm.core import InferenceEngine


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a context of 2048 tokens."""
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(max_position_embeddings=2048))


@pytest.fixture(scope="session")
def calling_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a chat template that shows tools and writes calls like Qwen's."""
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


@pytest.fixture(scope="session")
def coder() -> Iterator[InferenceEngine]:
    """A model that writes calls by itself."""
    from candle_vllm.core import InferenceEngine
    from tests.real_models import qwen_coder

    with InferenceEngine(str(qwen_coder()), max_model_len=2048, threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """`candle-vllm` without a model, as on a fresh machine: it serves the demo model, with one thread.

    Two threads that wait for each other lose most of their speed when a core is busy.
    """
    process = ServerProcess(tmp_path_factory.mktemp("demo"), "--threads", "1")
    yield process
    assert process.stop() == 0
