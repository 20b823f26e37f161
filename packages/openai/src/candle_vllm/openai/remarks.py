# SPDX-License-Identifier: MIT
"""What the sender of a request should know although it is answered: collected while it is prepared, for who answers.

Whoever has an answer with headers (a server) begins to collect; the layers that find something need not know of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

MAX_REMARKS = 16
_current: ContextVar[list[str] | None] = ContextVar("candle_vllm_remarks", default=None)
_lenient: ContextVar[bool] = ContextVar("candle_vllm_unknown_fields", default=False)


def collect_remarks(*, unknown_fields: bool = False) -> Sequence[str]:
    """Begin to collect, in this task and those that it starts.

    Args:
        unknown_fields: whether fields of requests that nobody knows become remarks; otherwise they are refused.

    Returns:
        A list that grows while the request is prepared.
    """
    found: list[str] = []
    _current.set(found)
    _lenient.set(unknown_fields)
    return found


def unknown_fields_pass() -> bool:
    """Whether fields of requests that nobody knows become remarks."""
    return _lenient.get()


def remark(texts: Iterable[str]) -> None:
    """Adds sentences to those that are collected; those beyond a few are dropped."""
    found = _current.get()
    if found is None:
        return
    for text in texts:
        if text not in found and len(found) < MAX_REMARKS:
            found.append(text)
