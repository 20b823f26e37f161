# SPDX-License-Identifier: MIT
"""Blocks and states of the KV cache: allocation, and the stores to which they are offloaded."""
