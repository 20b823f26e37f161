# SPDX-License-Identifier: MIT
"""Chat templates: programs that come with a model or a request, and run with no way out and little time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import CandleVllmError, ChatTemplateError, UnsupportedModelError
from candle_vllm.core.text import template_limits
from candle_vllm.core.text.chat_template import ChatTemplate
from packages.core.tests import toy_gguf as toys
from tests.security.guarded_server import HELLO, Guarded, chat_body, guarded

MARK = "sandbox-was-left"

# Known ways out of Jinja, by object chains, by format strings, by filters, by the template's own variables.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ().__class__.__bases__[0].__subclasses__()[9].__init__.__globals__['sys'].modules['os'].popen('id') }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x()._module.__builtins__['open'] }}{% endfor %}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').popen('id').read() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ dict.mro()[-1].__subclasses__() }}",
    "{{ range.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ strftime_now.__globals__['time'].__loader__ }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ messages|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('__cla' ~ 'ss__') }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ [''][0]['__class__'] }}",
    "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__.__name__') }}",
    "{{ messages|sum(attribute='__class__') }}",
    "{{ messages|selectattr('__class__')|list }}",
    "{{ messages|unique(attribute='__class__')|list }}",
    "{{ messages|max(attribute='__class__.__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ '{0[__class__]}'.format(messages[0]) }}",
    "{{ ('{0.__cla' ~ 'ss__}').format(1) }}",
    "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "{{ '{0.__class__}'|attr('format')(1) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ ''.format.__self__.__class__ }}",
    "{{ ['{0.__class__}'.format]|map('call')|list }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for m in messages %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back.f_globals }}",
    "{% set g = messages|map('upper') %}{{ g.gi_code }}",
    "{{ ''.join.__self__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self._TemplateReference__context.exported_vars }}",
    "{{ _context }}{{ environment.loader }}{{ context.environment }}{{ resolve('os') }}",
    "{{ config.__class__.__init__.__globals__['os'] }}",
    "{{ request.application.__globals__ }}",
    "{{ url_for.__globals__ }}{{ get_flashed_messages.__globals__ }}",
    "{% import 'os' as os %}{{ os.popen('id') }}",
    "{% from 'os' import popen %}",
    "{% include '/etc/passwd' %}",
    "{% include ['a', '/etc/passwd'] ignore missing %}{{ nothing.x }}",
    "{% extends '/etc/passwd' %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{% set n = namespace(__class__=1) %}",
    "{% set n = namespace(**{'__init__': 1}) %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'content': 'x'}) }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages.sort() }}",
    "{{ dict.fromkeys.__self__.__subclasses__() }}",
    "{{ (1).__class__.__base__ }}",
    "{{ true.__class__ }}",
    "{{ none.__class__ }}",
    "{{ 1.0.__class__.fromhex }}",
    "{{ ''.encode.__self__ }}",
    "{{ ''.encode('ascii').__class__ }}",
    "{% filter attr('__class__') %}a{% endfilter %}",
    "{% trans %}x{% endtrans %}",
    "{% do messages.append(1) %}",
    "{% debug %}",
]  # fmt: skip

GROW = "{% set n = namespace(s='a', l=['a']) %}{% for i in range(100) %}"
# Small, and without end for whoever compares or hashes it: each level holds the one below twice.
TANGLE = (
    "{% set n = namespace(l=['a'], k=['a'], t=('a',)) %}{% for i in range(60) %}"
    "{% set n.l = [n.l, n.l] %}{% set n.k = [n.k, n.k] %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)
BOMBS = {
    "loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "recursive loop": "{% for i in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "text": "{{ 'a' * 10 ** 10 }}",
    "doubling": GROW + "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "lists": GROW + "{% set n.l = n.l + n.l %}{% endfor %}{{ n.l }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "output": "{% for i in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "wordwrap": "{{ ('a ' * 1000000) | wordwrap(1) | length }}",
    "urlize": "{{ ('http://a ' * 1000000) | urlize | length }}",
    "striptags": "{{ ('<a' * 1000000) | striptags | length }}",
    "regex-like": "{{ ('a' * 1000000) | replace('a', 'b' * 10000) | length }}",
    "xmlattr": "{{ {'a': 'x' * 10000000} | xmlattr | length }}",
    "pprint": GROW + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | pprint }}",
    "hash": TANGLE + "{{ {n.t: 1} | length }}",
    "key": TANGLE + "{{ messages[0][n.t] }}",
    "get": TANGLE + "{{ messages[0].get(n.t) }}",
    "dict": TANGLE + "{{ dict([(n.t, 1)]) | length }}",
    "equal": TANGLE + "{{ n.l == n.k }}",
    "in": TANGLE + "{{ n.l in [n.k] }}",
    "less": TANGLE + "{{ [n.l, 1] < [n.k, 2] }}",
    "chain": TANGLE + "{{ 1 == n.l == n.k }}",
    "index": TANGLE + "{{ [n.k].index(n.l) }}",
    "count": TANGLE + "{{ [n.k].count(n.l) }}",
    "is eq": TANGLE + "{{ n.l is eq(n.k) }}",
    "is in": TANGLE + "{{ n.l is in([n.k]) }}",
    "select": TANGLE + "{{ [n.l] | select('==', n.k) | list | length }}",
    "reject": TANGLE + "{{ [n.l] | reject('ne', n.k) | list | length }}",
    "sort": TANGLE + "{{ [n.l, n.k] | sort | length }}",
    "max": TANGLE + "{{ [n.l, n.k] | max | length }}",
    "unique": TANGLE + "{{ [n.t, n.t] | unique | list | length }}",
    "generated": TANGLE + "{{ [[n.t], [n.t]] | map('first') | unique | list | length }}",
    "groupby": TANGLE + "{{ [{'a': n.l}, {'a': n.k}] | groupby('a') | length }}",
    "changed": TANGLE + "{% for x in [n.l, n.k] %}{{ loop.changed(x) }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_template_injection_finds_no_way_out(source: str) -> None:
    """CVE-2026-5760, CVE-2024-34359: a template reached Python. Each known way ends in an error, or in text without
    any of Python's objects."""
    messages = [{"role": "user", "content": MARK}]
    try:
        text = ChatTemplate(source, {"bos_token": "<s>"}).render(messages)
    except (ChatTemplateError, UnsupportedModelError):
        pass
    else:
        for trace in ("class '", "object at", "module '", "function ", "built-in", "uid=", "root:"):
            assert trace not in text, (source, text)
    assert messages == [{"role": "user", "content": MARK}]


