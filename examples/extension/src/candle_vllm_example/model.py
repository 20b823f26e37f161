# SPDX-License-Identifier: MIT
"""Models whose config.json names the class `ExampleForCausalLM`, which is Llama under another name."""

import dataclasses

from candle_vllm.core.models import llama

FAMILY = dataclasses.replace(llama.FAMILY, hf={"ExampleForCausalLM": "llama"}, gguf=())
