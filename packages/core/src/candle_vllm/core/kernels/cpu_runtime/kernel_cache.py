# SPDX-License-Identifier: MIT
"""Cache of compiled kernels on disk: file names, and the checks that decide whether a file may be used.

A kernel is stored in the folder of its CPU level. The file name consists of the function's name, the function's
constants and a key: a hash of the sources of the machine code (`sources`). So after a change of a module, only the
kernels that depend on it are compiled again, and a folder can have several versions of a kernel.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import stat
import sys
import threading
import time
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from itertools import count
from pathlib import Path
from typing import TypeAlias

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime import machine_code
from candle_vllm.core.kernels.cpu_runtime.level import Level, host_level, links_here
from candle_vllm.core.progress import tell
from candle_vllm.core.threads import collector_paused

logger = logging.getLogger(__name__)

TRAVELLING = Path(__file__).parent.parent / "compiled"
"""Folder of the package's precompiled kernels (`travelling.py` writes it), with a folder for each level."""

CORE = Path(__file__).parents[2]
"""Folder of the package `candle_vllm.core`."""

WANTED: ContextVar[tuple[str, ...]] = ContextVar("WANTED", default=())
"""File names of all kernels that `operation.compile_first` compiles now, in two processes; empty at other times."""

_MAGIC = b"candle-vllm code 1\n"
_OBJECT = b"\x7fELF"
_PACKAGE = "candle_vllm.core"
_IMPORTS, _ASKED = "imports", "asked"
NO_CODE = frozenset(f"{_PACKAGE}.{name}" for name in ("errors", "progress", "threads"))  # no part of machine code
_CODE = ""  # key of a module's `code_hash` in the dict of the module's imports; the other keys are module names
_MOST_IMPORTS = 1024
_KEPT_VERSIONS = 4
_DAY = 24 * 3600
_BEGUN = time.time()
_COMPILED = count(1)  # numbers of the kernels that this process compiles
_Imports: TypeAlias = dict[str, list[str]]
_PARSED: dict[str, _Imports] = {}  # imports, by `_mark`, that this process has parsed, but not stored on disk yet


def cache_root() -> Path:
    """Return the cache folder of this package; it may not exist."""
    return (Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "candle-vllm").resolve()


@cache
def kernel_cache() -> Path | None:
    """Return the folder of kernels of `host_level`; None, with a warning, if it cannot be created or is not safe.

    Several processes may use it at once: a file appears complete or not at all.
    """
    try:
        root = cache_root()
        folder, new = own_folder(root, root / "kernels" / host_level().name)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder, or links form a loop
        logger.warning(
            "the CPU kernels cannot be cached and are compiled at every start, which takes some ten seconds: %s; set "
            "XDG_CACHE_HOME to a writable folder",
            error,
        )
        return None
    if new and has_compiler():
        logger.warning("compiling the CPU kernels for this machine, which takes some ten seconds once")
    return folder


def has_compiler() -> bool:
    """Whether kernels that are not precompiled can be compiled."""
    return importlib.util.find_spec("numba") is not None


NO_KERNELS = (
    "this package has no precompiled CPU kernels, and Numba, which compiles them, is not installed (pip install "
    "'candle-vllm-core[compile]')"
)


@cache
def can_compile() -> bool:
    """Whether kernels can run: precompiled code for this CPU's level, or a compiler, is available."""
    return has_compiler() or _travelling().is_dir()


def is_first_start() -> bool:
    """Return whether several kernels must be compiled and stored: the list of an earlier start is missing, or has
    several kernels that are not stored. (The kernels that this start needs are known only after a plan is recorded,
    which takes too long.) Kernels that only another version has do not count. False if the level is precompiled."""
    folder = kernel_cache() if has_compiler() and not _travelling().is_dir() else None
    if folder is None:
        return False
    asked = _read(folder / _ASKED)
    return asked is None or sum(map(_is_missing_here, asked.decode(errors="replace").split())) > 1


