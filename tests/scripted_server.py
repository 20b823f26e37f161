# SPDX-License-Identifier: MIT
"""A server process on an engine that answers by a script: the real command, sockets and signals, without a model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.live_server import ServerProcess
from tests.waiting import wait_for

_PROGRAM = Path(__file__).with_name("scripted_program.py")
_NAMESPACE = ("unshare", "--map-root-user", "--net")
_GENERATION = re.compile(r"generations: .* prompt_tokens=(\d+) .* completion_tokens=(\d+) ")
_REQUEST = re.compile(r"requests: (\w+) '([^']*)' (\d{3}) ")


def tool_call(name: str, **arguments: Any) -> str:
    """A call as the scripted model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def can_be_isolated() -> bool:
    """Whether processes without any network but a loopback of their own can be made here."""
    try:
        return subprocess.run([*_NAMESPACE, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


class ScriptedServer(ServerProcess):
    """`candle-vllm` serving a script, as the model `scripted`.

    Args:
        folder: where it runs, logs requests and keeps the prompts that it saw.
        answers: pieces of the answer by a text that is in the prompt; the first that is there counts.
        flags: added to the command line.
        isolated: without a network but a loopback of its own; `inside` starts programs there.
        engine: arguments of the engine, such as `pause` (seconds before each piece) and `fail_after`.
    """

    def __init__(
        self,
        folder: Path,
        answers: Mapping[str, str | Sequence[str]],
        *flags: str,
        isolated: bool = False,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        script = {"answers": dict(answers), "engine": dict(engine or {}), "isolated": isolated}
        (folder / "script.json").write_text(json.dumps(script))
        program = (*(_NAMESPACE if isolated else ()), sys.executable, _PROGRAM)
        names = ("--served-model-name", "scripted", "--tool-parser", "hermes", "--reasoning-parser", "think")
        super().__init__(folder, *names, "--log-requests", *flags, command=program)

    @property
    def inside(self) -> tuple[str, ...]:
        """What to put before a command so that it runs in an isolated server's network."""
        return ("nsenter", "--target", str(self.pid), "--user", "--net", "--preserve-credentials")

    def answered(self, least: int) -> list[tuple[str, int]]:
        """`METHOD PATH` and status of every request so far, in the order of their ends; waits until `least` have ended.

        A request is logged a moment after its client has the answer.
        """
        wait_for(lambda: len(self._logged(_REQUEST)) >= least)
        return [(f"{method} {path}", int(status)) for method, path, status in self._logged(_REQUEST)]

    @property
    def counted(self) -> list[tuple[int, int]]:
        """Prompt tokens and completion tokens of every generation so far, as the log has them."""
        return [(int(prompt), int(completion)) for prompt, completion in self._logged(_GENERATION)]

    @property
    def prompts(self) -> list[str]:
        """What the engine was asked so far."""
        path = self._folder / "prompts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _logged(self, line: re.Pattern[str]) -> list[tuple[str, ...]]:
        return line.findall((self._folder / "server.log").read_text())
