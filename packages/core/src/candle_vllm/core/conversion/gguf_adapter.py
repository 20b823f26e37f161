# SPDX-License-Identifier: MIT
"""Write an adapter (LoRA) as a GGUF file, which this library and llama.cpp accept for a GGUF model.

GGUF uses the tensor names and the order of rows of the model's file, and has one alpha for all tensors: a tensor's
scale is alpha / r. If PEFT scales a tensor differently (patterns, rslora), its B is multiplied by the ratio, in
float32. Source: `convert_lora_to_gguf.py` and `llama-adapter.cpp` of llama.cpp.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core.assembly.adapter_base import adapter_base
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.assembly.model import describe_family
from candle_vllm.core.assembly.opening import config_file, naming, open_model
from candle_vllm.core.assembly.placement import DTYPES
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.conversion.adapters import ANY_SIZE
from candle_vllm.core.conversion.gguf_file import PlannedTensor, Progress
from candle_vllm.core.conversion.gguf_metadata import architecture
from candle_vllm.core.conversion.gguf_tensors import joined, preferring
from candle_vllm.core.conversion.write import WrittenFile, check_target, write_plans
from candle_vllm.core.devices import CPU
from candle_vllm.core.errors import AdapterError, ConfigError
from candle_vllm.core.kernels.lora import Delta, FittedAdapter
from candle_vllm.core.loading.adapters import StoredAdapter, read_adapter
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.loading.views import ColumnOrder, computed, constant
from candle_vllm.core.loading.weights import Line, expand
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.tensors import StoredTensor

_MERGE = "merge it into the model with `candle-vllm quantize --lora`"
_Piece = tuple[Line, Delta]


def write_gguf_adapter(
    config: EngineConfig,
    adapter: Path | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> WrittenFile:
    """Write an adapter for the model of `config`, which determines names and the order of rows.

    Args:
        config: names the model, a GGUF file or a folder; `dtype` is the tensors' type, "auto" the stored one.
        adapter: a PEFT folder.
        out, overwrite, progress: see `write_gguf`.

    Raises:
        ConfigError: the file cannot be written at this path, or `isq` is set.
        ModelNotFoundError, ModelLoadError: the model or the adapter cannot be used; AdapterError: GGUF cannot hold it.
    """
    out = Path(out)
    check_target(out, overwrite)
    if config.isq is not None:
        raise ConfigError("adapters are written unquantised: leave isq out, and choose a type with dtype", "isq")
    files = model_files(config)
    with read_adapter(adapter, ANY_SIZE) as stored, naming(config_file(files), stored.path):
        base = adapter_base(files, config)
        if isinstance(base.config, EncoderConfig):
            raise AdapterError(
                f"{stored.path} is for the encoder {base.name}, and GGUF adapters are written for decoders: use the "
                "folder"
            )
        fitted = fit_adapter(stored, base)
        opened = open_model(files, CPU)
        with opened.checkpoint as checkpoint:
            family, model = describe_family(files, checkpoint, opened.metadata)
            if files.format == "gguf":
                name, laid_out, parts = str(opened.metadata["general.architecture"]), model, ()
                names = checkpoint.tensors
            else:
                row = architecture(family, model, config_file(files))
                name, laid_out, parts, names = row.name, row.stored(model), row.names(model), {}
            found: defaultdict[str, list[_Piece]] = defaultdict(list)
            lines = dict[str, Line]()
            for line in expand(family.weights, laid_out, "gguf"):
                if line.names:
                    written = line.find(names)
                    lines[line.target] = preferring(line, (written,) if written is not None else parts)
            for target, delta in _targets(stored, fitted):
                line = lines.get(target)
                if line is None or (target == "head:weight" and laid_out.tie_embeddings):
                    raise AdapterError(
                        f"{stored.path}: it changes {target}, for which a GGUF file of {files.name} has no tensor: "
                        f"{_MERGE}"
                    )
                found[line.first].append((line, delta))
            for target, line in lines.items():
                pieces = found.get(line.first, ())
                if target in base.shapes and _is_absent(line, [own for own, _ in pieces]):
                    rows, columns = base.shapes[target]
                    a, b = (constant(target, np.zeros(shape), stored.path) for shape in ((0, columns), (rows, 0)))
                    found[line.first].append((line, Delta(a=a, b=b)))
            scales = (delta.scale * delta.rank for each in fitted.deltas.values() for delta in each.values())
            alpha = Counter(float(np.float32(scale)) for scale in scales).most_common(1)[0][0]  # most need no scaling
            asked = DTYPES.get(config.dtype)
            plans = [
                PlannedTensor(f"{tensor}.{half}", values, GGMLQuantizationType[asked or values.dtype or "F32"])
                for tensor, pieces in found.items()
                for half, values in zip(("lora_a", "lora_b"), _halves(stored, tensor, pieces, alpha, laid_out))
            ]
        metadata = _metadata(name, files.name, Path(adapter).name, alpha, fitted)
        return write_plans(plans, metadata, out, progress)


def _targets(stored: StoredAdapter, fitted: FittedAdapter) -> Iterator[tuple[str, Delta]]:
    for path, deltas in fitted.deltas.items():
        for prefix, delta in deltas.items():
            parts = {"a bias": delta.bias, "DoRA": delta.column_scale, "a whole matrix": delta.full, "rows": delta.rows}
            for what, part in parts.items():
                if part is not None:
                    raise AdapterError(
                        f"{stored.path}: it has {what} for {path}, which GGUF adapters cannot store: {_MERGE}"
                    )
            yield f"{path}:{prefix}weight", delta


def _is_absent(line: Line, present: list[Line]) -> bool:
    """Whether only other parts of the line's layer and tensor are `present`; False for the line of an expert."""
    layers = {own.target.partition(":")[0] for own in present}
    return line.expert is None and line not in present and line.target.partition(":")[0] in layers


