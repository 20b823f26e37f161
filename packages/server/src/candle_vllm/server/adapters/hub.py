# SPDX-License-Identifier: MIT
"""Adapters from Hugging Face: which repositories, and which of their revisions, are allowed (before step 1)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from candle_vllm.core.loading.source import HUB_ID, HUB_TIMEOUT_S
from candle_vllm.server.adapters import sources
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.fetching import FetchedSource, Pinned, cut_off, sum_of, write_all
from candle_vllm.server.models.downloads import refused_by_hub
from candle_vllm.server.settings.table import HubOptions

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-fA-F]{4,64}")  # a commit, or the beginning of one
_MAX_TOLD = 16 << 20  # maximum bytes of a response about a repository; enough for some 60,000 files
_MAX_HISTORY = 2000  # maximum number of commits among which a requested one is searched


class HubSource(FetchedSource):
    """Repositories of Hugging Face whose names match a pattern, `org/*` or `org/repo`, where `*` matches any text.

    An adapter's name is `org/repo`, or a folder in one. Anyone can open a pull request on a repository, and the hub
    serves its commits under the repository's name. If the pattern restricts the owners, only commits of the
    repository's branches and tags are accepted.
    """

    kind = "hf"
    usual = "main"

    def __init__(self, pattern: str, settings: HubOptions, cache: DiskCache, limits: sources.Limits) -> None:
        super().__init__(cache, limits)
        self._pattern = pattern + "*" if pattern.endswith("/") else pattern
        self._settings = settings

    @property
    def takes_all(self) -> bool:
        """Whether the pattern allows every repository."""
        return self._pattern.strip("*/") == ""

    @property
    def keeps(self) -> str:
        """See `FetchedSource`. A restricted pattern must not find adapters that an unrestricted one has cached."""
        return "hf" if self.takes_all else "hf, own"

    def _may_have(self, name: sources.AdapterName) -> bool:
        if "/" in (name.revision or "") and not self.takes_all:
            return False  # anyone can create refs/pr/1 and similar refs
        repo, _ = _repo(name)
        return HUB_ID.fullmatch(repo) is not None and fnmatchcase(repo, self._pattern)

    def _is(self, kept: str, label: str) -> bool:
        (repo, below), (asked, asked_below) = _repo(sources.AdapterName(kept)), _repo(sources.AdapterName(label))
        return (repo.lower(), below) == (asked.lower(), asked_below)

    def _pin(self, name: sources.AdapterName, budget: sources.Budget) -> Pinned | None:
        asked, below = _repo(name)
        info = self._info(asked, name.revision, budget)
        if info is None:
            return None
        repo = info.id  # the hub's spelling: names that differ only in case are the same
        if repo.lower() != asked.lower():
            logger.info("no adapter %s: the repository has moved", asked)
            return None
        files = {sibling.rfilename: sibling for sibling in info.siblings}
        config, weights = files.get(below + sources.CONFIG), files.get(below + sources.WEIGHTS)
        if config is None or not _COMMIT.fullmatch(info.sha or ""):
            return None
        commit = info.sha or ""
        if not (self.takes_all or name.told or self._is_own(repo, name.revision, commit, budget)):
            logger.info("no adapter %s@%s: the commit is on none of its branches and tags", repo, name.revision)
            return None

        def fill(folder: Path, budget: sources.Budget) -> str | None:
            if weights is None:
                pickled = (
                    f" but {sources.PICKLED}, a pickle, which is a program" if below + sources.PICKLED in files else ""
                )
                raise sources.Refused(f"it has no {sources.WEIGHTS}{pickled}")
            if (config.size or 0) > sources.MAX_CONFIG:
                raise sources.Refused(f"its {sources.CONFIG} has more than {sources.MAX_CONFIG >> 20} MiB")
            budget.expect((config.size or 0) + (weights.size or 0))
            self._get(repo, commit, config, folder / sources.CONFIG, budget)
            base = sources.check_config((folder / sources.CONFIG).read_bytes(), budget.limits)
            self._get(repo, commit, weights, folder / sources.WEIGHTS, budget)
            return base

        return Pinned(commit, fill, f"{repo}/{below}".rstrip("/"))

    def _info(self, repo: str, revision: str | None, budget: sources.Budget) -> _Info | None:
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

        if self._settings.offline:
            raise sources.Unavailable("Hugging Face is not contacted (--offline)")
        at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        try:
            told, _ = self._told(f"{constants.ENDPOINT}/api/models/{repo}{at}?blobs=true", budget)
            return msgspec.json.decode(told, type=_Info)
        except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, msgspec.MsgspecError) as error:
            refusal = refused_by_hub(self._settings, repo, error)
            if refusal is None:
                _ = budget.seconds
                said = f"Hugging Face cannot be reached for {repo} ({type(error).__name__})"
                raise sources.Unavailable(said) from None
            logger.info("no adapter %s: %s", repo, refusal)
            return None

    def _is_own(self, repo: str, revision: str | None, commit: str, budget: sources.Budget) -> bool:
        """Whether a requested commit belongs to a branch or tag of the repository, according to the hub."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError

        if revision is None or not _HEX.fullmatch(revision):
            return True  # the revision is the name of a branch or a tag
        api = f"{constants.ENDPOINT}/api/models/{repo}"
        try:
            refs = msgspec.json.decode(self._told(f"{api}/refs", budget)[0], type=_Refs)
            own = {ref.target_commit: ref for ref in [*refs.branches, *refs.tags]}
            if commit in own:
                return True
            left = _MAX_HISTORY
            for ref in sorted(own.values(), key=lambda ref: ref.name != constants.DEFAULT_REVISION):
                url = f"{api}/commits/{quote(ref.name, safe='')}"
                while url:
                    told, url = self._told(url, budget)
                    for item in msgspec.json.decode(told, type=list[_Commit]):
                        if item.id == commit:
                            return True
                        left -= 1
                        if not left:
                            logger.warning(
                                "%s: the %d commits that were searched do not include @%s", repo, _MAX_HISTORY, commit
                            )
                            return False
        except (HTTPError, OSError, ValueError, msgspec.MsgspecError) as error:
            _ = budget.seconds
            raise sources.Unavailable(
                f"Hugging Face does not report the branches of {repo}@{commit} ({type(error).__name__})"
            ) from None
        return False

    def _told(self, url: str, budget: sources.Budget) -> tuple[bytes, str]:
        """Return the response body of a URL, and the URL of the next page or ""; raises the errors of `_answer`."""
        told = bytearray()
        with self._answer(url, budget) as answer:
            for piece in answer.iter_raw():
                _ = budget.seconds
                told += piece
                if len(told) > _MAX_TOLD:
                    raise sources.Unavailable(
                        f"Hugging Face's answer about a repository has more than {_MAX_TOLD >> 20} MiB"
                    )
            return bytes(told), answer.links.get("next", {}).get("url", "")

    @contextmanager
    def _answer(self, url: str, budget: sources.Budget) -> Iterator[Any]:
        """Yield an uncompressed response; raises HTTPError and OSError of huggingface_hub, and `Unavailable`."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        constants.HF_HUB_DISABLE_TELEMETRY = True  # otherwise its headers cost a request that `cut_off` does not end
        headers = {**build_hf_headers(token=self._settings.hf_token), "accept-encoding": "identity"}
        headers["connection"] = "close"  # `cut_off` only ends connections that the request itself opens
        patience = min(HUB_TIMEOUT_S, budget.seconds)
        with (
            cut_off(budget.seconds) as extensions,
            get_session().stream("GET", url, headers=headers, timeout=patience, extensions=extensions) as answer,
        ):
            own = {name: value for name, value in answer.headers.items() if name.startswith("x-")}
            # With the response itself, hf_raise_for_status would read the whole body of an error, which is not needed.
            hf_raise_for_status(type(answer)(answer.status_code, headers=own, request=answer.request))
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise sources.Unavailable("Hugging Face's response is compressed, which was not requested")
            yield answer

    def _get(self, repo: str, commit: str, file: _File, path: Path, budget: sources.Budget) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HTTPError

        budget.check(file.size or 0)
        with path.open("xb") as stream:
            try:
                with self._answer(hf_hub_url(repo, file.rfilename, revision=commit), budget) as answer:
                    write_all(answer.iter_raw(), stream, budget)
            except (HTTPError, OSError) as error:
                _ = budget.seconds
                raise sources.Unavailable(
                    f"{file.rfilename} of {repo} could not be downloaded ({type(error).__name__})"
                ) from None
        if file.size not in (None, path.stat().st_size) or (file.lfs is not None and sum_of(path) != file.lfs.sha256):
            raise sources.Unavailable(f"{file.rfilename} of {repo} does not match Hugging Face's checksum")


class _Sum(msgspec.Struct):
    sha256: str


class _File(msgspec.Struct):
    rfilename: str
    size: int | None = None
    lfs: _Sum | None = None


class _Info(msgspec.Struct):
    """Metadata of a repository from the hub; `id` is its name in the hub's spelling."""

    id: str
    sha: str | None = None
    siblings: list[_File] = []


class _Ref(msgspec.Struct, rename="camel"):
    name: str
    target_commit: str


class _Refs(msgspec.Struct):
    branches: list[_Ref] = []
    tags: list[_Ref] = []


class _Commit(msgspec.Struct):
    id: str


def _repo(name: sources.AdapterName) -> tuple[str, str]:
    """Split a name into its repository and the path prefix of the adapter's files."""
    parts = name.name.split("/")
    return "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])
