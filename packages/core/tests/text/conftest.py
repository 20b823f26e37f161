"""Reference vocabularies and templates: the sdist of llama-cpp-python, downloaded once and kept in the user's cache.

Only its data files are read; nothing of it is imported or installed. Without a network the tests that need it skip.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

NAME = "llama_cpp_python-0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
MODELS = f"{NAME}/vendor/llama.cpp/models/"
CACHE = Path.home() / ".cache" / "candle-vllm" / "tests"


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's `models` folder: ggml-vocab-*.gguf with .inp and .out, and templates/*.jinja."""
    folder = CACHE / NAME / "models"
    if not (folder / "complete").exists():
        archive = CACHE / f"{NAME}.tar.gz"
        if not archive.exists():
            download(archive)
        if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
            pytest.skip(f"{archive} is not the file these tests were written for; delete it to download it again")
        unpack(archive, folder)
    return folder


def pip_command() -> list[str] | None:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    uv = shutil.which("uv")
    return [uv, "tool", "run", "pip"] if uv else None


def download(archive: Path) -> None:
    pip = pip_command()
    if pip is None:
        pytest.skip("neither pip nor uv is there to download the reference vocabularies (76 MB)")
    archive.parent.mkdir(parents=True, exist_ok=True)
    project, version = NAME.replace("_", "-").rsplit("-", 1)
    command = [*pip, "download", "--quiet", "--no-deps", "--no-binary", project, "--dest", str(archive.parent)]
    try:
        result = subprocess.run([*command, f"{project}=={version}"], capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        pytest.skip("the reference vocabularies (76 MB) could not be downloaded within four minutes")
    if result.returncode or not archive.exists():
        pytest.skip(f"the reference vocabularies could not be downloaded: {result.stderr[-300:]}")


def unpack(archive: Path, folder: Path) -> None:
    """Takes the regular files below MODELS out of the archive, and nothing else."""
    with tarfile.open(archive) as tar:
        for member in tar:
            relative = member.name.removeprefix(MODELS)
            wanted = relative.startswith(("ggml-vocab-", "templates/")) and ".." not in relative
            if member.name.startswith(MODELS) and member.isfile() and wanted:
                source = tar.extractfile(member)
                assert source is not None
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())
    (folder / "complete").touch()
