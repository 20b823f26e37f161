# SPDX-License-Identifier: MIT
"""The models page: what there is and whether it fits, fetching from a hub on loopback, stopping, removing, refusals."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.web.actions import button
from tests.web.ui_server import BIG, REPO, TOY, Site, ui_server

from packages.server.tests.fake_hub import FakeHub  # isort: skip  # ui_server says where
from packages.server.tests.server_fakes import FakeLoader  # isort: skip

from candle_vllm.server import Settings
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry


@contextlib.contextmanager
def managed(folder: Path, **settings: Any) -> Iterator[Site]:
    """A server whose models may be changed, with two to begin with, of which nothing is known."""
    settings = {"allow_model_changes": True, "download_dir": folder / "hub", **settings}
    own = Settings(**settings, model="org/absent")
    entries = [ModelEntry(name, own, (name,)) for name in ("first", "second")]
    with ui_server(manager=ModelManager(Catalogue(entries), FakeLoader()), **settings) as site:
        yield site


def row(page: Any, name: str) -> Any:
    """What the page shows of a model, or of its download."""
    return page.locator(".stock > li").filter(has=page.get_by_role("heading", name=name, exact=True))


def test_a_model_is_fetched_used_and_removed(hub: FakeHub, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with managed(tmp_path) as site:
        page = open_page(site.url)
        button(page, "Model: first").click()
        page.get_by_role("link", name="Manage models").click()
        page.get_by_role("heading", name="Models", exact=True).wait_for()
        page.get_by_text("of memory and").wait_for()
        row(page, "first").get_by_text("Its files are not on the server yet").wait_for()
        page.get_by_label("Model on Hugging Face").fill(f" hf.co/{TOY} ")
        page.keyboard.press("Enter")
        fetched = row(page, TOY)
        fetched.get_by_text("on disk · needs at least").get_by_text(": fits").wait_for()
        fetched.get_by_text("llama · ").wait_for()
        fetched.get_by_text("tokens of context").wait_for()
        fetched.get_by_text(f"Also called hf.co/{TOY}").wait_for()
        assert page.get_by_text("other models than before").count() == 0
        button(page, f"Load {TOY}").click()
        fetched.get_by_text("ready").wait_for()
        button(page, f"Actions for {TOY}").click()
        page.get_by_role("menuitem", name="New chat with it").click()
        button(page, f"Model: {TOY}").wait_for()
        page.get_by_role("link", name="Models", exact=True).click()
        button(page, f"Unload {TOY}").click()
        page.get_by_role("dialog").get_by_role("button", name="Unload").click()
        fetched.get_by_text("not loaded").wait_for()
        button(page, f"Actions for {TOY}").press("Enter")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Enter")
        page.get_by_role("dialog").get_by_text("will be deleted from the server").wait_for()
        button(page, "Cancel").click()
        assert fetched.count() == 1
        button(page, f"Actions for {TOY}").click()
        page.get_by_role("menuitem", name="Remove").click()
        button(page, "Remove").click()
        fetched.wait_for(state="detached")
        page.locator("#main:focus").wait_for()
        assert page.get_by_text("other models than before").count() == 0
    assert list((tmp_path / "hub").rglob("*.safetensors")) == []


def test_a_download_is_stopped_continued_and_deleted(
    hub: FakeHub, tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    name, released = f"{REPO}:Q4_K_M", threading.Event()
    hub.held = (BIG // 2, released)
    with managed(tmp_path) as site:
        page = open_page(f"{site.url}#/models")
        page.get_by_label("Model on Hugging Face").fill(name)
        button(page, "Download").click()
        pull = row(page, name)
        pull.get_by_text(re.compile("[1-9]+ % of 1 MiB")).wait_for()
        bar = page.get_by_role("progressbar", name=f"Download of {name}")
        assert 0 < int(bar.get_attribute("value") or 0) <= 50
        other = open_page(f"{site.url}#/models", locale="de")  # which sees the same
        row(other, name).get_by_text("wird heruntergeladen").wait_for()
        button(page, f"Stop the download of {name}").focus()
        page.keyboard.press("Enter")
        pull.get_by_text("stopping").wait_for()
        released.set()
        pull.get_by_text("stopped").wait_for()
        row(other, name).get_by_text("angehalten").wait_for()
        assert len(list((tmp_path / "hub").rglob("*.incomplete"))) == 1
        button(page, f"Cancel the download of {name} and delete its partial files").click()
        pull.wait_for(state="detached")
        assert list((tmp_path / "hub").rglob("*.incomplete")) == []
        released.clear()
        button(page, "Download").first.wait_for()
        page.get_by_label("Model on Hugging Face").fill(name)
        page.keyboard.press("Enter")
        pull.get_by_text("% of 1 MiB").wait_for()
        button(page, f"Stop the download of {name}").click()
        pull.get_by_text("stopping").wait_for()
        released.set()
        button(page, f"Continue the download of {name}").click()
        pull.get_by_text("not loaded").wait_for()
        pull.get_by_text("This server cannot use its files.").wait_for()  # they are random
    ranges = [wanted for file, wanted in hub.asked if file == "model-Q4_K_M.gguf"]
    assert ranges[:2] == [None, None]
    assert int((ranges[2] or "").removeprefix("bytes=").rstrip("-")) > 0


def test_a_refusal_is_understood(hub: FakeHub, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    hub.sums[REPO, "model-Q4_K_M.gguf"] = "0" * 64
    with managed(tmp_path) as site:
        page = open_page(f"{site.url}#/models", locale="de")
        field = page.get_by_label("Modell auf Hugging Face")
        refusal = page.locator("form").get_by_role("alert")
        for given, why in [
            ("nothing", "Das ist kein Name eines Modells."),
            ("org/other", "Hugging Face hat kein solches Modell, oder es ist privat."),
            (f"{REPO}:Q2_K", "Schreibe hinter einen Doppelpunkt, welche gemeint ist."),
        ]:
            field.fill(given)
            field.press("Enter")
            refusal.get_by_text(why).wait_for()
            assert field.input_value() == given
        refusal.get_by_text("it has Q4_K_M, Q8_0").wait_for()
        field.fill(REPO)
        field.press("Enter")
        failed = row(page, f"{REPO}:Q4_K_M")
        failed.get_by_text("Was ankam, ist nicht, was Hugging Face hat, und wurde gelöscht.").wait_for()
        assert refusal.count() == 0
        button(page, f"Herunterladen von {REPO}:Q4_K_M fortsetzen").wait_for()


def test_known_models_are_offered(hub: FakeHub, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    hub.repos["Qwen/Qwen3-0.6B-GGUF"] = {"Qwen3-0.6B-Q8_0.gguf": b"x" * 99}
    with managed(tmp_path) as site:
        page = open_page(f"{site.url}#/models")
        known = page.locator(".known li").filter(has_text="qwen3:0.6b")
        known.get_by_text("needs at least 1.2 GiB of memory").wait_for()
        button(page, "Download qwen3:0.6b").click()
        known.get_by_text("is here").wait_for()
        row(page, "Qwen/Qwen3-0.6B-GGUF:Q8_0").wait_for()
        button(page, "Download qwen3:1.7b").click()
        page.get_by_text("qwen3:1.7b: Hugging Face has no such model").wait_for()


def test_another_model_becomes_the_default(hub: FakeHub, tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with managed(tmp_path) as site:
        page = open_page(f"{site.url}#/models")
        row(page, "first").get_by_text("default", exact=True).wait_for()
        button(page, "Actions for second").click()
        page.get_by_role("menuitem", name="Make it the default").click()
        row(page, "second").get_by_text("default", exact=True).wait_for()
        button(page, "Actions for second").click()
        page.get_by_role("menuitem", name="New chat with it").wait_for()
        assert page.get_by_role("menuitem").count() == 1


def test_a_model_of_which_nothing_can_be_told_keeps_nothing_from_the_others(chat: Any) -> None:
    card = {"object": "model", "created": 0, "status": "unloaded"}
    stocked = {"size": 1 << 20, "needed": 1 << 21, "fits": "now", "removable": False}
    names = ("broken", "whole")

    def show(route: Any) -> None:
        if route.request.post_data_json == {"model": "broken"}:
            route.fulfill(status=500, json={"error": {"message": "x", "code": "internal_error"}})
        else:
            route.fulfill(
                json={"details": {"quantization_level": "Q4_0"}, "model_info": {"general.architecture": "qwen3"}}
            )

    chat.route(
        "**/v1/models", lambda route: route.fulfill(json={"data": [{**card, "id": one, "root": one} for one in names]})
    )
    inventory = {"changes": False, "models": [{**stocked, "id": one} for one in names], "known": [], "pulls": []}
    chat.route("**/v1/models/inventory", lambda route: route.fulfill(json=inventory))
    chat.route("**/api/show", show)
    chat.get_by_role("link", name="Models").click()
    row(chat, "whole").get_by_text("qwen3 · Q4_0").wait_for()


def test_where_models_stay_the_page_says_who_can_change_that(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with managed(tmp_path, allow_model_changes=False) as site:
        page = open_page(f"{site.url}#/models")
        page.get_by_text("Only whoever runs this server adds and removes models.").wait_for()
        assert page.get_by_label("Model on Hugging Face").count() == 0
        page.get_by_text("For whoever runs this server", exact=True).click()
        page.get_by_text("--allow-model-changes").wait_for()
        button(page, "Load first").click()
        row(page, "first").get_by_text("ready").wait_for()


def test_what_is_for_operators_needs_their_key(tmp_path: Path, open_page: Callable[..., Any]) -> None:
    with managed(tmp_path, api_key=("client",), management_key=("operator",)) as site:
        page = open_page(f"{site.url}#/models")
        page.get_by_text("This server needs an API key.").wait_for()
        page.get_by_label("API key").fill("client")
        button(page, "Use").click()
        row(page, "first").get_by_text("not loaded").wait_for()
        page.get_by_text("This needs the management key of this server.").wait_for()
        assert page.get_by_label("Model on Hugging Face").count() == 0
