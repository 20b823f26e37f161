# SPDX-License-Identifier: MIT
"""A real server, asked over every API at once: each answer is the quiet server's, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from candle_vllm.core.testing.toy_model import toy_config
from candle_vllm.server import Settings, create_app
from candle_vllm.server.models.loader import ModelLoader
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.serve import bind, make_server
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.common_run import few
from tests.waiting import until, wait_for

pytestmark = pytest.mark.timeout(1200)

JSON = {"content-type": "application/json"}
PATIENCE = 300.0  # seconds that a client waits
CONNECTIONS = 300  # visits at a time, for the files that a process may have open; the others wait
CLIENT: ContextVar[httpx.AsyncClient] = ContextVar("client")
MOST_POOLED = 64  # threads of all pools of a server and its engines
_POOLED = re.compile(r"_\d+$|^AnyIO worker")
MOST_GROWTH = 128 << 20  # bytes of memory, with all that pools keep
BUSY = (429, 503, 529)  # what a server that is full says, with a time after which to try again
TEXT, VECTORS, PAIRS, CLASSES = "text", "vectors", "pairs", "classes"
MODELS = {
    "/v1/embeddings": VECTORS, "/pooling": VECTORS, "/api/embed": VECTORS, "/api/embeddings": VECTORS,
    "/score": PAIRS, "/v1/score": PAIRS, "/rerank": PAIRS, "/v1/rerank": PAIRS, "/v2/rerank": PAIRS,
    "/classify": CLASSES,
}  # fmt: skip
LENGTHS = {  # the field that says how long an answer is
    "/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens", "/completion": "n_predict", "/completions": "n_predict",
    "/infill": "n_predict",
    "/api/chat": "options", "/api/generate": "options",
}  # fmt: skip
NAMELESS = (
    "/v1/models", "/v1/conversations", "/v1/mailbox", "/v1/mcp", "/api/pull", "/api/copy", "/api/delete",
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
          "candle_vllm:num_requests_queued")  # fmt: skip
LEFT_OUT = {"/v1/models/unload", "/v1/files", "/v1/batches"}  # POST: the first is everybody's, the others have a visit


# ---- the server ------------------------------------------------------------------------------------------------------


class Served:
    """Four models behind one server, in a thread, which can be looked into."""

    def __init__(self, folder: Path) -> None:
        labels = {str(n): f"LABEL_{n}" for n in range(3)}
        classes = toy_encoder_config("BertForSequenceClassification", id2label=labels, label2id={})
        pairs = toy_encoder_config("BertForSequenceClassification")
        folders = {
            TEXT: write_toy_gguf(folder / "text.gguf", toy_config(max_position_embeddings=512)),
            VECTORS: write_toy_encoder(folder / VECTORS),
            PAIRS: write_toy_encoder(folder / PAIRS, pairs, pooling=None),
            CLASSES: write_toy_encoder(folder / CLASSES, classes, pooling=None),
        }
        # Greedy, so that what is said does not depend on when it is asked.
        own = {TEXT: {"temperature": 0.0, "max_num_seqs": 16, "mem": 24}}
        entries = [ModelEntry(name, Settings(model=str(path), threads=1, **own.get(name, {})))
                   for name, path in folders.items()]  # fmt: skip
        settings = Settings(port=0, shutdown_timeout=5, responses_store=f"sqlite:///{folder / 'kept.db'}")
        metrics = Metrics()
        self.manager = ModelManager(Catalogue(entries, TEXT), ModelLoader(metrics), metrics=metrics)
        self.app = create_app(self.manager, settings)
        self._server, self._listener = make_server(self.app, settings), bind(settings.address)
        self.port = int(self._listener.getsockname()[1])
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        wait_for(lambda: self._server.started)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve([self._listener]))

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def tasks(self) -> Counter[str]:
        """What its event loop has to do, by name."""
        assert self._loop is not None
        found: list[Counter[str]] = []

        def look() -> None:
            found.append(Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks()))

        self._loop.call_soon_threadsafe(look)
        wait_for(lambda: found)
        return found[0]

    def counts(self) -> dict[str, float]:
        """What it counts, by series with labels."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", trust_env=False).text
        return {row.rpartition(" ")[0]: float(row.rpartition(" ")[2]) for row in text.splitlines() if row[:1] != "#"}

    def is_quiet(self) -> bool:
        """Whether nothing of any request runs, waits or holds a block, and no task is left of one."""
        for model in self.manager.loaded:
            stats = model.engine.stats()
            if stats.num_running or stats.num_waiting or stats.num_free_blocks != stats.num_blocks:
                return False
        return not self.app.state.background.busy and not any(slot.in_flight for slot in self.manager.slots.values())


