# SPDX-License-Identifier: MIT
"""A device stream whose captured work is a record of operations, as a CUDA graph is, for tests on the CPU.

A replay repeats torch's operations and Triton's launches on the memory of the capture, and runs no Python of the step.
So a value that a step reads on the host while it is captured stays the same in all replays, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from candle_vllm.core.kernels.device_stream import Work

_WAITS = ("aten::_local_scalar_dense", "aten::nonzero")  # the host waits for their results


class _Passed:
    """A mark: all work runs at once."""

    def wait(self) -> None:
        """See `Mark`."""


class RecordingStream:
    """See `DeviceStream`; computes on the CPU, at once. Triton must interpret its kernels.

    Attributes:
        captured: number of captured pieces of work.
        replayed: number of replays of captured work.
    """

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def run(self, work: Work) -> None:
        """See `DeviceStream`."""
        with torch.inference_mode():
            work()

    def capture(self, work: Work) -> Work:
        """See `DeviceStream`. The work also runs, so it must not change what it reads."""
        self.captured += 1
        record = _Record()
        with torch.inference_mode(), record.of_launches(), record:
            work()

        def replay() -> None:
            self.replayed += 1
            for operation in record.operations:
                operation()

        return replay

    def join(self) -> None:
        """See `DeviceStream`."""

    def new_pool(self) -> None:
        """See `DeviceStream`."""

    def between(self, host: Work) -> None:
        """See `DeviceStream`; not within captured work."""
        host()

    def mark(self) -> _Passed:
        """See `DeviceStream`."""
        return _Passed()

    def beside(self) -> RecordingStream:
        """See `DeviceStream`."""
        return RecordingStream()

    def after(self, mark: object) -> None:
        """See `DeviceStream`."""

    def staged(self, size: int) -> torch.Tensor:
        """See `DeviceStream`."""
        return torch.full((size,), 0x7F, dtype=torch.uint8)


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Work] = []
        self._launching = False

    def of_launches(self) -> Any:
        """Context in which launches of kernels are recorded, without what the interpreter does for them."""
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launched(executor: Any, *given: Any, **options: Any) -> None:
            self.operations.append(lambda: launch(executor, *given, **options))
            self._launching = True
            launch(executor, *given, **options)
            self._launching = False

        return mock.patch.object(GridExecutor, "__call__", launched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[str, Any] = kwargs or {}
        result = func(*args, **given)
        if not self._launching:
            assert func._schema.name not in _WAITS, f"the host waits for {func} within captured work"
            operation = _repeated(func, args, given, result)
            if operation is not None:
                self.operations.append(operation)
        return result


def _repeated(func: Any, args: Any, given: dict[str, Any], result: Any) -> Callable[[], None] | None:
    """Return what computes a result again, into its memory; None for a view, which needs nothing."""
    if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
        return lambda: func(*args, **given)
    made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
    known = {_memory(each) for each in tree_leaves((args, given)) if isinstance(each, torch.Tensor)}
    if all(_memory(each) in known for each in made):
        return None

    def again() -> None:
        if "empty" in func._schema.name:  # what earlier work left there
            for each in made:
                each.untyped_storage().fill_(0x7F)
            return
        for each, new in zip(made, tree_leaves(func(*args, **given)), strict=True):
            each.copy_(new)

    return again


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
