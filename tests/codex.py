# SPDX-License-Identifier: MIT
"""The npm package of Codex CLI, run unchanged against our server, in a home and a folder of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.registry_packages import CACHE, checked, npm_file, unpacked

VERSION = "0.169.0"
_SHA256 = "89801b4b97faba562eb80fe0a833159ac79399be674022f4b1a0ccab1d153faa"
_SECONDS = 120  # for one run; an idle machine takes one
_CONFIG = """\
model = "scripted"
model_provider = "local"
check_for_update_on_startup = false

[analytics]
enabled = false

[model_providers.local]
name = "local"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "LOCAL_KEY"
request_max_retries = 0
stream_max_retries = 1
"""


def codex() -> Path:
    """Return the program, one file of 294 MB, or skip the test."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("Codex's package for Linux on x86-64 does not run here")
    folder = CACHE / f"codex-{VERSION}"
    if not (folder / "complete").exists():
        version = f"{VERSION}-linux-x64"
        archive = checked(npm_file(f"@openai/codex@{version}", f"openai-codex-{version}.tgz"), _SHA256)
        inside = "package/vendor/x86_64-unknown-linux-musl/"
        unpacked(archive, inside, lambda name: name == "bin/codex", folder)
    program = folder / "bin" / "codex"
    program.chmod(0o755)
    return program


class Run(NamedTuple):
    """Result of a run of Codex.

    Attributes:
        status: its exit status.
        events: the printed JSON objects, one a line.
        errors: its standard error.
    """

    status: int
    events: list[dict[str, Any]]
    errors: str

    def items(self, kind: str) -> list[dict[str, Any]]:
        """Return the completed items of a kind, in order."""
        done = [event["item"] for event in self.events if event["type"] == "item.completed"]
        return [item for item in done if item["type"] == kind]

    @property
    def words(self) -> list[str]:
        """Text of the model."""
        return [item["text"] for item in self.items("agent_message")]


class Codex:
    """Codex with a home and a working folder of its own.

    Args:
        program: the file to run.
        folder: an empty folder, in which both are created.
        url: the server's URL.
        inside: a command before the program, which runs it in the server's network.
    """

    def __init__(self, program: Path, folder: Path, url: str, inside: Sequence[str] = ()) -> None:
        self.work, self._home = folder / "work", folder / "home"
        self.work.mkdir()
        (self._home / ".codex").mkdir(parents=True)
        (self._home / ".codex" / "config.toml").write_text(_CONFIG.format(url=url))
        self._command = [*inside, str(program)]

    def run(self, *arguments: str, key: str = "none") -> Run:
        """Run `codex exec` with these arguments; its commands run without a sandbox of its own."""
        done = subprocess.run(
            [*self._command, "exec", "--json", "--skip-git-repo-check", "--sandbox", "danger-full-access", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.work,
            env={"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(self._home), "LOCAL_KEY": key},
            timeout=_SECONDS,
        )
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        return Run(done.returncode, events, done.stderr)
