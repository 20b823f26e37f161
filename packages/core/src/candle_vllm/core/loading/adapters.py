# SPDX-License-Identifier: MIT
"""Read LoRA adapters from a PEFT folder or a GGUF file, independent of the model.

With `AdapterLimits.copied`, weights are copied into memory before they are parsed: somebody may write to the file while
a server runs, reading past the end of a truncated mapped file ends the process, and the digest must belong to the
packed bytes. In a folder only `adapter_config.json` and `adapter_model.safetensors` are read, never a pickle.
Source: PEFT's checkpoint format; `convert_lora_to_gguf.py` and `llama-adapter.cpp` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import AdapterError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.adapter_config import MAX_CONFIG_BYTES, AdapterConfig, invocation_of, parse_config
from candle_vllm.core.loading.gguf import open_gguf, split_names
from candle_vllm.core.loading.safetensors import header_bytes, read_safetensors
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor, MappedFile, closed_on_error
from candle_vllm.core.quantization.tensors import StoredTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 16 << 20
"""Maximum bytes of a weight file's header; separate matrices of 128 experts in 48 layers take 5 MB."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_TYPES = {"safetensors": ("F32", "F16", "BF16"), "gguf": ("F32", "F16", "BF16", "Q8_0")}
_PREFIX = "base_model.model."
_INVOKING = "adapter.alora.invocation_tokens"
_MOST_FOLDERS = 1000  # maximum number of entries of a folder that are searched for an adapter's folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """Limits of an adapter, and how its weights are read.

    Attributes:
        max_rank: maximum rank, compared with the configuration here, and with the tensors by `fit_adapter`.
        max_bytes: maximum number of bytes of the weight file, checked before it is read.
        copied: read the file into memory, so that concurrent writes to it do no harm.
    """

    max_rank: int = 256
    max_bytes: int = 4 << 30
    copied: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter(AbstractContextManager["StoredAdapter"]):
    """Adapter as stored in its files.

    Attributes:
        format: "peft" or "gguf", the format of the tensors' names.
        digest: SHA-256 of the bytes of configuration and weights.
        kind: digest of the header and of the configuration's keys with an effect, without the weights: adapters of the
            same kind are fitted and packed in the same way. None for a GGUF file or a header of impossible length.
        header: reads names and offsets of the tensors.
    """

    path: Path
    format: Literal["peft", "gguf"]
    config: AdapterConfig
    digest: bytes
    kind: bytes | None = None
    limits: AdapterLimits
    file: MappedFile
    header: Callable[[], Mapping[str, StoredTensor]]

    @functools.cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Tensors by name, PEFT's without "base_model.model."; the first access may raise AdapterError."""
        return self.header()

    @property
    def data(self) -> NDArray[np.uint8]:
        """Bytes of the weights, for an adapter with a `kind`: everything after the file's header."""
        begins = 8 + (header_bytes(self.file) or 0)
        return self.file.view(begins, self.file.size - begins)

    def close(self) -> None:
        """Release the file's memory; tensors that were read stay valid."""
        self.file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def read_adapter(path: Path | str, limits: AdapterLimits = AdapterLimits()) -> StoredAdapter:
    """Open an adapter: a folder that PEFT wrote, a folder with one such folder (as PEFT names it), or a GGUF file.

    Raises:
        ModelNotFoundError: the path does not exist, or a file of the adapter is missing.
        AdapterError: the path is another kind of file, or the folder of several adapters; or the adapter is damaged,
            exceeds the limits, or has unsupported settings.
    """
    stored = open_adapter(path, limits)
    with closed_on_error([stored]):
        _ = stored.tensors  # the first access reads the header
    return stored


def open_adapter(path: Path | str, limits: AdapterLimits = AdapterLimits()) -> StoredAdapter:
    """As `read_adapter`, but errors in a PEFT file's header are raised at the first access to its tensors."""
    path = Path(path)
    if path.is_dir():
        return _read_peft(path, limits)
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist; an adapter is a PEFT folder or a GGUF file")
    if path.suffix == ".safetensors":
        raise AdapterError(f"{path} is a weights file; name its folder, which must also contain {CONFIG_FILE}")
    if path.suffix != ".gguf":
        raise AdapterError(f"{path} is neither a folder nor a .gguf file; an adapter is a PEFT folder or a GGUF file")
    return _read_gguf(path, limits)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


