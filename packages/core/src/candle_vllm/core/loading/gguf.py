# SPDX-License-Identifier: MIT
"""Read GGUF files, v2 and v3, little-endian: metadata and tensor table, every number checked before it is used.

No count, length or offset of the file is trusted: each is checked against the file's size before anything is read or
allocated, so a damaged or hostile file only causes an error.

Keys and tensor names must be valid UTF-8. In a single string value, invalid bytes become U+FFFD. In lists of strings
they become lone surrogates (`surrogateescape`), from which `text.encode("utf-8", "surrogateescape")` restores them:
some vocabularies have tokens of raw bytes, which must stay different.
Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's naming of split files.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import MappingProxyType

import numpy as np

from candle_vllm.core.errors import InvalidFileError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.loading.tensors import Checkpoint, FileTensor, MappedFile, closed_on_error
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 64 << 20
"""Maximum bytes of metadata and tensor table together; the largest vocabularies take about 20 MB."""
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAYS = 1 << 16
MAX_ITEMS = 1 << 21
"""Maximum number of strings and numbers in all Python lists together; 262,144 tokens have about 520,000 merges."""
MAX_KEY_BYTES = (1 << 16) - 1
MAX_TENSOR_NAME_BYTES = 256
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_ELEMENTS = (1 << 63) - 1
LIST_LENGTH = 1024
"""Maximum length of arrays of numbers that become lists; longer ones become numpy arrays."""

MetadataValue = str | int | float | bool | list | np.ndarray

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9  # codes of value types, like the keys of `_NUMBERS`
_NUMBERS = MappingProxyType(
    {code: np.dtype(name) for code, name in enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"])}
    | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
)
_SMALLEST_PAIR = 8 + 1 + 4 + 1  # key length, one byte of key, value type, one byte of value
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # name length, one byte of name, dimension count, one dimension, type, offset
_OTHER_KINDS = MappingProxyType({
    "imatrix": ("imatrix", "an importance matrix: use --imatrix"),
    "adapter": ("adapter", "an adapter: use --lora-modules (with quantize: --lora)"),
    "mmproj": ("mmproj", "the vision tower of a model: use --mmproj"),
    "clip": ("mmproj", "the vision tower of a model: use --mmproj"),
})  # fmt: skip
"""By `general.type` or `general.architecture` of a file that is not a model: its kind, and the flag to use."""
_PART_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


class _Header:
    """Cursor over the header: reads a value, or raises an error with its offset."""

    def __init__(self, file: MappedFile, most: int | None = None) -> None:
        self.file = file
        self.position = 0
        self.end = min(file.size, most or MAX_HEADER_BYTES)
        self.arrays = self.items = 0
        self.types: dict[str, tuple[int, int]] = {}

    def error(self, what: str) -> InvalidFileError:
        return InvalidFileError(f"{self.file.path}: {what} (at byte {self.position} of {self.file.size})")

    def need(self, count: int, what: str) -> None:
        if count > self.end - self.position:
            limit = f"the file's end at byte {self.end}"
            if self.end < self.file.size:
                limit = f"the header limit of {self.end} bytes"
            raise self.error(f"{what} takes {count} bytes and would pass {limit}; the file is damaged or incomplete")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        start, self.position = self.position, self.position + count
        return self.file.buffer[start : self.position]

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def count(self, what: str, smallest: int, most: int) -> int:
        """Read a count of items that take at least `smallest` bytes each."""
        count = self.u64(f"the number of {what}")
        if count > most:
            raise self.error(f"{count} {what}, at most {most} are allowed")
        self.need(count * smallest, f"{count} {what}")
        return count

    def list_of(self, count: int, what: str) -> None:
        """Count the items of a list that will be created, and check the limit for all lists."""
        self.items += count
        if self.items > MAX_ITEMS:
            raise self.error(f"with {what} the metadata lists {self.items} values, at most {MAX_ITEMS} are allowed")

    def name(self, what: str, most: int) -> str:
        length = self.u64(f"the length of {what}")
        if not 0 < length <= most:
            raise self.error(f"{what} has {length} bytes, allowed are 1 to {most}")
        data = self.take(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8: {error.reason} in {data[:60]!r}") from error

    def value(self, type_code: int, what: str, depth: int = 0) -> MetadataValue:
        if type_code in _NUMBERS:
            return self.numbers(_NUMBERS[type_code], 1, what).item()
        if type_code == _STRING:
            return self.take(self.u64(f"the length of {what}"), what).decode(errors="replace")
        if type_code == _ARRAY:
            return self.array(what, depth + 1)
        raise self.error(f"{what} has the unknown value type {type_code}")

    def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        data = np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype)
        if dtype.kind == "b" and (data.view(np.uint8) > 1).any():
            raise self.error(f"{what} has a boolean that is neither 0 nor 1")
        return data

    def array(self, what: str, depth: int) -> list | np.ndarray:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        self.arrays += 1
        if self.arrays > MAX_ARRAYS:
            raise self.error(f"with {what} the metadata has more than {MAX_ARRAYS} arrays")
        type_code = self.u32(f"the element type of {what}")
        count = self.u64(f"the length of {what}")
        if type_code in _NUMBERS:
            numbers = self.numbers(_NUMBERS[type_code], count, what)
            if count > LIST_LENGTH:
                return numbers
            self.list_of(count, what)
            return numbers.tolist()
        if type_code == _STRING:
            return self.strings(count, what)
        if type_code == _ARRAY:
            self.need(count * 12, what)  # an array has at least an element type and a length
            return [self.array(what, depth + 1) for _ in range(count)]
        raise self.error(f"{what} is an array of the unknown value type {type_code}")

    def strings(self, count: int, what: str) -> list[str]:
        """Read strings in one loop without calls, because vocabularies have hundreds of thousands of them."""
        self.need(count * 8, what)
        self.list_of(count, what)
        buffer, position, end, read_length = self.file.buffer, self.position, self.end, _U64.unpack_from
        texts: list[str] = []
        for index in range(count):
            start = position + 8
            stop = start + (read_length(buffer, position)[0] if start <= end else 8)
            if stop > end:
                self.position = position
                self.need(stop - position, f"entry {index} of {what}")
            texts.append(buffer[start:stop].decode("utf-8", "surrogateescape"))
            position = stop
        self.position = position
        return texts


class GgufFile:
    """One GGUF file, whose header is read.

    Args:
        copied: read the file into memory instead of mapping it; see `MappedFile`.
        max_header: maximum number of bytes of the header; None is `MAX_HEADER_BYTES`.

    Attributes:
        metadata: strings, numbers, booleans and lists; long arrays of numbers are read-only numpy arrays.
        types: by metadata key, the code of the value's type and, for arrays, of the element type (otherwise 0).
        tensors: tensors by name, in the order of the file's table.

    Raises:
        ModelNotFoundError: the file does not exist.
        InvalidFileError: the file is empty, damaged, or not a GGUF file.
        UnsupportedModelError: another version, big-endian, or a tensor type that this library does not know.
        ModelLoadError: the file cannot be read.
    """

    def __init__(self, path: Path | str, *, copied: bool = False, max_header: int | None = None) -> None:
        self.path = Path(path)
        self.file = MappedFile(self.path, copied=copied)
        with closed_on_error([self.file]):
            header = _Header(self.file, max_header)
            num_tensors, num_pairs = _read_beginning(header)
            self.metadata = _read_metadata(header, num_pairs)
            self.types = header.types
            self.tensors = _read_tensors(header, num_tensors, _alignment(header, self.metadata))

    def close(self) -> None:
        """Unmap the file; loaded tensors stay valid."""
        self.file.close()


def _read_beginning(header: _Header) -> tuple[int, int]:
    """Check the magic and the version; return the numbers of tensors and of metadata entries."""
    path, magic = header.file.path, header.take(4, "the magic")
    if magic != MAGIC:
        raise InvalidFileError(f"{path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    version = header.u32("the version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedModelError(f"{path} is a big-endian GGUF file; convert the model to little-endian")
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{path} is GGUF version {version}; versions 2 and 3 are supported: convert the model with a current tool"
        )
    tensors = header.count("tensors", _SMALLEST_TENSOR, MAX_TENSORS)
    return tensors, header.count("metadata entries", _SMALLEST_PAIR, MAX_PAIRS)


def _read_metadata(header: _Header, count: int, until: str = "") -> dict[str, MetadataValue]:
    """Read the metadata; with `until`, only the entries before the first key with this prefix."""
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        key = header.name(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise header.error(f"metadata key {key!r} appears twice")
        if until and key.startswith(until):
            break
        code, start = header.u32(f"the type of {key!r}"), header.position
        metadata[key] = header.value(code, f"the value of {key!r}")
        header.types[key] = code, _U32.unpack_from(header.file.buffer, start)[0] if code == _ARRAY else 0
    return metadata


def file_kind(path: Path) -> str:
    """Return the kind of a GGUF file: "model", "imatrix", "adapter" or "mmproj".

    Only the metadata before the vocabulary is read. Files of old tools show their kind in `general.architecture` and
    lack `general.type`. Errors are as for `GgufFile`.
    """
    with closing(MappedFile(path)) as file:
        header = _Header(file)
        _, num_pairs = _read_beginning(header)
        return kind_of(_read_metadata(header, num_pairs, until="tokenizer."))


def kind_of(metadata: Mapping[str, object]) -> str:
    """Return the kind of a file with this metadata; see `file_kind`."""
    for key in ("general.architecture", "general.type"):
        if (found := _OTHER_KINDS.get(str(metadata.get(key)))) is not None:
            return found[0]
    return "model"


def check_kind(metadata: Mapping[str, object], path: Path) -> None:
    """Raise UnsupportedModelError for a file that is not a model; the message names the flag that accepts the file."""
    kind = kind_of(metadata)
    if kind != "model":
        what = next(what for name, what in _OTHER_KINDS.values() if name == kind)
        raise UnsupportedModelError(f"{path}: this is {what} and name the model with -m")


def _alignment(header: _Header, metadata: dict[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise header.error(f"general.alignment is {value!r:.60}, it must be a power of two")
    if value > MAX_ALIGNMENT:
        raise header.error(f"general.alignment is {value}, at most {MAX_ALIGNMENT} is allowed")
    return value


def _read_tensors(header: _Header, count: int, alignment: int) -> dict[str, FileTensor]:
    entries = [_read_tensor_entry(header, index) for index in range(count)]
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, FileTensor] = {}
    for name, shape, ggml_type, offset in entries:
        if name in tensors:
            raise header.error(f"tensor {name!r} appears twice")
        tensor = _place_tensor(header, name, shape, ggml_type, data_start, offset)
        if offset % alignment:
            raise header.error(f"tensor {name!r} begins at offset {offset}, no multiple of the alignment {alignment}")
        tensors[name] = tensor
    _check_overlaps(header, tensors)
    return tensors


def _read_tensor_entry(header: _Header, index: int) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = header.name(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    count = header.u32(f"the number of dimensions of {name!r}")
    if not 1 <= count <= MAX_DIMENSIONS:
        raise header.error(f"tensor {name!r} has {count} dimensions, allowed are 1 to {MAX_DIMENSIONS}")
    dimensions = struct.unpack(f"<{count}Q", header.take(8 * count, f"the shape of {name!r}"))
    if math.prod(max(size, 1) for size in dimensions) > MAX_ELEMENTS:
        raise header.error(
            f"tensor {name!r} has the dimensions {dimensions}: at most {MAX_ELEMENTS} elements are allowed"
        )
    code = header.u32(f"the type of {name!r}")
    try:
        ggml_type = GGMLQuantizationType(code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{header.file.path}: tensor {name!r} has the unknown ggml type {code}, of another program or another "
            "version of llama.cpp: take a file of one of the usual types, such as Q4_K_M or Q8_0"
        ) from error
    return name, dimensions[::-1], ggml_type, header.u64(f"the offset of {name!r}")


def _place_tensor(
    header: _Header, name: str, shape: tuple[int, ...], ggml_type: GGMLQuantizationType, data_start: int, offset: int
) -> FileTensor:
    size, width = ggml_type.block
    if shape[-1] % size:
        raise header.error(
            f"tensor {name!r} has rows of {shape[-1]} elements, {ggml_type.name} needs a multiple of {size}"
        )
    nbytes, start = math.prod(shape) // size * width, data_start + offset
    if start + nbytes > header.file.size:
        raise header.error(
            f"tensor {name!r} takes bytes {start} to {start + nbytes} and would pass the file's end at byte "
            f"{header.file.size}; the file is damaged or its download is incomplete"
        )
    return FileTensor(name, shape, ggml_type.name, nbytes, header.file, start)


def _check_overlaps(header: _Header, tensors: dict[str, FileTensor]) -> None:
    previous: FileTensor | None = None
    for tensor in sorted((each for each in tensors.values() if each.nbytes), key=lambda tensor: tensor.start):
        if previous is not None and tensor.start < previous.start + previous.nbytes:
            raise header.error(
                f"tensors {previous.name!r} and {tensor.name!r} overlap: the first ends at byte "
                f"{previous.start + previous.nbytes}, the second begins at byte {tensor.start}"
            )
        previous = tensor


def split_names(name: str) -> tuple[str, ...]:
    """Return the file names of all parts of a split model, given one: `x-00002-of-00003.gguf` gives three names.

    A name of another form is returned alone.
    """
    match = _PART_NAME.fullmatch(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return (name,)
    return tuple(f"{match[1]}-{part:05d}-of-{match[3]}.gguf" for part in range(1, int(match[3]) + 1))


def open_gguf(path: Path | str, *, copied: bool = False, max_header: int | None = None) -> Checkpoint:
    """Open a GGUF file, or all parts of a split model, given any part.

    `copied` and `max_header` are as for `GgufFile`. The metadata of the first part is used; it is complete.

    Raises:
        ModelNotFoundError: a file or a part is missing, or a part of a split model is not named as one.
        InvalidFileError: a part is damaged, or the parts do not belong together.
        UnsupportedModelError, ModelLoadError: see `GgufFile`.
    """
    path = Path(path)
    names = split_names(path.name)
    paths = [path.with_name(name) for name in names]
    for number, part in enumerate(paths, start=1):
        if len(paths) > 1 and not part.is_file():
            raise ModelNotFoundError(
                f"{part} is missing: it is part {number} of {len(paths)} of the model; put all parts into one folder"
            )
    parts: list[GgufFile] = []
    with closed_on_error(parts):
        for part in paths:
            parts.append(GgufFile(part, copied=copied, max_header=max_header))
            _check_part(parts[-1], len(parts) - 1, len(paths))
            if len(parts) > 1:
                parts[-1].metadata.clear()  # to limit the memory of all parts' metadata together
        tensors = _merge(parts)
    return Checkpoint(paths[0], "gguf", [part.file for part in parts], tensors, parts[0].metadata)


def _check_part(part: GgufFile, number: int, count: int) -> None:
    split_number, split_count = _split_field(part, "split.no"), _split_field(part, "split.count")
    if count == 1 and split_count is not None and split_count > 1:
        raise ModelNotFoundError(
            f"{part.path} is one of {split_count} parts of a split model, but not named as one; name the parts "
            f"<model>-00001-of-{split_count:05d}.gguf and so on, in one folder"
        )
    if count > 1 and (split_number, split_count) != (number, count):
        raise InvalidFileError(
            f"{part.path} is named as part {number + 1} of {count}, but its metadata has split.no {split_number} and "
            f"split.count {split_count} instead of {number} and {count}"
        )


def _split_field(part: GgufFile, key: str) -> int | None:
    value = part.metadata.get(key)
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise InvalidFileError(f"{part.path}: {key} is {value!r:.60}, it must be an integer")
    return value


def _merge(parts: list[GgufFile]) -> dict[str, FileTensor]:
    tensors: dict[str, FileTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise InvalidFileError(f"tensor {name!r} is both in {tensors[name].path} and in {part.path}")
            tensors[name] = tensor
    expected = _split_field(parts[0], "split.tensors.count")
    if len(parts) > 1 and expected not in (None, len(tensors)):
        raise InvalidFileError(
            f"{parts[0].path}: split.tensors.count is {expected}, but the {len(parts)} parts hold "
            f"{len(tensors)} tensors"
        )
    return tensors
