# SPDX-License-Identifier: MIT
"""Registry of a server's LoRA adapters: the operator's, and adapters that a request names and a source provides.

Step 1 of a request's life, after `model` is read. The base model never answers in place of a missing adapter.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.errors import InvalidParameterError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.core.shown import without_secrets
from candle_vllm.openai.errors import ModelNotServedError
from candle_vllm.openai.serving import Uses
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.looking import Lookout
from candle_vllm.server.adapters.sources import AdapterName, Found, Source, read_name
from candle_vllm.server.http.errors import HttpError
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.options import UsageError

MAX_KNOWN = 10_000  # adapters; beyond it, the least recently used are dropped, except the operator's and those in use
_LISTED = 20  # maximum number of names in a message
_NEAR = 200  # maximum number of names that are compared with an unknown one


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter in the registry.

    Attributes:
        base: name of the catalogue entry of its base model.
        root: its origin, as clients see it.
        revision: a commit, a checksum or a version; None without a revision.
        number: its id in llama.cpp's API; None for adapters that are not in the operator's settings.
        scale: its scale in requests that name no adapter; 0 leaves it out.
        pinned: whether the engine keeps it in memory.
        kind: kind of its source, as in `Source`; "given" for files that the operator named, "" before the first lookup.
        asked: its name in the source, if the operator named it or loaded it from a source; otherwise None.
        plain: whether its name is valid without the prefix `base:`; False if requests used it only with the prefix.
        mark: part of its name in the engine, if earlier files of this name may still be in use there; "" otherwise.
        created: Unix time in seconds.
    """

    name: str
    base: str
    path: Path
    root: str
    revision: str | None = None
    number: int | None = None
    scale: float = 0.0
    pinned: bool = False
    kind: str = "given"
    asked: AdapterName | None = None
    plain: bool = True
    mark: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, str]:
        """Names that an API key may be restricted to: with the revision and without."""
        return self.name, self.name.partition("@")[0]

    @property
    def stays(self) -> bool:
        """Whether the operator named or loaded it, so that only the operator unloads it."""
        return self.kind == "given" or self.asked is not None

    @property
    def request(self) -> LoRARequest:
        """The LoRA request for the engine; its name is unique for these files."""
        version = self.revision or self.mark
        name = self.name if not version or self.name.endswith(f"@{version}") else f"{self.name}@{version}"
        return LoRARequest(lora_name=name, lora_path=str(self.path))


