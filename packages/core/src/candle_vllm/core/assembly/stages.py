# SPDX-License-Identifier: MIT
"""Pipeline parallelism: divide a model's layers among stages.

A stage's model is the family's model without the layers of other stages; families need no code for it. The first
stage has the embedding and the head, which may be one table; the last has the final norm and returns its results to
the first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.collectives import Stages
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.loading.cache_specs import SharedKVSpec
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import stored_lines
from candle_vllm.core.models.family import Decoder, Family
from candle_vllm.core.models.stack import DecoderStack, Stage

_LAYER = re.compile(r"layers\.(\d+)\.")


class StagePart(NamedTuple):
    """A stage's part of a model.

    Attributes:
        layers: numbers of the stage's layers.
        tables: attribute names of the embedding tables and the head, which only the first stage has.
    """

    line: Stages
    layers: range
    tables: frozenset[str]

    def has(self, path: str) -> bool:
        """Whether the stage has the module at a path, such as "layers.3.mlp.down" or "embed"."""
        layer = _LAYER.match(path)
        if layer is not None:
            return int(layer[1]) in self.layers
        name = path.partition(".")[0]
        if name == "norm":
            return self.line.rank == self.line.size - 1
        return name not in self.tables or self.line.rank == 0

    def keep(self, decoder: Decoder, placement: Placement) -> None:
        """Remove the modules of other stages from a model before its weights are allocated, and set its `Stage`."""
        assert isinstance(decoder, DecoderStack)
        stack: Any = decoder
        stack.layers = [layer if number in self.layers else None for number, layer in enumerate(decoder.layers)]
        for name in (*self.tables, "norm"):
            if not self.has(name):
                setattr(stack, name, None)

        empty, deep = partial(placement.empty, dtype=placement.dtype), 1 + max(decoder.deep or (-1,))
        stack.stage = Stage(self.line, self.layers, decoder.config.hidden_size, empty, deep)


def stage_of(name: str, family: Family, config: ModelConfig, checkpoint: Checkpoint, line: Stages) -> StagePart:
    """Return a stage's part of a whole model, such that the bytes of the largest stage are minimal.

    Raises ConfigError if the model has fewer layers than stages, or its layers cannot be divided.
    """
    obstacle = None
    if line.size > config.num_layers:
        few = f"{name} has only {config.num_layers} layers for {line.size} stages"
        obstacle = f"{few}: set pipeline_parallel_size to {config.num_layers} or less"
    elif config.stream_count:
        obstacle = f"the layers of {name} have several residual streams: leave pipeline_parallel_size out"
    elif config.shared_choices or any(
        isinstance(spec, SharedKVSpec) and spec.layer != layer % config.num_layers  # not a missing second cache
        for layer, spec in enumerate(config.cache_specs)
    ):
        shared = f"some layers of {name} have no attention, or read keys, values or chosen positions of other layers"
        obstacle = f"{shared}, which is not supported between stages: leave pipeline_parallel_size out"
    elif getattr(config, "input_size", 0):
        own = f"the layers of {name} have their own embedding tables"
        obstacle = f"{own}, which only the first stage has: leave pipeline_parallel_size out"
    if obstacle is not None:
        raise ConfigError(obstacle, "pipeline_parallel_size")
    tensors, paths = checkpoint.tensors, dict[str, set[str]]()
    for each, stored in stored_lines(family.weights, config, checkpoint):
        paths.setdefault(stored, set()).add(each.target.partition(":")[0])
    layers, ends = [0] * config.num_layers, 0
    for stored, where in paths.items():
        numbers = {int(found[1]) for path in where if (found := _LAYER.match(path)) is not None}
        for number in numbers:
            layers[number] += tensors[stored].nbytes // len(numbers)
        ends += 0 if numbers else tensors[stored].nbytes
    shapes = vars(family.build(config, SHAPES, checkpoint))
    tables = {name for name, each in shapes.items() if isinstance(each, Embedding)}
    return StagePart(line, divide(layers, ends, line.size)[line.rank], frozenset({*tables, "head"}))


def divide(layers: Sequence[int], first: int, stages: int) -> list[range]:
    """Return the layers of each of `stages` stages, at least one; by the bytes of `layers`.

    `first` are additional bytes of the first stage.
    """
    sums = [0]
    for size in layers:
        sums.append(sums[-1] + size)
    # By number of layers in the stages so far: bytes of the largest stage, sum of squared bytes, the stages' ends.
    best = {end: (first + sums[end], (first + sums[end]) ** 2, (end,)) for end in range(1, len(sums))}
    for stage in range(1, stages):
        best = {
            end: min(
                (max(most, size), squares + size**2, (*ends, end))
                for start, (most, squares, ends) in best.items()
                if start < end
                for size in [sums[end] - sums[start]]
            )
            for end in range(stage + 1, len(sums))
        }
    ends = best[len(layers)][2]
    return [range(start, end) for start, end in zip((0, *ends), ends)]
