# SPDX-License-Identifier: MIT
"""The attacks, each a function; the numbers F1 to F19 and N1 are the classes of the audit that found them.

    python -m benchmarks.attacks.attacks NAME PORT SECONDS PID SPARE

runs one of them against a server on this machine and prints what came of it as JSON. `harness.py` starts the server,
this program and the measurement.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import itertools
import json
import os
import socket
import struct
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.attacks.wire import CHAT, SILENCE, Target, chat_body, file_form, form, frame, head, status_of, upgraded

MB = 1 << 20
REFUSED = frozenset(("400", "401", "408", "413", "415", "422", "429", "431", "503", "507"))
ANSWERED = REFUSED | {"200"}
CUT = REFUSED | {"closed"}  # what a flood on a connection may come to; "open" stands for what nobody ended
SECONDS = 10.0  # within which a neighbour is answered
CPU = 2.0  # seconds of processor time that a picture may take
FETCH = 3  # seconds, --lora-fetch-timeout


def _chat(target: Target) -> bool:
    return target.send(CHAT, chat_body("hi"), "bob", patience=SECONDS)[0] == "200"


@dataclass(frozen=True)
class Attack:
    """One attack and its bars.

    Attributes:
        name, audit: for tables; what the function is called, and the finding.
        run: attacks until `Target.left` is 0.
        allowed: what its answers and connections may end as.
        memory: MiB by which the server may grow; for an attack without a server, its own process.
        neighbour: whether a client that behaves is answered.
        patience: seconds within which it has to be.
        flags: of the server; `{spare}` is a port on which the attack listens.
        descriptors: that the server may have; 0 for as many as this process.
        server: whether there is one; without, the attack uses the library in its own process.
    """

    name: str
    audit: str
    run: Callable[[Target], None]
    allowed: frozenset[str] = CUT
    memory: int = 200
    neighbour: Callable[[Target], bool] = _chat
    patience: float = SECONDS
    flags: tuple[str, ...] = ()
    descriptors: int = 0
    server: bool = True


ATTACKS: list[Attack] = []


def attack(audit: str, **bars: Any) -> Callable[[Callable[[Target], None]], Callable[[Target], None]]:
    """Puts a function into the list."""

    def put(run: Callable[[Target], None]) -> Callable[[Target], None]:
        ATTACKS.append(Attack(run.__name__.replace("_", "-"), audit, run, **bars))
        return run

    return put


# ---- grammars --------------------------------------------------------------------------------------------------------


def _grammars(size: int) -> Iterator[str]:
    """Texts whose reading is quadratic where an expression tries every place to the end again."""
    yield 'start: "' + '\\"' * (size // 2)
    yield "start: /" + "\\/" * (size // 2)
    yield 'start: "a"\n' + "a" * size
    yield "start: /" + "[" * size + "/"
    yield "start: " + "(" * size
    yield 'start: "a"' + ' | "a' * (size // 5)
    yield "root ::= [" + "\\]" * (size // 2)
    yield 'start: "a"\n%' + "{" * size
    yield "start: a\n" + " \t" * (size // 2) + "b"


def _each(target: Target, size: int, field: Callable[[str], dict[str, Any]]) -> None:
    """Every grammar at least once, unless the server falls silent."""
    shapes = list(_grammars(size))
    for number, grammar in enumerate(itertools.cycle(shapes), 1):
        silent = target.ask(CHAT, chat_body("hi", **field(grammar))) == "silent"
        target.note = f"{min(number, len(shapes))} of {len(shapes)} shapes"
        if silent or (not target.left and number >= len(shapes)):
            return


def _plain(grammar: str) -> dict[str, Any]:
    return {"structured_outputs": {"grammar": grammar}}


def _tool(definition: str) -> dict[str, Any]:
    grammar = {"type": "grammar", "grammar": {"syntax": "lark", "definition": definition}}
    return {"tools": [{"type": "custom", "custom": {"name": "t", "format": grammar}}], "tool_choice": "required"}


@attack("F1", allowed=ANSWERED)
def grammar_64k(target: Target) -> None:
    """A stall of the interpreter by expressions: grammars of 64 KB that make a careless expression try every place."""
    _each(target, 64_000, _plain)


# One million brackets make llguidance allocate 288 MiB (274 touched) while it reads the grammar, and free them when it
# refuses it: measured +312 MiB at most, +33 behind the attack. Nothing of a refused grammar is kept.
@attack("F1", allowed=ANSWERED, memory=400)
def grammar_1m(target: Target) -> None:
    """The same with grammars of nearly the 1 MiB that is allowed: what is quadratic takes hours."""
    _each(target, 1_000_000, _plain)


@attack("F1", allowed=ANSWERED)
def tool_grammar(target: Target) -> None:
    """The same shapes by the other door: the grammar of a custom tool's input, of 64 KB at most."""
    _each(target, 60_000, _tool)


