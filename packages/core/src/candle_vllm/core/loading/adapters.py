"""Reads adapters (LoRA) as files hold them: a PEFT folder, or one GGUF file; nothing here knows the model.

A file is read whole before it is looked at: an operator may write to it while a server runs, a mapped file that is cut
ends the process, and the sum is of what is packed. What an adapter may take is looked at before its weights are; of a
folder nothing is read but `adapter_config.json` and `adapter_model.safetensors`, and no pickle ever is.
Source: PEFT's checkpoint format; `convert_lora_to_gguf.py` and `llama-adapter.cpp` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from candle_vllm.core.errors import AdapterError, InvalidFileError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.adapter_config import MAX_CONFIG_BYTES, AdapterConfig, invocation_of, parse_config
from candle_vllm.core.loading.gguf import open_gguf, split_names
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor
from candle_vllm.core.quantization.tensors import StoredTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_TENSORS = 1 << 18
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_TYPES = {"peft": ("F32", "F16", "BF16"), "gguf": ("F32", "F16", "BF16", "Q8_0")}
_PREFIX = "base_model.model."
_MOST_FOLDERS = 1000  # entries of a folder that are looked through for one of a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """What an adapter may take; looked at before its weights are read.

    Attributes:
        max_rank: the largest rank of a matrix.
        max_bytes: of its weights' file.
        copied: the file is read into memory, so that whoever writes to it meanwhile does no harm.
    """

    max_rank: int = 256
    max_bytes: int = 4 << 30
    copied: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """An adapter as its files hold it.

    Attributes:
        path: the folder or the file.
        format: "peft" or "gguf": whose names the tensors bear.
        config: what it says about itself.
        tensors: by name; PEFT's "base_model.model." is left off.
        digest: SHA-256 of the configuration's and the weights' bytes.
        limits: that it was read under.
        alora: tokens from whose last occurrence on it acts; None: on all of a sequence.
        base: the model that it was trained for, as the files name it.
        notes: what an operator should know: keys that nobody here knows, what was not compared.
        checkpoint: the file.
    """

    path: Path
    format: Literal["peft", "gguf"]
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]
    digest: bytes
    limits: AdapterLimits
    alora: tuple[int, ...] | None = None
    base: str | None = None
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint

    def close(self) -> None:
        """Unmaps the file; what was read stays valid."""
        self.checkpoint.close()

    def __enter__(self) -> StoredAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_adapter(path: Path | str, limits: AdapterLimits = AdapterLimits()) -> StoredAdapter:
    """Opens an adapter.

    Args:
        path: a folder that PEFT wrote, or one with a single such folder in it (an adapter's own name), or a GGUF file.
        limits: what it may take.

    Raises:
        ModelNotFoundError: nothing is there, or no adapter.
        AdapterError: it is damaged, beyond the limits, or asks for what is not honoured.
    """
    path = Path(path)
    if path.is_dir():
        return _read_peft(path, limits)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} is no folder and no file; an adapter is a PEFT folder or a GGUF file")
    if path.suffix == ".safetensors":
        raise AdapterError(f"{path} is a file of weights; name its folder, which has the {CONFIG_FILE} too")
    if path.suffix != ".gguf":
        raise AdapterError(f"{path} is no folder and no .gguf file; an adapter is a PEFT folder or a GGUF file")
    return _read_gguf(path, limits)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def _read_peft(path: Path, limits: AdapterLimits) -> StoredAdapter:
    folder = _folder_of(path)
    config_path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    data = _config_bytes(config_path)
    read = parse_config(data, config_path, limits.max_rank)
    if not weights.is_file():
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise AdapterError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read, and is never opened: save the "
                f"adapter as {WEIGHTS_FILE} (PEFT's save_pretrained with safe_serialization=True)"
            )
        raise ModelNotFoundError(f"{weights} is missing: it lies beside {CONFIG_FILE} in an adapter's folder")
    checkpoint = _open(weights, limits, "peft")
    try:
        tensors: dict[str, StoredTensor] = {}
        for name, tensor in checkpoint.tensors.items():
            short = name.removeprefix(_PREFIX)
            if short in tensors:
                raise AdapterError(f"{weights}: {name!r:.200} is there with and without {_PREFIX!r}")
            tensors[short] = tensor
        digest = hashlib.sha256(len(data).to_bytes(8, "little") + data)
        _hash(digest, checkpoint)
    except BaseException:
        checkpoint.close()
        raise
    return StoredAdapter(
        path=path,
        format="peft",
        config=read.config,
        tensors=tensors,
        digest=digest.digest(),
        limits=limits,
        alora=read.alora,
        base=read.base,
        notes=read.notes,
        checkpoint=checkpoint,
    )


def _folder_of(path: Path) -> Path:
    """The folder itself, or the one in it: PEFT puts an adapter of another name than "default" there."""
    if (path / CONFIG_FILE).is_file():
        return path
    try:
        entries = list(itertools.islice(path.iterdir(), _MOST_FOLDERS))
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    found = sorted(entry for entry in entries if (entry / CONFIG_FILE).is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.name for entry in found[:8])
        raise AdapterError(f"{path} holds {len(found)} adapters ({names}): name the folder of one")
    raise ModelNotFoundError(f"{path} holds no {CONFIG_FILE}, nor does a folder in it")


def _config_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1) if path.stat().st_size <= MAX_CONFIG_BYTES else None
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if data is None or len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has more than the {MAX_CONFIG_BYTES} bytes that are allowed")
    return data


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _read_gguf(path: Path, limits: AdapterLimits) -> StoredAdapter:
    checkpoint = _open(path, limits, "gguf")
    try:
        keys = Fields(checkpoint.metadata, path)
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
            value = keys.get(key, str, "")
            if value != wanted:
                raise AdapterError(f"{path}: {key} is {value!r:.80}; that of an adapter is {wanted!r}")
        alpha = keys.get("adapter.lora.alpha", float, 0.0)
        config = AdapterConfig(
            rank=lambda _: None, alpha=lambda _: alpha, architecture=keys.get("general.architecture", str)
        )
        alora = _invocation_tokens(checkpoint.metadata, path)
        base = keys.get("general.base_model.0.name", str, None)
        digest = hashlib.sha256()
        _hash(digest, checkpoint)
    except InvalidFileError as error:
        checkpoint.close()
        raise AdapterError(str(error)) from error
    except BaseException:
        checkpoint.close()
        raise
    return StoredAdapter(
        path=path,
        format="gguf",
        config=config,
        tensors=checkpoint.tensors,
        digest=digest.digest(),
        limits=limits,
        alora=alora,
        base=base,
        notes=() if alpha else ("adapter.lora.alpha is missing or 0: the scale is 1",),
        checkpoint=checkpoint,
    )


def _invocation_tokens(metadata: Mapping[str, Any], path: Path) -> tuple[int, ...] | None:
    key = "adapter.alora.invocation_tokens"
    value = metadata.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list) else value.tolist() if hasattr(value, "tolist") else [value]
    return invocation_of(Fields({key: values}, path), key) or None


# ---- both ------------------------------------------------------------------------------------------------------------


def _open(path: Path, limits: AdapterLimits, format: Literal["peft", "gguf"]) -> Checkpoint:
    """Reads a file within the limits; every error is an `AdapterError`."""
    with _as_adapter_error():
        try:
            size = path.stat().st_size
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error}") from error
        if size > limits.max_bytes:
            raise AdapterError(f"{path} has {size} bytes; {limits.max_bytes} are allowed: raise lora_memory")
        if format == "gguf" and len(split_names(path.name)) > 1:
            raise AdapterError(f"{path} is a part of several; an adapter is one file: merge them with gguf-split")
        checkpoint = (open_safetensors if format == "peft" else open_gguf)(path, copied=limits.copied)
        try:
            _check_tensors(checkpoint, path, format)
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint


def _check_tensors(checkpoint: Checkpoint, path: Path, format: str) -> None:
    if not checkpoint.tensors:
        raise AdapterError(f"{path} holds no tensors: the adapter would do nothing")
    if len(checkpoint.tensors) > MAX_TENSORS:
        raise AdapterError(f"{path} holds {len(checkpoint.tensors)} tensors; at most {MAX_TENSORS} are allowed")
    for name, tensor in checkpoint.tensors.items():
        if tensor.type_name not in _TYPES[format]:
            raise AdapterError(
                f"{path}: tensor {name!r:.200} is of the type {tensor.type_name}; allowed are "
                f"{', '.join(_TYPES[format])}"
            )
        if not tensor.numel:
            raise AdapterError(
                f"{path}: tensor {name!r:.200} has the shape {list(tensor.shape)}, which is empty: it was saved "
                "without its shards being gathered"
            )


@contextmanager
def _as_adapter_error() -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except ModelLoadError as error:
        raise AdapterError(str(error)) from error


def _hash(digest: Any, checkpoint: Checkpoint) -> None:
    """Puts the bytes of a checkpoint's one file into a sum."""
    first = next(iter(checkpoint.tensors.values()))
    assert isinstance(first, FileTensor)
    digest.update(first.file.view(0, first.file.size))


__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "AdapterConfig", "AdapterLimits", "StoredAdapter", "read_adapter"]
