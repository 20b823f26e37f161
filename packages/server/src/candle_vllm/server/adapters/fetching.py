"""Adapters from elsewhere, fetched into the cache on disk: Hugging Face, tar archives over HTTP(S), buckets.

Before step 1 of a request's life, in threads. Each fetches from the place alone that the operator named; what a request
says is a name below it. The revision is pinned to what names content (a commit, a sum, a tag of the store) before
anything is fetched, and the configuration is checked before the weights come.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

from candle_vllm.core.config import SETTINGS
from candle_vllm.core.errors import with_extra
from candle_vllm.core.loading.source import HUB_ID, HUB_TIMEOUT_S
from candle_vllm.server.adapters.archives import unpack
from candle_vllm.server.adapters.disk_cache import DiskCache, Key
from candle_vllm.server.adapters.registry import Adapters
from candle_vllm.server.adapters.sources import (
    CONFIG,
    MAX_CONFIG,
    PICKLED,
    WEIGHTS,
    AdapterName,
    Budget,
    Found,
    Limits,
    LocalSource,
    Refused,
    Source,
    Unavailable,
    check_config,
)
from candle_vllm.server.models.downloads import refused_by_hub
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.derived import may_change
from candle_vllm.server.settings.options import UsageError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

logger = logging.getLogger(__name__)

_HTTP_SECONDS = 10.0  # without a byte
_MAX_SUM = 4096  # bytes of a file with a sum
_SUM = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NOTHING = (403, 404, 410)  # a place that may not be listed says 403
_PIECE = 1 << 20


class _Pinned(NamedTuple):
    """An adapter that there is: its revision, what fetches its files into an empty folder, and its name there."""

    revision: str
    fill: Callable[[Path, Budget], str | None]
    label: str


class _Fetched:
    """What the sources from elsewhere share: an adapter is pinned, then it is in the cache or is fetched."""

    kind = ""
    pins = True

    def __init__(self, cache: DiskCache, limits: Limits) -> None:
        self._cache = cache
        self._limits = limits

    def find(self, name: AdapterName) -> Found | None:
        """As `Source.find`. What is in the cache is found there also where the place cannot be reached."""
        if not self._may_have(name):
            return None
        label, asked = self._label(name), name.revision or ""
        budget = Budget(self._limits)
        try:
            pinned = self._pin(name, budget)
        except Unavailable as error:
            key = self._cache.latest(self.kind, lambda kept: self._is(kept, label), asked)
            if key is None:
                raise
            label = key.name
            logger.warning("%s is taken from the cache as it was: %s", label, error)
            pinned = None
        else:
            if pinned is None:
                return None
            label = pinned.label
            key = Key(self.kind, label, pinned.revision)
        here = self._cache.find(key)
        if here is not None:
            path, entry = here
            return Found(path, f"{label}@{key.revision}", key.revision, entry.base)
        if pinned is None:
            raise Unavailable(f"{label} went from the cache")
        base: str | None = None

        def fill(folder: Path) -> str | None:
            nonlocal base
            base = pinned.fill(folder, budget)
            return base

        logger.info("fetching the adapter %s@%s (%s)", label, key.revision, self.kind)
        try:
            path = self._cache.put(key, asked, fill)
        except OSError as error:
            raise Unavailable(f"{label} cannot be kept in the cache: {error.strerror or error}") from None
        return Found(path, f"{label}@{key.revision}", key.revision, base)

    def names(self) -> Sequence[str]:
        """None: nobody is asked."""
        return ()

    def _may_have(self, name: AdapterName) -> bool:  # noqa: ARG002  # some places have anything
        return True

    def _label(self, name: AdapterName) -> str:
        """What says where it is from."""
        return name.name

    def _is(self, kept: str, label: str) -> bool:
        """Whether what is in the cache as `kept` is what is asked for."""
        return kept == label

    def _pin(self, name: AdapterName, budget: Budget) -> _Pinned | None:
        raise NotImplementedError


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class HubSource(_Fetched):
    """Repositories of Hugging Face whose names match a pattern; a name is `org/repo`, or a folder in one.

    Args:
        pattern: `org/*`, `org/repo`; `*` is any.
        settings: token, and whether the hub is asked at all.
    """

    kind = "hf"

    def __init__(self, pattern: str, settings: Settings, cache: DiskCache, limits: Limits) -> None:
        super().__init__(cache, limits)
        self._pattern = pattern + "*" if pattern.endswith("/") else pattern
        self._settings = settings

    @property
    def takes_all(self) -> bool:
        """Whether every repository is its."""
        return self._pattern.strip("*/") == ""

    def _may_have(self, name: AdapterName) -> bool:
        if "/" in (name.revision or "") and not self.takes_all:
            return False  # refs/pr/1 and its like are what anybody proposes to the repository
        repo, _ = _repo(name)
        return HUB_ID.fullmatch(repo) is not None and fnmatchcase(repo, self._pattern)

    def _is(self, kept: str, label: str) -> bool:
        (repo, below), (asked, asked_below) = _repo(AdapterName(kept)), _repo(AdapterName(label))
        return (repo.lower(), below) == (asked.lower(), asked_below)

    def _pin(self, name: AdapterName, budget: Budget) -> _Pinned | None:
        asked, below = _repo(name)
        info = self._info(asked, name.revision, budget)
        if info is None:
            return None
        repo = info.id  # as the hub writes it: names that differ in case alone are one
        if repo.lower() != asked.lower():
            logger.info("no adapter %s: the repository has moved", asked)
            return None
        files = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        config, weights = files.get(below + CONFIG), files.get(below + WEIGHTS)
        if config is None or not _COMMIT.fullmatch(info.sha or ""):
            return None
        commit = info.sha or ""

        def fill(folder: Path, budget: Budget) -> str | None:
            if weights is None:
                pickled = f" but {PICKLED}, a pickle, which is a program" if below + PICKLED in files else ""
                raise Refused(f"it has no {WEIGHTS}{pickled}")
            if (config.size or 0) > MAX_CONFIG:
                raise Refused(f"its {CONFIG} has more than {MAX_CONFIG >> 20} MiB")
            self._get(repo, commit, config, folder / CONFIG, budget)
            base = check_config((folder / CONFIG).read_bytes(), budget.limits)
            self._get(repo, commit, weights, folder / WEIGHTS, budget)
            return base

        return _Pinned(commit, fill, f"{repo}/{below}".rstrip("/"))

    def _info(self, repo: str, revision: str | None, budget: Budget) -> ModelInfo | None:
        import huggingface_hub
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        if self._settings.offline:
            raise Unavailable("the hub is not asked (--offline)")
        token = self._settings.hf_token
        try:
            return huggingface_hub.model_info(
                repo, revision=revision, token=token, files_metadata=True, timeout=min(HUB_TIMEOUT_S, budget.seconds)
            )
        except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            refusal = refused_by_hub(self._settings, repo, error)
            if refusal is None:
                raise Unavailable(f"the hub cannot be asked for {repo} ({type(error).__name__})") from None
            logger.info("no adapter %s: %s", repo, refusal)
            return None

    def _get(self, repo: str, commit: str, file: RepoSibling, path: Path, budget: Budget) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        budget.check(file.size or 0)
        told = None if file.lfs is None else str(file.lfs["sha256"])
        with path.open("xb") as stream:
            taking: Any = _Taking(stream, budget)
            try:
                http_get(
                    hf_hub_url(repo, file.rfilename, revision=commit),
                    taking,
                    headers=build_hf_headers(token=self._settings.hf_token),
                    expected_size=file.size,
                    tqdm_class=_NoBar,  # type: ignore[arg-type]
                )
            except (HTTPError, OSError, RuntimeError) as error:
                raise Unavailable(f"{file.rfilename} of {repo} did not come ({type(error).__name__})") from None
        if told is not None and _sum_of(path) != told:
            raise Unavailable(f"{file.rfilename} of {repo} is not what the hub has")


def _repo(name: AdapterName) -> tuple[str, str]:
    """A repository, and the beginning of the names of the files in its folder."""
    parts = name.name.split("/")
    return "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])


class _Taking:
    """A file that something is written into, within its budget."""

    def __init__(self, stream: IO[bytes], budget: Budget) -> None:
        self._stream = stream
        self._budget = budget

    def write(self, piece: bytes) -> int:
        self._budget.take(len(piece))
        return self._stream.write(piece)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _NoBar:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: float | None = 1) -> None:
        pass


def _sum_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- tar archives ----------------------------------------------------------------------------------------------------


class TarSource(_Fetched):
    """Archives at an address with `{name}` in it, and `{revision}` where they have some.

    The address with `.sha256` behind it has the SHA-256 of the archive, which is its revision: it is fetched first, and
    an archive that differs from it is not unpacked. Redirects are not followed.

    Args:
        address: http or https, of the operator.
    """

    kind = "tar"

    def __init__(self, address: str, cache: DiskCache, limits: Limits) -> None:
        super().__init__(cache, limits)
        self._address = address
        self.pins = "{revision}" not in address

    def _may_have(self, name: AdapterName) -> bool:
        return name.revision is None or "{revision}" in self._address or _SUM.fullmatch(name.revision) is not None

    def _pin(self, name: AdapterName, budget: Budget) -> _Pinned | None:
        wanted = name.revision if name.revision and "{revision}" not in self._address else None
        url = self._address.replace("{name}", quote(name.name)).replace("{revision}", quote(name.revision or ""))
        shown = _shown(url)
        try:
            told = b"".join(_http(url + ".sha256", budget, _MAX_SUM))[:64].decode("ascii", "replace").lower()
        except FileNotFoundError:
            return None
        if not _SUM.fullmatch(told):
            raise Unavailable(f"the sum of {shown} begins with no SHA-256")
        if wanted is not None and told != wanted:
            return None

        def fill(folder: Path, budget: Budget) -> str | None:
            archive, found = folder.parent / "archive", hashlib.sha256()
            try:
                with archive.open("xb") as stream:
                    for piece in _http(url, budget, budget.limits.max_bytes):
                        found.update(piece)
                        stream.write(piece)
            except FileNotFoundError:
                raise Unavailable(f"{shown} is not there, though its sum is") from None
            if found.hexdigest() != told:
                raise Unavailable(f"{shown} is not what its sum says")  # one of the two may be about to come
            base = unpack(archive, folder, budget)
            archive.unlink()
            return base

        return _Pinned(told, fill, self._label(name))


def _shown(url: str) -> str:
    """An address for the log: without who asks, and without a query, which may be a signature."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _http(url: str, budget: Budget, most: int) -> Iterator[bytes]:
    """The body at an address, in pieces; raises FileNotFoundError where there is nothing."""
    import httpx

    shown, left = _shown(url), most
    asked: dict[str, Any] = {"follow_redirects": False, "headers": {"accept-encoding": "identity"}}
    try:
        with httpx.stream("GET", url, timeout=min(_HTTP_SECONDS, budget.seconds), **asked) as answer:
            if answer.status_code in _NOTHING:
                raise FileNotFoundError(shown)
            if answer.status_code != 200:
                raise Unavailable(f"{shown} answered {answer.status_code}")
            for piece in answer.iter_raw(_PIECE):
                left -= len(piece)
                _ = budget.seconds
                if left < 0:
                    raise Refused(f"it has more than {most >> 20} MiB, the most that this server fetches")
                yield piece
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unavailable(f"{shown} cannot be had ({type(error).__name__})") from None


