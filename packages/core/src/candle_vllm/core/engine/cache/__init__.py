# SPDX-License-Identifier: MIT
"""Blocks and states of the KV cache: who owns them, and where they are offloaded to."""
