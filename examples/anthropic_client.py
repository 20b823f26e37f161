# SPDX-License-Identifier: MIT
"""Talk to a running server with Anthropic's own client.

    uv run candle-vllm &
    uv run --with anthropic python examples/anthropic_client.py [MODEL [BASE_URL]]

MODEL is a name that the server lists, or `default`, which always means the served model. If the server has a key, set
ANTHROPIC_API_KEY to it.
"""

import os
import sys

from anthropic import Anthropic, APIConnectionError, APIStatusError
from anthropic.types import MessageParam


def main(model: str = "default", base_url: str = "http://127.0.0.1:2000") -> None:
    question: MessageParam = {"role": "user", "content": "What is the capital of France?"}
    with Anthropic(base_url=base_url, api_key=os.environ.get("ANTHROPIC_API_KEY", "none")) as client:
        count = client.messages.count_tokens(model=model, messages=[question])
        print("prompt:", count.input_tokens, "tokens")

        with client.messages.stream(model=model, messages=[question], max_tokens=32) as stream:
            for text in stream.text_stream:
                print(text, end="", flush=True)
            message = stream.get_final_message()
        print(f"\n{message.stop_reason}: {message.usage.input_tokens} + {message.usage.output_tokens} tokens")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except APIConnectionError as error:
        sys.exit(f"no server answers at {error.request.url}: start one with `candle-vllm`")
    except APIStatusError as error:  # a model that the server does not have, for example
        sys.exit(error.message)
