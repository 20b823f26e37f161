# SPDX-License-Identifier: MIT
"""A real PostgreSQL server for tests of stores: Debian's programs in a temporary folder, on loopback."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE, wait_for


def _postgres_folder() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL does not run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL server, without the database; skips the test if PostgreSQL is not installed."""
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    programs = _postgres_folder()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    user = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="candle-vllm-postgres-"))
    password = secrets.token_hex(8)
    secret = folder / "password"
    secret.write_text(password)
    if user:
        for path in (folder, secret):
            os.chown(path, user["user"], user["group"])
    data = str(folder / "data")
    make = ["initdb", "-D", data, "-U", "tests", "-A", "scram-sha-256", "--pwfile", str(secret), "--no-sync"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    try:
        subprocess.run(
            [str(programs / make[0]), *make[1:]], check=True, capture_output=True, timeout=120, cwd=folder,
            env=environment, **user,
        )  # fmt: skip
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = ["listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off"]
        command = [str(programs / "postgres"), "-D", data, *(part for each in settings for part in ("-c", each))]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, **user)
        try:
            url = f"postgresql://tests:{password}@127.0.0.1:{port}"
            _wait_for(url, server)
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(PATIENCE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    def answers() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(f"{url}/postgres", connect_timeout=60).close()
            return True
        assert server.poll() is None, "PostgreSQL ended"
        return False

    wait_for(answers)


def new_database(server: str) -> str:
    """Return the URL of a new database in a server."""
    import psycopg
    from psycopg import sql

    name = f"store_{secrets.token_hex(6)}"
    with contextlib.closing(psycopg.connect(f"{server}/postgres", autocommit=True)) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return f"{server}/{name}"
