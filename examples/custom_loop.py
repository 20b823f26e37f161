# SPDX-License-Identifier: MIT
"""Drive the engine step by step: between steps, an urgent request is added and another one aborted.

    python examples/custom_loop.py MODEL

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file.
"""

import sys
from collections import defaultdict

from candle_vllm.core import CandleVllmError, InferenceEngine, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def main(model: str) -> None:
    texts: defaultdict[str, str] = defaultdict(str)
    with InferenceEngine(model) as engine:
        engine.add_request("Once upon a time", PARAMS, request_id="story")
        engine.add_request("The sky is", PARAMS, request_id="unwanted")
        steps = 0
        while engine.has_unfinished_requests:
            for piece in engine.step():
                texts[piece.request_id] += piece.text
                if piece.finish_reason is not None:
                    print(f"step {steps}: {piece.request_id} ends ({piece.finish_reason})")
            steps += 1
            if steps == 3:
                engine.abort("unwanted")  # its cache blocks are free before the next step
                engine.add_request("The capital of France is", PARAMS, request_id="urgent", priority=-1)
        stats = engine.stats()
    for name, text in texts.items():
        print(f"{name}: {text!r}")
    print(f"{steps} steps, {stats.generation_tokens} tokens, {stats.num_free_blocks} of {stats.num_blocks} blocks free")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
