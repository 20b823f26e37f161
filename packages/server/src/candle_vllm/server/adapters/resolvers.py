# SPDX-License-Identifier: MIT
"""`--lora-resolver`: parses its values, and builds the adapter registry of a server (before step 1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from candle_vllm.core.config import SETTINGS
from candle_vllm.core.shown import without_secrets
from candle_vllm.server.adapters.archives import TarSource, is_template
from candle_vllm.server.adapters.buckets import BucketSource
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.hub import HubSource
from candle_vllm.server.adapters.registry import Adapters
from candle_vllm.server.adapters.sources import Limits, LocalSource, Source
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import AccessOptions, AdapterOptions, HubOptions


def open_adapters(settings: AdapterOptions, access: AccessOptions, looked: Callable[[str, str], object]) -> Adapters:
    """Build the adapter registry of a server with the sources in its settings.

    `access` says who may call the server. `looked` is called after each lookup with the kind of the source and the
    outcome.

    Raises:
        UsageError: a source is invalid, or unauthenticated clients could make the server fetch any repository.
    """
    if not settings.lora_resolver:
        return Adapters()
    limits = Limits(
        max_bytes=settings.lora_max_mb << 20,
        max_rank=settings.max_lora_rank or SETTINGS["max_lora_rank"].default or 1,
        bases=settings.lora_allowed_bases,
        seconds=settings.lora_fetch_timeout,
    )
    cache = DiskCache(cache_folder(settings), settings.lora_cache_bytes)
    sources = [read_source(spec, settings, cache, limits) for spec in settings.lora_resolver]
    if any(isinstance(source, HubSource) and source.takes_all for source in sources) and not access.is_guarded:
        raise UsageError(
            f"--lora-resolver hf lets everybody who reaches {access.host} download any repository: restrict it "
            "(hf=org/*), set --api-key, or listen at 127.0.0.1"
        )
    cache.clear_left()
    return Adapters(sources, cache, looked)


def cache_folder(settings: AdapterOptions) -> Path:
    """Return the folder of the cache of fetched adapters."""
    if settings.lora_cache_dir is not None:
        return settings.lora_cache_dir.expanduser()
    if settings.download_dir is not None:
        return settings.download_dir.expanduser() / "adapters"
    return Path.home() / ".cache" / "candle-vllm" / "adapters"


def read_source(spec: str, settings: HubOptions, cache: DiskCache, limits: Limits) -> Source:
    """Parse one `--lora-resolver`: local=DIR, hf, hf=PATTERN, s3=BUCKET/FOLDER or tar=ADDRESS; raises `UsageError`."""
    kind, equals, place = spec.partition("=")
    shown = without_secrets(spec, alone=True)
    if kind == "local" and place:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UsageError(f"--lora-resolver {shown!r:.200}: there is no such folder")
        return LocalSource(folder, limits)
    if kind == "hf" and (place or not equals):
        return HubSource(place or "*", settings, cache, limits)
    if kind == "s3" and place:
        return BucketSource(place.removeprefix("s3://"), cache, limits)
    if kind == "tar" and is_template(place):
        return TarSource(place, cache, limits)
    raise UsageError(
        "--lora-resolver must be local=DIR, hf, hf=org/*, s3=BUCKET/FOLDER or tar=https://HOST/{name}.tar.gz"
    )
