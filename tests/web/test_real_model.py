# SPDX-License-Identifier: MIT
"""The page in front of the demo model: `candle-vllm --ui-server` as a user starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.live_server import ServerProcess
from tests.web.actions import ask, button, say


def test_a_chat_with_the_demo_model(browser: Any, open_page: Callable[..., Any], tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, "--ui-server")
    try:
        shown = [line.split()[-1] for line in server.banner if line.startswith("web UI")]
        assert shown == [server.url + "/"]
        page = open_page(shown[0])
        page.get_by_text("is running on your own server").wait_for()
        page.keyboard.press("Control+,")
        page.get_by_label("Temperature", exact=True).fill("0")
        page.get_by_label("Maximum tokens", exact=True).fill("48")
        page.keyboard.press("Escape")
        page.set_default_timeout(60_000)
        answer = ask(page, "What is the capital of France? Answer in one sentence.")
        assert "Paris" in answer
        page.locator(".numbers").get_by_text("tok/s").first.wait_for()
        say(page, "Tell me a long story about a candle.")
        page.get_by_text("The answer reached the token limit.").wait_for()
        before = page.locator(".answer .markdown").last.text_content()
        page.locator(".ending").get_by_role("button", name="Continue").click()
        page.locator(".answer[aria-busy=true]").wait_for()
        page.locator(".answer[aria-busy=true]").wait_for(state="detached")
        after = page.locator(".answer .markdown").last.text_content()
        assert len(after) > len(before)
        assert after.startswith(before.rstrip())
        page.get_by_role("link", name="Server").click()
        page.get_by_text("Tokens generated").wait_for()
        assert button(page, "Try again").count() == 0
    finally:
        server.stop()
