# SPDX-License-Identifier: MIT
"""The commands of `candle-vllm` besides `serve` and the benchmarks in `candle_vllm.server.bench`."""
