# SPDX-License-Identifier: MIT
"""The engine's process: load the model, and serve it until the parent ends this process or has exited.

`EngineProcess` starts it as `python -m candle_vllm.core.remote.child` and sends the settings over the standard input.
Steps 4 to 9 of a request's life run here.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.progress import heard_by
from candle_vllm.core.remote import wire
from candle_vllm.core.remote.line import CONTROL, END, STEPS, Bell, Start, read_start, set_limits
from candle_vllm.core.shown import start_logging
from candle_vllm.core.threads import collect_seldom

if TYPE_CHECKING:
    from candle_vllm.core.remote.serving import ChildEngine

logger = logging.getLogger(__name__)

_LOOK_UP = 0.5  # seconds between checks of the parent
SWITCH_SECONDS = 0.0005  # a tenth of the default: threads that compile grammars yield to the engine's steps sooner


def main() -> int:
    """Run an engine; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which may have answers to finish first
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_SECONDS)
    collect_seldom()
    parent = os.getppid()
    start = read_start(sys.stdin.fileno())
    if start.alive is not None:
        os.set_inheritable(start.alive, False)
    start_logging(*start.log, process="engine process")
    end = EndRequest()
    watch = threading.Thread(
        target=watch_parent, args=(parent, start.folder, end.note), name="candle-vllm-parent", daemon=True
    )
    watch.start()
    with (
        zmq.Context() as context,
        connected(context, CONTROL, start) as control,
        connected(context, STEPS, start) as steps,
    ):
        return serve(start.config, control, steps, end)


def serve(config: dict[str, Any], control: zmq.Socket[bytes], steps: zmq.Socket[bytes], end: EndRequest) -> int:
    """Load the model and answer requests; return the exit status.

    If the model cannot be loaded, the process sends the error and waits until the parent ends it: otherwise the parent
    might notice the end of the process before the error arrives.
    """
    try:
        from candle_vllm.core.remote.serving import ChildEngine, Outbox, RequestDesk

        outbox = Outbox(steps)
        with heard_by(lambda progress: control.send(wire.encode(wire.Loading(**progress._asdict())))):
            engine = ChildEngine(EngineConfig(**config), outbox)
    except CandleVllmError as error:
        control.send(wire.encode(wire.Failed(error=wire.describe_error(error))))
        end.ended.wait()
        return 1
    with engine:
        control.send(wire.encode(describe(engine)))
        desk = RequestDesk(engine, outbox, control, end.bell)
        try:
            while not end.ended.is_set():
                desk.turn()
        except wire.MalformedMessageError as error:
            logger.error("the parent sent a malformed message: %s", error)
            return 1
        finally:
            desk.close()
    return 0


def describe(engine: ChildEngine) -> wire.Ready:
    """Return the message that describes a loaded engine to the parent."""
    tokenizer, template, pooling, vision = engine.parts
    return wire.Ready(
        info=engine.model_info,
        tokenizer=wire.TokenizerParts.of(tokenizer),
        template=None if template is None else template.source,
        pooling=pooling,
        max_step_tokens=engine.max_step_tokens,
        stats=engine.stats(),
        vision=None if vision is None else vision.parts,
    )


def connected(context: zmq.Context[zmq.Socket[bytes]], kind: bytes, start: Start) -> zmq.Socket[bytes]:
    """Return a socket to the parent, identified by the token. It never reconnects: the parent must not change."""
    end = context.socket(zmq.DEALER)
    set_limits(end)
    end.setsockopt(zmq.SNDTIMEO, -1)  # a slow parent delays steps; when the parent exits, this process ends
    end.setsockopt(zmq.RECONNECT_IVL, -1)
    end.setsockopt(zmq.ROUTING_ID, kind + start.token)
    end.connect(start.address)
    return end


class EndRequest:
    """The parent's request that this process ends: it sets `ended` and rings `bell`."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.bell = Bell()

    def note(self) -> None:
        """Record the request."""
        self.ended.set()
        self.bell.ring()


def watch_parent(parent: int, folder: str, note: Callable[[], None]) -> None:
    """Wait until the parent asks this process to end; if the parent has exited instead, remove the folder and exit."""
    while True:
        # Windows cannot poll a pipe; there only the parent has the other end, which is closed when the parent exits.
        if sys.platform == "win32" or select.select([sys.stdin.fileno()], [], [], _LOOK_UP)[0]:
            if os.read(sys.stdin.fileno(), 1) == END:
                note()
                return
            break
        if os.getppid() != parent:
            break
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
