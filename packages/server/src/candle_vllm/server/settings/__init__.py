# SPDX-License-Identifier: MIT
"""Settings: one table, the sources that give them, and what is made of them."""

from candle_vllm.server.settings.options import Address
from candle_vllm.server.settings.table import Settings

__all__ = ["Address", "Settings"]