def _structured(target: Target) -> bool:
    """A form that no cache has."""
    form = {f"n{time.monotonic_ns()}": {"type": "integer"}}
    return target.send(CHAT, _with_schema("hi", form), "bob", patience=SECONDS)[0] == "200"


def _with_schema(content: str, properties: dict[str, Any], **fields: Any) -> dict[str, Any]:
    schema = {"type": "object", "additionalProperties": False, "properties": properties, "required": list(properties)}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return chat_body(content, response_format=form, **fields)


@attack("F12", allowed=ANSWERED, neighbour=_structured)
def compile_bombs(target: Target) -> None:
    """All places of a pool taken: grammars that take long to be prepared, eight at a time of tools (a chain of rules,
    sets of characters without ends) and two of expressions, while a neighbour wants a form of its own."""
    chain = "start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(3500)) + '\nr3500: "a"'
    regexes = (f"((x{{0,500}}y{{0,500}}){{0,500}}z{n}){{0,500}}" for n in itertools.count())
    bombs = [lambda: _tool(chain), lambda: _tool("start: /" + "[" * 12_000 + "/")] * 4
    bombs += [lambda: {"structured_outputs": {"regex": next(regexes)}}] * 2
    lock = threading.Lock()

    def ask(bomb: Callable[[], dict[str, Any]]) -> None:
        while target.left:
            with lock:  # a generator is one thread's at a time
                fields = bomb()
            target.ask(CHAT, chat_body("hi", **fields))

    _together([functools.partial(ask, bomb) for bomb in bombs])


WORDS = {"s": {"type": "string", "maxLength": 500, "pattern": r"^(?:\S+\s*){0,49}\S+$"}}


def _same_form(target: Target) -> bool:
    return target.send(CHAT, _with_schema("hi", WORDS), "bob", patience=SECONDS)[0] == "200"


@attack("battery 1", allowed=ANSWERED, neighbour=_same_form)
def exhausted_grammar(target: Target) -> None:
    """State shared between requests: an answer that exhausts its grammar's lexer, while a neighbour uses the same form.
    A bias makes the model say words until it is."""
    words = {"model": "demo", "prompt": " river stone bread glass", "add_special_tokens": False}
    _, told = target.send("/tokenize", words, "alice")
    bias = {str(token): 30 for token in (told or {}).get("tokens", ())}
    while target.left:
        target.ask(CHAT, _with_schema("Say words.", WORDS, logit_bias=bias, temperature=1.5) | {"max_tokens": 120})


# The bound is the KV cache of 256 MiB (`--mem`), whose pages count when prompts first fill them, and what malloc keeps
# of long texts: with `--mem 64`, +269 MiB, 47 of them the cache's, unchanged from request 105 to 212; malloc_trim gave
# 141 back, and what was in use did not grow.
@attack("regular", allowed=ANSWERED, memory=256 + 270)
def redos_texts(target: Target) -> None:
    """Expressions over prompts and outputs of tools: long repetitions of marks, blanks, quotes and brackets, counted
    over every API, and as a tool's output in a chat that the model answers where they are short."""
    pieces = ("<tool_call>", "<think>", "<|im_start|>", " ", "\n", "a", "{", '\\"', "[[", "é ", "\u200b", "0,", "<a ")
    texts = list(itertools.product((200_000, 2_000, 1_000_000), pieces))
    for number, (size, piece) in enumerate(itertools.cycle(texts)):
        target.note = f"{min(number, len(texts))} of {len(texts)} texts"
        text = piece * (size // len(piece))
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        told = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": text}]
        messages = [{"role": "user", "content": "hi"}, *told]
        said = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        output = {"type": "function_call_output", "call_id": "c", "output": text}
        asked = [("/tokenize", {"messages": messages}), ("/v1/responses/input_tokens", {"input": [said, output]})]
        asked.append(("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": text}]}))
        for path, body in asked + [(CHAT, {"messages": messages, "max_tokens": 1})] * (size < 10_000):
            if not target.left:
                return
            target.ask(path, {"model": "demo", **body})


