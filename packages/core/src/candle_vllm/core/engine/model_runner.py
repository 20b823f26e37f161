"""Step 6: the model and its KV cache. A batch goes in, hidden states come out, logits where they are asked for."""

from __future__ import annotations

import torch

from candle_vllm.core.engine.batch import Batch
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.models.registry import Decoder


class ModelRunner:
    """Runs a decoder over a paged cache.

    Args:
        decoder: the model with its weights.
        num_blocks, block_size: shape of the cache.
        device, dtype: where the cache lives, and its numbers.
    """

    def __init__(
        self, decoder: Decoder, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = decoder.config
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.decoder = decoder
        self.device = device
        # Not cleared: the system hands out pages as they are first written, and attention reads only what was.
        self.key_caches = tuple(torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers))
        self.value_caches = tuple(torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers))

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [T, E] of the batch; its keys and values are in the cache afterwards."""
        step = StepInput(batch.positions, batch.slots, batch.rows, self.key_caches, self.value_caches)
        return self.decoder.forward(batch.token_ids, step)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores [R, V] in fp32 for hidden states [R, E]."""
        return self.decoder.logits(hidden)
