# SPDX-License-Identifier: MIT
"""LoRA adapters that requests name in `model`: their sources, their cache, and the clients that may use them."""
