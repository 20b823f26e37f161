"""Writing models: safetensors folders to GGUF files, which this library and llama.cpp load."""

from __future__ import annotations

from candle_vllm.core.conversion.write import WrittenFile, write_gguf

__all__ = ["WrittenFile", "write_gguf"]
