# SPDX-License-Identifier: MIT
"""A rank's process: loads its part of the model, and runs its part of every step that the first rank tells it.

Started as `python -m candle_vllm.core.engine.rank DESCRIPTOR` by `Ranks`, which says everything else over that line.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
from pathlib import Path

from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.build import build_rank
from candle_vllm.core.engine.model_runner import ModelRunner
from candle_vllm.core.engine.ranks import (
    Begin,
    Forward,
    Go,
    Line,
    Ready,
    Score,
    Sleep,
    ToldBatches,
    ToRank,
    WakeUp,
    meet,
    rows_told,
    said_of,
)
from candle_vllm.core.engine.sleeping import Sleeper
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.threads import LOADING_THREADS, collect_seldom

logger = logging.getLogger(__name__)


def main(descriptor: int) -> int:
    """Runs a rank until the line ends; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the first rank, which ends the others
        signal.signal(number, signal.SIG_IGN)
    collect_seldom()
    line = Line(socket.socket(fileno=descriptor))
    line.socket.set_inheritable(False)
    try:
        begin: Begin = line.receive(Begin)
        level, name = begin.log_level, f"rank {begin.rank}"
        logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s {name}: %(name)s: %(message)s")
        config = EngineConfig(**begin.config)
        line.send(Ready(0))
        line.receive(Go)
        ranks = meet(begin.rank, begin.size, config.device, Path(begin.folder))
        try:
            runner, sleeper = _loaded(config, ranks, line)
        except CandleVllmError as error:
            line.send(said_of(error))
            return 1
        _serve(runner, sleeper, line)
    except (EOFError, BrokenPipeError):
        logger.debug("the first rank has gone")
        return 0
    except Exception:
        logger.exception("a rank has failed")
        return 1
    return 0


def _loaded(config: EngineConfig, ranks: Collective, line: Line) -> tuple[ModelRunner, Sleeper]:
    LOADING_THREADS.set(config.threads)
    loaded = load_any_model(config, choose_device(config.device), lambda *_: None, ranks=ranks)
    assert isinstance(loaded, LoadedModel)
    line.send(Ready(1))
    line.receive(Go)
    return build_rank(config, loaded, ranks)


def _serve(runner: ModelRunner, sleeper: Sleeper, line: Line) -> None:
    batches = ToldBatches()
    while True:
        message: ToRank = line.receive(ToRank)
        if isinstance(message, Forward):
            runner.forward(batches.batch(message), ())
        elif isinstance(message, Score):
            runner.score(rows_told(message))
        elif isinstance(message, Sleep):
            sleeper.check(message.level)
            sleeper.sleep(message.level)
        elif isinstance(message, WakeUp):
            sleeper.wake_up(message.tags)
        else:
            raise ValueError(f"a rank at work is told {type(message).__name__}")


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
