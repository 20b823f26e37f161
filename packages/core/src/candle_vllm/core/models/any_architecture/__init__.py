# SPDX-License-Identifier: MIT
"""Architectures without a file of their own: transformers wires the layers, this engine does all the rest.

The only package that imports transformers, which is optional: `pip install 'candle-vllm[transformers]'`.
"""
