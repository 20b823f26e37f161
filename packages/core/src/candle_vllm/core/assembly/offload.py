# SPDX-License-Identifier: MIT
"""Offload parts of a model from its GPU: experts that the CPU computes, and layers that are read over the PCIe bus.

The settings determine the amount; without them, only the weights that do not fit into GPU memory are offloaded.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from candle_vllm.core.assembly.placement import matrix_obstacle, memory_of, on_cpu
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import Device, gpu_memory
from candle_vllm.core.errors import ConfigError, refuse_settings
from candle_vllm.core.layers.adapters import linears_in
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.moe import mixtures_of
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import layer_at, stored_lines
from candle_vllm.core.memory import MIB, cache_bytes, device_element_bytes
from candle_vllm.core.quantization.plain import ELEMENTS

if TYPE_CHECKING:
    from candle_vllm.core.kernels.offloading import HostWeights
    from candle_vllm.core.models.family import Decoder, Family

logger = logging.getLogger(__name__)

_STEPS = 1 << 30
"""Bytes that are reserved for steps, because their memory is not known yet."""
_TOKENS = 4096
"""Maximum tokens for which KV cache is reserved if `max_model_len` is not set; few, since offloading is slow."""
_SETTINGS = ("cpu_experts", "cpu_offload_gb", "gpu_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The parts of a GPU's model that are in main memory.

    Attributes:
        experts: number of layers, from the first on, whose experts the CPU computes.
        host: placement of these experts' matrices; None if the CPU computes no experts.
        layers: index of the first layer whose matrices the GPU reads over the bus; all later layers are read too.
        bus: weight memory of these matrices; None if no layer is read over the bus.
        names: names of the stored tensors in main memory.
        host_bytes: bytes that these tensors take in main memory.
        bus_bytes: the part of these bytes that is read over the bus.
        message: what is in main memory and why, for the log.
    """

    experts: int
    host: Placement | None
    layers: int
    bus: HostWeights | None
    names: frozenset[str]
    host_bytes: int
    bus_bytes: int
    message: str

    def place(self, decoder: Decoder) -> None:
        """Apply the split to the layers of a model that is built, before its weights are loaded."""
        model: Any = decoder
        if self.host is not None:
            for number, mixture in mixtures_of(model.layers).items():
                if number < self.experts:
                    mixture.leave_to_host(self.host)
        if self.bus is not None:
            for linear in linears_in(model.layers[self.layers :]):
                linear.keep_in(self.bus)


class _Layers(NamedTuple):
    """Names of stored tensors by layer number: matrices of experts, and all other matrices."""

    experts: Mapping[int, set[str]]
    rest: Mapping[int, set[str]]

    def of(self, number: int, *, experts: bool = True) -> set[str]:
        """Return the names of a layer's matrices, with or without its experts."""
        return self.rest.get(number, set()) | (self.experts.get(number, set()) if experts else set())


def plan_split(
    config: EngineConfig, device: Device, placement: Placement, family: Family, model: ModelConfig, stored: Checkpoint
) -> Split | None:
    """Plan which weights are in main memory; return None if the whole model is in one place.

    Raises ConfigError if the settings cannot be applied to this model, or the CPU has no kernel for its experts.
    """
    if device.type == "cpu":
        for name in _SETTINGS:
            if given := getattr(config, name):
                logger.warning(
                    "%s=%g has no effect: the model runs on the CPU, so all weights are in main memory", name, given
                )
        return None
    found = _layers(family, model, stored)
    by_id = getattr(model, "hash_layers", ())  # the CPU's steps of experts have no token ids
    refuse_settings(
        ("cpu_experts", config.cpu_experts and not found.experts,
         f"cpu_experts={config.cpu_experts} is for models with experts, and this model is dense: leave it out, or set "
         "cpu_offload_gb"),
        ("cpu_experts", config.cpu_experts and by_id,
         "experts that are chosen by token id stay on the GPU: leave cpu_experts out, and set cpu_offload_gb"),
    )  # fmt: skip
    if by_id:
        config = dataclasses.replace(config, cpu_experts=0)
    experts, layers, why = _how_many(config, device, placement, model, stored, found)
    gone = {name for number, each in found.experts.items() if number < experts for name in each}
    read = {name for number in range(layers, model.num_layers) for name in found.of(number)} - gone
    if config.cpu_experts and not gone:
        first = min(found.experts)
        logger.warning("cpu_experts=%d has no effect: layer %d is the first with experts", config.cpu_experts, first)
    if not gone and not read:
        return None
    for name in _SETTINGS[1:] if read else ():
        if config.ranks > 1 and getattr(config, name) is not None:
            raise ConfigError(f"{name} is not implemented for several ranks: leave it out, or use one GPU", name)
    host, bus, size, over_bus, told = None, None, 0, 0, list[str]()
    if gone:
        host = on_cpu(config)
        obstacle, size = matrix_obstacle(_among(stored, gone)), memory_of(host, _among(stored, gone))
        if obstacle is not None:
            raise ConfigError(
                f"cpu_experts={config.cpu_experts or experts}: the CPU cannot compute these experts, because "
                f"{obstacle}: set cpu_experts=0, and cpu_offload_gb where the model does not fit",
                "cpu_experts",
            )
        which = "all layers" if experts > max(found.experts) else f"the first {experts} of {model.num_layers} layers"
        told.append(f"the experts of {which}, {size // MIB} MiB, are in main memory, and the CPU computes them")
    if read:
        from candle_vllm.core.kernels.offloading import HostWeights

        bus, over_bus = HostWeights(device), memory_of(placement, _among(stored, read))
        which = "all layers" if layers == 0 else f"the last {model.num_layers - layers} of {model.num_layers} layers"
        told.append(
            f"the weights of {which}, {over_bus // MIB} MiB, are in main memory, and the GPU reads them over the bus"
        )
    return Split(
        experts=experts if gone else 0,
        host=host,
        layers=layers,
        bus=bus,
        names=frozenset(gone | read),
        host_bytes=size + over_bus,
        bus_bytes=over_bus,
        message=f"{'; '.join(told)}: {why}",
    )