# ---- web sockets -----------------------------------------------------------------------------------------------------


@attack("F2")
def ws_empty_fragments(target: Target) -> None:
    """Work without bytes: a message in empty fragments, which no limit on its size ever ends."""
    begin, more = frame(1, b"{", final=False), frame(0, final=False) * 10_000
    target.again(lambda new: (upgraded(new).sendall(begin), target.flood(new, more))[1])


@attack("F2")
def ws_small_fragments(target: Target) -> None:
    """The same with two bytes in each fragment: 4 million of them fit into a message."""
    begin, more = frame(1, b"{", final=False), frame(0, b"  ", final=False) * 10_000
    target.again(lambda new: (upgraded(new).sendall(begin), target.flood(new, more))[1])


@attack("F2", memory=48)
def ws_pings(target: Target) -> None:
    """Answers that nobody reads: a flood of pings, whose pongs fill the server's memory."""
    target.again(lambda new: target.flood(upgraded(new), frame(9, bytes(125)) * 1000))


@attack("F2")
def ws_bad_text(target: Target) -> None:
    """Noise: text messages that are no UTF-8, a connection for each, as fast as they are refused."""

    def once(connection: socket.socket) -> None:
        upgraded(connection).sendall(frame(1, b"\xff\xfe{}"))
        status = status_of(connection)
        target.statuses["closed" if status in ("no HTTP", "closed") else status] += 1

    target.again(once)


@attack("F4", allowed=CUT | {"open"}, memory=400)
def ws_waiting(target: Target) -> None:
    """Memory that is bounded for one and not for all: on three connections a long answer, behind which 15 messages of
    8 MB wait, each with an emoji, which makes all of its characters four bytes."""
    first = {"type": "response.create", "model": "demo", "input": "a long story", "max_output_tokens": 3000}
    wait = '{"type":"response.create","model":"demo","input":"\U0001f600' + "a" * (8 * MB - 100) + '"}'
    data = frame(1, json.dumps(first).encode()) + frame(1, wait.encode()) * 15

    def once() -> None:
        with target.connect() as connection:
            view = memoryview(data)
            try:
                upgraded(connection)
                while view and target.left:
                    with contextlib.suppress(TimeoutError):
                        view = view[connection.send(view) :]
                time.sleep(target.left)
                target.statuses["open"] += 1
            except OSError:
                target.statuses["closed"] += 1

    _together([once] * 3)


# A key has half of `--max-held-mb`, 256 MiB, of messages that have not been parsed or whose requests wait, and each of
# the 60 connections may have one request of 7.8 MB at a model: measured +564 to +764 MiB in ten runs, of which malloc
# keeps a third for itself: +394 to +436 with MALLOC_MMAP_THRESHOLD_=4194304, which glibc raises on its own otherwise.
@attack("battery 2", allowed=CUT | {"open"}, memory=256 + 60 * 8)
def ws_crowd(target: Target) -> None:
    """Sixty connections of one key, each with messages of 7.8 MB as fast as they are taken: each is allowed."""
    ask = {"type": "response.create", "model": "demo", "max_output_tokens": 1, "input": "a " * int(3.9 * MB)}
    data = frame(1, json.dumps(ask).encode())

    def once(connection: socket.socket) -> None:
        view, peer = memoryview(data), upgraded(connection)
        while target.left:
            try:
                view = view[peer.send(view) :] or memoryview(data)
            except TimeoutError:
                continue
        target.statuses["open"] += 1

    _together([lambda: target.again(once)] * 60)


# ---- bodies and heads ------------------------------------------------------------------------------------------------

_POST = ("Content-Type: application/json",)


def _chunks(target: Target) -> None:
    def once(connection: socket.socket) -> None:
        connection.sendall(head(CHAT, None, *_POST, "Transfer-Encoding: chunked"))
        target.statuses[status_of(connection)] += 1
        target.flood(connection, b"1\r\n \r\n" * 20_000)

    target.again(once)


@attack("F3")
def chunks_1(target: Target) -> None:
    """A stranger without a key, whose request was refused, sends its body on in chunks of one byte."""
    _chunks(target)


@attack("F3")
def chunks_4(target: Target) -> None:
    """Four of them at a time."""
    _together([lambda: _chunks(target)] * 4)


