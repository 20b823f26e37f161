# SPDX-License-Identifier: MIT
"""Sampling on a GPU (step 7 of a request's life), in four modules: tokens, ranks, edits, llama.cpp's chain."""

from __future__ import annotations

from candle_vllm.core.kernels.sampling.triton_chain import narrow
from candle_vllm.core.kernels.sampling.triton_draw import draw
from candle_vllm.core.kernels.sampling.triton_edit import edit, note
from candle_vllm.core.kernels.sampling.triton_stand import stand

__all__ = ["draw", "edit", "narrow", "note", "stand"]
