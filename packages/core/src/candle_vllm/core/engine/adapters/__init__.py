# SPDX-License-Identifier: MIT
"""LoRA adapters: loaded, kept in memory, and admitted to steps."""
