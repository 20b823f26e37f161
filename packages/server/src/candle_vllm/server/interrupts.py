# SPDX-License-Identifier: MIT
"""Handle Ctrl+C while a command starts, and end a process in which threads still run (before step 1).

Imported before everything else, so it imports next to nothing.
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
    """Context manager in which Ctrl+C ends the process at once, with one line that says what was stopped.

    An import or a callback could swallow or print a KeyboardInterrupt, and threads that compile would go on while the
    interpreter deletes the objects that they use. The work in the context must leave nothing half done outside the
    process. The context has no effect outside the main thread, or if the parent process made this one ignore Ctrl+C.
    `doing` returns a text for the message that describes the current work.
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
    """Write the line after Ctrl+C, over a progress bar if there is one."""
    clear = "\r\x1b[K" if sys.stderr is not None and sys.stderr.isatty() else ""
    os.write(2, f"{clear}candle-vllm: stopped{what}\n".encode(errors="replace"))


def leave(status: int) -> int:
    """End the process if daemon threads still run, such as one that loads a model which nobody waits for.

    They would go on while the interpreter deletes the objects that they use. Threads that write files end first.
    Without daemon threads, return the status.
    """
    if any(thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        from candle_vllm.core.threads import AT_EXIT

        for end in list(AT_EXIT.values()):
            end()
        os._exit(status)
    return status
