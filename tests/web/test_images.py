# SPDX-License-Identifier: MIT
"""Images in the page: chosen, pasted and dropped, shown before and after they are sent, and kept."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from candle_vllm.core import InferenceEngine
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.toy_sight import write_toy_sight
from tests.web.actions import archive, button, conversation, eventually, import_file, said, say, wait_idle
from tests.web.ui_server import ui_server

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def file(pixels: Any = PIXELS, format: str = "PNG", name: str = "a.png") -> Any:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format)
    return {"name": name, "mimeType": f"image/{format.lower()}", "buffer": data.getvalue()}


@pytest.fixture(scope="module")
def seeing(browser: Any) -> Any:
    with ui_server(lambda _: "A picture.", sees=True) as site:
        yield site


@pytest.fixture
def page(seeing: Any, open_page: Callable[..., Any]) -> Any:
    seeing.engine.pictures.clear()
    return open_page(seeing.url)


def give(page: Any, event: str, files: list[Any]) -> None:
    """Pastes or drops files, as a person's browser says it."""
    data = [[each["name"], each["mimeType"], base64.b64encode(each["buffer"]).decode()] for each in files]
    page.locator("#composer").evaluate(
        """(field, [event, files]) => {
          const transfer = new DataTransfer();
          for (const [name, type, text] of files) {
            transfer.items.add(new File([Uint8Array.from(atob(text), (one) => one.charCodeAt(0))], name, { type }));
          }
          const more = event === "paste" ? { clipboardData: transfer } : { dataTransfer: transfer };
          const made = event === "paste" ? new ClipboardEvent(event, { bubbles: true, cancelable: true, ...more })
            : new DragEvent(event, { bubbles: true, cancelable: true, ...more });
          field.dispatchEvent(made);
        }""",
        [event, data],
    )


def waiting(page: Any) -> Any:
    """The images below the message that is being written."""
    return page.locator(".composer .picture")


