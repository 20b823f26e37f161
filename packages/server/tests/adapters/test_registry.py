# SPDX-License-Identifier: MIT
"""The adapters of a server by name: one look for many askers, what is missing, what a name means and never means."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.openai.errors import ModelNotServedError
from candle_vllm.server.adapters.disk_cache import DiskCache, Key
from candle_vllm.server.adapters.registry import Adapter, Adapters, BaseAdapters
from candle_vllm.server.adapters.sources import AdapterName, Found, Limits, LocalSource, Refused, Unavailable
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.models_file import read_models_file
from candle_vllm.server.settings.options import UsageError
from packages.server.tests.adapters.adapter_fakes import CONFIG, files
from packages.server.tests.server_fakes import FakeLoader
from tests.waiting import PATIENCE, until


class FakeSource:
    """Has adapters by name; while `gate` is cleared, whoever looks waits."""

    kind = "hf"
    pins = True

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.has = set(names)
        self.asked: list[str] = []
        self.fails: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.base: str | None = None

    def find(self, name: AdapterName) -> Found | None:
        self.asked.append(str(name))
        assert self.gate.wait(PATIENCE)
        if self.fails is not None:
            raise self.fails
        if name.name not in self.has:
            return None
        path = self.folder / name.name.replace("/", "--")
        path.mkdir(parents=True, exist_ok=True)
        return Found(path, f"{name.name}@c1", name.revision or "c1", self.base)

    def names(self) -> tuple[str, ...]:
        return ()


def entry(name: str = "base", **settings: object) -> ModelEntry:
    return ModelEntry(name, Settings(**{"enable_lora": True, **settings}), (name,))  # type: ignore[arg-type]


def adapters(*sources: FakeSource, entries: tuple[ModelEntry, ...] = (), cache: DiskCache | None = None) -> Adapters:
    made = Adapters(sources, cache)
    made.adopt(Catalogue(entries or (entry(),)))
    return made


@pytest.fixture
def source(tmp_path: Path) -> FakeSource:
    return FakeSource(tmp_path / "fetched", "acme/tone", "acme/other")


def test_an_adapter_whose_name_became_a_models_is_called_with_its_base(tmp_path: Path) -> None:
    known = adapters()
    tone = Adapter(name="tone", base="base", path=tmp_path, root="tone")
    known.add(tone)
    assert known.called(tone) == "tone"
    known.adopt(Catalogue([ModelEntry("base", entry().settings, ("base", "tone"))]))
    assert known.called(tone) == "base:tone"
    assert known.find("base:tone") is not None


async def test_many_who_ask_wait_for_one_look(source: FakeSource) -> None:
    known = adapters(source)
    source.gate.clear()
    asked = [asyncio.create_task(known.reach("acme/tone")) for _ in range(20)]
    await until(lambda: bool(source.asked))
    asked[0].cancel()  # one who leaves takes nothing from the others
    await asyncio.sleep(0)
    source.gate.set()
    found = await asyncio.gather(*asked[1:])
    assert {each.root for each in found if each} == {"acme/tone@c1"}
    assert source.asked == ["acme/tone"]
    assert await known.reach("acme/tone") is found[0]
    assert source.asked == ["acme/tone"]


async def test_what_no_source_has_is_asked_for_once_in_a_while(source: FakeSource) -> None:
    outcomes = Counter[tuple[str, str]]()
    known = Adapters([source], looked=lambda kind, outcome: outcomes.update([(kind, outcome)]))
    known.adopt(Catalogue([entry()]))
    for _ in range(3):
        assert await known.reach("acme/none") is None
    assert source.asked == ["acme/none"]
    assert outcomes == {("hf", "missing"): 1}
    source.fails = Refused("it has r 99")
    for _ in range(2):
        with pytest.raises(HttpError, match=r"'acme/tone' cannot be used here: it has r 99\.") as refused:
            await known.reach("acme/tone")
        assert refused.value.status == 400
    source.fails = Unavailable("secret address")
    for _ in range(2):
        with pytest.raises(HttpError, match="cannot be fetched at the moment") as failed:
            await known.reach("acme/other")
        assert (failed.value.status, failed.value.headers["retry-after"]) == (503, "5")
    assert source.asked == ["acme/none", "acme/tone", "acme/other"]
    source.fails = RuntimeError("unexpected")
    with pytest.raises(RuntimeError):
        await known.reach("acme/another")
    assert outcomes == {("hf", "missing"): 1, ("hf", "refused"): 1, ("hf", "failed"): 2}


async def test_a_thousand_unknown_names_are_nothing(source: FakeSource) -> None:
    known = adapters(source)
    for number in range(1000):
        assert await known.reach(f"../x{number}") is None
    assert source.asked == []
    found = await asyncio.gather(*(known.reach(f"acme/x{number}") for number in range(200)))
    assert set(found) == {None}
    assert len(known.all()) == 0


class SlowSource(FakeSource):
    """Knows at once what it has, and fetches while `gate` is set."""

    def __init__(self, folder: Path, *names: str) -> None:
        super().__init__(folder, *names)
        self.fetching = list[str]()

    def find(self, name: AdapterName) -> Found | Callable[[], Found] | None:  # type: ignore[override]
        self.asked.append(str(name))
        if name.name not in self.has:
            return None

        def fetch() -> Found:
            self.fetching.append(str(name))
            assert self.gate.wait(PATIENCE)
            return Found(self.folder, str(name), "c1")

        return fetch if name.name.startswith("slow/") else Found(self.folder, str(name), "c1")


async def test_nobody_waits_for_anothers_download(tmp_path: Path) -> None:
    """Neither what is in the cache, nor what is missing, nor another source; and one's downloads take turns."""
    tmp_path.joinpath("local").mkdir()
    slow = SlowSource(tmp_path, *(f"slow/{n}" for n in range(100)), "cached/tone")
    other = FakeSource(tmp_path / "local", "local/tone")
    other.kind = "local"
    known = Adapters([slow, other])
    known.adopt(Catalogue([entry()]))
    slow.gate.clear()
    asked = [asyncio.create_task(known.reach(f"slow/{n}")) for n in range(100)]
    try:
        await until(lambda: len(slow.asked) == 100 and len(slow.fetching) == 4)
        async with asyncio.timeout(PATIENCE):
            for name, kind in (("cached/tone", "hf"), ("local/tone", "local")):
                found = await known.reach(name)
                assert found is not None
                assert found.kind == kind
            assert await known.reach("none") is None
        assert len(slow.fetching) == 4
    finally:
        slow.gate.set()
        found = await asyncio.gather(*asked)
    assert all(found)
    assert len(slow.fetching) == 100


