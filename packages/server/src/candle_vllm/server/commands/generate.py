# SPDX-License-Identifier: MIT
"""`candle-vllm generate`: continues one prompt on standard output (from step 2 with `--chat`, else from step 3)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncGenerator
from typing import Any

from candle_vllm.core import CandleVllmError, InferenceEngine, SamplingParams
from candle_vllm.server.commands.terminal import Display, Said, answer_pieces, conversation, read_stdin, unfinished
from candle_vllm.server.settings.derived import load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ModelOptions

DEFAULT_MAX_TOKENS = 256


def generate(
    settings: ModelOptions,
    prompt: str,
    chat: bool = False,
    system: str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    stop: tuple[str, ...] = (),
) -> int:
    """Print the continuation of `prompt` ("-" reads it from standard input), and a newline."""
    if system is not None and not chat:
        raise UsageError("--system needs --chat: a plain prompt has no system message")
    text = read_stdin("prompt") if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty")
    with load_engine(settings, max_num_seqs=1) as engine:
        gc.freeze()  # the process ends soon, so no garbage collection is needed
        if chat:
            messages = conversation(system, text)
            pieces = answer_pieces(engine, messages, settings, max_tokens, stop)
        else:
            pieces = _continuation(engine, text, settings, max_tokens, stop)
        asyncio.run(_write(pieces))
    return 0


async def _continuation(
    engine: InferenceEngine, prompt: str, settings: ModelOptions, max_tokens: int, stop: tuple[str, ...]
) -> AsyncGenerator[Said, None]:
    sampling: dict[str, Any] = {**engine.model_info.default_sampling, **settings.default_sampling}
    sampling |= {"max_tokens": max_tokens, "stop": stop or None}
    stream = engine.stream(prompt, SamplingParams(**sampling))
    try:
        async for piece in stream:
            if piece.error is not None:
                raise CandleVllmError(f"the engine failed on this prompt: {piece.error}")
            yield Said(piece.text, ended=piece.finish_reason)
    finally:
        await stream.aclose()


async def _write(pieces: AsyncGenerator[Said, None]) -> None:
    display, ended = Display(), None
    async with contextlib.aclosing(pieces) as said:
        async for piece in said:
            display.show(piece)
            ended = piece.ended
    sys.stdout.write("\n")
    sys.stdout.flush()
    if text := unfinished(ended):
        sys.stderr.write(f"{text}\n")
