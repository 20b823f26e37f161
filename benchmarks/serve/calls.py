# SPDX-License-Identifier: MIT
"""Count the Python calls of one token of a streamed answer, and the modules and lines that a streamed answer runs.

    python benchmarks/serve/calls.py [--api chat] [--drafts] [--names]

A server with the demo model and one stream runs in this process, warm. The client reads a plain socket in a thread of
its own, whose calls are not counted. Calls a token are those of all threads of the server in a long answer without
those in a short one, by the tokens that the long one has more. A resumed coroutine counts as a call; what uvicorn does
ten times a second does not. Modules and lines are those of the source that run during one answer, in all threads
(`sys.settrace`).
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

from candle_vllm.server import serve as serving
from candle_vllm.server.models.loader import ModelLoader, local_engine
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import demo_model

SHORT, LONG = 32, 96
ROUNDS = 3
TICKING = ("uvicorn/server.py", "asyncio/tasks.py", "asyncio/futures.py")
SOURCE = f"{os.sep}candle_vllm{os.sep}"
QUESTION = [{"role": "user", "content": "Tell me about rivers and their history."}]
APIS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": QUESTION, "ignore_eos": True}),
    "completions": ("/v1/completions", {"prompt": "Rivers", "ignore_eos": True}),
    "messages": ("/v1/messages", {"model": "bench", "messages": QUESTION}),
    "ollama": ("/api/chat", {"model": "bench", "messages": QUESTION}),
    "responses": ("/v1/responses", {"input": "Tell me about rivers and their history.", "store": False}),
}


class Counter:
    """Counts calls, or notes lines, in every thread that starts while it is installed."""

    def __init__(self) -> None:
        self.calls: collections.Counter[CodeType] = collections.Counter()
        self.lines: set[tuple[str, int]] = set()
        self.counting = self.tracing = False

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        if self.counting and event == "call" and not frame.f_code.co_filename.endswith(TICKING):
            self.calls[frame.f_code] += 1

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        if SOURCE not in frame.f_code.co_filename:
            return None
        if self.tracing and event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace


def ask(address: tuple[str, int], api: str, tokens: int) -> str:
    """Stream one answer over a connection of its own; give what came."""
    path, body = APIS[api]
    most = {"responses": "max_output_tokens"}.get(api, "max_tokens")
    body = body | ({"options": {"num_predict": tokens, "temperature": 0}} if api == "ollama" else {most: tokens})
    data = json.dumps({"stream": True, **({} if api == "ollama" else {"temperature": 0}), **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    parts = list[bytes]()
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        while part := connection.recv(1 << 16):
            parts.append(part)
    answer = b"".join(parts).decode()
    if not answer.startswith("HTTP/1.1 200"):
        raise RuntimeError(answer)
    return answer


def measure(address: tuple[str, int], api: str, counter: Counter, names: bool) -> None:
    """Print what the answers of one API cost."""
    for _ in range(3):
        ask(address, api, LONG)
    rounds = list[list[tuple[float, CodeType]]]()
    for _ in range(ROUNDS):
        counted = list[collections.Counter[CodeType]]()
        for tokens in (SHORT, LONG):
            time.sleep(0.5)  # what ends behind an answer is none of the next one
            counter.calls.clear()
            counter.counting = True
            ask(address, api, tokens)
            time.sleep(0.2)
            counter.counting = False
            counted.append(counter.calls.copy())
        more = (counted[1] - counted[0]).most_common()
        rounds.append([(count / (LONG - SHORT), code) for code, count in more if count >= (LONG - SHORT) * 3 / 4])
    rows = min(rounds, key=lambda rows: sum(count for count, _ in rows))  # a server that has begun warms up beside
    counter.tracing = True
    ask(address, api, SHORT)
    time.sleep(0.2)
    counter.tracing = False
    report = {
        "api": api,
        "calls_a_token": round(sum(count for count, _ in rows), 1),
        "of_ours": round(sum(count for count, code in rows if SOURCE in code.co_filename), 1),
        "modules": len({path for path, _ in counter.lines}),
        "lines": len(counter.lines),
    }
    print(json.dumps(report), flush=True)
    if names:
        for count, code in rows:
            print(f"{count:6.2f}  {code.co_filename.rpartition(SOURCE)[2]}:{code.co_firstlineno} {code.co_qualname}")
    counter.lines.clear()


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api", choices=APIS, action="append", help="which; may be given more than once")
    parser.add_argument("--drafts", action="store_true", help="with speculation, as by default on the CPU")
    parser.add_argument("--names", action="store_true", help="every function that runs for a token")
    args = parser.parse_args()
    counter = Counter()
    drafts: dict[str, Any] = {} if args.drafts else {"speculative_config": {"method": "none"}}
    model = str(demo_model())
    settings = Settings(model=model, port=0, enable_prefix_caching=False, max_num_seqs=4, **drafts)
    listener = list[socket.socket]()

    def client() -> None:
        try:
            while not listener:
                time.sleep(0.01)
            address = listener[0].getsockname()
            while True:
                try:
                    ask(address, "chat", 1)
                    break
                except (OSError, RuntimeError):  # it is starting
                    time.sleep(0.1)
            for api in args.api or ["chat"]:
                measure(address, api, counter, args.names)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    bind = serving.bind
    serving.bind = lambda address: listener.append(bind(address)) or listener[0]
    serving.ModelLoader = functools.partial(ModelLoader, start_engine=local_engine)  # pyrefly: ignore[bad-assignment]
    threading.Thread(target=client, daemon=True).start()
    threading.setprofile(counter.profile)
    threading.settrace(counter.trace)
    sys.setprofile(counter.profile)
    sys.settrace(counter.trace)
    return serving.serve(Configuration(settings, settings, Catalogue([ModelEntry("bench", settings)]), ()))


if __name__ == "__main__":
    sys.exit(main())
