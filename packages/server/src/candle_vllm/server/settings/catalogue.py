# SPDX-License-Identifier: MIT
"""The catalogue of the models that this server may serve, with their names and settings (step 1)."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from candle_vllm.core.config import DEMO, DEMO_NAME, is_demo
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.options import MODEL, UsageError
from candle_vllm.server.settings.table import OPTIONS, SourceOptions

ANY_MODEL = "default"  # this name always selects the default model


@dataclass(frozen=True)
class ModelEntry:
    """One model that can be served.

    Attributes:
        name: its name in the catalogue: from models.yaml, or derived from its files.
        settings: settings of the process; the model's own settings replace them.
        aliases: the names for clients; the API reports the first. Without aliases it reports `name`.
    """

    name: str
    settings: Settings
    aliases: tuple[str, ...] = ()

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every name of this model; the reported one is the first."""
        return tuple(dict.fromkeys((*self.aliases, self.name)))

    def is_as(self, other: ModelEntry) -> bool:
        """Whether a model loaded for this entry fits the other; later names and settings of the process may differ."""
        own = {option.name for option in OPTIONS if option.in_yaml or option.group == MODEL} - {"served_model_name"}
        mine, theirs = self.settings, other.settings
        return self.names[0] == other.names[0] and all(getattr(mine, name) == getattr(theirs, name) for name in own)


class Catalogue:
    """Lookup of models by name; UsageError if two models share a name, or another than the default is called 'default'.

    `default` is the name of the model for requests that name no model; None means the first entry.
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
        if by_name.get(ANY_MODEL, self.default) is not self.default:
            raise UsageError(f"{by_name[ANY_MODEL].name!r} cannot be called 'default', which means the default model")

    def has(self, name: str) -> bool:
        return name in self._by_name or name == ANY_MODEL or (name == DEMO and DEMO_NAME in self._by_name)

    def find(self, name: str | None, *, exact: bool = False) -> ModelEntry:
        """Return the model of a request; None and `ANY_MODEL` mean the default model.

        A single model accepts every other name, unless `exact` is set, names are strict, or it supports adapters.
        Otherwise raises ModelNotServedError if no model has this name.
        """
        if name in self._by_name:
            return self._by_name[name]
        if name is None or name == ANY_MODEL:
            return self.default
        if name == DEMO and DEMO_NAME in self._by_name:
            return self._by_name[DEMO_NAME]
        from candle_vllm.openai.serving import answered_by  # slow import, needed only here

        loose = not self.default.settings.strict_model_names and not self.default.settings.enable_lora
        alone = len(self.entries) == 1 and loose  # with adapters, another name may be an adapter's
        served = [name for entry in self.entries for name in entry.names]
        answered_by(name, served, strict=exact or not alone)
        return self.default


def source_name(settings: SourceOptions, demo: Path | None) -> str:
    """Return the name of a model outside models.yaml, from its files or its source."""
    if settings.model is None and settings.weight_path is None and settings.weight_file is None:
        return "default" if demo is None else demo.stem
    if settings.weight_path is None and is_demo(settings.model or "") and demo is not None:
        return demo.stem
    source = str(settings.weight_path or settings.model or settings.weight_file)
    if "://" in source:
        from candle_vllm.server.models.archives import Archive  # imported only for URLs

        return without_secrets(source, alone=True) if (archive := Archive.of(source)) is None else archive.name
    path = Path(os.path.expanduser(source))
    if path.suffix == ".gguf" and ":" not in source:
        return path.stem
    return path.resolve().name if path.exists() else without_secrets(source, alone=True)
