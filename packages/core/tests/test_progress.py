# SPDX-License-Identifier: MIT
"""Progress: who listens hears it, and a terminal shows it."""

from __future__ import annotations

import io
import sys
from weakref import WeakSet

import pytest
from tqdm import tqdm

from candle_vllm.core import progress as progress_module
from candle_vllm.core.engine.step.stream import shown_bar
from candle_vllm.core.progress import Progress, heard_by, progress_bar, tell


def test_who_listens_hears_it_until_the_block_ends() -> None:
    outer: list[Progress] = []
    inner: list[Progress] = []
    with heard_by(outer.append):
        with heard_by(inner.append):
            tell("loading", 1, 4)
        tell("compiling", 2, 3, " kernels")
    tell("unheard")
    assert inner == [Progress("loading", 1, 4)]
    assert outer == [Progress("loading", 1, 4), Progress("compiling", 2, 3, " kernels")]


@pytest.mark.parametrize(
    ("progress", "words", "percent"),
    [
        (Progress("loading", 299, 1000), "loading, 29 %", 29),
        (Progress("compiling", 2, 3, " kernels"), "compiling, 2 of 3", 66),
        (Progress("compiling", 2, 0, " kernels"), "compiling, 2", None),
        (Progress("reading"), "reading", None),
        (Progress("downloading", 5, 4), "downloading, 100 %", 100),
    ],
)
def test_words(progress: Progress, words: str, percent: int | None) -> None:
    assert (str(progress), progress.percent) == (words, percent)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_process_without_standard_error_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(), shown_bar("prompts", 1, True) as advance:
        advance()


def test_a_terminal_shows_each_thing_that_takes_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm, "_instances", WeakSet())  # bars that others left open would stand above
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress_bar():
        tell("loading", 1, 4)
        assert terminal.getvalue() == ""  # what is done within a second needs no bar
        now[0] = 1.5
        tell("loading", 2 << 20, 4 << 20)
        tell("compiling", 2, 0, " kernels")
        tell("compiling", 3, 9, " kernels")
    tell("unheard", 1, 2)
    shown = terminal.getvalue()
    assert "loading:  50%" in shown
    assert "2.10M/4.19M" in shown
    assert "compiling" in shown
    assert "unheard" not in shown


def test_nothing_is_shown_or_imported_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 1e9)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar():
        tell("loading", 1, 4)
    assert log.getvalue() == ""