class Adapters:
    """Registry of adapters; belongs to one event loop. The model manager calls `adopt` before any other method.

    `sources` and `looked` are as in `Lookout`; `cache` is None if no source fetches anything.
    """

    def __init__(
        self,
        sources: Sequence[Source] = (),
        cache: DiskCache | None = None,
        looked: Callable[[str, str], object] = lambda kind, outcome: None,  # noqa: ARG005
    ) -> None:
        self._catalogue: Catalogue | None = None
        self._lookout = Lookout(sources, looked)
        self.cache = cache
        self._known: OrderedDict[tuple[str, str], Adapter] = OrderedDict()  # by base and name
        self._numbered: dict[str, dict[int, str]] = {}  # names by base and number
        self._used = Counter[tuple[str, str]]()
        self._kept: dict[tuple[str, str], Callable[[], None]] = {}  # release functions of protected files
        self._all: tuple[tuple[str, ...], tuple[Adapter, ...]] | None = None  # the sources' names; result of `all`

    # ---- names -------------------------------------------------------------------------------------------------------

    @property
    def looks_elsewhere(self) -> bool:
        """Whether the sources may have an adapter of an unknown name."""
        return bool(self._lookout.sources and self.bases())

    def bases(self) -> list[ModelEntry]:
        """The models that support adapters, the default model first."""
        catalogue = self._catalogue
        if catalogue is None:
            return []
        entries = sorted(catalogue.entries, key=lambda entry: entry is not catalogue.default)
        return [entry for entry in entries if entry.settings.enable_lora]

    def find(self, text: str | None) -> Adapter | None:
        """Return a registered adapter by `name` or `name@revision`, perhaps after `base:`; None for a model's name."""
        if text is None or self._catalogue is None or self._catalogue.has(text):
            return None
        base, name = self._split(text)
        if base is not None:
            return self._known.get((base.name, name))
        known = (self._known.get((entry.name, name)) for entry in self.bases())
        return next((each for each in known if each is not None and each.plain), None)

    def is_model(self, name: str) -> bool:
        return self._catalogue is not None and self._catalogue.has(name)

    def numbered(self, base: str) -> list[Adapter]:
        """Return the adapters in a model's settings, in the order of their llama.cpp ids."""
        names = self._numbered.get(base, {})
        return [self._known[base, names[number]] for number in sorted(names)]

    def mix(self, base: str, scales: Mapping[int, float] | None) -> list[tuple[Adapter, float]]:
        """Return the adapters and scales of a llama.cpp request; InvalidParameterError if an id does not exist.

        Without `scales`, these are the adapters that apply by default.
        """
        names = self._numbered.get(base, {})
        if scales is None:
            return [(each, each.scale) for each in self.numbered(base) if each.scale] if names else []
        for number in scales:
            if number not in names:
                raise InvalidParameterError(
                    f"lora: there is no adapter {number}: GET /lora-adapters shows those of this server", "lora"
                )
        return [(self._known[base, names[number]], scale) for number, scale in scales.items() if scale]

    async def listed(self) -> Sequence[Adapter]:
        """Return `all()` with the names that local folders had at most a few seconds ago."""
        await self._lookout.refresh()
        return self.all()

    def all(self) -> Sequence[Adapter]:
        """Return every registered adapter and, by name, adapters in local folders that no request has named yet."""
        names = self._lookout.names
        if self._all is None or self._all[0] is not names:
            found = {(each.base, each.name): each for each in self._known.values()}
            base = next((entry.name for entry in self.bases()), None)
            for name in names if base is not None else ():
                shown = Adapter(name=name, base=base or "", path=Path(), root=name, kind="local", created=0)
                found.setdefault((shown.base, name), shown)
            self._all = names, tuple(found[key] for key in sorted(found))
        return self._all[1]

    def near(self, name: str) -> str:
        """Return text for an error message: some adapter names, and the most similar name."""
        known = self.all()
        if not known:
            return "This server has no adapters (--lora-modules); --lora-resolver finds those that requests name."
        first, text = name[:1].lower(), name.lower()
        likely = (each for each in known if each.name[:1].lower() == first or text in each.name.lower())
        shown = ", ".join(map(self.called, known[:_LISTED])) + (", ..." if len(known) > _LISTED else "")
        return f"Known adapters: {shown}{nearest(name, map(self.called, islice(likely, _NEAR)))}."

    def called(self, adapter: Adapter) -> str:
        """Return an adapter's name for clients, after `base:` if the name alone is invalid or means something else."""
        other = self.find(adapter.name)
        if adapter.plain and not self.is_model(adapter.name) and (other is None or other.base == adapter.base):
            return adapter.name
        base = next((entry.names[0] for entry in self.bases() if entry.name == adapter.base), adapter.base)
        return f"{base}:{adapter.name}"

    def _split(self, text: str) -> tuple[ModelEntry | None, str]:
        """Split `base:name` if a model with adapters is called `base`; otherwise the base is None."""
        named = [(name, entry) for entry in self.bases() for name in entry.names if text.startswith(f"{name}:")]
        if not named:
            return None, text
        name, entry = max(named, key=lambda pair: len(pair[0]))
        return entry, text[len(name) + 1 :]

    # ---- on demand ---------------------------------------------------------------------------------------------------

    async def reach(self, text: str) -> Adapter | None:
        """Return the adapter of a name; look it up in the sources if it is not registered or its files are gone.

        Raises HttpError as `Lookout.find`.
        """
        known = self.find(text)
        if known is not None:
            self._known.move_to_end((known.base, known.name))
            if known.kind == "given" or known.path.exists():
                return known
        base, name = self._split(text)
        found = await self._look(base, name, known)
        if found is None:
            await self._lookout.refresh()  # for `near`
        return found

    async def _look(self, base: ModelEntry | None, name: str, known: Adapter | None) -> Adapter | None:
        read = read_name(name) if known is None or known.asked is None else known.asked
        if read is None or not self.looks_elsewhere:
            return None
        pins = known is not None and all(source.pins for source in self._lookout.sources if source.kind == known.kind)
        if known is not None and known.revision is not None and pins:  # the cache has evicted it
            read = AdapterName(read.name, known.revision, told=True)
        looked = await self._lookout.find(read)
        return None if looked is None else self._looked_up(*looked, base, name, known)

    def _looked_up(
        self, source: Source, found: Found, base: ModelEntry | None, name: str, known: Adapter | None
    ) -> Adapter | None:
        """Register the result of a lookup; `known` is the adapter that had the name when the lookup began."""
        entry = (base or self._base_of(found)).name if known is None else known.base
        now = self._known.get((entry, name))
        if known is not None and known.stays and (now is None or now.path != known.path):
            return now  # it was unloaded or replaced meanwhile
        if now is None or now is known or not (now.kind == "given" or now.path.exists()):  # else already registered
            before = now or Adapter(name=name, base=entry, path=found.path, root=found.root, plain=False)
            now = replace(before, path=found.path, root=found.root, revision=found.revision, kind=source.kind)
            now = _marked(now, before)
        adapter = now if now.plain or base is not None else replace(now, plain=True)
        if self._known.get((entry, name)) is not adapter:
            self._set(adapter)
            many = len(self._known) - MAX_KNOWN
            loose = (key for key, each in self._known.items() if not each.stays and not self._used[key])
            for key in list(islice(loose, max(0, many))):
                self._drop(key)
        return adapter

    async def fetch(self, text: str, name: str, base: str) -> Adapter | None:
        """Fetch the adapter `text` from a source, for a later `add` under another name; raises as `reach`."""
        read = read_name(text)
        looked = None if read is None else await self._lookout.find(read)
        if read is None or looked is None:
            return None
        source, found = looked
        return Adapter(
            name=name, base=base, path=found.path, root=found.root, revision=found.revision, kind=source.kind,
            asked=read,
        )  # fmt: skip

    async def bring(self, base: str) -> None:
        """Fetch missing files of the adapters that requests to a model use by id or by default.

        Raises HttpError as `reach`, and looks an adapter up for the first time, only if it applies by default.
        """
        entries = {entry.name: entry for entry in self.bases()}
        for adapter in self.numbered(base) if base in entries else ():
            if adapter.kind == "given" or adapter.path.exists() or not (adapter.kind or adapter.scale):
                continue
            try:
                await self._look(entries[base], adapter.name, adapter)
            except HttpError:
                if adapter.scale:
                    raise

    def _base_of(self, found: Found) -> ModelEntry:
        """Return the base model that the adapter's configuration names, if it is served; else the first of `bases`."""
        bases = self.bases()
        return next((entry for entry in bases if found.base in (*entry.names, entry.settings.model)), bases[0])

    def _set(self, adapter: Adapter) -> None:
        """Register an adapter; it replaces the one of the same name."""
        key = (adapter.base, adapter.name)
        self._drop(key)
        self._known[key] = adapter
        if adapter.number is not None:
            self._numbered.setdefault(adapter.base, {})[adapter.number] = adapter.name
            self._kept[key] = self._held(adapter)  # any request may use it without naming it

    def _drop(self, key: tuple[str, str]) -> None:
        adapter = self._known.pop(key, None)
        self._all = None
        if adapter is not None and adapter.number is not None:
            del self._numbered[adapter.base][adapter.number]
            self._kept.pop(key)()

    def _held(self, adapter: Adapter) -> Callable[[], None]:
        """Protect an adapter's files from eviction until the returned function is called."""
        fetched = adapter.kind not in ("given", "local", "")
        return self.cache.hold(adapter.path) if fetched and self.cache is not None else lambda: None

    def use(self, adapter: Adapter) -> Callable[[], None]:
        """Mark an adapter as used, and protect its files, until the returned function is called."""
        key, let_go = (adapter.base, adapter.name), self._held(adapter)
        self._used[key] += 1

        def done() -> None:
            self._used[key] -= 1
            if not self._used[key]:
                del self._used[key]
            let_go()

        return done

    # ---- for operators -----------------------------------------------------------------------------------------------

    def adopt(self, catalogue: Catalogue) -> None:
        """Register the adapters in the models' settings; drop adapters of models that the catalogue no longer has.

        A model with unchanged settings keeps its adapters with their files and scales. Raises UsageError if an adapter
        or its name is invalid, or there are sources and no model with --enable-lora.
        """
        if self._lookout.sources and not any(entry.settings.enable_lora for entry in catalogue.entries):
            raise UsageError("--lora-resolver needs a model with --enable-lora, and there is none")
        specs_of = {entry.name: read_specs(entry.settings.lora_modules) for entry in catalogue.entries}
        bases = [entry for entry in catalogue.entries if entry.settings.enable_lora]
        prefixes = tuple(f"{name}:" for entry in bases for name in entry.names)
        for spec in (spec for specs in specs_of.values() for spec in specs):
            if catalogue.has(spec.name) or spec.name.startswith(prefixes):
                raise UsageError(f"--lora-modules: the adapter {spec.name!r:.200} has the name of a model")
        before = {entry.name: entry for entry in (() if self._catalogue is None else self._catalogue.entries)}
        self._catalogue = catalogue
        entries = {entry.name: entry for entry in catalogue.entries}
        same = {name for name, entry in entries.items() if name in before and before[name].is_as(entry)}
        for key, each in list(self._known.items()):
            if each.base not in entries or (each.number is not None and each.base not in same):
                self._drop(key)
        self._all = None
        for entry in (entry for name, entry in entries.items() if name not in same):
            for number, spec in enumerate(specs_of[entry.name]):
                scale = 0.0 if entry.settings.lora_init_without_apply else spec.scale
                elsewhere = self._lookout.sources and not os.path.exists(spec.path)
                asked = read_name(spec.path) if elsewhere else None
                given = Adapter(
                    name=spec.name, base=entry.name, path=Path(spec.path),
                    root=Path(without_secrets(spec.path, alone=True)).name,
                    number=number, scale=scale, pinned=spec.pinned, asked=asked, kind="given" if asked is None else "",
                )  # fmt: skip
                self._set(given)

    def given(self, base: str) -> list[Adapter]:
        """Return the adapters that the operator named or loaded for a model."""
        return [each for each in self._known.values() if each.base == base and each.stays]

    def in_place(self, adapter: Adapter) -> Adapter:
        """Return an adapter that the operator loads at run time with id, scale and pin of the one that it replaces.

        If their files differ, so do their names in the engine: requests use both until `add` registers the new one.
        """
        before = self._known.get((adapter.base, adapter.name), adapter)
        return _marked(replace(adapter, number=before.number, scale=before.scale, pinned=before.pinned), before)

    def add(self, adapter: Adapter) -> Adapter | None:
        """Register an adapter as `in_place` returns it; return the one that it replaces."""
        before = self._known.get((adapter.base, adapter.name))
        self._set(self.in_place(adapter))
        return before

    def spelled(self, text: str) -> tuple[str, str]:
        """Return the adapter name in a request without the prefix `base:`: with the revision, and without it."""
        name = self._split(text)[1]
        return name, name.partition("@")[0]

    def forget(self, adapter: Adapter) -> None:
        """Drop an adapter; a later request may load it again from a source."""
        self._drop((adapter.base, adapter.name))
        self._lookout.ask_anew()

    def scale(self, base: str, scales: Mapping[int, float]) -> None:
        """Set the default scales, 0 for omitted adapters; raises InvalidParameterError if an id does not exist."""
        chosen = {adapter.name: scale for adapter, scale in self.mix(base, scales)}
        for adapter in self.numbered(base):
            self._set(replace(adapter, scale=chosen.get(adapter.name, 0.0)))


