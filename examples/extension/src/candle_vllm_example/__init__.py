# SPDX-License-Identifier: MIT
"""A model family, a tool-call format and a logits processor that candle-vllm finds when this package is installed."""
