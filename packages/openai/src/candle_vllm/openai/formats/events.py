# SPDX-License-Identifier: MIT
"""Events of a parser: deltas of content, reasoning and tool calls in a model's text (step 10 of a request's life).

Consecutive deltas of one kind may be split anywhere; the text that they add up to does not depend on the splits.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class TextPiece(msgspec.Struct, frozen=True):
    """Delta of the answer's text or of the reasoning."""

    kind: Literal["content", "reasoning"]
    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins: the call number `index` of the message, with its id and the function's name."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """Delta of the JSON text of a call's arguments."""

    index: int
    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """The call number `index` ends; `whole` tells whether its arguments were closed, by the model or by repair."""

    index: int
    whole: bool


Event = TextPiece | CallStart | CallArguments | CallEnd
