"""candle-vllm's `parking_lot` section of models.yaml, read as the settings that mean the same here.

Read before step 1 of a request's life. What has no counterpart is refused by name rather than ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from candle_vllm.server.kinds import UsageError, nearest

_LIMITS = {"max_queue_depth": "max_queued_requests", "timeout_secs": "request_timeout"}
_MAILBOX = ("backend", "retention_secs", "postgres_url", "sqlite_path", "webhook")
_NOT_HERE = {
    "worker_threads": "--threads sets the engine's threads",
    "max_blocking_threads": "there is no such pool here",
    "thread_stack_size": "there is no such pool here",
    "max_units": "--mem sets the size of the KV cache",
    "queue": "the queue is kept in memory",
    "surreal_path": "the mailbox is kept in SQLite or PostgreSQL",
}


def limits_of(section: Any, where: str) -> dict[str, Any]:
    """The settings that `limits` and `pool` give, by our names; `limits` wins."""
    values: dict[str, Any] = {}
    for part in ("pool", "limits"):
        for key, value in _mapping(_mapping(section, where).get(part, {}), f"{where}.{part}").items():
            _refuse(key, f"{where}.{part}")
            if key not in _LIMITS:
                raise UsageError(f"{where}.{part}: unknown key {key!r:.60}{nearest(str(key), _LIMITS)}")
            values[_LIMITS[key]] = value
    return values


def mailbox_of(section: Any, where: str) -> dict[str, Any] | None:
    """The `mailbox` of the section as `mailbox` of models.yaml has it: `url`, `retention_secs`, `webhook`."""
    known = ("pool", "limits", "queue", "mailbox")
    for key in _mapping(section, where):
        _refuse(key, where)
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r:.60}{nearest(str(key), known)}")
    given = section.get("mailbox")
    if given is None:
        return None
    where = f"{where}.mailbox"
    for key in _mapping(given, where):
        _refuse(key, where)
        if key not in _MAILBOX:
            raise UsageError(f"{where}: unknown key {key!r:.60}{nearest(str(key), _MAILBOX)}")
    values = {key: given[key] for key in ("retention_secs", "webhook") if key in given}
    backend = given.get("backend", "memory")
    if backend == "sqlite":
        path = given.get("sqlite_path")
        if not isinstance(path, str):
            raise UsageError(f"{where}: backend sqlite needs its sqlite_path")
        return {**values, "url": f"sqlite:///{path}"}
    if backend == "postgres":
        if not isinstance(given.get("postgres_url"), str):
            raise UsageError(f"{where}: backend postgres needs its postgres_url")
        return {**values, "url": given["postgres_url"]}
    if backend == "memory":
        return {**values, "url": "sqlite"}
    raise UsageError(f"{where}: backend must be memory, sqlite or postgres, not {backend!r:.60}")


def _refuse(key: Any, where: str) -> None:
    if key in _NOT_HERE:
        raise UsageError(f"{where}: {key} is not supported: {_NOT_HERE[key]}; leave it out")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} must be a mapping of keys to values")
    return value
