# SPDX-License-Identifier: MIT
"""A rank's process: load a part of the model, and run that part of every step that the first rank sends.

`Ranks` starts it as `python -m candle_vllm.core.engine.ranks.rank LINE,SIDE,RING,MEMORY`, with the descriptors of its
two connections, of the ring that broadcasts messages within a machine, and of the shared memory in which ranks sum; ""
stands for no ring or memory. `... rank join`, with an `Invitation` on stdin, starts a rank that joins over the network.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.adapters.adapter_loading import adapter_loader
from candle_vllm.core.engine.adapters.adapter_store import LoadedAdapter
from candle_vllm.core.engine.build import build_rank
from candle_vllm.core.engine.cache.block_tiers import BlockParts, keep_parts
from candle_vllm.core.engine.ranks import rank_line
from candle_vllm.core.engine.ranks.message_ring import RingLine
from candle_vllm.core.engine.ranks.nodes import REFUSED, Invitation, join
from candle_vllm.core.engine.ranks.ranks import meet
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.sleeping import Sleeper
from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.loading.source import files_mark
from candle_vllm.core.memory import available_memory
from candle_vllm.core.shown import start_logging
from candle_vllm.core.threads import LOADING_THREADS, collect_seldom

logger = logging.getLogger(__name__)

_LATER = 3  # additional ticks, so that the first rank notices and reports a broken link before this rank ends

Load: TypeAlias = Callable[[Path], LoadedAdapter]


class _Part(NamedTuple):
    """A rank's part of the engine; `load` is None without LoRA, and `parts` without KV offloading."""

    runner: ModelRunner
    sleeper: Sleeper
    load: Load | None
    parts: BlockParts | None


