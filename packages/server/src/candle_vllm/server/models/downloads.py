# SPDX-License-Identifier: MIT
"""Models on Hugging Face and in the local hub cache: names, sizes and removal.

Runs in threads, before step 1 of a request's life. The functions import huggingface_hub when they are called, because
the import takes half a second.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from candle_vllm.core.errors import ConfigError, ModelNotFoundError
from candle_vllm.core.loading import source
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.server.settings.derived import cache_folder
from candle_vllm.server.settings.model_names import Named, PullError, read_name
from candle_vllm.server.settings.table import HubOptions, ModelOptions

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo
    from huggingface_hub.hf_api import RepoSibling

MIB = 1 << 20
_Options = TypeVar("_Options", bound=ModelOptions)


def choose_file(names: Sequence[str], named: Named) -> str | None:
    """Return the GGUF file that a name selects, the first of a split model; None for safetensors.

    Raises:
        PullError: no file has the tag, or several files match.
        ModelNotFoundError: there are no weights.
        UnsupportedModelError: the format of the weights is not supported.
    """
    models, tag = source.gguf_models(names), named.tag
    if tag is None:
        if not models or None in _models_in(names):
            source.choose_weights(names, None, named.repo)
            return None
        found = source.of_tag(models, source.USUAL) if len(models) > 1 else list(models)
    else:
        found = source.of_tag(models, tag)
    if len(found) == 1:
        return found[0]
    tags = ", ".join(sorted(source.tag_of(first) for first in (found or models))[:40]) or "none"
    said = "several files" if tag is None or found else f"no file {tag!r}"
    said = f"{named.repo} has {said}: append one with a colon, as in {named.repo}:TAG; it has {tags}"
    raise PullError(said, "no_such_file")


# ---- on the hub ------------------------------------------------------------------------------------------------------


class HubFile(msgspec.Struct, frozen=True):
    """A file of a repository; `sha256` is None if the hub has no checksum of it, as for files outside LFS."""

    name: str
    size: int
    sha256: str | None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The files that a download of a model needs; `commit` is the commit of the repository that has them.

    `weight_file` is the first part of the GGUF file; None for safetensors.
    """

    named: Named
    weight_file: str | None
    files: tuple[HubFile, ...]
    weight_bytes: int
    commit: str | None = None

    @property
    def name(self) -> str:
        """Name of the model on this machine."""
        return full_name(self.named.repo, self.weight_file)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def full_name(repo: str, weight_file: str | None) -> str:
    """Return a model's name on this machine: its repository, and the tag of a GGUF file."""
    return repo if weight_file is None else f"{repo}:{source.tag_of(weight_file)}"


def plan_pull(settings: HubOptions, name: str) -> Plan:
    """Ask the hub for the files of a model; download nothing.

    Raises PullError if the name is invalid, the hub has no such model or file or refuses access, or it is not reached;
    and CandleVllmError if the model has no supported weights.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    named = read_name(name)
    if settings.offline:
        raise PullError(f"{named} is looked up on Hugging Face, which is not contacted (--offline)", "offline")
    try:
        info = huggingface_hub.model_info(
            named.repo,
            revision=settings.revision,
            token=settings.hf_token,
            files_metadata=True,
            timeout=source.HUB_TIMEOUT_S,
        )
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:
        said = f"{named} is looked up on Hugging Face, which cannot be reached ({error}): connect to the network"
        raise refused_by_hub(settings, named.repo, error) or PullError(said, "hub_unreachable") from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    first = choose_file(list(siblings), named)
    parts = () if first is None else source.gguf_models(list(siblings))[first]
    names = [re.sub(r"\[(.)\]", r"\1", pattern) for pattern in source.wanted_files(sorted(siblings), parts)]
    files = tuple(_file(siblings[each]) for each in names if each in siblings)
    size = sum(file.size for file in files if file.name.endswith((".gguf", ".safetensors")))
    return Plan(named=named, weight_file=first, files=files, weight_bytes=size, commit=info.sha)


def refused_by_hub(settings: HubOptions, repo: str, error: Exception) -> PullError | None:
    """Convert an error response of the hub to a PullError; None without one, or for status 429 or 500 and above."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    refusal = source.hub_refusal(repo, settings.revision, error, settings.download_dir)
    if refusal is None:
        return None
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    closed = isinstance(error, GatedRepoError) or status == 403
    return PullError(str(refusal), "no_access" if closed else "no_such_model")


def _file(sibling: RepoSibling) -> HubFile:
    """Check the metadata of a file, because its name and checksum become names of local files."""
    name, told = sibling.rfilename, None if sibling.lfs is None else str(sibling.lfs["sha256"])
    leaves = name.startswith("/") or "\\" in name or ".." in name.split("/")
    if leaves or (told is not None and re.fullmatch("[0-9a-f]{64}", told) is None):
        raise PullError(f"Hugging Face lists a file {name!r:.100} with an invalid name or checksum", "no_such_file")
    return HubFile(name, sibling.size or 0, told)


class Room(NamedTuple):
    """Bytes: memory that a model needs at least, free memory, and free disk space."""

    needed: int
    free: int
    disk: int

    def __str__(self) -> str:
        fits = "fits" if self.needed <= self.free else "DOES NOT FIT"
        return f"{fits}: needs at least {self.needed / MIB:,.0f} MiB of memory, {self.free / MIB:,.0f} MiB are free"