async def test_one_download_for_a_name_however_it_is_said(tmp_path: Path) -> None:
    slow = SlowSource(tmp_path, "slow/tone")
    known = adapters(slow)
    slow.gate.clear()
    asked = [asyncio.create_task(known.reach(name)) for name in ("slow/tone", "base:slow/tone", "slow/tone")]
    await until(lambda: bool(slow.fetching))
    slow.gate.set()
    plain, _, same = await asyncio.gather(*asked)
    assert slow.fetching == ["slow/tone"]
    assert plain is not None
    assert plain.plain
    assert known.find("slow/tone") is not None
    assert known.find("base:slow/tone") is known.find("slow/tone")
    assert same is not None


class ListedSource(FakeSource):
    """A folder that says what it has, and in which thread it was asked."""

    kind = "local"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.threads = list[str]()

    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        self.threads.append(threading.current_thread().name)
        return ("tone", "taste")


async def test_folders_are_walked_beside_the_event_loop_and_once_in_a_while(tmp_path: Path) -> None:
    source = ListedSource(tmp_path)
    known = Adapters([source])
    known.adopt(Catalogue([entry(lora_modules=("given=/srv/given",))]))
    assert [each.name for each in known.all()] == ["given"]
    assert source.threads == [], "nothing is walked by who cannot wait"
    listed = await asyncio.gather(*(known.listed() for _ in range(5)))
    assert [each.name for each in listed[0]] == ["given", "taste", "tone"]
    assert await known.reach("tastes") is None
    assert "did you mean taste" in known.near("tastes")
    assert Adapters([]).near("taste").startswith("This server has no adapters (--lora-modules); --lora-resolver finds")
    assert len(source.threads) == 1
    assert source.threads[0] != threading.current_thread().name
    assert (await known.listed()) is known.all(), "made once"


