# SPDX-License-Identifier: MIT
"""Where compiled kernels are kept on disk, one folder for each version and CPU, and when they may be trusted."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from itertools import count
from pathlib import Path

from candle_vllm.core.config import cache_folder
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime import machine_code
from candle_vllm.core.kernels.cpu_runtime.level import Level, host_level, links_here
from candle_vllm.core.progress import tell

logger = logging.getLogger(__name__)

TRAVELLING = Path(__file__).parent.parent / "compiled"
"""Where code lies that travels with the package, a folder for each fingerprint; see `travelling`."""

WANTED: ContextVar[tuple[str, ...]] = ContextVar("WANTED", default=())
"""The names of all that is being compiled together, by whichever process, where somebody knows them."""

_MAGIC = b"candle-vllm code 1\n"
_OBJECT = b"\x7fELF"
_KEPT_VERSIONS = 4
_KEPT_SECONDS = 24 * 3600


@cache
def kernel_cache() -> Path | None:
    """The folder of the compiled kernels of this version and CPU; None, and a warning, where there can be none.

    The folder's name is a hash of all sources that a compiled function may be made from, and of the CPU's level. It may
    be used by several processes at once: a file is there whole or not at all.
    """
    try:
        root = cache_folder().resolve()
        folder, new = _own_folder(root, root / "kernels" / fingerprint(host_level()))
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


def has_compiler() -> bool:
    """Whether code that does not travel can be made."""
    return importlib.util.find_spec("numba") is not None


@cache
def can_compile() -> bool:
    """Whether there is machine code for this CPU, or what makes it."""
    return importlib.util.find_spec("numba") is not None or _travelling().is_dir()


def is_first_start() -> bool:
    """Whether nothing has been compiled yet, by this version on this machine, and it can be compiled and kept."""
    if importlib.util.find_spec("numba") is None or _travelling().is_dir():
        return False
    folder = kernel_cache()
    return folder is not None and next(folder.iterdir(), None) is None


def is_missing(name: str) -> bool:
    """Whether a function has not been compiled yet, and can be compiled and kept."""
    if importlib.util.find_spec("numba") is None or (_travelling() / name).exists():
        return False
    folder = kernel_cache()
    return folder is not None and not (folder / name).exists()


def compiled_address(name: str, make: Callable[[], Callable[..., None]]) -> int:
    """The address of a compiled function: of code that travels with the package, or is kept on disk, or is made now.

    A damaged file costs a warning and the time to compile again, and so does a full disk.

    Args:
        name: of its code, with all that it is made from.
        make: the function to be compiled, see `compiler.compile_function`; called only where that has to be.

    Raises:
        ConfigError: it has to be compiled, and Numba is not installed.
    """
    code = _read(_travelling() / name)
    if code is None:
        folder = kernel_cache()
        code = _read(folder / name) if folder is not None else None
        if code is None:
            code = compile_image(_checked(name, make), host_level())
            if folder is not None:
                keep(folder / name, code)
            _tell(folder)
    if links_here() and not code.startswith(_OBJECT):
        return machine_code.load(machine_code.from_bytes(code))
    from candle_vllm.core.kernels.cpu_runtime.compiler import load_object

    return load_object(code)


def _travelling() -> Path:
    """Where this version's code for this CPU would lie in the package."""
    return TRAVELLING / fingerprint(host_level())


def compile_image(function: Callable[..., None], level: Level) -> bytes:
    """The machine code of a function, as it is kept: an image where `machine_code` can load it, else an object file."""
    from candle_vllm.core.kernels.cpu_runtime.compiler import compile_function

    made = compile_function(function, level)
    if not links_here():
        return made
    try:
        return machine_code.to_bytes(machine_code.link(made))
    except machine_code.LinkError:
        if level.machine == "x86_64":
            raise
        return made  # LLVM knows kinds of relocations on ARM64 that we do not


@cache
def _compiled() -> count[int]:
    """Counts what this process has compiled."""
    return count(1)


def _tell(folder: Path | None) -> None:
    """Says how many kernels there are now, of those that are wanted together, else how many were compiled here."""
    done, wanted = next(_compiled()), WANTED.get()
    if folder is not None and wanted:
        done = sum((folder / name).exists() for name in wanted)
    tell("compiling the CPU kernels, once for this machine", done, len(wanted), " kernels")


def _checked(name: str, make: Callable[[], Callable[..., None]]) -> Callable[..., None]:
    if importlib.util.find_spec("numba") is None:
        raise ConfigError(
            f"the CPU kernel {name} does not travel with this package, and Numba, which compiles it, is not installed: "
            "pip install 'candle-vllm-core[compile]'",
            "device",
        )
    return make()


def keep(path: Path, code: bytes) -> None:
    """Writes a file that is there whole or not at all, whoever else writes it; a full disk costs a warning."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)  # somebody may have cleared the cache
        part.write_bytes(_MAGIC + hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError as error:
        logger.warning("a compiled kernel cannot be kept in %s: %s", path.parent, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """The code in a file; None where there is none, or what is there is damaged."""
    try:
        kept = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("a compiled kernel cannot be read and is made again: %s", error)
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    code = kept[start:]
    if kept[:start] == _MAGIC + hashlib.sha256(code).digest():
        return code
    logger.warning("the compiled kernel %s is damaged and is made again", path)
    return None


@cache
def fingerprint(level: Level) -> str:
    """Of all that machine code of a level is made from."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for path in sorted(root.glob("*/*.py")):
        if not path.name.startswith("triton"):  # the GPU's, which nothing compiled here calls
            digest.update(path.read_bytes())
    digest.update(f"{level.name} {level.cpu}".encode())
    return digest.hexdigest()[:16]


# ---- the folder on disk ----------------------------------------------------------------------------------------------


def _own_folder(root: Path, folder: Path) -> tuple[Path, bool]:
    """Makes `folder`, for this user alone, where it does not exist; returns it, and whether it is new.

    What is there is run, so nobody else may be able to put anything there.

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
    if sys.platform == "win32":
        return  # the folder is in the user's profile, which other users cannot write to
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
