# SPDX-License-Identifier: MIT
"""Read safetensors checkpoints: one file, or the shards of a folder, with headers checked before data is read.

The header's JSON is checked: its dtypes are known, shapes fit their bytes, and data fills the file without holes or
overlaps, as the format demands.
Source: the format section of the safetensors README; the index of Hugging Face's sharded checkpoints.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor, MappedFile, closed_on_error
from candle_vllm.core.quantization.plain import ELEMENTS

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header, as in the reference implementation."""
MAX_TENSORS = 1 << 18
"""Maximum number of tensors of one file; the largest models with separate experts have about 210,000 in all files."""
MAX_ENTRY_BYTES = 4096
MAX_NOTES_BYTES = 8 << 20
MAX_INDEX_BYTES = 100_000_000
MAX_INDEX_ENTRIES = 1 << 20
"""Maximum number of entries of an index, and of tensors of all shards."""
MAX_DIMENSIONS = 16
MAX_ELEMENTS = (1 << 63) - 1
MAX_NAME_BYTES = 1024


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_ENTRIES = msgspec.json.Decoder(_Entry)
_Notes: TypeAlias = dict[str, str] | None


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def open_safetensors(source: Path | str) -> Checkpoint:
    """Open a `.safetensors` file, the shards of an index file, or a folder (see `safetensors_files`).

    Raises:
        ModelNotFoundError: the path or a shard does not exist, or the folder has no safetensors file.
        ModelLoadError: a file cannot be read.
        InvalidFileError: a header or the index is damaged, or two files hold a tensor and no index names one of them.
        UnsupportedModelError: a tensor has an unsupported dtype.
    """
    source = Path(source)
    index = _index_of(source)
    weight_map = _read_index(index) if index is not None else {}
    paths = safetensors_files(source)
    files: list[MappedFile] = []
    tensors: dict[str, FileTensor] = {}
    metadata: dict[str, str] = {}
    with closed_on_error(files):
        for path in paths:
            files.append(MappedFile(path))
            found, notes = _read_header(files[-1])
            for name in found.keys() & tensors.keys():
                if (shard := weight_map.get(name)) != path.name:
                    if shard != tensors[name].file.path.name:
                        raise InvalidFileError(f"tensor {name!r} is both in {tensors[name].path} and in {path}")
                    del found[name]
            tensors.update(found)
            if len(tensors) > MAX_INDEX_ENTRIES:
                raise InvalidFileError(f"{source} holds more than {MAX_INDEX_ENTRIES} tensors")
            metadata.update(notes)
        wrong = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].path.name != shard]
        if wrong:  # a tensor that the model needs is reported as missing when it is loaded
            logger.warning("%s names wrong files for %d tensors, such as %.200r", index, len(wrong), wrong[0])
    return Checkpoint(source, "safetensors", files, tensors, metadata)


def read_safetensors(file: MappedFile, max_header: int) -> Checkpoint:
    """Read the tensors of one file, whose header has at most `max_header` bytes; errors as `open_safetensors`."""
    tensors, notes = _read_header(file, max_header)
    return Checkpoint(file.path, "safetensors", [file], tensors, notes)


def header_bytes(file: MappedFile) -> int | None:
    """Return the length of a file's header, stored in its first 8 bytes; None for an impossible length."""
    length = int.from_bytes(file.buffer[:8], "little")
    return length if file.size >= 8 and length <= min(MAX_HEADER_BYTES, file.size - 8) else None


def safetensors_files(source: Path) -> tuple[Path, ...]:
    """Return the files of a checkpoint, in order of name.

    A `.safetensors` file is returned alone, an index file as its shards. In a folder the files are `model.safetensors`,
    otherwise the shards of `model.safetensors.index.json`, otherwise every `*.safetensors`.

    Raises:
        ModelNotFoundError: the folder has no such file, or a file that the index names is missing.
        InvalidFileError: the index is damaged, or names a file outside its folder.
    """
    index = _index_of(source)
    if index is not None:
        shards = sorted(set(_read_index(index).values()))
        paths = tuple(index.with_name(shard) for shard in shards)
        for path in paths:
            if not path.is_file():
                raise ModelNotFoundError(f"{path} is missing: {index} names it; put all shards into one folder")
        return paths
    if not source.is_dir():
        return (source,)
    if (source / SINGLE_FILE).is_file():
        return (source / SINGLE_FILE,)
    paths = tuple(sorted(source.glob("*.safetensors")))
    if not paths:
        raise ModelNotFoundError(f"{source} holds no *.safetensors file")
    return paths


def _index_of(source: Path) -> Path | None:
    if source.name.endswith(".safetensors.index.json") and not source.is_dir():
        return source
    index = source / INDEX_FILE
    return index if index.is_file() and not (source / SINGLE_FILE).is_file() else None


