# SPDX-License-Identifier: MIT
"""`candle-vllm generate`, and code that the text commands share: requests from conversations, answers as safe text.

Steps 2 and 10 of a request's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import stat
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.errors import CandleVllmError, PromptTooLongError
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.server.settings.derived import adapter_of, load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ModelOptions

if TYPE_CHECKING:
    from candle_vllm.core import InferenceEngine
    from candle_vllm.core.engine.requests import LoRARequest

MAX_TEXT = 64 << 20  # maximum bytes of a text on standard input

Message = dict[str, Any]


def conversation(system: str | None, text: str) -> list[Message]:
    """Return a conversation with one user message, after a non-empty system message."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": text}]


def unfinished(reason: FinishReason | None, at: str = "its token limit (--max-tokens, or the model's context)") -> str:
    """Return a text that names the limit that cut an answer (`at`: the token limit); "" if the answer was not cut."""
    if reason is None or not reason.cut:
        return ""
    limit = at if reason is FinishReason.LENGTH else reason.limit
    return f"not finished: the answer was cut at {limit}"


class Said(NamedTuple):
    """A delta of an answer, or of the reasoning before it."""

    text: str
    thought: bool = False
    tokens: int | None = None  # tokens of the whole answer with its reasoning, in the last delta
    ended: FinishReason | None = None  # in the last delta


async def answer_pieces(
    engine: InferenceEngine,
    messages: Sequence[Message],
    settings: ModelOptions,
    max_tokens: int | None,
    stop: Sequence[str] = (),
    uses: Sequence[tuple[LoRARequest, float]] = (),
) -> AsyncGenerator[Said, None]:
    """Yield the deltas of the model's answer with the adapters `uses`; closing the iterator aborts the request."""
    from candle_vllm.openai.events import Ended, Text, Thought, Usage

    adapter, name = adapter_of(engine, settings, adapters=_Always(uses) if uses else None), engine.model_info.name
    wire: dict[str, Any] = {"model": name, "messages": list(messages), "stream": True, **settings.default_sampling}
    if max_tokens is not None:
        wire["max_completion_tokens"] = max_tokens
    if stop:
        wire["stop"] = list(stop)
    answer = await adapter.chat_events(wire)
    ended = None
    try:
        async for event in answer:
            if isinstance(event, Thought | Text):
                yield Said(event.text, thought=isinstance(event, Thought))
            elif isinstance(event, Ended):
                ended = event.reason
            elif isinstance(event, Usage) and event.final:
                yield Said("", tokens=event.completion_tokens, ended=ended)
    finally:
        await answer.aclose()


class _Always:
    """Applies the same adapters to every request (`candle_vllm.openai.serving.AdapterNames`)."""

    def __init__(self, uses: Sequence[tuple[LoRARequest, float]]) -> None:
        self._uses = uses

    def is_known(self, name: str) -> bool:
        return any(lora.lora_name == name for lora, _ in self._uses)

    def uses(self, name: str | None, scales: Mapping[int, float] | None) -> Sequence[tuple[LoRARequest, float]]:  # noqa: ARG002
        return self._uses


class Display:
    """Prints an answer on standard output; reasoning is shown dimmed, and only on a terminal."""

    def __init__(self) -> None:
        self._thinking = False
        self._rate = ""
        self._begun = False

    def show(self, piece: Said) -> None:
        """Print one delta."""
        self._begun = True
        if not piece.text or (piece.thought and not sys.stdout.isatty()):
            return
        text = terminal_safe(piece.text)
        if piece.thought:
            text = dimmed(text)
        elif self._thinking:
            text = "\n\n" + text
        self._thinking = piece.thought
        sys.stdout.write(text)
        sys.stdout.flush()

    def tell_rate(self, tokens: int, seconds: float) -> None:
        """On a terminal, set the token rate for the end of the answer: `tokens` in `seconds` after the first token."""
        if sys.stdout.isatty():
            rate = f", {(tokens - 1) / seconds:.1f} a second" if tokens > 1 and seconds > 0 else ""
            self._rate = dimmed(f"({tokens} tokens{rate})") + "\n"

    def close(self) -> None:
        """End the line of the answer, if an answer has begun, and print the token rate."""
        sys.stdout.write("\n" if self._begun else "")
        self._write_rate()

    def _write_rate(self) -> None:
        sys.stdout.write(self._rate)
        sys.stdout.flush()
        self._rate = ""
        self._begun = self._thinking = False


