# SPDX-License-Identifier: MIT
"""Continue several prompts at once.

    python examples/library_generate.py MODEL

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file.
"""

import sys

from candle_vllm.core import CandleVllmError, InferenceEngine, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "Water is made of"]


def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
        for output in outputs:
            print(f"{output.prompt!r} -> {output.text!r} ({output.finish_reason})")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
