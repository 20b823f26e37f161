# SPDX-License-Identifier: MIT
"""Fit an adapter to a model: its tensors become a `Delta` for each matrix of the model.

An error names a tensor that belongs to no matrix of the model; modules that the model never uses are skipped and noted.
If the model fuses, splits or reorders matrices, each of its matrices gets the rows of B that belong to it. A and B are
read from the file when they are used; biases, magnitudes and trained token rows are copied, and DoRA's norms computed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.adapter_base import AdapterBase, Weights, decoded
from candle_vllm.core.errors import AdapterError, WeightsError
from candle_vllm.core.kernels.lora import Delta, FittedAdapter
from candle_vllm.core.loading.adapter_places import Format, Spot
from candle_vllm.core.loading.adapters import StoredAdapter
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.views import computed, entry, parts_of_experts
from candle_vllm.core.models.towers import of_tower
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.threads import LOADING_THREADS, loading_threads

_PEFT = "merge it into the model with PEFT's merge_and_unload, and serve that"
_MERGE = _PEFT.replace("PEFT's", "`candle-vllm quantize --lora` or PEFT's")
_TABLES = {"embed": "embed:weight", "head": "head:weight"}
_SCORES = ("head", "score")  # attribute paths of an encoder's head
_LEAST, _MOST = 1e-9, 1e6  # allowed range of the scale of B A; a smaller scale would have no effect
_CANCELLED = 0.01  # below this fraction of ||w||^2 + ||b A||^2, the sum of the inner products is inexact (cancellation)
_SAMPLE = 64  # maximum number of rows of a copied weight that are compared with the base's weight


def fit_adapter(stored: StoredAdapter, base: AdapterBase, *, merging: bool = False) -> FittedAdapter:
    """Find the sites of an adapter's tensors; `stored` must stay open as long as the result is read.

    An adapter that will be merged (`merging`; `conversion/adapters.py`) may replace any parameter.

    Raises:
        AdapterError: the adapter does not fit the base, has non-finite elements, or needs an unsupported feature.
    """
    with ExitStack() as opened:
        opened.callback(LOADING_THREADS.reset, LOADING_THREADS.set(loading_threads()))  # counts the cores only once
        return _Fit(stored, base, opened, merging).run()


class _Fit:
    """One fitting; its methods are in the order in which an adapter's tensors are processed.

    The `column_scale` of a change is DoRA's magnitude [N] until all tensors are processed.
    """

    def __init__(self, stored: StoredAdapter, base: AdapterBase, opened: ExitStack, merging: bool) -> None:
        self._stored, self._base, self._opened, self._merging = stored, base, opened, merging
        self._merge = _PEFT if merging or isinstance(base.config, EncoderConfig) else _MERGE
        self._format: Format = "safetensors" if stored.format == "peft" else "gguf"
        self._changes: defaultdict[str, dict[str, Delta]] = defaultdict(dict)
        self._weights: Weights | None = None
        self._notes = list[str]()
        self._wrapped = Counter[str]()  # number of adapted parameters by module

    def run(self) -> FittedAdapter:
        if self._stored.format == "gguf" and self._stored.config.architecture not in self._base.architectures:
            raise AdapterError(
                f"{self._stored.path}: general.architecture is {self._stored.config.architecture!r:.80}; the base "
                f"{self._base.name} is {' or '.join(self._base.architectures)}"
            )
        if self._stored.config.alora is not None and isinstance(self._base.config, EncoderConfig):
            raise AdapterError(
                f"{self._stored.path}: it is an activated LoRA (aLoRA), which the encoder {self._base.name} cannot "
                "apply"
            )
        for token in self._stored.config.alora or ():
            if token >= self._base.config.vocab_size:
                raise AdapterError(f"{self._stored.path}: the invocation token {token} is beyond the base's vocabulary")
        modules = modules_of(self._stored)
        self._wrapped.update(unwrapped(module)[0] for module, parts in modules.items() if "a" in parts)
        for module, parts in modules.items():
            self._module(module, parts)
        self._tie()
        deltas = dict(self._changes)
        for path, changes in deltas.items():
            for prefix, delta in changes.items():
                if delta.column_scale is not None:
                    scale = self._column_scale(path, prefix, delta, delta.column_scale)
                    changes[prefix] = dataclasses.replace(delta, column_scale=scale)
        if not deltas:
            raise AdapterError(f"{self._stored.path}: none of its tensors changes the model")
        return FittedAdapter(
            digest=self._stored.digest,
            alora=self._stored.config.alora,
            deltas=deltas,
            rank=max(delta.rank for each in deltas.values() for delta in each.values()),
            nbytes=sum(tensor.nbytes for tensor in self._stored.tensors.values()),
            norm=norm_of(self._stored, deltas),
            notes=tuple(self._notes),
        )

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _module(self, module: str, parts: Parts) -> None:
        kinds, first = set(parts), next(iter(parts.values()))
        if self._stored.format == "gguf":
            self._gguf_tensor(module, parts)
            return
        if module.endswith(".base_layer") or (kinds & {"a", "b"} and self._base.places.parameters(module)[1]):
            self._experts(module, parts)
            return
        _, spots = self._base.places.module(module)
        if not spots and any(re.fullmatch(pattern, f"{module}.weight") for pattern in self._base.unused):
            self._notes.append(
                f"the adapter's tensors for {module} have no effect: {self._base.name} does not compute that module"
            )
            return
        if not spots and of_tower(module):
            self._refuse(first.name, "it is not part of the text model, and adapters may change only the text model")
        self._check_place(first, module, spots, vectors=self._merging and kinds <= {"full", "bias"})
        for kind, tensor in parts.items():
            if kind == "copy":
                self._check_copy(tensor, spots)
            elif kind == "full":
                self._full(tensor, spots)
            elif kind == "tokens":
                self._tokens(module, tensor, spots)
        if kinds & {"table a", "table b"}:
            self._table(module, parts, spots)
        elif kinds & {"a", "b", "bias of b", "magnitude", "bias"}:
            self._linear(module, parts, spots)

    def _check_place(self, tensor: StoredTensor, module: str, spots: Sequence[Spot], *, vectors: bool = False) -> None:
        """Refuse a module unless all its sites are matrices or tables; with `vectors`, accept norms and vectors too."""
        if not spots:
            self._refuse(tensor.name, f"{self._base.name} has no module {module!r:.200}")
        if any(".attend" in spot.path for spot in spots):
            self._refuse(tensor.name, f"keys and values of latent attention are absorbed into other products: {_PEFT}")
        if not vectors and not all(spot.kind == "weight" and len(spot.shape) == 2 for spot in spots):
            why = "it changes a norm or another vector, and adapters can change only matrices when they are served"
            self._refuse(tensor.name, f"{why}: {self._merge}")

    # ---- products ----------------------------------------------------------------------------------------------------

    def _linear(self, module: str, parts: Parts, spots: Sequence[Spot]) -> None:
        pair = None
        if {"a", "b", "bias of b", "magnitude"} & set(parts):
            pair = self._pair(module, parts, "a", "b")
        if self._stored.config.dora and pair is not None and "magnitude" not in parts:
            self._refuse(pair[0].name, "use_dora is true, but the module has no lora_magnitude_vector")
        if not self._stored.config.dora and "magnitude" in parts:
            self._refuse(parts["magnitude"].name, "use_dora is not true in adapter_config.json")
        total = pair[1].shape[0] if pair is not None else parts["bias"].numel
        orders = self._orders(next(iter(parts.values())), spots, total)
        scale = 1.0 if pair is None else self._scale(module, pair[0], pair[0].shape[0])
        vectors = {
            kind: self._vector(parts[kind], total) for kind in ("bias of b", "bias", "magnitude") if kind in parts
        }
        if "bias" in vectors and "full" not in parts and self._stored.config.bias == "none":
            if "copy" not in parts:
                self._refuse(parts["bias"].name, "bias is 'none' in adapter_config.json")
            del vectors["bias"]  # PEFT saves it with the head, like the head's weight
        for spot, rows in zip(spots, orders, strict=True):
            added = []
            if "bias of b" in vectors:
                added.append(vectors["bias of b"][rows] * np.float32(scale))
            if "bias" in vectors:
                added.append(vectors["bias"][rows] - self._base_bias(module, spot))
            bias: Any = np.sum(added, 0) if added else None
            delta = Delta(bias=bias)
            if pair is not None:
                self._check_columns(pair[0], spot)
                a = self._base.places.columns(spot, pair[0], self._format)
                magnitude = vectors["magnitude"][rows] if "magnitude" in vectors else None
                delta = Delta(a=a, b=picked(pair[1], rows), scale=scale, bias=bias, column_scale=magnitude)
            self._put(next(iter(parts.values())), spot, delta)

    def _pair(self, module: str, parts: Parts, first: str, second: str) -> tuple[StoredTensor, StoredTensor]:
        """Return A [r, ..] and B [.., r], after checking their ranks against each other, the config and the limits."""
        a, b = self._both(module, parts, first, second)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            self._refuse(a.name, f"its shape {list(a.shape)} does not fit {list(b.shape)} of {b.name!r:.200}")
        self._check_rank(module, a, a.shape[0])
        return a, b

    def _both(self, module: str, parts: Parts, first: str, second: str) -> tuple[StoredTensor, StoredTensor]:
        if first not in parts or second not in parts:
            there = next(iter(parts.values()))
            self._refuse(there.name, f"one of the two LoRA matrices of {module!r:.200} is missing")
        return parts[first], parts[second]

    def _check_rank(self, module: str, a: StoredTensor, rank: int) -> None:
        said, most = self._stored.config.rank(module), self._stored.limits.max_rank
        if said is not None and rank != said:
            self._refuse(a.name, f"its rank is {rank}; adapter_config.json says {said}")
        if rank > most:
            self._refuse(a.name, f"its rank is {rank}, and at most {most} is allowed: raise max_lora_rank")

    def _scale(self, module: str, a: StoredTensor, rank: int) -> float:
        scale = self._stored.config.scale(module, rank)
        if not _LEAST <= abs(scale) <= _MOST:
            self._refuse(a.name, f"its scale is {scale:g}, and must be {_LEAST:g} to {_MOST:g}: see lora_alpha")
        return scale

    def _orders(self, tensor: StoredTensor, spots: Sequence[Spot], total: int) -> list[NDArray[np.int64]]:
        """Return the rows of B for each site; check that the sites together have each row once."""
        try:
            orders = [self._base.places.rows(spot, total, self._format) for spot in spots]
        except WeightsError as error:
            self._refuse(tensor.name, str(error))
        for spot, rows in zip(spots, orders, strict=True):
            if len(rows) != spot.shape[0]:
                self._refuse(tensor.name, f"it has {len(rows)} rows for {spot.path}, which has {spot.shape[0]}")
        seen = np.zeros(total, np.int64)
        for rows in orders:
            seen[rows] += 1
        if not (seen == 1).all():
            self._refuse(tensor.name, f"each of its {total} rows must belong to exactly one row of the base's matrices")
        return orders

    def _check_columns(self, a: StoredTensor, spot: Spot) -> None:
        if a.shape[-1] != spot.shape[1]:
            self._refuse(a.name, f"its shape is {list(a.shape)}; {spot.path} of the base has {spot.shape[1]} columns")

    def _vector(self, tensor: StoredTensor, total: int) -> NDArray[np.float32]:
        if tensor.numel != total:
            self._refuse(tensor.name, f"its shape is {list(tensor.shape)}; {total} elements are expected")
        values = tensor.load("F32").reshape(-1)
        if not np.isfinite(values).all():
            self._refuse(tensor.name, "it has elements that are not finite")
        return values

    def _base_bias(self, module: str, spot: Spot) -> NDArray[np.float32] | float:
        target = f"{spot.path}:{spot.prefix}bias"
        if target not in self._base.shapes:  # Mamba adds the bias of dt_proj outside the layer
            known = self._base.places.module(module)[0]
            others = self._base.places.find(f"{known}.bias", self._format)
            target = next((f"{other.path}:{other.prefix}{other.kind}" for other in others), target)
        stored = self._part(target) if target in self._base.shapes else None
        return 0.0 if stored is None else stored.load("F32").reshape(-1)

    # ---- tables ------------------------------------------------------------------------------------------------------

    def _table(self, module: str, parts: Parts, spots: Sequence[Spot]) -> None:
        """Fit an embedding's A [r, V] and B [E, r]: the delta of a table row is its row of A^T times B^T."""
        if "magnitude" in parts:
            self._refuse(parts["magnitude"].name, f"DoRA of an embedding table is not supported: {_PEFT}")
        a, b = self._pair(module, parts, "table a", "table b")
        for spot in spots:
            if (a.shape[1], b.shape[0]) != spot.shape:
                self._refuse(a.name, f"its table is {[a.shape[1], b.shape[0]]}, the base's {list(spot.shape)}")
            scale = self._scale(module, a, a.shape[0])
            self._put(a, spot, Delta(a=turned(b), b=turned(a), scale=scale))

    def _full(self, tensor: StoredTensor, spots: Sequence[Spot]) -> None:
        """Fit a tensor that replaces the base's: a head or a table; when merging, any parameter."""
        for spot in spots:
            is_score = isinstance(self._base.config, EncoderConfig) and spot.path in _SCORES
            if self._merging and spot.path not in _TABLES:
                self._replace(tensor, spot)
                continue
            if spot.path not in _TABLES and not is_score:
                why = f"it replaces {spot.path}, and only heads and embedding tables can be replaced"
                self._refuse(tensor.name, f"{why}: {self._merge}")
            if is_score and tensor.shape != spot.shape:
                why = f"its shape is {list(tensor.shape)}, and the base's head has {list(spot.shape)}"
                self._refuse(tensor.name, f"{why}: {_PEFT}")
            if tensor.shape[1:] == spot.shape[1:] and tensor.shape[0] != spot.shape[0]:
                self._refuse(
                    tensor.name,
                    f"it has a vocabulary of {tensor.shape[0]} tokens, the base {self._base.name} one of "
                    f"{spot.shape[0]}: resize the base with transformers' resize_token_embeddings, merge the adapter "
                    "into it with PEFT's merge_and_unload, and serve that with the adapter's tokenizer",
                )
            if tensor.shape != spot.shape:
                self._refuse(tensor.name, f"its shape is {list(tensor.shape)}, the base's {list(spot.shape)}")
            self._put(tensor, spot, Delta(full=tensor))

    def _replace(self, tensor: StoredTensor, spot: Spot) -> None:
        """Fit any parameter that replaces the base's, in the layout of the base's (merging only)."""
        try:
            seen = self._base.places.look(tensor, spot, self._format)
        except WeightsError as error:
            self._refuse(tensor.name, str(error))
        if seen.shape != spot.shape:
            self._refuse(tensor.name, f"its shape is {list(tensor.shape)}; the base has {list(spot.shape)}")
        self._put(tensor, spot, Delta(full=seen))

    def _check_copy(self, tensor: StoredTensor, spots: Sequence[Spot]) -> None:
        """Refuse a copy of the base's own weight, which PEFT may save, if sampled rows differ; it is unused."""
        for spot in spots:
            if tensor.shape != spot.shape:
                self._refuse(tensor.name, f"its shape is {list(tensor.shape)}, the base's {list(spot.shape)}")
            own = self._part(f"{spot.path}:{spot.prefix}weight")
            rows = np.unique(np.linspace(0, spot.shape[0] - 1, _SAMPLE).astype(np.int64))
            if own is None:
                continue
            mine, theirs = (side.select(rows).load("F32") for side in (own, tensor))
            if not np.linalg.norm(mine - theirs) <= 0.1 * np.linalg.norm(theirs):  # quantised weights differ slightly
                self._refuse(tensor.name, f"it belongs to another base model than {self._base.name}")

    def _tokens(self, module: str, tensor: StoredTensor, spots: Sequence[Spot]) -> None:
        """Fit trained rows, which replace rows of the embedding table or of the head."""
        said = self._stored.config.trained_tokens
        names = [name for name in said if name and (module == name or module.endswith(f".{name}"))]
        ids = np.array(said[names[0]] if names else said.get("", ()), np.int64)
        for spot in spots:
            if spot.path not in _TABLES:
                why = f"trainable_token_indices needs the embedding table or the head, and {spot.path} is neither"
                self._refuse(tensor.name, why)
            if tensor.shape != (len(ids), spot.shape[1]):
                self._refuse(
                    tensor.name,
                    f"its shape is {list(tensor.shape)}; trainable_token_indices and the base ask for "
                    f"{[len(ids), spot.shape[1]]}",
                )
            if ids.max() >= spot.shape[0]:
                self._refuse(tensor.name, f"token {ids.max()} is beyond the base's vocabulary of {spot.shape[0]}")
            rows = self._vector(tensor, tensor.numel).reshape(tensor.shape)
            self._put(tensor, spot, Delta(rows=(ids, rows)))

    def _tie(self) -> None:
        """Apply trained rows of a tied embedding table to the head too; with `ensure_weight_tying`, all its changes."""
        table, head = (self._changes.get(path, {}).get("") for path in _TABLES)
        if table is None or not self._base.config.tie_embeddings or not self._base.config.has_head:
            return
        if head is not None:
            if head.full is None and head.rows is None:
                self._changes["head"][""] = dataclasses.replace(head, rows=table.rows)
        elif self._stored.config.tied or (table.a is None and table.full is None):
            plain = table if table.column_scale is None else dataclasses.replace(table, column_scale=None)
            self._changes["head"][""] = plain  # the same object, so that a merged head stays tied
        elif table.rows is not None:
            self._changes["head"][""] = Delta(rows=table.rows)

    # ---- experts -----------------------------------------------------------------------------------------------------

    def _experts(self, module: str, parts: Parts) -> None:
        """Fit A [X * r, in], with r consecutive rows per expert, and B [out, r * X], every X-th column per expert."""
        first = next(iter(parts.values()))
        if set(parts) - {"a", "b"}:
            self._refuse(first.name, "an adapter of expert weights may have only lora_A and lora_B")
        plain, depth = unwrapped(module)
        known, names = self._base.places.parameters(plain)
        wanted = self._stored.config.targets
        names = [name for name in names if not wanted or any(f".{name}".endswith(f".{end}") for end in wanted)]
        wrappers = self._wrapped[plain]
        if len(names) != wrappers or depth >= len(names):
            self._refuse(
                first.name,
                f"the adapter has {wrappers} LoRA pairs for parameters of {plain!r:.200}, and target_parameters names "
                f"{len(names)} parameters of the base there",
            )
        name = names[len(names) - 1 - depth]  # the first name is wrapped first, so it is innermost
        spots = self._base.places.find(name, "safetensors")
        pattern = plain + name.removeprefix(known)
        a, b = self._both(module, parts, "a", "b")
        count = self._base.config.num_experts
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % count:
            self._refuse(
                a.name, f"its shape {list(a.shape)} and {list(b.shape)} of {b.name!r:.200} do not fit {count} experts"
            )
        rank, columns = a.shape[0] // count, spots[0].shape[1]
        of_a = [a.rows(expert * rank, (expert + 1) * rank) for expert in range(count)]
        of_b = parts_of_experts(b, count)
        if a.shape[1] != columns and b.shape[0] == columns:  # older PEFT exchanged the rows and columns of experts
            of_a, of_b = [turned(part) for part in of_b], [turned(part) for part in of_a]
        self._each_expert(pattern, a, of_a, of_b, spots)

    def _each_expert(
        self, name: str, tensor: StoredTensor, of_a: list[StoredTensor], of_b: list[StoredTensor], spots: Sequence[Spot]
    ) -> None:
        rank = of_a[0].shape[0]
        self._check_rank(name, tensor, rank)
        scale = self._scale(name, tensor, rank)
        by_expert: dict[int, list[Spot]] = {}
        for spot in spots:
            assert spot.expert is not None
            by_expert.setdefault(spot.expert, []).append(spot)
        for expert, each in by_expert.items():
            orders = self._orders(tensor, each, of_b[expert].shape[0])
            for spot, rows in zip(each, orders, strict=True):
                self._check_columns(of_a[expert], spot)
                self._put(tensor, spot, Delta(a=of_a[expert], b=picked(of_b[expert], rows), scale=scale))

    # ---- GGUF --------------------------------------------------------------------------------------------------------

    def _gguf_tensor(self, name: str, parts: Parts) -> None:
        """Fit `lora_a` and `lora_b` of a tensor of the base; for the embedding table, A is transposed."""
        first = next(iter(parts.values()))
        if set(parts) - {"a", "b"}:
            self._refuse(first.name, "a GGUF adapter may contain only tensors that end in .lora_a or .lora_b")
        spots = self._base.places.find(name, "gguf")
        self._check_place(first, name, spots)
        a, b = self._both(name, parts, "a", "b")
        if spots[0].path == "embed":
            self._table(name, {"table a": turned(a), "table b": b}, spots)
        elif spots[0].expert is None:
            self._linear(name, parts, spots)
        else:
            count = self._base.config.num_experts
            if len(a.shape) != 3 or len(b.shape) != 3 or not a.shape[0] == b.shape[0] == count:
                self._refuse(a.name, f"its shape {list(a.shape)} does not fit {count} experts")
            if a.shape[1] != b.shape[2]:
                self._refuse(a.name, f"its shape {list(a.shape)} does not fit {list(b.shape)} of {b.name!r:.200}")
            of_a, of_b = ([entry(side, expert) for expert in range(count)] for side in (a, b))
            self._each_expert(name, a, of_a, of_b, spots)

    # ---- the model's own weights -------------------------------------------------------------------------------------

    def _part(self, target: str) -> StoredTensor | None:
        if self._weights is None:
            self._weights = self._opened.enter_context(self._base.weights())
        return self._weights(target)

    def _column_scale(
        self, path: str, prefix: str, delta: Delta, magnitude: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return DoRA's m / ||W + s B A|| of each row."""
        weight = self._part(f"{path}:{prefix}weight")
        assert weight is not None
        assert delta.a is not None
        assert delta.b is not None
        a, b = delta.a.load("F32"), delta.b.load("F32") * np.float32(delta.scale)
        norms = np.empty(len(b), np.float32)
        across, a_transposed = np.einsum("rk,sk->rs", a, a, dtype=np.float64), np.ascontiguousarray(a.T)
        for first, rows in decoded(weight):
            norms[first : first + len(rows)] = norms_with(rows, a, b[first : first + len(rows)], a_transposed, across)
        if not norms.all():
            self._refuse(delta.b.name, "a row of W + s B A is zero, and DoRA divides by its norm")
        with np.errstate(over="ignore"):
            scale = magnitude / norms
        if not np.isfinite(scale).all():
            self._refuse(delta.b.name, "DoRA's magnitudes divided by the row norms of W + s B A are not finite")
        return scale

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _put(self, tensor: StoredTensor, spot: Spot, change: Delta) -> None:
        """Add a change to a site; each field of a `Delta` may be set only once."""
        there = self._changes[spot.path].get(spot.prefix, Delta())
        merged = dict[str, Any]()
        for field in ("a", "b", "bias", "column_scale", "full", "rows"):
            mine, new = getattr(there, field), getattr(change, field)
            if mine is not None and new is not None:
                self._refuse(tensor.name, f"another tensor of the adapter is for {spot.path} too")
            merged[field] = new if mine is None else mine
        scale = there.scale if there.a is not None else change.scale
        self._changes[spot.path][spot.prefix] = Delta(scale=scale, **merged)

    def _refuse(self, name: str, why: str) -> NoReturn:
        refuse(self._stored, name, why)


def norms_with(
    rows: NDArray[np.float32],
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    a_transposed: NDArray[np.float32],
    across: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return ||w + b A|| for rows w [n, K] and b [n, r], from the inner products ||w||^2, w . b A and ||b A||^2.

    B A, which is as large as W, is computed only for rows whose summands nearly cancel. `across` is A A^T.
    """
    own = np.einsum("nk,nk->n", rows, rows).astype(np.float64)
    added = np.einsum("nr,nr->n", b @ across, b)
    squares = own + 2 * np.einsum("nr,nr->n", rows @ a_transposed, b, dtype=np.float64) + added
    few = np.flatnonzero(squares < _CANCELLED * (own + added))
    if len(few):
        whole = rows[few] + b[few] @ a
        squares[few] = np.einsum("nk,nk->n", whole, whole)
    return np.sqrt(squares).astype(np.float32)


# ---- an adapter's tensors grouped by module, and operations that need no model ---------------------------------------


_KINDS = (
    ("lora_A.weight", "a"), ("lora_B.weight", "b"), ("lora_B.bias", "bias of b"), ("lora_embedding_A", "table a"),
    ("lora_embedding_B", "table b"), ("lora_magnitude_vector", "magnitude"), ("lora_a", "a"), ("lora_b", "b"),
    ("lora_magnitude_vector.weight", "magnitude"), ("token_adapter.trainable_tokens_delta", "tokens"),
    ("base_layer.weight", "copy"), ("base_layer.bias", "bias"), ("bias", "bias"), ("weight", "full"),
)  # fmt: skip
"""Suffixes of tensor names, and the kind of tensor for each."""
_NAMED = tuple(f".{end.partition('.')[0]}." for end, _ in _KINDS if end.startswith("lora_"))

Parts: TypeAlias = dict[str, StoredTensor]
"""Tensors of a module by kind."""


def refuse(stored: StoredAdapter, name: str, why: str) -> NoReturn:
    """Raise AdapterError for a tensor."""
    raise AdapterError(f"{stored.path}: tensor {name!r:.300}: {why}")


def modules_of(stored: StoredAdapter) -> dict[str, Parts]:
    """Group an adapter's tensors by module, and by kind."""
    found: defaultdict[str, Parts] = defaultdict(dict)
    for name, tensor in stored.tensors.items():
        plain = name
        for marker in _NAMED:
            plain = plain.replace(f"{marker}default", marker.rstrip("."))  # some tools save names in this form
        end, kind = next(((end, kind) for end, kind in _KINDS if plain.endswith(f".{end}")), ("", ""))
        if not kind:
            refuse(stored, name, "it is not a known part of an adapter")
        module = plain.removesuffix(f".{end}")
        if kind in found[module]:
            refuse(stored, name, "it appears twice")
        found[module][kind] = tensor
    return dict(found)


@np.errstate(over="ignore", invalid="ignore")  # infinite elements are refused below
def norm_of(stored: StoredAdapter, deltas: Mapping[str, Mapping[str, Delta]]) -> float:
    """Return the Frobenius norm of all s B A; ||B A||^2 sums the elements of (B^T B) * (A A^T). Refuse inf and NaN."""
    total, last, products = 0.0, None, np.empty((0, 0))
    for delta in (delta for each in deltas.values() for delta in each.values()):
        if delta.full is not None and not _finite(delta.full):
            refuse(stored, delta.full.name, "it has elements that are not finite")
        if delta.a is None or delta.b is None:
            continue
        if delta.a is not last:
            a = delta.a.load("F32")
            last, products = delta.a, a @ a.T
        b = delta.b.load("F32")
        of_b = b.T @ b
        for tensor, product in ((delta.a, products), (delta.b, of_b)):
            if not math.isfinite(float(np.trace(product))):
                refuse(stored, tensor.name, "it has elements that are not finite, or beyond 1e19")
        total += delta.scale**2 * float(np.vdot(products.astype(np.float64), of_b))
    return math.sqrt(max(total, 0.0))


def unwrapped(module: str) -> tuple[str, int]:
    """Return a module without PEFT's wrappers (`.base_layer`), and their number."""
    plain = module
    while plain.endswith(".base_layer"):
        plain = plain.removesuffix(".base_layer")
    return plain, module.removeprefix(plain).count(".base_layer")


def picked(stored: StoredTensor, rows: NDArray[np.int64]) -> StoredTensor:
    """Select rows of B; a range of rows stays a view of the file."""
    first, last = int(rows[0]), int(rows[-1]) + 1
    if last - first != len(rows) or not np.array_equal(rows, np.arange(first, last)):
        return stored.select(rows)
    return stored if last - first == stored.shape[0] else stored.rows(first, last)


def turned(stored: StoredTensor) -> StoredTensor:
    """Transpose a matrix."""
    return computed(stored, stored.shape[::-1], lambda values: values.T)


def _finite(stored: StoredTensor) -> bool:
    if len(stored.shape) < 2:
        return bool(np.isfinite(stored.load("F32")).all())
    return all(np.isfinite(rows).all() for _, rows in decoded(stored))
