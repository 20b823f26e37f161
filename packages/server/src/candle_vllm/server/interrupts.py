# SPDX-License-Identifier: MIT
"""Ctrl+C while a command starts, and the end of a process in which threads still work.

Before step 1 of a request's life. Imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130


@contextmanager
def leaving_at_once(doing: Callable[[], object]) -> Iterator[None]:
    """Inside, Ctrl+C ends the process at once, with one line that says what was stopped.

    An exception would be raised in the midst of an import or a callback, which swallows it or shows it, and threads
    that compile would run on while the interpreter takes down what they use. So this is for work that leaves nothing
    half done outside the process. Other threads than the main one, and a process whose parent had it ignore Ctrl+C, go
    on as they are.

    Args:
        doing: says what is being done, when it is stopped.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (
        None,
        signal.SIG_IGN,
    ):
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - what a handler takes
        say_stopped(f" while {doing()}")
        os._exit(EXIT_INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say_stopped(what: str = "") -> None:
    """The one line after Ctrl+C, in the place of a bar if there is one."""
    clear = "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""
    os.write(2, f"{clear}candle-vllm: stopped{what}\n".encode(errors="replace"))


def leave(status: int) -> int:
    """Ends the process where threads still work, as one that loads a model which nobody waits for any more.

    They would run on while the interpreter takes down what they use. Where none does, the status comes back.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
    return status
