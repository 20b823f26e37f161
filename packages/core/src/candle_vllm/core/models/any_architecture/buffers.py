# SPDX-License-Identifier: MIT
"""Compute the buffers of a transformers model that no checkpoint stores: rotary frequencies, tables of positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel

from candle_vllm.core.layers.parameters import Placement


def first_position(model: Any) -> int:
    """Row of the position table for a sequence's first token; models like RoBERTa begin after the padding row."""
    tables = (m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
    return next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)


def make_buffers(model: Any, placement: Placement, longest: int) -> None:
    """Compute the buffers that no checkpoint stores, such as rotary frequencies, by each class's own rules."""
    models = [each for each in model.named_modules() if isinstance(each[1], PreTrainedModel)]
    for name, module in reversed(list(model.named_modules())):  # layers before their model, which may override them
        mine = [part for part in module._non_persistent_buffers_set if module._buffers.get(part) is not None]
        plain = [part for part, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        for part in mine:
            module._buffers[part] = torch.zeros_like(module.get_buffer(part), device=placement.device)
        for part in plain:
            setattr(module, part, torch.zeros_like(getattr(module, part), device=placement.device))
        if mine or plain or isinstance(module, PreTrainedModel):
            owner = [each for own, each in models if not own or f"{name}.".startswith(f"{own}.")][-1]
            with torch.no_grad():
                owner._init_weights(module)
        for layer, kind in freeze_rotary(module):
            _set_frequencies(module, layer, kind, longest, placement.device)


def freeze_rotary(module: Any) -> list[tuple[str | None, str]]:
    """Stop rotary frequencies from depending on a step's longest sequence; return their layer types and rope types."""
    kinds = getattr(module, "rope_type", None)
    each = list(kinds.items()) if isinstance(kinds, dict) else [(None, kinds)]
    changing = [(layer, kind) for layer, kind in each if kind in ("dynamic", "longrope")]
    if changing:
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    return changing


def _set_frequencies(module: Any, layer: str | None, kind: str, longest: int, device: Any) -> None:
    """Set frequencies for a context of `longest` tokens; transformers would use the longest sequence of a step."""
    prefix = "" if layer is None else f"{layer}_"
    which = {} if layer is None else {"layer_type": layer}
    found, scale = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=longest, **which)
    module._buffers[f"{prefix}inv_freq"] = found
    setattr(module, f"{prefix}attention_scaling", scale)
