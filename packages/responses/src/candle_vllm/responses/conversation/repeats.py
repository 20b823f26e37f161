"""Loop detection: a model that asks for the same calls again and again, and gets the same results."""

from __future__ import annotations

import json
from collections.abc import Sequence

from candle_vllm.responses.tools.tool import ToolResult

_Round = tuple[tuple[str, str, str, str], ...]


class RepeatWatch:
    """Counts turns in a row with equal calls and equal results, whatever their order and ids.

    Args:
        most: so many equal turns are a loop.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._last: _Round = ()
        self._count = 0

    def is_loop(self, results: Sequence[ToolResult]) -> bool:
        """Takes the results of one turn; True when they complete a loop."""
        this = tuple(sorted((one.call.name, _canonical(one.call.arguments), one.status, one.text) for one in results))
        self._count = self._count + 1 if this == self._last else 1
        self._last = this
        return bool(this) and self._count >= self._most


def _canonical(arguments: str) -> str:
    """Arguments with their names in order and without blanks; text that is no JSON as it stands."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except (ValueError, RecursionError):
        return arguments
