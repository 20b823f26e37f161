# SPDX-License-Identifier: MIT
"""Fit the quantisation of keys to a model: run a text, and measure its keys and queries (`attention/cpu_quantised`).

A rank of a divided model fits its own heads; all ranks run the same steps.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.batch import Batch, BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, RunState, Sequence
from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.cpu_runtime.packed_file import FITS
from candle_vllm.core.memory import CachePlan
from candle_vllm.core.sampling.params import SamplingParams

if TYPE_CHECKING:
    from candle_vllm.core.assembly.model import LoadedModel
    from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
    from candle_vllm.core.kernels.attention.cpu_cache import CacheKind
    from candle_vllm.core.kernels.cpu_runtime.recorder import MeasuredKeys, StepLimits

logger = logging.getLogger(__name__)

_SEQUENCE = 128  # maximum number of tokens of a sequence with a part of the text
_TOKENS = 3 * _SEQUENCE  # maximum number of tokens of the text
_DIGESTS = 64  # bytes of `_digests`
FIT_POSITIONS = 4096
"""Number of positions at which keys are measured: what keys share depends on the position."""

_LEAST_SPREAD = 1e-3  # least standard deviation of a dimension that counts, beside the largest of its head
_TEXT = """The ferry leaves at seven in the morning and needs forty minutes to the island. Most of the people on
board know each other: teachers, masons, a doctor with two heavy bags. "Did you hear about the bridge?" one of them
asks. "It will be open again in March, or so they say." Nobody believes it. Last year the council spent $1,250,000 on
a study with 312 pages, and in the end it only recommended another study.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values) if values else None

Question: a train travels 150 km in 2 hours. How fast is it? Answer: 150 / 2 = 75 km/h.

- Die Schule beginnt um acht Uhr, und im Winter ist es dann noch dunkel.
- La bibliothèque est fermée le lundi, sauf pendant les vacances.
- El mercado está cerca de la plaza; hoy venden naranjas y pan.
- 今天下雨，我们在家里看书。

{"name": "lamp", "price": 19.5, "tags": ["light", "desk"], "stock": null}
Water boils at 100 degrees at sea level, because its vapour pressure then equals the pressure of the air above it.
"""


def fit_keys(
    runner: RecordedRunner,
    plan: CachePlan,
    limits: StepLimits,
    loaded: LoadedModel,
    kinds: tuple[CacheKind, CacheKind],
    positions: int,
) -> None:
    """Fit the quantised keys of all layers to the keys and queries of a text, or read what an earlier start found.

    Keys in fewer than 8 bits are measured twice, the first time with one sequence: fitted keys of few bits give more
    exact keys in later layers.

    Args:
        kinds: types of keys and of values.
        positions: number of positions at which keys are measured, at most the rows of the rotary tables.
    """
    try:
        ids = loaded.tokenizer.encode(_TEXT)[:_TOKENS]
    except InvalidFileError as error:  # the vocabulary lacks a token of the text
        logger.warning("quantised keys are not fitted to the model, and less exact: %s", error)
        return
    blocks = min(-(-_SEQUENCE // limits.block_size), plan.num_blocks, *(room.pages - 1 for room in plan.windows))
    size = min(_SEQUENCE, blocks * limits.block_size, plan.max_model_len)  # maximum number of tokens of a sequence
    memory = loaded.placement.weight_memory
    path, key = None, ""
    if memory is not None and memory.kept is not None:
        weights, made_from = memory.kept
        path, key = weights.with_suffix(FITS), f"{made_from} {kinds} {loaded.config} {ids} {size} {positions}"
    if path is not None and _read(path, key, runner.fits):
        return
    for part in (ids[:_SEQUENCE], ids) if kinds[0].has_halves else (ids,):
        measured, tokens = runner.measure_keys(_steps(runner, plan, limits, part, blocks, size), positions)
        for layer in measured:
            fit(layer, tokens)
    if path is not None:
        _write(path, key, runner.fits)


def _read(path: Path, key: str, fits: list[NDArray[np.float32]]) -> bool:
    """Fill the fits of all layers from a file of `_write`; return whether it has exactly them, found for this key."""
    size = sum(each.nbytes for each in fits)
    try:
        with path.open("rb") as file:
            found = file.read(_DIGESTS + size + 1)
    except OSError:
        return False
    data = found[_DIGESTS:]
    if len(data) != size or found[:_DIGESTS] != _digests(key, data):
        return False
    at = 0
    for each in fits:
        each[...] = np.frombuffer(data, np.float32, each.size, at).reshape(each.shape)
        at += each.nbytes
    return True


def _write(path: Path, key: str, fits: list[NDArray[np.float32]]) -> None:
    """Replace the file; on an error, log it: the next start runs the text again."""
    data = b"".join(each.tobytes() for each in fits)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(_digests(key, data) + data)
        part.replace(path)
    except OSError as error:
        logger.info("what keys are fitted to cannot be saved: %s", error)
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _digests(key: str, data: bytes) -> bytes:
    """Return the beginning of a file: the SHA-256 of its key, and of the fits' bytes, which follow."""
    return hashlib.sha256(key.encode()).digest() + hashlib.sha256(data).digest()


def _steps(
    runner: RecordedRunner, plan: CachePlan, limits: StepLimits, ids: list[int], blocks: int, size: int
) -> Iterator[Batch]:
    """Yield the steps of sequences with at most `size` tokens of a text; how they are divided changes no bit."""
    builder = BatchBuilder(limits.block_size, runner.step_memory)
    for pages in runner.page_of:
        pages[:blocks] = range(1, blocks + 1)
    for first in range(0, len(ids), size):
        tokens = ids[first : first + size]
        sequence = Sequence(GenerationRequest(request_id="f", prompt_token_ids=tokens, params=SamplingParams()), 0, 0)
        sequence.block_table = array("i", range(blocks))
        for start in range(0, len(tokens), limits.tokens):
            sequence.num_uncomputed_tokens = len(tokens) - start
            run = Run.next(sequence, min(limits.tokens, len(tokens) - start))
            state = RunState(0, 0 if start else -1) if plan.states.running else run.state
            yield builder.build([msgspec.structs.replace(run, state=state)])
    runner.page_of[:] = 0


def fit(layer: MeasuredKeys, tokens: int) -> None:
    """Set a layer's `PagedCache.fit` by the sums over its keys and queries of a number of tokens.

    Without tokens, or with numbers that are not finite, it does not change.
    """
    if not tokens or not np.isfinite(layer.sums).all():  # an answer will report what is not finite
        return
    mean, keys, queries = np.moveaxis(layer.sums / np.array([[tokens], [tokens], [tokens * layer.group]]), 1, 0)
    mean = mean if layer.centred else np.zeros_like(mean)
    spread = np.sqrt([np.maximum(keys - mean**2, 0), queries])
    largest = spread.max(-1, keepdims=True)
    spread = np.maximum(spread, np.where(largest > 0, largest * _LEAST_SPREAD, 1) + np.finfo(np.float32).tiny)
    factor = np.sqrt(spread[1] / spread[0]).astype(np.float32)
    layer.fit[:, 0], layer.fit[:, 1], layer.fit[:, 2] = mean, factor, 1 / factor
