# SPDX-License-Identifier: MIT
"""The client that the MCP conformance suite judges: `McpLink`.

It connects to a server, lists the tools, and calls what the scenario's server waits for.

    python client.py SOCKET

makes one, a process of its own, for each `relay.py` that asks for it: what is imported takes longer than a scenario.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from candle_vllm.responses.mcp.link import LinkTool, McpLink
from candle_vllm.responses.mcp.server_config import McpServerConfig
from candle_vllm.responses.mcp.server_values import OAuthClient
from candle_vllm.responses.tools.tool import ToolError

LONGEST = 60  # seconds


def configuration(url: str, context: dict[str, Any]) -> McpServerConfig:
    """The server; with the credentials of an OAuth client where the scenario has them."""
    auth = None
    if "client_secret" in context:
        auth = OAuthClient(client_id=context["client_id"], client_secret=context["client_secret"])
    return McpServerConfig(name="conformance", url=url, auth=auth, timeout=20.0, connect_timeout=15.0)


def arguments_for(schema: dict[str, Any]) -> dict[str, Any]:
    """Arguments that fit a tool's schema: a value for everything that is required."""
    values: dict[str, Any] = {"string": "text", "number": 2, "integer": 2, "boolean": True, "array": [], "object": {}}
    required = schema.get("required", ())
    return {name: values.get(schema["properties"][name].get("type"), "text") for name in required}


def calls(link: McpLink, context: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The calls that the scenario asks for by name, or one of each tool."""
    if "toolCalls" in context:
        return [(call["name"], call["arguments"]) for call in context["toolCalls"]]
    if "json_schema_echo" in link.tools:  # wants to see what a model would see of the other tool
        seen = LinkTool(link, link.tools["json_schema_2020_12_tool"]).definition.parameters
        return [("json_schema_echo", {"schema": dict(seen)})]
    return [(name, arguments_for(tool.input_schema)) for name, tool in link.tools.items()]


async def play(address: str, environment: dict[str, str]) -> None:
    """Plays one scenario; what a tool or its server says is no failure of the client."""
    context = json.loads(environment.get("MCP_CONFORMANCE_CONTEXT", "{}"))
    async with McpLink(configuration(address, context)) as link:
        print("tools:", *link.tools)
        for name, arguments in calls(link, context):
            try:
                output = await link.call(name, arguments)
                print(f"{name}{arguments}: {str(output)[:500]}")
            except ToolError as error:
                print(f"{name}{arguments}: {error}")


def answer(relay: socket.socket) -> NoReturn:
    """Ends this process when its scenario has ended; what it prints goes where the relay's would go."""
    signal.alarm(LONGEST)
    said, outputs, _, _ = socket.recv_fds(relay, 1 << 16, 2)
    while not said.endswith(b"\n"):
        said += relay.recv(1 << 16)
    for output, number in zip(outputs, (1, 2), strict=True):
        os.dup2(output, number)
    status = 1
    try:
        asyncio.run(play(**json.loads(said)))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    relay.sendall(bytes([status]))
    os._exit(status)


def main() -> None:
    """Listens until it is killed."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        print("listening", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            relay, _ = listener.accept()
            with relay:
                if os.fork() == 0:
                    answer(relay)


if __name__ == "__main__":
    main()