def _read_peft(path: Path, limits: AdapterLimits) -> StoredAdapter:
    folder = _folder_of(path)
    config_path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    data = _config_bytes(config_path)
    config = parse_config(data, config_path, limits.max_rank)
    if not weights.is_file():
        if pickles := [name for name in _PICKLES if (folder / name).exists()]:
            raise AdapterError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is read, and is never opened: save the "
                f"adapter as {WEIGHTS_FILE} (PEFT's save_pretrained with safe_serialization=True)"
            )
        raise ModelNotFoundError(f"{weights} is missing: an adapter's folder needs it beside {CONFIG_FILE}")
    _check_size(weights, limits)
    with _as_adapter_error(weights):
        file = MappedFile(weights, copied=limits.copied)

    def header() -> Mapping[str, StoredTensor]:
        with _as_adapter_error(weights):
            checkpoint = read_safetensors(file, MAX_HEADER_BYTES)
            _check_tensors(checkpoint, weights)
            tensors: dict[str, StoredTensor] = {}
            for name, tensor in checkpoint.tensors.items():
                short = name.removeprefix(_PREFIX)
                if short in tensors:
                    raise AdapterError(f"{weights}: tensor {name!r:.200} appears both with and without {_PREFIX!r}")
                tensors[short] = tensor
            return tensors

    digest = hashlib.sha256(len(data).to_bytes(8, "little") + data)
    digest.update(file.view(0, file.size).data)
    return StoredAdapter(
        path=path,
        format="peft",
        config=config,
        digest=digest.digest(),
        kind=_kind(config.effect, file),
        limits=limits,
        file=file,
        header=header,
    )


def _kind(effect: bytes, file: MappedFile) -> bytes | None:
    """Compute `StoredAdapter.kind`; None for a file without a header."""
    length = header_bytes(file)
    if length is None:
        return None
    made = hashlib.sha256(b"%d %d %d " % (len(effect), length, file.size) + effect)
    made.update(file.view(8, length).data)
    return made.digest()


def _folder_of(path: Path) -> Path:
    """Return the folder or its only adapter folder: PEFT writes adapters that are not named "default" to subfolders."""
    if (path / CONFIG_FILE).is_file():
        return path
    with _as_adapter_error(path):
        entries = list(itertools.islice(path.iterdir(), _MOST_FOLDERS))
    found = sorted(entry for entry in entries if (entry / CONFIG_FILE).is_file())
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(entry.name for entry in found[:8])
        raise AdapterError(f"{path} holds {len(found)} adapters ({names}): name the folder of one")
    raise ModelNotFoundError(f"{path} holds no {CONFIG_FILE}, nor does a folder in it")


def _config_bytes(path: Path) -> bytes:
    with _as_adapter_error(path), path.open("rb") as stream:
        data = stream.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has more than the {MAX_CONFIG_BYTES} bytes that are allowed")
    return data


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _read_gguf(path: Path, limits: AdapterLimits) -> StoredAdapter:
    _check_size(path, limits)
    if len(split_names(path.name)) > 1:
        raise AdapterError(
            f"{path} is one part of a split file; an adapter must be one file: merge the parts with gguf-split"
        )
    with _as_adapter_error(path):
        checkpoint = open_gguf(path, copied=limits.copied, max_header=MAX_HEADER_BYTES)
    with closed_on_error([checkpoint]), _as_adapter_error(path):
        _check_tensors(checkpoint, path)
        first = next(iter(checkpoint.tensors.values()))
        assert isinstance(first, FileTensor)
        keys = Fields(checkpoint.metadata, path)
        for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
            value = keys.get(key, str, "")
            if value != wanted:
                raise AdapterError(f"{path}: {key} is {value!r:.80}; an adapter needs {wanted!r}")
        alpha, invoking = keys.get("adapter.lora.alpha", float, 0.0), checkpoint.metadata.get(_INVOKING)
        tokens = Fields({_INVOKING: invoking.tolist() if isinstance(invoking, np.ndarray) else invoking}, path)
        config = AdapterConfig(
            rank=lambda _: None,
            alpha=lambda _: alpha,
            alora=invocation_of(tokens, _INVOKING),
            base=keys.get("general.base_model.0.name", str, None),
            architecture=keys.get("general.architecture", str),
            notes=() if alpha else ("adapter.lora.alpha is missing or 0: the scale is 1",),
        )
        digest = hashlib.sha256(first.file.view(0, first.file.size).data)
    return StoredAdapter(
        path=path,
        format="gguf",
        config=config,
        digest=digest.digest(),
        limits=limits,
        file=first.file,
        header=lambda: checkpoint.tensors,
    )


# ---- both ------------------------------------------------------------------------------------------------------------


def _check_size(path: Path, limits: AdapterLimits) -> None:
    with _as_adapter_error(path):
        size = path.stat().st_size
    if size > limits.max_bytes:
        raise AdapterError(f"{path} has {size} bytes; at most {limits.max_bytes} are allowed: raise lora_memory")


def _check_tensors(checkpoint: Checkpoint, path: Path) -> None:
    types = _TYPES[checkpoint.format]
    if not checkpoint.tensors:
        raise AdapterError(f"{path} holds no tensors: the adapter would do nothing")
    for name, tensor in checkpoint.tensors.items():
        if tensor.type_name not in types:
            raise AdapterError(
                f"{path}: tensor {name!r:.200} is of the type {tensor.type_name}; allowed are {', '.join(types)}"
            )
        if not tensor.numel:
            raise AdapterError(
                f"{path}: tensor {name!r:.200} has the shape {list(tensor.shape)}, which is empty: the training's "
                "shards were not gathered before the adapter was saved"
            )


@contextmanager
def _as_adapter_error(path: Path) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except ModelLoadError as error:
        raise AdapterError(str(error)) from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
