# SPDX-License-Identifier: MIT
"""Makes the pictures in docs/images: `uv run --group dev python tests/web/screenshots.py [folder]`."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a program

from playwright.sync_api import sync_playwright

from tests.web.actions import archive, ask, conversation, import_file, say, tools_on
from tests.web.ui_server import ui_server

ROOT = Path(__file__).parents[2]
ANSWER = """The **least squares** line through the points is the one with the smallest sum of squared distances:

$$
\\hat{\\beta} = (X^\\top X)^{-1} X^\\top y
$$

| Method | Cost | When it is right |
|:-------|-----:|:-----------------|
| normal equations | $O(np^2)$ | few columns, well conditioned |
| QR | $O(np^2)$ | the usual choice |
| SVD | $O(np^2)$ | columns nearly dependent |

In Python this is one line:

```python
import numpy as np

beta, *_ = np.linalg.lstsq(X, y, rcond=None)  # by SVD
print(f"slope {beta[0]:.3f}")
```

1. Put the measurements into `X`, one row each.
2. Add a column of ones for the intercept.
"""
QUESTION = "How do I fit a line through measured points?"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
CALL = '<tool_call>\n{"name": "clock__now", "arguments": {"zone": "Europe/Berlin"}}\n</tool_call>'
THOUGHT = "<think>The user wants the line of least squares, with code.</think>"
TITLES = (
    "Names for a small sailing boat",
    "Why is the sky blue?",
    "Regex for ISO dates",
    "Dinner for six, vegetarian",
    "SQL: running totals",
)
SERVERS = [
    {
        "name": "clock",
        "transport": "stdio",
        "state": "ready",
        "error": None,
        "protocol_version": "2026-07-28",
        "tools_count": 1,
        "reconnects": 0,
        "log": ["started"],
    }
]
TOOL = {
    "type": "function",
    "function": {"name": "clock__now", "description": "The time in a zone.", "parameters": {"type": "object"}},
    "server": "clock",
    "original_name": "now",
    "read_only": True,
}


def answer(prompt: str) -> str:
    """The scripted answers."""
    asked = prompt.rsplit("<|im_start|>", 2)[-2]
    if "clock" in asked or "time" in asked:
        return CALL
    return THOUGHT + ANSWER


def prepared(browser: Any, url: str, folder: Path, **options: Any) -> Any:
    """A page with a few conversations."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, "locale": "en-US", **options}).new_page()
    page.route("**/v1/mcp/servers", lambda route: route.fulfill(json={"object": "list", "data": SERVERS}))
    page.route("**/v1/mcp/tools", lambda route: route.fulfill(json={"object": "list", "data": [TOOL]}))
    page.goto(f"{url}#key={'k' * 32}")
    many = [conversation(title, 2, 1_795_000_000_000 - at * 50_000_000) for at, title in enumerate(TITLES)]
    import_file(page, archive(folder / "shots.json", json.loads(json.dumps(many))))
    return page


def send(page: Any, text: str, phone: bool = False) -> None:
    """Asks, also where Enter begins a line."""
    if phone:
        page.locator("#composer").fill(text)
        page.get_by_role("button", name="Send").tap()
        page.locator(".answer").last.wait_for()
        page.locator(".answer[aria-busy=true]").wait_for(state="detached")
    else:
        ask(page, text)
    page.wait_for_timeout(400)


def main() -> None:
    """Writes every picture."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    with (
        tempfile.TemporaryDirectory() as work,
        ui_server(answer, pause=0.0005, served_model_name=("SmolLM2-135M-Instruct",)) as site,
        sync_playwright() as started,
    ):
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = prepared(browser, site.url, Path(work), color_scheme=scheme)
            send(page, QUESTION)
            shoot(page, folder / f"web-ui-{scheme}.png")
        tools_on(page)
        say(page, "What time is it in Berlin?")
        page.locator(".approval").wait_for()
        shoot(page, folder / "web-ui-tools.png", top=False)
        phone = prepared(browser, site.url, Path(work), **PHONE)
        send(phone, QUESTION, phone=True)
        shoot(phone, folder / "web-ui-phone.png")
        browser.close()


def shoot(page: Any, path: Path, top: bool = True) -> None:
    """A picture, of the conversation's beginning or of its end."""
    if top:
        page.locator(".scroller").evaluate("(frame) => frame.scrollTo(0, 0)")
    page.wait_for_timeout(300)
    page.screenshot(path=path)


if __name__ == "__main__":
    main()
