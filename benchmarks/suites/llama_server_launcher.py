# SPDX-License-Identifier: MIT
"""Stands for the program llama-server: starts `candle-vllm serve` with the arguments that have a meaning here.

Only what cannot be had is changed: models that would be downloaded, and names of llama.cpp's built-in templates.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_LEFT_OUT = {  # flag -> whether it has a value
    "--model-url": True, "--mmproj-url": True, "--n-predict": True,
    "--offline": False,
    "--no-slots": False, "--no-jinja": False, "--no-mmproj": False, "--kv-unified": False, "--swa-full": False,
    "--no-cache-idle-slots": False, "--cache-ram": True, "--verbose": False, "--tags": True, "--media-path": True,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Replaces this process by the server."""
    kept: list[str] = []
    model, context, slots, unified = "demo", 0, 1, "--kv-unified" in arguments
    rest = iter(arguments)
    for flag in rest:
        if flag in ("--hf-repo", "--hf-file"):
            model = _model(next(rest), model)
        elif flag == "--ctx-size":
            context = int(next(rest))
        elif flag == "--parallel":
            slots = int(next(rest))
            kept += [flag, str(slots)]
        elif flag == "--batch-size":  # of llama-server's two batch sizes, this one shows in answers
            kept += ["--ubatch-size", next(rest)]
        elif flag == "--ubatch-size":
            next(rest)
        elif flag == "--chat-template" and len(name := next(rest)) > 20:
            kept += [flag, name]
        elif flag == "--chat-template":
            pass  # a template that is built into llama-server
        elif flag in _LEFT_OUT:
            if _LEFT_OUT[flag]:
                next(rest)
        else:
            kept.append(flag)
    if context:  # each of llama-server's slots has its share
        kept += ["--ctx-size", str(context if unified else context // slots)]
    command = Path(sys.executable).with_name("candle-vllm")
    os.execv(command, [str(command), "serve", "--model", model, *kept])  # noqa: S606


def _model(name: str, otherwise: str) -> str:
    """Return what stands in for a repository or a file of it."""
    if name.startswith(("bert", "jina")):
        return os.environ["SUITE_EMBEDDING_MODEL"]
    return os.environ["SUITE_INFILL_MODEL"] if name.endswith("-infill") else otherwise


if __name__ == "__main__":
    main(sys.argv[1:])
