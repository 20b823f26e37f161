# SPDX-License-Identifier: MIT
"""The catalogue: which models this server knows, by which names, each with its settings.

Read in step 1 of a request's life, where the `model` field chooses. What is loaded is the manager's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from candle_vllm.core.config import DEMO, DEMO_NAME, is_demo
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.options import MODEL, UsageError
from candle_vllm.server.settings.table import OPTIONS

ANY_MODEL = "default"  # the name that always means the default


@dataclass(frozen=True)
class ModelEntry:
    """One model that can be served.

    Attributes:
        name: what the catalogue calls it: its name in models.yaml, or what its files are called.
        settings: those of the process, with the model's own in their place.
        aliases: the names that clients use; the first is reported. None is `name` alone.
    """

    name: str
    settings: Settings
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that means this model, the reported one first."""
        return tuple(dict.fromkeys((*self.aliases, self.name)))

    def is_as(self, other: ModelEntry) -> bool:
        """Whether a loaded model of the one does for the other; what is of the process does not count."""
        own = [option.name for option in OPTIONS if option.in_yaml or option.group == MODEL]
        mine, theirs = self.settings, other.settings
        return self.names == other.names and all(getattr(mine, name) == getattr(theirs, name) for name in own)


class Catalogue:
    """The models by name.

    Args:
        entries: at least one, all of their names different.
        default: name of the one that is meant where a request names none; None is the first.

    Raises:
        UsageError: two models have the same name.
    """

    def __init__(self, entries: Sequence[ModelEntry], default: str | None = None) -> None:
        assert entries
        self.entries = tuple(entries)
        by_name: dict[str, ModelEntry] = {}
        for entry in self.entries:
            for name in entry.names:
                if name in by_name:
                    raise UsageError(f"the models {by_name[name].name!r} and {entry.name!r} are both called {name!r}")
                by_name[name] = entry
        self._by_name: Mapping[str, ModelEntry] = by_name
        self.default = self.entries[0] if default is None else by_name[default]

    def has(self, name: str) -> bool:
        """Whether a model is called so."""
        return name in self._by_name or name == ANY_MODEL or (name == DEMO and DEMO_NAME in self._by_name)

    def find(self, name: str | None, *, exact: bool = False) -> ModelEntry:
        """The model that a request means: where there is but one, that one, by any name but the empty one.

        Args:
            name: what the request calls it, or None.
            exact: whether it must be one of its names; it always must where names are strict.

        Raises:
            ModelNotServedError: there is none of that name.
        """
        if name is not None and name in self._by_name:
            return self._by_name[name]
        loose = not self.default.settings.strict_model_names and not self.default.settings.enable_lora
        alone = len(self.entries) == 1 and loose  # with adapters, another name could be an adapter's
        if name is None or name == ANY_MODEL:
            return self.default
        if name == DEMO and DEMO_NAME in self._by_name:
            return self._by_name[DEMO_NAME]
        from candle_vllm.openai.serving import answered_by  # slow to import, and not needed before

        served = [self.default.names[0]] if alone else [entry.names[0] for entry in self.entries]
        answered_by(name, served, strict=exact or not alone)
        return self.default


def source_name(settings: Settings, demo: Path | None) -> str:
    """What a model that stands in no models.yaml is called before it is loaded: as its files are."""
    if settings.model is None and settings.weight_path is None and settings.weight_file is None:
        return "default" if demo is None else demo.stem
    if settings.weight_path is None and is_demo(settings.model or "") and demo is not None:
        return demo.stem
    source = str(settings.weight_path or settings.model or settings.weight_file)
    if "://" in source:
        from candle_vllm.server.models.archives import Archive  # whoever has no address does not import it

        return without_secrets(source, alone=True) if (archive := Archive.of(source)) is None else archive.name
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() else without_secrets(source, alone=True)
