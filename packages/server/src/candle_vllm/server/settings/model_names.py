# SPDX-License-Identifier: MIT
"""Names of models: Hugging Face repositories with a file type, and short names for some small models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.core.loading.source import HUB_ID, TAG
from candle_vllm.core.setting_kinds import nearest

_HOSTS = ("https://", "http://", "hf.co/", "huggingface.co/")
_PAGE = re.compile(r"([^/]++/[^/]++)/blob/main/(?:[^/]++/)*+([^/]+\.gguf)")  # of a file


class PullError(ModelNotFoundError):
    """A model cannot be fetched.

    Attributes:
        code: reason for programs: no_such_name, no_such_model, no_access, no_such_file, hub_unreachable, offline,
            disk_full, interrupted, damaged or stopped.
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Known(NamedTuple):
    """A model with a short name: its repository, its file type, and its minimum memory in MiB."""

    repo: str
    tag: str | None
    mib: int


KNOWN: Mapping[str, Known] = {
    "smollm2:135m": Known("HuggingFaceTB/SmolLM2-135M-Instruct", None, 800),
    "smollm2:360m": Known("HuggingFaceTB/SmolLM2-360M-Instruct", None, 1300),
    "smollm2:1.7b": Known("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "Q4_K_M", 1600),
    "qwen2.5:0.5b": Known("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Q4_K_M", 1000),
    "qwen2.5:1.5b": Known("Qwen/Qwen2.5-1.5B-Instruct-GGUF", "Q4_K_M", 1600),
    "qwen2.5:3b": Known("Qwen/Qwen2.5-3B-Instruct-GGUF", "Q4_K_M", 2600),
    "qwen2.5-coder:0.5b": Known("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "Q4_K_M", 1000),
    "qwen2.5-coder:1.5b": Known("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "Q4_K_M", 1600),
    "qwen3:0.6b": Known("Qwen/Qwen3-0.6B-GGUF", "Q8_0", 1200),
    "qwen3:1.7b": Known("Qwen/Qwen3-1.7B-GGUF", "Q8_0", 2300),
    "qwen3:4b": Known("Qwen/Qwen3-4B-GGUF", "Q4_K_M", 2900),
    "qwen3:8b": Known("Qwen/Qwen3-8B-GGUF", "Q4_K_M", 5300),
    "all-minilm:latest": Known("sentence-transformers/all-MiniLM-L6-v2", None, 400),
}
"""The short names; the files are the authors' and are not reviewed here."""


class Named(NamedTuple):
    """A repository and the selected file: a type such as `Q4_K_M`, or part of a file name."""

    repo: str
    tag: str | None

    def __str__(self) -> str:
        return self.repo if self.tag is None else f"{self.repo}:{self.tag}"


def read_name(name: str) -> Named:
    """Parse a name: `org/repo`, `org/repo:Q4_K_M`, either after `hf.co/`, the URL of a page, or a name in `KNOWN`.

    PullError if the name has another form, or is unknown.
    """
    given = name.strip()
    for host in _HOSTS:
        given = given.removeprefix(host)
    given = given.removesuffix("/").removesuffix("/tree/main")
    if (page := _PAGE.fullmatch(given)) is not None:
        given = ":".join(page.groups())
    repo, colon, tag = given.partition(":")
    if "/" not in repo:
        family = [known for known in KNOWN if known.partition(":")[0] == repo]
        exact = given if colon and tag != "latest" else next(iter(family), given)
        if exact not in KNOWN:
            raise PullError(
                f"there is no model {name!r:.200}{nearest(given, KNOWN)}: short names are {', '.join(KNOWN)}; write "
                "other models of Hugging Face as organisation/name, with :Q4_K_M for one of several files",
                "no_such_name",
            )
        return Named(KNOWN[exact].repo, KNOWN[exact].tag)
    if not HUB_ID.fullmatch(repo) or (colon and not TAG.fullmatch(tag)):
        raise PullError(
            f"{name!r:.200} is not a model's name: write organisation/name, with :Q4_K_M for one of several files",
            "no_such_name",
        )
    return Named(repo, None if tag in ("", "latest") else tag)


def named_model(model: str) -> str:
    """Resolve `qwen3:4b` or `hf.co/org/name:Q8_0` to a repository and a type; return other names unchanged."""
    of_hub = model.startswith(("hf.co/", "huggingface.co/", "https://hf.co/", "https://huggingface.co/"))
    if os.path.exists(model) or ("/" in model and not of_hub):
        return model
    try:
        return str(read_name(model))
    except PullError:
        return model
