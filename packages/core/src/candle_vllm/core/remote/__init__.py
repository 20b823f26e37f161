# SPDX-License-Identifier: MIT
"""Engines in processes of their own: steps 4 to 9 of a request's life there, the others here.

No torch is imported for them in this process.
"""

from candle_vllm.core.remote.engine import RemoteEngine
from candle_vllm.core.remote.replicas import ReplicatedEngine

__all__ = ["RemoteEngine", "ReplicatedEngine"]
