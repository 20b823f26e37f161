# SPDX-License-Identifier: MIT
"""What a hostile model, address or file can do to the page: nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.web.actions import archive, ask, button, conversation, import_file, said
from tests.web.ui_server import Site


def test_hostile_markdown_is_text(chat: Any) -> None:
    ask(chat, "hostile")
    chat.locator(".answer table").wait_for()
    chat.wait_for_timeout(300)
    assert chat.evaluate("window.pwned") is None
    inside = chat.locator(".answer .markdown")
    assert (
        inside.locator("script, img, svg:not(.icon), iframe, style, meta, form, object, embed, base, link").count() == 0
    )
    assert "<script>window.pwned = 1</script>" in inside.text_content()
    addresses = inside.locator("a").evaluate_all("(links) => links.map((link) => link.href)")
    assert addresses == ["https://evil.example/pixel.png"]  # the picture, as a link


def test_hostile_names_are_text(chat: Any, tmp_path: Path) -> None:
    hostile = conversation("<img src=x onerror=window.pwned=1>", 2)
    hostile["messages"][0]["text"] = "<script>window.pwned=2</script>"
    hostile["messages"][1]["model"] = "<svg onload=window.pwned=3>"
    import_file(chat, archive(tmp_path / "x.json", [hostile]))
    chat.locator(".conversation-link").click()
    said(chat, "<script>window.pwned=2</script>")
    assert chat.evaluate("window.pwned") is None


def test_an_address_sends_nothing(site: Site, open_page: Callable[..., Any]) -> None:
    before = len(site.engine.requests)
    for address in (
        "?q=delete+everything",
        "?prompt=hi&send=1",
        "#/chat/?q=hi",
        "#q=hi",
        "?message=hi#/chat/" + "0" * 32,
    ):
        page = open_page(site.url + address)
        page.get_by_text("What can I help with?").wait_for()
        assert page.locator("#composer").input_value() == ""
    assert len(site.engine.requests) == before


def test_scripts_that_are_put_in_do_not_run(site: Site, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url)
    page.get_by_text("What can I help with?").wait_for()
    page.evaluate("""() => {
        const script = document.createElement("script");
        try { script.text = "window.pwned = 1"; document.body.append(script); } catch {}
        try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.pwned = 2'>"); } catch {}
        const frame = document.createElement("iframe");
        frame.src = "https://evil.example";
        document.body.append(frame);
    }""")
    page.wait_for_timeout(300)
    assert page.evaluate("window.pwned") is None
    context.close()


def test_what_cannot_be_read_is_refused_and_the_page_stays(chat: Any) -> None:
    chat.locator(".composer-frame").wait_for()
    drop = """(where) => {
        const transfer = new DataTransfer();
        const folder = new File(["x"], "a folder");
        folder.arrayBuffer = () => Promise.reject(new DOMException("a folder", "NotFoundError"));
        const files = [folder, new File(["b = 2"], "b.py")];
        Object.defineProperty(transfer, "files", { value: files });
        Object.defineProperty(transfer, "types", { value: ["Files"] });
        const made = (name) => new DragEvent(name, { dataTransfer: transfer, bubbles: true, cancelable: true });
        return ["dragover", "drop"].map((name) => document.querySelector(where).dispatchEvent(made(name)));
    }"""
    assert chat.evaluate(drop, ".composer-frame") == [False, False]
    chat.get_by_text("a folder: it cannot be read.").wait_for()
    button(chat, "Show b.py").wait_for()
    assert chat.evaluate(drop, ".sidebar") == [False, False]  # else the browser would show the file


def test_files_for_the_model_are_fenced(chat: Any) -> None:
    chat.locator(".composer-frame").wait_for()
    chat.evaluate("""() => {
        const transfer = new DataTransfer();
        transfer.items.add(new File(["\\0"], "image.png"));
        transfer.items.add(new File(["a = 1\\n```\\n# not the end"], "x.py"));
        const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
        document.querySelector(".composer-frame").dispatchEvent(drop);
    }""")
    chips = chat.locator(".composer .file")
    chips.wait_for()
    assert chat.locator("#composer").input_value() == ""
    button(chat, "Show x.py").click()
    chat.locator(".file-text", has_text="# not the end").wait_for()
    chat.keyboard.press("Escape")
    refusal = chat.get_by_text("image.png: it is no text file.")
    refusal.wait_for()
    big = {"name": "big.txt", "mimeType": "text/plain", "buffer": b"a" * 600_000}
    with chat.expect_file_chooser() as chooser:
        button(chat, "Attach text files of up to 512 KiB each").click()
    chooser.value.set_files([big])
    chat.get_by_text("big.txt: it has 586 KiB, and a text file may have 512 KiB.").wait_for()
    assert refusal.count() == 0  # one takes the other's place
    chat.locator("#attach-file").set_input_files([{"name": "y.md", "mimeType": "text/markdown", "buffer": b"hello"}])
    chat.get_by_text("big.txt").wait_for(state="detached")
    assert chips.count() == 2
    chat.locator("#attach-file").set_input_files([big])
    chat.get_by_text("big.txt").wait_for()
    button(chat, "Settings of this chat").click()  # a dialog
    chat.get_by_text("big.txt").wait_for(state="detached")
    chat.keyboard.press("Escape")
    chat.locator("#attach-file").set_input_files([big])
    chat.get_by_text("big.txt").wait_for()
    with chat.expect_request("**/v1/chat/completions") as asked:
        button(chat, "Send").click()
    content = asked.value.post_data_json["messages"][-1]["content"]
    assert content == "x.py:\n````py\na = 1\n```\n# not the end\n````\n\ny.md:\n```md\nhello\n```"
    chat.get_by_text("big.txt").wait_for(state="detached")
    assert chips.count() == 0
    assert chat.locator(".question .file").count() == 2
