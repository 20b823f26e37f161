# SPDX-License-Identifier: MIT
"""A model family and a tool-call format that candle-vllm finds when this package is installed."""
