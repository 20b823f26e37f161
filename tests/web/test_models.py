# SPDX-License-Identifier: MIT
"""What the page says and does while models are loaded, cannot be loaded, or go."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.web.actions import button, said, say
from tests.web.ui_server import ui_server

from packages.server.tests.server_fakes import FakeLoader  # isort: skip  # ui_server says where

from candle_vllm.core.errors import InvalidFileError, ModelNotFoundError, NoMemoryError, UnsupportedModelError
from candle_vllm.core.progress import tell
from candle_vllm.server import Settings
from candle_vllm.server.models.cards import FAILURES
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry

ROOT = Path(__file__).parents[2]


class SteppedLoader(FakeLoader):
    """Loads as far as the test lets it: a step is told, a failure is raised, None ends the load."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: queue.Queue[tuple[Any, ...] | Exception | None] = queue.Queue()

    def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
        while (step := self.steps.get(timeout=60)) is not None:
            if isinstance(step, Exception):
                raise step
            tell(*step)
        return super().__call__(entry, beside)


@pytest.fixture
def loader() -> Iterator[SteppedLoader]:
    made = SteppedLoader()
    yield made
    made.steps.put(None)  # no thread waits for ever


def two_models(loader: SteppedLoader) -> ModelManager:
    """A manager of two models, neither of them loaded."""
    entries = [ModelEntry(name, Settings(), (name,)) for name in ("first", "second")]
    return ModelManager(Catalogue(entries), loader)


def test_loading_is_followed_to_its_end(loader: SteppedLoader, open_page: Callable[..., Any]) -> None:
    with ui_server(manager=two_models(loader)) as site:
        page = open_page(site.url)
        page.get_by_text("first is not loaded yet.").wait_for()
        button(page, "Load it now").click()
        loader.steps.put(("downloading org/first", 1, 4))
        page.locator(".welcome").get_by_text("downloading, 25 %").wait_for()
        page.get_by_text("You can write already").wait_for()
        assert page.locator(".welcome progress").get_attribute("value") == "25"
        button(page, "Model: first").click()
        page.locator(".model-row").first.get_by_text("downloading, 25 %").wait_for()
        loader.steps.put(("compiling the CPU kernels, once for this machine", 30, 40, " kernels"))
        page.locator(".model-row").first.get_by_text("compiling for this machine, once, 75 %").wait_for()
        page.keyboard.press("Escape")
        loader.steps.put(("preparing the steps",))
        page.locator(".welcome").get_by_text("getting ready…").wait_for()
        loader.steps.put(None)
        page.get_by_text("first is running on your own server").wait_for()
        assert page.locator("progress").count() == 0


def test_a_page_opened_while_the_server_loads_becomes_ready(
    loader: SteppedLoader, open_page: Callable[..., Any]
) -> None:
    manager = two_models(loader)
    with ui_server(manager=manager) as site:
        page = open_page(site.url, locale="de")
        page.get_by_text("first ist noch nicht geladen.").wait_for()
        say(page, "Hello")  # which loads it
        loader.steps.put(("loading the weights", 43, 100))
        page.locator(".answer").get_by_text("lädt die Gewichte, 43 %").wait_for()
        other = open_page(site.url)
        other.locator(".welcome").get_by_text("loading the weights, 43 %").wait_for()
        loader.steps.put(None)
        said(page, "Hello!")
        other.get_by_text("first is running on your own server").wait_for()


def test_a_load_that_failed_is_explained_and_tried_again(loader: SteppedLoader, open_page: Callable[..., Any]) -> None:
    with ui_server(manager=two_models(loader)) as site:
        page = open_page(site.url)
        page.get_by_text("first is not loaded yet.").wait_for()
        loader.steps.put(NoMemoryError("there is no memory for the weights: set --mem 12"))
        say(page, "Hello")
        refusal = page.locator(".answer").get_by_role("alert")
        refusal.get_by_text("first could not be loaded. It needs more memory than the server has free.").wait_for()
        button(page, "Model: first").click()
        page.locator(".model-row").get_by_text("first could not be loaded. It needs more memory").wait_for()
        assert page.get_by_text("What the server says").count() == 0  # it speaks of a flag
        loader.steps.put(InvalidFileError("tensor 7 ends behind the file"))
        button(page, "Try again to load first").click()
        page.locator(".model-row").get_by_text("Its files are damaged or incomplete.").wait_for()
        page.locator(".model-row").get_by_text("What the server says").click()
        page.get_by_text("tensor 7 ends behind the file").wait_for()
        page.keyboard.press("Escape")
        refusal.get_by_text("Its files are damaged or incomplete.").wait_for()
        refusal.get_by_role("button", name="Try again").click()  # at once, though the server pauses
        loader.steps.put(("loading the weights", 1, 2))
        page.locator(".answer").get_by_text("loading the weights, 50 %").wait_for()
        loader.steps.put(None)
        said(page, "Hello!")
        assert page.get_by_role("alert").count() == 0
        assert "--mem" not in page.content()