# ---- buckets ---------------------------------------------------------------------------------------------------------


class BucketSource(_Fetched):
    """A bucket of an S3-compatible store; an adapter's files lie below its name, or below `name/revision`.

    Address and credentials are those of AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and their like.

    Args:
        place: `bucket`, or `bucket/folder`.
    """

    kind = "s3"
    pins = False

    def __init__(self, place: str, cache: DiskCache, limits: Limits) -> None:
        super().__init__(cache, limits)
        try:
            from obstore.store import S3Store
        except ImportError:
            raise UsageError(f"--lora-resolver s3 needs an extra: {with_extra('s3')}") from None
        bucket, _, self._folder = place.partition("/")
        self._place = place
        options: Any = {"allow_http": True, "timeout": f"{limits.seconds:g}s", "connect_timeout": f"{_HTTP_SECONDS:g}s"}
        retries: Any = {"max_retries": 1}
        self._store = S3Store(bucket, client_options=options, retry_config=retries)

    def _label(self, name: AdapterName) -> str:
        return f"s3://{self._place}/{'/'.join(filter(None, (name.name, name.revision)))}"

    def _pin(self, name: AdapterName, budget: Budget) -> _Pinned | None:
        import obstore
        from obstore.exceptions import PermissionDeniedError

        parts = (self._folder.strip("/"), name.name, name.revision or "")
        below = "/".join(part for part in parts if part) + "/"
        with _s3_failures():
            try:
                heads = [obstore.head(self._store, below + file) for file in (CONFIG, WEIGHTS)]
            except (FileNotFoundError, PermissionDeniedError):  # a bucket that may not be listed says the latter
                return None
        tags = [f"{head.get('e_tag') or head['last_modified'].isoformat()} {head['size']}" for head in heads]
        revision = hashlib.sha256("\n".join(tags).encode()).hexdigest()[:40]

        def fill(folder: Path, budget: Budget) -> str | None:
            self._get(below + CONFIG, folder / CONFIG, budget, MAX_CONFIG)
            base = check_config((folder / CONFIG).read_bytes(), budget.limits)
            self._get(below + WEIGHTS, folder / WEIGHTS, budget, budget.limits.max_bytes)
            return base

        _ = budget.seconds
        return _Pinned(revision, fill, self._label(name))

    def _get(self, key: str, path: Path, budget: Budget, most: int) -> None:
        import obstore

        with _s3_failures(), path.open("xb") as stream:
            got = obstore.get(self._store, key)  # that it is there was known
            size = int(got.meta["size"])
            if size > most:
                raise Refused(f"its {path.name} has more than {most >> 20} MiB")
            budget.check(size)
            for piece in got.stream(min_chunk_size=_PIECE):
                budget.take(len(piece))
                stream.write(piece)