def test_a_conversation_of_an_image_alone_is_named_too(seeing: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(seeing.url, titles=True)
    page.locator("#attach-file").set_input_files([file()])
    waiting(page).wait_for()
    button(page, "Send").click()
    page.get_by_role("link", name="A picture", exact=True).wait_for()


def test_a_suggestion_can_be_undone(page: Any) -> None:
    composer = page.locator("#composer")
    composer.fill("What I wrote")
    page.locator(".suggestion").first.click()
    assert composer.input_value() == page.locator(".suggestion").first.inner_text()
    composer.press("Control+z")
    assert composer.input_value() == "What I wrote"


def test_an_image_is_sent_shown_and_kept(page: Any, seeing: Any) -> None:
    page.locator("#attach-file").set_input_files([file()])
    waiting(page).wait_for()
    say(page, "What is this?")
    said(page, "A picture.")
    wait_idle(page)
    assert waiting(page).count() == 0
    assert [each.digest for each in seeing.engine.pictures] == [picture_of(PIXELS).digest]
    for _ in range(2):
        page.locator(".question .picture").click()
        whole = page.locator("dialog .whole-picture")
        whole.wait_for()
        assert whole.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [40, 30]
        page.keyboard.press("Escape")
        whole.wait_for(state="detached")
        page.reload()
        said(page, "A picture.")
    page.locator("#composer").press("ArrowUp")
    page.locator(".editor textarea").fill("And now?")
    page.locator(".editor textarea").press("Enter")
    eventually(page, lambda: len(seeing.engine.pictures) == 2)
    wait_idle(page)


def test_images_are_pasted_dropped_and_taken_back(page: Any, seeing: Any) -> None:
    give(page, "paste", [file()])
    eventually(page, lambda: waiting(page).count() == 1)
    give(
        page,
        "drop",
        [file(255 - PIXELS, name="b.png"), {"name": "c.txt", "mimeType": "text/plain", "buffer": b"hello"}],
    )
    eventually(page, lambda: waiting(page).count() == 2)
    assert page.locator(".composer .file").inner_text().split() == ["c.txt", "1", "KiB"]
    button(page, "Remove image 1").click()
    button(page, "Remove c.txt").click()
    button(page, "Send").click()
    said(page, "A picture.")
    assert [each.digest for each in seeing.engine.pictures] == [picture_of(255 - PIXELS).digest]
    assert page.locator(".question .bubble").count() == 0


def test_a_table_of_a_spreadsheet_is_pasted_as_text(page: Any) -> None:
    """Spreadsheets and word processors also put an image of the text into the clipboard."""
    paste = """(field, types) => {
      const clipboardData = new DataTransfer();
      clipboardData.items.add(new File(["x"], "image.png", { type: "image/png" }));
      for (const type of types) clipboardData.setData(type, "1\\t2");
      return field.dispatchEvent(new ClipboardEvent("paste", { bubbles: true, cancelable: true, clipboardData }));
    }"""
    composer = page.locator("#composer")
    assert composer.evaluate(paste, ["text/plain", "text/html"])  # the browser pastes the text
    assert not composer.evaluate(paste, ["text/html"])  # an image of a page
    assert not composer.evaluate(paste, ["text/plain"])  # a file of a file manager, with its name


def test_what_is_given_while_an_image_is_read_is_kept_and_sent_with_it(page: Any, seeing: Any) -> None:
    page.evaluate("""() => {
      const plain = window.createImageBitmap;
      window.read = [];
      window.createImageBitmap = async (file) => {
        await new Promise((resolve) => window.read.push(resolve));
        return plain(file);
      };
    }""")
    give(page, "paste", [file()])
    give(page, "paste", [file(255 - PIXELS, name="b.png")])
    give(page, "drop", [{"name": "c.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    page.locator(".composer .file").wait_for()
    eventually(page, lambda: page.evaluate("window.read.length") == 2)
    say(page, "These?")  # is not sent before all is read
    assert button(page, "Send").is_disabled()
    page.evaluate("window.read[1]()")
    eventually(page, lambda: waiting(page).count() == 1)
    page.evaluate("location.hash = '#/models'")  # another page, which the input does not outlive
    page.locator("#composer").wait_for(state="detached")
    page.evaluate("window.read[0]()")
    page.evaluate("history.back()")
    eventually(page, lambda: waiting(page).count() == 2)
    assert (page.locator(".composer .file").count(), page.locator("#composer").input_value()) == (1, "These?")
    page.locator("#composer").press("Enter")
    said(page, "A picture.")
    assert len(seeing.engine.pictures) == 2
    assert (page.locator(".question").count(), waiting(page).count()) == (1, 0)
    assert page.locator(".composer .file").count() == 0


def test_large_images_are_made_smaller_and_broken_ones_named(page: Any, seeing: Any) -> None:
    large = np.kron(PIXELS[:, :, :], np.ones((100, 100, 1), np.uint8))
    page.locator("#attach-file").set_input_files([
        file(large, "JPEG", "large.jpg"), {"name": "d.png", "mimeType": "image/png", "buffer": b"none"}
    ])  # fmt: skip
    eventually(page, lambda: waiting(page).count() == 1)
    page.get_by_text("d.png: these images could not be read.").first.wait_for()
    say(page, "Large")
    said(page, "A picture.")
    assert [(each.width, each.height) for each in seeing.engine.pictures] == [(2048, 1536)]


def test_images_of_rare_kinds_are_drawn_anew_or_named(page: Any, seeing: Any) -> None:
    give(page, "drop", [file(format="BMP", name="a.bmp"), {"name": "b.heic", "mimeType": "image/heic", "buffer": b"x"}])
    page.get_by_text("b.heic: these images could not be read.").first.wait_for()
    eventually(page, lambda: waiting(page).count() == 1)
    assert waiting(page).locator("img").get_attribute("src").startswith("data:image/jpeg")
    say(page, "Rare")
    said(page, "A picture.")
    assert [(each.width, each.height) for each in seeing.engine.pictures] == [(40, 30)]


def test_there_is_an_end_to_them(page: Any) -> None:
    page.locator("#attach-file").set_input_files(
        [file(np.roll(PIXELS, number), name=f"{number}.png") for number in range(9)]
    )
    eventually(page, lambda: waiting(page).count() == 8)
    page.get_by_text("A message takes up to 8 images.").first.wait_for()


def test_images_that_the_server_would_not_take_together_are_left_out(open_page: Callable[..., Any]) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (400, 600, 3), dtype=np.uint8)  # a PNG of 0.7 MB
    with ui_server(lambda _: "A picture.", sees=True, max_body_mb=2) as site:
        page = open_page(site.url)
        page.locator("#attach-file").set_input_files(
            [file(np.roll(noise, number), name=f"{number}.png") for number in range(4)]
        )
        page.get_by_text("more than the server takes in one request (2 MiB)").first.wait_for()
        assert waiting(page).count() == 1
        say(page, "One")
        said(page, "A picture.")
        wait_idle(page)
        page.locator("#attach-file").set_input_files([file(255 - noise, name="b.png")])
        page.get_by_text("more than the server takes in one request (2 MiB)").first.wait_for()
        assert waiting(page).count() == 0
        assert len(site.engine.pictures) == 1


def test_a_phone_shows_the_images_of_a_message(page: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator("#attach-file").set_input_files([file(name=f"{number}.png") for number in range(8)])
    eventually(page, lambda: waiting(page).count() == 8)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    say(page, "These?")
    said(page, "A picture.")
    wait_idle(page)
    assert page.locator(".question .picture").count() == 8
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=tmp_path / "phone.png")


def test_a_model_that_reads_text_is_shown_none(chat: Any) -> None:
    chat.locator("#attach-file").set_input_files([file()])
    chat.get_by_text("a.png: the chosen model reads text only.").first.wait_for()
    assert waiting(chat).count() == 0


def test_what_comes_in_from_a_file_is_an_image_or_nothing(page: Any, tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(file()["buffer"]).decode()
    wrong = ["https://evil.example/x.png", "data:image/svg+xml;base64,AAAA", "javascript:alert(1)", 5]
    given = conversation("Seen", 2)
    given["messages"][0]["images"] = [*wrong, url]
    import_file(page, archive(tmp_path / "x.json", [given]))
    page.locator(".conversation-link").first.click()
    page.locator(".question .picture").wait_for()
    assert page.locator(".question .picture img").evaluate_all("images => images.map(({ src }) => src)") == [url]


def test_a_small_random_model_is_shown_one(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """Of SmolVLM's shape, in a real browser: five tiles of 16 embeddings are counted in its prompt."""
    with (
        InferenceEngine(write_toy_sight(tmp_path / "sight")) as engine,
        ui_server(model=engine, tool_parser=None, reasoning_parser=None) as site,
    ):
        page = open_page(site.url)
        page.keyboard.press("Control+,")
        page.get_by_label("Maximum tokens", exact=True).fill("6")
        page.get_by_label("Temperature", exact=True).fill("0")  # else one answer of some fifty ends before
        page.keyboard.press("Escape")
        page.locator("#attach-file").set_input_files([file()])
        waiting(page).wait_for()
        say(page, "What is this?")
        page.locator(".answer").wait_for()
        wait_idle(page)
        stats = engine.stats()
        assert stats.generation_tokens >= 6
        assert stats.prompt_tokens > 80
        assert engine.stats().images_encoded == 1
        page.locator(".question .picture").wait_for()
        page.locator(".answer .markdown").last.wait_for()
        page.screenshot(path=tmp_path / "seen.png")
