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

from candle_vllm.core.kernels.device_stream import DeviceStream, copy

ALIGNMENT = 64
"""Numbers of 32 bits between which an array may begin: 256 bytes, the most that a kernel could want."""

_TORCH = {np.dtype(np.int32): torch.int32, np.dtype(np.float64): torch.float64}


class Staging:
    """Named arrays on the host and on the device, and behind them room for what each step lays out anew.

    Args:
        stream: where copies go.
        arrays: shape and dtype (int32 or float64) of each array, in order.
        room: numbers of 32 bits behind them.
        pieces: how many steps the host may be ahead of the copies.

    Attributes:
        device: the arrays on the device; their memory never moves.
        device_room: [room] int32 on the device.
    """

    def __init__(
        self,
        stream: DeviceStream,
        arrays: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        room: int,
        pieces: int = 2,
    ) -> None:
        self._stream = stream
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name, (shape, kind) in arrays.items():
            size = math.prod(shape) * np.dtype(kind).itemsize
            places[name] = (end, end + size)
            end += aligned(-(-size // 4)) * 4
        self._begin = end // 4  # of the room
        self._host = [stream.staged(end + 4 * room).view(torch.int32) for _ in range(pieces)]
        self._device = torch.zeros(end // 4 + room, dtype=torch.int32, device=stream.device)
        self.device: dict[str, torch.Tensor] = {}
        self.device_room = self._device[self._begin :]
        self._views: list[dict[str, NDArray[Any]]] = [{} for _ in range(pieces)]
        self._rooms: list[NDArray[np.int32]] = [host.numpy()[self._begin :] for host in self._host]
        for name, (shape, kind) in arrays.items():
            first, last = places[name]
            self.device[name] = self._device.view(torch.uint8)[first:last].view(_TORCH[np.dtype(kind)]).view(shape)
            for host, views in zip(self._host, self._views):
                views[name] = host.numpy().view(np.uint8)[first:last].view(kind).reshape(shape)
        self._turn = 0

    def host(self) -> tuple[Mapping[str, NDArray[Any]], NDArray[np.int32]]:
        """The arrays and the room to write the next step into; `send` must follow."""
        self._turn = (self._turn + 1) % len(self._host)
        return self._views[self._turn], self._rooms[self._turn]

    def send(self, used: int) -> None:
        """Copies the arrays, and the first `used` numbers of the room."""
        end = self._begin + used
        source, target = self._host[self._turn][:end], self._device[:end]
        self._stream.run(lambda: copy(target, source))


def aligned(count: int) -> int:
    """The least multiple of `ALIGNMENT` that is at least `count`."""
    return -(-count // ALIGNMENT) * ALIGNMENT
