# SPDX-License-Identifier: MIT
"""Hooks of MkDocs: add pages from outside of docs/, and the reference, which is made of docstrings.

Links to pages of the site lead there; links to other files of the repository become plain text.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from modules import PACKAGES, modules_page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "README.md": "index.md",
    "LIBRARY_API.md": "library.md",
    "CONTRIBUTING.md": "contributing.md",
    "deploy/README.md": "deploy.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_startup(*, command: str, dirty: bool) -> None:  # noqa: ARG001
    """Copy the four packages into one folder, because mkdocstrings reads only the first part of a namespace."""
    folder = ROOT / ".site" / "sources" / "candle_vllm"
    shutil.rmtree(folder, ignore_errors=True)
    for package in PACKAGES:
        source = ROOT / "packages" / package / "src" / "candle_vllm" / package
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("static", "compiled", "__pycache__"))
    (folder / "__init__.py").touch()  # in a namespace, only installed packages would be found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and the reference."""
    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for package in PACKAGES:
        files.append(File.generated(config, f"reference/{package}.md", content=reference(package)))
    files.append(File.generated(config, "modules.md", content=modules_page()))
    return files


def reference(package: str) -> str:
    """Return a page that includes the docstrings of all public names of a package."""
    tree = ast.parse((ROOT / f"packages/{package}/src/candle_vllm/{package}/__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    about = ast.get_docstring(tree) or ""
    parts = [f"# candle_vllm.{package}\n\n{about}\n"]
    parts += [
        f"::: candle_vllm.{package}.{name}\n    options:\n      heading_level: 2\n" for name in names if name in homes
    ]
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Convert links to files of the repository to links of the site, or to plain text."""
    here = page.file.src_uri
    own = next((name for name, made in ELSEWHERE.items() if made == here), f"docs/{here}")

    def link(found: re.Match[str]) -> Any:
        picture, words, target = found.groups()
        if "://" in target or target.startswith("#"):
            return found[0]
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
        uri = ELSEWHERE.get(there, there.removeprefix("docs/") if there.startswith("docs/") else "")
        if there == "deploy":
            uri = "deploy.md"
        if not uri or files.get_file_from_path(uri) is None:
            return "" if picture else words
        near = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        return f"{picture}[{words}]({near}{'#' + anchor if anchor else ''})"

    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in fences)
