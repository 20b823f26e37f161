# SPDX-License-Identifier: MIT
"""Engines in processes of their own, which run steps 4 to 9 of a request; this process runs the other steps.

This process does not import torch for them.
"""

from candle_vllm.core.remote.engine import RemoteEngine
from candle_vllm.core.remote.fleet import ReplicatedEngine

__all__ = ["RemoteEngine", "ReplicatedEngine"]