@contextmanager
def _s3_failures() -> Iterator[None]:
    """What the store's failures mean."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise Unavailable(f"the bucket cannot be asked ({type(error).__name__})") from None


# ---- those of a server -----------------------------------------------------------------------------------------------


def open_adapters(settings: Settings, looked: Callable[[str, str], object]) -> Adapters:
    """The adapters of a server, with the sources of its settings.

    Args:
        settings: of the process.
        looked: told of each look at a source.

    Raises:
        UsageError: a source is none, or everybody who reaches the server could have any repository fetched.
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
    if any(isinstance(source, HubSource) and source.takes_all for source in sources) and not may_change(settings):
        raise UsageError(
            "--lora-resolver hf lets clients fetch every repository, and everybody who reaches "
            f"{settings.host} may be one: say whose (hf=org/*), give the server keys (--api-key), or let it listen at "
            "127.0.0.1"
        )
    cache.clear_left()
    return Adapters(sources, cache, looked)


def cache_folder(settings: Settings) -> Path:
    """Where fetched adapters are kept."""
    if settings.lora_cache_dir is not None:
        return settings.lora_cache_dir.expanduser()
    if settings.download_dir is not None:
        return settings.download_dir.expanduser() / "adapters"
    return Path.home() / ".cache" / "candle-vllm" / "adapters"