@attack("F3", allowed=CUT | {"open"})
def drip(target: Target) -> None:
    """Slowness: 200 strangers send a byte of a head, or of the body of a refused request, four times a second."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(target.connect()) for _ in range(200)]
        for number, connection in enumerate(found):
            begin = head(CHAT, None, *_POST, "Content-Length: 100000")
            connection.sendall(begin if number % 2 else begin[:60])
        target.drip(found)


@attack("F3")
def huge_length(target: Target) -> None:
    """A stranger announces 100 GB behind a 401, and sends them."""

    def once(connection: socket.socket) -> None:
        connection.sendall(head(CHAT, None, *_POST, "Content-Length: 99999999999"))
        target.statuses[status_of(connection)] += 1
        target.flood(connection, bytes(MB))

    target.again(once)


def _without_ends(target: Target, count: int, begin: bytes, body: bytes) -> list[socket.socket]:
    """So many requests of alice's that lack their last bytes."""
    found = [target.connect() for _ in range(count)]
    for connection in found:
        connection.settimeout(SILENCE)
        with contextlib.suppress(OSError):  # it was refused, and its status is read later
            connection.sendall(begin + body)
    return found


@attack("F4", allowed=CUT | {"silent"}, memory=700)
def unfinished_bodies(target: Target) -> None:
    """120 bodies of 8 MB that lack their last bytes: each is within the limit, and all stay in memory."""
    size = 8 * MB
    begin = head(CHAT, "alice", *_POST, f"Content-Length: {size}")
    found = _without_ends(target, 120, begin, b'{"model":"' + b"a" * (size - 100))
    time.sleep(target.left)
    for connection in found:
        target.statuses[status_of(connection, 0.01)] += 1
        connection.close()


@attack("F9", allowed=CUT | {"silent"}, flags=("--files-max-mb", "8", "--file-max-mb", "4"))
def unfinished_uploads(target: Target) -> None:
    """Disk that is not counted: 30 uploads of 3.9 MB that lack their last bytes, where all files may have 8 MB."""
    body, kind = file_form(b" " * int(3.9 * MB))
    begin = head("/v1/files", "alice", f"Content-Type: {kind}", f"Content-Length: {len(body)}")
    found = _without_ends(target, 30, begin, body[:-20])
    time.sleep(min(1.0, target.left))
    held = sum(_deleted(target.pid)) / MB
    target.note = f"{held:.0f} MB of disk held"
    if held > 9:
        target.missed.append(f"{held:.0f} MB of unfinished uploads on the disk, 8 MB allowed")
    for connection in found:
        target.statuses[status_of(connection, 0.01)] += 1
        connection.close()


def _deleted(pid: int) -> Iterator[int]:
    """Bytes of each file without a name that a process has open."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder) if pid else ():
        with contextlib.suppress(OSError):
            if os.readlink(f"{folder}/{name}").endswith("(deleted)"):
                yield os.stat(f"{folder}/{name}").st_size


@attack("F7", allowed=CUT | {"200"})
def forms(target: Target) -> None:
    """A form's parser in the event loop: a part with a million headers, one header of 4 MB, a preamble of CRLF."""
    many, _ = form(b"a:b\r\n" * 1_000_000 + b"\r\nx")
    long, _ = form(b"a:" + b"b" * (4 * MB) + b"\r\n\r\nx")
    right, kind = file_form(b"{}\n")
    for body in itertools.cycle((many, long, b"\r\n" * (2 * MB) + right)):
        if not target.left:
            return
        target.ask("/v1/files", body, kind)


# Half of `--max-held-mb` as well; measured +281 MiB. Requests of the key that attacks wait for each other.
@attack("battery 2", allowed=ANSWERED | {"silent"}, memory=500)
def brackets(target: Target) -> None:
    """24 requests at a time with megabytes of escaped backslashes and brackets: in a message, a stop, an expression."""
    text = "\\[" * int(2.5 * MB)  # three bytes of JSON each
    bodies = [chat_body(text), chat_body("hi", stop=[text]), chat_body("hi", structured_outputs={"regex": text})]
    bodies.append(chat_body("hi", structured_outputs={"regex": text[:60_000]}))
    data = [json.dumps(body).encode() for body in bodies]

    def ask(first: int) -> None:
        for number in itertools.count(first):
            if not target.left:
                return
            target.ask(CHAT, data[number % len(data)])

    _together([functools.partial(ask, first) for first in range(24)])


FRAMES = {
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /health HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length with a sign": b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nabcde",
    "blank before colon": b"GET /health HTTP/1.1\r\nHost : a\r\n\r\n",
    "folded line": b"GET /health HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
}


