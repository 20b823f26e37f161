# SPDX-License-Identifier: MIT
"""A server with the web UI around a scripted engine, in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from candle_vllm.server import Settings
from candle_vllm.server.app import create_app
from candle_vllm.server.models.manager import ModelManager
from candle_vllm.server.serve import bind, make_server
from packages.server.tests.server_fakes import PacedEngine
from tests.waiting import wait_for

REPO = "org/model-GGUF"  # on the hub on loopback: files that are no model, the first of `BIG` bytes
TOY = "org/toy"  # a real model
BIG = 1 << 20

LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2

MARKDOWN = f"""# A title

Some **bold**, *italic*, ~~struck~~ and `code`, a [link](https://example.org/page) and a formula $e^{{i\\pi}} + 1 = 0$.

| Name | Value | A rather long column | Another | And one more | Notes |
|:-----|------:|----------------------|:-------:|--------------|-------|
| one | 1 | the quick brown fox jumps over the lazy dog | a | b | something longer to make the table wide |
| two | 22 | `code` | c | d | {"very " * 6}wide |

1. first
2. second
   - nested
   - list

- [x] done
- [ ] open

> A quotation
> over two lines.

```python
def longest(text: str) -> str:
    \"\"\"The longest word.\"\"\"
    return max(text.split(), key=len)  # {"a long comment " * 8}
```

$$
\\int_{{-\\infty}}^{{\\infty}} e^{{-x^2}}\\,dx = \\sqrt{{\\pi}}
$$

{LONG_WORD}
"""

CALL = '<tool_call>\n{"name": "clock__now", "arguments": {"zone": "Europe/Berlin"}}\n</tool_call>'
THOUGHTS = "<think>The user wants a number. I take 42.</think>The number is 42."
SLOW = " ".join(f"word{number}" for number in range(400))
HEADINGS = "### Skips two\n\n# Top\n\n###### Skips more\n\n> # quoted\n\n- # item\n\nend"
XSS = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 2"><svg onload="window.pwned = 3"></svg>

[click](javascript:window.pwned=4) [data](data:text/html,<script>1</script>) <a href="javascript:window.pwned=5">x</a>

![track](https://evil.example/pixel.png) <iframe src="https://evil.example"></iframe>

```html
</code></pre><script>window.pwned = 6</script>
```

${window.pwned = 7} {{constructor.constructor('window.pwned = 8')()}} `<img src=x onerror=window.pwned=9>`

| <script>window.pwned = 10</script> | <img src=x onerror=window.pwned=11> |
|---|---|
| <svg/onload=window.pwned=12> | [x](JaVaScRiPt:window.pwned=13) |

$\\href{javascript:window.pwned=14}{x}$ <style>body{display:none}</style> <meta http-equiv=refresh content="0;url=https://evil.example">
"""


def answer(prompt: str) -> str:
    """What the scripted model says, by what the last message asks for."""
    asked = prompt.rsplit("<|im_start|>", 2)[-2] if prompt.endswith("assistant\n") else prompt
    if "tool\n" in asked[:8]:
        return f"The tool said: {asked.removeprefix('tool').split('<|im_end|>')[0].strip()}"
    if "Write a title for this conversation" in asked:
        return "**Title:** “A *good* name.”" if "title" in prompt.split("<|im_start|>")[1] else "<unsure>"
    if not prompt.endswith("assistant\n"):
        return " and it goes on."
    for word, said in (
        ("markdown", MARKDOWN), ("clock", CALL), ("think", THOUGHTS), ("slowly", SLOW), ("hostile", XSS),
        ("headings", HEADINGS),
    ):  # fmt: skip
        if word in asked:
            return said
    said = asked.removeprefix("user").split("<|im_end|>")[0].strip()
    return f"You said: {said}"


@contextlib.contextmanager
def ui_server(
    script: Callable[[str], Any] = answer, pause: float = 0.0, manager: ModelManager | None = None, sees: bool = False,
    model: Any = None, **settings: Any,
) -> Iterator[Any]:  # fmt: skip
    """Serves the page, with the models of a manager, or with an engine that is no script, where one is given; gives an
    object with `url` and `engine`."""
    options = {
        "tool_parser": "hermes", "reasoning_parser": "think", "served_model_name": ("demo-model", "other-name"),
        "port": 0, **settings,
    }  # fmt: skip
    made = Settings(shutdown_timeout=1, ui_server=True, **options)
    engine = model or PacedEngine(script, pause=pause, max_model_len=400_000, num_cached_tokens=3, sees=sees)
    server, listener = make_server(create_app(manager or engine, made), made), bind(made.address)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}/", engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Site:
    """A served page: its address, and the engine behind it."""

    def __init__(self, url: str, engine: Any) -> None:
        self.url = url
        self.engine = engine
