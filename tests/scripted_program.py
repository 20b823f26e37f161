# SPDX-License-Identifier: MIT
"""The program in a `ScriptedServer`'s process: `candle-vllm`, with the engine that `script.json` describes."""

from __future__ import annotations

import fcntl
import json
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a program

from candle_vllm.server import serve
from candle_vllm.server.cli import main as command
from candle_vllm.server.models.loader import serve_engine
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.settings.catalogue import ModelEntry
from packages.server.tests.server_fakes import PacedEngine

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1  # linux/sockios.h, linux/if.h


def main() -> int:
    """Serve until a signal arrives."""
    script = json.loads(Path("script.json").read_text())
    if script["isolated"]:
        raise_loopback()

    def answer(prompt: str) -> str | list[str]:
        with Path("prompts.jsonl").open("a") as file:
            file.write(json.dumps(prompt) + "\n")
        return next((pieces for text, pieces in script["answers"].items() if text in prompt), "Nothing to say.")

    engine = PacedEngine(answer, **{"name": "scripted", **script["engine"]})

    class Loader(serve.ModelLoader):
        def check(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> None:
            """Do nothing: there is no model to check."""

        def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
            return serve_engine(engine, entry, self._metrics)

    serve.ModelLoader = Loader  # type: ignore[misc]
    return command(sys.argv[1:])


def raise_loopback() -> None:
    """Set the loopback up, which is down in a new network namespace."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", _IFF_UP, b""))


if __name__ == "__main__":
    sys.exit(main())