@attack("N1", allowed=CUT)
def framing(target: Target) -> None:
    """Requests of which RFC 9112 says that they are refused, since two readers may cut them in two ways."""
    for name, data in FRAMES.items():
        with target.connect() as connection:
            connection.sendall(data)
            status = status_of(connection)
        target.statuses[status] += 1
        if status not in ("400", "closed", "505"):
            target.missed.append(f"{name}: {status}")


@attack("F19", allowed=CUT | {"open"}, descriptors=160)
def idle_strangers(target: Target) -> None:
    """Connections that say nothing, more than the server has descriptors."""
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            try:
                stack.enter_context(target.connect())
            except OSError:
                target.statuses["closed"] += 1
        time.sleep(target.left)
        target.statuses["open"] += 1


# ---- batches, adapters, nodes, pictures ------------------------------------------------------------------------------


def _uploaded(target: Target, key: str, data: bytes) -> str | None:
    """The id of a batch of the lines, or None."""
    body, kind = file_form(data)
    status, told = target.send("/v1/files", body, key, kind)
    if key == "alice":
        target.statuses[status] += 1
    if status != "200" or not told:
        return None
    batch = {"input_file_id": told["id"], "endpoint": CHAT, "completion_window": "24h"}
    status, told = target.send("/v1/batches", batch, key)
    if key == "alice":
        target.statuses[status] += 1
    return told["id"] if status == "200" and told else None


def _line(number: int, content: str) -> bytes:
    body = chat_body(content)
    return json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body}).encode() + b"\n"


def _batch(target: Target) -> bool:
    """A batch of one line, in a file of 1.5 MB, begins, and a chat is answered before batches that have begun.

    The line itself waits for those of other keys that have begun, which are half of the server's places at most. So the
    batch is cancelled then: files of batches that run fill the key's own half of the store.
    """
    until = time.monotonic() + SECONDS
    name = _uploaded(target, "bob", _line(0, "hi") + b"\n" * int(1.5 * MB))
    while name and time.monotonic() < until:
        _, told = target.send(f"/v1/batches/{name}", None, "bob")
        if told and told.get("status") in ("in_progress", "finalizing", "completed"):
            answered = _chat(target)
            target.send(f"/v1/batches/{name}/cancel", {}, "bob")
            return answered
        time.sleep(0.2)
    return False


@attack(
    "F8",
    allowed=ANSWERED,
    neighbour=_batch,
    flags=("--files-max-mb", "8", "--file-max-mb", "4"),
    memory=600,
)  # the memory is the cache of the long prompts
def batches(target: Target) -> None:
    """One key's batches before all others: four files that fill the store, each with 200 lines of 4,000 tokens."""
    for file in range(4):
        data = b"".join(_line(n, f"{file} {n}" + " a" * 4000) for n in range(200))
        _uploaded(target, "alice", data.ljust(int(1.94 * MB), b"\n"))
    time.sleep(target.left)


@attack("battery 2", allowed=ANSWERED | {"404", "409"})
def batch_cancels(target: Target) -> None:
    """Batches of lines of 0.9 MB that are cancelled as soon as they are created, again and again."""
    data = b"".join(_line(n, "a " * int(0.45 * MB)) for n in range(4))
    for number in itertools.count():
        if not target.left:
            return
        target.note = f"{number} batches"
        if name := _uploaded(target, "alice", data):
            target.ask(f"/v1/batches/{name}/cancel", {})


