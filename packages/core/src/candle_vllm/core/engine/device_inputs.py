"""Step 5 on a GPU: the numbers of a step, where its kernels read them.

Their memory never moves, so that a captured step finds the next one's numbers where it found its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.batch import Batch, Ints
from candle_vllm.core.engine.device_stream import DeviceStream, copy
from candle_vllm.core.engine.staging import Staging
from candle_vllm.core.kernels.attention import AttentionRows, DeviceRows
from candle_vllm.core.sampling.sampler import controls as controls_of
from candle_vllm.core.sampling.state import SamplingState


@dataclasses.dataclass(frozen=True)
class DeviceLimits:
    """The largest step.

    Attributes:
        tokens: in one step.
        sequences: in one step.
        table_width: blocks of the longest sequence.
        block_size: tokens of a block.
    """

    tokens: int
    sequences: int
    table_width: int
    block_size: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.table_width * self.block_size


class DeviceInputs:
    """A step's numbers, on the host for the next one and on the device for this one.

    Args:
        stream: which copies them.
        limits: the largest step.
    """

    def __init__(self, stream: DeviceStream, limits: DeviceLimits) -> None:
        self._stream = stream
        self._limits = limits
        tokens, sequences = limits.tokens, limits.sequences
        self._staging = Staging(
            stream,
            {
                "controls": ((sequences, 5), np.float64),
                "query_start": ((sequences + 1,), np.int32),
                "context_lens": ((sequences,), np.int32),
                "sample_rows": ((sequences,), np.int32),
                "token_ids": ((tokens,), np.int32),
                "positions": ((tokens,), np.int32),
                "slots": ((tokens,), np.int32),
                "sources": ((tokens,), np.int32),
                "tables": ((sequences * limits.table_width,), np.int32),  # rows as wide as a step needs them
            },
        )
        self._there = self._staging.device
        self._tables = torch.zeros(sequences, limits.table_width, dtype=torch.int32, device=stream.device)

    @property
    def controls(self) -> torch.Tensor:
        """[most sequences, 5] float64, how each row's token is drawn; see `kernels/sampling`."""
        return self._there["controls"]

    def send(self, batch: Batch, states: Sequence[SamplingState], padded: int) -> NDArray[np.float64]:
        """Sends a step over; rows up to `padded` that no sequence has decode nothing.

        Returns:
            [len(states), 5] the controls that were sent, valid until the next step.
        """
        rows, tokens = len(batch.context_lens), len(batch.token_ids)
        host = self._staging.host()
        for name in ("token_ids", "positions", "slots", "sources"):
            host[name][:tokens] = getattr(batch, name)
        host["query_start"][: rows + 1] = batch.query_start
        host["context_lens"][:rows] = batch.context_lens
        host["tables"][: batch.block_tables.size] = batch.block_tables.reshape(-1)
        host["sample_rows"][: len(batch.sample_rows)] = batch.sample_rows
        if padded > rows:
            _fill_up(host, rows, padded)
        if states:
            host["controls"][: len(states)] = controls_of(states)
        self._staging.send("tables", batch.block_tables.size)
        sent = self._there["tables"][: batch.block_tables.size].view(batch.block_tables.shape)
        target = self._tables[:rows, : sent.shape[1]]
        self._stream.run(lambda: copy(target, sent))
        return host["controls"][: len(states)]

    def send_blank(self, rows: int) -> None:
        """Sends over a decoding step whose rows decode nothing. Waits for the steps before."""
        self._stream.mark().wait()
        host = self._staging.host()
        host["query_start"][0] = 0
        _fill_up(host, 0, rows)
        self._staging.send("tables", 0)

    def send_zeros(self, starts: Ints, last_context: int) -> Batch:
        """Sends over prompts of nothing but zeros, which write nothing. Waits for the steps before.

        Args:
            starts: [R + 1] where each begins, and the end.
            last_context: context of the last one; the others have none.
        """
        rows, tokens = len(starts) - 1, int(starts[-1])
        contexts = np.diff(starts)
        contexts[-1] = last_context
        zeros = np.zeros(tokens, np.int64)
        batch = Batch(
            token_ids=zeros,
            positions=zeros,
            slots=zeros - 1,
            query_start=starts,
            context_lens=contexts,
            block_tables=np.zeros((rows, self._limits.table_width), np.int64),
            sources=zeros - 1,
            num_decodes=0,
            sample_rows=np.arange(min(self._limits.sequences, tokens)),
            samples=(),
        )
        self._stream.mark().wait()
        self.send(batch, (), rows)
        return batch

    def rows_of(self, batch: Batch) -> DeviceRows:
        """Which tokens of a batch that was sent belong together."""
        rows = len(batch.context_lens)
        tables = self._tables[:rows]
        return DeviceRows(
            self._there["query_start"][: rows + 1],
            self._there["context_lens"][:rows],
            tables,
            batch.num_decodes,
            most_tokens=int(np.diff(batch.query_start).max()),
            most_context=int(batch.context_lens.max()),
            host=AttentionRows(tuple(batch.query_start.tolist()), tuple(batch.context_lens.tolist()), tables),
        )

    def decoding_rows(self, rows: int) -> DeviceRows:
        """The same of any step with one generated token for each of `rows` sequences."""
        return DeviceRows(
            self._there["query_start"][: rows + 1],
            self._there["context_lens"][:rows],
            self._tables[:rows],
            rows,
            most_tokens=1,
            most_context=self._limits.longest,
        )

    def positions_and_slots(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[T] int32 each; see `StepInput`."""
        return self._there["positions"][:tokens], self._there["slots"][:tokens]

    def token_ids(self, tokens: int, drawn: torch.Tensor) -> torch.Tensor:
        """[T] int32, those that the host does not know taken from what the step before drew; work on the device."""
        sources = self._there["sources"][:tokens]
        return torch.where(sources >= 0, drawn[sources.clamp(min=0)].to(torch.int32), self._there["token_ids"][:tokens])

    def sample_rows(self, count: int) -> torch.Tensor:
        """[count] int32: the tokens whose successor is drawn."""
        return self._there["sample_rows"][:count]


def _fill_up(host: Mapping[str, NDArray[Any]], first: int, last: int) -> None:
    """Rows of a decoding step without a sequence: no context, nothing written, the likeliest token."""
    for name, value in (("token_ids", 0), ("positions", 0), ("slots", -1), ("sources", -1), ("context_lens", 0)):
        host[name][first:last] = value
    host["query_start"][first + 1 : last + 1] = range(first + 1, last + 1)
    host["controls"][first:last] = (0.0, 0.0, 0.0, 1.0, 0.5)
