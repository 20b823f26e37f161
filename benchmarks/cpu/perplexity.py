# SPDX-License-Identifier: MIT
"""Perplexity of a fixed text on the fast path and on the exact path: what computing in 8 bits costs in quality.

    python benchmarks/cpu/perplexity.py MODEL.gguf [MODEL2.gguf ...] [--text FILE] [--tokens 20000] [--window 1024]
        [--threads 1] [--json] [--cache q8_0 q4_0 q8_0,q4_0]

The fast path is the engine as it comes: packed weights, activations rounded to 8 bits, keys and values to bfloat16. The
exact path is the same file decoded to f32 and computed by torch. So the ratio shows what the engine loses, and not what
the quantisation of the file did. docs/quantisation.md says what the figures are; `+-` is two standard errors of the
ratio, and `type` that of most matrices in the file.

With --cache both are the engine as it comes, and the fast one keeps keys and values (or keys, values) as it says:
what the smaller cache costs. A line for each.

The log-probabilities of the exact path go to a temporary file: 4 bytes times the vocabulary for each token. The text is
`benchmarks/texts/python_topics.txt`, and each line names a digest of its tokens. The exit status is 1 when a ratio is
further from 1 than --bar.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from candle_vllm.core import InferenceEngine
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.perplexity import perplexity

TEXT = Path(__file__).parents[1] / "texts" / "python_topics.txt"
EXACT: dict[str, Any] = {"op_by_op": True}
"""Settings of the path that decodes the weights and computes in fp32."""

CACHE_SETTINGS = ("key_cache_dtype", "value_cache_dtype")

COLUMNS = {
    "model": "28", "type": "9", "tokens": "7d", "perplexity": "10.4f", "reference": "10.4f", "ratio": "8.5f",
    "+-": "8.5f", "kl": "9.6f", "diff": "9.5f", "same_top": "9.5f",
}  # fmt: skip


def main_type(model: str) -> str:
    """The tensor type of most of the file's matrices."""
    with open_gguf(Path(model)) as checkpoint:
        kinds = Counter(tensor.type_name for tensor in checkpoint.tensors.values() if len(tensor.shape) == 2)
    return kinds.most_common(1)[0][0]


def compare(model: str, text: str, fast: dict[str, Any], exact: dict[str, Any], **cut: Any) -> Iterator[dict[str, Any]]:
    """Lines of the table: of each of `fast`, settings by name, beside the `exact` ones."""

    def measured(settings: dict[str, Any], **files: Any) -> dict[str, Any]:
        sizes: dict[str, Any] = {"max_model_len": cut["window"], "max_num_seqs": 1, "enable_prefix_caching": False}
        with InferenceEngine(model, **sizes, **settings) as engine:
            return perplexity(engine, text, **cut, **files)

    with tempfile.TemporaryFile() as known:
        measured(exact, save=known)
        for name, settings in fast.items():
            known.seek(0)
            found = measured(settings, reference=known)
            error = float("nan") if found["ratio_error"] is None else 2 * found["ratio_error"]
            yield {"model": Path(model).stem, "type": name or main_type(model), **found, "+-": error}


def main() -> int:
    """Prints a line for each model; 1 when one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, default=TEXT, help="a text file in UTF-8")
    parser.add_argument("--tokens", type=int, default=20_000, help="of the text")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are read together")
    parser.add_argument("--threads", type=int, help="of both paths; on a busy machine torch is faster with one")
    parser.add_argument("--cache", nargs="+", default=[], help="types of keys and values, compared with bf16")
    parser.add_argument("--bar", type=float, default=0.005, help="largest distance of a ratio from 1")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if options.tokens < 2 or options.window < 2:
        parser.error("--tokens and --window must be 2 or more")
    text = options.text.read_text("utf-8")
    if not options.json:
        print(f"{options.text.name}, windows of {options.window} tokens")
        print(" ".join(f"{column:>{form.split('.')[0].rstrip('d')}}" for column, form in COLUMNS.items()))
    above = []
    common = {"threads": options.threads}
    fast = {each: common | dict(zip(CACHE_SETTINGS, 2 * each.split(","))) for each in options.cache} or {"": common}
    exact = common if options.cache else common | EXACT
    cut = {"tokens": options.tokens, "window": options.window}
    for row in (row for model in options.models for row in compare(model, text, fast, exact, **cut)):
        if abs(row["ratio"] - 1) > options.bar:
            above.append(row["model"])
        if options.json:
            print(json.dumps({"text": options.text.name, "window": options.window} | row), flush=True)
        else:
            cells = " ".join(f"{row[column]:>{form}}" for column, form in COLUMNS.items())
            print(f"{cells}  text {row['digest']}", flush=True)
    if above:
        sys.stderr.write(f"further than {options.bar:.1%} from the exact path: {', '.join(above)}\n")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
