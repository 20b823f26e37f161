# SPDX-License-Identifier: MIT
"""Architectures without a file of their own: transformers' module code, with this engine's attention and products.

This is the only package that imports transformers, which is optional: the extra `transformers`.
"""