async def test_no_more_look_than_may(source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("candle_vllm.server.adapters.looking._MAX_LOOKING", 2)
    known = adapters(source)
    source.gate.clear()
    looking = [asyncio.create_task(known.reach(f"acme/{n}")) for n in range(2)]
    await until(lambda: len(source.asked) == 2)
    with pytest.raises(HttpError, match="Too many searches for adapters") as refused:
        await known.reach("acme/tone")
    assert refused.value.status == 503
    source.gate.set()
    await asyncio.gather(*looking)


async def test_one_source_that_fails_hides_none_that_has_it(source: FakeSource, tmp_path: Path) -> None:
    broken = FakeSource(tmp_path / "broken")
    broken.fails = Unavailable("down")
    known = adapters(broken, source)
    found = await known.reach("acme/tone")
    assert found is not None
    assert found.kind == "hf"
    with pytest.raises(HttpError, match="cannot be fetched at the moment"):
        await known.reach("acme/none")


async def test_a_name_may_say_its_base_and_its_revision(source: FakeSource) -> None:
    first, second = entry("first"), entry("org/second:Q4", model="org/second")
    known = adapters(source, entries=(first, second, entry("closed", enable_lora=False)))
    found = await known.reach("org/second:Q4:acme/tone@v7")
    assert found is not None
    assert (found.base, found.name, found.revision) == ("org/second:Q4", "acme/tone@v7", "v7")
    assert found.request.lora_name == "acme/tone@v7"
    assert known.find("org/second:Q4:acme/tone@v7") is found
    assert known.find("acme/tone@v7") is None  # who asked with a base says nothing of the plain name
    assert known.called(found) == "org/second:Q4:acme/tone@v7"
    assert known.find("first:acme/tone@v7") is None
    plain = await known.reach("acme/tone")
    assert plain is not None
    assert (plain.base, plain.request.lora_name) == ("first", "acme/tone@c1")
    source.base = "org/second"
    other = await known.reach("acme/other")
    assert other is not None
    assert other.base == "org/second:Q4"
    assert known.find("acme/other") is other
    shared = await known.reach("acme/tone@v7")
    assert shared is not None
    assert (shared.base, shared.plain) == ("org/second:Q4", True)
    assert known.find("acme/tone@v7") is known.find("org/second:Q4:acme/tone@v7")
    assert await known.reach("closed:acme/tone") is None


async def test_a_models_own_name_is_never_an_adapters(source: FakeSource) -> None:
    source.has.add("base")
    known = adapters(source)
    assert known.find("base") is None
    assert known.find("default") is None
    for name in ("base", "base:tone"):
        with pytest.raises(UsageError, match="has the name of a model"):
            adapters(entries=(entry(lora_modules=(f"{name}=/x",)),))


async def test_files_that_went_from_the_cache_come_again_as_they_were(tmp_path: Path, source: FakeSource) -> None:
    known = adapters(source)
    found = await known.reach("acme/tone")
    assert found is not None
    found.path.rmdir()
    again = await known.reach("acme/tone")
    assert again is not None
    assert again.path.is_dir()
    assert source.asked == ["acme/tone", "acme/tone@c1"]


async def test_what_an_operator_loads_by_a_resolvers_name_keeps_its_revision(
    source: FakeSource,
) -> None:
    known = adapters(source)
    found = await known.fetch("acme/tone", "mine", "base")
    assert found is not None
    known.add(found)
    assert (found.kind, found.revision, found.request.lora_name) == ("hf", "c1", "mine@c1")
    assert await known.reach("mine") is known.find("mine")
    found.path.rmdir()
    again = await known.reach("mine")
    assert again is not None
    assert (again.path.is_dir(), again.request) == (True, found.request)
    assert source.asked == ["acme/tone", "acme/tone@c1"]
    assert known.given("base") == [again]
    again.path.rmdir()
    source.gate.clear()
    asked = asyncio.create_task(known.reach("mine"))
    await until(lambda: len(source.asked) == 3)
    known.forget(again)
    source.gate.set()
    assert await asked is None
    assert known.find("mine") is None


async def test_other_files_of_a_name_have_another_name_in_the_engine(tmp_path: Path) -> None:
    """The engine may still have the earlier files."""
    known = Adapters([LocalSource(tmp_path, Limits())])
    known.adopt(Catalogue([entry()]))
    (tmp_path / "tone").mkdir()
    (tmp_path / "tone" / CONFIG).write_bytes(files()[CONFIG])
    found = await known.reach("tone")
    assert found is not None
    assert found.request.lora_name == "tone"
    shutil.rmtree(tmp_path / "tone")
    (tmp_path / "tone.gguf").write_bytes(b"GGUF")
    again = await known.reach("tone")
    assert again is not None
    assert again.request.lora_path == str(tmp_path / "tone.gguf")
    assert again.request.lora_name.startswith("tone@")
    assert await known.reach("tone") is again


def test_a_model_that_stays_keeps_what_was_changed_at_run_time() -> None:
    known = adapters(entries=(entry(lora_modules=("tone=/srv/a", "poems=/srv/p")),))
    assert known.add(Adapter(name="tone", base="base", path=Path("/srv/b"), root="b")) is not None
    known.scale("base", {1: 0.5})
    changed = known.numbered("base")
    known.adopt(Catalogue([entry(lora_modules=("tone=/srv/a", "poems=/srv/p")), entry("more")]))
    assert known.numbered("base") == changed
    assert [(str(each.path), each.scale) for each in changed] == [("/srv/b", 0.0), ("/srv/p", 0.5)]
    known.adopt(Catalogue([entry(lora_modules=("tone=/srv/c",))]))  # whose engine is loaded anew
    assert [(str(each.path), each.request.lora_name) for each in known.numbered("base")] == [("/srv/c", "tone")]


async def test_an_adapter_that_goes_while_its_request_is_prepared_never_becomes_the_base(source: FakeSource) -> None:
    known = adapters(source, entries=(entry("first"), entry("second")))
    first, second = BaseAdapters(known, "first"), BaseAdapters(known, "second")
    found = await known.reach("acme/tone")
    assert found is not None
    assert len(first.uses("acme/tone", None)) == 1
    for name in (None, "default", "first"):
        assert first.uses(name, None) == []
    with pytest.raises(ModelNotServedError, match="'acme/tone' is not served any more"):
        second.uses("acme/tone", None)
    known.forget(found)
    with pytest.raises(ModelNotServedError, match="'acme/tone' is not served any more"):
        first.uses("acme/tone", None)


async def test_a_source_without_names_for_revisions_is_asked_as_before(source: FakeSource) -> None:
    source.kind, source.pins = "s3", False
    registry = adapters(source)
    known = await registry.reach("acme/tone")
    assert known is not None
    known.path.rmdir()
    again = await registry.reach("acme/tone")
    assert again is not None
    assert again.path.is_dir()
    assert source.asked == ["acme/tone", "acme/tone"]


async def test_an_adapter_in_use_keeps_its_files(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)

    def fill(folder: Path, _: object) -> None:
        (folder / "x").write_bytes(bytes(600))

    path = cache.put(Key("hf", "acme/tone", "c1"), "", fill)

    class Cached(FakeSource):
        def find(self, name: AdapterName) -> Found | None:
            return Found(path, "acme/tone@c1", "c1")

    known = adapters(Cached(tmp_path), cache=cache)
    found = await known.reach("acme/tone")
    assert found is not None
    done = known.use(found)
    with pytest.raises(Unavailable):
        cache.put(Key("hf", "acme/other", "c1"), "", fill)
    done()
    cache.put(Key("hf", "acme/other", "c1"), "", fill)
    assert not path.exists()


async def test_a_numbered_adapter_of_a_resolver_keeps_its_files_and_gets_them_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 1000)

    def fill(folder: Path, _: object) -> None:
        (folder / "x").write_bytes(bytes(600))

    class Cached(FakeSource):
        def find(self, name: AdapterName) -> Found | None:
            self.asked.append(str(name))
            if self.fails is not None:
                raise self.fails
            return Found(cache.put(Key("hf", name.name, "c1"), "", fill), f"{name.name}@c1", "c1")

    source = Cached(tmp_path)
    known = adapters(source, entries=(entry(lora_modules=("tone=/srv/tone", "poems=/srv/poems")),), cache=cache)
    replaced = await known.fetch("acme/tone", "tone", "base")
    assert replaced is not None
    known.add(replaced)
    (before, scale), *others = known.mix("base", {0: 0.5, 1: 0.0})
    assert (before.request.lora_name, before.kind, scale, others) == ("tone@c1", "hf", 0.5, [])
    assert [each.name for each in known.numbered("base")] == ["tone", "poems"]
    with pytest.raises(Unavailable, match="in use"):  # nobody names it, and any request may have it
        cache.put(Key("hf", "acme/other", "c1"), "", fill)
    await known.bring("base")
    assert source.asked == ["acme/tone"]
    shutil.rmtree(before.path.parent)  # by another server that shares the cache
    source.fails = Unavailable("down")
    await known.bring("base")  # it counts nothing where a request does not say so
    known.scale("base", {0: 1.0})
    with pytest.raises(HttpError, match="cannot be fetched at the moment"):
        await known.bring("base")
    known._lookout.ask_anew()
    source.fails = None
    await known.bring("base")
    assert [(each.path.is_dir(), scale) for each, scale in known.mix("base", None)] == [(True, 1.0)]
    known.forget(known.numbered("base")[0])
    assert [each.name for each in known.numbered("base")] == ["poems"]
    assert known.mix("base", None) == []
    cache.put(Key("hf", "acme/other", "c1"), "", fill)  # it is held no more


