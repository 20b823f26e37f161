# SPDX-License-Identifier: MIT
"""Adapters of Hugging Face: whose repositories are taken, and which of their revisions (before step 1)."""

from __future__ import annotations

import logging
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from candle_vllm.core.loading.source import HUB_ID, HUB_TIMEOUT_S
from candle_vllm.server.adapters.disk_cache import DiskCache
from candle_vllm.server.adapters.fetching import FetchedSource, Pinned, Taking, sum_of
from candle_vllm.server.adapters.sources import (
    CONFIG,
    MAX_CONFIG,
    PICKLED,
    WEIGHTS,
    AdapterName,
    Budget,
    Limits,
    Refused,
    Unavailable,
    check_config,
)
from candle_vllm.server.models.downloads import refused_by_hub
from candle_vllm.server.settings import Settings

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HEX = re.compile(r"[0-9a-fA-F]{4,64}")  # a commit, or the beginning of one
_MAX_HISTORY = 2000  # commits of all branches and tags among which one is looked for


class HubSource(FetchedSource):
    """Repositories of Hugging Face whose names match a pattern; a name is `org/repo`, or a folder in one.

    Anybody may propose changes to a repository, and the hub has the commits of proposals under its name. Where the
    pattern says whose repositories are taken, a revision is one of their own: of a branch or a tag.

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

    @property
    def keeps(self) -> str:
        """See `FetchedSource`. What was taken of anybody's proposals is not a repository's own later."""
        return "hf" if self.takes_all else "hf, own"

    def _may_have(self, name: AdapterName) -> bool:
        if "/" in (name.revision or "") and not self.takes_all:
            return False  # refs/pr/1 and its like are what anybody proposes to the repository
        repo, _ = _repo(name)
        return HUB_ID.fullmatch(repo) is not None and fnmatchcase(repo, self._pattern)

    def _is(self, kept: str, label: str) -> bool:
        (repo, below), (asked, asked_below) = _repo(AdapterName(kept)), _repo(AdapterName(label))
        return (repo.lower(), below) == (asked.lower(), asked_below)

    def _pin(self, name: AdapterName, budget: Budget) -> Pinned | None:
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
        if not (self.takes_all or name.told or self._is_own(repo, name.revision, commit, budget)):
            logger.info("no adapter %s@%s: the commit is of none of its branches and tags", repo, name.revision)
            return None

        def fill(folder: Path, budget: Budget) -> str | None:
            if weights is None:
                pickled = f" but {PICKLED}, a pickle, which is a program" if below + PICKLED in files else ""
                raise Refused(f"it has no {WEIGHTS}{pickled}")
            if (config.size or 0) > MAX_CONFIG:
                raise Refused(f"its {CONFIG} has more than {MAX_CONFIG >> 20} MiB")
            budget.expect((config.size or 0) + (weights.size or 0))
            self._get(repo, commit, config, folder / CONFIG, budget)
            base = check_config((folder / CONFIG).read_bytes(), budget.limits)
            self._get(repo, commit, weights, folder / WEIGHTS, budget)
            return base

        return Pinned(commit, fill, f"{repo}/{below}".rstrip("/"))

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

    def _is_own(self, repo: str, revision: str | None, commit: str, budget: Budget) -> bool:
        """Whether a commit that a request names is of the repository's branches or tags, as far as the hub says so."""
        import huggingface_hub
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import build_hf_headers, paginate

        if revision is None or not _HEX.fullmatch(revision):
            return True  # the name of a branch or a tag
        token = self._settings.hf_token
        try:
            refs = huggingface_hub.list_repo_refs(repo, token=token)
            own = {ref.target_commit: ref for ref in [*refs.branches, *refs.tags]}
            if commit in own:
                return True
            headers, left = build_hf_headers(token=token), _MAX_HISTORY
            for ref in sorted(own.values(), key=lambda ref: ref.name != constants.DEFAULT_REVISION):
                url = f"{constants.ENDPOINT}/api/models/{repo}/commits/{quote(ref.name, safe='')}"
                for item in paginate(url, {}, headers, timeout=min(HUB_TIMEOUT_S, budget.seconds)):
                    if item["id"] == commit:
                        return True
                    left, _ = left - 1, budget.seconds
                    if not left:
                        logger.warning("%s has more than %d commits: @%s is not looked for", repo, _MAX_HISTORY, commit)
                        return False
        except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"the hub does not say whose {repo}@{commit} is ({type(error).__name__})") from None
        return False

    def _get(self, repo: str, commit: str, file: RepoSibling, path: Path, budget: Budget) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        budget.check(file.size or 0)
        told = None if file.lfs is None else str(file.lfs["sha256"])
        with path.open("xb") as stream:
            taking: Any = Taking(stream, budget)
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
        if told is not None and sum_of(path) != told:
            raise Unavailable(f"{file.rfilename} of {repo} is not what the hub has")


def _repo(name: AdapterName) -> tuple[str, str]:
    """A repository, and the beginning of the names of the files in its folder."""
    parts = name.name.split("/")
    return "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])


class _NoBar:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, _: float | None = 1) -> None:
        pass
