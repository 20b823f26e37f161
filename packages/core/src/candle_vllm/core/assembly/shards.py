# SPDX-License-Identifier: MIT
"""Tensor parallelism: a rank's part of a model, and the sums over ranks.

A rank's model is the family's model with fewer heads, narrower feed-forward layers and a smaller vocabulary; few
families have code for it. A rank's part of each tensor follows from the shapes of all ranks' models. If a rank has only
some inputs of a matrix, the outputs are summed over the ranks: once after attention, once after the feed-forward layer.
With expert parallelism each rank has some whole experts. Either all ranks have all tokens, and the experts' outputs are
summed; or each rank has a share of the tokens and sends them to their experts (`kernels/collectives/token_shares.py`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.stages import StagePart, stage_of
from candle_vllm.core.config import All2AllBackend
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.collectives import Collective, VocabularyShare, is_first
from candle_vllm.core.kernels.lora import Delta, FittedAdapter
from candle_vllm.core.layers.embedding import Embedding
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.moe import ExpertMLPs, SparseMLP, mixtures_of
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import layer_at, parameters_of, stored_lines
from candle_vllm.core.models.family import Decoder, Family
from candle_vllm.core.quantization.tensors import StoredTensor

logger = logging.getLogger(__name__)

MOST_RANKS = 64


class _Shape(NamedTuple):
    """Shape of a parameter, and the number of matrices stacked in its rows."""

    sizes: tuple[int, ...]
    sections: int


class _Cut(NamedTuple):
    """A rank's part of a parameter: indices `first` to `last - 1` of one dimension, in each section."""

    dimension: int
    first: int
    last: int
    sections: int

    def ids(self, total: int) -> NDArray[np.int64]:
        """Return the part's indices in a whole dimension of `total` elements."""
        sections = np.arange(self.sections)[:, None] * (total // self.sections)
        return (sections + np.arange(self.first, self.last)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Shard:
    """A rank's part of a model.

    Attributes:
        config: config of the rank's own model.
        cuts: the rank's parts of divided parameters, by target.
        full: config of the whole model.
        stage: the rank's pipeline stage; None for all layers.
        absent: targets of parameters that only other ranks have, such as experts.
        exchanges: how tokens are sent to experts; see `all2all_backend`.
        tensors: names of the stored tensors that the rank loads.
    """

    config: ModelConfig
    cuts: Mapping[str, _Cut]
    collective: Collective
    full: ModelConfig
    stage: StagePart | None
    absent: frozenset[str]
    exchanges: All2AllBackend
    tensors: frozenset[str]

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank, the only one with the vision tower and the draft model."""
        return is_first(self.collective)

    @property
    def layers(self) -> range:
        """Numbers of the rank's layers."""
        return range(self.full.num_layers) if self.stage is None else self.stage.layers

    def stored(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint with only the tensors that this rank loads."""
        if self.stage is None and not self.absent:
            return checkpoint
        return checkpoint.with_tensors({name: checkpoint.tensors[name] for name in self.tensors})

    def cut(self, target: str, stored: StoredTensor) -> StoredTensor:
        """Return this rank's part of a tensor; raise WeightsError if it is not a part of whole quantisation blocks."""
        cut = self.cuts.get(target)
        if cut is None:
            return stored
        if cut.dimension == 0:
            return stored.rows(cut.first, cut.last) if cut.sections == 1 else stored.select(cut.ids(stored.shape[0]))
        return stored.columns(cut.first, cut.last)

    def cut_adapter(self, adapter: FittedAdapter) -> FittedAdapter:
        """Return this rank's part of an adapter: outputs cut B and bias; inputs cut A, with the first rank's bias."""
        found: dict[str, dict[str, Delta]] = {}
        for path, deltas in adapter.deltas.items():
            if self.stage is not None and not self.stage.has(path):
                continue
            for name, delta in deltas.items():
                target = f"{path}:{name}weight"
                if target in self.absent:
                    continue
                cut = self.cuts.get(target) or self.cuts.get(target.replace("head:", "embed:"))
                mine = delta if cut is None else _cut_delta(delta, cut, self.collective.rank)
                if mine is not None:
                    found.setdefault(path, {})[name] = mine
        return dataclasses.replace(adapter, deltas=found)

    def join(self, decoder: Decoder) -> None:
        """Connect layers to the collective (sums, vocabulary, tokens), and set the config's `vocab_size` to the whole.

        The weights must be loaded.
        """
        whole: Any = decoder
        whole.config = dataclasses.replace(self.config, vocab_size=self.full.vocab_size)
        if self.absent:
            for mixture in mixtures_of(whole.layers).values():
                mixture.collective = self.collective
        for target, cut in self.cuts.items():
            path, _ = target.split(":")
            layer = layer_at(decoder, path)
            if layer is None:  # the layer belongs to another stage
                continue
            if cut.dimension == 1:
                self._sum_outputs(decoder, path, layer)
            elif isinstance(layer, Embedding) and layer.share is None:
                most = -(-self.full.vocab_size // self.collective.size)
                layer.share = VocabularyShare(self.collective, cut.first, most, self.full.vocab_size)
        if self.absent and self.exchanges != "allgather_reducescatter":
            self._divide_tokens(whole)

    def _divide_tokens(self, decoder: Any) -> None:
        """Make layers with experts divide tokens among ranks if `exchanges` is all_to_all, or auto and less is sent."""
        from candle_vllm.core.kernels.collectives.token_shares import TokenShares, least_step, rows_sent

        size, mixture = self.collective.size, getattr(self.full, "mixture")  # noqa: B009 - models with experts have it
        held = [_share(mixture.experts, 1, rank, size) for rank in range(size)]
        least = 0.0 if self.exchanges == "all_to_all" else least_step(held, mixture.top_k)
        if least == math.inf or (least and mixture.shared_size):
            return
        if not self.collective.rank:
            sums, exchanges = rows_sent(held, mixture.top_k)
            tokens = max(size, math.ceil(least / self.full.hidden_size / 2))
            share = 100 * exchanges / sums
            logger.info(
                "steps of about %d tokens or more are divided among %d ranks (all-to-all), which sends %.0f %% of the "
                "bytes of all-reduces in layers with experts",
                *(tokens, size, share),
            )
        decoder.shares = shares = TokenShares(self.collective, held, least)
        for number, sparse in mixtures_of(decoder.layers).items():
            block = decoder.layers[number]
            mix = block.attention or block.conv
            sparse.shares = block.mlp_norm.shares = mix.output.collective = shares

    def _sum_outputs(self, decoder: Decoder, path: str, layer: Any) -> None:
        linear = layer.down if isinstance(layer, ExpertMLPs) else layer
        assert isinstance(linear, Linear), path
        if linear.bias is not None and self.collective.rank:
            linear.bias[...] = 0  # only the first rank adds it
        names = path.split(".")
        above = (layer_at(decoder, ".".join(names[:end])) for end in range(len(names), 0, -1))
        owner: Any = next((each for each in above if isinstance(each, SparseMLP)), linear)
        owner.collective = self.collective


def shard_of(
    name: str,
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    collective: Collective,
    *,
    apart: bool = False,
    exchanges: All2AllBackend = "allgather_reducescatter",
) -> Shard:
    """Return a rank's part of a model.

    Args:
        name, family, config, checkpoint: they describe the whole model.
        apart: whether each rank has whole experts (expert parallelism), instead of a part of every expert.
        exchanges: how tokens are sent to whole experts; with "all_to_all", each rank has the whole shared expert.

    Raises:
        ConfigError: the model cannot be divided in this way; for a wrong number of ranks the message has possible ones.
    """
    size = collective.size
    if apart and getattr(config, "mixture", None) is None:
        raise ConfigError(f"{name} has no experts: leave enable_expert_parallel out", "enable_expert_parallel")
    if getattr(config, "delta_layers", None) or getattr(config, "mamba_layers", None):  # these layers are not divided
        if exchanges == "all_to_all":
            raise ConfigError(
                f"all2all_backend='all_to_all' divides tokens among ranks, but the layers of {name} with a recurrent "
                "state need all tokens on each rank: leave all2all_backend out",
                "all2all_backend",
            )
        exchanges = "allgather_reducescatter"
    units = _Units.of(family, config, checkpoint)._replace(apart=apart, exchanged=exchanges == "all_to_all")
    obstacle = units.obstacle(config, size)
    if obstacle is not None:
        able = [str(n) for n in range(1, MOST_RANKS + 1) if units.obstacle(config, n) is None]
        raise ConfigError(
            f"{name} cannot be divided among {size} ranks: {obstacle}. Set tensor_parallel_size to one of "
            f"{', '.join(able)}",
            "tensor_parallel_size",
        )
    configs = [units.narrowed(config, rank, size) for rank in range(size)]
    whole = _shapes(family, config, checkpoint)
    parts = [_shapes(family, each, checkpoint) for each in configs]
    mine, common = parts[collective.rank], [target for target in whole if all(target in part for part in parts)]
    absent = frozenset(target for target in whole if target not in mine)  # for example experts
    cuts = dict[str, _Cut]()
    for target in common:
        if (cut := _cut(target, whole[target], [part[target] for part in parts], collective.rank)) is not None:
            cuts[target] = cut
    stage = None if collective.stages is None else stage_of(name, family, config, checkpoint, collective.stages)
    stored = {
        stored
        for line, stored in stored_lines(family.weights, config, checkpoint)
        if line.target in mine and (stage is None or stage.has(line.target.partition(":")[0]))
    }
    how: All2AllBackend = exchanges if apart else "allgather_reducescatter"
    return Shard(configs[collective.rank], cuts, collective, config, stage, absent, how, frozenset(stored))


def _shapes(family: Family, config: ModelConfig, checkpoint: Checkpoint) -> dict[str, _Shape]:
    found = parameters_of(family.build(config, SHAPES, checkpoint), family.weights, config, checkpoint.format)
    return {target: _Shape(tuple(each.shape), each.sections) for target, each in found.items()}


def _cut(target: str, whole: _Shape, parts: Sequence[_Shape], rank: int) -> _Cut | None:
    """Return a rank's part of a parameter; None for the whole parameter."""
    differ = [n for n, total in enumerate(whole.sizes) if any(part.sizes[n] != total for part in parts)]
    if not differ:
        return None
    (dimension,) = differ
    assert dimension < 2, target
    sections = whole.sections if dimension == 0 else 1
    total, sizes = whole.sizes[dimension] // sections, [part.sizes[dimension] // sections for part in parts]
    if sum(sizes) == total:
        first = sum(sizes[:rank])
    else:  # fewer KV heads than ranks: adjacent ranks share a head
        each = sizes[0]
        assert set(sizes) == {each}, target
        first = rank * (total // each) // len(sizes) * each
    return _Cut(dimension, first, first + sizes[rank], sections)


class _Units(NamedTuple):
    """Units in which a model's dimensions can be divided.

    Attributes:
        heads: unit of query heads.
        inner, experts, shared: units of the inner size of dense feed-forward layers, experts, and the shared expert.
        channels: unit of convolution channels.
        apart: see `shard_of`.
        exchanged: whether each rank has the whole shared expert, which it runs for its own tokens.
    """

    heads: int = 1
    inner: int = 1
    experts: int = 1
    shared: int = 1
    channels: int = 1
    apart: bool = False
    exchanged: bool = False

    @classmethod
    def of(cls, family: Family, config: ModelConfig, checkpoint: Checkpoint) -> _Units:
        """Return the units in which the stored tensors can be divided."""
        stored = {line.target: (line, name) for line, name in stored_lines(family.weights, config, checkpoint)}
        whole = _shapes(family, config, checkpoint)

        def unit(count: int, narrow: Callable[[], ModelConfig]) -> int:
            """Return the unit of a dimension of size `count`, by the matrices whose columns `narrow()` reduces."""
            if count < 2:
                return 1
            least = 1
            for target, shape in _shapes(family, narrow(), checkpoint).items():
                if len(shape.sizes) == 2 and shape.sizes[1] != whole[target].sizes[1] and target in stored:
                    line, name = stored[target]
                    columns = whole[target].sizes[1]
                    step = line.look(checkpoint.tensors[name], name, config).column_step
                    each = columns // count
                    least = math.lcm(least, step // math.gcd(step, each))
            return min(least, count)

        def fewer(**sizes: int) -> ModelConfig:
            return dataclasses.replace(config, mixture=dataclasses.replace(mixture, **sizes))  # type: ignore[call-arg]

        mixture: Any = getattr(config, "mixture", None)
        found = cls(
            unit(config.num_heads, lambda: dataclasses.replace(config, num_heads=1, num_kv_heads=1)),
            unit(config.intermediate_size, lambda: dataclasses.replace(config, intermediate_size=1)),
        )
        if channels := getattr(config, "channels", 0):
            one: Any = {"channels": 1}
            found = found._replace(channels=unit(channels, lambda: dataclasses.replace(config, **one)))
        if mixture is None:
            return found
        return found._replace(
            experts=unit(mixture.inner_size, lambda: fewer(inner_size=1)),
            shared=unit(mixture.shared_size, lambda: fewer(shared_size=1)),
        )

    def _heads(self, config: ModelConfig, size: int) -> int:
        if config.latent is not None or size > config.num_kv_heads:
            return self.heads
        return math.lcm(self.heads, config.num_heads // config.num_kv_heads)

    def _divided(self, config: ModelConfig, size: int) -> dict[str, tuple[str, int, int]]:
        """Return, for each field of the config and its mixture that is divided, what it counts, its total and unit."""
        found = {
            "num_heads": ("heads", config.num_heads, self._heads(config, size)),
            "intermediate_size": ("inner elements of feed-forward layers", config.intermediate_size, self.inner),
            "vocab_size": ("tokens of the vocabulary", config.vocab_size, -(-config.vocab_size // size)),
        }
        if channels := getattr(config, "channels", 0):
            found["channels"] = "channels of convolutions", channels, self.channels
        mixture: Any = getattr(config, "mixture", None)
        if mixture is not None and self.apart:
            found["held"] = "experts", mixture.experts, 1
        elif mixture is not None:
            found["inner_size"] = "inner elements of experts", mixture.inner_size, self.experts
        if mixture is not None and mixture.shared_size and not self.exchanged:
            found["shared_size"] = "inner elements of the shared expert", mixture.shared_size, self.shared
        return found

    def obstacle(self, config: ModelConfig, size: int) -> str | None:
        """Return why the model cannot be divided among `size` ranks; None if it can."""
        heads, kv = config.num_heads, config.num_kv_heads
        if size > 1 and config.compresses:
            return "all heads attend to the same compressed entries, or to the same blocks"
        if size > 1 and getattr(config, "whole_norms", False):
            return "one of its norms or thresholds needs all heads, or the whole feed-forward layer"
        if config.latent is None and size > kv and (size % kv or heads % size or heads // size % self.heads):
            return f"{kv} key-value heads and {heads} heads cannot be divided evenly"
        for what, total, unit in self._divided(config, size).values():
            if -(-total // unit) < size:
                return f"its {total} {what} can only be divided in units of {unit}, which are too few"
        return None

    def narrowed(self, config: ModelConfig, rank: int, size: int) -> ModelConfig:
        """Return the config of a rank's model."""
        sizes, before = dict[str, Any](), dict[str, int]()
        for name, (_, total, unit) in self._divided(config, size).items():
            *others, sizes[name] = (_share(total, unit, each, size) for each in range(rank + 1))
            before[name] = sum(others)
        heads, kv, first = sizes["num_heads"], config.num_kv_heads, before["num_heads"]
        sizes["num_kv_heads"] = heads if config.latent is not None else max(1, heads * kv // config.num_heads)
        if hasattr(config, "first_heads"):
            sizes["first_heads"] = first, first * kv // config.num_heads
        mixture: Any = getattr(config, "mixture", None)
        if mixture is not None:
            part = {name: sizes.pop(name) for name in ("held", "inner_size", "shared_size") if name in sizes}
            part |= {"first": before["held"]} if self.apart else {}
            sizes["mixture"] = dataclasses.replace(mixture, **part)
        return dataclasses.replace(config, **sizes)


def _cut_delta(delta: Delta, cut: _Cut, rank: int) -> Delta | None:
    """Return a rank's part of a delta; None if the part is empty."""
    if cut.dimension == 1:
        a = None if delta.a is None else delta.a.columns(cut.first, cut.last)
        bias = None if rank else delta.bias
        assert delta.full is None
        assert delta.rows is None
        return None if a is None and bias is None else dataclasses.replace(delta, a=a, bias=bias)

    def some(values: Any) -> Any:
        return None if values is None else values[cut.ids(len(values))]

    def chosen(stored: StoredTensor | None) -> StoredTensor | None:
        return None if stored is None else stored.select(cut.ids(stored.shape[0]))

    rows = delta.rows
    if rows is not None:  # changed rows of a table, by token id
        mine = (rows[0] >= cut.first) & (rows[0] < cut.last)
        rows = (rows[0][mine] - cut.first, rows[1][mine]) if mine.any() else None
    found = dataclasses.replace(
        delta,
        b=chosen(delta.b),
        bias=some(delta.bias),
        column_scale=some(delta.column_scale),
        full=chosen(delta.full),
        rows=rows,
    )
    nothing = found.a is None and found.bias is None and found.full is None and rows is None
    return None if nothing else found


def _share(total: int, unit: int, rank: int, size: int) -> int:
    """Return a rank's share of `total` in units of `unit`; the first ranks may have one unit more than the others."""
    blocks = -(-total // unit)
    each, more = divmod(blocks, size)
    first = rank * each + min(rank, more)
    last = first + each + (rank < more)
    return min(total, last * unit) - min(total, first * unit)
