"""`candle-vllm quantize`: writes a model of plain weights as one GGUF file, quantised or as it is.

No request runs; the file is what this library and llama.cpp load (see `candle_vllm.core.conversion`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.progress import progress_bar, tell
from candle_vllm.core.threads import LOADING_THREADS
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.derived import engine_config
from candle_vllm.server.settings.options import UsageError


def quantize(
    settings: Settings,
    out: Path | None = None,
    force: bool = False,
    dtype: str | None = None,
    threads: int | None = None,
) -> int:
    """Writes the file and says what is in it."""
    if out is None:
        raise UsageError("--out FILE.gguf is missing: it names the file to write")
    changes = {"dtype": dtype} if dtype is not None else {}
    LOADING_THREADS.set(threads or settings.threads)

    def progress(done: int, total: int) -> None:
        tell("writing", done, total)

    with progress_bar():
        written = write_gguf(engine_config(settings, **changes), out, overwrite=force, progress=progress)
    types = ", ".join(f"{kind} x {count}" for kind, count in sorted(written.types.items(), key=lambda item: -item[1]))
    sys.stdout.write(f"{written.path}: {written.nbytes / 1e6:,.1f} MB, {types}\n")
    return 0
