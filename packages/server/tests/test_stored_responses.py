# SPDX-License-Identifier: MIT
"""`/v1/responses/{id}` with the official client: fetched, streamed, cancelled, deleted, and what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openresponses_types.types import ResponseResource

from candle_vllm.core.errors import ConfigError, EngineDeadError, EngineOverloadedError
from candle_vllm.openai.fair_threads import RequestBytes
from candle_vllm.server import Settings, create_app
from candle_vllm.server.commands.config import HIDDEN, effective
from candle_vllm.server.models.admission import Admission
from candle_vllm.server.routes import responses as routes
from candle_vllm.server.settings.configuration import load_configuration
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.sources import SettingsSource
from packages.server.tests.running_server import Running
from packages.server.tests.server_fakes import PacedEngine
from tests import waiting

KEYS = ("first-key", "second-key")
WORDS = "one two three four"


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    return start(PacedEngine(WORDS), api_key=KEYS)


@pytest.fixture
def client(running: Running) -> openai.OpenAI:
    return running.openai(KEYS[0])


@pytest.fixture
def slow(start: Callable[..., Running]) -> Running:
    """A server whose answers take a second and a half."""
    return start(PacedEngine(WORDS, pause=0.06), api_key=KEYS)


def make(client: openai.OpenAI, text: str = "Hi", **fields: Any) -> Any:
    return client.responses.create(model="scripted", input=text, **fields)


def wait_for(client: openai.OpenAI, name: str, *statuses: str) -> Any:
    found: list[Any] = []

    def has_one_of_them() -> bool:
        found[:] = [client.responses.retrieve(name)]
        return found[0].status in statuses

    waiting.wait_for(has_one_of_them)
    return found[0]


def refusal(failure: Any) -> tuple[int, Any, Any]:
    assert failure.type in ("invalid_request_error", "server_error")
    return failure.status_code, failure.param, failure.code


def test_a_response_is_fetched_as_it_was_made(client: openai.OpenAI, running: Running) -> None:
    made = make(client, metadata={"k": "v"})
    assert client.responses.retrieve(made.id) == made
    assert made.output_text == WORDS
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        ResponseResource.model_validate(http.get(f"/v1/responses/{made.id}").json())


def test_a_stream_is_kept_as_its_last_event_said(client: openai.OpenAI) -> None:
    with make(client, stream=True) as stream:
        *_, last = stream
    assert client.responses.retrieve(last.response.id) == last.response
    assert last.response.output_text == WORDS


def test_store_false_keeps_nothing(client: openai.OpenAI) -> None:
    made = make(client, store=False)
    with pytest.raises(openai.NotFoundError) as failure:
        client.responses.retrieve(made.id)
    assert refusal(failure.value) == (404, "response_id", "not_found")


def test_another_key_has_nothing(running: Running, client: openai.OpenAI) -> None:
    made = make(client)
    other = running.openai(KEYS[1])
    for work in (
        other.responses.retrieve, other.responses.delete, other.responses.cancel,
        lambda name: list(other.responses.input_items.list(name)),
        lambda name: other.responses.retrieve(name, stream=True),
        lambda name: make(other, previous_response_id=name),
    ):  # fmt: skip
        said = []
        for name in (made.id, "resp_" + "0" * (len(made.id) - 5)):
            with pytest.raises(openai.APIStatusError) as failure:
                work(name)
            said.append((*refusal(failure.value), failure.value.message.replace(name, "")))
        assert said[0] == said[1], "whether somebody else has it can be told"
        assert said[0][0] in (404, 400)
    assert client.responses.retrieve(made.id)


def test_without_a_key_nothing_is_reached(running: Running) -> None:
    with running.http() as http:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            assert http.request(method, f"/v1/responses/resp_1{path}").status_code == 401


def test_a_chain_goes_on_and_breaks(client: openai.OpenAI) -> None:
    first = make(client, "one")
    second = make(client, "two", previous_response_id=first.id)
    third = make(client, "three", previous_response_id=second.id)
    assert third.usage.input_tokens > second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.delete(second.id) is None
    for name in (second.id, third.id):
        with pytest.raises(openai.BadRequestError) as failure:
            make(client, previous_response_id=name)
        assert refusal(failure.value) == (400, "previous_response_id", "previous_response_not_found")
    assert make(client, previous_response_id=first.id).status == "completed"


def test_an_item_reference_is_followed(client: openai.OpenAI) -> None:
    made = make(client, "What is one and one?")
    items: list[Any] = [{"type": "item_reference", "id": made.output[0].id}, {"role": "user", "content": "Go on"}]
    assert make(client, items).status == "completed"  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as failure:
        make(client, [{"type": "item_reference", "id": "msg_nothing"}, *items])  # type: ignore[arg-type]
    assert failure.value.param == "input.0.id"


def test_delete_answers_as_openai_does(client: openai.OpenAI, running: Running) -> None:
    made = make(client)
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        answer = http.delete(f"/v1/responses/{made.id}")
        assert answer.json() == {"id": made.id, "object": "response", "deleted": True}
        assert http.delete(f"/v1/responses/{made.id}").status_code == 404


def test_input_items_in_pages(client: openai.OpenAI) -> None:
    texts = [f"text {number}" for number in range(7)]
    made = make(client, [{"role": "user", "content": text} for text in texts])  # type: ignore[arg-type]
    for order, expected in (("asc", texts), ("desc", texts[::-1])):
        found = list(client.responses.input_items.list(made.id, order=order, limit=3))  # type: ignore[arg-type]
        assert [item.content[0].text for item in found] == expected  # type: ignore[union-attr]
        assert len({item.id for item in found}) == 7
    page = client.responses.input_items.list(made.id, limit=3, after=found[2].id)  # type: ignore[union-attr]
    assert [item.id for item in page.data] == [item.id for item in found[3:6]]
    again = make(client, "more", previous_response_id=made.id)
    assert len(list(client.responses.input_items.list(again.id))) == 1
    assert client.responses.input_items.list(again.id, include=["reasoning.encrypted_content"]).data


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=1&limit=2", "limit"),
        ("order=up", "order"), ("after=nothing", "after"), ("after=%00", "after"), ("include=x", "include"),
        ("before=x", "before"), ("offset=1", "offset"),
    ],
)  # fmt: skip
def test_wrong_queries_of_input_items(client: openai.OpenAI, running: Running, query: str, param: str) -> None:
    made = make(client)
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        answer = http.get(f"/v1/responses/{made.id}/input_items?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=yes", "stream"), ("stream=true", "stream"), ("starting_after=0", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"), ("stream=true&starting_after=x", "starting_after"),
        ("include_obfuscation=true", "include_obfuscation"), ("nothing=1", "nothing"), ("include[]=x", "include"),
    ],
)  # fmt: skip
def test_wrong_queries_of_a_response(client: openai.OpenAI, running: Running, query: str, param: str) -> None:
    made = make(client)
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        answer = http.get(f"/v1/responses/{made.id}?{query}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_background_response_is_waited_for(slow: Running) -> None:
    client = slow.openai(KEYS[0])
    begun = make(client, background=True)
    assert begun.status == "queued"
    assert wait_for(client, begun.id, "in_progress").background
    done = wait_for(client, begun.id, "completed")
    assert done.output_text == WORDS
    assert make(client, previous_response_id=done.id, store=False).status == "completed"


def test_a_background_stream_is_left_and_taken_up(slow: Running) -> None:
    client = slow.openai(KEYS[0])
    seen = []
    with make(client, background=True, stream=True) as stream:
        for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break
    name = seen[0].response.id
    with client.responses.retrieve(name, stream=True, starting_after=seen[-1].sequence_number) as stream:
        seen += list(stream)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == "response.completed"
    assert seen[-1].response == client.responses.retrieve(name)
    with client.responses.stream(response_id=name, starting_after=None) as again:  # type: ignore[call-overload]
        assert again.get_final_response().output_text == WORDS


def test_a_background_response_is_cancelled(slow: Running) -> None:
    client = slow.openai(KEYS[0])
    begun = make(client, background=True)
    wait_for(client, begun.id, "in_progress")
    for _ in range(2):
        assert client.responses.cancel(begun.id).status == "cancelled"
    assert client.responses.retrieve(begun.id).status == "cancelled"
    Running.wait_for(lambda: slow.engine.stats().num_running == 0)
    with pytest.raises(openai.BadRequestError) as failure:
        client.responses.cancel(make(client).id)
    assert refusal(failure.value)[1] == "response_id"


def test_a_background_response_is_deleted_in_mid_run(slow: Running) -> None:
    client = slow.openai(KEYS[0])
    begun = make(client, background=True)
    wait_for(client, begun.id, "in_progress")
    client.responses.delete(begun.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)
    time.sleep(0.1)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(begun.id)


class _Answer:
    """A stream without events, whose closing is cancelled."""

    def opening(self) -> list[Any]:
        return []

    async def start(self) -> None: ...

    def __aiter__(self) -> _Answer:
        return self

    async def __anext__(self) -> Any:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        raise asyncio.CancelledError


@pytest.mark.parametrize("end", ["full", "retired", "cancelled"])
async def test_a_background_response_that_ends_early_says_why_and_leaves_its_place(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission, released = Admission(1, 1 if end == "full" else 9), list[bool]()
    entry = SimpleNamespace(settings=SimpleNamespace(enable_request_priority=False))
    lease: Any = SimpleNamespace(
        model=SimpleNamespace(entry=entry, admission=admission), release=lambda: released.append(True)
    )
    stream, request = _Answer(), SimpleNamespace(scope={})
    if end != "cancelled":
        monkeypatch.setattr(stream, "aclose", stream.start)
        other = await admission.enter("other", 1)
    work = asyncio.ensure_future(anext(routes._work(stream, lease, request, 0, RequestBytes())))
    if end == "retired":
        await waiting.until(lambda: admission.waiting == 1)
        admission.close()
    expected = {"full": EngineOverloadedError, "retired": EngineDeadError, "cancelled": asyncio.CancelledError}
    with pytest.raises(expected[end], match=r"1 sequences are running" if end == "full" else None):
        await work
    if end != "cancelled":
        other.leave()
    assert (admission.running, admission.waiting, released) == (0, 0, [True])


def test_two_responses_in_one_conversation_take_turns(slow: Running) -> None:
    client = slow.openai(KEYS[0])
    name = client.conversations.create().id
    begun = [make(client, f"text {number}", background=True, conversation=name) for number in range(1)]
    begun.append(make(client, "text 1", conversation=name))
    for each in begun:
        wait_for(client, each.id, "completed")
    roles = [item.role for item in client.conversations.items.list(name, order="asc")]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "user", "assistant"]


def test_a_drain_waits_for_what_runs_and_the_file_has_it(start: Callable[..., Running], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"api_key": KEYS, "responses_store": f"sqlite:///{tmp_path}/r.sqlite"}
    first = start(PacedEngine(WORDS, pause=0.02), shutdown_timeout=30, **settings)
    client = first.openai(KEYS[0])
    begun = make(client, background=True)
    wait_for(client, begun.id, "in_progress")
    first.stop()
    second = start(PacedEngine(WORDS, pause=30), **settings)
    client = second.openai(KEYS[0])
    assert client.responses.retrieve(begun.id).output_text == WORDS
    late = make(client, background=True)
    wait_for(client, late.id, "in_progress")
    second.stop()  # its shutdown_timeout is a second
    third = start(PacedEngine(), **settings).openai(KEYS[0])
    lost = third.responses.retrieve(late.id)
    assert (lost.status, lost.error.code) == ("failed", "server_error")
    assert "stopped" in lost.error.message


def test_a_store_that_is_off_is_said_to_be(start: Callable[..., Running]) -> None:
    client = start(PacedEngine(WORDS), responses_store="off").openai()
    made = make(client)
    assert (made.status, made.store) == ("completed", False)
    for work in (
        client.responses.retrieve, client.responses.delete, client.responses.cancel, client.conversations.retrieve,
    ):  # fmt: skip
        with pytest.raises(openai.NotFoundError) as failure:
            work(made.id)
        assert refusal(failure.value) == (404, None, "store_off")


def test_the_oldest_make_room(start: Callable[..., Running]) -> None:
    client = start(PacedEngine(WORDS), responses_max_records=2).openai()
    names = [make(client).id for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(names[0])
    assert [client.responses.retrieve(name).id for name in names[1:]] == names[1:]


def test_a_database_that_is_gone_is_a_503(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(PacedEngine(WORDS), responses_store=f"sqlite:///{tmp_path}/r.sqlite")
    client = running.openai()
    name = make(client).id
    import sqlite3

    with sqlite3.connect(tmp_path / "r.sqlite") as connection:
        connection.execute("DROP TABLE responses_entries")
    connection.close()
    with pytest.raises(openai.InternalServerError) as failure:
        client.responses.retrieve(name)
    assert refusal(failure.value) == (503, None, "store_unavailable")
    assert failure.value.response.headers["retry-after"] == "1"
    assert make(client, store=False).status == "completed"


@pytest.mark.parametrize("url", ["nothing", "mysql://u:hunter2@h/d", "sqlite://", "SQLITE"])
def test_other_urls_are_refused_at_the_start(url: str) -> None:
    with pytest.raises(UsageError, match="responses_store must be memory, sqlite") as refusal:
        create_app(PacedEngine(), Settings(responses_store=url))
    assert "hunter2" not in str(refusal.value)
    assert "hunter2" not in repr(Settings(responses_store=url))


async def test_a_store_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    app = create_app(PacedEngine(), Settings(responses_store=f"sqlite:///{tmp_path}/file/r.sqlite"))
    with pytest.raises(ConfigError, match="cannot write the store of responses"):
        async with app.router.lifespan_context(app):
            pass
    assert isinstance(app.state.failure, ConfigError)
    await asyncio.sleep(0)


def test_sqlalchemy_is_imported_with_the_first_response_that_is_kept() -> None:
    code = (
        "import sys, candle_vllm.server.app, candle_vllm.responses\n"
        "from candle_vllm.server import Settings, create_app\n"
        "from candle_vllm.core.testing import ScriptedEngine\n"
        "create_app(ScriptedEngine('x'), Settings())\n"
        "sys.exit('sqlalchemy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_ids_of_other_forms_are_not_found(running: Running, client: openai.OpenAI) -> None:
    made = make(client)
    with running.http(headers={"x-api-key": KEYS[0]}) as http:
        for name in ("x", "%00", "resp_'%3B--", "%F0%9F%98%80", "x" * 500, made.id.upper()):
            answer = http.get(f"/v1/responses/{name}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            assert len(json.dumps(answer.json())) < 400


@pytest.mark.parametrize(("url", "shown"), [(None, "memory"), ("postgresql://u:hunter2@h/d", HIDDEN)])
def test_the_default_is_shown_and_a_url_is_not(tmp_path: Path, url: str | None, shown: str) -> None:
    variables = {} if url is None else {"CANDLE_VLLM_RESPONSES_STORE": url}
    configuration = load_configuration(SettingsSource("the command line"), variables, folder=tmp_path, home=tmp_path)
    values = {name: each.value for name, each in effective(configuration).items()}
    assert values["responses_store"] == shown
