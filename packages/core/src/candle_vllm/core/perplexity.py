# SPDX-License-Identifier: MIT
"""Perplexity of a text, and how far a model's next-token distributions are from a reference's.

The text is cut into windows, each of which begins with BOS if the model has one. Each token that has a token before it
in its window is scored, by the logits after that token. docs/quantisation.md describes the figures.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import ConfigError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.progress import tell


def cut(engine: InferenceEngine, text: str, window: int, most: int | None = None) -> tuple[list[int], list[list[int]]]:
    """Return the tokens that precede a text (BOS), and windows of the text's first `most` tokens, without BOS.

    Raises ConfigError if there is no token to score. A window has at most `window` tokens, including BOS.
    """
    tokenizer = engine._require()[1].tokenizer  # `engine.tokenize` refuses very long texts
    before, needed = tokenizer.encode(""), text if most is None else text[: most * tokenizer.longest_token]
    found, size = tokenizer.encode(needed, add_special_tokens=False)[:most], max(1, window - len(before))
    windows = [found[start : start + size] for start in range(0, len(found), size)]
    windows = [each for each in windows if 1 < len(before) + len(each) <= window]
    if not windows:
        raise ConfigError("there is no token to score: take a longer text, or longer windows")
    return before, windows


def perplexity(
    engine: InferenceEngine,
    text: str,
    *,
    window: int = 1024,
    tokens: int | None = None,
    save: BinaryIO | None = None,
    reference: BinaryIO | None = None,
) -> dict[str, Any]:
    """Return a model's figures on the first `tokens` tokens of a text, and their comparison with a reference, if given.

    `save` gets a line of text, then log-probabilities, float32 [scored tokens, vocabulary]; `reference` is such a file.
    Raises ConfigError if there is no token to score or the reference has other tokens, CandleVllmError if it is short.
    """
    before, windows = cut(engine, text, window, tokens)
    first, size = max(1, len(before)), engine.model_info.vocab_size
    ids = [(before + each)[first:] for each in windows]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
    mine = f"tokens {digest}, vocabulary {size}"
    head = f"log-probabilities: {mine}\n".encode()
    if save is not None:
        save.write(head)
    if reference is not None and (theirs := reference.readline(len(head) + 9)) != head:
        told = theirs.decode(errors="replace").removeprefix("log-probabilities: ").rstrip()
        raise ConfigError(f"the reference has other tokens or another vocabulary: {told}; not {mine}", "reference")
    parts: list[list[NDArray[np.float64]]] = []

    def read(logits: NDArray[np.float32]) -> None:
        """Append columns: log p of the text's tokens; with a reference its log p, KL, and whether top tokens agree."""
        wanted = np.array([*itertools.islice(rest, len(logits))], np.int64)
        shifted = logits[: len(wanted)] - logits[: len(wanted)].max(1, keepdims=True)
        own = shifted - np.log(np.exp(shifted).sum(1, dtype=np.float64, keepdims=True)).astype(np.float32)
        at = np.arange(len(wanted)), wanted
        columns = [own[at]]
        if save is not None:
            save.write(own.tobytes())
        if reference is not None:
            data = reference.read(own.nbytes)
            if len(data) != own.nbytes:
                raise ValueError("the reference has fewer log-probabilities than tokens: save it again")
            other = np.frombuffer(data, np.float32).reshape(own.shape)
            with np.errstate(invalid="ignore"):
                terms = np.exp(other) * (other - own)  # NaN where both are -inf
            columns += [other[at], np.nansum(terms, 1, dtype=np.float64), other.argmax(1) == own.argmax(1)]
        parts[-1].append(np.stack(columns).astype(np.float64))

    for number, each in enumerate(ids):
        tell("reading the text", number, len(ids), "")
        parts.append([])
        rest = iter(each)
        engine.read_logits(before + windows[number], read, first - 1)
    return _figures([np.concatenate(part, 1) for part in parts]) | {"digest": digest}


def _figures(parts: list[NDArray[np.float64]]) -> dict[str, Any]:
    """Return the figures of the windows' columns; errors are standard errors, from the differences between windows."""
    columns, count = np.concatenate(parts, 1), len(parts)
    found: dict[str, Any] = {"tokens": columns.shape[1], "windows": count}
    for name, weights in {"perplexity": [-1], "ratio": [-1, 1], "kl": [0, 0, 1]}.items():
        if len(weights) <= len(columns):
            values = [np.array(weights) @ part[: len(weights)] for part in parts]
            mean = float(np.concatenate(values).mean())
            scale = 1.0 if name == "kl" else math.exp(mean)
            squares = sum(float((each - mean).sum()) ** 2 for each in values) * count / max(1, count - 1)
            found[name] = mean if name == "kl" else scale
            found[f"{name}_error"] = scale * math.sqrt(squares) / columns.shape[1] if count > 1 else None
    if len(columns) > 1:
        lost = np.abs(columns[1] - columns[0])
        found |= {"kl_max": float(columns[2].max()), "diff": float(lost.mean()), "diff_max": float(lost.max())}
        found |= {"same_top": float(columns[3].mean()), "reference": math.exp(-columns[1].mean())}
    return found
