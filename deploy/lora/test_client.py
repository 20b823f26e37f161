# SPDX-License-Identifier: MIT
"""Check a running server that serves LoRA adapters, and print the results; only Python is needed.

    python test_client.py --base-url http://127.0.0.1:8000 [--api-key KEY] [--adapter NAME] [--model NAME]

The exit status is 0 if all checks pass. Any server with OpenAI's API can be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Wrong(Exception):
    """A check failed; the message says why."""


class Client:
    """A client of one server, with an API key."""

    def __init__(self, base_url: str, key: str | None, seconds: float) -> None:
        self._url, self._seconds = base_url.rstrip("/").removesuffix("/v1"), seconds
        self._headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: Any = None, keyless: bool = False) -> tuple[int, str]:
        """Return the status and the body of a response."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if keyless else self._headers
        request = urllib.request.Request(self._url + path, data, headers)  # noqa: S310  # the operator's own
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except OSError as error:
            raise Wrong(f"{self._url} cannot be reached: {getattr(error, 'reason', error)}") from None

    def json(self, path: str, body: Any = None) -> Any:
        """Return the JSON body of a response; raises `Wrong` unless its status is 200."""
        status, text = self.ask(path, body)
        if status != 200:
            raise Wrong(f"{path} answered {status}: {text[:300]}")
        return json.loads(text)


def checks(
    client: Client, model: str | None, adapter: str | None, key: str | None
) -> list[tuple[str, Callable[[], str]]]:
    """Return the checks in order: a name, and a function that returns what it found or raises `Wrong`."""
    state = {"model": model or ""}

    def healthy() -> str:
        status, _ = client.ask("/health")
        if status != 200:
            raise Wrong(f"/health answered {status}")
        return "200"

    def models() -> str:
        names = [each["id"] for each in client.json("/v1/models")["data"]]
        if not names or (model and model not in names):
            raise Wrong(f"the models are {names}")
        state["model"] = model or names[0]
        return ", ".join(names)

    def chat(name: str | None = None) -> str:
        body = {"model": name or state["model"], "max_tokens": 16, "temperature": 0}
        answer = client.json("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": "Say hello."}]})
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length") or not answer["usage"]["completion_tokens"]:
            raise Wrong(f"an answer without tokens: {answer}")
        return repr(choice["message"]["content"])

    def completion(name: str | None = None) -> str:
        body = {
            "model": name or state["model"],
            "prompt": "The capital of France is",
            "max_tokens": 8,
            "temperature": 0,
        }
        return repr(client.json("/v1/completions", body)["choices"][0]["text"])

    def stream() -> str:
        asked = {"model": state["model"], "max_tokens": 8, "stream": True, "temperature": 0}
        status, text = client.ask(
            "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": "Count."}]}
        )
        events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        if status != 200 or len(events) < 3 or events[-1] != "[DONE]":
            raise Wrong(f"status {status}, {len(events)} events")
        return f"{len(events) - 1} events"

    def together() -> str:
        names = [state["model"], adapter or state["model"]] * 4
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(completion, names))
        if any(text != found[number % 2] for number, text in enumerate(found)):
            raise Wrong(f"greedy answers differ: {sorted(set(found))}")
        return "8 at once"

    def unknown() -> str:
        status, text = client.ask("/v1/completions", {"model": "no/such-model", "prompt": "a", "max_tokens": 1})
        if status != 404:
            raise Wrong(f"an unknown name is answered {status}: {text[:200]}")
        return "404"

    def closed() -> str:
        status, _ = client.ask("/v1/models", keyless=True)
        if status != 401:
            raise Wrong(f"without a key /v1/models is answered {status}")
        return "401 without a key"

    found = [("health", healthy), ("models", models), ("chat", chat), ("completion", completion), ("stream", stream)]
    if adapter:
        found += [("adapter", lambda: chat(adapter)), ("adapter, completion", lambda: completion(adapter))]
        found += [("an unknown name", unknown)]
    found += [("base and adapter together" if adapter else "several", together)]
    return found + ([("the key", closed)] if key else [])


def main(given: Sequence[str] | None = None) -> int:
    """Run all checks; return the exit status."""
    parser = argparse.ArgumentParser(description="checks a running server that serves LoRA adapters")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default=os.environ.get("API_KEY") or None)
    parser.add_argument("--model", help="the base (default: the first of /v1/models)")
    parser.add_argument("--adapter", help="an adapter that the server has or can fetch")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one answer, a first download included")
    options = parser.parse_args(given)
    client, failed = Client(options.base_url, options.api_key, options.timeout), 0
    for name, check in checks(client, options.model, options.adapter, options.api_key):
        try:
            print(f"ok    {name}: {check()}")
        except Wrong as error:
            failed += 1
            print(f"WRONG {name}: {error}")
            if name == "health":
                break
    print("everything works" if not failed else f"{failed} wrong")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