def _halves(
    stored: StoredAdapter, name: str, pieces: list[_Piece], alpha: float, config: Any
) -> tuple[StoredTensor, StoredTensor]:
    """Return `lora_a` and `lora_b` of a tensor; for the embedding table, A and B are exchanged."""
    a = [delta.a for _, delta in pieces if delta.a is not None]
    b = [(line, _times(delta.b, delta.scale * delta.rank / alpha)) for line, delta in pieces if delta.b is not None]
    if pieces[0][0].expert is not None:
        if len(a) != config.num_experts or len({(delta.rank, delta.scale) for _, delta in pieces}) > 1:
            raise AdapterError(
                f"{stored.path}: GGUF has one rank for all {config.num_experts} experts of {name}: {_MERGE}"
            )
        return constant(name, np.stack([part.load("F32") for part in a]), stored.path), joined(name, b, config)
    if len({id(part) for part in a}) > 1:
        both, b = _side_by_side(pieces, alpha, stored.path)
        return both, joined(name, b, config)
    if name == "token_embd.weight":  # A is [V, r]
        return joined(name, b, config), computed(a[0], a[0].shape[::-1], lambda values: values.T, a[0].dtype or "F32")
    view = pieces[0][0].names[0][1]
    if isinstance(view, ColumnOrder):  # the columns of this view are the columns of A
        return view.undone(a[0], config), b[0][1]
    return a[0], joined(name, b, config)


def _side_by_side(
    pieces: list[_Piece], alpha: float, source: Path
) -> tuple[StoredTensor, list[tuple[Line, StoredTensor]]]:
    """Join adapters of matrices that are one matrix in the file: stack all A, and put zeros between the blocks of B."""
    ends = list(itertools.accumulate(delta.rank for _, delta in pieces))
    a = np.concatenate([delta.a.load("F32") for _, delta in pieces if delta.a is not None])
    b = list[tuple[Line, StoredTensor]]()
    for end, (line, delta) in zip(ends, pieces, strict=True):
        assert delta.b is not None
        wide = np.zeros((delta.b.shape[0], ends[-1]), np.float32)
        wide[:, end - delta.rank : end] = delta.b.load("F32") * np.float32(delta.scale * ends[-1] / alpha)
        b.append((line, constant(line.target, wide, source)))
    return constant("lora_a", a, source), b


def _times(stored: StoredTensor, factor: float) -> StoredTensor:
    """Multiply B by a factor: the ratio of its scale to alpha / r."""
    if abs(factor - 1) < 1e-7:
        return stored
    return computed(stored, stored.shape, lambda values: values * np.float32(factor), "F32")


def _metadata(name: str, base: str, adapter: str, alpha: float, fitted: FittedAdapter) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "general.architecture": name,
        "general.type": "adapter",
        "general.name": adapter,
        "general.base_model.count": 1,
        "general.base_model.0.name": Path(base).name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    return found | ({"adapter.alora.invocation_tokens": list(fitted.alora)} if fitted.alora else {})
