# SPDX-License-Identifier: MIT
"""Layers that add embeddings of hashed n-grams to residual streams (per-layer embeddings of Qwen4).

A token's embedding gives one value and a key for each stream. The stream gates the value by its key, and a dilated
depthwise convolution adds the gated values of earlier tokens. The table, 98 GiB in Qwen3.8-Flash-Next, stays in its
file. The ids of the preceding tokens are a state of the sequence, like the convolution's inputs.
Source: transformers' `Qwen4ExpTextPLELayer`.
Shapes: T tokens, S streams, E hidden, P elements of a token's embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.ngram import NGramHash, gate_streams, record_look_up
from candle_vllm.core.kernels.recorded import Recorded, RecordedTokens, Value
from candle_vllm.core.kernels.rms_norm import rms_norm
from candle_vllm.core.kernels.short_conv import short_conv, state_shape
from candle_vllm.core.kernels.side_by_side import side_by_side
from candle_vllm.core.kernels.stream_mix import mix_streams
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter, on_host
from candle_vllm.core.loading.cache_specs import StatePart, StateSpec
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.quantization.tensors import StoredTensor


@dataclasses.dataclass(frozen=True)
class NGrams:
    """Sizes of these layers.

    Attributes:
        size: P.
        longest: tokens of the longest n-gram, which is also the dilation of the convolution.
        heads: heads of each length.
        taps: kernel size of the convolution.
        hashes: for each of these layers, by its index in the model, how n-grams become rows of its table.
        rows: rows of each table.
    """

    size: int
    longest: int
    heads: int
    taps: int
    hashes: Mapping[int, NGramHash]
    rows: Mapping[int, int]

    @property
    def span(self) -> int:
        """Kernel size of the convolution with zeros between its taps."""
        return (self.taps - 1) * self.longest + 1

    def state(self, channels: int) -> StateSpec:
        """The state that a layer stores for a sequence: inputs of the convolution, and ids."""
        before = self.longest - 1
        ids = StatePart(state_shape(before, self.longest), before)
        return StateSpec((StatePart(state_shape(channels, self.span), channels, exact=False), ids))


class StreamNorms:
    """An RMS norm of each of S streams with its own weight: x [T, S * E] -> [T, S * E], divided by `divisor`."""

    def __init__(self, streams: int, size: int, eps: float, placement: Placement, divisor: int = 1) -> None:
        self._flat, self._shape, self.eps, self._divisor = (
            placement.empty(streams * size),
            (streams, size),
            eps,
            divisor,
        )

    def __call__(self, x: Value) -> Value:
        x = side_by_side(x) if isinstance(x, Recorded) else x  # recorded norms overwrite heads
        return rms_norm(x.unflatten(-1, (-1, self._shape[1])), self._flat.reshape(self._shape), self.eps).flatten(1)

    def finish(self) -> None:
        """See `Finishes`."""
        self._flat /= self._divisor

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        return {"weight": TensorParameter(self._flat)}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts(StoredTensor):
    """Tensors whose rows form one matrix."""

    parts: tuple[StoredTensor, ...]

    @property
    def path(self) -> Any:
        return self.parts[0].path

    def raw(self) -> NDArray[Any]:
        return np.concatenate([part.raw() for part in self.parts])

    def release(self) -> None:
        """See `StoredTensor.release`."""
        for part in self.parts:
            part.release()


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """Join the stored parts `shard_0`, `shard_1`, ... of each table of n-grams."""
    found, first = dict(checkpoint.tensors), ".ngram_embedding.shard_0.weight"
    for name in [name for name in found if name.endswith(first)]:
        whole = name.replace(".shard_0.", ".")
        parts = tuple(_shards(found, whole.removesuffix("weight")))
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        if len({(part.shape[1:], part.type_name) for part in parts}) > 1 or len(shape) != 2 or whole in found:
            raise InvalidFileError(f"{checkpoint.path}: the parts of {whole} do not form a matrix")
        found[whole] = Parts(whole, shape, parts[0].type_name, sum(part.nbytes for part in parts), parts)
    return checkpoint.with_tensors(found)


def _shards(found: dict[str, StoredTensor], start: str) -> Iterator[StoredTensor]:
    number = 0
    while (name := f"{start}shard_{number}.weight") in found and found[name].shape:
        yield found.pop(name)
        number += 1


class NGramTable:
    """Rows of a table of n-grams for tokens; the table stays in its file, and is its own parameter "weight".

    A type other than float32 and bfloat16 is decoded to float32 in memory.
    """

    sections = 1

    def __init__(self, ngrams: NGrams, layer: int) -> None:
        self.hashes, self._parts = ngrams.hashes[layer], list[NDArray[Any]]()
        self.shape = ngrams.rows[layer], ngrams.size // len(self.hashes.sizes)

    def __call__(self, token_ids: Value, before: Value) -> Value:
        """Return [T, P] for ids [T] and `before` [T, longest - 1], see `kernels/ngram`."""
        if isinstance(token_ids, RecordedTokens):
            return record_look_up(token_ids, before, self._parts, self.hashes, self.shape[1])
        import torch

        rows = self.hashes.rows(token_ids.cpu().numpy().astype(np.int64), before.cpu().numpy())
        return torch.from_numpy(self._rows(rows)).to(before.device)

    def _rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        starts = np.cumsum([0, *map(len, self._parts)])
        part_of, found = np.searchsorted(starts, rows, "right") - 1, np.empty((*rows.shape, self.shape[1]), np.float32)
        for number in np.unique(part_of):
            chosen = part_of == number
            values = self._parts[number][rows[chosen] - starts[number]]
            bits = values.dtype == np.uint16
            found[chosen] = (values.astype(np.uint32) << 16).view(np.float32) if bits else values
        return found.reshape(len(rows), -1)

    def fill(self, stored: StoredTensor) -> str | None:
        """Keep the tensor's parts of the file mapped."""
        kinds = {"F32": np.float32, "BF16": np.uint16}
        parts = stored.parts if isinstance(stored, Parts) else (stored,)
        self._parts = [
            part.raw().view(kinds[part.type_name]) if part.type_name in kinds else part.load("F32") for part in parts
        ]
        return None

    def parameters(self) -> Mapping[str, Parameter]:
        """The table."""
        return {"weight": self}


