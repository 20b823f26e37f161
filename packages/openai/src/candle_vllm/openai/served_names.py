"""The names under which a model is served."""

from __future__ import annotations

from collections.abc import Sequence

from candle_vllm.openai.errors import ModelNotServedError

ANY_MODEL = "default"  # the name that always means the served model


class ServedNames:
    """One name or more; the first is used where a request names none.

    Attributes:
        all: the names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.all = tuple(names)

    def served(self, name: str | None) -> str:
        """The name to answer with; raises `ModelNotServedError`."""
        if name is not None and name in self.all:
            return name
        if name is None or name == ANY_MODEL:
            return self.all[0]
        raise ModelNotServedError(f"The model {name!r} is not served here; served are: {', '.join(self.all)}.", "model")
