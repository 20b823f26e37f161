# SPDX-License-Identifier: MIT
"""Responses in the background: events for readers that come and go, every way to end, bounds, two servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from candle_vllm.core.errors import EngineOverloadedError, InvalidParameterError
from candle_vllm.responses.api import background as module
from candle_vllm.responses.api.background import Background
from candle_vllm.responses.api.conversations import ConversationCreateRequest, Conversations
from candle_vllm.responses.api.outliving import Chunks, EncodedEvent, Work
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.api.stored_items import entry_of
from candle_vllm.responses.protocol import events as wire
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.backend import StoreOptions
from candle_vllm.responses.store.entries import Entry, NotStoredError, StoreUnavailableError
from tests.waiting import until

Make = Callable[..., Response]


class Answer:
    """The events of an answer of four words; `gate` holds it back before the second."""

    def __init__(self, make: Make, name: str = "resp_1", *, open_gate: bool = False, fail: Any = None, **more: Any):
        self.queued = make(name, status="queued", background=True, **more)
        self._make, self._name, self._more = make, name, more
        self._fail = fail
        self.gate = asyncio.Event()
        self.closed = False
        if open_gate:
            self.gate.set()

    async def events(self) -> AsyncIterator[wire.StreamEvent]:
        numbers = iter(range(100))

        def lifecycle(kind: Any, status: str, **fields: Any) -> Any:
            made = self._make(self._name, status=status, background=True, **self._more, **fields)
            return kind(sequence_number=next(numbers), response=made)

        try:
            yield lifecycle(wire.ResponseCreated, "queued")
            yield lifecycle(wire.ResponseInProgress, "in_progress")
            for word in ("a", "b", "c", "d"):
                yield wire.OutputTextDelta(
                    sequence_number=next(numbers), item_id="m", output_index=0, content_index=0, delta=word
                )
                await self.gate.wait()
            if self._fail is not None:
                raise self._fail
            yield lifecycle(wire.ResponseCompleted, "completed", text="a b c d")
        finally:
            self.closed = True


def entry(response: Response) -> Entry:
    """As it is kept, with one item in."""
    given = {"id": f"msg_in_{response.id}", "type": "message", "role": "user", "status": "completed",
             "content": [{"type": "input_text", "text": "Hi"}]}  # fmt: skip
    return entry_of("a", response, [given])


async def begin(background: Background, answer: Answer, seconds: float = 10.0) -> AsyncIterator[EncodedEvent]:
    return await background.begin(entry(answer.queued), answer.events(), seconds)


async def status(kept: ResponseStore, name: str = "resp_1") -> str:
    found = await kept.get("a", name)
    assert found.status == msgspec.json.decode(found.body)["status"]
    return found.status


async def test_it_runs_to_its_end_without_a_reader(kept: ResponseStore, background: Background, answered: Make) -> None:
    answer = Answer(answered)
    await begin(background, answer)
    await until(lambda: background.events("a", "resp_1").next_number == 3)
    assert await status(kept) == "in_progress"
    assert background.busy
    answer.gate.set()
    await until(lambda: not background.busy)
    assert await status(kept) == "completed"
    assert b"a b c d" in (await kept.get("a", "resp_1")).body
    assert answer.closed
    assert [item["id"] for item in await kept.history("a", "resp_1")] == ["msg_in_resp_1", "msg_out_resp_1"]


async def test_readers_read_along_leave_and_come_back(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    answer = Answer(answered)
    first = await begin(background, answer)
    assert (await anext(first)).name == "response.created"
    await first.aclose()
    second = await background.stream("a", "resp_1", 0)
    assert [(await anext(second)).number for _ in range(2)] == [1, 2]
    waiting = asyncio.create_task(_all(second))
    others = [asyncio.create_task(_all(await background.stream("a", "resp_1"))) for _ in range(3)]
    await asyncio.sleep(0.02)
    answer.gate.set()
    assert [event.number for event in await waiting] == [3, 4, 5, 6]
    for other in others:
        events = await other
        assert [event.number for event in events] == list(range(7))
        for event in events:
            data = msgspec.json.decode(event.data)
            assert (data["type"], data["sequence_number"]) == (event.name, event.number)
    assert await status(kept) == "completed", "who has seen the end must find it in the store"
    await until(lambda: not background.busy)
    assert [event.number for event in await _all(await background.stream("a", "resp_1", 4))] == [5, 6]
    with pytest.raises(InvalidParameterError, match="the last one so far is 6"):
        await background.stream("a", "resp_1", 7)


async def _all(events: AsyncIterator[EncodedEvent]) -> list[EncodedEvent]:
    return [event async for event in events]


async def test_a_cancelled_one_stops(kept: ResponseStore, background: Background, answered: Make) -> None:
    answer = Answer(answered)
    reader = asyncio.create_task(_all(await begin(background, answer)))
    await until(lambda: background.events("a", "resp_1").next_number == 3)
    for _ in range(2):
        assert msgspec.json.decode(await background.cancel("a", "resp_1"))["status"] == "cancelled"
        assert answer.closed
        assert not background.busy
    assert len(await reader) == 3
    assert await status(kept) == "cancelled"
    answer.gate.set()
    await asyncio.sleep(0.02)
    assert await status(kept) == "cancelled"


async def test_only_background_responses_are_cancelled_or_streamed(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    await kept.put(entry(answered()))
    with pytest.raises(InvalidParameterError, match="background: true can be cancelled"):
        await background.cancel("a", "resp_1")
    with pytest.raises(InvalidParameterError, match="background: true") as error:
        await background.stream("a", "resp_1")
    assert error.value.param == "stream"
    for work in (background.cancel("b", "resp_1"), background.stream("b", "resp_1"), background.delete("b", "resp_1")):
        with pytest.raises(NotStoredError):
            await work


async def test_a_finished_one_stays_as_it_is_when_it_is_cancelled(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    await begin(background, Answer(answered, open_gate=True))
    await until(lambda: not background.busy)
    assert msgspec.json.decode(await background.cancel("a", "resp_1"))["status"] == "completed"


async def test_one_that_is_deleted_in_mid_run_is_ended_and_does_not_come_back(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    answer = Answer(answered)
    await begin(background, answer)
    await until(lambda: background.events("a", "resp_1").next_number == 3)
    assert (await background.delete("a", "resp_1")).deleted
    assert answer.closed
    assert not background.busy
    with pytest.raises(NotStoredError):
        await kept.get("a", "resp_1")
    assert background.events("a", "resp_1") is None


async def test_one_that_was_deleted_behind_its_back_ends_with_its_next_word(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    answer = Answer(answered)
    await begin(background, answer)
    await until(lambda: background.events("a", "resp_1").next_number == 3)
    await kept.delete("a", "resp_1")
    answer.gate.set()
    await until(lambda: not background.busy)
    with pytest.raises(NotStoredError):
        await kept.get("a", "resp_1")


@pytest.mark.parametrize("again", ["cancel", "delete", "stop"])
async def test_a_second_end_does_not_interrupt_the_first(
    kept: ResponseStore, background: Background, answered: Make, again: str
) -> None:
    answer, closing, may_close, closed = Answer(answered), asyncio.Event(), asyncio.Event(), list[str]()

    async def events() -> AsyncIterator[wire.StreamEvent]:
        try:
            async for event in answer.events():
                yield event
        finally:
            closing.set()
            await may_close.wait()
            closed.append("the place in the engine")

    reader = asyncio.create_task(_all(await background.begin(entry(answer.queued), events(), 10.0)))
    await until(lambda: background.events("a", "resp_1").next_number == 3)
    first = asyncio.create_task(background.cancel("a", "resp_1"))
    await closing.wait()
    second = asyncio.create_task(getattr(background, again)("a", "resp_1"))
    await asyncio.sleep(0.02)
    may_close.set()
    await asyncio.gather(first, second)
    assert (closed, background.busy, len(await reader)) == (["the place in the engine"], False, 3)


async def test_a_full_queue_is_told_in_its_own_words(
    kept: ResponseStore, background: Background, answered: Make, caplog
) -> None:
    full = EngineOverloadedError("8 sequences are running or waiting")
    last = (await _all(await begin(background, Answer(answered, open_gate=True, fail=full))))[-1]
    error = msgspec.json.decode(last.data)["response"]["error"]
    assert error == {"code": "rate_limit_exceeded", "message": str(full)}
    assert not caplog.text


async def test_a_failure_is_told_and_kept(kept: ResponseStore, background: Background, answered: Make, caplog) -> None:
    events = await _all(await begin(background, Answer(answered, open_gate=True, fail=ValueError("a secret path"))))
    assert [event.number for event in events] == list(range(7))
    last = msgspec.json.decode(events[-1].data)
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "The server failed on this request."}
    assert await status(kept) == "failed"
    assert "the background response resp_1 failed" in caplog.text
    caplog.clear()


async def test_one_that_takes_too_long_fails(kept: ResponseStore, background: Background, answered: Make) -> None:
    answer = Answer(answered)
    events = await _all(await begin(background, answer, seconds=0.05))
    assert msgspec.json.decode(events[-1].data)["response"]["error"]["message"] == module.TOO_LONG
    assert await status(kept) == "failed"
    assert answer.closed


async def test_events_that_end_without_a_result_are_a_failure(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    async def nothing() -> AsyncIterator[wire.StreamEvent]:
        return
        yield

    events = await _all(await background.begin(entry(answered(status="queued", background=True)), nothing(), 10))
    assert [event.name for event in events] == ["response.failed"]
    assert await status(kept) == "failed"


async def test_what_runs_at_the_end_of_the_server_has_failed(answered: Make, tmp_path: Path) -> None:
    options = StoreOptions(url=f"sqlite:///{tmp_path}/r.sqlite")
    kept = ResponseStore(options)
    first = Background(kept)
    answer = Answer(answered)
    events = asyncio.create_task(_all(await begin(first, answer)))
    await until(lambda: first.events("a", "resp_1").next_number == 3)
    await first.close()
    await kept.close()
    assert msgspec.json.decode((await events)[-1].data)["response"]["status"] == "failed"
    assert answer.closed
    with pytest.raises((EngineOverloadedError, StoreUnavailableError)):
        await begin(first, Answer(answered, "resp_2"))
    second = ResponseStore(options)
    assert await status(second) == "failed"
    body = msgspec.json.decode((await second.get("a", "resp_1")).body)
    assert "stopped" in body["error"]["message"]
    with pytest.raises(InvalidParameterError, match="no longer stored; its status is failed"):
        await Background(second).stream("a", "resp_1")
    await second.close()


async def test_another_server_cancels(answered: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.02)
    options = StoreOptions(url=f"sqlite:///{tmp_path}/r.sqlite")
    stores = ResponseStore(options), ResponseStore(options)
    first, second = (Background(each) for each in stores)
    answer = Answer(answered)
    await begin(first, answer)
    await until(lambda: first.events("a", "resp_1").next_number == 3)
    await second.cancel("a", "resp_1")
    await until(lambda: not first.busy)
    assert answer.closed
    assert await status(stores[0]) == "cancelled"
    for each in (first, second, *stores):
        await each.close()


async def test_too_many_are_refused_and_leave_nothing(kept: ResponseStore, answered: Make) -> None:
    background = Background(kept, max_running=4)
    answers = [Answer(answered, f"resp_{number}") for number in range(3)]
    for answer in answers[:2]:
        await begin(background, answer)
    events = answers[2].events()
    await anext(events)
    with pytest.raises(EngineOverloadedError, match="at most 2 of one key and 4 in all"):
        await background.begin(entry(answers[2].queued), events, 10)
    assert answers[2].closed
    with pytest.raises(NotStoredError):
        await kept.get("a", "resp_2")
    answers[0].gate.set()
    await until(lambda: len(background._running) == 1)
    await begin(background, answers[2])
    await background.close()
    with pytest.raises(EngineOverloadedError, match="The server is stopping"):
        await begin(background, answers[1])


async def test_a_store_that_is_gone_at_the_end_fails_the_response(
    kept: ResponseStore, background: Background, answered: Make, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    answer = Answer(answered)
    events = await begin(background, answer)
    await until(lambda: background.events("a", "resp_1").next_number == 3)

    async def gone(*_: Any, **__: Any) -> bool:
        raise StoreUnavailableError("gone")

    monkeypatch.setattr(await kept.backend(), "change", gone)
    answer.gate.set()
    last = (await _all(events))[-1]
    assert last.name == "response.failed"
    assert msgspec.json.decode(last.data)["response"]["error"]["code"] == "server_error"
    assert "could not be stored" in caplog.text
    caplog.clear()


async def test_a_result_that_is_too_large_is_a_failure(answered: Make, caplog) -> None:
    kept = ResponseStore(StoreOptions(max_record_bytes=3000))
    background = Background(kept)
    answer = Answer(answered, open_gate=True, metadata={"k": "x" * 500})
    answer._more["text"] = "x"

    async def events() -> AsyncIterator[wire.StreamEvent]:
        yield wire.ResponseCreated(sequence_number=0, response=answer.queued)
        large = answered(status="completed", background=True, text="x" * 4000)
        yield wire.ResponseCompleted(sequence_number=1, response=large)

    seen = await _all(await background.begin(entry(answer.queued), events(), 10))
    assert [event.name for event in seen] == ["response.created", "response.failed"]
    assert "at most 3000" in msgspec.json.decode(seen[-1].data)["response"]["error"]["message"]
    assert await status(kept) == "failed"
    await background.close()
    await kept.close()
    caplog.clear()


async def test_the_end_is_added_to_its_conversation(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    name = (await Conversations(kept).create("a", ConversationCreateRequest())).id
    events = await begin(background, Answer(answered, open_gate=True, conversation=name))
    async for event in events:
        if event.name == "response.completed":
            ids = [item["id"] for item in await kept.conversation_items("a", name)]
            assert ids == ["msg_in_resp_1", "msg_out_resp_1"]
    await kept.add_to_conversation(entry(answered(background=True, conversation=name)))  # its items are there already
    assert len(await kept.conversation_items("a", name)) == 2


async def test_a_failure_adds_nothing_to_its_conversation(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    conversation = (await Conversations(kept).create("a", ConversationCreateRequest())).id
    queued = answered("resp_1", status="queued", background=True, conversation=conversation)

    async def events() -> AsyncIterator[wire.StreamEvent]:
        yield wire.ResponseCreated(sequence_number=0, response=queued)
        said = answered("resp_1", conversation=conversation)
        yield wire.ResponseFailed(sequence_number=1, response=msgspec.structs.replace(said, status="failed"))

    await background.begin(entry(queued), events(), 10.0)
    await until(lambda: not background.busy)
    assert await status(kept) == "failed"
    assert await kept.conversation_items("a", conversation) == []


async def test_a_renewal_does_not_end_a_response_whose_end_is_being_stored(
    kept: ResponseStore, background: Background, answered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease has ended with its end, as if another server had cancelled it."""
    name = (await Conversations(kept).create("a", ConversationCreateRequest())).id
    at_end, goes_on, add = asyncio.Event(), asyncio.Event(), kept.add_to_conversation

    async def held(ended: Entry) -> None:
        at_end.set()
        await goes_on.wait()
        await add(ended)

    monkeypatch.setattr(kept, "add_to_conversation", held)
    answer = Answer(answered, conversation=name)
    events = await begin(background, answer)
    renew = kept.renew

    async def late(names: Any) -> Any:
        answer.gate.set()  # the end overtakes a renewal that has begun
        await at_end.wait()
        return await renew(names)

    monkeypatch.setattr(kept, "renew", late)
    await background._renew()
    await background._renew()
    goes_on.set()
    assert (await _all(events))[-1].name == "response.completed"
    assert [item["id"] for item in await kept.conversation_items("a", name)] == ["msg_in_resp_1", "msg_out_resp_1"]


