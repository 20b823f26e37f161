# SPDX-License-Identifier: MIT
"""LoRA adapters: load them, store them in memory, and admit sequences with adapters."""
