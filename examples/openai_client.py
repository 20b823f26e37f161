# SPDX-License-Identifier: MIT
"""Talk to a running server with OpenAI's own client.

    uv run candle-vllm &
    uv run --with openai python examples/openai_client.py [MODEL [BASE_URL]]

MODEL is a name that the server lists, or `default`, which always means the served model. If the server has a key, set
OPENAI_API_KEY to it.
"""

import os
import sys

from openai import APIConnectionError, APIStatusError, OpenAI


def main(model: str = "default", base_url: str = "http://127.0.0.1:2000/v1") -> None:
    with OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none")) as client:
        print("models:", ", ".join(each.id for each in client.models.list()))

        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=32,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
            elif chunk.usage:
                print(f"\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except APIConnectionError as error:
        sys.exit(f"no server answers at {error.request.url}: start one with `candle-vllm`")
    except APIStatusError as error:  # a model that the server does not have, for example
        sys.exit(error.message)
