"""Sampling on a GPU (step 7 of ten), in three rooms: drawing a token, where it stands, and edits of logits."""

from __future__ import annotations

from candle_vllm.core.kernels.sampling.triton_draw import draw
from candle_vllm.core.kernels.sampling.triton_edit import edit, note
from candle_vllm.core.kernels.sampling.triton_stand import stand

__all__ = ["draw", "edit", "note", "stand"]
