"""Where compiled kernels are kept on disk, one folder for each version and CPU, and when they may be trusted."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite.binding
import numba
from numba.core.compiler_lock import global_compiler_lock

from candle_vllm.core.config import cache_folder

logger = logging.getLogger(__name__)
T = TypeVar("T")

_KEPT_VERSIONS = 4
_KEPT_SECONDS = 24 * 3600


@cache
def kernel_cache() -> Path | None:
    """The folder of the compiled kernels of this version and CPU; None, and a warning, where there can be none.

    A compiled operation contains the code of the functions that it calls, and Numba does not see when those change, so
    the folder's name is a hash of all sources that they may be in. It may be used by several processes at once, see
    `compile_operation`.
    """
    try:
        root = cache_folder().resolve()
        folder, new = _own_folder(root, root / "kernels" / _fingerprint())
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder, or links go round
        logger.warning(
            "the CPU kernels are compiled at every start, which takes some ten seconds: %s; XDG_CACHE_HOME names "
            "another place for the cache folder",
            error,
        )
        return None
    if new:
        logger.warning("compiling the CPU kernels for this machine: once, and some ten seconds")
        _drop_old(folder.parent)
    return folder


def compile_kept(compiler: Callable[[bool], T]) -> T:
    """Compiles with `compiler(cache)`, from and into the kernel cache where that can be used.

    A damaged file costs a warning and the time to compile again, and so does a full disk.
    """
    folder = kernel_cache()
    if folder is None:
        return compiler(False)
    try:
        with _numba_cache(folder):
            return compiler(True)
    except OSError as error:
        logger.warning("a compiled kernel cannot be kept in %s: %s", folder, error)
    except Exception as error:  # reading a damaged file can raise anything; what else is wrong is raised again below
        logger.warning("compiled kernels in %s cannot be used and are made again: %r", folder, error)
        for pattern in ("*/*.nbi", "*/*.nbc"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
    return compiler(False)


def _fingerprint() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.glob("*/*.py")):
        if not path.name.startswith("triton"):  # the GPU's, which nothing compiled here calls
            digest.update(path.read_bytes())
    cpu, flags = llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()
    digest.update(f"{numba.__version__} {llvmlite.__version__} {cpu} {flags}".encode())
    return digest.hexdigest()[:16]


# ---- the folder on disk ----------------------------------------------------------------------------------------------


def _own_folder(root: Path, folder: Path) -> tuple[Path, bool]:
    """Makes `folder`, for this user alone, where it does not exist; returns it, and whether it is new.

    Numba keeps pickles, which run as code when they are read, so nobody else may be able to put one there.

    Raises:
        OSError: it cannot be made or written, or another user can write to it or to a folder above, up to `root`.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    new = not folder.exists()
    for path in (root, folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
        _check_owner(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    os.utime(folder)  # the time of its last use, for `_drop_old`
    return folder, new


def _check_owner(path: Path) -> None:
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise PermissionError(f"{path} is a link and is not followed: delete it")
    if not hasattr(os, "geteuid"):
        return  # Windows: the folder is in the user's profile, which other users cannot write to
    if info.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} belongs to another user")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to {path}, and code in it would be run: delete it")


def _drop_old(kernels: Path) -> None:
    """Deletes the kernels of other versions: all but the few folders used last, and none used within a day.

    A process that still runs on deleted ones has their code in memory. Only folders named like a fingerprint are
    touched, and links are not followed.
    """
    with suppress(OSError):  # another process may be doing the same
        found = [path for path in kernels.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name)]
        folders = {path: info.st_mtime for path in found if stat.S_ISDIR((info := path.lstat()).st_mode)}
        for path in sorted(folders, key=folders.__getitem__, reverse=True)[_KEPT_VERSIONS:]:
            if folders[path] < time.time() - _KEPT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _numba_cache(folder: Path) -> Iterator[None]:
    """Lets Numba cache in `folder`; the application's own functions keep their place."""
    settings: Any = numba.config
    with global_compiler_lock:
        before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
        try:
            yield
        finally:
            settings.CACHE_DIR = before
