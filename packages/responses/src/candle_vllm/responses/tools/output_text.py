"""A tool's output as the text that a model reads: each kind of content, in order, within a limit."""

from __future__ import annotations

import json
from typing import Any

from candle_vllm.responses.tools.tool import ContentPart, ToolOutput

NOTHING = "(the tool returned nothing)"


def output_text(output: ToolOutput, max_chars: int) -> str:
    """The output as text of at most `max_chars` characters; where it is cut, its end says so.

    Texts and text resources stand as they are; of pictures, sound and other data the model learns what there is.
    Structured output is shown as JSON where there is no text that says the same.
    """
    texts = [_part_text(part) for part in output.content]
    if output.structured is not None and not _has_text(output):
        texts.append(_json(output.structured))
    text = "\n".join(text for text in texts if text) or NOTHING
    return cut(text.encode("utf-8", "replace").decode("utf-8"), max_chars)


def cut(text: str, max_chars: int) -> str:
    """The text, or its beginning and a note of how much is missing."""
    if len(text) <= max_chars:
        return text
    note = f"\n[cut: the whole output has {len(text)} characters]"
    return text[: max_chars - len(note)] + note if len(note) < max_chars else text[:max_chars]


def output_size(output: ToolOutput) -> int:
    """Characters of all that is in it, base64 as it stands; structured output counts where no text says the same."""
    size = sum(len(part.text or "") + len(part.data or "") for part in output.content)
    return size if output.structured is None or _has_text(output) else size + len(_json(output.structured))


def _has_text(output: ToolOutput) -> bool:
    return any(part.kind == "text" and part.text for part in output.content)


def _part_text(part: ContentPart) -> str:
    if part.kind == "text":
        return part.text or ""
    if part.kind == "resource_link":
        return _bracketed("link to a resource", part.name, part.uri, part.mime_type)
    size = None if part.data is None else f"{_bytes_of_base64(part.data)} bytes"
    label = _bracketed(part.kind, part.name, part.uri, part.mime_type, size)
    return f"{label}\n{part.text}" if part.text else label


def _bracketed(kind: str, *details: str | None) -> str:
    told = ", ".join(f"{detail:.2000}" for detail in details if detail)
    return f"[{kind}: {told}]" if told else f"[{kind}]"


def _bytes_of_base64(data: str) -> int:
    return max(0, len(data) * 3 // 4 - data[-2:].count("="))


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return "[structured output that is no JSON]"
