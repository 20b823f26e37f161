"""Filling a model from a checkpoint through the family's table of weight names.

The table has one line per tensor: where it goes in the model, its Hugging Face name and its GGUF name, with `{i}` for
the layer. Loading ends by naming everything that is missing, unexpected, or half of a merged layer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from candle_vllm.core.errors import WeightsError
from candle_vllm.core.layers.parameters import Finishes, Loadable, Part, Placement
from candle_vllm.core.loading.tensors import Checkpoint, StoredTensor

_SHOWN = 8  # names listed in an error message

_Job = tuple[StoredTensor, Part, int | None]  # what, where to, and the heads whose rows are interleaved


@dataclasses.dataclass(frozen=True)
class WeightName:
    """One line of a family's table.

    Attributes:
        target: attribute path of the layer and the part, "layers.{i}.attention.qkv:q.weight".
        hf, gguf: the stored names; None where the format has no such tensor.
        gguf_heads: the model's config attribute that counts heads, for matrices whose rows GGUF's llama converter
            stores in interleaved rotary order; the loader brings them back to half-split order.
    """

    target: str
    hf: str | None
    gguf: str | None
    gguf_heads: str | None = None


def check_weights(
    build: Callable[[Placement], object],
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    *,
    num_layers: int,
    ignored: Sequence[str] = (),
) -> None:
    """Compares the model that a config describes with what the checkpoint holds, before memory is taken for it.

    A config may claim any size. Here the model is built of shapes without memory, so that what is built after this
    is never larger than what is stored.

    Args:
        build: makes the model.
        table, checkpoint, num_layers, ignored: as for `load_weights`.

    Raises:
        WeightsError: as `load_weights`, or the config has more layers than the checkpoint has tensors.
    """
    if num_layers > len(checkpoint.tensors):
        raise WeightsError(
            f"{checkpoint.path}: the model's config asks for {num_layers} layers and there are only "
            f"{len(checkpoint.tensors)} tensors"
        )
    model = build(Placement(torch.device("meta"), torch.float32))
    _match(model, table, checkpoint, num_layers, {}, ignored)


def load_weights(
    model: object,
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    *,
    num_layers: int,
    heads: Mapping[str, int],
    ignored: Sequence[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Copies every tensor of `checkpoint` into `model`.

    Args:
        model: the object whose attribute paths the table names.
        table: the family's names.
        checkpoint: the stored tensors.
        num_layers: how often the `{i}` lines repeat.
        heads: head counts for `gguf_heads`; empty where the family's GGUF files keep the half-split order.
        ignored: patterns of stored names that carry nothing (buffers that old checkpoints saved).
        progress: called with the bytes of each tensor as it is done.

    Raises:
        WeightsError: with all names that do not match.
    """
    jobs = _match(model, table, checkpoint, num_layers, heads, ignored)

    def run(job: _Job) -> int:
        stored, place, interleaved = job
        place.fill(stored, interleaved)
        stored.release()
        return stored.nbytes

    with ThreadPoolExecutor(max_workers=2) as pool:  # one dequantises while the other copies
        for count in pool.map(run, jobs):
            progress(count)
    for path in dict.fromkeys(line.target.split(":")[0] for line in expand(table, num_layers)):
        layer = layer_at(model, path)
        if isinstance(layer, Finishes):
            layer.finish()


def _match(
    model: object,
    table: Sequence[WeightName],
    checkpoint: Checkpoint,
    num_layers: int,
    heads: Mapping[str, int],
    ignored: Sequence[str],
) -> list[_Job]:
    """What goes where; a `WeightsError` where the names or the shapes differ."""
    jobs: list[_Job] = []
    missing: list[str] = []
    used: set[str] = set()
    for line in expand(table, num_layers):
        name = line.hf if checkpoint.format == "safetensors" else line.gguf
        path, part = line.target.split(":")
        layer = layer_at(model, path)
        parts = layer.parts() if layer is not None else {}
        if name is None or part not in parts:
            continue
        if name not in checkpoint.tensors:
            missing.append(name)
            continue
        used.add(name)
        stored, place = checkpoint.tensors[name], parts[part]
        if tuple(stored.shape) != place.shape:
            raise WeightsError(
                f"{checkpoint.path}: tensor {name} has shape {list(stored.shape)}; "
                f"the model's config asks for {list(place.shape)}"
            )
        jobs.append((stored, place, heads.get(line.gguf_heads or "") if checkpoint.format == "gguf" else None))
    unexpected = [name for name in checkpoint.tensors if name not in used and not _matches(name, ignored)]
    if missing or unexpected:
        raise WeightsError(f"{checkpoint.path}: {_mismatch(missing, unexpected)}")
    return jobs


def expand(table: Iterable[WeightName], num_layers: int) -> Iterator[WeightName]:
    """The lines of a table, those with `{i}` once for each layer."""
    for line in table:
        if "{i}" not in line.target:
            yield line
            continue
        for i in range(num_layers):
            names = {key: value and value.replace("{i}", str(i)) for key, value in _names(line).items()}
            yield dataclasses.replace(line, **names)


def layer_at(model: object, path: str) -> Loadable | None:
    """The layer behind a path like "layers.3.attention.qkv"; None where the model has none there (a tied head)."""
    found: Any = model
    for name in path.split("."):
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


def _names(line: WeightName) -> dict[str, str | None]:
    return {"target": line.target, "hf": line.hf, "gguf": line.gguf}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _mismatch(missing: list[str], unexpected: list[str]) -> str:
    lines = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{what} tensors ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(lines)
