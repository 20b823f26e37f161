# SPDX-License-Identifier: MIT
"""Structured output: JSON that follows a schema, one of several choices, a regular expression.

    python examples/structured_output.py MODEL

MODEL is `demo`, a Hugging Face id, a folder or a .gguf file.
"""

import json
import sys
from typing import Any

from candle_vllm.core import CandleVllmError, InferenceEngine, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def main(model: str) -> None:
    with InferenceEngine(model) as engine:

        def ask(prompt: str, **form: Any) -> str:
            # A constraint that cannot be guaranteed raises an InvalidParameterError.
            params = SamplingParams(max_tokens=100, seed=1, structured_outputs=StructuredOutputsParams(**form))
            return engine.generate([prompt], params, use_tqdm=False)[0].text

        person = json.loads(ask("Ada Lovelace was 36 years old. As JSON: ", json=PERSON, disable_any_whitespace=True))
        print(f"{person['name']!r} is {person['age']}")
        print("the sky is", ask("Is the sky blue or green? It is ", choice=["blue", "green"]))
        print("call", ask("Her number is ", regex="[0-9]{3}-[0-9]{4}"))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"name a model, for example: python {sys.argv[0]} demo")
    try:
        main(sys.argv[1])
    except CandleVllmError as error:  # a file that is not there, for example
        sys.exit(str(error))