@pytest.mark.parametrize("name", BOMBS)
def test_template_bombs_are_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-61620: a template that never ends, or fills the memory, is stopped within seconds of processor time."""
    source, began = BOMBS[name], time.thread_time()
    if name not in ("loops", "hash"):  # these take what is given them in earnest
        monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.1)
    with pytest.raises((ChatTemplateError, UnsupportedModelError)):
        ChatTemplate(source, {}).render(HELLO)
    assert time.thread_time() - began < 3


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ '%(a(b))99999999s' % {'a(b)': ''} }}", "asks for a width of 99999999"),
        ("{{ '%%(x%99999999s' % 'y' }}", "asks for a width of 99999999"),
        ("{{ '%(a)*d' % {'a': 1} }}", "takes its width from a value"),
        ("{% set s = 'a' * 9000000 %}{{ ''.join({'a': s, 'b': s}.values()) }}", "a text of 18000004 characters"),
        ("{% set s = 'a' * 9000000 %}{{ ''.join([s, s] | map('string')) }}", "str.join takes no iterator"),
        ("{% set i = 2 ** 2047 * 2 ** 2047 %}{{ ([i] * 30000) | string }}", "a text of more than 16777216"),
        ("{{ ['\\x00' * 5000000] | string }}", "a text of more than 16777216"),
        ("{{ '%a' % ('\\u0430' * 3000000) }}", "a text of 36000026 characters"),
        ("{{ '{!r}'.format('\\x00' * 3000000) }}", "a text of [0-9]{8} characters"),
    ],
)
def test_a_large_value_is_refused_before_it_is_made(source: str, error: str) -> None:
    with pytest.raises((ChatTemplateError, UnsupportedModelError), match=error):
        ChatTemplate(source, {}).render(HELLO)


# ---- in a model file -------------------------------------------------------------------------------------------------


def _toy_with(path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file with a template of its own."""
    monkeypatch.setattr(toys, "TOY_TEMPLATE", template)
    return toys.write_toy_gguf(path)


