# SPDX-License-Identifier: MIT
"""What the ranks of a model do together: sums over their parts, and parts side by side.

All ranks call the same things in the same order. Source: Shoeybi et al., 2019, arXiv:1909.08053 (Megatron-LM).
"""

from __future__ import annotations

import collections
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from candle_vllm.core.kernels.recorded import Value

if TYPE_CHECKING:
    import torch


class Stages(Protocol):
    """The stages of a model whose layers are divided, as a rank of one of them sees its like in the others.

    What goes from one to another arrives in the order in which it was sent.

    Attributes:
        rank, size: which stage it is of, from 0 on, and how many there are.
    """

    rank: int
    size: int

    def send(self, x: Value, to: int) -> None:
        """Hands x [...] over, which nobody may write to any more; waits for nobody, but for a GPU's stream."""
        ...

    def receive(self, x: Value, source: int) -> Value:
        """x, filled with what a stage has sent."""
        ...

    def least(self, number: int) -> int:
        """See `Collective`."""
        ...

    def close(self) -> None:
        """See `Collective`."""
        ...


class Collective(Protocol):
    """The ranks of a model, as one of them sees them; where its layers are divided, those of its stage.

    Attributes:
        rank, size: which one it is, from 0 on, and how many there are.
        stages: the stages; None where its layers are not divided.
    """

    rank: int
    size: int
    stages: Stages | None

    def sum(self, x: Value) -> Value:
        """x [...] of all ranks added up, which may be x itself overwritten; the same bits on each."""
        ...

    def gather(self, x: Value, width: int) -> Value:
        """x [T, up to width] of all ranks side by side, [T, size * width]; what is missing of one's is 0."""
        ...

    def least(self, number: int) -> int:
        """The least of what the ranks say, those of all stages, below 2^63."""
        ...

    def close(self) -> None:
        """Lets go of the others."""
        ...


class ProcessGroup:
    """Ranks in processes of their own, over torch.distributed: NCCL between GPUs, Gloo elsewhere; see `Collective`.

    No global group is made, so that a process may have several, and others of its own.

    Args:
        rank, size: see `Collective`.
        device: where what is summed lives.
        store: a file in a folder that only this user can enter, by which the ranks find each other; or a store.
        patience: seconds that a rank waits for the others.
        host: the address at which Gloo listens for the others.
        stages: see `Collective`.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: str,
        store: Path | Any,
        *,
        patience: float,
        host: str = "127.0.0.1",
        stages: Stages | None = None,
    ) -> None:
        import torch
        from torch import distributed

        self.rank, self.size, self.stages = rank, size, stages
        self._sent: collections.deque[tuple[Any, Any]] = collections.deque()  # on its way, and what is read meanwhile
        found: Any = distributed.FileStore(str(store), size) if isinstance(store, Path) else store
        wait = datetime.timedelta(seconds=patience)
        gloo: Any = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = wait
        self._host: Any = gloo(distributed.PrefixStore("host", found), rank, size, options)
        self._group: Any = self._host
        if torch.device(device).type == "cuda" and size > 1:
            nccl: Any = distributed.ProcessGroupNCCL
            named = nccl.Options()
            named._timeout = wait
            self._group = nccl(distributed.PrefixStore("device", found), rank, size, named)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `Collective`."""
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """See `Collective`."""
        rows, own = x.shape
        if own < width:
            wider = x.new_zeros(rows, width)
            wider[:, :own] = x
            x = wider
        parts = x.new_empty(self.size * rows, width)
        self._group._allgather_base(parts, x.contiguous()).wait()
        return parts.view(self.size, rows, width).transpose(0, 1).reshape(rows, self.size * width)

    def least(self, number: int) -> int:
        """See `Collective`."""
        import torch
        from torch import distributed

        found = torch.tensor([number])
        options: Any = distributed.AllreduceOptions()
        options.reduceOp = distributed.ReduceOp.MIN
        self._host.allreduce([found], options).wait()
        return int(found) if self.stages is None else self.stages.least(int(found))

    def send(self, x: torch.Tensor, to: int) -> None:
        """See `Stages`."""
        work = self._group.send([x], to, 0)
        if x.is_cuda:
            work.wait()  # the stream does, and what was captured with it
            return
        self._sent.append((work, x))
        while self._sent[0][0].is_completed() and len(self._sent) > 1:
            self._sent.popleft()

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """See `Stages`."""
        self._group.recv([x], source, 0).wait()
        return x

    def close(self) -> None:
        """See `Collective`."""
        for group in {id(each): each for each in (self._group, self._host)}.values():
            end = getattr(group, "abort", None)  # NCCL's, which waits for nobody
            if end is not None:
                end()
        self._group = self._host = None
        if self.stages is not None:
            self.stages.close()
