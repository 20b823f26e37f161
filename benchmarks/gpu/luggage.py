# SPDX-License-Identifier: MIT
"""What travels to a GPU machine and back: wheels, results of earlier runs, and the compiler's cache.

A machine may be bare at each start, have no network, and take little along. So wheels are used only for what it lacks,
and of Triton's cache only that is kept which a hit needs: `*.cubin`, `*.json`, `*.so`.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

SCRATCH = Path(tempfile.gettempdir()) / "candle-vllm-first-hour"
SOURCES = ("core", "openai", "responses", "server")
KEPT = (".cubin", ".json", ".so")
PIECE = 15 << 20
"""Bytes of a file of the packed cache: some places take no larger ones than 16 MiB."""

MOST = 2
"""Pieces; the newest entries come first, so that what does not fit is the oldest."""

LOG = 8 << 20
"""Bytes of a log that are kept, the last ones."""

_ARCHIVE = "triton-cache.tar.gz"


# ---- wheels ----------------------------------------------------------------------------------------------------------


def set_out(root: Path, scratch: Path, wheels: Path, device: str) -> None:
    """Sets the environment of all processes: paths to what the wheels bring and to the packages' sources, and where the
    compiler keeps its cache."""
    site = scratch / "site"
    unpack_missing(wheels, site)
    paths = [str(site), *(str(root / "packages" / name / "src") for name in SOURCES), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
    os.environ["PYTHONUNBUFFERED"] = "1"
    if device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # toy sizes: threads would wait for each other
    sys.path.insert(0, str(site))  # what is looked for here is what the processes find


def unpack_missing(wheels: Path, site: Path) -> list[str]:
    """Unpacks those wheels whose packages are not installed and that fit this Python; their names."""
    site.mkdir(parents=True, exist_ok=True)
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, _, tags = wheel.stem.partition("-")
        if _fits(tags) and not _installed(name, site):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)  # noqa: S202 - a wheel that is to be imported is trusted
            found.append(name)
    return found


def _fits(tags: str) -> bool:
    """Whether a wheel's tags, as they stand in its name behind the package, are this Python's."""
    python, abi = tags.split("-")[-3:-1]
    return "py3" in python or abi == "abi3" or f"cp{sys.version_info[0]}{sys.version_info[1]}" in python.split(".")


def _installed(name: str, site: Path) -> bool:
    if any(site.glob(f"{name}-*.dist-info")):
        return True
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- results ---------------------------------------------------------------------------------------------------------


def lines_of(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """The result lines of earlier runs; a line that was cut off is left out."""
    found = []
    for folder in folders:
        path = folder / "results.jsonl"
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
    return found


def shorten(log: Path) -> None:
    """Leaves the end of a log that has grown beyond what travels."""
    if log.exists() and log.stat().st_size > LOG:
        log.write_bytes(log.read_bytes()[-LOG:])


# ---- the compiler's cache --------------------------------------------------------------------------------------------


class _Pieces:
    """A stream that goes into files of at most `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths: list[Path] = []
        self.total = 0
        self._folder, self._size = folder, size
        self._file: IO[bytes] | None = None
        self._room = 0

    def write(self, data: bytes) -> int:
        """Writes all of it, to as many files as it takes."""
        rest = memoryview(data)
        while len(rest):
            if not self._room:
                self.close()
                self.paths.append(self._folder / f"{_ARCHIVE}.{len(self.paths)}")
                self._file, self._room = self.paths[-1].open("wb"), self._size
            assert self._file is not None
            part = rest[: self._room]
            self._file.write(part)
            rest, self._room, self.total = rest[len(part) :], self._room - len(part), self.total + len(part)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """Closes the last file."""
        if self._file is not None:
            self._file.close()
        self._file = None


def pack_cache(cache: Path, folder: Path, piece: int = PIECE, most: int = MOST) -> list[Path]:
    """Packs what a cache hit needs into files in `folder`, as many as it takes, `most` at most; their paths.

    Entries that belong together, a folder of Triton's, are packed whole or not at all.
    """
    for old in folder.glob(f"{_ARCHIVE}.*"):
        old.unlink()
    entries = sorted((path for path in cache.glob("*") if path.is_dir()), key=lambda path: -path.stat().st_mtime)
    if not entries:
        return []
    pieces = _Pieces(folder, piece)
    room = piece * most - (piece >> 4)  # for what the compressor still holds when it is asked
    with (
        gzip.GzipFile(fileobj=pieces, mode="wb", compresslevel=4, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        for entry in entries:
            files = [path for path in sorted(entry.iterdir()) if path.suffix in KEPT]
            packed.flush()  # Python 3.12 and later keep up to 128 KiB before the compressor
            if pieces.total + sum(path.stat().st_size for path in files) > room:
                break
            for path in files:
                archive.add(path, f"{entry.name}/{path.name}")
    pieces.close()
    return pieces.paths


def restore_cache(folders: Sequence[Path], cache: Path) -> int:
    """Unpacks the newest packed cache of earlier runs' folders; how many files it had.

    Triton notes absolute paths beside what it compiles; they are made those of `cache`.
    """
    for folder in reversed(folders):
        pieces = sorted(folder.glob(f"{_ARCHIVE}.*"), key=lambda path: int(path.suffix[1:]))
        if pieces:
            return sum(1 for _ in _unpacked(pieces, cache))
    return 0


def _unpacked(pieces: Sequence[Path], cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryFile() as whole:
        for piece in pieces:
            whole.write(piece.read_bytes())
        whole.seek(0)
        with tarfile.open(fileobj=whole, mode="r:gz") as archive:
            for member in archive:
                name = re.fullmatch(r"([A-Za-z0-9_-]+)/([A-Za-z0-9_.-]+)", member.name)
                stream = archive.extractfile(member) if member.isfile() and name else None
                if stream is None or name is None:
                    continue
                entry = cache / name[1]
                entry.mkdir(parents=True, exist_ok=True)
                (entry / name[2]).write_bytes(_moved(name[2], stream.read(), entry))
                yield entry / name[2]


def _moved(name: str, data: bytes, entry: Path) -> bytes:
    """The list of an entry's files: those that were packed, with their paths here; other files as they are.

    Newer Tritons compile again where a file of the list is missing.
    """
    if not name.startswith("__grp__"):
        return data
    group = json.loads(data)
    kept = [child for child in group["child_paths"] if Path(child).suffix in KEPT]
    group["child_paths"] = {child: str(entry / child) for child in kept}
    return json.dumps(group).encode()
