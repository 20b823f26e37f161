# SPDX-License-Identifier: MIT
"""In-situ quantisation: unquantised weights become blocks of a GGUF type while they are loaded, tensor by tensor.

Every matrix of a family's table is viewed in the model's layout, then wrapped in a tensor that is quantised when its
bytes are read. Norms, biases, the modules in `_PLAIN`, and matrices whose rows are no multiple of 32 stay plain
(unquantised). Rows that are no multiple of a type's block of 256 get a type with blocks of 32. The embedding table and
the head get at least Q6_K, because every token uses both.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from candle_vllm.core.errors import ConfigError, WeightsError
from candle_vllm.core.kernels.weight_quant.rows import BY_ROW, ISQ_TYPES, SOURCES, fitting_type, quantise, quantise_rows
from candle_vllm.core.kernels.weight_quant.searches import SIMPLE
from candle_vllm.core.loading.imatrix import Imatrix
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import Counted, WeightName, beside_gguf
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.tensors import StoredTensor, Viewed

logger = logging.getLogger(__name__)

_TABLES = ("embed:", "head:")
_FINE = (GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q8_0)
_PLAIN = ("positions:", "router:", "shared_gate:", "attend.keys:", "attend.values:")  # the last two: see `HeadMatrices`


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class InSitu(Viewed):
    """A plain matrix that is quantised when its bytes are read.

    Attributes:
        importance: importance of its columns, see `weight_quant.rows.quantise`.
        by_row: whether all blocks of a row have the same scale, see `weight_quant.rows.quantise_rows`.
    """

    kind: GGMLQuantizationType
    importance: np.ndarray | None = None
    by_row: bool = False

    # Rows are independent, so a part quantises only its own rows. With `by_row`, parts of a row have their own scales.

    def select(self, order: np.ndarray) -> StoredTensor:
        return self._part(self.source.select(order)) if self._is_plain else Viewed.select(self, order)

    def rows(self, first: int, last: int) -> StoredTensor:
        self._check_cut("rows", first, last, self.shape[:1])
        return self._part(self.source.rows(first, last)) if self._is_plain else Viewed.rows(self, first, last)

    def columns(self, first: int, last: int) -> StoredTensor:
        self._check_columns(first, last)
        if not self._is_plain:
            return Viewed.columns(self, first, last)
        importance = None if self.importance is None else np.ascontiguousarray(self.importance[:, first:last])
        return self._part(self.source.columns(first, last), importance)

    @property
    def _is_plain(self) -> bool:
        """Whether the matrix has the source's rows and columns, and all rows have the same importance."""
        return self.source.shape == self.shape and (self.importance is None or len(self.importance) == 1)

    def _part(self, source: StoredTensor, importance: np.ndarray | None = None) -> InSitu:
        importance = self.importance if importance is None else importance
        return in_situ(source, self.kind, importance, by_row=self.by_row)

    def raw(self) -> np.ndarray:
        """See `StoredTensor.raw`; quantises at each call. Raises WeightsError if an element cannot be quantised."""
        assert self.source.dtype is not None
        try:
            if self.by_row:
                return quantise_rows(self.source.raw(), self.source.dtype, self.shape[-1])
            return quantise(self.source.raw(), self.source.dtype, self.shape[-1], self.kind, self.importance)
        except ValueError as error:
            raise WeightsError(
                f"{self.path}: tensor {self.name} cannot be quantised: {error}; load it without `isq`"
            ) from error