class TokenNumbers:
    """The ids of a step's tokens plus 1, in `count` equal columns: the inputs of the states of ids."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, token_ids: Value) -> Value:
        """Return fp32 [T, count] for ids [T]; in recorded steps before any other value is recorded."""
        if isinstance(token_ids, RecordedTokens):
            return token_ids.looked_up(self._rows, self._count)
        return (token_ids + 1).float()[:, None].expand(-1, self._count).contiguous()

    def _rows(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.broadcast_to((token_ids + 1).astype(np.float32)[:, None], (len(token_ids), self._count))


class NGramLayer:
    """Adds to streams x [T, S * E] by the n-grams that end at each token.

    Parameters: "taps" [S * E, taps] of the convolution, "factors", "sizes" and "offsets" as `HashNumbers`.
    """

    def __init__(self, config: Any, layer: int, placement: Placement) -> None:
        ngrams, streams, size, eps = config.ngrams, config.streams, config.hidden_size, config.norm_eps
        channels, before, self._ngrams = streams * size, ngrams.longest - 1, ngrams
        self.cache, self.table = config.num_layers + layer, NGramTable(ngrams, layer)
        self.key, self.value = Linear(ngrams.size, channels, placement), Linear(ngrams.size, size, placement)
        self.key_norm, self.query_norm, self.conv_norm = (StreamNorms(streams, size, eps, placement) for _ in range(3))
        self._taps, self._constant = placement.empty(channels, ngrams.taps), placement.constant
        ids = np.eye(ngrams.longest, dtype=np.float32)[before - 1 :: -1]  # row s takes the id s + 1 tokens before
        self._shift = placement.constant(np.ascontiguousarray(ids))
        each = np.tile(np.eye(streams, dtype=np.float32), 3)
        self._sum = placement.constant(each[None])

    def __call__(self, x: Value, step: StepInput) -> Value:
        conv, ids = step.caches[self.cache]
        token_ids, numbers = step.shared["ids"]
        before = short_conv(numbers, self._shift, None, ids, step.states)
        found = self.table(token_ids, before)
        value = self.value(found)
        made = gate_streams(self.key_norm(self.key(found)), self.query_norm(x), value)
        mixed = short_conv(self.conv_norm(made), self._spread, None, conv, step.states, silu=True)
        return mix_streams(side_by_side(x, made, mixed), self._sum, level=False)

    def finish(self) -> None:
        """See `Finishes`; put zeros between the taps."""
        spread = np.zeros((len(self._taps), self._ngrams.span), np.float32)
        spread[:, :: self._ngrams.longest] = on_host(self._taps)
        self._spread = self._constant(spread)

    def parameters(self) -> Mapping[str, Parameter]:
        """Every parameter that must be loaded."""
        hashes = self.table.hashes
        numbers = {"factors": hashes.factors, "sizes": hashes.sizes, "offsets": hashes.offsets}
        return {"taps": TensorParameter(self._taps)} | {name: HashNumbers(each) for name, each in numbers.items()}


class HashNumbers:
    """Parameter of numbers that a config determines: stored ones must be the same."""

    sections = 1

    def __init__(self, numbers: NDArray[np.int64]) -> None:
        self._numbers, self.shape = numbers, numbers.shape

    def fill(self, stored: StoredTensor) -> str | None:
        """Compare the numbers."""
        if stored.dtype != "I64" or not np.array_equal(stored.load(None), self._numbers):
            raise InvalidFileError(f"{stored.path}: {stored.name} does not have the numbers of the config's n-grams")
        return None
