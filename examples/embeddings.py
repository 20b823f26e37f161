# SPDX-License-Identifier: MIT
"""Find the texts that are nearest in meaning to a question.

    python examples/embeddings.py MODEL

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file: an embedding model (all-MiniLM-L6-v2, Qwen3-Embedding), or
any model that generates text, whose vectors are less good at this.
"""

import sys

import numpy as np

from candle_vllm.core import CandleVllmError, InferenceEngine

TEXTS = [
    "Bread is made of flour, water, salt and yeast.",
    "Paris is the capital of France.",
    "A triangle has three sides.",
]
QUESTION = "How do I bake a loaf?"


def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        print(f"{engine.model_info.name}: vectors of {engine.model_info.embedding_size} numbers")
        *texts, question = (np.asarray(output.embedding) for output in engine.embed([*TEXTS, QUESTION], use_tqdm=False))
        nearness = np.stack(texts) @ question  # the vectors have length 1, so this is the cosine
        for place in np.argsort(-nearness):
            print(f"{nearness[place]:.3f} {TEXTS[place]}")

        # The same in one call, which also works with a cross-encoder (bge-reranker, ms-marco-MiniLM):
        scores = engine.score([(QUESTION, text) for text in TEXTS], use_tqdm=False)
        print("best:", max(zip(scores, TEXTS), key=lambda pair: pair[0].score)[1])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
