# SPDX-License-Identifier: MIT
"""Runs the MCP conformance suite's client scenarios against `McpLink` and prints what came of each.

    uv run --group dev python tests/mcp_conformance/run.py [SCENARIO ...]

Without arguments it runs all scenarios of both eras, those that are known to fail too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a program

from tests.mcp_servers import conformance_suite, node_24  # noqa: E402

OLDER, NEWER = "2025-11-25", "2026-07-28"
PASSING: tuple[tuple[str, str | None], ...] = (
    ("initialize", OLDER),
    ("tools_call", OLDER),
    ("sse-retry", OLDER),
    ("json-schema-2020-12-preservation", OLDER),
    ("tools_call", NEWER),
    ("request-metadata", NEWER),
    ("http-standard-headers", NEWER),
    ("http-custom-headers", NEWER),
    ("http-invalid-tool-headers", NEWER),
    ("json-schema-ref-no-deref", NEWER),
    ("json-schema-2020-12-preservation", NEWER),
    ("auth/pre-registration", OLDER),
    ("auth/pre-registration", NEWER),
    ("auth/client-credentials-basic", None),
)
ALIKE = (("initialize", OLDER), ("json-schema-2020-12-preservation", OLDER), ("auth/pre-registration", OLDER))
"""Passing ones for which others stand in the common run: their like of the newer era, or what begins with them."""
FAILING = {
    "elicitation-sep1034-client-defaults": "a link refuses to ask the user for a server",
    "sep-2322-client-request-state": "the same: its retries begin with a question to the user",
    "auth/client-credentials-jwt": "a link has client credentials with a secret alone",
    "sep-2640-": "skills are an extension that a link does not have",
    "auth/": "a link opens no browser: it has a token, or client credentials with a secret",
}
"""Scenarios that fail, by the beginnings of their names, and why."""
_SECONDS = 60
_LISTED = re.compile(r"- (\S+) \[(.*)\]")
_COUNTS = re.compile(r"Passed: (\d+)/(\d+)")


class Outcome(NamedTuple):
    """What came of a scenario: how many of its checks passed, and what the suite printed."""

    scenario: str
    version: str | None
    passed: bool
    checks: str
    output: str


def run_scenario(scenario: str, version: str | None, clients: str) -> Outcome:
    """Runs one; None is a scenario of an extension, which belongs to no version of the specification.

    Args:
        clients: the socket of `client.py`.
    """
    client = f"{sys.executable} -IS {HERE / 'relay.py'} {clients}"
    command = [str(node_24()), str(conformance_suite()), "client", "--command", client, "--scenario", scenario]
    done = subprocess.run(
        [*command, *(["--spec-version", version] if version else [])],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        env=_environment(),
    )
    output = done.stdout + done.stderr
    counts = _COUNTS.search(output)
    checks = f"{counts[1]}/{counts[2]}" if counts else "-"
    judged = counts is not None and counts[2] != "0"  # a scenario that saw nothing passes by the suite's own counting
    return Outcome(scenario, version, done.returncode == 0 and judged, checks, output)


def _environment() -> dict[str, str]:
    return {"PATH": os.defpath, "HOME": os.environ["HOME"]}


def run_scenarios(scenarios: Sequence[tuple[str, str | None]]) -> list[Outcome]:
    """Runs them, two at a time."""
    node_24()  # what is installed at the first need must not be installed twice at the same time
    conformance_suite()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        clients = f"{folder}/clients"
        command = [sys.executable, HERE / "client.py", clients]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"listening\n"
                return list(pool.map(lambda one: run_scenario(*one, clients), scenarios))
            finally:
                process.kill()


def all_scenarios() -> list[tuple[str, str | None]]:
    """Every client scenario that the suite has, in each era that it belongs to."""
    listed = subprocess.run(
        [str(node_24()), str(conformance_suite()), "list", "--client"], capture_output=True, text=True, check=True
    )
    found: list[tuple[str, str | None]] = []
    for name, versions in _LISTED.findall(listed.stdout):
        eras: list[str | None] = [version for version in (OLDER, NEWER) if version in versions.split(",")]
        found += [(name, era) for era in eras] or ([(name, None)] if versions == "extension" else [])
    return found


def reason(scenario: str) -> str:
    """Why a scenario is known to fail, or nothing."""
    return next((why for start, why in FAILING.items() if scenario.startswith(start)), "")


def main(names: list[str]) -> int:
    """Prints a line for each scenario; the exit status is 1 where one failed that is not known to."""
    scenarios = [one for one in all_scenarios() if not names or one[0] in names]
    surprises = 0
    for outcome in run_scenarios(scenarios):
        known = "" if outcome.passed else reason(outcome.scenario)
        surprises += not outcome.passed and not known
        word = "passed" if outcome.passed else "failed"
        print(f"{outcome.scenario:42} {outcome.version or 'extension':10} {word} {outcome.checks:6} {known}")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
