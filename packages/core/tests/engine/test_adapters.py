# SPDX-License-Identifier: MIT
"""The store of adapters: names, memory, leases and loads, whatever is asked of it in whatever order."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from candle_vllm.core.engine.adapters import adapter_store as module
from candle_vllm.core.engine.adapters.adapter_store import AdapterCall, AdapterStore, Entries, Entry
from candle_vllm.core.engine.requests import AdapterUse, LoRARequest
from candle_vllm.core.errors import AdapterError, EngineDeadError, EngineOverloadedError, InvalidParameterError
from tests.waiting import PATIENCE, wait_for

from .adapter_fakes import Loads


def use(name: str, *, inplace: bool = False, path: str | None = None) -> AdapterUse:
    return AdapterUse(name=name, path=f"/adapters/{name}" if path is None else path, load_inplace=inplace)


def leased(store: AdapterStore, *entries: Entry) -> Entries:
    """A lease of adapters, which are loaded for it."""
    wanted = tuple((entry, 1.0) for entry in entries)
    store.want(entries)
    wait_for(lambda: all(entry.state == "ready" for entry in entries))
    assert store.lease(wanted) is not None
    store.want(())
    return wanted


def _held(store: AdapterStore) -> tuple[int, int, int]:
    """Known adapters, adapters in memory, and their bytes."""
    stats = store.stats()
    return stats["adapters"], stats["adapters_in_memory"], stats["adapter_bytes"]


def test_an_adapter_is_loaded_when_it_is_wanted_and_told() -> None:
    loads = Loads()
    store = AdapterStore(loads)
    entry = store.find(use("a"))
    assert store.infos()[0].state == "cold"
    assert store.lease(((entry, 1.0),)) is None
    lease = leased(store, entry)
    (info,) = store.infos()
    assert (info.state, info.rank, info.modules, info.base, info.notes) == ("ready", 8, 2, "base", ("a note",))
    assert len(info.digest) == 64
    assert _held(store) == (1, 1, 100)
    store.release(lease)
    store.close()


def test_what_is_on_its_way_is_loaded_behind_what_is_wanted_and_forgotten_when_it_does_not_come() -> None:
    loads = Loads()
    store = AdapterStore(loads)
    first, second, third = (store.find(use(name)) for name in "abc")
    loads.gate.clear()
    store.expect(((second, 1.0),))
    loads.until_begun("b")
    store.expect(((second, 1.0), (third, 0.5)))
    store.want([first])
    store.expect(((second, 1.0),))
    loads.gate.set()
    wait_for(lambda: first.state == second.state == "ready")
    assert loads.begun == ["b", "a"]
    assert third.state == "cold"
    store.expect(((third, 1.0),))
    wait_for(lambda: third.state == "ready")
    store.close()


def test_what_was_not_used_for_longest_leaves_and_comes_back() -> None:
    loads = Loads()
    store = AdapterStore(loads, most=2)
    a, b, c = (store.find(use(name)) for name in "abc")
    for entry in (a, b, a, c):
        store.release(leased(store, entry))
    assert [each.name for each in store.infos() if each.state == "ready"] == ["a", "c"]
    store.release(leased(store, b))
    assert loads.begun == ["a", "b", "c", "b"]
    assert store.stats()["adapter_evictions"] == 2
    store.close()


def test_memory_is_bounded_by_bytes_and_what_is_too_large_alone_is_refused() -> None:
    store = AdapterStore(Loads(sizes={"b": 250, "huge": 600}), most_bytes=500)
    entries = [store.find(use(name)) for name in "abcd"]
    for entry in entries:
        store.release(leased(store, entry))
    assert [each.name for each in store.infos() if each.state == "ready"] == ["b", "c", "d"]
    with pytest.raises(AdapterError, match=r"'huge' cannot be used: it takes 600 bytes, .* set lora_memory=600"):
        store.add(use("huge"), PATIENCE)
    assert _held(store) == (4, 2, 200)  # room was made for it
    store.close()


def test_leases_and_pins_keep_their_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(Loads(), most=2)
    lease = leased(store, store.find(use("a")))
    assert store.pin(store.find(use("b")).name, PATIENCE).pinned
    c = store.find(use("c"))
    store.want([c])
    wait_for(lambda: c.crowded)
    assert store.lease(((c, 1.0),)) is None
    monkeypatch.setattr(module, "PATIENCE", 0.01)
    with pytest.raises(
        EngineOverloadedError, match="within 0 s: running requests and pinned adapters use all the memory"
    ):
        store.call(AdapterCall("add", use("c")))
    store.release(lease)
    wait_for(lambda: c.state == "ready")
    assert [each.name for each in store.infos() if each.state == "ready"] == ["b", "c"]
    store.close()


def test_what_can_never_have_room_beside_pinned_ones_is_refused() -> None:
    store = AdapterStore(Loads(), most=1)
    store.find(use("a"))
    store.pin("a", PATIENCE)
    with pytest.raises(AdapterError, match="pinned adapters use all the memory for adapters: raise max_cpu_loras"):
        store.add(use("b"), PATIENCE)
    store.remove("a")
    assert store.add(use("b"), PATIENCE).state == "ready"
    store.close()


def test_an_adapter_of_unknown_size_is_tried_beside_a_large_pinned_one() -> None:
    store = AdapterStore(Loads(sizes={"a": 60, "b": 40, "c": 41}), most_bytes=100)
    store.add(use("a"), PATIENCE)
    store.pin("a", PATIENCE)
    store.release(leased(store, store.find(use("b"))))
    with pytest.raises(AdapterError, match="'c' cannot be used: pinned adapters use all the memory for adapters"):
        store.add(use("c"), PATIENCE)
    assert _held(store)[2] <= 100
    store.close()


def test_a_mix_that_fits_is_loaded_whatever_size_was_expected_and_any_other_is_refused() -> None:
    store = AdapterStore(Loads(sizes={"a": 90, "b": 10, "c": 60}), most=3, most_bytes=100)

    def mixed(*names: str) -> Entries:
        entries = store.found([use(name) for name in names])
        store.want([entry for entry, _ in entries])
        return entries

    fits = mixed("a", "b")  # the size of b is expected to be that of a, the only one in memory
    wait_for(lambda: all(entry.state == "ready" for entry, _ in fits))
    assert store.refusal(fits) is None
    large = mixed("a", "c")
    wait_for(lambda: store.refusal(large) is not None)
    assert "adapters and the pinned ones are 2 and take 150 bytes: raise max_cpu_loras" in str(store.refusal(large))
    assert store.refusal(large[:1]) is None
    changes = store.changes
    store.pin("c", PATIENCE)
    assert store.changes > changes  # so that whoever waits is looked at again
    assert "are 3 and take 160 bytes: raise max_cpu_loras or lora_memory" in str(store.refusal(fits))
    store.close()


@pytest.mark.parametrize("kept", ["pinned", "leased"])
def test_a_small_adapter_of_a_mix_is_loaded_beside_a_large_one_that_stays(kept: str) -> None:
    store = AdapterStore(Loads(sizes={"a": 90, "b": 10, "c": 60}), most=3, most_bytes=100)
    store.add(use("a"), PATIENCE)
    if kept == "pinned":
        store.pin("a", PATIENCE)
    else:
        assert store.lease(store.found([use("a")])) is not None
    fits, large = (store.found([use("a"), use(name)]) for name in "bc")
    store.want([entry for entry, _ in (*fits, *large)])
    wait_for(lambda: store.lease(fits) is not None)
    store.release(fits)
    store.want([entry for entry, _ in large])
    wait_for(lambda: store.refusal(large) is not None)
    assert "raise max_cpu_loras or lora_memory" in str(store.refusal(large))
    store.close()


def test_one_load_serves_all_who_ask_for_it() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    entry = store.find(use("a"))
    told: list[str] = []
    threads = [threading.Thread(target=lambda: told.append(store.add(use("a"), PATIENCE).state)) for _ in range(8)]
    for thread in threads:
        thread.start()
    store.want([entry])
    loads.until_begun("a")
    loads.gate.set()
    for thread in threads:
        thread.join()
    assert told == ["ready"] * 8
    assert loads.counts == {"a": 1}
    store.close()


def test_a_pin_holds_though_another_one_gave_up() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    store.find(use("a"))
    told: list[bool] = []
    patient = threading.Thread(target=lambda: told.append(store.pin("a", PATIENCE).pinned))
    patient.start()
    loads.until_begun("a")
    with pytest.raises(TimeoutError):
        store.pin("a", 0.0)
    loads.gate.set()
    patient.join()
    assert told == [each.pinned for each in store.infos()] == [True]
    store.close()


def test_a_failure_is_kept_for_a_while_and_tried_again() -> None:
    now = [0.0]
    loads = Loads()
    store = AdapterStore(loads, clock=lambda: now[0])
    bad = store.find(use("bad"))
    store.want([bad])
    wait_for(lambda: bad.state == "failed")
    store.want(())
    for _ in range(3):
        with pytest.raises(InvalidParameterError, match="adapter 'bad' cannot be used: bad: lora_B is missing"):
            store.find(use("bad"))
    assert loads.counts["bad"] == 1
    now[0] = 11.0
    assert store.find(use("bad")).state == "cold"
    with pytest.raises(AdapterError, match="lora_B is missing"):
        store.add(use("bad"), PATIENCE)
    with pytest.raises(AdapterError, match="lora_B is missing"):
        store.add(use("bad new"), PATIENCE)
    assert [each.name for each in store.infos()] == ["bad"]
    assert store.stats()["adapter_load_failures"] == 3
    store.close()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("/srv/deep/a is no folder", "a is no folder"), ("/srv/deep/a: r is 0", "r is 0"),
        ("/srv/deep/a/x.json: r is 0", "x.json: r is 0"),
        ("'/srv/deep/a' has 3 bytes, /srv/deep/a", "'a' has 3 bytes, a"),
    ],
)  # fmt: skip
def test_a_failure_says_nothing_of_where_files_lie(said: str, told: str) -> None:
    store = AdapterStore(Loads())
    for place in ("/srv/deep/a", "srv/deep/a"):
        entry = Entry("a", place)
        entry.error = said.replace("/srv/deep/a", place)
        assert str(store.failure(entry)) == f"adapter 'a' cannot be used: {told}"


def test_files_read_anew_are_another_adapter_and_the_old_one_serves_until_they_are_there() -> None:
    loads = Loads()
    store = AdapterStore(loads)
    old = store.find(use("a"))
    lease = leased(store, old)
    before = store.infos()[0].digest
    loads.version, loads.gate = "changed", threading.Event()
    new = store.find(use("a", inplace=True))
    assert new is not old
    assert store.find(use("a", inplace=True)) is new
    assert store.find(use("a")) is old
    store.want([new])
    loads.until_begun("a")
    loads.gate.set()
    wait_for(lambda: store.find(use("a")) is new)
    store.want(())
    assert store.infos()[0].digest != before
    assert _held(store) == (1, 2, 200)
    store.release(lease)
    assert _held(store) == (1, 1, 100)
    assert loads.counts["a"] == 2
    store.close()


def test_files_that_cannot_be_read_anew_leave_the_old_ones() -> None:
    store = AdapterStore(Loads())
    store.add(use("a"), PATIENCE)
    with pytest.raises(AdapterError, match="lora_B"):
        store.add(use("a", inplace=True, path="/adapters/bad"), PATIENCE)
    (info,) = store.infos()
    assert (info.path, info.state) == ("/adapters/a", "ready")
    store.close()


def test_another_path_under_a_name_is_refused() -> None:
    store = AdapterStore(Loads())
    store.find(use("a"))
    with pytest.raises(InvalidParameterError, match="'a' was loaded from other files than the request names") as told:
        store.find(use("a", path="/elsewhere/deep"))
    assert "/" not in str(told.value)
    with pytest.raises(InvalidParameterError, match=r"no adapter 'aa' \(did you mean a\?\); there are a"):
        store.find(use("aa", path=""))


def test_a_name_whose_files_could_not_be_loaded_may_get_others() -> None:
    store = AdapterStore(Loads())
    wrong = store.find(use("a", path="/adapters/bad"))
    store.want([wrong])
    wait_for(lambda: wrong.state == "failed")
    right = store.find(use("a", path="/adapters/good"))
    store.want([right])
    wait_for(lambda: right.state == "ready")
    assert store.find(use("a", path="")) is right
    with pytest.raises(InvalidParameterError, match="'a' was loaded from other files"):
        store.find(use("a", path="/adapters/bad"))
    store.close()


@pytest.mark.parametrize("path", [None, 5, b"a"])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(InvalidParameterError, match="adapter 'a': the path must be a text of at most 4096 characters"):
        LoRARequest("a", 1, path)
    assert LoRARequest("a", 1, Path("folder")).use(0.5) == AdapterUse(name="a", path="folder", scale=0.5)  # type: ignore[arg-type]


def test_a_removed_name_is_forgotten_and_its_memory_with_the_last_lease() -> None:
    store = AdapterStore(Loads())
    entry = store.find(use("a"))
    first, second = leased(store, entry), leased(store, entry)
    assert entry.loaded is not None
    memory = weakref.ref(entry.loaded.packed)
    assert store.remove("a")
    assert not store.remove("a")
    assert store.infos() == ()
    with pytest.raises(InvalidParameterError, match="there is no adapter 'a': give its path"):
        store.find(use("a", path=""))
    store.release(first)
    assert _held(store) == (0, 1, 100)
    store.release(second)
    assert _held(store) == (0, 0, 0)
    gc.collect()
    assert memory() is None
    store.close()


def test_a_name_that_is_removed_while_it_is_loaded_takes_no_memory() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    entry = store.find(use("a"))
    store.want([entry])
    loads.until_begun("a")
    store.remove("a")
    store.want(())
    loads.gate.set()
    wait_for(lambda: store.changes == 1)
    assert _held(store) == (0, 0, 0)
    store.close()


def test_a_name_that_is_removed_while_a_caller_waits_for_it_takes_no_memory() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    caller = threading.Thread(target=store.add, args=(use("a"), PATIENCE))
    caller.start()
    loads.until_begun("a")
    store.remove("a")
    loads.gate.set()
    caller.join(PATIENCE)
    assert _held(store) == (0, 0, 0)
    store.close()


def test_a_store_is_closed_while_a_load_hangs() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            store.add(use("a"), PATIENCE)
        except EngineDeadError as error:
            errors.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    loads.until_begun("a")
    store.close()
    asker.join(PATIENCE)
    assert len(errors) == 1
    loads.gate.set()


def test_what_a_caller_asks_for_and_has_no_room_holds_up_no_sequence() -> None:
    loads = Loads(sizes={"large": 200})
    store = AdapterStore(loads, most_bytes=250)
    large, used, wanted = (store.find(use(name)) for name in ("large", "used", "wanted"))
    store.release(leased(store, large))  # its size is known from now on
    lease = leased(store, used)
    assert large.state == "cold"
    caller = threading.Thread(target=store.add, args=(use("large"), PATIENCE))
    caller.start()
    wait_for(lambda: large.crowded)
    other = leased(store, wanted)  # which has room
    assert caller.is_alive()
    store.release(other)
    store.release(lease)
    caller.join(PATIENCE)
    assert large.state == "ready"
    store.close()


def test_what_sequences_wait_for_takes_turns_with_what_callers_do() -> None:
    loads = Loads()
    store = AdapterStore(loads)
    loads.gate.clear()
    names = [f"added{number}" for number in range(6)]
    callers = [threading.Thread(target=store.add, args=(use(name), PATIENCE)) for name in names]
    for caller in callers:
        caller.start()
    wait_for(lambda: len(store._asked) == 6 and len(loads.begun) == 1)
    store.want([store.find(use(name)) for name in ("wanted0", "wanted1")])
    loads.gate.set()
    for caller in callers:
        caller.join(PATIENCE)
    places = [loads.begun.index(name) for name in ("wanted0", "wanted1")]
    assert places == [1, 3]
    store.close()


def test_names_that_requests_gave_are_forgotten_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those that somebody uses, and those that were added by hand."""
    monkeypatch.setattr(module, "MAX_LOOSE_NAMES", 3)
    store = AdapterStore(Loads())
    store.add(use("added"), PATIENCE)
    a, b = store.find(use("a")), store.find(use("b"))
    lease = leased(store, b)
    store.find(use("c"))
    store.find(use("a"))  # used again
    store.find(use("d"))
    assert [info.name for info in store.infos()] == ["added", "a", "b", "d"]
    for number in range(20):
        store.find(use(f"more{number}"))
    assert [info.name for info in store.infos()] == ["added", "b", "more18", "more19"]
    assert store.find(use("b")) is b
    assert store.find(use("a")) is not a, "it is taken anew"
    wanted = leased(store, a)  # by a sequence that was prepared before
    store.release(wanted)
    store.release(lease)
    assert store.remove("b")
    assert _held(store) == (3, 1, 100)
    store.close()


