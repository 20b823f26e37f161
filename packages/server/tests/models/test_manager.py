# SPDX-License-Identifier: MIT
"""The model manager: loads are shared, switches drain, failures reach everyone who waits, nothing is lost."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from candle_vllm.core.config import DEMO_NAME, SETTINGS
from candle_vllm.core.errors import EngineDeadError, ModelNotFoundError, NoMemoryError
from candle_vllm.openai import ModelNotServedError
from candle_vllm.openai.fair_threads import asker
from candle_vllm.openai.remarks import collect_remarks
from candle_vllm.server import Settings
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.http.routing import Caller, RequestContext, current_request
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.manager import ModelManager, take_turn
from candle_vllm.server.models.slot import ModelState
from candle_vllm.server.models.switcher import NoRoomError
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.derived import in_flags, told_in_flags
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.server_fakes import FakeLoader, PacedEngine, ShortLimits
from tests.waiting import PATIENCE, skip, until

NAMES = ("a", "b", "c")


def _manager(loader: FakeLoader, **limits: float) -> ModelManager:
    entries = [ModelEntry(name, Settings(), (f"{name}-alias",)) for name in NAMES]
    return ModelManager(Catalogue(entries), loader, ShortLimits(**limits))  # type: ignore[arg-type]


async def test_a_model_is_loaded_when_it_is_asked_for_and_the_load_is_shared() -> None:
    loader = FakeLoader(seconds=0.05)
    manager = _manager(loader)
    leases = await asyncio.gather(*(manager.acquire("b") for _ in range(20)))
    assert loader.loads == ["b"]
    assert {id(lease.model) for lease in leases} == {id(leases[0].model)}
    assert manager.slots["b"].in_flight == 20
    for lease in leases:
        lease.release()
        lease.release()
    assert manager.slots["b"].in_flight == 0
    await manager.close()
    assert loader.engines[0].closed


@pytest.mark.parametrize(("name", "found"), [(None, "a"), ("default", "a"), ("b-alias", "b"), ("c", "c")])
async def test_names(name: str | None, found: str) -> None:
    assert _manager(FakeLoader()).find(name).entry.name == found


async def test_another_alias_keeps_the_model_loaded() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    lease = await manager.acquire("b")
    entries = [replace(slot.entry, aliases=(*slot.entry.names, f"{name}-copy")) for name, slot in manager.slots.items()]
    changes = manager.adopt(Catalogue(entries))
    assert (changes.added, changes.changed, changes.removed) == ((), NAMES, ())
    assert manager.find("b-copy", exact=True).model is lease.model
    assert lease.model.entry.names == ("b-alias", "b", "b-copy")
    manager.adopt(Catalogue([replace(entry, aliases=entry.names[:2]) for entry in entries]))
    with pytest.raises(ModelNotServedError):
        manager.find("b-copy", exact=True)
    assert (loader.loads, manager.slots["b"].in_flight) == (["b"], 1)
    lease.release()
    await manager.close()


async def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelNotServedError, match="served models are: a-alias, a, b-alias, b, c-alias, c"):
        await _manager(FakeLoader()).acquire("d")


def test_advice_of_the_library_is_given_in_flags() -> None:
    said = (
        "set kv_cache_memory=1048577 (bytes), max_num_batched_tokens=8, device='cpu' or cuda_graphs=False; see `isq`."
    )
    assert in_flags(said) == "set --mem 2, --prefill-chunk-size 8, --device cpu or --disable-cuda-graph; see --isq."
    for name in SETTINGS:
        assert in_flags(f"a larger `{name}`").startswith("a larger --")
    for other in ("size=5", "x-threads", "max_model_len 5"):
        assert in_flags(other) == other
    assert in_flags(f"kv_cache_memory={'9' * 5000}").startswith("--mem 9")  # no number that int would refuse
    with pytest.raises(NoMemoryError, match=r"^set --threads 1$") as caught, told_in_flags():
        raise NoMemoryError("set threads=1", "threads")
    assert caught.value.setting == "threads"


def test_two_models_cannot_share_a_name() -> None:
    with pytest.raises(UsageError, match="both called 'a'"):
        Catalogue([ModelEntry("a", Settings()), ModelEntry("b", Settings(), ("a",))])


def test_default_is_a_name_of_the_default_model_alone() -> None:
    entries = [ModelEntry("a", Settings(), ("default",)), ModelEntry("b", Settings())]
    assert Catalogue(entries).find("default").name == "a"
    with pytest.raises(UsageError, match="'a' cannot be called 'default'"):
        Catalogue(entries, "b")


def test_the_demo_model_is_called_demo_too() -> None:
    other = ModelEntry("a", Settings())
    demo = ModelEntry(DEMO_NAME, Settings(), ("small",))
    assert Catalogue([other, demo]).find("demo") is demo
    named = ModelEntry("demo", Settings())
    assert Catalogue([demo, named]).find("demo") is named
    with pytest.raises(ModelNotServedError, match="is not served here; served models are: a, demo"):
        Catalogue([other, named]).find(DEMO_NAME)


def test_the_only_model_is_meant_by_every_name_unless_names_are_strict() -> None:
    only = ModelEntry("a", Settings(), ("alias",))
    strict = ModelEntry("a", Settings(strict_model_names=True))
    for name in ("gpt-4", "default", None, "", "a", "alias"):
        remarks = collect_remarks()
        assert Catalogue([only]).find(name) is only
        assert len(remarks) == (name in ("gpt-4", ""))
    for catalogue, exact in ((Catalogue([only]), True), (Catalogue([strict]), False)):
        assert catalogue.find(None, exact=exact).name == catalogue.find("default", exact=exact).name == "a"
        for name in ("gpt-4", ""):
            with pytest.raises(ModelNotServedError):
                catalogue.find(name, exact=exact)
    with pytest.raises(ModelNotServedError):
        Catalogue([only, ModelEntry("b", Settings())]).find("gpt-4")


async def test_models_stay_beside_each_other_while_there_is_room() -> None:
    loader = FakeLoader(room=2)
    manager = _manager(loader)
    for name in NAMES[:2]:
        (await manager.acquire(name)).release()
    assert [model.entry.name for model in manager.loaded] == ["a", "b"]
    (await manager.acquire("a")).release()  # b is now the one that was used longest ago
    (await manager.acquire("c")).release()
    assert [model.entry.name for model in manager.loaded] == ["a", "c"]
    assert loader.together == 2
    assert loader.engines[1].closed


async def test_at_most_so_many_are_loaded() -> None:
    manager = _manager(FakeLoader(), max_loaded_models=1)
    for name in NAMES:
        (await manager.acquire(name)).release()
        assert [model.entry.name for model in manager.loaded] == [name]


async def test_a_switch_waits_for_the_requests_that_run_and_later_ones_wait_for_its_return() -> None:
    loader = FakeLoader(room=1)
    manager = _manager(loader)
    running = await manager.acquire("a")
    other = asyncio.create_task(manager.acquire("b"))
    await until(lambda: manager.slots["a"].state is ModelState.DRAINING)
    late = asyncio.create_task(manager.acquire("a"))
    await asyncio.sleep(0.02)
    assert not other.done()
    assert not loader.engines[0].closed
    running.release()
    lease = await other
    assert loader.engines[0].closed
    assert not late.done()
    lease.release()
    (await late).release()
    assert loader.loads == ["a", "b", "a"]


async def test_a_drain_has_an_end() -> None:
    loader = FakeLoader(room=1)
    manager = _manager(loader, model_drain_timeout=0.05)
    stuck = await manager.acquire("a")
    begin = time.monotonic()
    (await manager.acquire("b")).release()
    assert time.monotonic() - begin > 0.04
    assert loader.engines[0].closed
    stuck.release()


async def test_a_model_that_cannot_be_loaded_fails_everyone_who_waits_and_can_be_tried_again() -> None:
    loader = FakeLoader(seconds=0.05)
    loader.broken["b"] = ModelNotFoundError("there is no such file: /secret/path")
    manager = _manager(loader)
    failures = await asyncio.gather(*(manager.acquire("b") for _ in range(5)), return_exceptions=True)
    for failure in failures:
        assert isinstance(failure, HttpError)
        assert (failure.status, failure.code) == (503, "model_load_failed")
        assert "/secret" not in str(failure)
    assert manager.slots["b"].state is ModelState.FAILED
    assert "/secret/path" in str(manager.slots["b"].error)
    del loader.broken["b"]
    with pytest.raises(HttpError) as refusal:  # not yet
        await manager.acquire("b")
    assert 25 <= int(refusal.value.headers["retry-after"]) <= 30
    await manager.load("b")  # an operator may
    (await manager.acquire("b")).release()
    assert manager.slots["b"].error is None


async def test_the_failure_of_one_model_leaves_the_others() -> None:
    loader = FakeLoader(room=1)
    loader.broken["b"] = NoRoomError("never fits")
    manager = _manager(loader)
    (await manager.acquire("a")).release()
    with pytest.raises(HttpError):
        await manager.acquire("b")
    (await manager.acquire("a")).release()


async def test_one_key_has_half_of_the_queue_for_a_model() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader, queue_size=4, model_wait_timeout=30)

    async def ask(label: str) -> None:
        current_request.set(RequestContext({"type": "http", "state": {"caller": Caller(label)}}))
        asker.set(label)
        (await manager.acquire("a")).release()

    waiting = [asyncio.create_task(ask(label)) for label in ("alice", "alice")]
    await until(lambda: len(manager.slots["a"].waiters) == 2)
    with pytest.raises(HttpError, match="2 of at most 2 requests of this API key wait for the model 'a'") as refusal:
        await asyncio.wait_for(ask("alice"), PATIENCE)
    assert refusal.value.status == 503
    waiting += [asyncio.create_task(ask(label)) for label in ("bob", "carol")]
    await until(lambda: len(manager.slots["a"].waiters) == 4)
    with pytest.raises(HttpError, match="4 of at most 4 requests wait for the model 'a'"):
        await asyncio.wait_for(ask("bob"), PATIENCE)
    loader.gate.set()
    await asyncio.gather(*waiting)


async def test_the_queue_for_a_model_is_bounded_in_length_and_time() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader, queue_size=2, model_wait_timeout=30)
    waiting = [asyncio.create_task(manager.acquire("a")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(HttpError, match="2 of at most 2 requests wait") as refusal:
        await manager.acquire("a")
    assert refusal.value.status == 503
    await skip(30)
    for failure in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(failure, HttpError)
        assert failure.code == "model_not_ready"
    loader.gate.set()
    await until(lambda: manager.slots["a"].state is ModelState.READY)
    assert manager.slots["a"].in_flight == 0


async def test_who_gives_up_holds_nothing() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader)
    tasks = [asyncio.create_task(manager.acquire("a")) for _ in range(5)]
    await until(lambda: manager.slots["a"].state is ModelState.LOADING)
    for task in tasks[:4]:
        task.cancel()
    loader.gate.set()
    (await tasks[4]).release()
    assert manager.slots["a"].in_flight == 0
    assert not manager.slots["a"].waiters


async def test_a_model_that_nobody_uses_is_unloaded_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    loader = FakeLoader()
    manager = _manager(loader, idle_unload_secs=0.05)
    lease = await manager.acquire("a")
    await asyncio.sleep(0.15)
    assert manager.slots["a"].state is ModelState.READY  # in use
    lease.release()
    await until(lambda: loader.engines[0].closed)
    await until(lambda: "unloaded a (unused for 0 s)" in caplog.text)
    assert manager.slots["a"].state is ModelState.UNLOADED
    (await manager.acquire("a")).release()
    assert loader.loads == ["a", "a"]


async def test_operators_load_unload_and_choose() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    assert (await manager.load("b-alias")).state is ModelState.READY
    assert (await manager.unload("b")).state is ModelState.UNLOADED
    assert (await manager.unload("b")).state is ModelState.UNLOADED
    assert manager.select("c").state is not ModelState.READY
    assert manager.switch_requested_at is not None
    (await manager.acquire("c")).release()
    assert manager.active == "c"
    assert loader.loads == ["b", "c"]
    assert manager.switch_requested_at is None


async def test_an_engine_that_dies_comes_back_by_itself() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    lease = await manager.acquire("a")
    loader.engines[0].die()
    await asyncio.sleep(0)
    lease.release()
    (await manager.acquire("a")).release()
    assert loader.loads == ["a", "a"]


async def _die_until_it_stays_dead(manager: ModelManager, loader: FakeLoader) -> None:
    for loads in range(2, 7):
        assert manager.is_healthy
        loader.engines[-1].die()
        await until(lambda n=loads: len(loader.loads) == n and manager.slots["a"].state is ModelState.READY)
    assert manager.is_healthy
    loader.engines[-1].die()
    await until(lambda: manager.slots["a"].state is ModelState.FAILED)


async def test_an_engine_that_dies_again_and_again_waits_for_a_request() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    (await manager.acquire("a")).release()
    await _die_until_it_stays_dead(manager, loader)
    assert loader.loads == ["a"] * 6
    (await manager.acquire("a")).release()


async def test_the_engine_of_an_application_is_not_closed_and_stays() -> None:
    engine = PacedEngine()
    manager = ModelManager.of_loaded(serve_engine(engine, ModelEntry("scripted", Settings()), Metrics()), Metrics())
    with pytest.raises(HttpError) as refusal:
        await manager.unload("scripted")
    assert refusal.value.status == 409
    engine.alive = False
    with pytest.raises(EngineDeadError):
        await manager.acquire(None)
    await manager.close()
    assert not engine.closed


async def test_a_lease_that_comes_as_its_request_leaves_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = _manager(FakeLoader())
    slot = manager.slots["a"]
    task = asyncio.create_task(manager.acquire("a"))
    grant = slot.grant

    def grant_and_leave() -> None:
        grant()
        task.cancel()

    monkeypatch.setattr(slot, "grant", grant_and_leave)
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert slot.in_flight == 0


async def test_a_model_that_cannot_be_had_makes_nobody_leave() -> None:
    loader = FakeLoader(room=1)
    loader.hopeless["b"] = ModelNotFoundError("too large for this machine")
    manager = _manager(loader, max_loaded_models=1)
    (await manager.acquire("a")).release()
    with pytest.raises(HttpError):
        await manager.acquire("b")
    assert [model.entry.name for model in manager.loaded] == ["a"]
    assert loader.loads == ["a"]


async def test_requests_in_the_queue_of_an_engine_that_dies_wait_for_the_next_one() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    scope = {"app": SimpleNamespace(state=SimpleNamespace(manager=manager))}
    first, second = [await take_turn(scope, "a", sequences=300) for _ in range(2)]
    waiting = [asyncio.create_task(take_turn(scope, "a")) for _ in range(3)]
    await until(lambda: first.model.admission.waiting == 3)
    loader.engines[0].die()
    turns = await asyncio.gather(*waiting)
    assert {turn.model.engine.is_alive for turn in turns} == {True}
    assert loader.loads == ["a", "a"]
    for turn in (first, second, *turns):
        turn.release()
    assert manager.slots["a"].in_flight == 0
    assert turns[0].model.admission.running == turns[0].model.admission.waiting == 0


async def test_the_first_load_may_take_longer_than_requests_wait() -> None:
    manager = _manager(FakeLoader(seconds=0.2), model_wait_timeout=0.05)
    assert (await manager.start()).state is ModelState.READY


async def test_an_engine_that_cannot_be_closed_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = FakeLoader(room=1)
    manager = _manager(loader)
    (await manager.acquire("a")).release()

    def fail() -> None:
        raise RuntimeError("cannot be closed")

    monkeypatch.setattr(loader.engines[0], "close", fail)
    assert (await manager.unload("a")).state is ModelState.UNLOADED
    (await manager.acquire("b")).release()


async def test_a_failure_keeps_no_frames() -> None:
    loader = FakeLoader()
    loader.broken["b"] = ModelNotFoundError("broken")
    manager = _manager(loader)
    with pytest.raises(HttpError):
        await manager.acquire("b")
    error = manager.slots["b"].error
    assert error is not None
    assert error.__traceback__ is None


async def test_an_engine_that_is_made_while_the_server_ends_is_closed() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader)
    task = asyncio.create_task(manager.acquire("a"))
    await until(lambda: manager.slots["a"].state is ModelState.LOADING)
    await manager.close()
    with pytest.raises(HttpError, match="shutting down"):
        await task
    loader.gate.set()
    await until(lambda: [engine.closed for engine in loader.engines] == [True])


async def test_a_model_that_nobody_waits_for_any_more_is_not_loaded() -> None:
    loader = FakeLoader(room=1)
    loader.gate.clear()
    manager = _manager(loader)
    first = asyncio.create_task(manager.acquire("a"))
    await until(lambda: manager.slots["a"].state is ModelState.LOADING)
    gone = asyncio.create_task(manager.acquire("b"))
    await asyncio.sleep(0)
    gone.cancel()
    loader.gate.set()
    (await first).release()
    await asyncio.sleep(0.05)
    assert loader.loads == ["a"]
    assert manager.slots["b"].state is ModelState.UNLOADED


async def test_a_choice_counts_once_it_is_loaded_and_never_when_it_fails() -> None:
    loader = FakeLoader(seconds=0.02)
    loader.broken["c"] = ModelNotFoundError("broken")
    manager = _manager(loader)
    (await manager.acquire(None)).release()
    manager.select("b")
    assert manager.active == "a"
    await until(lambda: manager.active == "b")
    manager.select("c")
    await until(lambda: manager.switch_requested_at is None)
    assert manager.active == "b"


async def test_a_choice_outlives_a_change_of_the_chosen_model() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader)
    first = asyncio.create_task(manager.acquire("a"))
    await until(lambda: manager.slots["a"].state is ModelState.LOADING)
    manager.select("b")
    entries = [slot.entry for slot in manager.slots.values()]
    manager.adopt(Catalogue([entries[0], replace(entries[1], settings=Settings(max_num_seqs=3)), entries[2]]))
    loader.gate.set()
    (await first).release()
    await until(lambda: manager.active == "b" and manager.switch_requested_at is None)
    await manager.close()


async def test_a_choice_during_a_load_causes_no_later_load() -> None:
    loader = FakeLoader()
    loader.gate.clear()
    manager = _manager(loader)
    first = asyncio.create_task(manager.acquire("b"))
    await until(lambda: manager.slots["b"].state is ModelState.LOADING)
    manager.select("b")
    loader.gate.set()
    (await first).release()
    await manager.unload("b")
    gone = asyncio.create_task(manager.acquire("b"))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0.05)
    assert (manager.active, loader.loads) == ("b", ["b"])
    await manager.close()


async def test_there_is_one_timer_however_often_a_model_is_used() -> None:
    manager = _manager(FakeLoader(), idle_unload_secs=60)
    for _ in range(50):
        (await manager.acquire("a")).release()
    timer = manager.slots["a"].timer
    (await manager.acquire("a")).release()
    assert timer is not None
    assert manager.slots["a"].timer is timer
    manager.slots["a"].last_used -= 60
    await skip(60)
    await until(lambda: manager.slots["a"].state is ModelState.UNLOADED)


async def test_a_server_whose_engine_stays_dead_is_not_healthy() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    (await manager.acquire("a")).release()
    await _die_until_it_stays_dead(manager, loader)
    assert not manager.is_healthy
    (await manager.acquire("a")).release()
    assert manager.is_healthy


async def test_an_engine_that_cannot_be_loaded_again_is_tried_again_without_a_request() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    slot = manager.slots["a"]
    (await manager.acquire("a")).release()

    async def fail_to_load(deaths: int) -> None:
        await until(lambda: len(slot.deaths) == deaths and slot.state is ModelState.FAILED)

    loader.broken["a"] = NoMemoryError("the memory of the old engine is not free yet")
    loader.engines[-1].die()
    await fail_to_load(1)
    await skip(30)
    await fail_to_load(2)
    loader.broken.clear()
    await skip(30)
    await until(lambda: slot.state is ModelState.READY)
    loader.broken["a"] = NoMemoryError("the GPU is gone")
    loader.engines[-1].die()
    for deaths in (4, 5):
        await fail_to_load(deaths)
        assert manager.is_healthy
        await skip(30)
    await until(lambda: not manager.is_healthy)
    loader.broken.clear()
    slot.failed_at = None  # as half a minute later
    (await manager.acquire("a")).release()
    assert manager.is_healthy
    await manager.close()


async def test_a_failed_load_without_a_death_waits_for_a_request() -> None:
    loader = FakeLoader()
    manager = _manager(loader)
    loader.broken["a"] = NoMemoryError("too large")
    with pytest.raises(HttpError):
        await manager.acquire("a")
    loader.broken.clear()
    await skip(60)
    assert (manager.slots["a"].state, loader.loads) == (ModelState.FAILED, [])
    assert manager.is_healthy
    await manager.close()


async def test_a_closed_manager_refuses_to_load_and_to_unload() -> None:
    manager = _manager(FakeLoader())
    await manager.close()
    for change in (manager.unload, manager.load):
        with pytest.raises(HttpError, match="shutting down"):
            await asyncio.wait_for(change("a"), 5)
