# SPDX-License-Identifier: MIT
"""What the suites of other projects share: an environment of pinned packages, the files of a pinned archive, a run of
pytest or of Node's tests, and the comparison of its results with the failures that are expected, each with its reason.

Nothing of the other projects is kept in this repository: archives are downloaded once into the user's cache and
checked by their sha256.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path.home() / ".cache" / "candle-vllm" / "suites"
_SECONDS = 7200  # for a whole suite

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


class Expected(NamedTuple):
    """Tests that do not pass.

    Attributes:
        reasons: pattern of test names (as of `fnmatch`, with `[` and `]` meant literally) -> why.
        unsteady: patterns of tests that pass or fail with the model's words.
    """

    reasons: Mapping[str, str]
    unsteady: Sequence[str]

    def reason(self, name: str) -> str | None:
        """Why the test fails, or None where it must pass."""
        return next((why for pattern, why in self.reasons.items() if _matches(name, pattern)), None)

    def may_pass(self, name: str) -> bool:
        """Whether the test, which is expected to fail, may pass."""
        return any(_matches(name, pattern) for pattern in self.unsteady)


def expected_of(path: Path) -> Expected:
    """The expected failures of a TOML file: tables `[[group]]` with `why`, `tests` and perhaps `unsteady = true`."""
    groups = tomllib.loads(path.read_text(encoding="utf-8")).get("group", [])
    reasons = {test: group["why"] for group in groups for test in group["tests"]}
    return Expected(reasons, [test for group in groups if group.get("unsteady") for test in group["tests"]])


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def environment(name: str, packages: Sequence[str], alone: Sequence[str] = ()) -> Path:
    """The interpreter of a virtual environment with these packages, which uv makes once; `alone`: without what they
    depend on."""
    folder = CACHE / f"{name}-environment"
    wanted = "\n".join((*packages, *alone))
    made = folder / "packages.txt"
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
        python = str(folder / "bin" / "python")
        subprocess.run(["uv", "pip", "install", "--quiet", "--python", python, *packages], check=True, cwd=folder)
        if alone:
            install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", python, *alone]
            subprocess.run(install, check=True, cwd=folder)
        made.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def node_project(name: str, packages: Sequence[str]) -> Path:
    """The folder of an npm project with these packages, which npm makes once."""
    folder = CACHE / f"{name}-project"
    wanted = "\n".join(packages)
    made = folder / "packages.txt"
    if not made.exists() or made.read_text(encoding="utf-8") != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}', encoding="utf-8")
        install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", *packages]
        subprocess.run(install, check=True, cwd=folder)
        made.write_text(wanted, encoding="utf-8")
    return folder


def run_pytest(
    python: Path, folder: Path, files: Sequence[str], expected: Expected, variables: Mapping[str, str]
) -> int:
    """Runs tests and compares what came of each with what is expected; prints the counts.

    Args:
        python: the interpreter that has pytest.
        folder: where it is started.
        files: of the tests, and more arguments of pytest.
        expected: tests that do not pass.
        variables: of the environment, beside this process's own.

    Returns:
        The exit code: 0 where every test did what is expected of it.
    """
    report = CACHE / f"{folder.name}-{os.getpid()}.xml"
    command = [str(python), "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *files, *sys.argv[1:]]
    return _run(command, report, folder, expected, variables)


def run_node(folder: Path, file: Path, expected: Expected, variables: Mapping[str, str]) -> int:
    """Runs the tests of a JavaScript module, with the packages of a project, as `run_pytest` does.

    Args:
        folder: of the project.
        file: the module, which is copied there, because Node looks for packages beside it.
        expected: tests that do not pass.
        variables: of the environment, beside this process's own.

    Returns:
        The exit code: 0 where every test did what is expected of it.
    """
    shutil.copy(file, folder)
    report = CACHE / f"{folder.name}-{os.getpid()}.xml"
    reporters = [("spec", "stdout"), ("junit", str(report))]
    flags = [f"--test-reporter{flag}" for kind, to in reporters for flag in (f"={kind}", f"-destination={to}")]
    chosen = ["--test-name-pattern", sys.argv[2]] if sys.argv[1:2] == ["-k"] else []
    return _run(["node", "--test", *flags, *chosen, file.name], report, folder, expected, variables)


def _run(command: Sequence[str], report: Path, folder: Path, expected: Expected, variables: Mapping[str, str]) -> int:
    """Runs tests that write a report in JUnit's form, and compares."""
    CACHE.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=folder, env={**os.environ, **variables}, timeout=_SECONDS)
    outcomes = dict(_outcomes(report))
    report.unlink()
    return compare(outcomes, expected)


def compare(outcomes: Mapping[str, str], expected: Expected) -> int:
    """Prints what came of the tests; returns 0 where all did what is expected of them.

    Args:
        outcomes: name of a test -> "passed", "failed" or "skipped".
        expected: tests that do not pass.
    """
    print(f"\n{dict(Counter(outcomes.values()))} of {len(outcomes)}")
    wrong = 0
    for name, outcome in sorted(outcomes.items()):
        why = expected.reason(name)
        if outcome == "failed" and why is None:
            print(f"failed, and is not expected to: {name}")
            wrong += 1
        elif outcome == "passed" and why is not None and not expected.may_pass(name):
            print(f"passed, and is expected to fail ({why}): {name}")
            wrong += 1
    failed = Counter(expected.reason(name) for name, outcome in outcomes.items() if outcome == "failed")
    for why, count in failed.most_common():
        print(f"{count:4d}  {why or 'not expected'}")
    return 1 if wrong or not outcomes else 0


def _outcomes(report: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314  # pytest has just written it
        name = f"{(case.get('classname') or '').rpartition('.')[2]}::{case.get('name')}"
        kinds = {child.tag for child in case}
        failed = bool(kinds & {"failure", "error"})
        found.append((name, "failed" if failed else "skipped" if "skipped" in kinds else "passed"))
    return found
