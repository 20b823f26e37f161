"""How a model computes: packed weights and recorded steps where that is possible, plain tensors elsewhere."""

from __future__ import annotations

import importlib.util
import logging

import torch
from gguf import GGMLQuantizationType

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS
from candle_vllm.core.kernels.packed_linear.memory import WeightMemory
from candle_vllm.core.kernels.packed_linear.pack import MAX_COLUMNS, packed_kind
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint, StoredTensor

logger = logging.getLogger(__name__)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_AUTO = {"cpu": torch.float32, "cuda": torch.bfloat16}


def choose_placement(
    config: EngineConfig, device: torch.device, checkpoint: Checkpoint, model: ModelConfig
) -> Placement:
    """Packed on the CPU for quantised checkpoints, unless a dtype was asked for or something stands against it."""
    dtype = DTYPES.get(config.dtype) or _AUTO[device.type]
    if config.dtype != "auto" or device.type != "cpu" or not _is_quantised(checkpoint):
        return Placement(device, dtype)
    obstacle = packing_obstacle(checkpoint, model, config.block_size)
    if obstacle is None:
        return Placement(device, dtype, WeightMemory())
    logger.warning("quantised weights are decoded and computed by torch, which is slow: %s", obstacle)
    return Placement(device, dtype)


def packing_obstacle(checkpoint: Checkpoint, model: ModelConfig, block_size: int) -> str | None:
    """Why the compiled CPU kernels cannot run a checkpoint; None if they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    from candle_vllm.core.kernels.attention.cpu_cache import supported

    if not supported(model.head_dim, block_size):
        return f"heads of {model.head_dim} with blocks of {block_size} tokens (--block-size) have no kernel"
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) == 2 and not _can_pack(tensor):
            return f"{tensor.name} is {tensor.type_name} {list(tensor.shape)}, which has no kernel"
    return None


def _can_pack(matrix: StoredTensor) -> bool:
    """Whether a matrix has a packed layout: it is quantised, and its rows are whole blocks of that layout."""
    if matrix.dtype is not None:
        return False
    layout = LAYOUTS[packed_kind(GGMLQuantizationType[matrix.type_name])]
    return matrix.shape[1] % (GROUP * layout.groups) == 0 and matrix.shape[1] <= MAX_COLUMNS


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return any(tensor.dtype is None for tensor in checkpoint.tensors.values())
