# SPDX-License-Identifier: MIT
"""Tool calls as JSON between the marks `[[call]]` and `[[/call]]`."""

from candle_vllm.openai.formats.json_calls import JsonCalls
from candle_vllm.openai.formats.layout import ToolFormat

EXAMPLE = ToolFormat("example", opens=("[[call]]",), bodies=(JsonCalls(closers=("[[/call]]",)),))
