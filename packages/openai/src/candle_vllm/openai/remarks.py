# SPDX-License-Identifier: MIT
"""Warnings to the client about its request: collected while the request is prepared, and added to its response.

The code that sends a response with headers (a server) calls `collect_remarks`; layers with a warning call `remark`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

MAX_REMARKS = 16
_current: ContextVar[list[str] | None] = ContextVar("candle_vllm_remarks", default=None)
_lenient: ContextVar[bool] = ContextVar("candle_vllm_unknown_fields", default=False)


def collect_remarks(*, unknown_fields: bool = False) -> Sequence[str]:
    """Start to collect warnings, in this asyncio task and those that it starts; return the list of the warnings.

    `unknown_fields` decides whether unknown fields of requests give warnings; otherwise they are refused.
    """
    found: list[str] = []
    _current.set(found)
    _lenient.set(unknown_fields)
    return found


def unknown_fields_pass() -> bool:
    """Whether unknown fields of requests give warnings."""
    return _lenient.get()


def remark(texts: Iterable[str]) -> None:
    """Add sentences to the collected warnings; those beyond `MAX_REMARKS` are dropped."""
    found = _current.get()
    if found is None:
        return
    for text in texts:
        if text not in found and len(found) < MAX_REMARKS:
            found.append(text)
