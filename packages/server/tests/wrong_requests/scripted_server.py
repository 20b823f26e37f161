# SPDX-License-Identifier: MIT
"""A server process around a scripted engine: a token every 10 ms. Prints its port. For `test_neighbours.py`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[4]))  # run as a program

from candle_vllm.core.errors import PromptTooLongError
from candle_vllm.server.app import create_app
from candle_vllm.server.serve import bind, make_server
from candle_vllm.server.settings import Settings
from packages.server.tests.server_fakes import PacedEngine

PAUSE = 0.01
CONTEXT = 1 << 20


class BoundedEngine(PacedEngine):
    """Does two things as `InferenceEngine` does.

    A text that is longer than any prompt is refused before it is looked at, and vectors are computed beside the loop.
    """

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > CONTEXT:
            raise PromptTooLongError(f"the text has {len(text)} characters, and at most {CONTEXT} can be", "prompt")
        return super().tokenize(text, add_special_tokens)

    async def aembed(self, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(asyncio.run, super().aembed(*args, **options))

    async def ascore(self, *args: Any, **options: Any) -> Any:
        return await asyncio.to_thread(asyncio.run, super().ascore(*args, **options))


if __name__ == "__main__":
    settings = Settings(port=0, shutdown_timeout=1, trust_request_chat_template=True, strict_model_names=True)
    engine = BoundedEngine("Hello! ", pause=PAUSE, max_model_len=CONTEXT, chat_template="{{ tools }}<tool_call>")
    listener = bind(settings.address)
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    make_server(create_app(engine, settings), settings).run(sockets=[listener])
