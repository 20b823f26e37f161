# SPDX-License-Identifier: MIT
"""An MCP server on stdio in plain Python that behaves as its first argument says; the second is a file of its notes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MODE = sys.argv[1]
NOTES = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(os.devnull)
MEGA = 1 << 20


def tool(name: str, **fields: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}}
    return {"name": name, "description": "Says it again", "inputSchema": schema, **fields}


class Server:
    def __init__(self) -> None:
        self.tools = [tool("echo", annotations={"readOnlyHint": True}), tool("say more")]
        self.waiting: dict[Any, Any] = {}
        self.failures = 0
        if MODE == "lies":
            self.tools = [tool("echo", outputSchema={"type": "object", "properties": {"n": {"type": "integer"}}})]
        if MODE == "bad-parts":
            self.tools = [tool("echo"), tool("bad", inputSchema={"type": "string"}), {"name": "bare"}]
        if MODE == "forgets" and NOTES.read_text().count("process ") > 1:
            self.tools = []
        if MODE == "tasks":
            self.tools = [tool("slow", execution={"taskSupport": "required"}), tool("echo")]
        if MODE == "twice":
            self.tools = [tool("echo"), tool("echo"), tool("other")]

    def send(self, **message: Any) -> None:
        self.write(json.dumps({"jsonrpc": "2.0", **message}))

    def write(self, line: str) -> None:
        if MODE == "batch":
            notice = '{"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "\u00e9"}}'
            line = f"[1, {f'{notice}, ' * 1000}{line}]"
        sys.stdout.buffer.write(
            (line + "\n").encode("latin-1" if MODE == "batch" else "utf-8")
        )  # its notices are not UTF-8
        sys.stdout.flush()

    def text(self, request: Any, text: str, **fields: Any) -> None:
        self.send(id=request, result={"content": [{"type": "text", "text": text}], **fields})

    def serve(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if MODE == "rubbish":
                self.write("Listening...\n\x1b[31m{ no json\n[]\n" + '{"jsonrpc": "2.0", "id": {}, "result": 3}')
            getattr(self, "on_" + message.get("method", "answer").replace("/", "_"), self.on_other)(message)

    def on_server_discover(self, message: dict[str, Any]) -> None:
        with NOTES.open("a") as notes:
            notes.write("asked in the newer era's way\n")
        if MODE == "ends-at-discover":  # as servers of the Rust SDK do
            print("Error: expect initialized request", file=sys.stderr, flush=True)
            sys.exit(1)
        self.on_other(message)

    def on_other(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self.send(id=message["id"], error={"code": -32601, "message": "Method not found"})

    def on_initialize(self, message: dict[str, Any]) -> None:
        result = {
            "protocolVersion": message["params"]["protocolVersion"],
            "capabilities": {"tools": {"listChanged": True}},
            "serverInfo": {"name": "scripted", "version": "1"},
            "instructions": "Be kind.",
        }
        self.send(id=message["id"], result=result)

    def on_notifications_cancelled(self, message: dict[str, Any]) -> None:
        with NOTES.open("a") as notes:
            notes.write(f"cancelled {message['params']['requestId']}\n")

    def on_answer(self, message: dict[str, Any]) -> None:
        """An answer to a request of ours."""
        request = self.waiting.pop(message["id"])
        self.text(request, json.dumps(message.get("error") or message.get("result")))

    def on_tools_list(self, message: dict[str, Any]) -> None:
        cursor = (message.get("params") or {}).get("cursor")
        number = int(cursor or 0)
        if MODE == "silent-list":
            return
        if MODE == "renames" and self.failures:
            self.failures -= 1
            self.send(id=message["id"], error={"code": -32000, "message": "not now"})
            return
        if MODE == "circle":
            self.send(id=message["id"], result={"tools": [tool(f"t{number}")], "nextCursor": str((number + 1) % 3)})
        elif MODE == "pages":
            self.send(id=message["id"], result={"tools": [tool(f"t{number}")], "nextCursor": str(number + 1)})
        elif MODE == "many":
            tools = [tool(f"t{number}-{index}") for index in range(300)]
            self.send(id=message["id"], result={"tools": tools, "nextCursor": str(number + 1)})
        elif MODE == "big-list":
            tools = [tool(f"t{index}", description="x" * MEGA) for index in range(8)]
            self.send(id=message["id"], result={"tools": tools})
        elif MODE == "bad-parts":
            self.send(id=message["id"], result={"tools": self.tools, "nextCursor": "", "_meta": []})
        else:
            self.send(id=message["id"], result={"tools": self.tools})

    def on_tools_call(self, message: dict[str, Any]) -> None:
        request, arguments = message["id"], message["params"].get("arguments") or {}
        with NOTES.open("a") as notes:
            notes.write(f"called {message['params']['name']}\n")
        handler = getattr(self, "call_" + MODE.replace("-", "_"), None)
        if handler is None:
            self.text(request, str(arguments.get("text", "")))
        else:
            handler(request, message)

    def call_exit_in_call(self, request: Any, message: dict[str, Any]) -> None:
        print("out of cheese", file=sys.stderr, flush=True)
        os._exit(7)

    call_children_exit = call_forgets = call_exit_in_call

    def call_hang(self, request: Any, message: dict[str, Any]) -> None:
        """No answer, but it reads on; with the text "fine" it answers."""
        if (message["params"].get("arguments") or {}).get("text") == "fine":
            self.text(request, "fine")

    def call_deaf(self, request: Any, message: dict[str, Any]) -> None:
        time.sleep(1000)

    def call_huge(self, request: Any, message: dict[str, Any]) -> None:
        self.text(request, "x" * 11 * MEGA if message["params"]["arguments"]["text"] == "huge" else "small")

    def call_line(self, request: Any, message: dict[str, Any]) -> None:
        """The line that the arguments have in hexadecimal digits, with the id of the request in it."""
        line = bytes.fromhex(message["params"]["arguments"]["text"]).replace(b"ID", str(request).encode())
        sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()

    def call_huge_id_last(self, request: Any, message: dict[str, Any]) -> None:
        content = [{"type": "text", "text": "x" * 11 * MEGA}]
        self.write(json.dumps({"result": {"id": 99, "content": content}, "jsonrpc": "2.0", "id": request}))

    def call_huge_other(self, request: Any, message: dict[str, Any]) -> None:
        params = {"level": "info", "data": "x" * 11 * MEGA}
        self.send(method="notifications/message", params=params)

    def call_huge_question(self, request: Any, message: dict[str, Any]) -> None:
        self.send(id=request, method="sampling/createMessage", params={"data": "x" * 11 * MEGA})

    def call_huge_no_id(self, request: Any, message: dict[str, Any]) -> None:
        self.write('{"jsonrpc":"2.0","id":007,"result":"' + "x" * 11 * MEGA + '"}')

    def call_endless_line(self, request: Any, message: dict[str, Any]) -> None:
        while True:
            sys.stdout.write("x" * MEGA)

    def call_only_rubbish(self, request: Any, message: dict[str, Any]) -> None:
        while True:
            self.write("rubbish")

    def call_bad_parts(self, request: Any, message: dict[str, Any]) -> None:
        content = [{"type": "video", "data": "x"}, {"type": "text", "text": "the text"}]
        fields = json.loads((message["params"].get("arguments") or {}).get("text", "{}"))
        self.send(id=request, result={"content": content} | fields)

    def call_lies(self, request: Any, message: dict[str, Any]) -> None:
        text = message["params"]["arguments"]["text"]
        if text == "nothing":
            self.text(request, "no structure")
        else:
            self.text(request, "the text", structuredContent={"n": 3 if text == "truth" else "three"})

    def call_renames(self, request: Any, message: dict[str, Any]) -> None:
        self.tools = [tool("renamed")]
        self.failures = int((message["params"].get("arguments") or {}).get("text", 0))
        for _ in range(50):
            self.send(method="notifications/tools/list_changed")
        self.text(request, "done")

    def call_sampling(self, request: Any, message: dict[str, Any]) -> None:
        method, params = {
            "sampling": ("sampling/createMessage", {"messages": [], "maxTokens": 3}),
            "elicitation": ("elicitation/create", {"message": "Your password?", "requestedSchema": {
                "type": "object", "properties": {"password": {"type": "string"}}}}),
            "roots": ("roots/list", {}),
            "unknown": ("nobody/knows", {}),
        }[message["params"]["arguments"]["text"]]  # fmt: skip
        self.waiting["ask"] = request
        self.send(id="ask", method=method, params=params)

    def call_bad_result(self, request: Any, message: dict[str, Any]) -> None:
        self.send(id=request, result={"content": 5})

    def call_error(self, request: Any, message: dict[str, Any]) -> None:
        self.send(id=request, error={"code": -32000, "message": f"no, {os.environ.get('TOKEN')} " + "x" * 100_000})

    def call_progress(self, request: Any, message: dict[str, Any]) -> None:
        token = message["params"]["_meta"]["progressToken"]
        for done in range(5):
            params = {"progressToken": token, "progress": done, "total": 5, "message": f"step {done}"}
            self.send(method="notifications/progress", params=params)
        self.text(request, "done")

    def call_content(self, request: Any, message: dict[str, Any]) -> None:
        content = [
            {"type": "text", "text": "a text"},
            {"type": "image", "data": "aW1n", "mimeType": "image/png"},
            {"type": "audio", "data": "YXVk", "mimeType": "audio/wav"},
            {"type": "resource_link", "uri": "file:///a", "name": "a", "description": "an a", "mimeType": "text/plain"},
            {"type": "resource", "resource": {"uri": "file:///t", "mimeType": "text/plain", "text": "inside"}},
            {"type": "resource", "resource": {"uri": "file:///b", "mimeType": "x/y", "blob": "Ymxi"}},
        ]
        self.send(id=request, result={"content": content, "structuredContent": {"n": 1}, "isError": True})

    def call_environment(self, request: Any, message: dict[str, Any]) -> None:
        self.text(request, json.dumps({"environment": dict(os.environ), "folder": os.getcwd()}))


def flood(descriptor: int, piece: bytes) -> None:
    while True:
        os.write(descriptor, piece)


def begin() -> None:
    with NOTES.open("a") as notes:
        notes.write(f"process {os.getpid()}\n")
    if MODE == "exit":
        print("no licence for top-secret", file=sys.stderr, flush=True)
        sys.exit(3)
    if MODE == "silent":
        time.sleep(1000)
    if MODE in ("children", "children-exit", "children-silent", "stubborn"):
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
        child = subprocess.Popen([sys.executable, "-c", stubborn])  # it holds our pipes
        with NOTES.open("a") as notes:
            notes.write(f"process {child.pid}\n")
    if MODE == "children-silent":
        time.sleep(1000)
    if MODE == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if MODE == "words":
        for index in range(3000):
            print(f"{index} \x1b[1m" + "w" * 5000, file=sys.stderr)
        sys.stderr.write("the last words of top-secret")
        sys.stderr.flush()
    if MODE == "blank-lines":
        threading.Thread(target=flood, args=(1, b"\n" * 65536), daemon=True).start()
    if MODE == "chatter":
        threading.Thread(target=flood, args=(2, b"w\n" * 32768), daemon=True).start()
    if MODE == "only-rubbish-at-start":
        while True:
            print("rubbish")


begin()
Server().serve()
if MODE == "stubborn":
    time.sleep(1000)
