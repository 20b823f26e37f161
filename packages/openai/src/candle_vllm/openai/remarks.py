# SPDX-License-Identifier: MIT
"""What the sender of a request should know although it is answered: collected while it is prepared, for who answers.

Whoever has an answer with headers (a server) begins to collect; the layers that find something need not know of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

MAX_REMARKS = 16
_current: ContextVar[list[str] | None] = ContextVar("candle_vllm_remarks", default=None)


def collect_remarks() -> Sequence[str]:
    """Begins to collect, in this task and those that it starts; what is given grows."""
    found: list[str] = []
    _current.set(found)
    return found


def remark(texts: Iterable[str]) -> None:
    """Adds sentences to those that are collected; those beyond a few are dropped."""
    found = _current.get()
    if found is None:
        return
    for text in texts:
        if text not in found and len(found) < MAX_REMARKS:
            found.append(text)
