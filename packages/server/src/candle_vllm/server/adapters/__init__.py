# SPDX-License-Identifier: MIT
"""LoRA adapters that requests name in `model`: their sources, the cache on disk, and the registry."""
