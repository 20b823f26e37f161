# SPDX-License-Identifier: MIT
"""Perplexity of a fixed text on the fast path and on the exact path: what computing in 8 bits costs in quality.

    python benchmarks/cpu/perplexity.py MODEL.gguf [MODEL2.gguf ...] [--text FILE] [--tokens 20000] [--window 1024]
        [--threads 1] [--json] [--cache q8_0 q4_0 q8_0,q4_0]

The fast path is the engine as it comes: packed weights, activations rounded to 8 bits, keys and values to bfloat16. The
exact path is the same file decoded to f32 and computed by torch. So the ratio shows what the engine loses, and not what
the quantisation of the file did. The text is cut into windows; each begins with what the model puts before a text, and
every token of it is scored but a first one that nothing stands before.

    type        of most matrices in the file
    ratio       perplexity of the fast path over that of the exact path
    +-          two standard errors of the ratio, from how the windows differ: what another text could change
    mean_diff   mean of the absolute differences of the log-probabilities, in nats

With --cache both are the engine as it comes, and the fast one keeps keys and values (or keys, values) as it says:
what the smaller cache costs. A line for each.

Without --text it is the reference of the Python language that comes with Python (`pydoc_data.topics`), which differs
from version to version: the head line says which, and names a digest of the tokens. The exit status is 1 when a ratio
is further from 1 than --bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.loading.gguf import open_gguf

EXACT: dict[str, Any] = {"enforce_eager": True}
"""Settings of the path that decodes the weights and computes in fp32."""

CACHE_SETTINGS = ("key_cache_dtype", "value_cache_dtype")

TEXT_SLICE = 4096
"""Characters tokenized at a time: the engine refuses texts far beyond its context."""

COLUMNS = {
    "model": "28", "type": "9", "tokens": "7d", "fast": "9.4f", "exact": "9.4f", "ratio": "8.5f", "+-": "8.5f",
    "mean_diff": "10.5f", "fast_tok_s": "11.0f", "exact_tok_s": "12.0f",
}  # fmt: skip


def fixed_text() -> tuple[str, str]:
    """The name of the text that every Python brings, and the text."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return f"pydoc_data.topics of Python {platform.python_version()}", "\n".join(topics[key] for key in sorted(topics))


def cut(engine: InferenceEngine, text: str, count: int, window: int) -> tuple[list[int], list[list[int]]]:
    """The tokens that the model puts before a text, and the text's first `count` tokens in windows."""
    before = engine.tokenize("")
    tokens: list[int] = []
    for start in range(0, len(text), TEXT_SLICE):
        tokens += engine.tokenize(text[start : start + TEXT_SLICE], add_special_tokens=False)
        if len(tokens) >= count:
            break
    room = window - len(before)
    windows = [tokens[start : min(start + room, count)] for start in range(0, min(len(tokens), count), room)]
    return before, [each for each in windows if len(before) + len(each) > 1]


def score(model: str, text: str, count: int, window: int, settings: dict[str, Any]) -> tuple[list[NDArray], float, str]:
    """Log-probabilities of the tokens of each window, tokens per second, and a digest of the tokens."""
    # One window at a time: the log-probabilities of a window are made 64 rows at a time, so memory stays bounded.
    with InferenceEngine(
        model, max_model_len=window + 1, max_num_seqs=1, enable_prefix_caching=False, **settings
    ) as engine:
        before, windows = cut(engine, text, count, window)
        if not windows:
            raise ValueError("the text has no token to score: give a longer one")
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        scores: list[NDArray] = []
        began = time.perf_counter()
        for tokens in windows:
            found = engine.generate([before + tokens], params, use_tqdm=False)[0].prompt_logprobs
            assert found is not None
            known = [position for position in found[len(before) :] if position is not None]
            scores.append(np.array([position.chosen.logprob for position in known]))
        seconds = time.perf_counter() - began
    digest = hashlib.sha256(np.array([token for each in windows for token in each], "<i4").tobytes()).hexdigest()[:12]
    return scores, sum(map(len, scores)) / seconds, digest


def standard_error(parts: list[NDArray]) -> float:
    """Of the mean of all numbers, where those of one part depend on each other; NaN for a single part."""
    mean, count = np.concatenate(parts).mean(), len(parts)
    if count < 2:
        return math.nan
    sums = np.array([(part - mean).sum() for part in parts])
    return math.sqrt((sums**2).sum() * count / (count - 1)) / sum(map(len, parts))


def main_type(model: str) -> str:
    """The tensor type of most of the file's matrices."""
    with open_gguf(Path(model)) as checkpoint:
        kinds = Counter(tensor.type_name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2)
    return kinds.most_common(1)[0][0]


def compare(
    model: str, text: str, count: int, window: int, fast: dict[str, Any], exact: dict[str, Any]
) -> list[dict[str, Any]]:
    """Lines of the table: of each of `fast`, settings by name, beside the `exact` ones."""
    exact_parts, exact_speed, _ = score(model, text, count, window, exact)
    return [
        compared(model, name, score(model, text, count, window, settings), exact_parts, exact_speed)
        for name, settings in fast.items()
    ]


def compared(
    model: str, name: str, found: tuple[list[NDArray], float, str], exact_parts: list[NDArray], exact_speed: float
) -> dict[str, Any]:
    """One line of the table."""
    fast_parts, fast_speed, digest = found
    fast, exact = np.concatenate(fast_parts), np.concatenate(exact_parts)
    lost = exact - fast
    error = standard_error([one - other for one, other in zip(exact_parts, fast_parts)])
    return {
        "model": Path(model).stem,
        "type": name or main_type(model),
        "tokens": len(fast),
        "fast": math.exp(-fast.mean()),
        "exact": math.exp(-exact.mean()),
        "ratio": math.exp(lost.mean()),
        "+-": 2 * error,
        "mean_diff": np.abs(lost).mean(),
        "fast_tok_s": fast_speed,
        "exact_tok_s": exact_speed,
        "digest": digest,
    }


def main() -> int:
    """Prints a line for each model; 1 when one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, help="a text file in UTF-8")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together")
    parser.add_argument("--threads", type=int, help="of both paths; on a busy machine torch is faster with one")
    parser.add_argument("--cache", nargs="+", default=[], help="types of keys and values, compared with bf16")
    parser.add_argument("--bar", type=float, default=0.005, help="largest distance of a ratio from 1")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if options.tokens < 2 or options.window < 2:
        parser.error("--tokens and --window must be 2 or more")
    name, text = (str(options.text), options.text.read_text("utf-8")) if options.text else fixed_text()
    if not options.json:
        print(f"{name}, windows of {options.window} tokens")
        print(" ".join(f"{column:>{form.split('.')[0].rstrip('d')}}" for column, form in COLUMNS.items()))
    above = []
    common = {"threads": options.threads}
    fast = {each: common | dict(zip(CACHE_SETTINGS, 2 * each.split(","))) for each in options.cache} or {"": common}
    exact = common if options.cache else common | EXACT
    rows = (
        row for model in options.models for row in compare(model, text, options.tokens, options.window, fast, exact)
    )
    for row in rows:
        if abs(row["ratio"] - 1) > options.bar:
            above.append(row["model"])
        if options.json:
            print(json.dumps({"text": name, "window": options.window} | row), flush=True)
        else:
            cells = " ".join(f"{row[column]:>{form}}" for column, form in COLUMNS.items())
            print(f"{cells}  text {row['digest']}", flush=True)
    if above:
        sys.stderr.write(f"further than {options.bar:.1%} from the exact path: {', '.join(above)}\n")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
