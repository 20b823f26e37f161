# SPDX-License-Identifier: MIT
"""Classify texts.

    python examples/classification.py MODEL

MODEL is a Hugging Face id or a folder of a model with a classification head, such as a sentiment classifier.
"""

import sys

from candle_vllm.core import CandleVllmError, InferenceEngine

TEXTS = ["What a wonderful film!", "I want my money back."]


def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        labels = engine.model_info.labels
        for text, output in zip(TEXTS, engine.classify(TEXTS, use_tqdm=False), strict=True):
            probability, label = max(zip(output.probs, labels, strict=True))
            print(f"{label} {probability:.3f} {text}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} cardiffnlp/twitter-roberta-base-sentiment-latest")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
