# SPDX-License-Identifier: MIT
"""`candle-vllm perplexity` and `candle-vllm imatrix`: measure a model on a text (steps 4 to 6 of a request's life)."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from candle_vllm.core.conversion import write_imatrix
from candle_vllm.core.conversion.write import check_target
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.perplexity import perplexity as measure
from candle_vllm.core.progress import progress_bar
from candle_vllm.server.settings.derived import engine_config, in_flags, load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.sources import read_text
from candle_vllm.server.settings.table import OPTIONS, ModelOptions

_NOT_OF_REFERENCE = (
    "weight_path", "weight_file", "revision", "isq", "imatrix", "kv_cache_dtype", "key_cache_dtype",
    "value_cache_dtype", "op_by_op",
)  # fmt: skip
"""Settings that do not apply to the reference, which is another model and runs with the precision of its files."""


def perplexity(
    settings: ModelOptions, file: Path | None = None, reference: str | None = None, as_json: bool = False, **cut: int
) -> int:
    """Measure, and print one JSON object or a table."""
    text = _text(file)
    with tempfile.TemporaryFile() as known:
        if reference is not None:
            plain = {option.name: option.default for option in OPTIONS if option.name in _NOT_OF_REFERENCE}
            _measured(dataclasses.replace(settings, **plain, model=reference), text, save=known, **cut)
            known.seek(0)
        found = _measured(settings, text, reference=None if reference is None else known, **cut)
    shown = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
    rows = [f"{name:16} {'-' if value is None else value}" for name, value in shown.items()]
    sys.stdout.write((json.dumps(found) if as_json else "\n".join(rows)) + "\n")
    return 0


def _measured(settings: ModelOptions, text: str, window: int = 1024, **options: Any) -> dict[str, Any]:
    changes: dict[str, Any] = {"max_model_len": window, "max_num_seqs": 1, "enable_prefix_caching": False}
    with progress_bar(), _cutting(window), load_engine(settings, **changes) as engine:
        return {"model": engine.model_info.name, "window": window} | measure(engine, text, window=window, **options)


def imatrix(
    settings: ModelOptions, file: Path | None = None, out: Path | None = None, force: bool = False, **options: int
) -> int:
    """Measure, write the importance matrix, and print the file's size and its number of entries."""
    text, threads = _text(file), options.pop("threads", None) or settings.threads
    if out is None:
        raise UsageError("-o FILE.gguf is missing: it names the file to write")
    check_target(out, force)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no part of the file stays behind
    with progress_bar(), _cutting(options.get("window", 512)):
        written = write_imatrix(engine_config(settings, threads=threads), text, str(file), out, **options)
    sys.stdout.write(f"{written.path}: {written.nbytes / 1e6:,.1f} MB, {written.types['F32'] // 2} entries\n")
    return 0


@contextmanager
def _cutting(window: int) -> Iterator[None]:
    """Context manager whose error names --window, not `--max-model-len`, if windows are too long."""
    try:
        yield
    except ConfigError as error:
        said = in_flags(str(error)).replace("--max-model-len", "--window").removesuffix(" or leave it out")
        raise UsageError(f"--window {window}: {said}") if error.setting == "max_model_len" else error from None


def _text(file: Path | None) -> str:
    if file is None:
        raise UsageError("-f FILE is missing: it names the text, a file in UTF-8")
    return read_text(file, "the text", "utf-8-sig")
