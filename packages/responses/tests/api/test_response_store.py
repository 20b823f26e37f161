# SPDX-License-Identifier: MIT
"""Kept responses and conversations without HTTP: turns, lists, the form of items, when the store is opened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.responses.api import response_store
from candle_vllm.responses.api.conversations import ConversationCreateRequest, Conversations, ItemsCreateRequest
from candle_vllm.responses.api.response_store import ResponseStore
from candle_vllm.responses.api.stored_items import PageRequest, entry_of, page_of, stored_items
from candle_vllm.responses.protocol.items import InputItem
from candle_vllm.responses.protocol.response import Response
from candle_vllm.responses.store.backend import Held, StoreOptions
from candle_vllm.responses.store.entries import (
    CONVERSATION,
    ConversationBusyError,
    Entry,
    NotStoredError,
    StoreLimitError,
    StoreUnavailableError,
)
from tests.waiting import until

USER = {"role": "user", "content": "Hi"}


async def begin(kept: ResponseStore, *names: tuple[str, str]) -> None:
    for owner, name in names:
        await (await kept.backend()).put(Entry(kind=CONVERSATION, owner=owner, id=name, created=0, body=b"{}"))


async def test_whoever_answers_in_a_conversation_is_alone(kept: ResponseStore) -> None:
    await begin(kept, ("a", "1"), ("a", "2"), ("b", "1"))
    log = list[str]()

    async def answer(owner: str, name: str) -> None:
        async with kept.turn(owner, name):
            log.append(f"+{owner}{name}")
            await until(lambda: "+a2" in log and "+b1" in log)  # another conversation need not wait
            log.append(f"-{owner}{name}")

    await asyncio.gather(*(answer("a", "1") for _ in range(3)), answer("a", "2"), answer("b", "1"))
    assert [each for each in log if each.endswith("a1")] == ["+a1", "-a1"] * 3
    assert not kept._queues


async def test_too_many_in_one_conversation_are_refused(kept: ResponseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "MAX_WAITING", 2)
    await begin(kept, ("a", "1"))
    leave = asyncio.Event()

    async def answer() -> None:
        async with kept.turn("a", "1"):
            await leave.wait()

    tasks = [asyncio.create_task(answer()) for _ in range(4)]
    with pytest.raises(ConversationBusyError, match="3 responses are running or waiting") as error:
        await tasks[3]
    assert error.value.param == "conversation"
    with pytest.raises(ConversationBusyError) as error:
        await kept.turn("a", "1", "conversation_id").__aenter__()
    assert error.value.param == "conversation_id"
    tasks[1].cancel()  # who gives up makes room
    await asyncio.sleep(0)
    leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not kept._queues
    await answer()


async def test_items_are_added_behind_an_answer_that_is_being_made(kept: ResponseStore) -> None:
    conversations = Conversations(kept)
    name = (await conversations.create("a", ConversationCreateRequest())).id
    async with kept.turn("a", name):
        adding = asyncio.create_task(
            conversations.add_items("a", name, ItemsCreateRequest.model_validate({"items": [USER]}))
        )
        await asyncio.sleep(0.02)
        assert not adding.done()
        assert await kept.conversation_items("a", name) == []
    assert len((await adding).data) == 1


async def test_a_conversation_that_is_gone_gets_no_items(
    kept: ResponseStore, answered: Callable[..., Response], caplog: pytest.LogCaptureFixture
) -> None:
    await kept.add_to_conversation(entry_of("a", answered(conversation="conv_gone"), []))
    assert "could not be added to its conversation" in caplog.text
    caplog.clear()


async def test_what_is_not_there_is_blamed_on_the_field(kept: ResponseStore) -> None:
    with pytest.raises(NotStoredError) as error:
        await kept.conversation_items("a", "conv_gone")
    assert error.value.param == "conversation"
    with pytest.raises(NotStoredError) as error:
        await kept.history("a", "resp_gone")
    assert error.value.param == "previous_response_id"


async def test_a_store_in_memory_is_opened_once_when_it_is_needed() -> None:
    kept = ResponseStore(StoreOptions())
    await kept.start()
    assert kept._backend is None
    owners = await asyncio.gather(*(kept.owner("key") for _ in range(5)))
    assert len(set(owners)) == 1
    await kept.close()
    with pytest.raises(StoreUnavailableError):
        await kept.get("a", "resp_1")


async def test_one_that_was_never_opened_is_not_opened_at_the_end() -> None:
    kept = ResponseStore(StoreOptions())
    await kept.close()
    with pytest.raises(StoreUnavailableError, match="stopping"):
        await kept.owner("key")


async def test_one_that_is_being_opened_is_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    go, opened = asyncio.Event(), response_store.open_backend

    async def slowly(*given: Any) -> Any:
        await go.wait()
        return await opened(*given)

    monkeypatch.setattr(response_store, "open_backend", slowly)
    kept = ResponseStore(StoreOptions())
    opening = asyncio.create_task(kept.owner("key"))
    await until(kept._opening.locked)
    closing = asyncio.create_task(kept.close())
    await asyncio.sleep(0.01)
    go.set()
    await asyncio.gather(opening, closing)
    with pytest.raises(StoreUnavailableError):
        await kept.get("a", "resp_1")


def test_pages() -> None:
    items = [{"id": f"msg_{number}", "type": "message"} for number in range(5)]
    first = page_of(items, PageRequest(limit=2, order="asc"))
    assert (first.first_id, first.last_id, first.has_more) == ("msg_0", "msg_1", True)
    last = page_of(items, PageRequest(limit=4, after="msg_3"))
    assert (last.first_id, last.last_id, last.has_more, len(last.data)) == ("msg_2", "msg_0", False, 3)
    empty = page_of(items, PageRequest(after="msg_0"))
    assert (empty.first_id, empty.last_id, empty.has_more, empty.data) == (None, None, False, ())
    with pytest.raises(InvalidParameterError) as error:
        page_of(items, PageRequest(after="msg_5"))
    assert error.value.param == "after"


def test_items_are_kept_with_id_type_status_and_parts() -> None:
    adapter = TypeAdapter[Any](InputItem)
    given = [
        USER, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}], "phase": "final_answer"},
        {"type": "function_call_output", "call_id": "c", "output": "o", "id": "fco_1"}, {"type": "reasoning"},
    ]  # fmt: skip
    user, assistant, output, thoughts = stored_items([adapter.validate_python(item) for item in given])
    assert user.pop("id").startswith("msg_")
    assert user == {"type": "message", "role": "user", "status": "completed",
                    "content": [{"type": "input_text", "text": "Hi"}]}  # fmt: skip
    assert assistant["phase"] == "final_answer"
    assert assistant["content"] == [{"type": "output_text", "text": "Yes", "annotations": []}]
    assert (output["id"], output["status"]) == ("fco_1", "completed")
    assert "status" not in thoughts
    (text,) = stored_items([adapter.validate_python({"role": "user", "content": "Hello"})])
    assert text["content"] == [{"type": "input_text", "text": "Hello"}]
    with pytest.raises(InvalidParameterError, match=r"input\.0 refers to an item"):
        stored_items([adapter.validate_python({"type": "item_reference", "id": "msg_1"})])


async def test_servers_of_one_store_answer_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_store, "POLL_SECONDS", 0.01)
    options = StoreOptions(url=f"sqlite:///{tmp_path / 'r.sqlite'}")
    one, other = ResponseStore(options), ResponseStore(options)
    try:
        name = (await Conversations(one).create("a", ConversationCreateRequest())).id
        inside, log = asyncio.Event(), list[str]()

        async def answer(kept: ResponseStore, label: str) -> None:
            async with kept.turn("a", name):
                log.append(f"+{label}")
                inside.set()
                await asyncio.sleep(0.05)
                log.append(f"-{label}")

        first = asyncio.create_task(answer(one, "one"))
        await inside.wait()
        await asyncio.gather(answer(other, "other"), first)
        assert log == ["+one", "-one", "+other", "-other"]
        with pytest.raises(NotStoredError) as refusal:
            async with one.turn("a", "conv_gone"):
                pass
        assert refusal.value.param == "conversation"
    finally:
        await one.close()
        await other.close()


async def test_a_turn_whose_client_leaves_while_it_is_granted_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ResponseStore(StoreOptions(url=f"sqlite:///{tmp_path / 'r.sqlite'}"))
    try:
        name = (await Conversations(kept).create("a", ConversationCreateRequest())).id
        store, granted = await kept.backend(), asyncio.Event()
        claim = store.claim

        async def granting(*what: Any) -> bool:
            assert await claim(*what)
            granted.set()
            return await asyncio.Future()

        async def answer() -> None:
            async with kept.turn("a", name):
                pass

        monkeypatch.setattr(store, "claim", granting)
        answering = asyncio.create_task(answer())
        await granted.wait()
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        assert await claim(CONVERSATION, Held("a", name, "another"), store.now + 1000)
    finally:
        await kept.close()


async def test_nothing_is_answered_in_a_conversation_that_is_full() -> None:
    """The answer could not be added to it, and would be lost."""
    kept = ResponseStore(StoreOptions(max_items=2))
    try:
        request = ConversationCreateRequest.model_validate({"items": [USER, USER]})
        name = (await Conversations(kept).create("a", request)).id
        with pytest.raises(StoreLimitError, match="full") as refusal:
            await kept.conversation_items("a", name)
        assert refusal.value.param == "conversation"
        name = (await Conversations(kept).create("a", ConversationCreateRequest.model_validate({"items": [USER]}))).id
        assert len(await kept.conversation_items("a", name)) == 1
        with pytest.raises(StoreLimitError, match="full"):
            await kept.conversation_items("a", name, 1)  # the request's item has room, but not its answer
    finally:
        await kept.close()
