# SPDX-License-Identifier: MIT
"""vLLM's library names: its classes and outputs over an engine of ours, so that programs written for it run here.

`candle_vllm.core.vllm.outputs` is what `vllm.outputs` is there. LIBRARY_API.md has the table of all names.
"""
