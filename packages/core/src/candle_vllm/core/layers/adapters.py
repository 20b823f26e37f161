# SPDX-License-Identifier: MIT
"""Adapter sites of a model: number its `Linear` layers, by the paths of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from candle_vllm.core.kernels.lora import Place
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.moe import ExpertMLPs, Router

if TYPE_CHECKING:
    from candle_vllm.core.kernels.lora.reference import EagerAdapters


def number_places(model: object, adapters: EagerAdapters | None = None) -> Mapping[str, tuple[Place, ...]]:
    """Give every `Linear` of a model an adapter site; return sites by path. Experts have two: gate with up, and down.

    "head" is included also if it shares the table of "embed"; "embed" is only the lookup.

    Args:
        model: the model; a site keeps its number in later calls.
        adapters: adapters of layers that run op by op; None leaves the layers' present adapters.
    """
    made: dict[str, tuple[Place, ...]] = {}
    count = 0

    def place(linear: Linear) -> Place:
        nonlocal count
        linear.adapters = adapters or linear.adapters
        if linear.place is None:
            linear.place = linear.number_place(count)
        count = max(count, linear.place.number + 1)
        return linear.place

    for path, layer in _layers(model, ""):
        if isinstance(layer, Linear):
            made[path] = (place(layer),)
        elif isinstance(layer, Router):
            made[path] = (place(layer.scores),)
        elif isinstance(layer, ExpertMLPs):
            made[path] = (place(layer.gate_up), place(layer.down))
        elif isinstance(layer, Embedding):
            if path != "head":
                layer.table.adapters = adapters or layer.table.adapters
                if layer.place is None:
                    layer.place = layer.table.number_place(count, lookup=True)
                count = max(count, layer.place.number + 1)
                made[path] = (layer.place,)
            if path == "head" or (path == "embed" and getattr(model, "head", None) is None):
                made["head"] = (place(layer.table),)
    return made


def linears_in(layers: object) -> Iterator[Linear]:
    """Yield every `Linear` of the layers, except those of routers, embeddings and output layers."""
    for _, layer in _layers(layers, ""):
        if isinstance(layer, Linear):
            yield layer
        elif isinstance(layer, ExpertMLPs):
            yield from (layer.gate_up, layer.down)


def _layers(layer: object, path: str, above: tuple[object, ...] = ()) -> Iterator[tuple[str, object]]:
    """Yield the path and the layer of each `Linear`, `Router`, `ExpertMLPs` and `Embedding`.

    `above` are the objects that contain `layer`; a layer of another package may refer to one of them.
    """
    if isinstance(layer, (Linear, Router, ExpertMLPs, Embedding)):
        yield path, layer
    elif isinstance(layer, (list, tuple)):
        for number, each in enumerate(layer):
            yield from _layers(each, f"{path}.{number}", above)
    elif not path or (_may_have_layers(layer) and not any(layer is each for each in above)):
        for name, each in getattr(layer, "__dict__", {}).items():
            if not name.startswith("_"):
                yield from _layers(each, f"{path}.{name}" if path else name, (*above, layer))


def _may_have_layers(value: object) -> bool:
    """Whether an attribute may contain layers: a layer or part of a model, or a callable object of another package."""
    module = type(value).__module__
    if module.startswith("candle_vllm.core."):
        return module.startswith(("candle_vllm.core.models", "candle_vllm.core.layers"))
    return callable(value) and not isinstance(value, type)
