# SPDX-License-Identifier: MIT
"""Interface to CUDA for steps on a GPU: a stream of work, captured work (CUDA graphs), marks (events), staged memory.

A `DeviceStream` runs its work in order, at any later time. Everything that reads or writes device memory in a step is
work of the stream, and the host waits for a mark before it reads results. So tests can use a stream that runs work only
when the host waits for it.

Arrays of the host are copied to the device either together, by `Staging` once a step, or alone, by `Sent`. The host
must not write to staged memory while an earlier copy still reads it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from candle_vllm.core.devices import Device
from candle_vllm.core.threads import collector_paused

Work: TypeAlias = Callable[[], None]


class Mark(Protocol):
    """A position in a stream's work (an event)."""

    def wait(self) -> None:
        """Return when all work before the mark is done."""


class DeviceStream(Protocol):
    """Work on a device, in order."""

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""

    def run(self, work: Work) -> None:
        """Queue work after all earlier work. The work must not wait for the device."""

    def join(self) -> None:
        """Make later work of this stream wait for work that was launched on torch's current stream."""

    def capture(self, work: Work) -> Work:
        """Capture work without running it; return work that replays the captured work on the same memory.

        The work must have run once before. Tensors that it allocates stay, and each replay overwrites them.
        """

    def new_pool(self) -> None:
        """Give later captures another memory pool, after all captured work was dropped."""

    def between(self, host: Work) -> None:
        """Within work: call `host` before the rest of the work is launched, also in replays of captured work.

        Captured work is split at this call. `host` must not run work; it may mark the earlier work and wait for it.
        """

    def mark(self) -> Mark:
        """Return a mark after all work so far."""

    def beside(self) -> DeviceStream:
        """Return another stream of the same device; only `after` orders the work of the two streams."""

    def after(self, mark: Mark) -> None:
        """Make later work wait for a mark of another stream; the host does not wait."""

    def staged(self, size: int) -> torch.Tensor:
        """Return host memory, uint8 [size], whose copies to the device are asynchronous (pinned memory)."""


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between the device and staged memory, or on the device. Call as the stream's work."""
    target.copy_(source, non_blocking=True)


class Sent:
    """A copy of a host array in staged memory, which work of a stream copies to the device."""

    def __init__(self, stream: DeviceStream, array: NDArray[Any]) -> None:
        kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
        self._stream = stream
        self._staged = stream.staged(array.nbytes).view(kind).view(array.shape)
        self._staged.numpy()[...] = array

    def there(self) -> torch.Tensor:
        """Return the array on the device. Call as the stream's work."""
        return self._staged.to(self._stream.device, non_blocking=True)


class CudaStream:
    """`DeviceStream` of CUDA: a new CUDA stream, and graphs whose temporary tensors share one memory pool."""

    def __init__(self, device: torch.device | Device) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._pieces: list[Work] | None = None  # parts of the work that is being captured
        self._graph: torch.cuda.CUDAGraph | None = None
        self.join()

    def run(self, work: Work) -> None:
        # The current device and stream are set for each thread, and another thread may have created the stream.
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), torch.inference_mode():
            work()

    def join(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def capture(self, work: Work) -> Work:
        self._pieces = pieces = list[Work]()
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream), collector_paused():
            try:
                self._begin_piece()
                with torch.inference_mode():
                    work()
                self._end_piece()
            except BaseException:
                if self._graph is not None:
                    with contextlib.suppress(RuntimeError):  # the first error is reported
                        self._graph.capture_end()
                raise
            finally:
                self._pieces = self._graph = None

        def replay() -> None:
            for piece in pieces:
                piece()

        return replay

    def new_pool(self) -> None:
        """See `DeviceStream`. A pool is freed with its last graph, and must not be used again."""
        self._pool = torch.cuda.graph_pool_handle()

    def _begin_piece(self) -> None:
        # Not `torch.cuda.graph`, which empties caches each time and takes longer. A capture registers the random
        # generator's state, which must not be created in inference mode.
        with torch.inference_mode(mode=False):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._graph = graph

    def _end_piece(self) -> None:
        graph, self._graph = self._graph, None
        assert graph is not None
        assert self._pieces is not None
        graph.capture_end()
        self._pieces.append(graph.replay)

    def between(self, host: Work) -> None:
        if self._pieces is None:
            host()
            return
        self._end_piece()
        self._pieces.append(host)
        self._begin_piece()

    def mark(self) -> _CudaMark:
        with torch.cuda.device(self.device):
            event = torch.cuda.Event()
            event.record(self._stream)
        return _CudaMark(event)

    def beside(self) -> CudaStream:
        return CudaStream(self.device)

    def after(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)

    def staged(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


ALIGNMENT = 64
"""Alignment of arrays in 4-byte elements: 256 bytes, the largest alignment that kernels need."""

_TORCH: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


class Staging:
    """Named arrays on the host and on the device, followed by the room: memory that each step divides differently.

    Args:
        stream: the stream of the copies.
        arrays: shape and dtype (int32, float32 or float64) of each array, in order.
        room: int32 elements of the room.
        pieces: number of host buffers, used in turn; the copy from a buffer must be done when `host` returns it again.

    Attributes:
        device: the arrays on the device, at fixed addresses.
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
        self._begin = end // 4  # offset of the room
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
        """Return the host's arrays and room for the next step; `send` must follow."""
        self._turn = (self._turn + 1) % len(self._host)
        return self._views[self._turn], self._rooms[self._turn]

    def send(self, used: int) -> None:
        """Copy the arrays and the first `used` elements of the room to the device."""
        end = self._begin + used
        source, target = self._host[self._turn][:end], self._device[:end]
        self._stream.run(lambda: copy(target, source))


def aligned(count: int) -> int:
    """Round `count` up to a multiple of `ALIGNMENT`."""
    return -(-count // ALIGNMENT) * ALIGNMENT
