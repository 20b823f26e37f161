# SPDX-License-Identifier: MIT
"""LoRA adapters that requests name in `model`: their sources, their cache, and which clients may use them."""
