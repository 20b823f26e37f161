# SPDX-License-Identifier: MIT
"""The documents are true: their Python runs, their commands are the ones that work, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from candle_vllm.core.testing import ScriptedEngine
from candle_vllm.server.settings.command_line import parse, split_command
from tests.live_server import serving

ROOT = Path(__file__).parents[1]
WITH_CODE = sorted([ROOT / "README.md", ROOT / "LIBRARY_API.md", *ROOT.glob("packages/*/README.md")])
ALL = sorted(
    [
        *WITH_CODE,
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("deploy/**/README.md"),
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
FILES = re.compile(r'"(?:SmolLM2-135M-Instruct\.Q4_1|model)\.gguf"')
SERVER = "http://127.0.0.1:2000"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def python_blocks() -> list[Any]:
    """Every ```python block with the document and the line that it begins on."""
    found = []
    for path in WITH_CODE:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 2
            name = f"{path.relative_to(ROOT)}:{line}"
            found.append(pytest.param(name, line, match[1], id=name))
    return found


@pytest.mark.one_of_each(9)
@pytest.mark.parametrize(("name", "line", "code"), python_blocks())
def test_python_runs(name: str, line: int, code: str, toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy checkpoint stands for the model, and a scripted server for the one at port 2000."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a client in a document uses the machine's proxies otherwise
    with serving(ScriptedEngine("Hello!")) as url:
        code = FILES.sub(repr(str(toy_model)), code).replace(SERVER, url)
        source = "\n" * (line - 1) + code  # so that a traceback has the document's line
        program = compile(source, name, "exec", dont_inherit=True)
        exec(program, {"__name__": "__main__", "MODEL": str(toy_model)})


def test_library_examples_run_without_torch(toy_model: Path, tmp_path: Path) -> None:
    """As in an install without an extra, where there is no torch to import."""
    blocks = [block.values for block in python_blocks() if str(block.values[0]).startswith("LIBRARY_API.md")]
    with serving(ScriptedEngine("Hello!")) as url:
        programs = [(name, FILES.sub(repr(str(toy_model)), str(code)).replace(SERVER, url)) for name, _, code in blocks]
        (tmp_path / "programs.json").write_text(json.dumps(programs))
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCH, str(toy_model)],
            cwd=tmp_path, env={**os.environ, "no_proxy": "127.0.0.1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("DONE LIBRARY_API.md") == len(programs) > 10


WITHOUT_TORCH = """
import importlib.machinery, json, sys
from pathlib import Path
find = importlib.machinery.PathFinder.find_spec
hidden = ("torch", "triton")
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name in hidden else find(name, *rest)
for name, code in json.loads(Path("programs.json").read_text()):
    exec(compile(code, name, "exec", dont_inherit=True), {"__name__": "__main__", "MODEL": sys.argv[1]})
    print("\\nDONE", name)
"""


def test_there_are_examples_in_every_document_that_promises_them() -> None:
    documents = {str(path.relative_to(ROOT)) for path in WITH_CODE if "```python" in path.read_text(encoding="utf-8")}
    packages = {f"packages/{path.parent.name}/README.md" for path in ROOT.glob("packages/*/README.md")}
    assert documents == {"README.md", "LIBRARY_API.md", *packages}


def test_readme_has_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert commands[0] == "pip install uv && uv run candle-vllm\n"
    assert "uv run --group dev pytest\n" in commands
    script = (ROOT / ".ci" / "run").read_text()
    assert "uv sync --quiet --group dev\n" in script
    assert re.search(r"^uv run --group dev pytest\b", script, re.MULTILINE)


def test_readmes_request_is_answered() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    request = re.search(rf"curl {SERVER}(\S+) -H '([\w-]+): (\S+)' \\\n\s+-d '(.*)'\n", readme)
    assert request is not None
    path, header, value, body = request.groups()
    with serving(ScriptedEngine("Paris.")) as url:
        answer = httpx.post(url + path, headers={header: value}, content=body, trust_env=False)
    assert answer.json()["choices"][0]["message"]["content"] == "Paris."


def command_lines() -> list[object]:
    """Every `candle-vllm` command line in a code block of a document."""
    found = []
    for path in ALL:
        blocks = re.findall(r"^```(.*)\n((?s:.*?))^```$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for line in "".join(block for language, block in blocks if language in ("", "sh")).splitlines():
            if match := re.match(r"(?:pip install uv && )?(?:uv run )?candle-vllm\b(.*)", line):
                found.append(pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{match[1].strip()[:40]}"))
    return found


@pytest.mark.parametrize("arguments", command_lines())
def test_command_lines_are_understood(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(arguments, comments=True)
    command, rest = split_command(words)
    if "--help" in words:
        with pytest.raises(SystemExit) as ended:
            parse(command, rest)
        assert not ended.value.code
        assert "usage:" in capsys.readouterr().out
    else:
        parse(command, rest)


def anchor(heading: str) -> str:
    """A heading's anchor as GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        target, _, fragment = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), link


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    """Paths in code spans that begin with a folder of this repository."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`((?:packages|docs|tests|examples|benchmarks|deploy)/[^`\s]*)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), name
