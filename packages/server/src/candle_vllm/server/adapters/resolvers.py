# SPDX-License-Identifier: MIT
"""`--lora-resolver`: parses its values, and builds the adapter registry of a server (before step 1).

`BucketSource` finds adapters in a bucket of an S3-compatible store.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from candle_vllm.core.config import SETTINGS
from candle_vllm.core.errors import with_extra
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.adapters import sources
from candle_vllm.server.adapters.archives import TarSource, is_template
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.fetching import FetchedSource, Pinned, write_all
from candle_vllm.server.adapters.hub import HubSource
from candle_vllm.server.adapters.registry import Adapters
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import AccessOptions, AdapterOptions, HubOptions

_CONNECT_SECONDS = 10
_PIECE = 1 << 20  # bytes of a file in a bucket that are read at once


def open_adapters(settings: AdapterOptions, access: AccessOptions, looked: Callable[[str, str], object]) -> Adapters:
    """Build the adapter registry of a server with the sources in its settings; `looked` is as in `Lookout`.

    `access` says who may call the server. Raises UsageError if a source is invalid, or unauthenticated clients could
    make the server fetch any repository.
    """
    if not settings.lora_resolver:
        return Adapters()
    limits = sources.Limits(
        max_bytes=settings.lora_max_mb << 20,
        max_rank=settings.max_lora_rank or SETTINGS["max_lora_rank"].default or 1,
        bases=settings.lora_allowed_bases,
        seconds=settings.lora_fetch_timeout,
    )
    cache = DiskCache(cache_folder(settings), settings.lora_cache_bytes)
    opened = [read_source(spec, settings, cache, limits) for spec in settings.lora_resolver]
    if any(isinstance(source, HubSource) and source.takes_all for source in opened) and not access.is_guarded:
        raise UsageError(
            f"--lora-resolver hf lets everybody who reaches {access.host} download any repository: restrict it "
            "(hf=org/*), set --api-key, or listen at 127.0.0.1"
        )
    cache.clear_left()
    return Adapters(opened, cache, looked)


def cache_folder(settings: AdapterOptions) -> Path:
    """Return the folder of the cache of fetched adapters."""
    if settings.lora_cache_dir is not None:
        return settings.lora_cache_dir.expanduser()
    if settings.download_dir is not None:
        return settings.download_dir.expanduser() / "adapters"
    return Path.home() / ".cache" / "candle-vllm" / "adapters"


def read_source(spec: str, settings: HubOptions, cache: DiskCache, limits: sources.Limits) -> sources.Source:
    """Parse one `--lora-resolver`: local=DIR, hf, hf=PATTERN, s3=BUCKET/FOLDER or tar=ADDRESS; raises `UsageError`."""
    kind, equals, place = spec.partition("=")
    shown = without_secrets(spec, alone=True)
    if kind == "local" and place:
        folder = Path(os.path.expanduser(place))
        if not folder.is_dir():
            raise UsageError(f"--lora-resolver {shown!r:.200}: there is no such folder")
        return sources.LocalSource(folder, limits)
    if kind == "hf" and (place or not equals):
        return HubSource(place or "*", settings, cache, limits)
    if kind == "s3" and place:
        return BucketSource(place.removeprefix("s3://"), cache, limits)
    if kind == "tar" and is_template(place):
        return TarSource(place, cache, limits)
    raise UsageError(
        "--lora-resolver must be local=DIR, hf, hf=org/*, s3=BUCKET/FOLDER or tar=https://HOST/{name}.tar.gz"
    )


class BucketSource(FetchedSource):
    """A folder in an S3-compatible bucket; keys of an adapter's files start with `name/` or `name/revision/` in it.

    Address and credentials come from environment variables: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and others.
    `place` is `bucket` or `bucket/folder`.
    """

    kind = "s3"
    pins = False

    def __init__(self, place: str, cache: DiskCache, limits: sources.Limits) -> None:
        super().__init__(cache, limits)
        try:
            from obstore.store import S3Store
        except ImportError:
            raise UsageError(f"--lora-resolver s3 needs an extra: {with_extra('s3')}") from None
        bucket, _, self._folder = place.partition("/")
        self._place = place
        options: Any = {
            "allow_http": True,
            "timeout": f"{limits.seconds:g}s",
            "connect_timeout": f"{_CONNECT_SECONDS}s",
        }
        retries: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=limits.seconds)}
        self._store = S3Store(bucket, client_options=options, retry_config=retries)

    def _label(self, name: sources.AdapterName) -> str:
        return f"s3://{self._place}/{'/'.join(filter(None, (name.name, name.revision)))}"

    def _pin(self, name: sources.AdapterName, budget: sources.Budget) -> Pinned | None:
        import obstore
        from obstore.exceptions import PermissionDeniedError

        parts = (self._folder.strip("/"), name.name, name.revision or "")
        below = "/".join(part for part in parts if part) + "/"
        heads = list[Any]()
        with _s3_failures(budget):
            try:
                for file in (sources.CONFIG, sources.WEIGHTS):
                    heads.append(obstore.head(self._store, below + file))
                    _ = budget.seconds
            except (FileNotFoundError, PermissionDeniedError):  # 403: a missing key, if the client may not list keys
                return None
        tags = [_tag(head) for head in heads]
        revision = hashlib.sha256("\n".join(tags).encode()).hexdigest()[:40]

        def fill(folder: Path, budget: sources.Budget) -> str | None:
            budget.expect(sum(head["size"] for head in heads))
            self._get(below, folder / sources.CONFIG, tags[0], budget, sources.MAX_CONFIG)
            base = sources.check_config((folder / sources.CONFIG).read_bytes(), budget.limits)
            self._get(below, folder / sources.WEIGHTS, tags[1], budget, budget.limits.max_bytes)
            return base

        return Pinned(revision, fill, self._label(name))

    def _get(self, below: str, path: Path, tag: str, budget: sources.Budget, most: int) -> None:
        import obstore

        with _s3_failures(budget), path.open("xb") as stream:
            got = obstore.get(self._store, below + path.name)  # `_pin` has checked that the key exists
            if _tag(got.meta) != tag:
                raise sources.Unavailable(f"{path.name} in the bucket was replaced while the adapter was fetched")
            size = int(got.meta["size"])
            if size > most:
                raise sources.Refused(f"its {path.name} has more than {most >> 20} MiB")
            budget.check(size)
            write_all(got.stream(min_chunk_size=_PIECE), stream, budget)


def _tag(meta: Any) -> str:
    """Return what identifies the content of a file in a bucket."""
    return f"{meta.get('e_tag') or meta['last_modified'].isoformat()} {meta['size']}"


@contextmanager
def _s3_failures(budget: sources.Budget) -> Iterator[None]:
    """Context manager that converts errors of the store to `Unavailable`."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        _ = budget.seconds
        raise sources.Unavailable(f"the bucket cannot be read ({type(error).__name__})") from None
