"""Labels of a response or a conversation, for its owner's own records."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from candle_vllm.openai.protocol.fields import invalid
from candle_vllm.responses.protocol.fields import MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE


def _checked(metadata: dict[str, str]) -> dict[str, str]:
    if len(metadata) > MAX_METADATA:
        raise invalid("", f"must have at most {MAX_METADATA} pairs, not {len(metadata)}")
    for key, value in metadata.items():
        if not 0 < len(key) <= MAX_METADATA_KEY:
            raise invalid("", f"has a key of {len(key)} characters; 1 to {MAX_METADATA_KEY} are allowed")
        if len(value) > MAX_METADATA_VALUE:
            raise invalid(key, f"must have at most {MAX_METADATA_VALUE} characters, not {len(value)}")
    return metadata


Metadata = Annotated[dict[str, str], AfterValidator(_checked)]
"""Up to 16 pairs of texts."""
