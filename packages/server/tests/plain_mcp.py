# SPDX-License-Identifier: MIT
"""An MCP server on stdio in plain Python: it starts immediately, while importing the SDK takes 1.3 s of CPU.

Run as `python -S plain_mcp.py FILE TOOL ...`: it writes its process id into FILE, and offers the tools of `TOOLS` that
are named.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_NUMBER, _TEXT = {"type": "integer"}, {"type": "string"}
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "double": ("Doubles a number.", {"n": _NUMBER}),
    "hang": ("Sleeps, and does not notice that its standard input ends.", {}),
    "die": ("Ends the program.", {}),
    "write_file": ("Writes a file.", {"path": _TEXT, "content": _TEXT}),
}


def call(name: str, arguments: dict[str, Any]) -> str:
    """Return the result text of a tool."""
    if name == "die":
        os._exit(1)
    if name == "hang":
        time.sleep(60)
    if name == "write_file":
        with open(arguments["path"], "w") as file:
            file.write(arguments["content"])
        return "written"
    return str(2 * arguments["n"])


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a request; None for an unknown method."""
    if method == "initialize":
        server = {"name": "numbers", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": server}
    if method == "ping":
        return {}
    if method == "tools/list":
        return {
            "tools": [
                {
                    "name": name,
                    "description": description,
                    "inputSchema": {"type": "object", "properties": properties, "required": list(properties)},
                }
                for name, (description, properties) in TOOLS.items()
                if name in sys.argv[2:]
            ]
        }
    if method == "tools/call":
        return {"content": [{"type": "text", "text": call(params["name"], params.get("arguments") or {})}]}
    return None


def main() -> None:
    """Answer requests until standard input ends."""
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or "method" not in message:
            continue
        result = answer(message["method"], message.get("params") or {})
        missing = {"error": {"code": -32601, "message": "Method not found"}}
        said = {"jsonrpc": "2.0", "id": message["id"], **(missing if result is None else {"result": result})}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