IN_FILES = [
    ESCAPES[1],
    ESCAPES[3],
    ESCAPES[8],
    "{{ cycler.__init__.__globals__.os.system('touch left') }}",
    BOMBS["loops"],
]


def test_template_injection_from_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-5760, CVE-2024-34359: the template in a GGUF file. The model is served, a chat is refused with the
    reason, and other requests go on."""
    monkeypatch.chdir(tmp_path)
    for number, template in enumerate(IN_FILES):
        path = _toy_with(tmp_path / f"m{number}.gguf", template, monkeypatch)
        with (
            InferenceEngine(str(path), device="cpu", kv_cache_memory=4 << 20, threads=1) as engine,
            guarded(engine) as server,
            server.http() as client,
        ):
            answer = client.post("/v1/chat/completions", json=chat_body())
            assert answer.status_code == 400, (template, answer.text)
            assert "chat template" in answer.json()["error"]["message"]
            assert client.post("/v1/messages", json=chat_body()).status_code == 400
            assert client.post("/tokenize", json={"model": "default", "messages": HELLO}).status_code == 400
            plain = client.post("/v1/completions", json={"model": "default", "prompt": "a", "max_tokens": 2})
            assert plain.status_code == 200
    assert not (tmp_path / "left").exists()


def test_template_injection_by_rerank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2026-5760 came in by /v1/rerank, which rendered the model's template without a sandbox. Ours renders none:
    documents are texts."""
    path = _toy_with(tmp_path / "m.gguf", "{{ raise_exception('rendered') }}", monkeypatch)
    rendered: list[Any] = []
    with (
        InferenceEngine(str(path), device="cpu", kv_cache_memory=4 << 20, threads=1) as engine,
        guarded(engine) as server,
        server.http() as client,
    ):
        # When a model is loaded, its template is rendered in the sandbox to see which tool calls it writes.
        monkeypatch.setattr(ChatTemplate, "render", lambda *arguments, **_: rendered.append(arguments))
        documents = ["{{ ''.__class__ }}", "{% for i in range(99999999) %}{% endfor %}", "a"]
        for path_, body in (
            ("/v1/rerank", {"model": "default", "query": "{{ 7 * 7 }}", "documents": documents}),
            ("/v1/score", {"model": "default", "text_1": "{{ 7 * 7 }}", "text_2": documents}),
            ("/v1/embeddings", {"model": "default", "input": documents}),
        ):
            answer = client.post(path_, json=body)
            assert answer.status_code in (200, 400), answer.text
            for field in ("chat_template", "chat_template_kwargs", "template"):
                refused = client.post(path_, json={**body, field: "{{ 1 }}"})
                assert refused.status_code == 400, (path_, field)
                assert refused.json()["error"]["param"].startswith(field)
    assert rendered == []


# ---- by request ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trusting(engine: InferenceEngine) -> Iterator[Guarded]:
    """A server whose operator lets requests bring templates."""
    with guarded(engine, trust_request_chat_template=True) as server:
        yield server