def room_of(settings: ModelOptions, weight_bytes: int) -> Room:
    """Return the memory that weights of this size need with the smallest KV cache, and free memory and disk space."""
    from candle_vllm.core.devices import choose_device
    from candle_vllm.core.memory import free_memory
    from candle_vllm.server.models.loader import LEAST_CACHE, WORKSPACE

    folder = cache_folder(settings)
    while not folder.exists():
        folder = folder.parent
    free = free_memory(choose_device(settings.device or "auto"))
    return Room(weight_bytes + WORKSPACE + LEAST_CACHE, free, shutil.disk_usage(folder).free)


# ---- on this machine -------------------------------------------------------------------------------------------------


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """A model in the hub's cache, whose name is its repository, followed by a tag for a GGUF file.

    `size` counts its weights, `modified` is Unix time in seconds, and `digest` is the SHA-256 of its first weight file;
    None if the cache does not have it.
    """

    name: str
    repo: str
    weight_file: str | None
    size: int
    modified: float
    digest: str | None

    def settings(self, settings: _Options) -> _Options:
        """Return the settings to serve this model."""
        changes: dict[str, Any] = {"model": self.repo, "weight_path": None, "weight_file": self.weight_file}
        return dataclasses.replace(settings, **changes, served_model_name=())


def downloaded(settings: HubOptions) -> list[Local]:
    """Return the models in the cache, sorted by name."""
    return sorted((local for repo in _repos(settings) for local in _models_of(repo)), key=lambda local: local.name)


def find_downloaded(settings: HubOptions, name: str, among: Sequence[Local] | None = None) -> Local:
    """Return the model of a name `among` all downloaded ones; ModelNotFoundError if no model matches, or several do."""
    named = read_name(name)
    here = [local for local in (downloaded(settings) if among is None else among) if local.repo == named.repo]
    names = [local.weight_file for local in here if local.weight_file is not None]
    whole = named.tag is None and len(names) < len(here)  # the name means the safetensors
    with suppress(ModelNotFoundError):
        first = choose_file(names, named) if names and not whole else None
        found = [local for local in here if local.weight_file == first]
        if found:
            return found[0]
    others = nearest(str(named), [local.name for local in here])
    raise ModelNotFoundError(f"{named} is not on this machine{others}: candle-vllm pull {named} fetches it")


def remove(settings: HubOptions, local: Local) -> int:
    """Remove a model's files from the cache; return the number of bytes that were freed."""
    repo = next(repo for repo in _repos(settings) if repo.repo_id == local.repo)
    if all(other.name == local.name for other in _models_of(repo)):
        shutil.rmtree(repo.repo_path)  # not by commit: another repository may have the same commits
        return repo.size_on_disk
    freed = 0
    for revision in repo.revisions:
        names = {_inside(revision, file): file for file in revision.files}
        for part in _models_in(names).get(local.weight_file, ()):
            if (file := names.get(part)) is not None:
                freed += file.size_on_disk if file.blob_path.exists() else 0
                file.blob_path.unlink(missing_ok=True)
                file.file_path.unlink(missing_ok=True)
    return freed


def _repos(settings: HubOptions) -> Iterator[CachedRepoInfo]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        yield from (repo for repo in scan_cache_dir(settings.download_dir).repos if repo.repo_type == "model")
    except CacheNotFound:
        return
    except (ValueError, RuntimeError) as error:  # a file; a loop of links
        raise ConfigError(f"download_dir: {cache_folder(settings)} is not a folder", "download_dir") from error


def damage(settings: HubOptions, folder: Path) -> str:
    """Return why the cache's folder of a repository cannot be read; "" if it can be."""
    from huggingface_hub import scan_cache_dir

    warnings = map(str, scan_cache_dir(settings.download_dir).warnings)
    return "; ".join(warning for warning in warnings if folder.name in re.split(r"[/\\()]", warning))


def _models_of(repo: CachedRepoInfo) -> Iterator[Local]:
    seen = set[str]()
    for revision in sorted(repo.revisions, key=lambda each: ("main" in each.refs, each.last_modified), reverse=True):
        files = {_inside(revision, file): file for file in revision.files}
        for first, parts in _models_in(files).items():
            name = full_name(repo.repo_id, first)
            if name in seen or not all(part in files for part in parts):
                continue
            seen.add(name)
            blob = files[parts[0]].blob_path.name
            yield Local(
                name=name,
                repo=repo.repo_id,
                weight_file=first,
                size=sum(files[part].size_on_disk for part in parts),
                modified=revision.last_modified,
                digest=blob if len(blob) == 64 else None,
            )


def _models_in(names: Iterable[str]) -> dict[str | None, tuple[str, ...]]:
    """Map the first part of every GGUF model to all its parts, and None to the weights in safetensors, if any."""
    names = list(names)
    weights = tuple(name for name in names if name.endswith(".safetensors") and "/" not in name)
    return {**source.gguf_models(names), **({None: weights} if weights and "config.json" in names else {})}


def _inside(revision: CachedRevisionInfo, file: Any) -> str:
    return file.file_path.relative_to(revision.snapshot_path).as_posix()
