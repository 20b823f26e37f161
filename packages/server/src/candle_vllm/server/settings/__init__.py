"""Settings: one table, the sources that give them, and what is made of them."""

from candle_vllm.server.settings.settings import Address, Settings

__all__ = ["Address", "Settings"]
