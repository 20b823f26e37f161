# SPDX-License-Identifier: MIT
"""Grammars of these tests are tried in this process before they are compiled."""

from __future__ import annotations

import time

import pytest
from llguidance import LLMatcher, LLTokenizer

from candle_vllm.core.sampling import llguidance_compiler


@pytest.fixture
def tried_in_a_process() -> None:
    """The test tries grammars as an engine does."""


@pytest.fixture(autouse=True)
def _tried_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine tries each grammar of these forms in a new process, which takes 0.2 s of CPU to start: a minute in all.

    Here the same compiler has the same time, and a grammar that takes longer fails the test.
    """

    def ends_in_time(text: str) -> bool:
        known = llguidance_compiler._TOKEN.sub("<[256]>", text)
        began = time.process_time()
        LLMatcher(LLTokenizer("byte"), known, log_level=0, limits=llguidance_compiler.LIMITS)
        assert time.process_time() - began < llguidance_compiler.MOST_COMPILING
        return True

    if "tried_in_a_process" not in request.fixturenames:
        monkeypatch.setattr(llguidance_compiler, "_ends_in_time", ends_in_time)