def _marked(adapter: Adapter, before: Adapter) -> Adapter:
    """Mark an adapter whose files differ from those of the earlier adapter of its name."""
    differs = adapter.path != before.path
    return replace(adapter, mark=hashlib.sha256(bytes(adapter.path)).hexdigest()[:8] if differs else before.mark)


class BaseAdapters:
    """The adapters of one model; implements `AdapterNames` of `candle_vllm.openai.serving`."""

    def __init__(self, adapters: Adapters, base: str) -> None:
        self._adapters = adapters
        self._base = base

    def is_known(self, name: str) -> bool:
        """Whether the model has an adapter of this name."""
        found = self._adapters.find(name)
        return found is not None and found.base == self._base

    def uses(self, name: str | None, scales: Mapping[int, float] | None) -> Uses:
        """Return the LoRA requests and scales of a request.

        Raises:
            InvalidParameterError: as `AdapterNames.uses`.
            ModelNotServedError: the adapter was unloaded after the request had arrived.
        """
        found = self._adapters.find(name)
        if found is None or found.base != self._base:
            if name is not None and not self._adapters.is_model(name):
                raise ModelNotServedError(f"The model {name!r:.200} is not served any more.", "model")
            return [(each.request, scale) for each, scale in self._adapters.mix(self._base, scales)]
        if scales is not None:
            raise InvalidParameterError(
                f"lora: model {name!r:.200} is an adapter, and lora would add others: name the base model", "lora"
            )
        return [(found.request, 1.0)]
