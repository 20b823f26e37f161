# SPDX-License-Identifier: MIT
"""What of a model is not on its GPU: experts that the CPU computes, as many as somebody set, or as do not fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Any

from candle_vllm.core.assembly.placement import DTYPES, matrix_obstacle, memory_of
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import CPU, Device, gpu_memory
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.numa import plan_ranks
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, new_memory
from candle_vllm.core.kernels.plain_linear import plain_kind
from candle_vllm.core.layers.moe import mixtures_of
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import expand
from candle_vllm.core.memory import MIB, cache_bytes, device_number_bytes
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.threads import default_threads

if TYPE_CHECKING:
    from candle_vllm.core.models.family import Decoder, Family

logger = logging.getLogger(__name__)

_STEPS = 1 << 30
_SHARE_FOR_STEPS = 16
"""What is kept for steps where it is not known yet what they take: 1 GiB, or a sixteenth of a larger GPU."""
_TOKENS = 16384
"""Of one sequence, for which a KV cache is kept at least."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Which experts of a model on a GPU the CPU computes.

    Attributes:
        layers: those of the first so many layers.
        host: where their matrices go.
        names: of the stored tensors that these are.
        host_bytes: of main memory that they take.
        message: the arithmetic, for the log.
    """

    layers: int
    host: Placement
    names: frozenset[str]
    host_bytes: int
    message: str

    @property
    def memory(self) -> WeightMemory:
        """Where the experts' matrices are."""
        assert self.host.weight_memory is not None
        return self.host.weight_memory

    def place(self, decoder: Decoder) -> None:
        """Gives the layers of a model that was built, and not filled, experts that lie there."""
        model: Any = decoder
        for number, mixture in mixtures_of(model.layers).items():
            if number < self.layers:
                mixture.leave_to_host(self.host)


def plan_split(
    config: EngineConfig, device: Device, placement: Placement, family: Family, model: ModelConfig, stored: Checkpoint
) -> Split | None:
    """What goes to main memory; None where everything is in one place.

    Raises:
        ConfigError: it was set, and cannot be had with this model.
    """
    wanted = config.cpu_experts
    if device.type == "cpu":
        if wanted:
            logger.warning("cpu_experts=%d sets nothing: on the CPU all experts are there", wanted)
        return None
    of_layers = _experts(family, model, stored)
    if wanted and not of_layers:
        raise ConfigError(
            f"cpu_experts={wanted} is for models with experts, and this one has none: leave it out", "cpu_experts"
        )
    if wanted == 0 or not of_layers or (wanted is None and config.ranks > 1):
        return None
    host = Placement(
        CPU,
        "F32",
        new_memory(lambda: plan_ranks(config.cpu_ranks, config.threads or default_threads())),
        plain_kind(config.dtype.upper()) if config.dtype in DTYPES else None,
    )
    last = max(of_layers) + 1
    if wanted is None:
        layers, why = _what_does_not_fit(config, device, placement, model, stored, of_layers)
    else:
        layers, why = min(wanted, last), "as it was set"
    if not layers:
        return None
    experts = _among(stored, {name for number, each in of_layers.items() if number < layers for name in each})
    obstacle = matrix_obstacle(experts)
    if obstacle is not None:
        raise ConfigError(
            f"cpu_experts={wanted or layers}: the CPU cannot compute these experts, for {obstacle}: set cpu_experts=0, "
            "and take a GPU that holds the model, or a model with fewer bits",
            "cpu_experts",
        )
    size = memory_of(host, experts)
    which = "all layers" if layers == last else f"the first {layers} of {model.num_layers} layers"
    message = f"the experts of {which}, {size // MIB} MiB, are in main memory, and the CPU computes them: {why}"
    return Split(layers, host, frozenset(experts.tensors), size, message)


def _experts(family: Family, model: ModelConfig, stored: Checkpoint) -> dict[int, set[str]]:
    """The names of the stored tensors of each layer's experts."""
    found: dict[int, set[str]] = {}
    for line in expand(family.weights, model, stored.format):
        path, _, part = line.target.partition(":")
        if part and path.startswith("layers.") and path.endswith(".mlp.experts") and line.names:
            name = line.find(stored.tensors)
            if name is not None:
                found.setdefault(int(path.split(".")[1]), set()).add(name)
    return found


def _among(stored: Checkpoint, names: Set[str]) -> Checkpoint:
    """Some of the tensors."""
    return stored.with_tensors({name: tensor for name, tensor in stored.tensors.items() if name in names})


def _what_does_not_fit(
    config: EngineConfig,
    device: Device,
    placement: Placement,
    model: ModelConfig,
    stored: Checkpoint,
    of_layers: Mapping[int, set[str]],
) -> tuple[int, str]:
    """The least layers whose experts must go, so that the rest fits; all of them where that is not enough. And why."""
    free, total = gpu_memory(device)
    if config.gpu_memory_utilization is not None:
        free = max(0, free - int(total * (1 - config.gpu_memory_utilization)))
    steps = max(_STEPS, total // _SHARE_FOR_STEPS)
    tokens = min(model.max_position, _TOKENS)
    number = device_number_bytes(config, model, ELEMENTS[placement.dtype].itemsize)
    cache = config.kv_cache_memory or cache_bytes(model, tokens, number)
    weights = memory_of(placement, stored)
    room = free - steps - cache
    why = (
        f"the weights take {weights // MIB} MiB, and of {free // MIB} MiB that are free on {device}, {steps // MIB} "
        f"are kept for steps and {cache // MIB} for a KV cache"
    )
    layers = 0
    for number in sorted(of_layers):
        if weights <= room:
            break
        weights -= memory_of(placement, _among(stored, of_layers[number]))
        layers = number + 1
    return layers, why
