# SPDX-License-Identifier: MIT
"""Tables of embeddings of hashed n-grams (Qwen4), which stay in their files: 98 GiB in Qwen3.8-Flash-Next."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.cpu_runtime.operation import address_of, operation
from candle_vllm.core.kernels.ngram import LookUpArguments
from candle_vllm.core.kernels.recorded import RecordedTokens, Value
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import Constant
from candle_vllm.core.loading.weights import Parameter
from candle_vllm.core.models.ngram_hash import NGrams
from candle_vllm.core.quantization.tensors import StoredTensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Parts(StoredTensor):
    """Tensors whose rows form one table of n-grams.

    Attributes:
        parts: the tensors.
    """

    parts: tuple[StoredTensor, ...]

    @property
    def path(self) -> Any:
        return self.parts[0].path

    @property
    def stays_in_file(self) -> bool:
        return True

    def in_parts(self) -> tuple[StoredTensor, ...]:
        return self.parts

    def raw(self) -> NDArray[Any]:
        return np.concatenate([part.raw() for part in self.parts])

    def release(self) -> None:
        """See `StoredTensor.release`."""
        for part in self.parts:
            part.release()


GGUF_TABLE = "per_layer_token_embd.weight"
_WHOLE = re.compile(r"(.*\.ngram_embedding\.)(?:shard_0\.)?weight|per_layer_token_embd\.weight")


def joined(checkpoint: Checkpoint) -> Checkpoint:
    """Join the stored parts `shard_0`, `shard_1`, ... of each table of n-grams, or wrap its only part, as `Parts`."""
    found = dict(checkpoint.tensors)
    for name, start in [(name, match[1]) for name in found if (match := _WHOLE.fullmatch(name))]:
        parts = tuple(_shards(found, start)) if name.endswith("shard_0.weight") else (found.pop(name),)
        whole = f"{start}weight" if start else name
        if len({(part.shape[1:], part.type_name) for part in parts}) > 1 or len(parts[0].shape) != 2 or whole in found:
            raise InvalidFileError(f"{checkpoint.path}: the parts of {whole} do not form a matrix")
        shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
        found[whole] = Parts(whole, shape, parts[0].type_name, sum(part.nbytes for part in parts), parts)
    return checkpoint.with_tensors(found)


def _shards(found: dict[str, StoredTensor], start: str) -> Iterator[StoredTensor]:
    for number in itertools.count():
        if (part := found.pop(f"{start}shard_{number}.weight", None)) is None:
            return
        yield part


MAPPED = {"F32": np.float32, "BF16": np.uint16}
"""Types of tables that recorded steps read from their files, and numpy's types of their bits."""


class NGramTable:
    """Rows of a table of n-grams for tokens; the table stays in its file, and is its own parameter "weight".

    In recorded steps a type other than float32 and bfloat16 is decoded to float32 in memory.
    """

    sections = 1

    def __init__(self, ngrams: NGrams, layer: int) -> None:
        self.hashes, self._parts = ngrams.hashes[layer], list[StoredTensor]()
        self.shape = ngrams.rows[layer], ngrams.size // len(self.hashes.sizes)

    def __call__(self, token_ids: Value, before: Value) -> Value:
        """Return [T, P] for ids [T] and `before` [T, longest - 1], see `kernels/ngram`."""
        if isinstance(token_ids, RecordedTokens):
            return self._record(token_ids, before)
        rows = self.hashes.rows(token_ids.cpu().numpy().astype(np.int64), before.cpu().numpy())
        return before.new_tensor(self._rows(rows))

    def _record(self, token_ids: RecordedTokens, before: Any) -> Value:
        from candle_vllm.core.kernels.cpu_runtime.values import buffer_value

        recorder, hashes, (_, size) = before.recorder, self.hashes, self.shape
        heads = len(hashes.sizes)
        out, parts = recorder.buffer(heads * size), self._arrays
        starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        addresses = np.array([recorder.keep_array(part) for part in parts], np.int64)
        arrays = map(recorder.keep_array, (*hashes.arrays, starts, addresses))
        place = address_of(token_ids.numbers), before.address, before.buffer.stride, before.width
        to = len(parts), parts[0].itemsize, address_of(out.array), out.stride
        recorder.add(
            operation("ngram.cpu:look_up"), LookUpArguments._make([*place, heads, size, hashes.eos, *arrays, *to])
        )
        return buffer_value(recorder, out)

    @functools.cached_property
    def _arrays(self) -> list[NDArray[Any]]:
        """The parts as recorded steps read them, [rows, D] each."""
        return [
            part.raw().view(MAPPED[part.type_name]) if part.type_name in MAPPED else part.load("F32")
            for part in self._parts
        ]

    def _rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])
        part_of, found = np.searchsorted(starts, rows, "right") - 1, np.empty((*rows.shape, self.shape[1]), np.float32)
        for number in np.unique(part_of):
            chosen = part_of == number
            found[chosen] = self._parts[number].select(rows[chosen] - starts[number]).load("F32")
        return found.reshape(len(rows), -1)

    def fill(self, stored: StoredTensor) -> str | None:
        """Keep the tensor's parts of the file mapped."""
        self._parts = [
            Constant(each.name, each.shape, each.type_name, each.nbytes, each.path, each.raw())
            for each in stored.in_parts()
        ]
        return None

    def parameters(self) -> Mapping[str, Parameter]:
        """The table."""
        return {"weight": self}
