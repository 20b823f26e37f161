# SPDX-License-Identifier: MIT
"""Choose the file in which a model's packed weights are kept between starts (`kernels/cpu_runtime/packed_file.py`)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.kernels.cpu_runtime.kernel_cache import CORE, cache_root, has_compiler, own_folder
from candle_vllm.core.kernels.cpu_runtime.level import host_level
from candle_vllm.core.kernels.cpu_runtime.packed_file import PACKED, SUFFIX, PackedFile
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.loading.tensors import Checkpoint

logger = logging.getLogger(__name__)

LEAST_BYTES = 64 << 20  # minimum bytes of weights for a file: fewer are packed in a fifth of a second


@contextmanager
def packed_weights(
    config: EngineConfig, paths: Sequence[Path], stored: Checkpoint, build: Callable[..., Any], *part: object
) -> Iterator[None]:
    """Context for loading a model's weights, in which packed matrices come from a file, or are written to one.

    `paths` are the files that determine the weights; empty if no matrix is packed for the CPU. `build` is the family's
    function; weights of a family of another package are not kept. `part` identifies the loaded part of a divided model.
    """
    size = sum(tensor.nbytes for tensor in stored.tensors.values())
    ours = (build.__module__ or "").startswith("candle_vllm.core.")
    folder = _folder(config.packed_cache) if paths and size >= LEAST_BYTES and ours else None
    if folder is None:
        yield
        return
    level = host_level()
    model = [files_mark(paths), config.isq, config.dtype, config.model_impl, level.name, str(level.cpu), *part]
    model.append(has_compiler())  # without one, types whose kernels are not precompiled become 8-bit codes
    name = hashlib.sha256(json.dumps(model).encode()).hexdigest()[:32]
    file = PackedFile(folder / (name + SUFFIX), f"{name} {layout_version()}")
    token = PACKED.set(file)
    try:
        yield
    finally:
        PACKED.reset(token)
    file.finish()


def _folder(setting: str) -> Path | None:
    """Return the folder of the setting `packed_cache`; None for "off", and with a warning if it cannot be used."""
    if setting in ("off", ""):
        return None
    try:
        if setting == "on":
            return own_folder(cache_root(), cache_root() / "weights")[0]
        root = Path(setting).expanduser().resolve()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # a volume that exists may be open to a group
        return own_folder(root / "weights", root / "weights")[0]
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder, or links form a loop
        logger.warning("weights are packed at every start: %s; set packed_cache to another folder, or to off", error)
        return None


@cache
def layout_version() -> str:
    """Return a hash of the package's version, and of the sizes and times of its sources, which define the layouts."""
    digest = hashlib.sha256(version("candle-vllm-core").encode())
    for folder, folders, names in os.walk(CORE):
        folders.sort()
        for name in sorted(name for name in names if name.endswith(".py")):
            info = os.stat(os.path.join(folder, name))  # `Path` is slow: hundreds of files at each start
            digest.update(f"{folder.removeprefix(str(CORE))} {name} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
