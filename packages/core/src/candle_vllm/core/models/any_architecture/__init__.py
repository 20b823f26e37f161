# SPDX-License-Identifier: MIT
"""Architectures without a file of their own: transformers wires the layers; attention and products are this engine's.

This is the only package that imports transformers, which is optional: `pip install 'candle-vllm[transformers]'`.
"""
