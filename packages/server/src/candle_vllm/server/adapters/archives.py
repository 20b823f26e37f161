"""An adapter out of a tar archive that nobody vouches for: a few plain files, within bounds, and nothing else.

Names in the archive never become paths: a member counts by its last part alone, if that is one of an adapter's files.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from candle_vllm.server.adapters.sources import CONFIG, MAX_CONFIG, PICKLED, WEIGHTS, Budget, Refused, check_config

MAX_MEMBERS = 64
MAX_RATIO = 200  # of what is unpacked to what came; weights are numbers, which hardly shrink
_SLACK = 16 << 20  # bytes that need no such ratio: padding of small archives
_MAX_HEAD = 64 << 10  # bytes of a long name, or of a member's further attributes
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"
_HEADS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
_KEPT = (CONFIG, WEIGHTS)


def unpack(archive: Path, folder: Path, budget: Budget) -> str | None:
    """Unpacks the adapter of an archive, plain or with gzip, into an empty folder.

    Returns:
        The base that its configuration names.

    Raises:
        Refused: it has no adapter, two of them, a link or a device, or more members or bytes than are allowed.
    """
    most = min(archive.stat().st_size * MAX_RATIO, budget.limits.max_bytes) + _SLACK
    try:
        with archive.open("rb") as raw:
            zipped = raw.read(2) == _GZIP
            raw.seek(0)
            with gzip.open(raw) if zipped else raw as plain:
                bounded: Any = _Bounded(plain, most)
                with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_Member) as tar:
                    return _unpack(tar, folder, budget)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        raise Refused(f"its archive cannot be read ({type(error).__name__})") from None


def _unpack(tar: tarfile.TarFile, folder: Path, budget: Budget) -> str | None:
    seen = dict[str, PurePosixPath]()
    base: str | None = None
    for number, member in enumerate(tar):
        if number >= MAX_MEMBERS:
            raise Refused(f"its archive has more than {MAX_MEMBERS} members")
        path, shown = PurePosixPath(member.name), f"{member.name!r:.100}"
        if path.is_absolute() or ".." in path.parts:
            raise Refused(f"its archive has {shown}, which leads out of it")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse() or member.size < 0:
            raise Refused(f"its archive has {shown}, which is no plain file")
        if path.name == PICKLED:
            raise Refused(f"its archive has {shown}, a pickle, which is a program: save it as {WEIGHTS}")
        if path.name not in _KEPT:
            continue
        if path.name in seen or any(parent != path.parent for parent in seen.values()):
            raise Refused(f"its archive has more than one adapter: {shown}")
        seen[path.name] = path.parent
        content = tar.extractfile(member)
        assert content is not None
        if path.name == CONFIG:
            base = _config(content, member.size, folder, budget)
        else:
            _copy(content, folder / path.name, member.size, budget)
    if len(seen) != len(_KEPT):
        raise Refused(f"its archive has no {next(name for name in _KEPT if name not in seen)}")
    return base


def _config(content: IO[bytes], size: int, folder: Path, budget: Budget) -> str | None:
    if size > MAX_CONFIG:
        raise Refused(f"its {CONFIG} has more than {MAX_CONFIG >> 20} MiB")
    budget.take(size)
    text = content.read(size)
    base = check_config(text, budget.limits)
    (folder / CONFIG).write_bytes(text)
    return base


def _copy(content: IO[bytes], path: Path, size: int, budget: Budget) -> None:
    budget.check(size)
    with path.open("xb") as out:
        while piece := content.read(_PIECE):
            budget.take(len(piece))
            out.write(piece)


class _Bounded:
    """What an archive unpacks to, from front to back, and no more than it may."""

    def __init__(self, plain: IO[bytes] | gzip.GzipFile, most: int) -> None:
        self._plain = plain
        self._most = most

    def read(self, size: int) -> bytes:
        piece = self._plain.read(size)
        self._most -= len(piece)
        if self._most < 0:
            raise Refused("its archive unpacks to far more than it may")
        return piece


class _Member(tarfile.TarInfo):
    """A member, whose head is not read into memory where it is too long to be one."""

    def _proc_member(self, tar: Any) -> Any:
        if self.type in _HEADS and not 0 <= self.size <= _MAX_HEAD:
            raise Refused(f"its archive has a name or attributes of {self.size} bytes")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise Refused("its archive has a sparse file, which is no plain file")
        return super()._proc_member(tar)  # type: ignore[misc]  # what TarInfo documents for subclasses