def test_a_load_that_takes_too_long_is_waited_for_no_longer() -> None:
    loads = Loads()
    loads.gate.clear()
    store = AdapterStore(loads)
    with pytest.raises(TimeoutError):
        store.add(use("a"), 0.01)
    loads.gate.set()
    assert store.add(use("a"), PATIENCE).state == "ready"
    assert loads.counts["a"] == 1
    store.close()


_NAMES = st.sampled_from([*"abcdef", "bad"])
_OPERATIONS = st.one_of(
    st.tuples(st.just("want"), st.lists(_NAMES, max_size=4)),
    st.tuples(st.just("expect"), st.lists(_NAMES, min_size=1, max_size=2, unique=True)),
    st.tuples(st.just("begin"), st.lists(_NAMES, min_size=1, max_size=2, unique=True)),
    st.tuples(st.just("end"), st.integers(0, 5)),
    st.tuples(st.just("remove"), _NAMES),
    st.tuples(st.just("anew"), _NAMES),
)


@settings(max_examples=60, deadline=None)
@given(operations=st.lists(_OPERATIONS, max_size=30), most=st.integers(1, 4), most_bytes=st.sampled_from([250, 10_000]))
def test_whatever_is_asked_of_a_store_its_bounds_and_leases_hold(
    operations: list[tuple[str, object]], most: int, most_bytes: int
) -> None:
    """Loads are run in this thread between the operations, one by one, so that every order is the same again."""
    now = [0.0]
    loads = Loads()
    store = AdapterStore(loads, most=most, most_bytes=most_bytes, clock=lambda: now[0])
    store._begin = lambda: None  # type: ignore[method-assign]  # no thread
    leases: list[tuple[Entries, tuple[object, ...]]] = []

    def commit() -> None:
        while True:
            with store._change:
                entry = store._next()
            if entry is None:
                return
            entry.state = "loading"
            store._bring(entry)

    for kind, what in operations:
        now[0] += 20.0
        if kind == "want":
            assert isinstance(what, list)
            store.want(dict.fromkeys(store.find(use(name)) for name in what))
        elif kind == "expect":
            assert isinstance(what, list)
            store.expect(tuple((store.find(use(name)), 1.0) for name in what))
        elif kind == "begin":
            assert isinstance(what, list)
            entries = tuple((store.find(use(name)), 1.0) for name in what)
            store.want(entry for entry, _ in entries)
            commit()
            packed = store.lease(entries)
            assert (packed is None) == any(entry.state != "ready" for entry, _ in entries)
            if packed is not None:
                leases.append((entries, packed))
        elif kind == "end" and leases:
            assert isinstance(what, int)
            entries, packed = leases.pop(what % len(leases))
            assert all(entry.loaded is not None for entry, _ in entries)
            store.release(entries)
        elif kind == "remove":
            store.remove(str(what))
        elif kind == "anew":
            store.want([store.find(use(str(what), inplace=True))])
        commit()
        known, held, nbytes = _held(store)
        in_use = {entry for entries, _ in leases for entry, _ in entries}
        assert held <= max(most, len(in_use))
        assert nbytes <= max(most_bytes, 100 * len(in_use))
        assert nbytes == sum(entry.nbytes for entry in store._in_memory)
        assert all((entry.state == "ready") == (entry in store._in_memory) for entry in store._entries.values())
        for entries, packed in leases:  # what began with an adapter has it to the end
            assert [entry.loaded and entry.loaded.packed for entry, _ in entries] == [each for each, _ in packed]  # type: ignore[misc]
        assert {each.name for each in store._in_memory if store._entries.get(each.name) is not each} <= {
            *(entry.name for entry in in_use), *(entry.name for entry in (*store._wanted, *store._expected))
        }  # fmt: skip
        assert known <= 7
    for entries, _ in leases:
        store.release(entries)
    store.want(())
    with store._change:
        assert all(entry.leases == 0 for entry in store._in_memory)
    store.close()
