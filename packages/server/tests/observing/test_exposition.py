# SPDX-License-Identifier: MIT
"""The answer to a scrape: both formats, and a real Prometheus that reads it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import prometheus_client
import prometheus_client.parser as prometheus_parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.engine.stats import EngineStats, Histogram, ReplicaStats, Stat, combined, forms
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.server.observing import series as metric_table
from candle_vllm.server.observing.metrics import EventCollector, Metrics, Outcome, Rejection, render
from candle_vllm.server.observing.model_metrics import EngineWatcher
from candle_vllm.server.observing.series import ALL_SERIES, HTTP, engine_series
from packages.server.tests.observing.dashboard_queries import ROOT, expressions, names_in
from packages.server.tests.server_fakes import PacedEngine, whole_answer
from tests.ports import free_port
from tests.waiting import PATIENCE, wait_for

CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed (Debian's package prometheus)",
)


def all_events(metrics: Metrics) -> None:
    """Everything that can happen to a server, once."""
    for reason in Rejection:
        metrics.refused("scripted", reason)
    metrics.rate_limited("alice", "tokens")
    metrics.count(metric_table.UNLOADS, "scripted")
    metrics.observe(metric_table.LOAD_SECONDS, 2.0, "scripted")
    metrics.observe(metric_table.WAIT_SECONDS, 3.0, "scripted")
    for outcome in Outcome:
        metrics.count(metric_table.LOADS, "scripted", outcome)
        metrics.count(metric_table.ANSWERS_KEPT, outcome)
        metrics.count(metric_table.WEBHOOKS, outcome)
        metrics.count(metric_table.ADAPTER_LOOKS, "hf", "found")
    metrics.count(metric_table.IMAGE_FETCHES, "fetched")
    metrics.count(metric_table.TOOL_CALLS, "time", "completed")


async def _ask_an_adapter(setup: Any) -> None:
    adapters = [(LoRARequest("tone"), 1.0)]
    await whole_answer(setup.engine, "p", SamplingParams(max_tokens=2), watcher=setup.watcher, lora_request=adapters)


async def test_every_series_is_there_with_its_labels(noted: Any) -> None:
    setup = noted(_cached())
    all_events(setup.metrics)
    setup.metrics.watch_mcp_servers(lambda: ["ready", "failed", "ready"])
    await _ask_an_adapter(setup)
    async with setup.client() as client:
        await client.post("/v1/completions", json={"prompt": "p"})
        samples_text = (await client.get("/metrics")).text
    families = {family.name: family for family in prometheus_parser.text_string_to_metric_families(samples_text)}
    assert "_created" not in samples_text
    for series in ALL_SERIES:
        if series.name == "vllm:cache_config_info":
            labels = {"model_name", "engine", "block_size", "num_gpu_blocks"}
        else:
            labels = set(series.labels)
        family = families[series.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (series.kind, series.help)
        assert {frozenset(set(sample.labels) - {"le"}) for sample in family.samples} == {frozenset(labels)}
    assert families["candle_vllm:model_load_seconds"].samples[-1].value in (1.0, 2.0)
    each = {name: families["candle_vllm:replica_" + name].samples for name in ("up", "restarts", "kv_cache_usage_perc")}
    assert {name: [(one.labels["replica"], one.value) for one in samples] for name, samples in each.items()} == {
        "up": [("0", 1), ("1", 0)], "restarts": [("0", 0), ("1", 2)], "kv_cache_usage_perc": [("0", 0.75), ("1", 0)],
    }  # fmt: skip


def test_events_are_counted() -> None:
    metrics = Metrics()
    assert b"candle_vllm:" not in render(metrics.registry)[0]
    all_events(metrics)
    value = metrics.registry.get_sample_value
    assert value("candle_vllm:model_loads_total", {"model_name": "scripted", "outcome": "ok"}) == 1
    assert value("candle_vllm:model_loads_total", {"model_name": "scripted", "outcome": "failed"}) == 1
    assert value("candle_vllm:model_load_seconds_sum", {"model_name": "scripted"}) == 2
    assert value("candle_vllm:model_wait_seconds_sum", {"model_name": "scripted"}) == 3
    assert value("candle_vllm:webhook_deliveries_total", {"outcome": "failed"}) == 1
    assert value("candle_vllm:lora_resolutions_total", {"source": "hf", "outcome": "found"}) == 2
    with pytest.raises(ValueError, match="bored"):
        metrics.refused("scripted", "bored")


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "application/openmetrics-text"),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8", "application/openmetrics-text"),
        ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4", "text/plain; version=0.0.4"),
        ("text/plain;version=1.0.0;escaping=allow-utf-8", "text/plain; version=0.0.4"),
    ],
)
async def test_the_format_is_negotiated(noted: Any, accept: str, kind: str) -> None:
    setup = noted()
    await whole_answer(setup.engine, "p", SamplingParams(max_tokens=3), watcher=setup.watcher)
    data, content_type = render(setup.metrics.registry, accept)
    assert content_type.startswith(kind)
    assert data.endswith(b"# EOF\n") == content_type.startswith("application/openmetrics-text")
    assert b"\nvllm:generation_tokens_total{" in data
    assert b"vllm_" not in data.replace(b"candle_vllm:", b"")
    if data.endswith(b"# EOF\n"):
        families = {family.name: family for family in text_string_to_metric_families(data.decode())}
        assert families["vllm:generation_tokens"].samples[0].value == 3


class _Measured(EngineStats):
    """Statistics with one more field: all that a new histogram of the engine declares."""

    waits: Annotated[Histogram, Stat("counter", "x:waits_seconds", "Waits, seconds.")] = msgspec.field(
        default_factory=lambda: Histogram((0.25, 1, 8))
    )


VALUES = st.lists(st.integers(0, 640).map(lambda number: number / 64), max_size=20)  # their sums are exact


@settings(max_examples=30)
@given(VALUES, VALUES, VALUES)
def test_a_histogram_of_the_engine_is_shown_as_prometheus_client_shows_its_own(
    earlier: list[float], first: list[float], second: list[float]
) -> None:
    """The engine was loaded before; now it has two replicas."""
    own = prometheus_client.Histogram(
        "x:waits_seconds", "Waits, seconds.", ["model_name", "engine"], registry=None, buckets=(0.25, 1, 8)
    )
    each = list[_Measured]()
    for values in (earlier, first, second):
        waits = forms(_Measured)["waits"].zero.copy()
        for value in values:
            waits.observe(value)
            own.labels("m", "0").observe(value)
        own.labels("m", "0")
        each.append(_Measured.snapshot(msgspec.structs.asdict(PacedEngine("").stats()), {"waits": waits}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metric_table, "MODEL_SERIES", engine_series(forms(_Measured), gauges=False))
        metrics, engine = Metrics(), PacedEngine("")
        for stats in (each[0], combined(each[1:])):
            engine.stats = lambda stats=stats: stats  # type: ignore[method-assign]
            EngineWatcher(engine, metrics.model("m", 64))
            engine = PacedEngine("")
        for accept in ("", OPENMETRICS):
            shown = _lines(render(metrics.registry, accept)[0])
            registry = prometheus_client.CollectorRegistry()
            registry.register(EventCollector([own]))
            assert shown
            assert shown == _lines(render(registry, accept)[0])


def _lines(data: bytes) -> list[str]:
    return [line for line in data.decode().splitlines() if "x:waits_seconds" in line]


def test_two_applications_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.count(metric_table.UNLOADS, "m")
    assert second.registry.get_sample_value("candle_vllm:model_unloads_total", {"model_name": "m"}) is None


def _promtool(*arguments: str, text: str = "") -> tuple[int, list[str]]:
    done = subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, timeout=30)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@needs_prometheus
async def test_promtool_has_one_complaint_which_vllms_names_have_too(noted: Any) -> None:
    setup = noted(_cached())
    all_events(setup.metrics)
    async with setup.client() as client:
        await client.post("/v1/completions", json={"prompt": "p"})
        text = (await client.get("/metrics")).text
    _, complaints = _promtool("check", "metrics", text=text)
    assert complaints
    assert {line.partition(" ")[2] for line in complaints} == {"metric names should not contain ':'"}
    assert _promtool("check", "metrics", text=re.sub(r"\b(candle_)?vllm:", r"\1vllm_", text)) == (0, [])


@needs_prometheus
def test_the_example_for_prometheus_is_right(tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    shutil.copy(CONFIG, config)
    status, lines = _promtool("check", "config", str(config))
    assert status != 0  # it looks for the key
    assert any("candle-vllm.key" in line for line in lines)
    (tmp_path / "candle-vllm.key").write_text("key")
    status, lines = _promtool("check", "config", str(config))
    assert status == 0, lines
    assert _promtool("check", "config", "--syntax-only", str(CONFIG))[0] == 0


class _Blocks(PacedEngine):
    """An engine with a cache and some use of it, with adapters, and with drafts."""

    def stats(self) -> Any:
        stats, adapters = super().stats(), {"max_adapters": 4, "adapters": 2, "waiting_adapters": {"a": 1}}
        cached = stats.prompt_tokens // 2
        each = ReplicaStats(alive=True, num_running=1, num_blocks=4, num_free_blocks=1)
        replicas = (each, ReplicaStats(alive=False, restarts=2))
        return msgspec.structs.replace(
            stats,
            num_free_blocks=400,
            cached_prompt_tokens=cached,
            accepted_per_position=(3, 1),
            replicas=replicas,
            **adapters,
        )


def _cached() -> PacedEngine:
    return _Blocks("Hello!", pause=0.001)


@contextmanager
def _prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A real Prometheus that scrapes `target` five times a second."""
    text = CONFIG.read_text().replace("127.0.0.1:2000", target)
    text = text.replace("scrape_interval: 15s", "scrape_interval: 200ms").replace("timeout: 10s", "timeout: 200ms")
    (folder / "prometheus.yml").write_text(text)
    (folder / "candle-vllm.key").write_text("secret-key")
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}", "--log.level=warn",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(lambda: answers(lambda: client.get("/-/ready").status_code == 200))
            yield client
        finally:
            process.terminate()
            process.wait(PATIENCE)


