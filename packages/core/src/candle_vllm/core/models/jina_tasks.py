# SPDX-License-Identifier: MIT
"""Task adapters of jina-embeddings-v3, which are stored in the model's own checkpoint.

`lora_adaptations` of config.json names N tasks, and every matrix W has the tensors A and B of all of them: [N, r, I]
and [N, O, r] of a linear layer, W + alpha / r B A; [N, V, r] and [N, r, E] of an embedding table, W + alpha / r A B.
The path of an adapter is the path of the model's folder followed by the task's name, as if it were a subfolder.
Source: Sturua et al., 2024, arXiv:2409.10173, and the repository's own code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from candle_vllm.core.errors import AdapterError, InvalidFileError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.loading.adapter_config import AdapterConfig
from candle_vllm.core.loading.adapters import AdapterLimits, StoredAdapter
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor
from candle_vllm.core.loading.views import entry, transposed
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.quantization.tensors import StoredTensor

WEIGHT, _STACK = ".parametrizations.weight.original", ".parametrizations.weight.0.lora_"
STACKED = r".*\.parametrizations\.weight\.0\.lora_[AB]"
"""Pattern of the names of tensors with the adapters of all tasks."""


def parametrized(line: WeightName) -> WeightName:
    """A row of a family's table that also finds its tensor under the name of a weight with adapters."""
    names = line.hf if isinstance(line.hf, tuple) else () if line.hf is None else (line.hf,)
    more = list[str | Seen]()
    for name in names:
        plain = name.name if isinstance(name, Seen) else name
        stored = plain.removesuffix(".weight") + WEIGHT
        if plain.endswith(".weight"):
            more.append(Seen(stored, name.view) if isinstance(name, Seen) else stored)
    return dataclasses.replace(line, hf=(*names, *more))


def adapter_exists(path: Path) -> bool:
    """Whether a path exists, or is a model's folder followed by one of its tasks; False for an invalid config.json."""
    try:
        return os.path.exists(path) or _names_task(path)
    except InvalidFileError:
        return False


def _names_task(path: Path) -> bool:
    described = path.parent / "config.json"
    return os.path.isfile(described) and path.name in _tasks(Fields(read_json(described), described))


def _tasks(fields: Fields) -> list[str]:
    return fields.get("lora_adaptations", list, [])


def task_adapter(path: Path, limits: AdapterLimits) -> StoredAdapter | None:
    """The adapter of a task, with tensors named as in PEFT; None if the path does not name a task.

    Raises:
        AdapterError: the tensors are missing, have wrong shapes, or exceed `max_bytes` of the limits.
        InvalidFileError: config.json or the checkpoint is not valid.
    """
    if path.exists() or not _names_task(path):
        return None
    described = path.parent / "config.json"
    fields = Fields(read_json(described), described)
    tasks, alpha = _tasks(fields), fields.get("lora_alpha", float, 1.0)
    checkpoint = open_safetensors(path.parent)
    try:
        tensors, digest = _tensors(checkpoint, path, tasks), hashlib.sha256(f"{alpha} {path.name}".encode())
        for name, tensor in tensors.items():
            digest.update(name.encode() + tensor.load("F32").tobytes())
        if sum(tensor.nbytes for tensor in tensors.values()) > limits.max_bytes:
            raise AdapterError(f"{path} has more than the {limits.max_bytes} bytes that are allowed: raise lora_memory")
    except BaseException:
        checkpoint.close()
        raise
    first = next(each for each in checkpoint.tensors.values() if isinstance(each, FileTensor))
    return StoredAdapter(
        path=path,
        format="peft",
        config=AdapterConfig(rank=lambda _: None, alpha=lambda _: alpha),
        digest=digest.digest(),
        limits=limits,
        file=first.file,
        header=lambda: tensors,
    )


def _tensors(checkpoint: Checkpoint, path: Path, tasks: list[str]) -> dict[str, StoredTensor]:
    found = dict[str, StoredTensor]()
    for name, stored in checkpoint.tensors.items():
        module, stacked, part = name.partition(_STACK)
        if not stacked:
            continue
        if len(stored.shape) != 3 or stored.shape[0] != len(tasks):
            raise AdapterError(
                f"{path}: tensor {name!r:.200} has shape {list(stored.shape)}; there are {len(tasks)} tasks"
            )
        own = entry(stored, tasks.index(path.name))
        if module.endswith("_embeddings"):
            found[f"{module}.lora_embedding_{part}"] = transposed(own, None)
        else:
            found[f"{module}.lora_{part}.weight"] = own
    if not found:
        raise AdapterError(f"{path}: config.json names the task, and the checkpoint has no adapters")
    return found
