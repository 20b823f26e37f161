# SPDX-License-Identifier: MIT
"""Compare two answers with a reward model.

    python examples/reward.py MODEL

MODEL is a Hugging Face id or a folder of a reward model, such as Skywork/Skywork-Reward-V2-Qwen3-0.6B: a decoder whose
head gives one number for a conversation.
"""

import sys

from candle_vllm.core import CandleVllmError, InferenceEngine
from candle_vllm.core.pooling import PoolingParams

QUESTION = "How many legs has a spider?"
ANSWERS = ["A spider has eight legs.", "Spiders are insects and have six legs."]


def main(model: str) -> None:
    with InferenceEngine(model) as engine:
        conversations = []
        for answer in ANSWERS:
            messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
            if engine.model_info.has_chat_template:
                conversations.append(engine.apply_chat_template(messages, add_generation_prompt=False))
            else:
                conversations.append(f"{QUESTION}\n{answer}")
        # A reward is the logit itself, without an activation.
        rewards = engine.classify(conversations, PoolingParams(use_activation=False), use_tqdm=False)
        for reward, answer in sorted(((each.probs[0], answer) for each, answer in zip(rewards, ANSWERS)), reverse=True):
            print(f"{reward:.3f} {answer}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} Skywork/Skywork-Reward-V2-Qwen3-0.6B")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