@attack(
    "F13",
    allowed=frozenset(("404", "502", "503", "504")),
    flags=(
        "--enable-lora",
        "--lora-resolver",
        "tar=http://127.0.0.1:{spare}/{name}.tar.gz",
        "--lora-fetch-timeout",
        str(FETCH),
    ),
)
def dripping_archive(target: Target) -> None:
    """A time limit that is looked at too rarely: an adapter's archive from a server that sends a byte and waits."""

    class Drip(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(60):
                self.wfile.write(b"a")
                time.sleep(0.5)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", target.spare), Drip) as source:
        source.daemon_threads, source.block_on_close = True, False
        threading.Thread(target=source.serve_forever, daemon=True).start()
        begun = time.monotonic()
        status, _ = target.send(CHAT, chat_body("hi") | {"model": "stranger"}, "alice", patience=FETCH + SILENCE)
        seconds = time.monotonic() - begun
        source.shutdown()
    target.statuses[status] += 1
    target.note = f"fetched for {seconds:.1f} s"
    if seconds > FETCH + 4:
        target.missed.append(f"a fetch of {FETCH} s went on for {seconds:.1f} s")


@attack("F11", server=False)
def door_of_nodes(target: Target) -> None:
    """64 strangers at the door of the nodes, each a byte every second: a rank with the key has to come in all the same.
    It is the library's door, in this process: no server with several nodes is needed for it."""
    from candle_vllm.core.engine.ranks.nodes import Invitation, RankListener, _connect

    key = "a key that all of the nodes know"
    door = RankListener("127.0.0.1", 0, key, range(1, 2), 2, 2)
    invitation = Invitation(door.host, door.port, key, 1, 2, 2, {}, (20, "text"))
    strangers = [socket.create_connection((door.host, door.port), 5) for _ in range(64)]
    for stranger in strangers:
        stranger.sendall(struct.pack("<H", 1024))
    dripping = Target(("", 0), target.left + SILENCE)
    threading.Thread(target=lambda: dripping.drip(strangers, pause=1.0), daemon=True).start()
    joined, begun = threading.Event(), time.monotonic()
    threading.Thread(target=lambda: (_connect(invitation, side=False), joined.set()), daemon=True).start()
    there = joined.wait(target.left + SILENCE)
    target.note = f"joined in {time.monotonic() - begun:.1f} s" if there else ""
    if not there:
        target.missed.append(f"a rank with the key did not join in {time.monotonic() - begun:.0f} s")
    door.close()


def _picture(target: Target, data: bytes) -> None:
    """Decodes a picture as a request's would be, and holds it to `CPU` seconds and to silence."""
    from candle_vllm.core.errors import InvalidParameterError
    from candle_vllm.core.vision.pictures import decode_picture

    begun = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            decode_picture(data)
            target.statuses["200"] += 1
        except InvalidParameterError:
            target.statuses["400"] += 1
    if said:
        target.missed.append(f"{len(said)} warnings on standard error")
    cpu = time.process_time() - begun
    target.note = f"{len(data) / MB:.1f} MB, {cpu:.1f} s of CPU"
    if cpu > CPU:
        target.missed.append(f"a picture of {len(data) / MB:.1f} MB took {cpu:.1f} s of CPU")


@attack("F5", allowed=ANSWERED, memory=500, server=False)
def jpeg_scans(target: Target) -> None:
    """Work out of proportion to bytes: a progressive JPEG of 8192 x 8192 with 1,000 scans that change nothing, decoded
    in this process: no model that sees is needed for it."""
    import PIL.Image

    plain = io.BytesIO()
    PIL.Image.new("L", (8192, 8192)).save(plain, "JPEG", progressive=True)
    table = (
        b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1]) + bytes(15) + b"\xe0"
    )  # one code: the end of 2^14 blocks
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 63, 0) + bytes(120)
    _picture(target, plain.getvalue()[:-2] + table + scan * 1000 + b"\xff\xd9")


@attack("F6", allowed=ANSWERED, memory=300, server=False)
def exif(target: Target) -> None:
    """Memory out of proportion to bytes: a PNG of one pixel whose metadata name the same 900,000 bytes 4,000 times,
    and lines of the log: Pillow 13 says of each that it is skipped."""
    import PIL.Image

    plain = io.BytesIO()
    PIL.Image.new("L", (1, 1)).save(plain, "PNG")
    entries = b"".join(struct.pack("<HHII", 1000 + n, 7, 900_000, 8 + 2 + 12 * 4000 + 4) for n in range(4000))
    data = b"eXIf" + b"II*\0" + struct.pack("<IH", 8, 4000) + entries + bytes(4) + bytes(900_000)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    at = plain.getvalue().index(b"IDAT") - 4
    _picture(target, plain.getvalue()[:at] + chunk + plain.getvalue()[at:])


def _together(works: list[Callable[[], None]]) -> None:
    """All of them at a time, in threads."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Runs one attack."""
    port, pid, spare = (int(sys.argv[place]) for place in (2, 4, 5))
    target = Target(("127.0.0.1", port), float(sys.argv[3]), pid, spare)
    next(each for each in ATTACKS if each.name == sys.argv[1]).run(target)
    print(json.dumps({"statuses": target.statuses, "missed": target.missed, "note": target.note}), flush=True)
    os._exit(0)  # threads that still drip


if __name__ == "__main__":
    main()