def answers(condition: Callable[[], Any]) -> Any:
    with contextlib.suppress(httpx.TransportError):
        return condition()
    return False


@needs_prometheus
def test_a_real_prometheus_scrapes_and_answers_the_dashboard(noted: Any, serve_app: Any, tmp_path: Path) -> None:
    setup = noted(_cached())
    setup.metrics.watch_mcp_servers(lambda: ["ready"])
    app = setup.app()
    keys: list[str] = []

    @app.middleware("http")
    async def note_key(request: Any, call_next: Any) -> Any:
        if request.url.path == "/metrics":
            keys.append(request.headers.get("authorization", ""))
        return await call_next(request)

    served = serve_app(app)

    def work(client: httpx.Client) -> None:
        all_events(setup.metrics)
        asyncio.run(_ask_an_adapter(setup))
        assert client.post("/v1/completions", json={"prompt": "some words", "max_tokens": 5}).status_code == 200

    def value(prometheus: httpx.Client, expression: str) -> list[Any]:
        answer = prometheus.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    with served.http() as client, _prometheus(tmp_path, f"127.0.0.1:{served.port}") as prometheus:
        for count in range(1, 6):
            work(client)
            counted = f"sum(vllm:generation_tokens_total) == {7 * count}"
            wait_for(lambda counted=counted: answers(lambda: value(prometheus, counted)))
        # A scrape may time out on a busy machine, and the next one succeeds.
        wait_for(lambda: value(prometheus, 'up{job="candle-vllm"} == 1'))
        for panel, expression in expressions():
            query = expression.replace("$model_name", ".*").replace("$__rate_interval", "30s")
            try:
                wait_for(lambda query=query: value(prometheus, query))
            except TimeoutError:
                pytest.fail(f"{panel}: {names_in(expression)}")
        metadata = prometheus.get("/api/v1/metadata").json()["data"]
    assert metadata["vllm:time_to_first_token_seconds"][0]["type"] == "histogram"
    assert set(keys) == {"Bearer secret-key"}
    assert {series.name.removesuffix("_total") for series in HTTP} <= {name.removesuffix("_total") for name in metadata}
    assert json.dumps(metadata).count("candle_vllm:") > 5
