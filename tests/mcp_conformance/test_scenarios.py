# SPDX-License-Identifier: MIT
"""The MCP conformance suite, which others wrote, judges our links."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.mcp_conformance.run import ALIKE, FAILING, PASSING, run_scenarios

pytestmark = [pytest.mark.peer, pytest.mark.timeout(600)]


@pytest.mark.every_case
@pytest.mark.parametrize(
    "scenarios",
    [[one for one in PASSING if one not in ALIKE], pytest.param(ALIKE, marks=pytest.mark.every_case)],
    ids=["one of each", "alike"],
)
def test_the_scenarios_of_both_eras_pass(scenarios: Sequence[tuple[str, str | None]]) -> None:
    outcomes = run_scenarios(scenarios)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert not failed, "\n".join(f"{outcome.scenario} {outcome.version}\n{outcome.output}" for outcome in failed)


def test_what_fails_is_known() -> None:
    """A scenario that begins to pass belongs with the others."""
    known = [(name, "2026-07-28") for name in FAILING if name.startswith("sep-2322")]
    known.append(("elicitation-sep1034-client-defaults", "2025-11-25"))
    assert [outcome.scenario for outcome in run_scenarios(known) if outcome.passed] == []
