# SPDX-License-Identifier: MIT
"""Progress of loading a model: reported where the work is done, shown by listeners."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias


class Progress(NamedTuple):
    """Progress of one activity, such as "loading the weights"; `unit` is "B" for bytes, an unknown total is 0."""

    what: str
    done: int = 0
    total: int = 0
    unit: str = "B"

    @property
    def percent(self) -> int | None:
        """Finished percentage, rounded down; None with an unknown total."""
        return min(100, 100 * self.done // self.total) if self.total else None

    def __str__(self) -> str:
        if self.total and self.unit == "B":
            return f"{self.what}, {self.percent} %"
        if self.done:
            return f"{self.what}, {self.done}{f' of {self.total}' if self.total else ''}"
        return self.what


Listener: TypeAlias = Callable[[Progress], object]

_COUNTED = "{desc}: {n_fmt} of {total_fmt} |{bar}| {elapsed}"
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("_LISTENERS", default=())


def tell(what: str, done: int = 0, total: int = 0, unit: str = "B") -> None:
    """Report progress to all listeners of this context; see `Progress`."""
    teller()(Progress(what, done, total, unit))


def teller() -> Listener:
    """Return a function that reports to all listeners of this context, from any thread."""
    listeners = _LISTENERS.get()

    def told(progress: Progress) -> None:
        for listener in listeners:
            listener(progress)

    return told


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Add a listener for progress that is reported within the context."""
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def progress_bar() -> Iterator[None]:
    """On a terminal, show progress within the context after one second: as a bar, or without a total as a count."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    bar: Any = None
    shown: str | None = None
    shown_from = time.monotonic() + 1.0

    def show(progress: Progress) -> None:
        nonlocal bar, shown
        if bar is not None and progress.what != shown:
            bar.close()
            bar = None
        if bar is None:
            if not progress.done or time.monotonic() < shown_from:
                return
            from tqdm import tqdm  # its import takes as long as loading a small model's weights

            in_bytes = progress.unit == "B"
            bar = tqdm(
                desc=progress.what,
                total=progress.total or None,
                unit=progress.unit,
                unit_scale=in_bytes,
                initial=progress.done,
                leave=False,
                dynamic_ncols=True,
                bar_format=None if in_bytes or not progress.total else _COUNTED,
            )
            shown = progress.what
        bar.total = progress.total or None
        bar.update(progress.done - bar.n)

    with heard_by(show):
        try:
            yield
        finally:
            if bar is not None:
                bar.close()
