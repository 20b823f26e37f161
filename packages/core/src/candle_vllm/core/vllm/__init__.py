# SPDX-License-Identifier: MIT
"""vLLM's library API over `InferenceEngine`: its classes and outputs, so that programs written for vLLM run here.

`candle_vllm.core.vllm.outputs` corresponds to `vllm.outputs`. LIBRARY_API.md has the table of all names.
"""
