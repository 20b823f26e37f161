# SPDX-License-Identifier: MIT
"""A server process whose engine answers from a script: the real command, sockets and signals, without a model."""

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
    """Return a call in the text of the scripted model."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def can_be_isolated() -> bool:
    """Whether this machine can start processes whose only network is a loopback of their own."""
    try:
        return subprocess.run([*_NAMESPACE, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


class ScriptedServer(ServerProcess):
    """`candle-vllm` serving a script, as the model `scripted`.

    Args:
        folder: its working folder, with logs of requests and with the prompts that it received.
        answers: chunks of the answer, by a text in the prompt; the first text that the prompt contains counts.
        flags: added to the command line.
        isolated: whether its only network is a loopback of its own; `inside` starts programs there.
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
        """Words before a command that make it run in an isolated server's network."""
        return ("nsenter", "--target", str(self.pid), "--user", "--net", "--preserve-credentials")

    def answered(self, least: int) -> list[tuple[str, int]]:
        """Return `METHOD PATH` and status of all ended requests, in order of their ends; wait for at least `least`.

        A request is logged a moment after its client has the answer.
        """
        wait_for(lambda: len(self._logged(_REQUEST)) >= least)
        return [(f"{method} {path}", int(status)) for method, path, status in self._logged(_REQUEST)]

    @property
    def counted(self) -> list[tuple[int, int]]:
        """Return the logged prompt tokens and completion tokens of every generation so far."""
        return [(int(prompt), int(completion)) for prompt, completion in self._logged(_GENERATION)]

    @property
    def prompts(self) -> list[str]:
        """Prompts that the engine has received."""
        path = self._folder / "prompts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _logged(self, line: re.Pattern[str]) -> list[tuple[str, ...]]:
        return line.findall((self._folder / "server.log").read_text())