def _is_missing_here(name: str) -> bool:
    try:
        return is_missing(name)
    except (FileNotFoundError, ValueError):  # this version has no such kernel
        return False


def note_asked(names: Iterable[str]) -> None:
    """Store the names of the functions that this start requested, for `is_first_start`."""
    folder = kernel_cache()
    if folder is not None:
        keep(folder / _ASKED, "\n".join(names).encode())


def is_missing(name: str) -> bool:
    """Whether a function must be compiled and stored: its code is not stored, and both are possible."""
    kept = kept_name(name, host_level())
    if not has_compiler() or (_travelling() / kept).exists():
        return False
    folder = kernel_cache()
    return folder is not None and not (folder / kept).exists()


def compiled_address(name: str, make: Callable[[], Callable[..., None]]) -> int:
    """Return the address of a compiled function: precompiled, from the cache on disk, or compiled now.

    A damaged file is compiled again, and on a full disk the code is not stored; both log a warning.

    Args:
        name: "folder.module.function" below `kernels`, then the constants; the file name is this name and the key.
        make: returns the function for `compiler.compile_function`; called only if there is no stored code.

    Raises:
        ConfigError: the function must be compiled, and Numba is not installed.
        OSError: the system provides no executable memory.
    """
    kept = kept_name(name, host_level())
    code = _read(_travelling() / kept)
    if code is None:
        folder = kernel_cache()
        code = _read(folder / kept, used=True) if folder is not None else None
        if code is None:
            _tell(folder)
            if not has_compiler():
                raise ConfigError(
                    f"the CPU kernel {name} is not precompiled, and Numba, which compiles it, is not installed: "
                    "pip install 'candle-vllm-core[compile]'",
                    "device",
                )
            code = compile_image(make(), host_level())
            if folder is not None:
                keep_kernel(folder, name, host_level(), code)
                _drop_old(folder)
    if links_here() and not code.startswith(_OBJECT):
        return machine_code.load(machine_code.from_bytes(code))
    from candle_vllm.core.kernels.cpu_runtime.compiler import load_object

    return load_object(code)


def _travelling() -> Path:
    """Return the folder of precompiled kernels for this CPU's level; it may not exist."""
    return TRAVELLING / host_level().name


@collector_paused()
def compile_image(function: Callable[..., None], level: Level) -> bytes:
    """Compile a function to an image; to an object file if `links_here` is false, or ARM64 code cannot be linked."""
    from candle_vllm.core.kernels.cpu_runtime.compiler import compile_function

    made = compile_function(function, level)
    if not links_here():
        return made
    try:
        return machine_code.to_bytes(machine_code.link(made))
    except machine_code.LinkError:
        if level.machine == "x86_64":
            raise
        return made  # some relocations of LLVM on ARM64 are not supported by `machine_code`


def _tell(folder: Path | None) -> None:
    """Report, before a kernel is compiled, how many of `WANTED` are stored, or if it is empty, the kernel's number."""
    here = done = next(_COMPILED)
    wanted = WANTED.get()
    if folder is not None and wanted:
        done = sum((folder / name).exists() for name in wanted)
    with suppress(OSError):  # the folder cannot be created again
        if folder is not None and here == 2 and folder.parent.stat().st_mtime < _BEGUN:  # `kernel_cache` logs a new one
            logger.warning("compiling further CPU kernels for this machine: once, in some seconds each")
    how = "once for this machine" if folder is not None else "which cannot be cached"
    tell(f"compiling the CPU kernels, {how}", done, len(wanted), " kernels")


def keep_kernel(folder: Path, name: str, level: Level, code: bytes) -> None:
    """Store the code of a function under its `kept_name`, unless one of its sources changed during this process."""
    kept = kept_name(name, level)
    for noted in (_key, _source, _source_path):
        noted.cache_clear()
    with suppress(OSError):  # a source file was removed
        if kept_name(name, level) == kept:
            keep(folder / kept, code)


