# SPDX-License-Identifier: MIT
"""The settings: the table of all settings, their sources, and the objects that are built from them."""

from candle_vllm.server.settings.options import Address
from candle_vllm.server.settings.table import Settings

__all__ = ["Address", "Settings"]