async def test_one_that_is_stopped_before_it_has_begun_leaves_nothing(
    kept: ResponseStore, background: Background, answered: Make
) -> None:
    answer = Answer(answered)
    await begin(background, answer)  # its task has not run yet
    await asyncio.gather(background.cancel("a", "resp_1"), background.stop("a", "resp_1"))
    assert (background.busy, await status(kept)) == (False, "cancelled")


async def test_one_that_is_stored_while_the_server_ends_does_not_run(
    kept: ResponseStore, answered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    background, answer, stored, put = Background(kept), Answer(answered), asyncio.Event(), kept.put

    async def slowly(made: Entry) -> None:
        await stored.wait()
        await put(made)

    monkeypatch.setattr(kept, "put", slowly)
    beginning = asyncio.create_task(begin(background, answer))
    await until(lambda: background.busy)
    await background.close()
    stored.set()
    assert [event.name for event in await asyncio.wait_for(_all(await beginning), 10)] == ["response.failed"]
    assert (background.busy, background._renewing, await status(kept)) == (False, None, "failed")


async def test_events_are_kept_for_a_bounded_number_of_responses(
    kept: ResponseStore, background: Background, answered: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 2)
    for number in range(4):
        await _all(await begin(background, Answer(answered, f"resp_{number}", open_gate=True)))
    await until(lambda: not background.busy)
    there = [background.events("a", f"resp_{number}") is not None for number in range(4)]
    assert there == [False, False, True, True]


async def test_the_oldest_pieces_go_where_there_are_too_many() -> None:
    pieces = Chunks[int](max_bytes=100)
    with pytest.raises(InvalidParameterError, match="not 0; no event was sent yet"):
        pieces.check(0)
    for number in range(10):
        pieces.add(number, 30)
    assert (pieces.size, list(pieces), pieces.next_number) == (90, [7, 8, 9], 10)
    pieces.check(6)
    for wrong in (-1, 5, 10):
        with pytest.raises(InvalidParameterError) as error:
            pieces.check(wrong)
        assert error.value.param == "starting_after"
    slow = pieces.read(6)
    assert await anext(slow) == 7
    for number in range(10, 13):
        pieces.add(number, 30)
    with pytest.raises(InvalidParameterError, match="no longer stored"):
        await anext(slow)
    pieces.add(13, 500, last=True)
    assert [piece async for piece in pieces.read(12)] == [13]


async def test_readers_get_the_failure_at_their_end() -> None:
    pieces = Chunks[int]()
    pieces.add(0)
    early = pieces.read()
    assert await anext(early) == 0
    waiting = asyncio.create_task(anext(early))
    await asyncio.sleep(0)
    pieces.finish(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await waiting
    late = pieces.read()
    assert await anext(late) == 0
    with pytest.raises(ValueError, match="broken"):
        await anext(late)


async def test_work_tells_its_end_also_if_the_closing_of_its_pieces_is_cancelled() -> None:
    ends, closing = list[BaseException | None](), asyncio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closing.set()
            await asyncio.Event().wait()

    async def take(_: int) -> None:
        raise ValueError("no")

    async def end(failure: BaseException | None) -> None:
        ends.append(failure)

    work = Work(numbers(), 5, take, end)
    await closing.wait()
    await work.cancel()
    assert [type(each) for each in ends] == [asyncio.CancelledError]


async def test_the_end_of_work_is_not_cancelled() -> None:
    ending, stored, ends = asyncio.Event(), asyncio.Event(), list[Any]()

    async def pieces() -> AsyncIterator[int]:
        yield 1

    async def take(_: int) -> None:
        pass

    async def end(failure: Any) -> None:
        ending.set()
        await stored.wait()
        ends.append(failure)

    work = Work(pieces(), 10, take, end)
    await ending.wait()
    cancelling = asyncio.create_task(work.cancel())
    await asyncio.sleep(0.01)
    stored.set()
    await cancelling
    assert ends == [None]


@pytest.mark.parametrize(
    ("seconds", "cancelled", "fails", "kind"),
    [(5, False, False, None), (0.02, False, False, TimeoutError), (5, True, False, asyncio.CancelledError),
     (5, False, True, ValueError)],
)  # fmt: skip
async def test_work_closes_its_pieces_before_it_tells_its_end(
    seconds: float, cancelled: bool, fails: bool, kind: type[BaseException] | None
) -> None:
    log: list[Any] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
            if fails:
                raise ValueError("no")
            if kind is not None:
                await asyncio.Event().wait()
        finally:
            log.append("closed")

    async def take(number: int) -> None:
        log.append(number)

    async def end(failure: BaseException | None) -> None:
        log.append(failure)

    work = Work(numbers(), seconds, take, end)
    if cancelled:
        await work.cancel()  # at once: it has not begun yet
    await asyncio.wait_for(asyncio.wait({work.task}), 60)
    assert not work.task.cancelled()
    *before, last = log
    assert before == [1, "closed"]
    assert last is None if kind is None else isinstance(last, kind)
