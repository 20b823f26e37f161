# SPDX-License-Identifier: MIT
"""Stages of an answer, run when an output arrives: tokens -> events -> chunks (step 10 of a request's life)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from candle_vllm.core.engine.outputs import TokenOutput
from candle_vllm.core.engine.step.stream import PushStream, Receiver
from candle_vllm.openai.answers import AnswerReader
from candle_vllm.openai.engine import TokenStream
from candle_vllm.openai.events import Event

ChunkT = TypeVar("ChunkT")
_ChunkT_co = TypeVar("_ChunkT_co", covariant=True)


class Writer(Protocol[_ChunkT_co]):
    """Writes events in the form of an API."""

    def write(self, events: Sequence[Event]) -> Sequence[_ChunkT_co]: ...


class AnswerStream(PushStream[Event]):
    """Events of one answer, from the outputs of one or more engine streams.

    Args:
        sources: one stream for each prompt.
        reader: converts outputs to events.
        prompt: tokens of the first prompt, also an attribute.

    Attributes:
        head: fields of the answer that are known in advance.
    """

    def __init__(self, sources: Sequence[TokenStream], reader: AnswerReader, prompt: Sequence[int] = ()) -> None:
        self.head = reader.head
        self.prompt = prompt
        self._sources = sources
        self._reader = reader

    def push(self, receiver: Receiver[Event]) -> None:
        unended = set(range(len(self._sources)))
        for number, source in enumerate(self._sources):
            source.push(_Reading(number, self._reader, receiver, unended))

    def hold(self, held: bool) -> None:
        for source in self._sources:
            source.hold(held)

    def close(self) -> None:
        for source in self._sources:
            source.close()


class ChunkStream(PushStream[ChunkT]):
    """An answer in the form of an API.

    Args:
        events: events of the answer.
        writer: converts events to chunks.
        worded: returns a context manager that rewords errors for the API.
        first: chunks to send before the first token.
    """

    def __init__(
        self,
        events: AnswerStream,
        writer: Writer[ChunkT],
        worded: Callable[[], AbstractContextManager[object]] = nullcontext,
        first: Sequence[ChunkT] = (),
    ) -> None:
        self._first = first
        self._events = events
        self._writer = writer
        self._worded = worded

    def push(self, receiver: Receiver[ChunkT]) -> None:
        if self._first:
            receiver.put(self._first)
        self._events.push(_Writing(self._writer, self._worded, receiver))

    def hold(self, held: bool) -> None:
        self._events.hold(held)

    def close(self) -> None:
        self._events.close()


class _Reading:
    """The stage that converts the outputs of one prompt to events.

    Args:
        number: index of the prompt.
        reader: reader for all prompts.
        receiver: receives the events of all prompts.
        unended: indices of the prompts whose engine stream has not ended; shared by all stages.
    """

    def __init__(self, number: int, reader: AnswerReader, receiver: Receiver[Event], unended: set[int]) -> None:
        self._number = number
        self._reader = reader
        self._receiver = receiver
        self._unended = unended

    def put(self, items: Sequence[TokenOutput]) -> None:
        if self._number not in self._unended:
            return
        for piece in items:
            try:
                events = self._reader.add(self._number, piece)
            except Exception as failure:
                self.end(failure)
                return
            if events:
                self._receiver.put(events)

    def end(self, error: Exception | None = None) -> None:
        if self._number not in self._unended:
            return
        self._unended.discard(self._number)
        if error is None and self._unended:
            return
        self._unended.clear()
        try:
            if error is None:
                self._receiver.put(self._reader.end())
        except Exception as failure:
            error = failure
        self._receiver.end(error)
        del error  # its traceback keeps this frame alive


class _Writing:
    """The stage that converts events to the chunks of an API."""

    def __init__(
        self,
        writer: Writer[ChunkT],
        worded: Callable[[], AbstractContextManager[object]],
        receiver: Receiver[ChunkT],
    ) -> None:
        self._write = writer.write
        self._worded = worded
        self._receiver = receiver
        self._ended = False

    def put(self, items: Sequence[Event]) -> None:
        if self._ended:
            return
        try:
            chunks = self._write(items)
        except Exception as failure:
            self.end(failure)
            return
        if chunks:
            self._receiver.put(chunks)

    def end(self, error: Exception | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            with self._worded():
                if error is not None:
                    raise error
        except Exception as told:
            error = told
        self._receiver.end(error)
        del error  # its traceback keeps this frame alive
