# SPDX-License-Identifier: MIT
"""A failed speculation fails the test in which it happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from candle_vllm.core.engine.step.engine import Engine


@pytest.fixture
def failing_guesses() -> None:
    """For a test in which guesses shall fail."""


@pytest.fixture(autouse=True)
def _guesses_succeed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An engine goes on where a guess fails, which is worth no answer; a test fails, for it is a mistake of ours."""
    failures, guess = list[dict[type[Exception], str]](), Engine._propose_drafts

    def noted(engine: Engine, *given: Any) -> None:
        before = len(engine.draft_failures)
        guess(engine, *given)
        if len(engine.draft_failures) > before:
            failures.append(dict(engine.draft_failures))

    monkeypatch.setattr(Engine, "_propose_drafts", noted)
    yield
    if "failing_guesses" not in request.fixturenames:
        assert failures == []
