# SPDX-License-Identifier: MIT
"""Packed matrices of a model in a file, so that a later start maps them instead of packing the model's tensors again.

A file is a head, a table in JSON and the matrices, each from a multiple of 64 bytes on. The table has a checksum, and
so has each matrix. A file that is damaged, or that was made from other files or by other code, is written again.

Recorded steps need weights in huge pages (`weight_memory.py`). If the system maps the file in huge pages, as newer
Linux kernels do, matrices are used where they are mapped. Otherwise, and for memory that is bound to NUMA nodes or that
must have the addresses of an earlier load, they are copied.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from candle_vllm.core.kernels.cpu_runtime.backend import RecordedBackend
from candle_vllm.core.kernels.cpu_runtime.operation import address_of
from candle_vllm.core.kernels.cpu_runtime.weight_memory import MAPPED, WeightMemory
from candle_vllm.core.quantization.tensors import Backend, StoredTensor
from candle_vllm.core.threads import AT_EXIT, LOADED_PART, read_or_nothing

logger = logging.getLogger(__name__)

SUFFIX = ".weights"
FITS = ".fits"  # of the file beside, with what the model's quantised keys are fitted to
MOST_BYTES = 20 * 10**9  # maximum bytes of all files in a folder; also at most half of the space free without them
_MAGIC: Final = b"candle-vllm weights 1\n"
_HEAD = struct.Struct("<22s2xQ32s")  # magic, bytes of the table, SHA-256 of the table
_HUGE = 2 << 20  # bytes of a huge page; the first matrix begins at a multiple
_WRITTEN = 32 << 20  # bytes of a write, so large that Linux caches the file in huge pages
_SUMMED = 1 << 17  # 64-bit words of which `checksum` computes one sum
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and newer
_SILENCE = 60  # seconds without a write after which a .tmp file counts as left by an ended process
_PATIENCE = 10.0  # maximum seconds that an ending process waits for its file to be written


class PackedFile:
    """Packed matrices of one load: read from the file if its key is `about`, else packed and written to the file."""

    def __init__(self, path: Path, about: str) -> None:
        self._path, self._about = path, about
        self._table: Mapping[str, Any] = {}
        self._data, self._huge = np.empty(0, np.uint8), False
        self._parts: Counter[object] = Counter()
        self._all: dict[str, tuple[Any, Any, str | None]] = {}  # source, matrix, why it was decoded
        self._memories: set[WeightMemory] = set()
        self._lacking, self._ends = False, False
        self._written = 0  # bytes
        self._open()

    def pack(self, stored: StoredTensor, backend: RecordedBackend) -> tuple[Any, str | None]:
        """Return the packed matrix of a tensor, from the file if the file has it."""
        part, memory = LOADED_PART.get(), backend.memory
        key = f"{part!s:>8} {self._parts[part]:>8}"  # sorts in the order of loading
        self._parts[part] += 1  # only one thread loads a part
        self._memories.add(memory)
        settings = [None if backend.kind is None else backend.kind.name, backend.groups, backend.floats_kept]
        made_of = [stored.name, stored.type_name, list(stored.shape), *settings, list(backend.words)]
        found: tuple[Any, str | None] | None = memory.mapped.get(key) or self._find(key, made_of, memory)
        if found is None:
            found = stored.pack_for(backend)
            self._lacking = self._lacking or _can_keep(found[0])
        if _can_keep(found[0]):
            self._all[key] = made_of, found[0], found[1]
        return found

    def finish(self) -> None:
        """Write the file in a thread of low priority if it lacks matrices; otherwise log what was read."""
        for memory in self._memories:
            memory.kept = self._path, self._about
        size = sum(matrix.nbytes for _, matrix, _ in self._all.values())
        if self._lacking:
            thread = threading.Thread(target=self._write, args=(size,), name="packed-weights", daemon=True)
            for memory in self._memories:
                memory.writer = thread
            AT_EXIT[thread] = atexit.register(partial(self._end, thread, size, time.monotonic()))
            thread.start()
        else:
            with suppress(OSError):
                make_room(self._path, 0)  # deletes leftover .tmp files
            how = "mapped" if self._huge else "read"
            logger.info("packed weights: %.1f MB %s from %s", size / 1e6, how, self._path.parent)

    def _open(self) -> None:
        try:
            with self._path.open("rb") as file:
                magic, length, digest = _HEAD.unpack(file.read(_HEAD.size).ljust(_HEAD.size))
                size = os.fstat(file.fileno()).st_size
                if magic != _MAGIC or length > size or hashlib.sha256(text := file.read(length)).digest() != digest:
                    raise ValueError("it is damaged, or no file of packed weights")
                table = json.loads(text)
                start = _start(length)
                if table["about"] != self._about:
                    return  # made from other files, or by other code
                if size != start + table["bytes"]:
                    raise ValueError(f"it has {size} bytes instead of {start + table['bytes']}")
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.utime(self._path)  # the time of the file's last use
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the packed weights in %s are written again: %s", self._path, error)
            return
        if sys.platform == "linux":
            with suppress(OSError):  # an older Linux kernel
                mapped.madvise(mmap.MADV_HUGEPAGE)
                mapped.madvise(_POPULATE_READ)
        whole = np.frombuffer(mapped, np.uint8)
        self._table, self._data, self._huge = table["matrices"], whole[start:], in_huge_pages(whole)

    def _find(self, key: str, made_of: Any, memory: WeightMemory) -> tuple[Any, str | None] | None:
        entry = self._table.get(key)
        if entry is None or entry["of"] != made_of:
            return None
        raw = self._data[entry["at"] : entry["at"] + entry["bytes"]]
        if raw.size != entry["bytes"] or checksum(raw) != entry["sum"]:
            logger.warning("the packed weights in %s are damaged and are written again", self._path)
            self._table = {}
            return None
        tiles, fields = entry["tiles"], dict(entry["fields"])
        made, kind = _classes()[entry["class"]]
        if "kind" in fields:
            fields["kind"] = kind(fields["kind"])
        if self._huge and memory.can_map:
            found = made(**fields, data=raw.reshape(tiles, -1)), entry["why"]
            MAPPED.add(found[0])
            memory.mapped[key] = found
            return found
        data = memory.take(raw.size, tiles)
        np.copyto(data, raw)
        return made(**fields, data=data.reshape(tiles, -1)), entry["why"]

    def _end(self, thread: threading.Thread, size: int, began: float) -> None:
        """Wait for the file while it seems to be written within `_PATIENCE` seconds, then end the thread."""
        last = time.monotonic() + _PATIENCE
        try:
            rest = 0.0
            while thread.is_alive() and time.monotonic() + rest < last:
                thread.join(0.1)
                if self._written:
                    rest = (size - self._written) * (time.monotonic() - began) / self._written
        finally:
            self._ends = True
            thread.join()

    def _write(self, size: int) -> None:
        """Write the file atomically; on an error, log it and delete the unfinished file."""
        if sys.platform == "linux":
            with suppress(OSError):  # this thread only
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            if not make_room(self._path, size):
                return
            table, at, every = dict[str, Any](), 0, sorted(self._all.items(), key=lambda each: each[0])
            for key, (made_of, matrix, why) in every:
                names = {each.name for each in dataclasses.fields(matrix)} - {"data", "order"}
                entry = {"of": made_of, "why": why, "class": type(matrix).__name__}
                entry["fields"] = {name: int(getattr(matrix, name)) for name in sorted(names)}
                place = {"at": at, "bytes": matrix.nbytes, "tiles": len(matrix.data), "sum": checksum(matrix.data)}
                table[key], at = entry | place, at + matrix.nbytes
            text = json.dumps({"about": self._about, "bytes": at, "matrices": table}).encode()
            head = _HEAD.pack(_MAGIC, len(text), hashlib.sha256(text).digest()) + text
            head = np.frombuffer(head.ljust(_start(len(text)), b"\0"), np.uint8)
            with part.open("xb") as file:
                for chunk in _chunks([head, *(matrix.data.reshape(-1) for _, (_, matrix, _) in every)]):
                    if self._ends:
                        raise InterruptedError("the model was closed before the file was written")
                    self._written += file.write(chunk.data)
            part.replace(self._path)
            said = "packed weights: %.1f MB saved in %s (--packed-cache off disables this)"
            logger.info(said, size / 1e6, self._path.parent)
        except OSError as error:
            level = logging.INFO if self._ends else logging.WARNING  # the next start packs, and saves, them
            logger.log(level, "packed weights cannot be saved in %s: %s", self._path.parent, error)
            with suppress(OSError):
                part.unlink(missing_ok=True)
        finally:
            self._all.clear()
            atexit.unregister(AT_EXIT.pop(threading.current_thread()))


PACKED: ContextVar[PackedFile | None] = ContextVar("PACKED", default=None)
"""Packed matrices of the model that is being loaded, if they are stored in a file."""


def pack(stored: StoredTensor, backend: Backend[tuple[Any, str | None]]) -> tuple[Any, str | None]:
    """Return a tensor packed for a backend, from the file of `PACKED` if the file has it."""
    file = PACKED.get()
    if file is None or not isinstance(backend, RecordedBackend):
        return stored.pack_for(backend)
    return file.pack(stored, backend)


def make_room(path: Path, size: int) -> bool:
    """Delete old .tmp files, and the least recently used files until `size` bytes fit; return whether they can."""
    files, total, now = list[tuple[float, int, Path]](), 0, time.time()
    for each in path.parent.iterdir():
        with suppress(FileNotFoundError):  # another process may be deleting the same files
            info = each.lstat()
            if each.suffix == ".tmp" and info.st_mtime < now - _SILENCE:
                each.unlink()
            elif each.suffix == ".tmp":
                total += info.st_size
            elif each.suffix == SUFFIX and each != path and stat.S_ISREG(info.st_mode):
                files.append((info.st_mtime, info.st_size, each))
    total += sum(count for _, count, _ in files)
    most = min(MOST_BYTES, (shutil.disk_usage(path.parent).free + total) // 2)
    if size > most:
        text = "packed weights: %.1f MB are not saved in %s, because they are more than %.1f MB"
        logger.info(text, size / 1e6, path.parent, most / 1e6)
        return False
    for _, count, each in sorted(files):
        if total + size > most:
            each.unlink(missing_ok=True)
            each.with_suffix(FITS).unlink(missing_ok=True)
            total -= count
    return True


def checksum(data: np.ndarray) -> str:
    """Return a hash of one sum of 64-bit words for each MiB of a matrix, which is as fast as reading the memory."""
    words = data.reshape(-1).view(np.uint64)
    whole = words.size // _SUMMED * _SUMMED
    sums = words[:whole].reshape(-1, _SUMMED).sum(axis=1).tobytes() + words[whole:].sum().tobytes()
    return hashlib.sha256(sums).hexdigest()


def in_huge_pages(mapped: np.ndarray, smaps: Path = Path("/proc/self/smaps")) -> bool:
    """Return whether nine tenths of a mapped file are mapped in huge pages."""
    described = f"\n{read_or_nothing(smaps)}".partition(f"\n{address_of(mapped):08x}-")[2]
    found = re.search(r"^FilePmdMapped: +(\d+) kB", described, re.MULTILINE)
    return found is not None and int(found[1]) * 1024 >= mapped.nbytes * 0.9


@cache
def _classes() -> Mapping[str, tuple[Any, Any]]:
    """Return the classes of matrices, and the classes of their kinds, by name."""
    from candle_vllm.core.kernels.packed_linear.layout import PackedKind, PackedMatrix
    from candle_vllm.core.kernels.plain_linear.layout import PlainKind, PlainMatrix
    from candle_vllm.core.kernels.scaled_linear.layout import ScaledKind, ScaledMatrix
    from candle_vllm.core.kernels.word_linear.layout import WordKind, WordMatrix

    pairs = (PackedMatrix, PackedKind), (PlainMatrix, PlainKind), (ScaledMatrix, ScaledKind), (WordMatrix, WordKind)
    return {made.__name__: (made, kind) for made, kind in pairs}


def _can_keep(matrix: Any) -> bool:
    return type(matrix).__name__ in _classes() and getattr(matrix, "order", None) is None and matrix.nbytes % 64 == 0


def _start(length: int) -> int:
    """Return the offset of the first matrix after a table of `length` bytes."""
    return -(-(_HEAD.size + length) // _HUGE) * _HUGE


def _chunks(parts: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Join bytes to chunks of `_WRITTEN`; each chunk is valid until the next one is requested."""
    chunk, used = np.empty(_WRITTEN, np.uint8), 0
    for part in parts:
        while part.size:
            count = min(part.size, _WRITTEN - used)
            chunk[used : used + count] = part[:count]
            part, used = part[count:], used + count
            if used == _WRITTEN:
                yield chunk
                used = 0
    yield chunk[:used]
