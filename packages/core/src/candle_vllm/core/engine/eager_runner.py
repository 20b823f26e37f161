"""Steps 6 and 7 in torch, one operation after the other: any model on any device, and encoders everywhere."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.devices import Device
from candle_vllm.core.engine.batch import Batch, Ints
from candle_vllm.core.engine.model_runner import StepwiseRunner
from candle_vllm.core.engine.request import PoolingRequest
from candle_vllm.core.engine.sequence import Run
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.models.family import Decoder, Encoder


class EagerRunner(StepwiseRunner):
    """Runs the layers one operation after the other, in torch.

    Args:
        decoder: the model with its weights.
        num_blocks, block_size: shape of the cache.
        device, dtype: where the cache lives, and its numbers.
    """

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(
        self, decoder: Decoder, num_blocks: int, block_size: int, device: torch.device | Device, dtype: torch.dtype
    ) -> None:
        config = decoder.config
        rows = (num_blocks, block_size, config.cache.kv_heads)
        keys, values = (*rows, config.cache.key_dim), (*rows, config.cache.value_dim)
        super().__init__()
        self.decoder = decoder
        self.device = device
        # Not cleared: the system hands out pages as they are first written, and attention reads only what was.
        self.key_caches, self.value_caches = (
            tuple(torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers))
            for shape in (keys, values)
        )
        self._hidden = torch.empty(0, config.hidden_size)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """See `StepwiseRunner`."""
        token_ids, positions, slots, tables = (
            torch.from_numpy(array).to(self.device)
            for array in (batch.token_ids, batch.positions, batch.slots, batch.block_tables)
        )
        rows = AttentionRows(tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), tables)
        step = StepInput(positions, slots, rows, self.key_caches, self.value_caches)
        self._hidden = self.decoder.forward(token_ids, step)
        return self.score(batch.drawn_rows)

    @torch.inference_mode()
    def score(self, rows: Ints) -> torch.Tensor:
        """See `ModelRunner`."""
        return self.decoder.logits(self._hidden[torch.from_numpy(rows).to(self.device)])

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`."""
        return _sum_of(self._hidden, rows)


class EncoderRunner(StepwiseRunner):
    """Runs an encoder over whole texts; there is no cache, and nothing to draw.

    A cross-encoder's hidden state of each position is the score of its text, [1].
    """

    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(self, encoder: Encoder, device: torch.device | Device) -> None:
        super().__init__()
        self.encoder = encoder
        self.device = device
        self._hidden = torch.empty(0)

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """See `StepwiseRunner`."""
        lengths = [run.count for run in batch.runs]
        kinds = np.concatenate([_token_types(run) for run in batch.runs])
        token_ids, places, types = (
            torch.from_numpy(array).to(self.device) for array in (batch.token_ids, batch.positions, kinds)
        )
        hidden = self.encoder.forward(token_ids, places, types, lengths)
        if self.encoder.config.scores:
            first = torch.from_numpy(batch.query_start[:-1]).to(self.device)
            hidden = self.encoder.scores(hidden[first])[:, None].repeat_interleave(
                torch.tensor(lengths, device=self.device), 0
            )
        self._hidden = hidden
        return self._drawn_from

    def score(self, rows: Ints) -> torch.Tensor:
        """An encoder has no logits."""
        raise NotImplementedError

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`."""
        return _sum_of(self._hidden, rows)


def _token_types(run: Run) -> Ints:
    """[count] which of a pair's texts each token belongs to."""
    request = run.sequence.request
    assert isinstance(request, PoolingRequest)
    return np.array(request.token_type_ids or [0] * run.count, np.int64)


@torch.inference_mode()
def _sum_of(hidden: torch.Tensor, rows: Ints) -> NDArray[np.float64]:
    """See `ModelRunner.hidden_sum`."""
    wanted = hidden[torch.from_numpy(rows).to(hidden.device)].float()
    return wanted.sum(0, dtype=torch.float64).cpu().numpy()