async def test_those_that_requests_named_are_forgotten_in_turn(
    source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("candle_vllm.server.adapters.registry.MAX_KNOWN", 3)
    source.has = {f"acme/{n}" for n in range(5)}
    known = adapters(source, entries=(entry(lora_modules=("given=/srv/given",)),))
    first = await known.reach("acme/0")
    assert first is not None
    done = known.use(first)
    for number in range(1, 5):
        await known.reach(f"acme/{number}")
    assert [each.name for each in known.all()] == ["acme/0", "acme/4", "given"]
    done()


def test_what_an_operator_names_has_numbers_and_scales() -> None:
    modules = ("a=/srv/a", '{"name": "b", "path": "/srv/b.gguf", "scale": 0.5, "pinned": true}')
    known = adapters(entries=(entry(lora_modules=modules),))
    names = BaseAdapters(known, "base")
    assert [(each.number, each.name, each.scale, each.pinned) for each in known.numbered("base")] == [
        (0, "a", 0.0, False), (1, "b", 0.5, True),
    ]  # fmt: skip
    assert [(each.lora_name, scale) for each, scale in names.uses("base", None)] == [("b", 0.5)]
    assert [(each.lora_name, scale) for each, scale in names.uses("a", None)] == [("a", 1.0)]
    assert [(each.lora_name, scale) for each, scale in names.uses(None, {0: 2.0, 1: 0.0})] == [("a", 2.0)]
    assert names.uses(None, {}) == []
    with pytest.raises(InvalidParameterError, match="no adapter 2"):
        names.uses(None, {2: 1.0})
    with pytest.raises(InvalidParameterError, match="is an adapter"):
        names.uses("a", {0: 1.0})
    known.scale("base", {0: 1.5})
    assert [(each.lora_name, scale) for each, scale in names.uses(None, None)] == [("a", 1.5)]
    without = adapters(entries=(entry(lora_modules=modules, lora_init_without_apply=True),))
    assert BaseAdapters(without, "base").uses(None, None) == []


NO_SPECS = (
    "x", "=path", "name=", "{", '{"name": "x"}', '{"name": "x", "path": 3}', '{"name": "x", "path": "y", "p": 1}',
    '{"name": "x", "path": "y", "scale": NaN}', '{"name": "x", "path": "y", "scale": 1e9}',
    '{"name": "x", "path": "y", "pinned": 1}', "a\nb=x",
)  # fmt: skip


@pytest.mark.parametrize("text", NO_SPECS)
def test_an_adapter_that_is_none_is_refused_at_the_start(text: str) -> None:
    with pytest.raises(UsageError, match=r"lora.modules"):
        adapters(entries=(entry(lora_modules=(text,)),))


def test_adapters_of_models_that_take_none_are_refused_at_the_start(source: FakeSource) -> None:
    with pytest.raises(UsageError, match="there is none"):
        adapters(source, entries=(entry(enable_lora=False),))


def test_two_adapters_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two adapters are called 'a'"):
        adapters(entries=(entry(lora_modules=("a=/x", "a=/y")),))


def test_models_yaml_has_the_adapters_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    (tmp_path / "tone").mkdir()
    (tmp_path / "jina").mkdir()
    (tmp_path / "jina/config.json").write_text('{"lora_adaptations": ["match"]}')
    path.write_text(
        "models:\n- name: base\n  hf_id: org/base\n  adapters:\n  - {name: tone, path: tone, pinned: true}\n"
        "  - {name: poems, path: /srv/poems.gguf, scale: 0.5}\n  - {name: sql, path: acme/sql}\n"
        "  - {name: match, path: jina/match}\n"
        "  params: {lora_warmup: [poems]}\n"
    )
    source = read_models_file(path).models["base"]
    settings = Settings(**source.values)
    assert (settings.enable_lora, settings.lora_warmup) == (True, ("poems",))
    specs = read_specs(settings.lora_modules)
    assert [(each.name, each.path, each.scale, each.pinned) for each in specs] == [
        ("tone", str(tmp_path / "tone"), 0.0, True), ("poems", "/srv/poems.gguf", 0.5, False),
        ("sql", "acme/sql", 0.0, False),  # of --lora-resolver, as with --lora-modules
        ("match", str(tmp_path / "jina/match"), 0.0, False),  # a task of the model in the folder
    ]  # fmt: skip
    for wrong in ("x", "[x]", "[{name: a}]", "[{name: a, path: b, rank: 3}]"):
        path.write_text(f"models:\n- {{name: base, hf_id: org/base, adapters: {wrong}}}\n")
        with pytest.raises(UsageError, match=r"models\.yaml.*line 2"):
            read_models_file(path)


async def test_adapters_that_shall_be_there_are_loaded_with_their_model(tmp_path: Path, source: FakeSource) -> None:
    modules = ('{"name": "pinned", "path": "/srv/a", "pinned": true}', "warm=/srv/b", "cold=/srv/c")
    known = Adapters([source])
    loader = FakeLoader()
    catalogue = Catalogue([entry(lora_modules=modules, lora_warmup=("warm", "acme/tone", "acme/none"))])
    manager = ModelManager(catalogue, loader, adapters=known)
    try:
        await manager.start()
        await until(lambda: len(loader.engines[0].adapters) == 3 and not manager._warming)
        there = {name: info.pinned for name, info in loader.engines[0].adapters.items()}
        assert there == {"pinned": True, "warm": False, "acme/tone@c1": False}
    finally:
        await manager.close()


async def test_an_operator_may_give_the_name_of_a_repository_as_a_path(source: FakeSource) -> None:
    """As with vLLM: it is fetched when its model is loaded, and requests to the base model do not wait for it."""
    known, loader = Adapters([source]), FakeLoader()
    manager = ModelManager(Catalogue([entry(lora_modules=("mine=acme/tone", "cold=/srv/c"))]), loader, adapters=known)
    source.gate.clear()
    try:
        await manager.start()
        await known.bring("base")
        assert known.numbered("base")[0].kind == ""
        source.gate.set()
        await until(lambda: loader.engines[0].adapters and not manager._warming)
        assert {name: info.path for name, info in loader.engines[0].adapters.items()} == {
            "mine@c1": str(source.folder / "acme--tone")
        }
        found = await known.reach("mine")
        assert found is not None
        assert (found.kind, found.root, found.number, found.stays) == ("hf", "acme/tone@c1", 0, True)
        assert source.asked == ["acme/tone"]
    finally:
        await manager.close()


async def test_a_model_is_loaded_with_its_own_adapter_of_a_name_that_another_model_has_too(source: FakeSource) -> None:
    pinned = '{"name": "tone", "path": "/srv/%s", "pinned": true}'
    entries = [entry(name, lora_modules=(pinned % name,), lora_warmup=("acme/tone",)) for name in ("first", "second")]
    loader = FakeLoader()
    manager = ModelManager(Catalogue(entries), loader, adapters=Adapters([source]))
    try:
        await manager.load("second")
        await until(lambda: len(loader.engines[0].adapters) == 2 and not manager._warming)
        there = {name: (info.path, info.pinned) for name, info in loader.engines[0].adapters.items()}
        assert there == {"tone": ("/srv/second", True), "acme/tone@c1": (str(source.folder / "acme--tone"), False)}
        assert manager.adapters.find("second:acme/tone") is not None
    finally:
        await manager.close()
