"""From settings to the store of responses and conversations (before step 1 of a request's life)."""

from __future__ import annotations

from candle_vllm.responses.api.kept import KeptResponses
from candle_vllm.responses.store.options import MEMORY, StoreOptions
from candle_vllm.server.kinds import UsageError
from candle_vllm.server.settings import Settings

OFF = "off"
HOME_FILE = "sqlite:///~/.candle-vllm/responses.sqlite"
_SCHEMES = ("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")


def store_options(settings: Settings) -> StoreOptions | None:
    """The options, or None where nothing shall be kept; UsageError where the URL is none. It is not repeated."""
    url = settings.responses_store
    if url == OFF:
        return None
    if url not in (MEMORY, "sqlite") and not url.startswith(_SCHEMES):
        raise UsageError(
            "responses_store must be memory, sqlite, sqlite:///path, postgresql://user:password@host/database or off"
        )
    return StoreOptions(
        url=HOME_FILE if url == "sqlite" else url,
        retention_days=settings.responses_retention_days,
        max_records=settings.responses_max_records,
        max_bytes=settings.responses_max_mb << 20,
    )


def kept_responses(settings: Settings) -> KeptResponses | None:
    """What keeps responses, to be started and closed by the application; None where nothing shall be kept."""
    options = store_options(settings)
    return None if options is None else KeptResponses(options)
