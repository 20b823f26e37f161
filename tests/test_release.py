# SPDX-License-Identifier: MIT
"""The release: metadata that an index takes, the same bytes twice, and a trial in an empty environment."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.common_run import few
from tests.release_script import release

REPOSITORY = "https://git.example/somebody/candle-vllm"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All ten files, as somebody makes them who has a repository."""
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    return release.build(tmp_path_factory.mktemp("dist"), REPOSITORY)


def about(path: Path) -> Message:
    """What a file says of itself."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return message_from_bytes(wheel.read(name))
    with tarfile.open(path) as archive:
        (name,) = (name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/PKG-INFO"))
        stream = archive.extractfile(name)
        assert stream is not None
        return message_from_bytes(stream.read())


def test_metadata_is_whole(made: list[Path]) -> None:
    assert len(made) == 10
    for path in made:
        metadata = about(path)
        assert metadata["Author"] == "The candle-vllm authors"
        assert (metadata["License-Expression"], metadata["License-File"]) == ("MIT", "LICENSE")
        assert metadata["Keywords"]
        assert metadata["Summary"]
        assert {f"Programming Language :: Python :: {each}" for each in release.SUPPORTED} <= {
            *metadata.get_all("Classifier", [])
        }
        assert all(REPOSITORY in address for address in metadata.get_all("Project-URL", []))
        assert len(metadata.get_all("Project-URL", [])) == 3
        links = re.findall(r"\]\(([^)\s]+)\)", str(metadata.get_payload()))
        assert all("://" in link or link.startswith("#") for link in links), path


def test_a_second_build_has_the_same_bytes_and_an_index_would_take_it(made: list[Path]) -> None:
    try:
        release.check(made, REPOSITORY)
    except release.Failed as error:
        if "twine" in str(error) and "fetch" in str(error):
            pytest.skip("twine cannot be had")
        raise


def test_what_differs_is_told(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(out: Path, repository: str) -> list[Path]:
        again = [Path(shutil.copy(path, out)) for path in made]
        with again[0].open("ab") as file:
            file.write(b"0")
        return again

    monkeypatch.setattr(release, "build", build)
    with pytest.raises(release.Failed, match=re.escape(f"two builds of {made[0].name} differ")):
        release.check(made, REPOSITORY)


@pytest.mark.parametrize(
    ("text", "base", "wanted"),
    [
        ("[a](docs/b.md#c) [d](#e) [f](https://g)", "", "a [d](#e) [f](https://g)"),
        ("![p](docs/p.png)[a](../../docs/b.md#c)", "", "a"),
        ("![p](p.png)[`a[0]`](../../docs/b.md#c)", "x://y", "![p](x://y/packages/q/p.png)[`a[0]`](x://y/docs/b.md#c)"),
    ],
)
def test_links_stand_by_themselves(text: str, base: str, wanted: str) -> None:
    assert release.absolute(text, "packages/q", base) == wanted


@pytest.mark.every_case
@pytest.mark.parametrize("version", few(release.SUPPORTED, f"3.{sys.version_info.minor}"))
def test_a_trial_from_an_empty_environment(version: str, made: list[Path], tmp_path: Path) -> None:
    program = dict(release.pythons([version])).get(version)
    if program is None:
        pytest.skip(f"python {version} is not on this machine")
    with packages_to_be_had():
        assert "Paris" in release.try_out(made, program, tmp_path)


@pytest.mark.every_case
def test_the_command_runs_without_being_installed(made: list[Path], tmp_path: Path) -> None:
    with packages_to_be_had():
        release.try_command(made, tmp_path)


@contextlib.contextmanager
def packages_to_be_had() -> Iterator[None]:
    """Skips where no index can be reached."""
    try:
        yield
    except release.Failed as error:
        if "fetch" in str(error):
            pytest.skip(f"packages cannot be had: {str(error)[-200:]}")
        raise
