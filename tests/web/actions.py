# SPDX-License-Identifier: MIT
"""What the tests do on a page, in words of the user."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def say(page: Any, text: str) -> None:
    """Types a message and sends it with Enter."""
    page.locator("#composer").fill(text)
    page.locator("#composer").press("Enter")


def eventually(page: Any, condition: Callable[[], object]) -> None:
    """Waits until `condition` holds and the page has had time for what would be wrong afterwards."""
    for _ in range(600):
        if condition():
            break
        page.wait_for_timeout(100)
    page.wait_for_timeout(200)
    assert condition(), "waited in vain"


def wait_idle(page: Any) -> None:
    """Until no answer is being written."""
    page.locator(".answer[aria-busy=true]").wait_for(state="detached")


def ask(page: Any, text: str) -> str:
    """Sends a message, waits for the answer, and gives its text."""
    before = page.locator(".answer").count()
    say(page, text)
    page.locator(".answer").nth(before).wait_for()
    wait_idle(page)
    return str(page.locator(".answer").last.locator(".step").last.text_content())


def said(page: Any, text: str) -> Any:
    """Waits for a text among the messages, not among what is announced."""
    found = page.locator(".messages").get_by_text(text).first
    found.wait_for()
    return found


def button(page: Any, name: str) -> Any:
    """A button by its whole name."""
    return page.get_by_role("button", name=name, exact=True)


def tools_on(page: Any) -> None:
    """Turns the tools of the shown chat on."""
    button(page, "Tools off").click()
    page.get_by_role("switch", name="Use tools in this chat").check()
    page.keyboard.press("Escape")


def act(page: Any, name: str, action: str) -> None:
    """Chooses from the menu of a conversation or a folder."""
    page.locator(".conversation", has_text=name).first.hover()
    button(page, f"Actions for {name}").click()
    page.get_by_role("menuitem", name=action).click()


def findings(page: Any, axe: str) -> list[str]:
    """What axe-core finds, of whatever weight, in short; by all its rules but those that it calls experimental."""
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(f"() => {{ {axe}; window.axe = axe; }}")
    result = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{one['id']} ({one['impact']}): {node['html'][:200]} ({node.get('failureSummary', '')[:200]})"
        for one in result["violations"]
        for node in one["nodes"][:2]
    ]


def import_file(page: Any, path: Path) -> None:
    """Imports a file through the settings."""
    page.keyboard.press("Control+,")
    page.get_by_role("tab", name="Data").click()
    page.locator("#import-file").set_input_files(str(path))
    page.get_by_text("imported").wait_for()
    page.keyboard.press("Escape")


def archive(path: Path, conversations: list[dict[str, Any]]) -> Path:
    """Writes a file as the page exports it."""
    path.write_text(json.dumps({"format": "candle-vllm-conversations", "version": 1, "conversations": conversations}))
    return path


def conversation(title: str, turns: int, updated: int = 1_700_000_000_000) -> dict[str, Any]:
    """A conversation of question and answer by turns."""
    messages: list[dict[str, Any]] = []
    for number in range(turns):
        parent = f"m{number - 1}" if number else None
        base = {"id": f"m{number}", "parent": parent, "created": number + 1}
        if number % 2 == 0:
            messages.append({**base, "role": "user", "text": f"Question {number} of {title}"})
        else:
            step = {"reasoning": "", "text": f"Answer **{number}** with `code` and a list\n\n- a\n- b", "calls": []}
            messages.append({**base, "role": "assistant", "model": "demo-model", "state": "done", "steps": [step]})
    info = {"title": title, "created": 1, "updated": updated, "settings": {}, "leaf": f"m{turns - 1}"}
    return {"conversation": info, "messages": messages}
