"""`candle-vllm chat`: a conversation on the terminal.

Each turn enters the life of a request at step 2. Ctrl+C during an answer stops the answer and keeps what was said;
Ctrl+C or Ctrl+D at the prompt ends the conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import RequestError
from candle_vllm.server.commands.terminal import Display, Message, answer_pieces
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.derived import load_engine

_HELP = "/reset starts over, /exit ends; Ctrl+C stops an answer"


def chat(settings: Settings, system: str | None = None, max_tokens: int | None = None) -> int:
    """Talks until /exit, end of input, or Ctrl+C at the prompt."""
    with load_engine(settings, max_num_seqs=1) as engine, asyncio.Runner() as runner:
        _say(f"{engine.model_info.name}: {_HELP}\n")
        start: list[Message] = [{"role": "system", "content": system}] if system is not None else []
        messages = list(start)
        while (line := _read_line()) is not None:
            if line == "/reset":
                messages = list(start)
                _say("(new conversation)\n")
            elif line.startswith("/"):
                _say(f"unknown command {line.split()[0]}: {_HELP}\n")
            elif line:
                _turn(runner, engine, settings, messages, line, max_tokens)
    return 0


def _turn(
    runner: asyncio.Runner,
    engine: InferenceEngine,
    settings: Settings,
    messages: list[Message],
    line: str,
    max_tokens: int | None,
) -> None:
    """One question and its answer; a question that the engine refuses leaves the conversation as it was."""
    messages.append({"role": "user", "content": line})
    parts: list[str] = []
    try:
        runner.run(_answer(engine, settings, messages, max_tokens, parts))
    except RequestError as error:
        messages.pop()
        _say(f"error: {error}\n")
        return
    except KeyboardInterrupt:
        _say("\n(stopped)")
    _say("\n")
    messages.append({"role": "assistant", "content": "".join(parts)})


async def _answer(
    engine: InferenceEngine, settings: Settings, messages: list[Message], max_tokens: int | None, parts: list[str]
) -> None:
    display = Display()
    async with contextlib.aclosing(answer_pieces(engine, messages, settings, max_tokens)) as pieces:
        async for piece in pieces:
            if not piece.thought:
                parts.append(piece.text)
            display.show(piece)


def _read_line() -> str | None:
    """The next line without its end; None for /exit, end of input, or Ctrl+C."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() editing and history
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        _say("\n" if sys.stdin.isatty() else "")
        return None
    return None if line == "/exit" else line


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
