# SPDX-License-Identifier: MIT
"""Stream the answers of two conversations at once, in one event loop.

    python examples/library_stream.py MODEL

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file, with a chat template.
"""

import asyncio
import sys

from candle_vllm.core import CandleVllmError, InferenceEngine, SamplingParams

QUESTIONS = ["Name three colours.", "What is the capital of France?"]


async def answer(engine: InferenceEngine, question: str) -> str:
    prompt = engine.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    pieces: list[str] = []
    # The template has written the special tokens already.
    async for piece in engine.stream(prompt, SamplingParams(seed=1, max_tokens=32), add_special_tokens=False):
        pieces.append(piece.text)
        print(f"[{question}] {piece.text!r}")
    return "".join(pieces)


async def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        texts = await asyncio.gather(*(answer(engine, question) for question in QUESTIONS))
    for question, text in zip(QUESTIONS, texts, strict=True):
        print(f"{question}\n{text}\n")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        asyncio.run(main(sys.argv[1]))
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