def open_files() -> Counter[str]:
    """Files by name; sockets, pipes and the like by kind."""
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            found[re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{entry}"))] += 1
    return found


def threads() -> Counter[str]:
    """Those that run, but for the pools', which have numbers."""
    names = [thread.name for thread in threading.enumerate() if not _POOLED.search(thread.name)]
    return Counter(re.sub(r"\d+", "", name) for name in names)


def pooled() -> int:
    return sum(_POOLED.search(thread.name) is not None for thread in threading.enumerate())


async def none_more(look: Callable[[], Counter[str]], before: Counter[str]) -> None:
    """Waits until there is no more than before, and says what there is if it stays."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: not look() - before)
    assert look() - before == Counter()


def memory() -> int:
    gc.collect()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_Dirty: +(\d+)", rollup, re.MULTILINE)) << 10


# ---- answers ---------------------------------------------------------------------------------------------------------

Said = tuple[str, list[float]]  # words and figures
_WORDS = {"content", "text", "delta", "response", "thinking", "prompt", "label"}
_FIGURES = {"embedding", "embeddings", "score", "relevance_score", "probs", "data", "tokens", "count",
            "completion_tokens", "output_tokens", "eval_count", "num_classes"}  # fmt: skip


def said(body: bytes) -> Said:
    """The words and figures of an answer in any API's form, whatever pieces a stream came in."""
    words: list[str] = []
    figures: list[float] = []

    def walk(value: Any, name: str = "") -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, key)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, name)
        elif isinstance(value, str) and name in _WORDS:
            words.append(value)
        elif isinstance(value, int | float) and name in _FIGURES:
            figures.append(float(value))

    lines = body.replace(b"data: [DONE]", b"").splitlines()
    for line in lines:
        if line.startswith((b"data: ", b"{", b"[")):
            walk(json.loads(line.removeprefix(b"data: ")))
    return "".join(words), figures


