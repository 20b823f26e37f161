# SPDX-License-Identifier: MIT
"""The engine in a process of its own: steps 4 to 9 of a request's life there, the others here.

No torch is imported for it in this process.
"""

from candle_vllm.core.remote.engine import RemoteEngine

__all__ = ["RemoteEngine"]
