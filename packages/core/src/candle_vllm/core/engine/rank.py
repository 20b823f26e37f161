# SPDX-License-Identifier: MIT
"""A rank's process: loads its part of the model, and runs its part of every step that the first rank tells it.

Started as `python -m candle_vllm.core.engine.rank LINE,SIDE[,MEMORY]` by `Ranks`, with the descriptors of its two
lines, which say everything else, and of the memory in which ranks of one machine add up; or as `... rank join`, with an
`Invitation` on its standard input, to be a rank of another machine.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.adapter_loading import adapter_loader
from candle_vllm.core.engine.adapters import LoadedAdapter
from candle_vllm.core.engine.build import build_rank
from candle_vllm.core.engine.model_runner import ModelRunner
from candle_vllm.core.engine.nodes import REFUSED, Invitation, join
from candle_vllm.core.engine.rank_line import (
    SILENCE,
    AdapterLoaded,
    Begin,
    Failed,
    ForgetAdapters,
    Forward,
    Go,
    Land,
    Line,
    LoadAdapter,
    Ready,
    Score,
    Side,
    Sleep,
    ToldBatches,
    ToRank,
    WakeUp,
    as_ints,
)
from candle_vllm.core.engine.ranks import meet
from candle_vllm.core.engine.sleeping import Sleeper, files_mark
from candle_vllm.core.errors import CandleVllmError, ConfigError, EngineDeadError
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.memory import available_memory
from candle_vllm.core.threads import LOADING_THREADS, collect_seldom

logger = logging.getLogger(__name__)

_LATER = 3  # ticks that the first rank has to say of a link that was cut, before this one ends and so says nothing

Load: TypeAlias = Callable[[Path], LoadedAdapter]


def main(given: str) -> int:
    """Runs a rank until the line ends; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the first rank, which ends the others
        signal.signal(number, signal.SIG_IGN)
    collect_seldom()
    try:
        if given == "join":
            return _join()
        line, side, *memory = given.split(",")
        shared = os.fdopen(int(memory[0]), "r+b", buffering=0) if memory else None
        return _run(_descriptor(line), _descriptor(side), None, shared)
    except (EOFError, OSError):
        logger.debug("the first rank has gone", exc_info=True)
        return 0
    except Exception:
        logger.exception("a rank has failed")
        return 1


def _descriptor(number: str) -> Line:
    line = Line(socket.socket(fileno=int(number)))
    line.socket.set_inheritable(False)
    return line


def _join() -> int:
    given = sys.stdin.buffer
    _log_as("rank", logging.INFO)
    try:
        line, side, invitation = join(given)
    except ConfigError as error:
        logger.error("%s", error)
        return REFUSED
    return _run(line, side, invitation)


def _log_as(name: str, level: int) -> None:
    logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s {name}: %(name)s: %(message)s", force=True)


def _run(line: Line, side_line: Line, invitation: Invitation | None, memory: BinaryIO | None = None) -> int:
    side = Side(side_line, line, None if invitation is None else SILENCE + _LATER)
    begin: Begin = line.receive(Begin)
    _log_as(f"rank {begin.rank}", begin.log_level)
    try:
        own: dict[str, Any] = {} if invitation is None else invitation.own | {"cluster_key": invitation.key}
        config = EngineConfig(**begin.config | own)
        line.send(Ready(0))
        line.receive(Go)
        host = begin.host or line.socket.getsockname()[0]
        stages = config.pipeline_parallel_size
        ranks = meet(begin.rank, begin.size, config.device, side, host, stages, memory)
        runner, sleeper, load = _loaded(config, ranks, line, theirs=invitation is not None)
    except EngineDeadError:
        return 0
    except CandleVllmError as error:
        line.send(Failed(str(error), getattr(error, "setting", None)))
        return 1
    _serve(runner, sleeper, load, line)
    return 0


def _loaded(
    config: EngineConfig, ranks: Collective, line: Line, *, theirs: bool
) -> tuple[ModelRunner, Sleeper, Load | None]:
    LOADING_THREADS.set(config.threads)
    loaded = load_any_model(config, choose_device(config.device), lambda *_: None, ranks=ranks)
    assert isinstance(loaded, LoadedModel)
    line.send(Ready(1, files_mark(loaded.files, times=False) if theirs else None))
    line.receive(Go)
    runner, sleeper = build_rank(config, loaded, ranks)
    load = None
    if config.enable_lora:
        load = adapter_loader(config, loaded, runner, config.lora_memory or available_memory())  # the first one counts
    return runner, sleeper, load


def _load_adapters(asked: queue.SimpleQueue[LoadAdapter], load: Load, batches: ToldBatches, line: Line) -> None:
    """Loads what is asked for, in a thread of its own."""
    while True:
        each = asked.get()
        try:
            packed: Any = load(Path(each.path)).packed
        except CandleVllmError as error:
            line.send(AdapterLoaded(each.number, b"", str(error)))
        except Exception as error:
            logger.exception("an adapter could not be loaded")
            line.send(AdapterLoaded(each.number, b"", f"{type(error).__name__}: {error}"))
        else:
            batches.adapters[each.number] = packed
            line.send(AdapterLoaded(each.number, packed.digest))


def _serve(runner: ModelRunner, sleeper: Sleeper, load: Load | None, line: Line) -> None:
    batches, asked = ToldBatches(), queue.SimpleQueue[LoadAdapter]()
    if load is not None:
        threading.Thread(target=_load_adapters, args=(asked, load, batches, line), daemon=True).start()
    while True:
        message: ToRank = line.receive(ToRank)
        if isinstance(message, Forward):
            runner.forward(batches.batch(message), ())
        elif isinstance(message, Land):
            runner.land()
        elif isinstance(message, Score):
            runner.score(as_ints(message.rows))
        elif isinstance(message, LoadAdapter):
            asked.put(message)
        elif isinstance(message, ForgetAdapters):
            for number in message.numbers:
                batches.adapters.pop(number, None)
        elif isinstance(message, Sleep):
            sleeper.check(message.level)
            sleeper.sleep(message.level)
        elif isinstance(message, WakeUp):
            sleeper.wake_up(message.tags)
        else:
            raise ValueError(f"a rank at work is told {type(message).__name__}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