def test_a_failed_load_on_an_empty_page(loader: SteppedLoader, open_page: Callable[..., Any]) -> None:
    with ui_server(manager=two_models(loader)) as site:
        page = open_page(site.url, locale="de")
        loader.steps.put(ModelNotFoundError("no such model"))
        button(page, "Jetzt laden").click()
        page.get_by_text("first konnte nicht geladen werden. Seine Dateien wurden nicht gefunden").wait_for()
        loader.steps.put(None)
        button(page, "Noch einmal versuchen, first zu laden").click()
        page.get_by_text("first läuft auf deinem eigenen Server").wait_for()


def test_without_the_management_key_the_kind_of_a_failure_is_known(
    loader: SteppedLoader, open_page: Callable[..., Any]
) -> None:
    with ui_server(manager=two_models(loader), api_key=("sesame",), management_key=("boss",)) as site:
        page = open_page(site.url)
        page.get_by_label("API key", exact=True).fill("sesame")
        button(page, "Use").click()
        button(page, "Load it now").click()
        page.get_by_role("alert").get_by_text("first: This needs the management key of this server").wait_for()
        button(page, "Dismiss").click()
        say(page, "Hello")
        loader.steps.put(("loading the weights", 1, 4))
        page.locator(".answer").get_by_text("loading the weights, 25 %").wait_for()
        loader.steps.put(UnsupportedModelError("no such architecture in /models/secret"))
        refusal = page.locator(".answer").get_by_role("alert")
        refusal.get_by_text("first could not be loaded. Models of this kind are not supported.").wait_for()
        assert "secret" not in page.content()
        refusal.get_by_role("button", name="Try again").click()
        refusal.get_by_text("first could not be loaded. Models of this kind are not supported.").wait_for()


def test_the_picker_shows_what_a_model_is(loader: SteppedLoader, open_page: Callable[..., Any]) -> None:
    with ui_server(manager=two_models(loader)) as site:
        loader.steps.put(None)
        page = open_page(site.url)
        button(page, "Load it now").click()
        page.get_by_text("first is running").wait_for()
        loader.engines[0]._info = msgspec.structs.replace(
            loader.engines[0].model_info, architecture="llama", num_parameters=134_515_008,
            quantization="F32 x 61, Q4_1 x 40, Q8_0 x 1", max_model_len=8192,
            weight_bytes=92 << 20, kv_cache_bytes=1536 << 20,
        )  # fmt: skip
        button(page, "Model: first").click()
        first, second = (page.locator(".model-row").nth(number) for number in (0, 1))
        first.get_by_text("llama · 135M parameters · Q4_1 · 8,192 tokens of context").wait_for()
        assert first.locator(".model-choice").inner_text().split("\n") == [
            "first", "ready", "llama · 135M parameters · Q4_1 · 8,192 tokens of context",
            "Memory: weights 92 MiB, KV cache up to 1.5 GiB",
        ]  # fmt: skip
        assert second.locator(".model-choice").inner_text().split("\n") == ["second", "not loaded"]


def test_every_kind_of_failure_has_words() -> None:
    text = (ROOT / "packages/server/webui/src/i18n/en.ts").read_text("utf-8")
    words = re.search(r"  failures: \{(.*?)\n  \}", text, re.DOTALL)
    assert words is not None
    assert {kind for _, kind in FAILURES} == set(re.findall(r"(\w+): \"", words[1]))


def test_every_step_of_loading_has_words_in_every_language() -> None:
    sources = [*(ROOT / "packages/core/src").rglob("*.py"), *(ROOT / "packages/server/src").rglob("models/*.py")]
    told = {
        word for path in sources for word in re.findall(r'(?:\btell\(f?|_told_bar\(f)"(\w+) ', path.read_text("utf-8"))
    }
    assert {"downloading", "loading", "compiling"} <= told
    for language in ("en", "de"):
        text = (ROOT / f"packages/server/webui/src/i18n/{language}.ts").read_text("utf-8")
        steps = re.search(r"loadingSteps: \{(.*?)\}", text, re.DOTALL)
        assert steps is not None
        assert told == set(re.findall(r"(\w+): \"", steps[1]))
