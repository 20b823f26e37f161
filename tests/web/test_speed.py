# SPDX-License-Identifier: MIT
"""An answer of 20,000 tokens, several thousand a second: the page draws smoothly to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.web.actions import say
from tests.web.ui_server import MARKDOWN, Site, ui_server

TOKENS = 20_000
LENGTH = 4  # characters of a token
TOGETHER = 4  # tokens of one event

_MEASURE = """
window.frames = [];
let last = performance.now();
requestAnimationFrame(function frame(now) {
  if (document.querySelector(".answer[aria-busy=true]")) window.frames.push(now - last);
  last = now;
  requestAnimationFrame(frame);
});
"""


def _pieces(kind: str) -> list[str]:
    """A long answer: mixed Markdown, one block of code, or one list."""
    if kind == "mixed":
        text = "\n\n".join(f"## Part {number}\n\n{MARKDOWN}" for number in range(60))
    elif kind == "code":
        text = "```python\n" + "".join(f"value_{number} = compute({number}, 'text')\n" for number in range(2500))
    else:
        text = "".join(f"{number}. an item with **bold** and `code` number {number}\n" for number in range(1, 1900))
    size, end = LENGTH * TOGETHER, min(len(text), LENGTH * TOKENS)
    return [text[at : at + size] for at in range(0, end, size)]


@pytest.fixture(scope="module")
def fast_site(browser: Any) -> Iterator[Site]:
    """A server that sends some tokens each millisecond."""
    with ui_server(
        lambda prompt: _pieces(next(kind for kind in ("mixed", "code", "list") if kind in prompt)), pause=0.001
    ) as served:
        yield served


@pytest.mark.every_case  # a figure of this machine: nothing that the common run can judge
@pytest.mark.parametrize("kind", ["mixed", "code", "list"])
def test_frames_stay_short(fast_site: Site, open_page: Callable[..., Any], kind: str, record_property: Any) -> None:
    best = float("inf")
    for _ in range(5):  # the best of them: others may have the machine
        page = open_page(fast_site.url)
        page.evaluate(_MEASURE)
        say(page, kind)
        page.locator(".answer[aria-busy=true]").wait_for()
        page.locator(".answer[aria-busy=true]").wait_for(state="detached", timeout=120_000)
        frames = sorted(page.evaluate("window.frames"))
        p95 = frames[int(len(frames) * 0.95)]
        middle = frames[len(frames) // 2]
        print(f"{kind}: {len(frames)} frames, p50 {middle:.1f}, p95 {p95:.1f}, longest {frames[-1]:.1f} ms")
        assert len(frames) > 60
        best = min(best, p95)
        if best < 50:
            break
    record_property("frame_p95_ms", best)
    assert best < 50