def test_template_by_request_is_refused_unless_trusted(real: Guarded) -> None:
    """CVE-2025-61620: `chat_template` in a request is refused by name, unless the operator has allowed it; nor can it
    come by another field."""
    with real.http() as client:
        for body in (
            chat_body(chat_template="{{ messages }}"),
            chat_body(chat_template_kwargs={"chat_template": "{{ messages }}"}),
            chat_body(chat_template_kwargs={"tokenize": True}),
            chat_body(chat_template_kwargs={"messages": []}),
            chat_body(chat_template_kwargs={"__class__": "x" * 10, "self": 1}),
        ):
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 400, body
            assert answer.json()["error"]["param"].startswith("chat_template"), body


def test_template_by_request_has_the_same_limits(trusting: Guarded) -> None:
    """CVE-2025-61620 with trust: a request's template runs in the same sandbox, and hurts nobody but itself."""
    with trusting.http() as client:
        right = client.post("/v1/chat/completions", json=chat_body(chat_template="{{ messages[0].content }}"))
        assert right.status_code == 200, right.text
        for source in [*ESCAPES[:4], BOMBS["loops"], BOMBS["doubling"], BOMBS["power"], "{% for", "x" * 200_000]:
            answer = client.post("/v1/chat/completions", json=chat_body(chat_template=source))
            assert answer.status_code == 400, (source[:80], answer.text)
        again = client.post("/v1/chat/completions", json=chat_body())
        assert again.status_code == 200


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


KWARGS: dict[str, Any] = {
    "many": {f"k{n}": 1 for n in range(65)},
    "long name": {"k" * 65: 1},
    "no name": {"a b": 1},
    "deep": {"a": nested(80)},
    "large": {"a": "x" * (9 << 20)},
    "not an object": [1],
    "loop": {"loop": 1, "range": 1, "namespace": "x", "raise_exception": 1, "tojson": "x"},
}


def test_chat_template_kwargs_dos(real: Guarded, trusting: Guarded) -> None:
    """CVE-2025-62426, CVE-2025-61620: `chat_template_kwargs` that block the server. While requests with hostile ones
    run, /health answers within two seconds of CPU."""
    slowest = slowest_health(real, trusting)
    assert slowest < 2, f"/health took {slowest:.1f} s"


def slowest_health(real: Guarded, trusting: Guarded) -> float:
    """Seconds of this process's CPU, the server's too, that pass at most before /health answers while hostile requests
    run."""
    slowest, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal slowest
        with trusting.http() as client:
            while not ended.is_set():
                began = time.process_time()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.process_time() - began)
                ended.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with real.http() as client, trusting.http() as trusted:
            for name, kwargs in KWARGS.items():
                answer = client.post("/v1/chat/completions", json=chat_body(chat_template_kwargs=kwargs))
                assert answer.status_code in (400, 413) or name == "loop", (name, answer.text)
                assert answer.status_code < 500, name
            long = {"a": ["x" * 1000] * 5000}
            slow = "{% for x in a %}{% for y in a %}{{ x ~ y }}{% endfor %}{% endfor %}"
            for _ in range(3):
                answer = trusted.post(
                    "/v1/chat/completions", json=chat_body(chat_template=slow, chat_template_kwargs=long)
                )
                assert answer.status_code == 400
                assert "stopped" in answer.json()["error"]["message"]
    finally:
        ended.set()
        watcher.join(60)
    return slowest


def test_template_errors_say_nothing_of_the_machine() -> None:
    """Errors that leak: no path and no object of ours stands in what a failing template reports."""
    sources = ["{{ messages[0].nothing.x }}", "{{ 1 / 0 }}", "{{ [] | first.x }}", "{{ 'a' + 1 }}", "{% include 'x' %}"]
    for source in sources:
        with pytest.raises(CandleVllmError) as failed:
            ChatTemplate(source, {}).render(HELLO)
        assert "/" not in str(failed.value).replace("1 / 0", "")
        assert "0x" not in str(failed.value)