class Visitors:
    """Clients of every API, who know what a quiet server answers.

    Attributes:
        visits: what they come for, by name.
        outcomes: how many visits ended how.
        faults: what must not happen.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._known: dict[str, tuple[int, Said]] = {}
        self._learning = True
        self._luck = random.Random(len(served.app.routes))
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self.visits: dict[str, Callable[[], Awaitable[None]]] = dict(self._all())

    @property
    def _http(self) -> httpx.AsyncClient:
        return CLIENT.get()

    # ---- who comes ---------------------------------------------------------------------------------------------------

    def _all(self) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        """A visit for each route, by the document's own examples, and those that take several requests."""
        for path, methods in self._served.app.openapi()["paths"].items():
            for method, operation in methods.items():
                content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                if method != "post" or path not in LEFT_OUT:
                    yield from self._route(method.upper(), re.sub(r"\{.*?\}", "x", path), content.get("example"))
        for visit in (
            self._kept_response, self._chained_response, self._background_response, self._conversation,
            self._batch, self._socket, self._socket_left, self._no_json, self._foreign_page,
        ):  # fmt: skip
            yield visit.__name__, visit

    def _route(self, method: str, path: str, example: Any) -> Iterator[tuple[str, Callable[[], Awaitable[None]]]]:
        name = f"{method} {path}"
        if example is None:
            yield name, lambda: self._ask(name)
            return
        if not isinstance(example, dict):
            yield name, lambda: self._ask(name, example)
            return
        body = dict(example) if path.startswith(NAMELESS) else {**example, "model": MODELS.get(path, TEXT)}
        body |= self._length(path, 12)
        yield name, lambda: self._ask(name, body)
        yield f"{name} wrong", lambda: self._ask_wrong(name, {**body, "no_such_field": 1})
        if path in LENGTHS and path != "/infill":
            streamed, longer = {**body, "stream": True}, {**body, **self._length(path, 200), "stream": True}
            yield f"{name} streamed", lambda: self._ask(name, streamed)
            yield f"{name} left", lambda: self._leave(path, longer)
            yield f"{name} left at once", lambda: self._leave_at_once(path, longer)

    @staticmethod
    def _length(path: str, tokens: int) -> dict[str, Any]:
        field = LENGTHS.get(path)
        return {field: {"num_predict": tokens} if field == "options" else tokens} if field else {}

    # ---- single requests ---------------------------------------------------------------------------------------------

    async def _ask(self, route: str, body: Any = None) -> None:
        """The answer of the quiet server, which a whole one and a stream each have of their own."""
        method, path = route.split()
        answer = await self._http.request(method, path, json=body)
        self._check(f"{route} {json.dumps(body)}", answer, judged=method == "POST")

    async def _ask_wrong(self, route: str, body: Any) -> None:
        """A field that there is not is named, or the route refuses what is right as well."""
        method, path = route.split()
        answer = await self._http.request(method, path, json=body)
        if answer.status_code == 400:
            assert "no_such_field" in answer.text, (route, answer.text)
        else:
            self._check(f"{route} wrong", answer, judged=False)
            assert answer.status_code in (403, 404, *BUSY), (route, answer.text)
            assert path.startswith(NAMELESS), route

    def _check(self, name: str, answer: httpx.Response, judged: bool = True) -> None:
        words = said(answer.content)
        if self._learning:
            assert answer.status_code < 500, (name, answer.text[:600])
            self._known[name] = answer.status_code, words
        status, expected = self._known[name]
        if self._expect(answer, status, name) and judged:
            assert words[0] == expected[0], (name, answer.text[:600])
            assert words[1] == pytest.approx(expected[1], abs=1e-4), name  # an encoder's sums may be in another order

    def _expect(self, answer: httpx.Response, status: int, name: str) -> bool:
        """Whether an answer came; a server that is full may refuse it, with a time."""
        if answer.status_code in BUSY and not self._learning:
            assert int(answer.headers["retry-after"]) >= 1, (name, answer.text)
            return False
        assert answer.status_code == status, (name, answer.status_code, answer.text[:600])
        if status >= 400:
            assert answer.json()["error"], name
        return True

    async def _leave(self, path: str, body: Any) -> None:
        """Goes away in the middle of a stream."""
        async with self._http.stream("POST", path, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                self._expect(answer, 200, path)
            async for _ in answer.aiter_bytes():
                return

    async def _leave_at_once(self, path: str, body: Any) -> None:
        """Goes away before anything came, at whatever point that is."""
        asking = asyncio.create_task(self._http.post(path, json=body))
        await asyncio.sleep(self._luck.uniform(0, 0.05))
        asking.cancel()
        await asyncio.wait([asking])

    async def _json(self, method: str, path: str, body: Any = None, **given: Any) -> Any:
        answer = await self._http.request(method, path, json=body, **given)
        if not self._expect(answer, 200, f"{method} {path}"):
            raise FullError
        return answer.json()

    # ---- visits of several requests ----------------------------------------------------------------------------------

    async def _kept_response(self) -> None:
        made = await self._json("POST", "/v1/responses", {"model": TEXT, "input": "One", "max_output_tokens": 8})
        kept = await self._json("GET", f"/v1/responses/{made['id']}")
        assert kept["output"] == made["output"]
        assert (await self._json("GET", f"/v1/responses/{made['id']}/input_items"))["data"]
        assert (await self._json("DELETE", f"/v1/responses/{made['id']}"))["deleted"]
        assert (await self._http.get(f"/v1/responses/{made['id']}")).status_code == 404

    async def _chained_response(self) -> None:
        first = await self._json("POST", "/v1/responses", {"model": TEXT, "input": "One", "max_output_tokens": 8})
        more = {"model": TEXT, "input": "Two", "max_output_tokens": 8, "previous_response_id": first["id"]}
        await self._ask_again("chained", more)

    async def _ask_again(self, name: str, body: Any) -> None:
        """A response whose request differs each time, and its answer not."""
        self._check(name, await self._http.post("/v1/responses", json=body))

    async def _background_response(self) -> None:
        asked = {"model": TEXT, "input": "Count to one hundred.", "max_output_tokens": 200, "background": True}
        made = await self._json("POST", "/v1/responses", asked)
        ended = await self._json("POST", f"/v1/responses/{made['id']}/cancel")
        assert ended["status"] in ("cancelled", "completed", "incomplete"), ended

    async def _conversation(self) -> None:
        made = await self._json("POST", "/v1/conversations", {"items": [{"role": "user", "content": "Hello!"}]})
        path = f"/v1/conversations/{made['id']}"
        asked = {"model": TEXT, "input": "Two", "max_output_tokens": 8, "conversation": made["id"]}
        await self._ask_again("conversation", asked)
        items = (await self._json("GET", f"{path}/items"))["data"]
        assert len(items) in (1, 3)  # one where the server was full
        await self._json("DELETE", f"{path}/items/{items[0]['id']}")
        assert (await self._json("DELETE", path))["deleted"]

    async def _batch(self) -> None:
        body = {"model": TEXT, "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}
        line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
        data = b"\n".join(json.dumps({"custom_id": name, **line}).encode() for name in ("a", "b"))
        form: Any = {"files": {"file": ("in.jsonl", data)}, "data": {"purpose": "batch"}}
        file = await self._json("POST", "/v1/files", **form)
        assert (await self._http.get(f"/v1/files/{file['id']}/content")).content == data
        asked = {"input_file_id": file["id"], "endpoint": line["url"], "completion_window": "24h"}
        batch = await self._json("POST", "/v1/batches", asked)
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.1)
            batch = await self._json("GET", f"/v1/batches/{batch['id']}")
        assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", 2), batch
        made = (await self._http.get(f"/v1/files/{batch['output_file_id']}/content")).content
        first, second = (json.loads(row)["response"]["body"]["choices"][0]["message"] for row in made.splitlines())
        assert first == second == self._known.setdefault("batch", (200, first))[1]
        for name in (file["id"], batch["output_file_id"]):
            assert (await self._json("DELETE", f"/v1/files/{name}"))["deleted"]

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        url = f"ws://127.0.0.1:{self._served.port}/v1/responses"
        async with connect(url, proxy=None, open_timeout=PATIENCE, close_timeout=PATIENCE) as socket:
            yield socket

    async def _socket(self) -> None:
        async with self._connected() as socket:
            for text in ("One", "Two"):
                asked = {"model": TEXT, "input": text, "max_output_tokens": 8, "store": False}
                await socket.send(json.dumps({"type": "response.create", **asked}))
                events: list[Any] = []
                while not events or events[-1]["type"] not in ("response.completed", "response.incomplete", "error"):
                    events.append(json.loads(await socket.recv()))
                if events[-1]["type"] == "error":
                    assert not self._learning, events[-1]
                    assert events[-1]["status"] in BUSY, events[-1]
                    raise FullError
                words = said(b"\n".join(json.dumps(event).encode() for event in events))
                expected = self._known.setdefault(f"socket {text}", (200, words))
                assert words == expected[1]

    async def _socket_left(self) -> None:
        async with self._connected() as socket:
            asked = {"model": TEXT, "input": "Count to one hundred.", "max_output_tokens": 200, "store": False}
            await socket.send(json.dumps({"type": "response.create", **asked}))
            await socket.recv()
            socket.transport.abort()

    async def _no_json(self) -> None:
        for content in (b"{", b'{"a":' * 1000, b""):
            answer = await self._http.post("/v1/completions", content=content, headers=JSON)
            self._expect(answer, 400, "no JSON")

    async def _foreign_page(self) -> None:
        path = self._luck.choice(["/v1/chat/completions", "/api/chat", "/v1/models", "/v1/messages"])
        answer = await self._http.post(path, json={}, headers={"origin": "https://elsewhere.example"})
        assert answer.status_code == 403

    # ---- together ----------------------------------------------------------------------------------------------------

    async def learn(self) -> None:
        """Has the models loaded, and makes every visit once, one behind the other."""
        async with self._client():
            for model in (TEXT, VECTORS, PAIRS, CLASSES):
                await self._json("POST", "/v1/models/load", {"model": model})
        for name in self.visits:
            await self._visit(name)
        self._learning = False
        self.outcomes.clear()

    async def all_at_once(self, count: int) -> None:
        """So many visits: each kind as often as any other, in an order drawn by lot."""
        names = [name for _ in range(-(-count // len(self.visits))) for name in self.visits][:count]
        self._luck.shuffle(names)
        await asyncio.gather(*(self._visit(name) for name in names))

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[None]:
        """One for each visit: to find a connection in a pool of hundreds would be most of the work."""
        url = f"http://127.0.0.1:{self._served.port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=PATIENCE) as http:
            CLIENT.set(http)
            yield

    async def _visit(self, name: str) -> None:
        try:
            async with self._places, self._client():
                await self.visits[name]()
            self.outcomes["right"] += 1
        except FullError:
            self.outcomes["full"] += 1
        except Exception as error:  # whatever it is, the others go on
            self.faults.append(f"{name}: {type(error).__name__} {error!s:.1000}")


class FullError(Exception):
    """The server had no room, and said so."""


@pytest.mark.parametrize("visits", few([150, 1000], 150))
async def test_every_api_at_once_leaves_nothing_behind(
    tmp_path: Path, visits: int, caplog: pytest.LogCaptureFixture
) -> None:
    alone, pools = threads(), pooled()
    served = Served(tmp_path)
    try:
        visitors = Visitors(served)
        await visitors.learn()
        assert visitors.faults == []
        await until(served.is_quiet)
        before, most = (open_files(), threads(), served.tasks()), memory()
        await visitors.all_at_once(visits)
        assert not visitors.faults, "\n".join(visitors.faults)
        assert visitors.outcomes.total() == visits
        assert visitors.outcomes["right"] > visits // 2
        await until(served.is_quiet)
        for look, had in zip((open_files, threads, served.tasks), before, strict=True):
            await none_more(look, had)
        assert pooled() - pools < MOST_POOLED
        assert memory() - most < MOST_GROWTH
        counts = await asyncio.to_thread(served.counts)
        assert not any(value for name, value in counts.items() if name.startswith(GAUGES)), counts
        assert not [
            name for name in counts if "http_requests_total" in name and re.search(r'status="50[0-24-9]"', name)
        ]
    finally:
        await asyncio.to_thread(served.stop)
    await none_more(threads, alone)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