def require_stdin() -> None:
    """Raise UsageError if standard input is closed."""
    if sys.stdin is None:
        raise UsageError("standard input is closed: give it a text, or /dev/null")


def is_piped() -> bool:
    """Whether standard input is a pipe or a file; a socket, such as that of ssh, may never end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or has no descriptor
        return stat.S_IFMT(os.fstat(sys.stdin.fileno()).st_mode) in (stat.S_IFIFO, stat.S_IFREG)
    return False


def read_stdin(name: str) -> str:
    """Read standard input as a text; error messages call it `name`."""
    require_stdin()
    return _decoded(sys.stdin.buffer.read(MAX_TEXT + 1), name)


def read_line(name: str) -> str:
    """Read the next line of standard input with its line end, "" at the end of input; error messages call it `name`."""
    return _decoded(sys.stdin.buffer.readline(MAX_TEXT + 1), name)


def _decoded(data: bytes, name: str) -> str:
    if len(data) > MAX_TEXT:
        raise UsageError(f"the {name} on standard input is larger than {MAX_TEXT >> 20} MB")
    try:
        return data.decode("utf-8-sig")  # without the byte order mark that programs of Windows write
    except UnicodeDecodeError as error:
        raise UsageError(f"the {name} on standard input is not UTF-8: byte {error.start}") from None


def dimmed(text: str) -> str:
    """Return a text in the terminal's faint style; unchanged for a dumb terminal."""
    return text if os.environ.get("TERM", "dumb") == "dumb" else f"\x1b[2m{text}\x1b[0m"


def terminal_safe(text: str, stream: TextIO | None = None) -> str:
    """If the stream (default: stdout) is a terminal, remove control characters, which could move its cursor."""
    if not (stream or sys.stdout).isatty():
        return text
    return "".join(char for char in text if char in "\n\t" or (char >= " " and not "\x7f" <= char <= "\x9f"))


# ---- generate --------------------------------------------------------------------------------------------------------


def generate(
    settings: ModelOptions,
    prompt: str,
    chat: bool = False,
    system: str | None = None,
    max_tokens: int | None = None,
    stop: tuple[str, ...] = (),
) -> int:
    """Print the continuation of `prompt` ("-": standard input), by default of 256 tokens, or with `chat` the answer."""
    if system is not None and not chat:
        raise UsageError("--system needs --chat: a plain prompt has no system message")
    text = read_stdin("prompt").removesuffix("\n").removesuffix("\r") if prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty")
    with load_engine(settings, max_num_seqs=1) as engine:
        gc.freeze()  # the process ends soon, so no garbage collection is needed

        def pieces(most: int | None) -> AsyncGenerator[Said, None]:
            if chat:
                return answer_pieces(engine, conversation(system, text), settings, most, stop)
            return _continuation(engine, text, settings, most, stop)

        try:
            asyncio.run(_write(pieces(max_tokens or (None if chat else 256))))
        except PromptTooLongError:
            if max_tokens is not None:
                raise
            asyncio.run(_write(pieces(None)))  # up to the context's end, which is nearer
    return 0


async def _continuation(
    engine: InferenceEngine, prompt: str, settings: ModelOptions, max_tokens: int | None, stop: tuple[str, ...]
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
    try:
        async with contextlib.aclosing(pieces) as said:
            async for piece in said:
                display.show(piece)
                ended = piece.ended
    finally:  # end the line: what is written after Ctrl+C or a failure would replace it on a terminal
        display.close()
    if text := unfinished(ended):
        sys.stderr.write(f"{text}\n")
