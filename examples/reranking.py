# SPDX-License-Identifier: MIT
"""Rank documents by how well they answer a question.

    python examples/reranking.py MODEL

MODEL is a Hugging Face id, a folder or a .gguf file: a cross-encoder (BAAI/bge-reranker-v2-m3), a reranker that scores
by the logits of answer tokens, or an embedding model, whose score is the cosine of two vectors.
"""

import sys

from candle_vllm.core import CandleVllmError, InferenceEngine

DOCUMENTS = [
    "Paris is the capital of France.",
    "Bread is made of flour, water, salt and yeast.",
    "A triangle has three sides.",
]
QUESTION = "How do I bake a loaf?"


def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        scores = engine.score([(QUESTION, document) for document in DOCUMENTS], use_tqdm=False)
        ranked = sorted(zip(scores, DOCUMENTS, strict=True), key=lambda pair: -pair[0].score)
        for place, (score, document) in enumerate(ranked, 1):
            print(f"{place}. {score.score:.3f} {document}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} BAAI/bge-reranker-v2-m3")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
