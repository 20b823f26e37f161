# SPDX-License-Identifier: MIT
"""What developers have besides the code: hooks that run what CI runs, tasks, a dev container, and the site."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def read(path: str) -> Any:
    """JSON with whole lines of comments."""
    return json.loads(re.sub(r"^\s*//.*$", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_hooks_run_what_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    for command in ("ruff check", "ruff format --check", "lint-imports", "pyrefly check", "npm run --silent check"):
        assert any(command in entry for entry in entries), command
        assert command in script
    tests = [word for entry in entries for word in entry.split() if word.startswith("tests/")]
    assert tests
    assert all((ROOT / path).exists() for path in tests)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_no_file_has_the_marks_of_a_merge() -> None:
    done = subprocess.run(
        ["git", "grep", "-nE", "^(<{7}|>{7}) "], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")  # 1: nothing is found


def test_tasks_and_recipes_are_there() -> None:
    recipes = set(re.findall(r"^([a-z-]+)[^\n=]*:$", (ROOT / "justfile").read_text(), re.MULTILINE))
    tasks = {task["label"]: task["command"] for task in read(".vscode/tasks.json")["tasks"]}
    assert {"Start", "Compose up", "Format", "Lint"} <= tasks.keys()
    for command in tasks.values():
        if command.startswith("just "):
            assert command.split()[1] in recipes
        for path in re.findall(r"(?:deploy|\.ci)/[\w./-]+", command):
            assert (ROOT / path).exists()
    assert {each["module"] for each in read(".vscode/launch.json")["configurations"] if "module" in each} == {
        "candle_vllm",
        "pytest",
    }


@pytest.mark.every_case
@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/[cg]pu/*.py")), ids=lambda script: script.stem)
def test_benchmarks_start_as_they_say(script: Path) -> None:
    command = re.search(r"^    python (.+)", script.read_text(encoding="utf-8"), re.MULTILINE)
    if command is None:
        pytest.skip("not a program")
    module, name, *_ = command[1].split()
    start = [module, name] if module == "-m" else [module]
    subprocess.run([sys.executable, *start, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("folder", [".devcontainer", ".devcontainer/cuda"])
def test_dev_containers_name_what_there_is(folder: str) -> None:
    about = read(f"{folder}/devcontainer.json")
    assert (ROOT / folder / about["build"]["dockerfile"]).resolve() == ROOT / ".devcontainer" / "Dockerfile"
    assert (ROOT / about["postCreateCommand"].split()[1]).exists()
    assert 2000 in about["forwardPorts"]


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(nav) == len(set(nav))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= set(nav)


@pytest.mark.every_case
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    given = {name: value for name, value in os.environ.items() if name != "UV_NO_SYNC"} | {"NO_MKDOCS_2_WARNING": "1"}
    command = [uv, "run", "--isolated", "--only-group", "site", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=280)
    if done.returncode and "ailed to fetch" in done.stderr:
        pytest.skip("mkdocs-material cannot be had")
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr
    assert "InferenceEngine" in (tmp_path / "reference" / "core" / "index.html").read_text()
