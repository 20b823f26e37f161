# SPDX-License-Identifier: MIT
"""The npm package of Claude Code, run unchanged against our server, in a home and a folder of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.registry_packages import CACHE, checked, npm_file, unpacked

VERSION = "2.1.329"
_SHA256 = "a74d6c8441a19b2d2f44c1f5735b37dc0a34b2d4f224f8333d08ce03cf2060bb"
_SECONDS = 120  # for one run; an idle machine takes one


def claude_code() -> Path:
    """Return the program, one file of 378 MB, or skip the test."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or platform.libc_ver()[0] != "glibc":
        pytest.skip("Claude Code's package for Linux on x86-64 with glibc does not run here")
    name = "anthropic-ai-claude-code-linux-x64"
    folder = CACHE / f"claude-code-{VERSION}"
    if not (folder / "complete").exists():
        archive = checked(npm_file(f"@anthropic-ai/claude-code-linux-x64@{VERSION}", f"{name}-{VERSION}.tgz"), _SHA256)
        unpacked(archive, "package/", lambda inside: inside == "claude", folder)
    program = folder / "claude"
    program.chmod(0o755)
    return program


class Run(NamedTuple):
    """Result of a run of Claude Code.

    Attributes:
        status: its exit status.
        lines: the printed JSON objects, one a line.
        errors: its standard error.
    """

    status: int
    lines: list[dict[str, Any]]
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """The last object, with the result."""
        assert self.lines, self.errors
        assert self.lines[-1]["type"] == "result"
        return self.lines[-1]

    def blocks(self, role: str, kind: str) -> list[dict[str, Any]]:
        """Return the blocks of a kind in the messages of a role, in order."""
        contents = [line["message"]["content"] for line in self.lines if line["type"] == role]
        blocks = [block for content in contents if isinstance(content, list) for block in content]
        return [block for block in blocks if block["type"] == kind]


class ClaudeCode:
    """Claude Code with a home and a working folder of its own.

    Args:
        program: the file to run.
        folder: an empty folder, in which both are created.
        url: the server's URL.
        inside: a command before the program, which runs it in the server's network.
    """

    def __init__(self, program: Path, folder: Path, url: str, inside: Sequence[str] = ()) -> None:
        self.work, self._home = folder / "work", folder / "home"
        self.work.mkdir()
        self._home.mkdir()
        self._command = [*inside, str(program)]
        self._url = url

    def run(self, prompt: str, *flags: str, environment: Mapping[str, str] | None = None) -> Run:
        """Run a prompt and print the answer; only edits of files in the working folder and `echo` are allowed.

        Args:
            environment: variables beyond the few that it always gets; this process's environment is not inherited.
        """
        done = subprocess.run(
            [*self._command, "-p", prompt, "--output-format", "stream-json", "--verbose",
             "--permission-mode", "acceptEdits", "--allowedTools", "Bash(echo:*)", *flags],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.work,
            env=self._environment() | dict(environment or {}),
            timeout=_SECONDS,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return Run(done.returncode, lines, done.stderr)

    def _environment(self) -> dict[str, str]:
        models = ("ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")))
        return {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "HOME": str(self._home),
            "TMPDIR": str(self._home),
            "ANTHROPIC_BASE_URL": self._url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        } | dict.fromkeys(models, "scripted")
