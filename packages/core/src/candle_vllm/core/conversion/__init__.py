# SPDX-License-Identifier: MIT
"""Write models as GGUF files, which this library and llama.cpp load, and adapters and importance matrices."""

from __future__ import annotations

from candle_vllm.core.conversion.gguf_adapter import write_gguf_adapter
from candle_vllm.core.conversion.imatrix import write_imatrix
from candle_vllm.core.conversion.write import WrittenFile, write_gguf

__all__ = ["WrittenFile", "write_gguf", "write_gguf_adapter", "write_imatrix"]
