# SPDX-License-Identifier: MIT
"""Answers recorded from one revision and compared with those of another, byte for byte.

    python benchmarks/serve/recorded.py record BEFORE.jsonl [--checkout FOLDER]
    python benchmarks/serve/recorded.py compare BEFORE.jsonl AFTER.jsonl

`record` starts three servers of the checkout, each with its own environment's Python: one with the demo model, one
whose answers are a script (calls of tools, thoughts), and one with a script and the tools of an MCP server. It sends
every request below, whole and streamed, all rows of wrong requests that the tests know, reads the pages that answer
GET, runs the command's `--help` and `config`, and writes a line of JSON for each: request, status, headers that mean
something, and the body. Ids, times and addresses are replaced by their kind, each id by the number of its first place
in the answer, so that references stay.

`compare` prints what differs; its exit status is the number of differences, at most 100. The servers' seed makes
texts repeat, on one machine: two machines may round otherwise.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from recorded_requests import MCP_SCRIPT, OTHERS, PAGES, SCRIPT, acting, right

HERE = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
LONGEST = 60.0  # seconds for one answer
HEADERS = ("content-type", "allow", "retry-after", "www-authenticate", "location", "cache-control", "deprecation")
IDS = re.compile(
    r"\b(chatcmpl|cmpl|call|msg|resp|rs|fc|ctc|conv|mcp\w*|req|toolu|embd|item|score|rerank|tokens?)([-_])[0-9A-Za-z]{8,}"
)
HEX = re.compile(r"\b[0-9a-f]{32}\b|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
TIMES = re.compile(
    r'"(created|(?:created|completed|started|finished|updated|expires|loaded|last_used)(?:_at)?|(?:uptime|load|idle)\w*|\w+_time_costs|seconds)"'
    r": ?[0-9.]+"
)
DATED = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[0-9.:+Z]*")
LOCAL = re.compile(r"(127\.0\.0\.1|localhost):\d+")


def wrong(checkout: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every row of wrong requests that the tests of a checkout know, for the scripted model, whose limits they mean."""
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from packages.server.tests.wrong_requests import generating, others, responses\n"
        "from packages.server.tests.wrong_requests.rows import changed\n"
        "for module in (generating, others, responses):\n"
        "    for route in module.ROUTES:\n"
        "        for row in route.rows:\n"
        "            print(json.dumps([route.path, changed(route.right, row)]))\n"
    )
    command = [python(checkout), "-c", program, str(checkout)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in out.stdout.splitlines():
        path, body = json.loads(line)
        yield "script", path, body


def python(checkout: Path) -> Path:
    """A checkout's own Python."""
    return checkout / ".venv/bin/python"


@contextmanager
def server(checkout: Path, folder: Path, *command: str) -> Iterator[str]:
    """A server of the checkout in a folder of its own; gives its address."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CANDLE_VLLM_", "HF_"))}
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    kept |= {"HOME": str(folder), "XDG_CACHE_HOME": cache, "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [python(checkout), *command, "--p", "0", "--mailbox", f"sqlite:///{folder}/mailbox.db"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=kept,
        )
    try:
        assert process.stdout is not None
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        lines = iter(process.stdout.readline, "")
        address = next((line.split()[1] for line in lines if line.startswith("address")), "")
        timer.cancel()
        if not address:
            raise RuntimeError((folder / "log").read_text())
        yield address
    finally:
        process.terminate()
        process.wait(60)


def cleaned(text: str) -> str:
    """Without ids, times and addresses."""
    seen: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        kind = f"{found[1]}{found[2]}" if found.re is IDS else "hex-"
        return seen.setdefault(found[0], f"{kind}#{len(seen)}")

    text = HEX.sub(numbered, IDS.sub(numbered, text))
    text = TIMES.sub(r'"\1": 0', text)
    return LOCAL.sub(r"\1:0", DATED.sub("<time>", text))


def shown(path: str, body: str) -> str:
    """What of a body is compared: of metrics, names, helps and labels without their values."""
    if path == "/metrics":
        return "\n".join(re.sub(r" [0-9.e+-]+$|NaN$", "", line) for line in body.splitlines() if "_bucket" not in line)
    if path == "/v1/usage" or path == "/v1/models/status":
        return re.sub(r"\b[0-9][0-9.e+-]*\b", "0", cleaned(body))
    return cleaned(body)


def recorded(client: httpx.Client, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """One request and its answer."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "anthropic-version": "2023-06-01"} if content else {}
    try:
        answer = client.request(method, path, content=content, headers=headers)
    except httpx.HTTPError as error:
        return {"status": 0, "headers": {}, "body": type(error).__name__}
    kept = {name: answer.headers[name] for name in HEADERS if name in answer.headers}
    return {"status": answer.status_code, "headers": kept, "body": shown(path, answer.text)}


def ready(client: httpx.Client) -> None:
    """Waits until the MCP server of a server is connected."""
    end = time.monotonic() + PATIENCE
    while client.get("/v1/mcp/servers").json()["data"][0]["state"] != "ready":
        if time.monotonic() > end:
            raise RuntimeError("the MCP server did not come up")
        time.sleep(0.05)


def streamed(path: str, body: Any) -> dict[str, Any] | None:
    """The same request as a stream; None where there is none."""
    if not isinstance(body, dict) or "stream" in body or not path.endswith(("completions", "messages", "responses")):
        return None
    more = copy.deepcopy(body) | {"stream": True}
    if path.endswith("completions"):
        more["stream_options"] = {"include_usage": True}
    return more


def record(checkout: Path, out: Path) -> int:
    """Records everything; gives how many answers."""
    lines: list[str] = []

    def keep(who: str, method: str, path: str, body: Any, answer: Mapping[str, Any]) -> None:
        lines.append(json.dumps({"request": [who, method, path, body], **answer}, ensure_ascii=False))

    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home, name) for name in ("model", "script", "mcp")]
        for folder in folders:
            folder.mkdir()
        options = {"engine": {"chat_template": "{{ messages }}{{ tools }}<tool_call>"}, "isolated": False}
        for folder, answers in zip(folders[1:], (SCRIPT, MCP_SCRIPT)):
            (folder / "script.json").write_text(json.dumps({"answers": answers, **options}))
        program = str(checkout / "packages/responses/tests/mcp/scripted_stdio.py")
        words = {"command": str(python(checkout)), "args": ["-S", program, "plain"], "auto_approve": ["echo"]}
        (folders[2] / "mcp.json").write_text(json.dumps({"mcpServers": {"words": words}}))
        scripted = str(checkout / "tests/scripted_program.py")
        served = ("-m", "candle_vllm.server.cli", "--mem", "128", "--seed", "1")
        plain = ("--speculative-config", '{"method": "none"}')  # drafts rest by the time they take: events vary
        parsers = ("--served-model-name", "default", "--tool-parser", "hermes", "--reasoning-parser", "think")
        for words in (
            ["--help"],
            ["--version"],
            ["config"],
            ["bench", "--help"],
            ["agent", "--help"],
            ["chat", "--help"],
        ):
            done = subprocess.run(
                [checkout / ".venv/bin/candle-vllm", *words], capture_output=True, text=True, cwd=home,
                env={**os.environ, "HOME": home, "COLUMNS": "100"}, check=False,
            )  # fmt: skip
            text = (done.stdout + done.stderr).replace(home, "<home>").replace(str(checkout), "<checkout>")
            keep("command", " ".join(words), "", None, {"status": done.returncode, "headers": {}, "body": text})
        with (
            server(checkout, folders[0], *served, *plain, "--served-model-name", "default") as model,
            server(checkout, folders[1], scripted, *parsers) as script,
            server(checkout, folders[2], scripted, *parsers, "--mcp-execute", "--api-key", "key") as mcp,
            httpx.Client(base_url=model, timeout=LONGEST, trust_env=False) as to_model,
            httpx.Client(base_url=script, timeout=LONGEST, trust_env=False) as to_script,
            httpx.Client(
                base_url=mcp, timeout=LONGEST, trust_env=False, headers={"authorization": "Bearer key"}
            ) as to_mcp,
        ):
            clients = {"model": to_model, "script": to_script, "mcp": to_mcp}
            ready(to_mcp)
            for page in ("/v1/mcp/servers", "/v1/mcp/tools"):
                keep("mcp", "GET", page, None, recorded(to_mcp, "GET", page))
            for page in PAGES:
                for method in ("GET", "DELETE"):
                    keep("model", method, page, None, recorded(to_model, method, page))
            for path, body in OTHERS:
                keep("model", "POST", path, body, recorded(to_model, "POST", path, body))
            for who, path, body in (*right(), *acting(), *wrong(checkout)):
                keep(who, "POST", path, body, recorded(clients[who], "POST", path, body))
                if (more := streamed(path, body)) is not None:
                    keep(who, "POST", path, more, recorded(clients[who], "POST", path, more))
            for page in PAGES:
                keep("model", "GET after all", page, None, recorded(to_model, "GET", page))
    out.write_text("\n".join(lines) + "\n")
    return len(lines)


