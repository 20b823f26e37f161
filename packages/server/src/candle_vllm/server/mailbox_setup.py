"""From settings and the `mailbox` section of models.yaml to the mailbox's options.

Read before step 1 of a request's life. A flag, a variable or `.env` wins over the section.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from candle_vllm.server.kinds import UsageError, nearest
from candle_vllm.server.mailbox.options import MailboxOptions, webhook_options
from candle_vllm.server.settings import Settings

FILE = "mailbox.sqlite"
_SCHEMES = ("sqlite:///", "postgresql://", "postgresql+psycopg://", "postgres://")
_NUMBERS = ("retention_secs", "max_record_bytes", "max_records_per_key", "max_records", "max_deliveries")
_LISTS = ("webhook_allowed_hosts", "webhook_allowed_headers")
_KEYS = ("url", *_NUMBERS, *_LISTS, "webhook_allow_private", "webhook")


def mailbox_options(
    settings: Settings,
    section: Mapping[str, Any] | None,
    variables: Mapping[str, str],
    *,
    given: Collection[str],
    home: Path,
) -> MailboxOptions | None:
    """The options, or None where there shall be no mailbox.

    Args:
        settings: of the process.
        section: `mailbox` of models.yaml, or None.
        variables: what `${NAME}` in a secret may stand for.
        given: the settings that somebody gave.
        home: where the file of `--mailbox sqlite` is.

    Raises:
        UsageError: something is wrong, or asks for a mailbox that is off.
    """
    section = {} if section is None else section
    for key in section:
        if key not in _KEYS:
            raise UsageError(f"mailbox: unknown key {str(key)[:60]!r}{nearest(str(key), _KEYS)}")
    url = settings.mailbox or section.get("url")
    if url is None:
        wanted = [name for name in given if name.startswith(("mailbox_", "webhook_"))] or list(section)
        if wanted:
            raise UsageError(f"{wanted[0]} needs a mailbox: set --mailbox, or url in the mailbox section")
        return None
    if not isinstance(url, str) or not (url == "sqlite" or url.startswith(_SCHEMES)):
        raise UsageError("mailbox must be sqlite, sqlite:///path or postgresql://user:password@host/database")
    values: dict[str, Any] = {name: section[name] for name in (*_NUMBERS, "webhook_allow_private") if name in section}
    for name in _LISTS:
        if name in section:
            values[name] = _texts(name, section[name])
    if "webhook" in section:
        values["webhook"] = webhook_options(_mapping(section["webhook"]), variables)
    for name, field in _FROM_SETTINGS.items():
        if name in given:
            values[field] = getattr(settings, name)
    if not isinstance(values.get("webhook_allow_private", False), bool):
        raise UsageError("mailbox: webhook_allow_private must be true or false")
    return MailboxOptions(url=_located(url, home), **values)


_FROM_SETTINGS = {
    "mailbox_retention_secs": "retention_secs",
    "webhook_allowed_hosts": "webhook_allowed_hosts",
    "webhook_allow_private": "webhook_allow_private",
}


def _located(url: str, home: Path) -> str:
    if url != "sqlite":
        return url
    folder = home / ".candle-vllm"
    folder.mkdir(mode=0o700, exist_ok=True)
    return f"sqlite:///{folder / FILE}"


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"mailbox: {name} must be a list of texts")
    return tuple(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError("mailbox: webhook must be a mapping of keys to values")
    return value
