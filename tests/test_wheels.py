# SPDX-License-Identifier: MIT
"""What a plain installation needs has wheels on the systems that docs/installation.md names: nothing is compiled."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLATFORMS = (
    "x86_64-manylinux_2_31",
    "aarch64-manylinux_2_31",
    "aarch64-apple-darwin",
    "x86_64-pc-windows-msvc",
)
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LACKING = {
    "x86_64-unknown-linux-musl": "llguidance",
    "aarch64-unknown-linux-musl": "llguidance",
    "x86_64-apple-darwin": "cryptography",
    "aarch64-pc-windows-msvc": "cryptography",
}
"""Platforms for which a package has no wheel, and which: what a start there has to compile."""


def resolve(platform: str, python: str) -> subprocess.CompletedProcess[str]:
    """Asks the index alone; nothing is installed."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    line = [uv, "pip", "compile", "pyproject.toml", "--python-platform", platform, "--python-version", python]
    line += ["--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    if found.returncode and "ailed to fetch" in found.stderr:
        pytest.skip(f"the index cannot be asked: {found.stderr.strip()[-200:]}")
    return found


@pytest.mark.every_case
@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_dependency_has_a_wheel(platform: str, python: str) -> None:
    found = resolve(platform, python)
    assert found.returncode == 0, found.stderr
    names = {line.split("==")[0] for line in found.stdout.splitlines()}
    assert {"numpy", "numba", "llvmlite", "tokenizers", "llguidance"} <= names


@pytest.mark.every_case
@pytest.mark.parametrize(("platform", "lacking"), LACKING.items())
def test_what_has_none_is_named(platform: str, lacking: str) -> None:
    found = resolve(platform, "3.12")
    assert found.returncode != 0
    assert f"{lacking}==" in found.stderr
    assert "has no usable wheels" in found.stderr