def read_source(spec: str, settings: Settings, cache: DiskCache, limits: Limits) -> Source:
    """What one `--lora-resolver` means: local=DIR, hf, hf=PATTERN, s3=BUCKET/FOLDER, tar=ADDRESS.

    Raises:
        UsageError: it is none of them.
    """
    kind, equals, place = spec.partition("=")
    if kind == "local" and place:
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise UsageError(f"--lora-resolver {spec!r:.200}: there is no such folder")
        return LocalSource(folder, limits)
    if kind == "hf" and (place or not equals):
        return HubSource(place or "*", settings, cache, limits)
    if kind == "s3" and place:
        return BucketSource(place.removeprefix("s3://"), cache, limits)
    if kind == "tar" and _is_template(place):
        return TarSource(place, cache, limits)
    raise UsageError(
        f"--lora-resolver {spec!r:.200} is none of local=DIR, hf, hf=org/*, s3=BUCKET/FOLDER and "
        "tar=https://HOST/{name}.tar.gz"
    )


def _is_template(address: str) -> bool:
    """Whether a name changes the path of an address, and nothing else."""
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError:
        return False
    rest = parts._replace(path="").geturl()
    return parts.scheme in ("http", "https") and bool(host) and "{name}" in parts.path and "{" not in rest
