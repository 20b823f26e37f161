"""Step 6: the model and its KV cache. A batch goes in, logits come out for the rows that are asked for."""

from __future__ import annotations

from typing import Protocol

import torch

from candle_vllm.core.engine.batch import Batch, Ints
from candle_vllm.core.kernels.attention import AttentionRows
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.models.registry import Decoder


class ModelRunner(Protocol):
    """Runs a decoder over a paged cache, one step at a time."""

    decoder: Decoder

    def run(self, batch: Batch) -> torch.Tensor:
        """Runs a step: its keys and values are in the cache afterwards. Returns logits [len(sample_rows), V] in fp32.

        The logits are valid until the next call, and may be overwritten by the caller.
        """
        ...

    def score(self, rows: Ints) -> torch.Tensor:
        """Logits [len(rows), V] of any rows of the last step; at most `MAX_SCORED_ROWS`. Overwrites earlier logits."""
        ...

    def close(self) -> None:
        """Ends what runs beside the caller's thread."""
        ...


MAX_SCORED_ROWS = 64


class EagerRunner:
    """Runs the layers one operation after the other, in torch.

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
        self._hidden = torch.empty(0, config.hidden_size)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """See `ModelRunner`."""
        token_ids, positions, slots, tables = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.token_ids, batch.positions, batch.slots, batch.block_tables)
        )
        rows = AttentionRows(tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), tables)
        step = StepInput(positions, slots, rows, self.key_caches, self.value_caches)
        self._hidden = self.decoder.forward(token_ids, step)
        return self.score(batch.sample_rows)

    @torch.inference_mode()
    def score(self, rows: Ints) -> torch.Tensor:
        """See `ModelRunner`."""
        return self.decoder.logits(self._hidden[torch.from_numpy(rows).to(self.device)])

    def close(self) -> None:
        """Nothing runs beside the caller's thread."""
