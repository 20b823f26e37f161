# SPDX-License-Identifier: MIT
"""Test doubles of the engine and the tokenizer, shipped for the tests of users' code.

`ScriptedEngine` and `ByteTokenizer` need no model and no torch. `candle_vllm.core.testing.toy_model` writes a real
checkpoint of a few hundred kilobytes for the real engine, also without torch.
"""

from candle_vllm.core.testing.scripted_engine import ByteTokenizer, ScriptedEngine, TemplateCall

__all__ = ["ByteTokenizer", "ScriptedEngine", "TemplateCall"]
