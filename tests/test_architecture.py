# SPDX-License-Identifier: MIT
"""docs/architecture.md is the tree, the packages import in one direction, and the text of the repository is clean."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from deploy.site.modules import modules_page, summaries

import candle_vllm

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("core", "openai", "responses", "server")
FORBIDDEN = re.compile(
    # brackets, so that this file does not match itself
    r"pypi[.]org|pythonhosted[.]org|registry[.]npmjs|npmjs[.]org|conda[.]anaconda|download[.]pytorch[.]org"
    r"|/w[o]rk/|/r[o]ot/|/h[o]me/\w+/|/U[s]ers/\w+/"
)


@cache
def modules() -> dict[str, Path]:
    """Every module with content, by its path below `candle_vllm/`."""
    found = {}
    for package in PACKAGES:
        base = ROOT / "packages" / package / "src" / "candle_vllm"
        for path in sorted(base.rglob("*.py")):
            if path.name != "__init__.py" or path.read_text(encoding="utf-8").strip():
                found[path.relative_to(base).as_posix()] = path
    return found


def test_every_module_has_a_summary_line() -> None:
    """The page of modules is made of the docstrings' first lines."""
    lines = {name: line for package in PACKAGES for name, line in summaries(package).items()}
    assert set(lines) == set(modules())
    assert not [name for name, line in lines.items() if not line]
    page = modules_page()
    assert all(f"- `{name}`: {line}\n" in page for name, line in lines.items())


def test_paths_and_names_elsewhere_on_the_page_exist() -> None:
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
    for span in spans:
        if re.fullmatch(r"(core|openai|responses|server)/[\w/]+\.py", span):
            assert span in modules(), span
        elif re.fullmatch(r"(packages|docs|tests)/[\w/.]+", span):
            assert (ROOT / span).exists(), span
    named = set(re.findall(r"\b(?:[A-Z]+[a-z]+){2,}\b", PAGE))
    assert {"InferenceEngine", "OpenAIAdapter", "ModelRunner"} <= named
    assert named <= defined_names(), named - defined_names()


@cache
def defined_names() -> frozenset[str]:
    """Classes of all packages."""
    texts = (path.read_text(encoding="utf-8") for path in modules().values())
    return frozenset(name for text in texts for name in re.findall(r"^ *class (\w+)", text, re.MULTILINE))


def test_the_ten_steps_are_numbered_and_stand_in_docstrings() -> None:
    """The first module of each row says which step it is."""
    table = re.findall(r"^\| (\d+) \| .* \| `([^`]+)`.* \|$", PAGE, re.MULTILINE)
    assert [int(number) for number, _ in table] == list(range(1, 11))
    for number, name in table:
        docstring = ast.get_docstring(ast.parse(modules()[name].read_text(encoding="utf-8"))) or ""
        assert re.search(rf"[Ss]teps? ([\w, ]* )?{number}\b", docstring), (number, name)


@pytest.mark.timeout(300)
def test_import_contracts() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b0 broken\b", done.stdout)


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports in functions and for types count; the error names the circle."""
    assert len(candle_vllm.__path__) > 1, "an import tells grimp where the packages are"
    graph = grimp.build_graph("candle_vllm", cache_dir=None)
    assert {f"candle_vllm.{package}" for package in PACKAGES} <= graph.modules
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_seven_modules_of_the_server_take_all_settings() -> None:
    """The other modules take the options of their part, a base of `Settings`; imports for types count."""
    found = set[str]()
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "Settings" in text else ():
            imported = isinstance(node, ast.ImportFrom) and any(each.name == "Settings" for each in node.names)
            if imported or (isinstance(node, ast.Attribute) and node.attr == "Settings"):
                found.add(name)
    own = {"__init__", "app", "routes/ollama_library", "serve", "settings/__init__", "settings/catalogue"}
    assert found == {f"server/{name}.py" for name in own | {"settings/configuration"}}


def tracked() -> list[Path]:
    """Files that git tracks, or would with the next `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_download_hosts_and_no_paths_of_a_machine() -> None:
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text = data.decode("utf-8")  # and every text is UTF-8
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not found


def test_the_type_checker_is_given_every_package_and_the_benchmarks() -> None:
    """A pattern that matches nothing is no error to it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    sources = [f"packages/{package}/src" for package in PACKAGES]
    assert settings["tool"]["pyrefly"]["project-includes"] == ["benchmarks", *sources, "src"]


def test_every_source_file_begins_with_its_licence() -> None:
    """In the first line, behind that which names a program; what is generated and what is empty has none."""
    endings = (".py", ".pyi", ".sh", ".ts", ".tsx", ".mjs", ".js", ".css")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    lacking = []
    for name in listed:
        if name.endswith(endings) and "/static/" not in name and (ROOT / name).is_file():
            lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines()[:2] if line[:2] != "#!"]
            if any(line.strip() for line in lines) and "SPDX-License-Identifier: MIT" not in lines[0]:
                lacking.append(name)
    assert not lacking, f"'SPDX-License-Identifier: MIT' is not the first line of {', '.join(lacking[:20])}"
