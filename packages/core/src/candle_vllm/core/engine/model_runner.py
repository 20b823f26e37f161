"""Steps 6 and 7: the model with its KV cache if it has one, and the draw. A batch goes in, tokens come out."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.batch import Batch, Ints
from candle_vllm.core.engine.request import PoolingRequest
from candle_vllm.core.engine.sequence import Run, Tokens
from candle_vllm.core.kernels.attention.rows import AttentionRows
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.models.family import Decoder, Encoder
from candle_vllm.core.sampling.sampler import Drawn, Sampler
from candle_vllm.core.sampling.state import SamplingState


class Launched(Protocol):
    """A step that was launched and may still be running."""

    def tokens(self) -> list[Drawn]:
        """What it drew, one entry per item of `Batch.drawing`; waits for it. Called once."""
        ...


class ModelRunner(Protocol):
    """Runs a model and draws tokens, one step at a time: a decoder with its paged cache, or an encoder."""

    overlaps: bool
    """Whether a step may be launched before the tokens of the one before are taken."""

    fatal: tuple[type[Exception], ...]
    """Errors after which nothing that is on the device can be trusted."""

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:
        """Starts the model's part of a step: its keys and values will be in the cache when it is over.

        Args:
            batch: the step.
            states: how the next tokens of `batch.drawing` are drawn. Only temperature and the like, and the random
                numbers of these positions, are read here.
        """
        ...

    def draw(self, states: Sequence[SamplingState]) -> Launched:
        """Starts the draw of the step that `forward` started last; must follow it.

        Args:
            states: the same, now with all that they say of their next tokens: the tokens before those are known on the
                host where `reads_tokens` asks for it.
        """
        ...

    def score(self, rows: Ints) -> torch.Tensor:
        """Logits [len(rows), V] of any rows of the last step; at most `MAX_SCORED_ROWS`. Overwrites earlier logits."""
        ...

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """The sum [E] of the hidden states, in fp32, of any rows of the last step; at most `MAX_HIDDEN_ROWS`."""
        ...

    def close(self) -> None:
        """Ends what runs beside the caller's thread."""
        ...


MAX_SCORED_ROWS = 64
MAX_HIDDEN_ROWS = 512  # of 8,192 numbers they take 16 MiB


@dataclasses.dataclass(frozen=True)
class Landed:
    """A step that was over when it was drawn."""

    drawn: list[Drawn]

    def tokens(self) -> list[Drawn]:
        """See `Launched`."""
        return self.drawn


class StepwiseRunner(ABC):
    """A `ModelRunner` that has finished what it starts when it returns; the sampler gets its logits."""

    overlaps = False
    fatal: tuple[type[Exception], ...] = (torch.AcceleratorError,)

    def __init__(self) -> None:
        self._sampler = Sampler()
        self._drawn_from = torch.empty(0)
        self._drafts: list[Tokens] | None = None

    def forward(self, batch: Batch, states: Sequence[SamplingState]) -> None:  # noqa: ARG002  # drawn at once
        """See `ModelRunner`."""
        self._drawn_from = self.run(batch)
        self._drafts = [run.drafts for run in batch.drawing] if batch.drafted else None

    def draw(self, states: Sequence[SamplingState]) -> Landed:
        """See `ModelRunner`."""
        if self._drafts is not None:
            return Landed(self._sampler.sample_runs(self._drawn_from, states, self._drafts))
        return Landed(list(zip(self._sampler.sample(self._drawn_from, states))) if states else [])

    @abstractmethod
    def run(self, batch: Batch) -> torch.Tensor:
        """Runs a step: its keys and values are in the cache afterwards. Returns logits [len(drawn_rows), V] in fp32.

        The logits are valid until the next call, and may be overwritten by the caller.
        """

    @abstractmethod
    def score(self, rows: Ints) -> torch.Tensor:
        """See `ModelRunner`."""

    @abstractmethod
    def hidden(self, rows: Ints) -> torch.Tensor:
        """Hidden states [len(rows), E] in fp32 of rows of the last step, behind the last norm."""

    def hidden_sum(self, rows: Ints) -> NDArray[np.float64]:
        """See `ModelRunner`."""
        return self.hidden(rows).sum(0, dtype=torch.float64).cpu().numpy()

    def close(self) -> None:  # noqa: B027  # most have nothing to end
        """See `ModelRunner`."""


class EagerRunner(StepwiseRunner):
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
        rows = (num_blocks, block_size, config.cache.kv_heads)
        keys, values = (*rows, config.cache.key_dim), (*rows, config.cache.value_dim)
        super().__init__()
        self.decoder = decoder
        self.device = device
        # Not cleared: the system hands out pages as they are first written, and attention reads only what was.
        self.key_caches = tuple(torch.empty(keys, device=device, dtype=dtype) for _ in range(config.num_layers))
        self.value_caches = tuple(torch.empty(values, device=device, dtype=dtype) for _ in range(config.num_layers))
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

    @torch.inference_mode()
    def hidden(self, rows: Ints) -> torch.Tensor:
        """See `StepwiseRunner`."""
        return self._hidden[torch.from_numpy(rows).to(self.device)].float()


class EncoderRunner(StepwiseRunner):
    """Runs an encoder over whole texts; there is no cache, and nothing to draw.

    A cross-encoder's hidden state of each position is the score of its text, [1].
    """

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
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

    @torch.inference_mode()
    def hidden(self, rows: Ints) -> torch.Tensor:
        """See `StepwiseRunner`."""
        return self._hidden[torch.from_numpy(rows).to(self.device)].float()


def _token_types(run: Run) -> Ints:
    """[count] which of a pair's texts each token belongs to."""
    request = run.sequence.request
    assert isinstance(request, PoolingRequest)
    return np.array(request.token_type_ids or [0] * run.count, np.int64)