def _read_index(path: Path) -> dict[str, str]:
    """Return the shard name of each tensor name; a shard's name is a plain file name, but the file may be a link."""
    try:
        size = path.stat().st_size
        if size > MAX_INDEX_BYTES:
            raise InvalidFileError(f"{path} has {size} bytes, at most {MAX_INDEX_BYTES} are allowed")
        data = path.read_bytes()
        if data.count(b":") > MAX_INDEX_ENTRIES:
            raise InvalidFileError(f"{path} names more than {MAX_INDEX_ENTRIES} tensors")
        weight_map = msgspec.json.decode(data, type=_Index).weight_map
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path} does not exist") from error
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidFileError(f"{path} is not an index of a sharded checkpoint: {error}") from error
    if not weight_map:
        raise InvalidFileError(f"{path} names no tensors")
    for shard in set(weight_map.values()):
        if not shard.endswith(".safetensors") or any(sign in shard for sign in "/\\:\0"):
            raise InvalidFileError(
                f"{path} names the shard {shard!r:.200}; a shard is a .safetensors file beside the index"
            )
    return weight_map


def _read_header(file: MappedFile, max_header: int = MAX_HEADER_BYTES) -> tuple[dict[str, FileTensor], dict[str, str]]:
    if file.size < 8:
        raise InvalidFileError(f"{file.path} has {file.size} bytes, a safetensors file at least 8")
    length = header_bytes(file)
    if length is None or length > max_header:
        said = int.from_bytes(file.buffer[:8], "little")
        raise InvalidFileError(
            f"{file.path} announces a header of {said} bytes; the file has {file.size - 8} after its first 8 and "
            f"at most {max_header} are allowed: it is damaged, incomplete or no safetensors file"
        )
    header = file.buffer[8 : 8 + length]
    if header.count(b"{") > MAX_TENSORS + 2 or header.count(b":") > 4 * MAX_TENSORS:  # before objects are created
        raise InvalidFileError(f"{file.path} names more than {MAX_TENSORS} tensors in its header")
    tensors: dict[str, FileTensor] = {}
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        notes = msgspec.json.decode(_bounded(file, entries.pop("__metadata__", b"{}"), MAX_NOTES_BYTES), type=_Notes)
        for name, entry in entries.items():
            read = _ENTRIES.decode(_bounded(file, entry, MAX_ENTRY_BYTES))
            tensors[name] = _place_tensor(file, 8 + length, name, read)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidFileError(f"{file.path}: the header is not that of a safetensors file: {error}") from error
    _check_coverage(file, 8 + length, tensors)
    return tensors, notes or {}


def _bounded(file: MappedFile, value: msgspec.Raw | bytes, most: int) -> msgspec.Raw | bytes:
    if memoryview(value).nbytes > most:
        raise InvalidFileError(f"{file.path}: an entry of the header has more than {most} bytes")
    return value


def _place_tensor(file: MappedFile, data_start: int, name: str, entry: _Entry) -> FileTensor:
    what = f"{file.path}: tensor {name!r:.200}"
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise InvalidFileError(f"{what} has a name of {len(name)} characters, allowed are 1 to {MAX_NAME_BYTES} bytes")
    dtype = ELEMENTS.get(entry.dtype)
    if dtype is None:
        raise UnsupportedModelError(f"{what} has the dtype {entry.dtype!r:.60}; supported: {', '.join(ELEMENTS)}")
    too_many = len(entry.shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in entry.shape) > MAX_ELEMENTS
    if too_many or min(entry.shape, default=0) < 0:
        raise InvalidFileError(
            f"{what} has the shape {entry.shape!r:.200}; allowed are up to {MAX_DIMENSIONS} sizes of at least 0 and "
            f"at most {MAX_ELEMENTS} elements"
        )
    begin, end = entry.data_offsets
    if not 0 <= begin <= end <= file.size - data_start:
        raise InvalidFileError(
            f"{what} has the data offsets {begin} to {end}, the file has {file.size - data_start} bytes of data; "
            "it is damaged or its download is incomplete"
        )
    if math.prod(entry.shape) * dtype.itemsize != end - begin:
        raise InvalidFileError(
            f"{what} has the shape {entry.shape} of {entry.dtype}, which takes {math.prod(entry.shape)} x "
            f"{dtype.itemsize} bytes, but the data offsets {begin} to {end}"
        )
    return FileTensor(name, tuple(entry.shape), entry.dtype, end - begin, file, data_start + begin)


def _check_coverage(file: MappedFile, data_start: int, tensors: Mapping[str, FileTensor]) -> None:
    """Check that each byte of the data belongs to exactly one tensor; a duplicate name shows here as a hole."""
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != position:
            trouble = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise InvalidFileError(
                f"{file.path}: tensor {tensor.name!r:.200} begins at byte {tensor.start} instead of {position}: "
                f"it {trouble}"
            )
        position += tensor.nbytes
    if position != file.size:
        raise InvalidFileError(f"{file.path}: the tensors end at byte {position}, the file at byte {file.size}")