def quantised_in_situ(
    name: str,
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    config: Counted,
    has_place: Callable[[str], bool] = lambda _: True,
    imatrix: Imatrix | None = None,
) -> Checkpoint:
    """Return a checkpoint with quantised matrices; the tensors of `table` are named by their targets in the model.

    Args:
        name: one of `ISQ_TYPES`.
        checkpoint: the unquantised weights; closing either checkpoint closes both.
        has_place: returns whether the model has a target: see `loading.weights.places`.

    Raises:
        ConfigError: the checkpoint is a GGUF file or already quantised.
        WeightsError: the importance matrix belongs to another model.
    """
    check_plain(name, checkpoint)
    tensors, used, counts = dict[str, StoredTensor](), set[str](), Counter[str]()
    for line, written in beside_gguf(table, config):
        found = line.find(checkpoint.tensors) if has_place(line.target) else None
        if found is None:
            continue
        stored = line.look(checkpoint.tensors[found], found, config)
        used.add(found)
        if stored.stays_in_file:
            tensors[line.target] = stored
            continue
        chosen = chosen_type(ISQ_TYPES[name], line.target, stored)
        counts[_group(ISQ_TYPES[name], chosen, line.target, stored)] += 1
        importance = None
        if imatrix is not None and chosen is not None and chosen.name not in SIMPLE:
            importance = imatrix.of_line(written, stored.shape[-1], config)
            counts[f"quantised by importance ({imatrix.path.name})"] += importance is not None
        by_row = name == BY_ROW and not _is_table(line.target)
        tensors[line.target] = stored if chosen is None else in_situ(stored, chosen, importance, by_row=by_row)
    for group, count in counts.items():
        if group:
            logger.info("isq %s: %d matrices: %s", name, count, group)
    matrices = [tensor for tensor in tensors.values() if isinstance(tensor, InSitu)]
    if imatrix is not None:
        check_used(imatrix, any(matrix.importance is not None for matrix in matrices))
    rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in used}
    return checkpoint.with_tensors(rest | tensors)


def check_used(imatrix: Imatrix, used: bool) -> None:
    """Raise WeightsError if no matrix has an entry in the importance matrix."""
    if not used:
        raise WeightsError(f"{imatrix.path} has no entry for a matrix of a type that uses it; is it another model's?")


def check_plain(name: str | None, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a GGUF file or quantised tensors; `name` is `isq`, None for a file written without it."""
    quantised = next((tensor for tensor in checkpoint.tensors.values() if tensor.dtype is None), None)
    if checkpoint.format == "gguf":
        held = "a GGUF file, whose tensors have fixed types"
    elif quantised is not None:
        held = f"quantised already: {quantised.name} is {quantised.type_name}"
    else:
        return
    needs = f"needs unquantised safetensors weights, but {checkpoint.path} is {held}"
    if name is None:
        raise ConfigError(f"a written file {needs}: name the unquantised model", "model")
    raise ConfigError(
        f"isq {name} {needs}: leave it out, use a GGUF file of the type that you want, or write one from the "
        f"unquantised weights: candle-vllm quantize --m MODEL --isq {name} --out FILE.gguf",
        "isq",
    )


def chosen_type(kind: GGMLQuantizationType, target: str, stored: StoredTensor) -> GGMLQuantizationType | None:
    """Return the type to which a tensor is quantised; None if it stays plain."""
    if stays_plain(target, stored):
        return None
    if _is_table(target) and kind not in _FINE:
        kind = GGMLQuantizationType.Q6_K
    return fitting_type(kind, stored.shape[-1])


def in_situ(
    stored: StoredTensor, kind: GGMLQuantizationType, importance: np.ndarray | None = None, *, by_row: bool = False
) -> InSitu:
    """Wrap a plain tensor as a quantised one."""
    size, width = kind.block
    nbytes = math.prod(stored.shape) // size * width
    return InSitu(stored.name, stored.shape, kind.name, nbytes, stored, kind, importance, by_row)


def stays_plain(target: str, stored: StoredTensor) -> bool:
    """Return whether a tensor stays plain: it is no unquantised weight matrix, or its module is in `_PLAIN`."""
    if len(stored.shape) < 2 or stored.dtype not in SOURCES or not target.endswith("weight"):
        return True
    return any(f".{name}" in f".{target}" for name in _PLAIN)


def _is_table(target: str) -> bool:
    return target.startswith(_TABLES)


def _group(wanted: GGMLQuantizationType, chosen: GGMLQuantizationType | None, target: str, stored: StoredTensor) -> str:
    """Return the log line's text for a tensor's type; "" for a tensor that is not logged."""
    if chosen is None:
        return "" if stays_plain(target, stored) else "unquantised, because their rows are no multiple of 32"
    if chosen != wanted and chosen in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ4_NL):
        return f"{chosen.name}, because their rows are no multiple of 256"
    return f"{chosen.name} (embedding and head)" if chosen != wanted else chosen.name
