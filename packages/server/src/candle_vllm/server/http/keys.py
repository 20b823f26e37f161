# SPDX-License-Identifier: MIT
"""API keys, their owners and their expiry; files of keys are read again while the server runs.

Read before step 1 of a request's life, and checked in it. A key of `--api-keys-file` has a name, and stored data
belongs to the name, so that its owner can still use the data after the key was replaced.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.setting_kinds import Integer, Secret
from candle_vllm.server.http.routing import NOBODY, Caller, Limits
from candle_vllm.server.settings.options import Section, UsageError, known_keys, line_of, mapping
from candle_vllm.server.settings.sources import read_text, read_yaml
from candle_vllm.server.settings.table import BY_NAME, RATES, AccessOptions

MAX_KEYS = 10_000
LOOK_SECONDS = 1.0  # seconds between two checks of the files
_ENTRY = ("name", "key", "sha256", "expires", *RATES, "manages", "models", "notes")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_TAKEN = re.compile(r"m?[0-9]+|none|other")  # labels of unnamed keys, of requests without a key, of the rest in metrics
_MAX_PATTERNS, _MAX_PATTERN = 1000, 512
_SHOWN = 10  # maximum number of names in a line of the log

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """A key and its permissions.

    Attributes:
        digest: SHA-256 of the key.
        uses: whether it is valid for the routes of clients.
        manages: whether it is valid for the routes of operators.
        expires: Unix seconds; None means never.
    """

    digest: bytes
    caller: Caller
    uses: bool = True
    manages: bool = False
    expires: float | None = None

    @property
    def is_valid(self) -> bool:
        """Whether the key has not expired."""
        return self.expires is None or time.time() < self.expires


class Keyring:
    """The keys of one application, from its settings and the files that they name.

    Raises:
        UsageError: a file of keys cannot be read, or is invalid.
    """

    def __init__(self, settings: AccessOptions) -> None:
        self._settings = settings
        self._paths = [path for path in (settings.api_keys_file, settings.api_key_file) if path is not None]
        self._read_at = self._stamp()
        self._keys = self._read()

    def guards(self, *, operators: bool) -> bool:
        """Whether the routes of operators, or of clients, need a key."""
        return self._settings.has_api_keys or (operators and bool(self._settings.management_key))

    def find(self, given: bytes | None) -> Key | None:
        """Return the key with this text, expired or not, or None. Every key is compared."""
        if given is None:
            return None
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, key.digest) for key in self._keys]
        return self._keys[matches.index(True)] if any(matches) else None

    def find_caller(self, caller: Caller) -> Key | None:
        """Return a valid client key of a caller, for a batch or a WebSocket that is open already; otherwise None."""
        return next((key for key in self._keys if key.uses and key.is_valid and key.caller.key == caller.key), None)

    def callers(self) -> Iterable[Caller]:
        """Return the callers of all valid client keys; only `NOBODY` if clients need no key."""
        if not self._settings.has_api_keys:
            return (NOBODY,)
        return (key.caller for key in self._keys if key.uses and key.is_valid)

    @property
    def are_several(self) -> bool:
        """Whether the keys of clients belong to several owners."""
        return are_several(self.callers())

    async def watch(self) -> None:
        """Read the files again after each change, until this is cancelled; return at once if there are no files."""
        seen = self._read_at
        while self._paths:
            await asyncio.sleep(LOOK_SECONDS)
            now = await asyncio.to_thread(self._stamp)
            if now == seen != self._read_at:  # a file has changed, but not since the last check
                try:
                    await self.reload()
                except Exception as error:  # its message may have a key; the next change must still be read
                    kind = type(error).__name__
                    logger.error("the API keys could not be read again (%s); the keys from before stay valid", kind)
            seen = now

    async def reload(self, settings: AccessOptions | None = None) -> bool:
        """Read the files again, and take the keys of `settings`, if given; return whether the new keys are in use.

        An invalid file, a first key and the removal of the last key are logged as errors; the old keys stay in use.
        """
        if settings is None and not self._paths:
            return True
        before, old, new = self._keys, self._settings, settings or self._settings
        self._read_at = await asyncio.to_thread(self._stamp)
        try:
            self._settings = replace(old, api_key=new.api_key, management_key=new.management_key)
            if (self._settings.has_api_keys, not new.management_key) != (old.has_api_keys, not old.management_key):
                raise UsageError("a first key, and the removal of the last key, take effect at the next start")
            self._keys = keys = await asyncio.to_thread(self._read)
        except UsageError as error:
            self._settings = old
            logger.error("%s; the keys from before stay valid", error)
            return False
        logger.info("read the API keys again: %s", _difference(before, keys))
        return True

    def _stamp(self) -> tuple[Any, ...]:
        return tuple(file_state(path) for path in self._paths)

    def _read(self) -> tuple[Key, ...]:
        settings = self._settings
        apart = bool(settings.management_key)  # operators have keys of their own
        limits = settings.rates
        named = [] if settings.api_keys_file is None else read_named_keys(settings.api_keys_file, limits)
        plain = settings.api_key + (() if settings.api_key_file is None else read_keys(settings.api_key_file))
        return (
            *named,
            *(
                Key(_digest(key.encode("ascii")), Caller(str(number), key, limits), manages=not apart)
                for number, key in enumerate(plain, 1)
            ),
            *(
                Key(_digest(key.encode("ascii")), Caller(f"m{number}", key), uses=False, manages=True)
                for number, key in enumerate(settings.management_key, 1)
            ),
        )


def are_several(callers: Iterable[Caller]) -> bool:
    """Whether these callers have several owners."""
    owners = (caller.key for caller in callers)
    first = next(owners, None)
    return any(other != first for other in owners)


def read_keys(path: Path) -> tuple[str, ...]:
    """Read a file with one key per line; empty lines and lines that begin with # are skipped.

    Raises:
        UsageError: the file cannot be read, has no key or more than `MAX_KEYS`, or has a line that cannot be a key.
    """
    lines = read_text(path, "the API keys in", "utf-8-sig").splitlines()
    stripped = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = [(number, line) for number, line in stripped if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"the API key file {path} holds no key: the server would be open")
    if len(keys) > MAX_KEYS:
        raise UsageError(f"the API key file {path} holds more than {MAX_KEYS} keys")
    for number, key in keys:
        try:
            Secret().check(key)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: a key {error}") from None
    return tuple(key for _, key in keys)


def read_named_keys(path: Path, limits: Limits) -> list[Key]:
    """Read a file of named keys; no error message contains a key.

    Args:
        path: a YAML file: `keys`, a list of entries with `name`, `key` or `sha256`, and the other fields of `_ENTRY`.
        limits: limits of entries that do not set their own.

    Raises:
        UsageError: the file cannot be read, has no key or more than `MAX_KEYS`, or is invalid.
    """
    content = mapping(read_yaml(path, secret=True), str(path))
    known_keys(content, ("keys",), str(path))
    entries = content.get("keys")
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: keys must be a list with at least one key: the server would be open")
    made: list[Key] = []
    names: set[str] = set()
    digests: set[bytes] = set()
    for number, entry in enumerate(entries, 1):
        mapping(entry, f"{path}: key {number}")
        for key in _named(entry, path, limits):
            if key.digest in digests:
                raise UsageError(f"{path}{line_of(entry)}: the key of {key.caller.label!r} stands in the file twice")
            digests.add(key.digest)
            made.append(key)
        if (name := entry["name"]) in names:
            raise UsageError(f"{path}{line_of(entry, 'name')}: {name!r} appears twice: give it a list of keys")
        names.add(name)
        if len(made) > MAX_KEYS:
            raise UsageError(f"{path} holds more than {MAX_KEYS} keys")
    return made


def _named(entry: Section, path: Path, defaults: Limits) -> list[Key]:
    """Read the keys of one entry. It may have several while its owner replaces one key by another."""
    known_keys(entry, _ENTRY, str(path))
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
        where = f"{path}{line_of(entry, 'name')}"
        raise UsageError(
            f"{where}: name must have 1 to 64 letters, digits and . _ @ + -, begin with a letter or a digit, and be no "
            "number, m with a number, none or other"
        )

    def wrong(field: str, reason: str) -> UsageError:
        return UsageError(f"{path}{line_of(entry, field)}: {field} of {name!r} {reason}")

    digests = [_digest(_key(text, wrong).encode("ascii")) for text in _listed(entry, "key", wrong)]
    for text in _listed(entry, "sha256", wrong):
        if not isinstance(text, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", text):
            raise wrong("sha256", "must be 64 hexadecimal digits, of the key's bytes alone, without a newline")
        digests.append(bytes.fromhex(text))
    if not digests:
        raise UsageError(f"{path}{line_of(entry, 'name')}: the key {name!r} has neither key nor sha256")
    manages = entry.get("manages", False)
    if not isinstance(manages, bool):
        raise wrong("manages", "must be true or false")
    given = {field: _limit(entry, field, defaults.get(field), wrong) for field in RATES}
    limits = {field: limit for field, limit in given.items() if limit is not None}
    caller = Caller(name, f"the name {name}", limits, _models(entry, wrong))  # no key has spaces
    expires = _expiry(entry["expires"], wrong) if "expires" in entry else None
    return [Key(digest, caller, manages=manages, expires=expires) for digest in digests]


def _listed(entry: Mapping[str, Any], field: str, wrong: Any) -> Sequence[Any]:
    value = entry.get(field, [])
    if field in entry and value in (None, []):
        raise wrong(field, "is empty")
    return value if isinstance(value, list) else [value]


def _key(value: Any, wrong: Any) -> str:
    if not isinstance(value, str):
        raise wrong("key", "must be text: put it into quotes")
    try:
        return Secret().check(value)
    except ValueError as error:
        raise wrong("key", str(error)) from None


def _limit(entry: Mapping[str, Any], field: str, default: int | None, wrong: Any) -> int | None:
    """Return a limit of an entry: its own value, None for `null`, or the default."""
    value = entry.get(field, default)
    if value is None:
        return None
    kind = BY_NAME[field].kind
    assert isinstance(kind, Integer)
    try:
        return kind.check(value)
    except ValueError as error:
        raise wrong(field, f"{error}, or null for no limit") from None


def _models(entry: Mapping[str, Any], wrong: Any) -> tuple[str, ...] | None:
    """Return the patterns of the models and adapters that a key may use; None for all."""
    if "models" not in entry:
        return None
    patterns = _listed(entry, "models", wrong)
    for pattern in patterns:
        if not isinstance(pattern, str) or not 0 < len(pattern) <= _MAX_PATTERN:
            raise wrong("models", "must be names of models and adapters, * for any characters")
    if len(patterns) > _MAX_PATTERNS:
        raise wrong("models", f"must have at most {_MAX_PATTERNS} names")
    return tuple(patterns)


def _expiry(value: Any, wrong: Any) -> float:
    """Convert to Unix seconds; a day means the end of the day, and a value without a time zone is in UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value) if len(value) > len("2027-01-31") else date.fromisoformat(value)
        except ValueError:
            value = None
    try:
        if isinstance(value, datetime):
            return (value if value.tzinfo is not None else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, date):
            return (datetime(value.year, value.month, value.day, tzinfo=UTC) + timedelta(days=1)).timestamp()
    except (OverflowError, ValueError):
        pass
    raise wrong("expires", "must be a day or a time, as 2027-01-31 or 2027-01-31T12:00:00Z")


def _digest(key: bytes) -> bytes:
    """Return the hash that is compared in place of a key, so that the time does not reveal the key's length."""
    return hashlib.sha256(key).digest()


def file_state(path: Path) -> tuple[int, ...] | None:
    """Return modification time, size and inode, which change with the file; None for a file that cannot be examined."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _difference(before: Sequence[Key], after: Sequence[Key]) -> str:
    """Describe a change for the log: the number of keys, and which are new, replaced or gone; never a key."""
    old, new = ({key.caller.label for key in keys} for keys in (before, after))
    known = {key.digest for key in before}
    replaced = old & {key.caller.label for key in after if key.digest not in known}
    parts = [f"{len(after)} keys"]
    for word, names in (("new", new - old), ("replaced", replaced), ("gone", old - new)):
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            parts.append(f"{word}: {', '.join(sorted(names)[:_SHOWN])}{more}")
    return "; ".join(parts)