def main(given: str) -> int:
    """Run a rank until its connection ends or it fails; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the first rank, which ends the others
        signal.signal(number, signal.SIG_IGN)
    collect_seldom()
    try:
        if given == "join":
            return _join()
        line, side, ring, memory = given.split(",")
        return _run(_line_of(line), _line_of(side), None, _shared(ring), _shared(memory))
    except (EOFError, ConnectionError):
        logger.debug("the first rank has ended", exc_info=True)
        return 0
    except Exception:
        logger.exception("a rank has failed")
        return 1


def _line_of(number: str) -> rank_line.Line:
    line = rank_line.Line(socket.socket(fileno=int(number)))
    line.socket.set_inheritable(False)
    return line


def _shared(number: str) -> BinaryIO | None:
    if not number:
        return None
    os.set_inheritable(int(number), False)
    return os.fdopen(int(number), "r+b", buffering=0)


def _join() -> int:
    given = os.fdopen(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # at exit Python wants the lock of a buffer
    start_logging(logging.INFO, process="rank")
    try:
        line, side, invitation = join(given)
    except ConfigError as error:
        logger.error("%s", error)
        return REFUSED
    return _run(line, side, invitation)


def _run(
    line: rank_line.Line,
    side_line: rank_line.Line,
    invitation: Invitation | None,
    ring: BinaryIO | None = None,
    memory: BinaryIO | None = None,
) -> int:
    side = rank_line.Side(side_line, line, None if invitation is None else rank_line.SILENCE + _LATER)
    begin: rank_line.Begin = line.receive(rank_line.Begin)
    if ring is not None:
        line = RingLine(line.socket, ring, begin.rank)
    start_logging(*begin.log, process=f"rank {begin.rank}")
    try:
        own: dict[str, Any] = {} if invitation is None else invitation.own | {"cluster_key": invitation.key}
        if begin.kept_in_redis and own.get("prompt_cache_url") is None:
            raise ConfigError(
                "prompt_cache_url is set on the first node, and not on this one; it may have a password, which is not "
                "sent: set it on every node",
                "prompt_cache_url",
            )
        if invitation is not None and not begin.kept_in_redis:
            own.pop("prompt_cache_url", None)
        config = EngineConfig(**begin.config | own)
        line.send(rank_line.Ready(0))
        line.receive(rank_line.Go)
        host = begin.host or line.socket.getsockname()[0]
        stages = config.pipeline_parallel_size
        ranks = meet(begin.rank, begin.size, config.device, side, host, stages, memory)
        part = _loaded(config, ranks, begin.rank, line, side, own_files=invitation is not None)
    except EngineDeadError:
        return 0
    except CandleVllmError as error:
        line.send(rank_line.Failed(str(error), getattr(error, "setting", None)))
        return 1
    _serve(part, line, side)
    return 0


def _loaded(
    config: EngineConfig, ranks: Collective, rank: int, line: rank_line.Line, side: rank_line.Side, *, own_files: bool
) -> _Part:
    LOADING_THREADS.set(config.threads)
    loaded = load_any_model(config, choose_device(config.device), lambda *_: None, ranks=ranks)
    assert isinstance(loaded, LoadedModel)
    line.send(rank_line.Ready(1, files_mark(loaded.files, times=False) if own_files else None))
    line.receive(rank_line.Go)
    runner, sleeper = build_rank(config, loaded, ranks)
    load = None
    if config.enable_lora:
        # This only limits the file's size: the first rank decides which adapters stay in memory.
        load = adapter_loader(config, loaded, runner, config.lora_memory or available_memory())
    report = lambda reading, found, failed: side.tell(rank_line.BlockRead(reading, found, failed))  # noqa: E731
    parts = keep_parts(config, loaded, runner, rank, report)
    if parts is not None:
        side.read_by(functools.partial(_read_blocks, parts))
    return _Part(runner, sleeper, load, parts)


def _read_blocks(parts: BlockParts, asked: rank_line.ReadBlocks | rank_line.EndReading) -> None:
    if isinstance(asked, rank_line.ReadBlocks):
        parts.read(asked.reading, asked.digests)
    else:
        parts.end(asked.reading, asked.brought)


def _load_adapters(
    asked: queue.SimpleQueue[rank_line.LoadAdapter], load: Load, batches: rank_line.Batches, line: rank_line.Line
) -> None:
    """Load adapters, in a thread of its own."""
    while True:
        each = asked.get()
        try:
            packed: Any = load(Path(each.path)).packed
        except CandleVllmError as error:
            line.send(rank_line.AdapterLoaded(each.number, b"", str(error)))
        except Exception as error:
            logger.exception("an adapter could not be loaded")
            line.send(rank_line.AdapterLoaded(each.number, b"", f"{type(error).__name__}: {error}"))
        else:
            batches.adapters[each.number] = packed
            line.send(rank_line.AdapterLoaded(each.number, packed.digest))


def _serve(part: _Part, line: rank_line.Line, side: rank_line.Side) -> None:
    runner, sleeper, load, parts = part
    batches, asked = rank_line.Batches(), queue.SimpleQueue[rank_line.LoadAdapter]()
    if load is not None:
        threading.Thread(target=_load_adapters, args=(asked, load, batches, line), daemon=True).start()
    while True:
        message: rank_line.ToRank = line.receive(rank_line.ToRank)
        if batches.run(runner, message):
            continue
        if isinstance(message, rank_line.LoadAdapter):
            asked.put(message)
        elif isinstance(message, rank_line.ForgetAdapters):
            for number in message.numbers:
                batches.adapters.pop(number, None)
        elif isinstance(message, rank_line.Sleep):
            sleeper.check(message.level)
            sleeper.sleep(message.level)
        elif isinstance(message, rank_line.WakeUp):
            sleeper.wake_up(message.tags)
        elif parts is not None and isinstance(message, rank_line.KeepBlocks):
            for block, digest in zip(message.blocks.tolist(), message.digests, strict=True):
                parts.offer(block, digest)
        elif parts is not None and isinstance(message, rank_line.BringBlocks):
            for block in message.blocks.tolist():
                parts.bring(message.reading, block)
        elif parts is not None and isinstance(message, rank_line.ForgetBlocks):
            parts.clear()
        elif parts is not None and isinstance(message, rank_line.CloseBlocks):
            parts.close()
            side.tell(rank_line.BlocksClosed())
        else:
            raise ValueError(f"a running rank cannot handle the message {type(message).__name__}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
