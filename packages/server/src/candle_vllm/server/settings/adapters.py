# SPDX-License-Identifier: MIT
"""Adapters in the operator's settings (before step 1): `--lora-modules`, and `adapters` in models.yaml."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.engine.requests import MAX_ADAPTER_NAME, MAX_ADAPTER_SCALE
from candle_vllm.core.setting_kinds import Located, Text, nearest
from candle_vllm.server.settings.options import UsageError

MAX_SPECS = 100_000
_MAX_TEXT = 4096
_KEYS = {"name": "name", "path": "path", "scale": "scale", "pinned": "pinned", "lora_name": "name", "lora_path": "path",
         "base_model_name": "base"}  # fmt: skip


class AdapterSpec(NamedTuple):
    """An adapter in the operator's settings; a pinned one stays in memory.

    `scale` is for requests that name no adapter; 0 means that the adapter does not apply to them.
    """

    name: str
    path: str
    scale: float = 0.0
    pinned: bool = False


@dataclass(frozen=True)
class AdapterText(Text, Located):
    """An adapter in the form of `read_spec`."""

    def beside(self, value: str, folder: Path) -> str:
        return spec_text(read_spec(value, folder))


def read_specs(texts: Sequence[str]) -> Sequence[AdapterSpec]:
    """Parse the adapters of a model; raises `UsageError`, also for duplicate names."""
    found = dict[str, AdapterSpec]()
    for text in texts:
        spec = read_spec(text)
        if spec.name in found:
            raise UsageError(f"--lora-modules: two adapters are called {spec.name!r:.200}")
        found[spec.name] = spec
    if len(found) > MAX_SPECS:
        raise UsageError(f"--lora-modules: more than {MAX_SPECS} adapters; --lora-resolver local=DIR has them by name")
    return list(found.values())


def read_spec(text: str, folder: Path | None = None) -> AdapterSpec:
    """Parse one `--lora-modules`: `name=path`, or JSON in the form of vLLM or SGLang; `folder` as in `make_spec`."""
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(f"--lora-modules {text!r:.100} is not JSON") from None
        return make_spec(given, "--lora-modules", folder)
    name, equals, path = text.partition("=")
    if not equals:
        raise UsageError(f"--lora-modules {text!r:.100} must be name=path, or JSON with name and path")
    return make_spec({"name": name, "path": path}, "--lora-modules", folder)


def make_spec(given: Mapping[Any, Any], where: str, folder: Path | None = None) -> AdapterSpec:
    """Build an adapter from a mapping; raises `UsageError`, which names its position in the settings.

    Args:
        given: name and path, optionally scale and pinned, by the keys in `_KEYS`; `base_model_name` has no effect.
        where: position in the settings, for messages.
        folder: folder that a relative path starts from, if it begins with a dot or exists there.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in _KEYS:
            raise UsageError(f"{where}: an adapter has no {str(key)[:60]!r}{nearest(str(key), _KEYS)}")
        if _KEYS[key] in values:
            raise UsageError(f"{where}: an adapter has {_KEYS[key]!r} twice")
        values[_KEYS[key]] = value
    for key in ("name", "path"):
        value = values.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > _MAX_TEXT or not value.isprintable():
            raise UsageError(f"{where}: an adapter needs a {key}, which is a text")
    if len(values["name"]) > MAX_ADAPTER_NAME:
        raise UsageError(f"{where}: the name of an adapter has more than {MAX_ADAPTER_NAME} characters")
    scale, pinned = values.get("scale", 0.0), values.get("pinned", False)
    if (
        isinstance(scale, bool)
        or not isinstance(scale, (int, float))
        or not math.isfinite(scale)
        or abs(scale) > MAX_ADAPTER_SCALE
    ):
        raise UsageError(f"{where}: scale of {values['name']!r:.100} must be a number within ±1000")
    if not isinstance(pinned, bool):
        raise UsageError(f"{where}: pinned of {values['name']!r:.100} must be true or false")
    path = os.path.expanduser(values["path"])  # leaves an unknown user's folder as it is
    if folder is not None:
        from candle_vllm.core.models.jina_tasks import adapter_exists  # only for models.yaml, as it takes a while

        path = str(folder / path) if path.startswith(".") or adapter_exists(folder / path) else path
    return AdapterSpec(values["name"], path, float(scale), pinned)


def spec_text(spec: AdapterSpec) -> str:
    """Format a spec for `--lora-modules`."""
    return json.dumps(spec._asdict())
