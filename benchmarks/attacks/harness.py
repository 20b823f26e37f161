# SPDX-License-Identifier: MIT
"""Attacks on a server, one after the other, and whether everybody else is still answered.

    python -m benchmarks.attacks [NAME ...] [--seconds 5] [--bar 0.5] [--out FILE.json] [--rank] [--list]

Each attack (`attacks.py`) has a server of its own, with the demo model and keys of alice and bob, on loopback. While
alice or a stranger attacks it from a second process, a third one asks `/health` twenty times a second, and bob wants
short answers before, during and after. A row misses where the slowest `/health` passes the bar or one has no answer,
where a neighbour is not answered in time, where the attack's answers are other than they should be, where the memory
grows beyond the attack's bound, where the server ends, or where a bar of the attack's own is missed. `idle` is the
slowest `/health` before the attack: on a machine that does other work it says how much of the figure is the machine's.
`--rank` puts the slowest first. The exit status is 1 when a row misses.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.attacks.attacks import ATTACKS, Attack
from benchmarks.attacks.wire import KEYS, SILENCE, Target
from tests.live_server import COMMAND, ServerProcess
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 5.0  # before a server that does not end is killed
GRACE = 60.0  # seconds behind its time that an attack may take, its last answer and its checks included
IDLE = 2.0  # seconds of the baseline


@contextlib.contextmanager
def process(module: str, *words: object, nice: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A module of this folder as a process that ends with the block."""
    command = ["nice", "-n", str(nice), sys.executable, "-m", f"benchmarks.attacks.{module}", *map(str, words)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as made:
        try:
            yield made
        finally:
            made.kill()


@contextlib.contextmanager
def server(attack: Attack, spare: int) -> Iterator[ServerProcess]:
    """`candle-vllm` with what the attack wants; ended by force where it hangs."""
    command = ("sh", "-c", 'ulimit -n "$0"; exec "$@"', str(attack.descriptors), COMMAND)
    flags = [flag.replace("{spare}", str(spare)) for flag in attack.flags]
    flags += ["--m", "demo", "--mem", "256", "--served-model-name", "demo", "--api-keys-file", "keys.yaml"]
    with tempfile.TemporaryDirectory() as home:
        keys = "\n".join(f"  - {{name: {name}, key: {key}}}" for name, key in KEYS.items())
        Path(home, "keys.yaml").write_text(f"keys:\n{keys}\n")
        made = ServerProcess(Path(home), *flags, command=command if attack.descriptors else (COMMAND,))
        try:
            yield made
        finally:
            made.terminate()
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                psutil.Process(made.pid).wait(END_SECONDS)
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(made.pid).kill()
            made.stop()


class Repeated(threading.Thread):
    """Asks for a value again and again, in a thread that begins at once, until `over` is set."""

    def __init__(self, ask: Callable[[], Any], pause: float) -> None:
        super().__init__(daemon=True)
        self._ask, self._pause = ask, pause
        self.values, self.over = [ask()], threading.Event()
        self.start()

    def run(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not self.over.wait(self._pause):
                self.values.append(self._ask())


def resident(pid: int) -> Repeated:
    """MiB of a process's memory, twenty times a second."""
    return Repeated(lambda: psutil.Process(pid).memory_info().rss / (1 << 20), 0.05)


def attacked(attack: Attack, port: int, pid: int, spare: int, seconds: float) -> dict[str, Any]:
    """Runs an attack in a process of its own, with a lower priority, as attackers have machines of their own.

    Returns:
        What it notes, and `memory`, the most MiB that it had.
    """
    with process("attacks", attack.name, port, seconds, pid, spare, nice=10 if attack.server else 0) as made:
        memory = resident(made.pid)
        found = {"statuses": {}, "missed": ["the attack failed or did not end"], "note": ""}
        with contextlib.suppress(subprocess.TimeoutExpired):
            text, _ = made.communicate(timeout=seconds + GRACE)
            found = json.loads(text) if text else found
        memory.over.set()
        return found | {"memory": max(memory.values)}


def against(attack: Attack, address: tuple[str, int], pid: int, seconds: float, spare: int = 0) -> dict[str, Any]:
    """What an attack does to a server: a row, without a judgement."""

    def neighbour() -> float | None:
        """Seconds within which it was answered; None where it was not, or too late."""
        begun = time.monotonic()
        good = attack.neighbour(Target(address))
        took = time.monotonic() - begun
        return round(took, 2) if good and took <= attack.patience else None

    with process("watch", *address) as watch:
        before = neighbour()
        seen(watch)
        time.sleep(min(IDLE, seconds))
        idle, memory, during = seen(watch), resident(pid), Repeated(neighbour, 0.2)
        row = attacked(attack, address[1], pid, spare, seconds)
        during.over.set()
        during.join(attack.patience + SILENCE)
        times = {"before": before, "during": list(during.values), "after": neighbour()}
        memory.over.set()
        grown, most = max(memory.values) - memory.values[0], max(memory.values)
        return row | {"health": seen(watch), "idle": idle, "memory": grown, "resident": most, "neighbour": times}


def seen(watch: subprocess.Popen[str]) -> dict[str, Any]:
    """What the watch saw since it was asked last."""
    assert watch.stdin is not None
    assert watch.stdout is not None
    watch.stdin.write("\n")
    watch.stdin.flush()
    return json.loads(watch.stdout.readline())


def judged(attack: Attack, row: dict[str, Any], bar: float) -> dict[str, Any]:
    """The row with its name, and with every bar that it misses in `missed`."""
    missed = list(row["missed"])
    if health := row.get("health"):
        if health["slowest"] > bar:
            missed.append(f"/health took {health['slowest']:.2f} s")
        if health["failed"] or not health["answers"]:
            missed.append(f"{health['failed']} of /health without an answer")
        times = [row["neighbour"]["before"], *row["neighbour"]["during"], row["neighbour"]["after"]]
        if None in times:
            missed.append(f"{times.count(None)} of {len(times)} neighbours not answered")
    if row["memory"] > attack.memory:
        missed.append(f"grew by {row['memory']:.0f} MiB, {attack.memory} allowed")
    if others := sorted(set(row["statuses"]) - attack.allowed):
        missed.append(f"came to {', '.join(others)}")
    return {"attack": attack.name, "audit": attack.audit} | row | {"missed": missed}


def measured(attack: Attack, seconds: float, bar: float) -> dict[str, Any]:
    """One row."""
    spare = free_port()
    if not attack.server:
        return judged(attack, attacked(attack, 0, 0, 0, seconds), bar)
    with server(attack, spare) as made:
        row = against(attack, ("127.0.0.1", int(made.url.rpartition(":")[2])), made.pid, seconds, spare)
        if psutil.Process(made.pid).status() == psutil.STATUS_ZOMBIE:
            row["missed"].append("the server ended")
    return judged(attack, row, bar)


HEADER = """| attack | audit | slowest /health | idle | answers | memory, MiB | statuses | neighbour | note | missed |
|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    health, idle, neighbour = row.get("health"), row.get("idle"), row.get("neighbour")
    cells = [row["attack"], row["audit"]]
    cells += (
        [f"{health['slowest']:.2f} s", f"{idle['slowest']:.2f} s", str(health["answers"])]
        if health and idle
        else ["", "", ""]
    )
    cells.append(f"+{row['memory']:.0f}" + (f" to {row['resident']:.0f}" if health else ""))
    cells.append(", ".join(f"{status} x {count}" for status, count in sorted(row["statuses"].items())))
    if neighbour:
        times = [neighbour["before"], *neighbour["during"], neighbour["after"]]
        good = [one for one in times if one is not None]
        cells.append(f"{len(good)} of {len(times)}, {max(good, default=0.0):.1f} s at most")
    else:
        cells.append("")
    cells += [row["note"], "**" + "; ".join(row["missed"]) + "**" if row["missed"] else "no"]
    return f"| {' | '.join(cells)} |"


def _document(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON, with what they were measured on."""
    facts = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    facts |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "load": os.getloadavg()}
    return json.dumps({**facts, "seconds": args.seconds, "bar": args.bar, "rows": rows}, indent=1)


def main() -> int:
    """Prints the table; 1 where a row misses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack")
    parser.add_argument("--bar", type=float, default=0.5, help="most seconds that /health may take")
    parser.add_argument("--out", type=Path, help="file for the rows as JSON")
    parser.add_argument("--rank", action="store_true", help="print the table again, the slowest /health first")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args()
    if args.list:
        for attack in ATTACKS:
            print(f"{attack.name} ({attack.audit}): {' '.join((attack.run.__doc__ or '').split())}")
        return 0
    if unknown := set(args.names) - {attack.name for attack in ATTACKS}:
        parser.error(f"there is no attack {', '.join(sorted(unknown))}: see --list")
    print(HEADER, flush=True)
    rows = []
    for attack in ATTACKS:
        if args.names and attack.name not in args.names:
            continue
        rows.append(measured(attack, args.seconds, args.bar))
        print(line(rows[-1]), flush=True)
        if args.out:  # behind each row: a run that is ended early keeps those that it has
            args.out.write_text(_document(args, rows))
    if args.rank:
        rows.sort(key=lambda row: -row.get("health", {"slowest": 0})["slowest"])
        print("\n".join(["", HEADER, *map(line, rows)]))
    return int(any(row["missed"] for row in rows))
