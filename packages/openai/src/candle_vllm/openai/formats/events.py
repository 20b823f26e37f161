# SPDX-License-Identifier: MIT
"""What a parser finds in a model's text (step 10): pieces of content, of reasoning, and of tool calls.

Pieces of one kind that follow each other may be cut anywhere; their concatenation does not depend on the cuts.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class TextPiece(msgspec.Struct, frozen=True):
    """Text of the answer, or of the thoughts before it."""

    kind: Literal["content", "reasoning"]
    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A tool call begins: number `index` of the message, with its id and the function's name."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


class CallEnd(msgspec.Struct, frozen=True):
    """A call is over.

    Attributes:
        index: which call.
        whole: its arguments were closed, by the model or by repair.
    """

    index: int
    whole: bool


Event = TextPiece | CallStart | CallArguments | CallEnd
