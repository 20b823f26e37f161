# SPDX-License-Identifier: MIT
"""Checkpoints for the loader: named tensors that stay in a mapped file until they are requested.

`gguf.py` and `safetensors.py` make a `Checkpoint`, and the weight loader reads it tensor by tensor. Both formats are
little-endian, and so is every machine that this library supports.
A mapped file must not be truncated while it is open: the operating system ends a process that reads past its end.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Literal, Protocol

import numpy as np

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import StoredTensor


class MappedFile:
    """A file that is mapped read-only.

    Args:
        copied: read the file into memory instead, for files that may be written meanwhile.

    Attributes:
        path: the file, as the caller named it.
        size: size in bytes, above 0.

    Raises:
        ModelNotFoundError: the file does not exist.
        InvalidFileError: the file is empty.
        ModelLoadError: the file cannot be read, or was closed. MemoryError: there is no memory for it.
    """

    def __init__(self, path: Path, *, copied: bool = False) -> None:
        if not path.is_file():
            raise ModelNotFoundError(f"{path} is not a file; check the spelling of the path")
        try:
            with path.open("rb") as stream:
                self.size = stream.seek(0, 2)
                if self.size == 0:
                    raise InvalidFileError(f"{path} is empty (0 bytes); download or convert it again")
                if copied:
                    self._map = _copy(stream, self.size)
                else:
                    self._map = mmap.mmap(stream.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise MemoryError(f"{path} cannot be mapped") from error
            raise ModelLoadError(f"{path} cannot be mapped: {error}") from error
        self.path = path
        self._copied = copied
        self._bytes: np.ndarray | None = np.frombuffer(self._map, dtype=np.uint8)
        self._bytes.flags.writeable = False

    @property
    def buffer(self) -> mmap.mmap:
        """The mapping itself, to parse a header; the caller must stay within `size`."""
        return self._map

    def view(self, start: int, count: int) -> np.ndarray:
        """Return `count` bytes from `start` as a read-only uint8 array [count], without a copy."""
        if self._bytes is None:
            raise ModelLoadError(f"{self.path} was closed; open the checkpoint again to read its tensors")
        assert 0 <= start <= start + count <= self.size
        return self._bytes[start : start + count]

    def release(self, start: int, count: int) -> None:
        """Let the system drop mapped pages within `count` bytes from `start`; it reads them again if needed."""
        if sys.platform != "win32" and not self._copied:
            first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + count) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > first:
                self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Unmap the file; views that still exist keep the mapping alive."""
        self._bytes = None
        try:
            self._map.close()
        except BufferError:  # a view still exists: the mapping is released with the last view
            return


def _copy(stream: BinaryIO, size: int) -> mmap.mmap:
    """Return page-aligned memory with all bytes of a file."""
    memory = mmap.mmap(-1, size)
    stream.seek(0)
    with memoryview(memory) as whole:
        done = 0
        while done < size and (count := stream.readinto(whole[done:])):  # type: ignore[attr-defined]
            done += count
    if done < size:
        memory.close()
        raise ValueError(f"it became shorter than {size} bytes while it was read")
    return memory


class Closable(Protocol):
    """A file, or an object that owns files."""

    def close(self) -> None: ...


@contextmanager
def closed_on_error(files: Iterable[Closable]) -> Iterator[None]:
    """Close the files if an error leaves the context; files may be added to a list within it."""
    try:
        yield
    except BaseException:
        for file in files:
            file.close()
        raise


@dataclass(frozen=True, slots=True, eq=False)
class FileTensor(StoredTensor):
    """A tensor that is stored contiguously in a mapped file, from the offset `start` on."""

    file: MappedFile
    start: int

    @property
    def path(self) -> Path:
        return self.file.path

    def raw(self) -> np.ndarray:
        data = self.file.view(self.start, self.nbytes)
        rows = math.prod(self.shape[:-1])
        return data.reshape(rows, self.nbytes // rows if rows else 0)

    def file_places(self) -> np.ndarray | None:
        if self.dtype is None:
            return None
        return self.start + ELEMENTS[self.dtype].itemsize * np.arange(self.numel).reshape(self.shape)

    def rows(self, first: int, last: int) -> StoredTensor:
        self._check_cut("rows", first, last, self.shape[:1])
        each, shape = self.nbytes // self.shape[0], (last - first, *self.shape[1:])
        start, nbytes = self.start + each * first, each * (last - first)
        return dataclasses.replace(self, shape=shape, nbytes=nbytes, start=start)

    def release(self) -> None:
        self.file.release(self.start, self.nbytes)


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """The tensors of a model, from one file or several.

    Attributes:
        path: the opened file (the first of several) or folder.
        tensors: tensors by name, in file order.
        metadata: the file's metadata about the model; only strings for safetensors.
    """

    def __init__(
        self,
        path: Path,
        format: Literal["gguf", "safetensors"],
        files: Iterable[MappedFile],
        tensors: Mapping[str, StoredTensor],
        metadata: Mapping[str, object],
    ) -> None:
        self.path = path
        self.format: Literal["gguf", "safetensors"] = format
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(dict(tensors))
        self.metadata: Mapping[str, object] = MappingProxyType(dict(metadata))
        self._files = tuple(files)

    def with_tensors(self, tensors: Mapping[str, StoredTensor]) -> Checkpoint:
        """Return the same files and metadata with other tensors: renamed tensors, or combinations of stored ones."""
        return Checkpoint(self.path, self.format, self._files, tensors, self.metadata)

    def close(self) -> None:
        """Unmap the files; loaded tensors stay valid."""
        for file in self._files:
            file.close()

    def __exit__(self, *_: object) -> None:
        self.close()
