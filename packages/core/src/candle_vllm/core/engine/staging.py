"""Step 5 on a GPU: a step's numbers, laid out in one piece of memory so that one copy brings them over.

The host writes into one of several such pieces in turn, for the copy of the step before may not have happened yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.engine.device_stream import DeviceStream, copy

_ALIGNMENT = 256  # bytes; the largest that a kernel could want of an array's begin

_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.float64): torch.float64}


class Staging:
    """Named arrays on the host and on the device.

    Args:
        stream: where copies go.
        arrays: shape and dtype (int32 or float64) of each array, in order.
        pieces: how many steps the host may be ahead of the copies.

    Attributes:
        device: the arrays on the device; their memory never moves.
    """

    def __init__(
        self, stream: DeviceStream, arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]], pieces: int = 2
    ) -> None:
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, kind) in arrays.items():
            size = math.prod(shape) * np.dtype(kind).itemsize
            self._places[name] = (end, end + size)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._host = [stream.staged(end) for _ in range(pieces)]
        self._device = torch.zeros(end, dtype=torch.uint8, device=stream.device)
        self.device: dict[str, torch.Tensor] = {}
        self._views: list[dict[str, NDArray[Any]]] = [{} for _ in range(pieces)]
        for name, (shape, kind) in arrays.items():
            first, last = self._places[name]
            self.device[name] = self._device[first:last].view(_TORCH[np.dtype(kind)]).view(shape)
            for host, views in zip(self._host, self._views):
                views[name] = host[first:last].numpy().view(kind).reshape(shape)
        self._turn = 0

    def host(self) -> Mapping[str, NDArray[Any]]:
        """The arrays to write the next step into; `send` must follow."""
        self._turn = (self._turn + 1) % len(self._host)
        return self._views[self._turn]

    def send(self, last: str, rows: int) -> None:
        """Copies the arrays up to `last`, of which the first `rows` rows."""
        begin, end = self._places[last]
        end = begin + (end - begin) // len(self.device[last]) * rows
        source, target = self._host[self._turn][:end], self._device[:end]
        self._stream.run(lambda: copy(target, source))