def compare(before: Path, after: Path) -> int:
    """Prints what differs; gives how much."""
    sides = [
        {json.dumps(line["request"]): ordered(line) for line in map(json.loads, path.read_text().splitlines())}
        for path in (before, after)
    ]
    wrong_ones = 0
    for key in sides[0] | sides[1]:
        first, second = (side.get(key) for side in sides)
        if first == second:
            continue
        wrong_ones += 1
        print("---", key[:300])
        for part in ("status", "headers", "body"):
            one, two = (json.dumps(side and side[part], ensure_ascii=False) for side in (first, second))
            if one != two:
                print("\n".join(changes(one, two)))
    print(f"{len(sides[0])} answers before, {len(sides[1])} after, {wrong_ones} differ")
    return min(wrong_ones, 100)


def ordered(line: dict[str, Any]) -> dict[str, Any]:
    """An answer whose streamed choices come one after the other: which one is first in a step is not promised."""
    if line["body"].startswith("data: ") and '"choices"' in line["body"]:
        events = line["body"].split("\n\n")
        choice = [re.search(r'"choices": ?\[\{"index": ?(\d+)', event) for event in events]
        places = sorted(range(len(events)), key=lambda place: int(found[1]) if (found := choice[place]) else 1 << 30)
        line["body"] = "\n\n".join(events[place] for place in places)
    return line


def changes(one: str, two: str, around: int = 60) -> Sequence[str]:
    """The first places where two texts differ."""
    found = [
        tag
        for tag in difflib.SequenceMatcher(None, one[:20_000], two[:20_000], autojunk=True).get_opcodes()
        if tag[0] != "equal"
    ]
    return [
        f"  - {one[max(0, a - around) : b + around]}\n  + {two[max(0, c - around) : d + around]}"
        for _, a, b, c, d in found[:3]
    ]


def main() -> int:
    """Runs what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--checkout", type=Path, default=HERE)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after)
    print(record(given.checkout.resolve(), given.out), "answers recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