def keep(path: Path, code: bytes) -> None:
    """Write a file atomically, safe with concurrent writers; log a warning if that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        for folder in reversed(path.parents[:3]):  # the user may have deleted the cache
            folder.mkdir(mode=0o700, exist_ok=True)
        part.write_bytes(_MAGIC + hashlib.sha256(code).digest() + code)
        part.replace(path)
    except OSError as error:
        logger.warning("a compiled kernel cannot be cached in %s: %s", path.parent, error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _read(path: Path, *, used: bool = False) -> bytes | None:
    """Read a file that `keep` wrote; return None if it is missing or damaged. With `used`, update its time of use."""
    try:
        kept = path.read_bytes()
        if used:
            os.utime(path)  # for `_drop_old`
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("a file of the kernel cache cannot be read and is made again: %s", error)
        return None
    start = len(_MAGIC) + hashlib.sha256().digest_size
    code = kept[start:]
    if kept[:start] == _MAGIC + hashlib.sha256(code).digest():
        return code
    logger.warning("the file %s is damaged and is made again", path)
    return None


# ---- keys: hashes of a kernel's sources ------------------------------------------------------------------------------


def kept_name(name: str, level: Level) -> str:
    """Return the file name of a compiled function; see `compiled_address`."""
    folder, module, *_ = name.split(".")
    return f"{name}.{_key(f'{folder}.{module}', level)}"


@cache
def _key(module: str, level: Level) -> str:
    digest = hashlib.sha256(f"{level.name} {level.cpu} {level.features}".encode())
    for name, text in sorted(sources(module).items()):
        digest.update(f"\n{name} {text}".encode())
    path = _imports_path() if _PARSED else None
    if path is not None:
        new = dict(_PARSED)
        _known_imports.cache_clear()  # another process may have added imports
        keep(path, json.dumps(_known_imports(path) | new).encode())
        _known_imports.cache_clear()
        _PARSED.clear()
    return digest.hexdigest()[:16]


def sources(module: str, core: Path = CORE) -> dict[str, str]:
    """Return the hashes (`code_hash`) of all sources that a kernel's machine code depends on, by module.

    The sources are the kernel's own module, this module (which imports the compiler), and every module of
    `candle_vllm.core` that these import, directly or indirectly. Modules outside `kernels` count because they define
    constants of the code, such as the layouts and code tables of `candle_vllm.core.quantization`; modules of `NO_CODE`
    define none. Imports in functions count, imports under TYPE_CHECKING do not. The `__init__.py` of a package that
    contains an imported module counts; its imports do not, because the importing module gets no name from it. Triton's
    modules do not count, because no CPU kernel calls them. A module that a kernel imports by a computed name is not
    found, so that is not allowed.

    Args:
        module: "folder.module" below `kernels`.
        core: the folder of the package `candle_vllm.core`.

    Raises:
        FileNotFoundError: there is no such module.
    """
    if not (core / "__init__.py").is_file():  # an application that is distributed as bytecode only
        from importlib.metadata import version

        return {module: version("candle-vllm-core")}
    found, wanted = dict[str, str](), [f"{_PACKAGE}.kernels.{module}", __name__]
    if _source_path(core, wanted[0]) is None:
        raise FileNotFoundError(f"{wanted[0]} has no source file")
    for name in wanted:  # `wanted` grows in the loop
        if name not in found and name not in NO_CODE and not name.rpartition(".")[2].startswith("triton"):
            found[name], imported = _source(core, name)
            wanted += imported
    for name in tuple(found):
        while (name := name.rpartition(".")[0]) != _PACKAGE and name.startswith(_PACKAGE):
            found.setdefault(name, _source(core, name)[0])
    return found


@cache
def _source_path(core: Path, module: str) -> Path | None:
    """Return the source file of a module of `candle_vllm.core`; None if no such module exists."""
    if not f"{module}.".startswith(f"{_PACKAGE}."):
        return None
    folder = core.joinpath(*module.removeprefix(_PACKAGE).split("."))
    return next((path for path in (folder / "__init__.py", folder.with_suffix(".py")) if path.is_file()), None)


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


@cache
def _source(core: Path, module: str) -> tuple[str, list[str]]:
    """Return the hash of a module's code, and the modules of `candle_vllm.core` that the module imports.

    If a file changed after this process began, its hash is valid in this process only, because the process may have
    imported some modules before the change and others after it.
    """
    path = _source_path(core, module)
    assert path is not None
    with path.open("rb") as file:
        text, info = file.read(), os.fstat(file.fileno())
    imported, imports = list[str](), dict(_imports(text))
    [digest] = imports.pop(_CODE)
    package = module if _is_package(path) else module.rpartition(".")[0]
    for base, names in imports.items():
        base = importlib.util.resolve_name(base, package)
        found = _source_path(core, base)
        of_package = [f"{base}.{name}" for name in names] if found is not None and _is_package(found) else []
        imported += [name for name in (base, *of_package) if _source_path(core, name) is not None]
    changed = info.st_mtime if sys.platform == "win32" else info.st_ctime
    return (f"{digest} {os.getpid()} {_BEGUN}" if changed > _BEGUN else digest), imported


def _imports(text: bytes) -> _Imports:
    """Return a source's imports and its `code_hash`, stored or parsed from its syntax tree.

    Without stored imports, a start would parse some 60 files in a quarter of a second (November 2026).
    """
    mark = _mark(text)
    if mark in (known := _known_imports(TRAVELLING / _IMPORTS)) or mark in (known := _PARSED):
        return known[mark]
    path = _imports_path()
    if path is not None and mark in (known := _known_imports(path)):
        return known[mark]
    return _PARSED.setdefault(mark, _note(text))


def _note(text: bytes) -> _Imports:
    return {_CODE: [code_hash(text)], **parse_imports(text)}


def _imports_path() -> Path | None:
    """Return the file of stored imports in the cache folder; without a compiler, None, and create no folder."""
    folder = kernel_cache() if has_compiler() else None
    return None if folder is None else folder.parent / _IMPORTS


def _mark(text: bytes) -> str:
    """Return the key of a source's stored imports: the source's hash, and the hash of this module, which parses it."""
    return hashlib.sha256(text).hexdigest()[:32] + _own_hash()


@cache
def _own_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def code_hash(text: bytes) -> str:
    """Return the hash of a source without comments, docstrings and empty lines, which do not change machine code.

    It does not depend on the version of Python, so that precompiled kernels fit all versions.
    """
    rows, inside = text.split(b"\n"), set[int]()
    for token in tokenize.tokenize(io.BytesIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, start = token.start[0] - 1, len(token.line[: token.start[1]].encode())
            rows[row] = rows[row][:start].rstrip()
    nodes = [*ast.walk(ast.parse(text))]
    for node in nodes:
        if isinstance(node, ast.Constant | ast.JoinedStr):
            inside.update(range(node.lineno, node.end_lineno or 0))  # empty lines inside a string count
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, end = node.lineno - 1, node.end_lineno or node.lineno
            if not rows[first][: node.col_offset].strip() and not rows[end - 1][node.end_col_offset :].strip():
                rows[first:end] = [b""] * (end - first)
                inside.difference_update(range(first, end))
    return hashlib.sha256(b"\n".join(row for at, row in enumerate(rows) if row or at in inside)).hexdigest()


def parse_imports(text: bytes) -> _Imports:
    """Parse a source's imports from `candle_vllm.core`: modules as the source writes them, with the imported names."""
    imports, nodes = dict[str, list[str]](), [ast.parse(text)]
    for node in nodes:  # `nodes` grows in the loop
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                for end in (*(at for at, letter in enumerate(name) if letter == "."), len(name)):
                    imports.setdefault(name[:end], [])  # `import a.b` binds `a`, of which `b` is an attribute
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            imports.setdefault(base, []).extend(alias.name for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += node.orelse
            continue
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            nodes += getattr(node, block, ())
    return {base: names for base, names in imports.items() if base.startswith((_PACKAGE, "."))}


@cache
def _known_imports(path: Path) -> dict[str, _Imports]:
    """Return the imports, by `_mark`, that are stored on disk."""
    kept = _read(path)
    known = {} if kept is None else json.loads(kept)
    return known if len(known) <= _MOST_IMPORTS else {}


def keep_imports(modules: Iterable[str], folder: Path) -> None:
    """Write the imports of these kernels' sources to the folder of precompiled kernels."""
    found = {}
    for module in modules:
        for name in sources(module):
            if (path := _source_path(CORE, name)) is not None:
                text = path.read_bytes()
                found[_mark(text)] = _note(text)
    keep(folder / _IMPORTS, json.dumps(found).encode())


@cache
def fingerprint(level: Level) -> str:
    """Return a hash of all CPU kernels' sources and a level, on which the values of offloaded KV blocks depend."""
    digest = hashlib.sha256()
    for path in sorted((CORE / "kernels").glob("*/*.py")):
        if not path.name.startswith("triton"):  # GPU kernels
            digest.update(path.read_bytes())
    digest.update(f"{level.name} {level.cpu} {level.features}".encode())
    return digest.hexdigest()[:16]


# ---- the folder on disk ----------------------------------------------------------------------------------------------


def own_folder(root: Path, folder: Path) -> tuple[Path, bool]:
    """Create `folder` for this user only, if it does not exist; return it, and whether it is new.

    The files in the folder are executed or computed with, so other users must not be able to write to it.

    Raises:
        OSError: it cannot be created or written; or it or a parent up to `root` is a link, or others can write to it.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    new = not folder.exists()
    for path in [each for each in (*reversed(folder.parents), folder) if each.is_relative_to(root)]:
        path.mkdir(mode=0o700, exist_ok=True)
        _check_owner(path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written")
    return folder, new


def _check_owner(path: Path) -> None:
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise PermissionError(f"{path} is not a folder, and links are not followed: delete it")
    if sys.platform == "win32":
        return  # the folder is in the user's profile, which other users cannot write to
    if info.st_uid not in (0, os.geteuid()):
        raise PermissionError(f"{path} belongs to another user")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write to {path}, and code in it would be run: delete it")


def _drop_old(folder: Path) -> None:
    """Delete old versions of kernels in a level's folder, except for the `_KEPT_VERSIONS` used last of each kernel.

    Files that were used within a day stay, for users who switch between versions or branches. Links are not followed.
    Earlier versions of this package had a folder each, which is deleted a month after its last change.
    """
    versions, day_ago = defaultdict[str, list[tuple[float, Path]]](list), time.time() - _DAY
    with suppress(OSError):  # another process may be deleting the same files
        for path in folder.iterdir():
            name, _, key = path.name.rpartition(".")
            used = info.st_mtime if stat.S_ISREG((info := path.lstat()).st_mode) else time.time()
            if re.fullmatch("[0-9a-f]{16}", key):
                versions[name].append((used, path))
            elif key == "tmp" and used < day_ago:  # left by a process that was killed
                path.unlink()
        for found in versions.values():
            for used, path in sorted(found, reverse=True)[_KEPT_VERSIONS:]:
                if used < day_ago:
                    path.unlink()
        for path in folder.parent.iterdir():
            used, is_folder = (info := path.lstat()).st_mtime, stat.S_ISDIR(info.st_mode)
            if is_folder and used < day_ago - 30 * _DAY and re.fullmatch("[0-9a-f]{16}", path.name):
                shutil.rmtree(path, ignore_errors=True)