def _layers(family: Family, model: ModelConfig, stored: Checkpoint) -> _Layers:
    experts: dict[int, set[str]] = {}
    rest: dict[int, set[str]] = {}
    shapes = family.build(model, SHAPES, stored)
    for line, name in stored_lines(family.weights, model, stored):
        path, _, part = line.target.partition(":")
        if not path.startswith("layers."):
            continue
        number = int(path.split(".")[1])
        if path.endswith(".mlp.experts"):
            experts.setdefault(number, set()).add(name)
        elif part.endswith("weight") and isinstance(layer_at(shapes, path), Linear):
            rest.setdefault(number, set()).add(name)
    return _Layers(experts, rest)


def _among(stored: Checkpoint, names: Set[str]) -> Checkpoint:
    return stored.with_tensors({name: stored.tensors[name] for name in names})


def _how_many(
    config: EngineConfig, device: Device, placement: Placement, model: ModelConfig, stored: Checkpoint, found: _Layers
) -> tuple[int, int, str]:
    """Return the number of layers whose experts the CPU computes, the first layer that is read over the bus, and why.

    Without settings, one rank offloads only weights that do not fit: experts first, since a token needs few of them.
    """

    def size(names: Set[str]) -> int:
        return memory_of(placement, _among(stored, names))

    last = model.num_layers
    experts, layers, chosen = min(config.cpu_experts or 0, last), last, False
    if config.gpu_layers is not None:
        layers = min(config.gpu_layers, last)
    elif config.cpu_offload_gb:
        left = config.cpu_offload_gb * (1 << 30)
        while left > 0 and layers:
            layers -= 1
            left -= size(found.of(layers, experts=layers >= experts))
    free_experts, free_layers = config.cpu_experts is None, config.cpu_offload_gb is None and config.gpu_layers is None
    if not (free_experts or free_layers) or config.ranks > 1:
        return experts, layers, "as the settings say"
    free, total = gpu_memory(device)
    if config.gpu_memory_utilization is not None:
        free = max(0, free - int(total * (1 - config.gpu_memory_utilization)))
    element_bytes = device_element_bytes(config, ELEMENTS[placement.dtype].itemsize)
    tokens = model.max_position if config.max_model_len is not None else min(model.max_position, _TOKENS)
    cache = config.kv_cache_memory or cache_bytes(model.cache_specs, tokens, element_bytes)
    weights = memory_of(placement, stored)
    over = weights - (free - _STEPS - cache)
    over -= sum(size(found.experts[n]) for n in found.experts if n < experts)
    over -= sum(size(found.of(n, experts=n >= experts)) for n in range(layers, last))
    for n in sorted(found.experts) if free_experts else ():
        if over > 0 and n < layers:
            over -= size(found.experts[n])
            experts, chosen = n + 1, True
    while free_layers and over > 0 and layers:
        layers, chosen = layers - 1, True
        over -= size(found.of(layers, experts=layers >= experts))
    why = (
        f"the weights take {weights // MIB} MiB; of {free // MIB} MiB that are free on {device}, {_STEPS // MIB} MiB "
        f"are reserved for activations and {cache // MIB} MiB for a KV cache"
    )
    return experts, layers, why if chosen else "as the settings say"
