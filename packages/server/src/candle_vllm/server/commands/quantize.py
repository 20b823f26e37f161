# SPDX-License-Identifier: MIT
"""`candle-vllm quantize`: writes a model, perhaps with merged adapters, or an adapter as a GGUF file."""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from candle_vllm.core.conversion import write_gguf, write_gguf_adapter
from candle_vllm.core.progress import progress_bar, tell
from candle_vllm.core.threads import LOADING_THREADS
from candle_vllm.server.models.library import file_bytes
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ModelOptions

_MOST = 1000.0  # maximum scale of an adapter


def quantize(
    settings: ModelOptions,
    out: Path | None = None,
    force: bool = False,
    dtype: str | None = None,
    threads: int | None = None,
    lora: Sequence[str] = (),
    lora_to_gguf: Path | None = None,
) -> int:
    """Write the file, and print its size and types."""
    if out is None:
        raise UsageError("--out FILE.gguf is missing: it names the file to write")
    if lora and lora_to_gguf is not None:
        raise UsageError("--lora merges adapters into a model, --lora-to-gguf writes one as a file: give one of them")
    changes: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
    LOADING_THREADS.set(threads or settings.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no part of the file stays behind
    before = file_bytes(settings)  # before `out` replaces the file
    with progress_bar():
        config, options = engine_config(settings, **changes), {"overwrite": force, "progress": partial(tell, "writing")}
        if lora_to_gguf is not None:
            written = write_gguf_adapter(config, lora_to_gguf, out, **options)
        else:
            written = write_gguf(config, out, adapters=[_scaled(text) for text in lora], **options)
    types = ", ".join(f"{kind} x {count}" for kind, count in sorted(written.types.items(), key=lambda item: -item[1]))
    sys.stdout.write(f"{written.path}: {written.nbytes / 1e6:,.1f} MB, {types}\n")
    before = before or file_bytes(settings)  # 0 for a model that was downloaded meanwhile
    if settings.isq is not None and lora_to_gguf is None and written.nbytes >= before > 0:
        sys.stdout.write(f"not smaller than the model's files ({before / 1e6:,.1f} MB)\n")
    return 0


def _scaled(text: str) -> tuple[Path, float]:
    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not abs(number) <= _MOST:
        raise UsageError(
            f"--lora {text:.200}: {scale!r:.40} is not a scale; PATH:0.5 merges an adapter with the scale 0.5"
        )
    return Path(path), number
