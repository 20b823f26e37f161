# SPDX-License-Identifier: MIT
"""Display of an answer as coloured Markdown on a terminal, while it is generated.

A complete block of Markdown is printed once. The current block is redrawn below it, in the last lines of the screen.
Text that rich cannot render without loss is shown as source.
"""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, emphasis, strikethrough
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, Segments
from rich.text import Text

from candle_vllm.server.commands.terminal import Display, Said, terminal_safe

if TYPE_CHECKING:
    from rich.console import RenderableType

_EVERY = 0.08  # minimum seconds between two drawings of the current block
_MAX_BLOCK = 1 << 15  # maximum characters of a block; a longer one is printed as source without waiting for its end
_MAX_DRAWN = 1 << 13  # maximum characters of a current block that is redrawn as Markdown
_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_RUN = re.compile(r"\*+|~+")
_CJK = re.compile(  # Hangul, CJK radicals to ideographs, Hangul syllables, compatibility and full-width forms
    "[\u1100-\u11ff\u2e80-\u2fff\u3001-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff01-\uffee\U00020000-\U0003ffff]"
)
_Rule = Callable[[StateInline, bool], bool]
_CODE_THEME = "ansi_dark"  # the terminal's own colours


def colour_console(stream: TextIO) -> Console:
    """Return a rich console that prints texts unchanged."""
    return Console(file=stream, highlight=False, markup=False, emoji=False)


def _masked(text: str, begin: int) -> str:
    """Replace punctuation that must not affect the emphasis marks at `begin` by a letter; the length stays the same.

    CommonMark uses the punctuation beside marks to decide whether they open or close, which relies on spaces between
    words. Here CJK punctuation counts as a letter, and so does punctuation on the other side of the marks from a CJK
    character. Source: the specification of markdown-cjk-friendly.
    """
    run = _RUN.match(text, begin)
    if run is None:
        return text
    end = run.end()
    for at, other in ((begin - 1, end), (end, begin - 1)):
        one, across = (text[index] if 0 <= index < len(text) else " " for index in (at, other))
        if unicodedata.category(one)[0] in "PS" and (_CJK.match(one) or _CJK.match(across)):
            text = f"{text[:at]}a{text[at + 1 :]}"
    return text


def _beside_cjk(rule: _Rule) -> _Rule:
    """Wrap an emphasis rule so that it reads the masked text."""

    def read(state: StateInline, silent: bool) -> bool:
        source = state.src
        try:
            state.src = _masked(source, state.pos)
            return rule(state, silent)
        finally:
            state.src = source

    return read


class MarkdownDisplay(Display):
    """Prints an answer block by block, and reasoning as it arrives."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self._parser.disable(["escape", "reference"])  # \( is TeX more often than an escape
        for name, rule in (("emphasis", emphasis.tokenize), ("strikethrough", strikethrough.tokenize)):
            self._parser.inline.ruler.at(name, _beside_cjk(rule))
        self._live: Live | None = None
        self._drawn_at = 0.0
        self._block = ""  # complete lines of the current block
        self._line = ""  # the current line
        self._fence = ""  # mark that closes the code block in the current block; "" if no code block is open
        self._fence_is_block = False
        self._after_blank = False
        self._torn = False  # whether the beginning of the current block is printed, because the block is too long
        self._any = False

    def show(self, piece: Said) -> None:
        if piece.thought:
            self._finish()
            super().show(piece)
            return
        if not piece.text:
            return
        if self._thinking:
            self._console.out("\n")
            self._thinking = False
        *lines, self._line = (self._line + terminal_safe(piece.text)).split("\n")
        for line in lines:
            self._take(line + "\n")
        if len(self._line) > _MAX_BLOCK:
            self._print(self._line, ended=False)
            self._line = ""
        self._draw()

    def close(self) -> None:
        self._finish()
        if self._thinking:  # there was no answer
            self._console.out("")
        self._write_rate()

    def _take(self, line: str) -> None:
        """Append a complete line to the block; print the block that this line ends, or the one that ended before it."""
        mark = _FENCE.match(line)
        if self._fence:
            self._block += line
            closes = mark is not None and mark[2].startswith(self._fence) and not mark[3].strip()
            if closes:
                self._fence = ""
                if self._fence_is_block:
                    self._print(self._block)
            self._hold_size()
            return
        starts = not line[0].isspace()
        if mark is not None and "`" not in mark[3]:
            if starts:
                self._print(self._block)
            self._fence, self._fence_is_block = mark[2], starts
        elif self._after_blank and starts:
            self._print(self._block)
        self._after_blank = not line.strip()
        self._block += line
        self._hold_size()

    def _hold_size(self) -> None:
        if len(self._block) > _MAX_BLOCK:
            self._print(self._block, ended=False)

    def _print(self, source: str, *, ended: bool = True) -> None:
        torn = self._torn or not ended
        self._block = ""
        if source.strip():
            if self._live is not None:
                self._live.update(Text(""), refresh=False)
            shown = Text(source.rstrip("\n")) if torn else self._rendered(source)
            self._console.print(Group(Text(""), shown) if self._any and not self._torn else shown)
            self._any = True
        self._torn = not ended
        if ended:
            self._after_blank = False

    def _rendered(self, source: str) -> RenderableType:
        """Render a block as Markdown, or as source if Markdown would lose letters or digits."""
        tokens = self._parser.parse(source)
        for token in tokens:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"  # preserves line breaks, for example of a poem
        markdown = Markdown("", code_theme=_CODE_THEME, hyperlinks=False)
        markdown.parsed = tokens
        segments = list(self._console.render(markdown))
        needed = _letters(source) - _letters("".join(token.info for token in tokens if token.type == "fence"))
        if needed - _letters("".join(segment.text for segment in segments)):
            return Text(source.strip("\n"))
        return Segments(segments)

    def _draw(self) -> None:
        now = time.monotonic()
        if now - self._drawn_at < _EVERY:
            return
        self._drawn_at = now
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live.start()
        source = self._block + self._line
        small = len(source) <= _MAX_DRAWN and not self._torn
        shown = self._rendered(source) if small and source.strip() else Text(source[-_MAX_DRAWN:].strip("\n"))
        self._live.update(_LastLines(Group(Text(""), shown) if self._any else shown), refresh=True)

    def _finish(self) -> None:
        self._print(self._block + self._line)
        self._line = self._fence = ""
        if self._live is not None:
            self._live.update(Text(""), refresh=False)
            self._live.stop()
            self._live = None
        self._any = False


class _LastLines:
    """The last lines of a renderable that fit on the screen."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _letters(text: str) -> Counter[str]:
    return Counter(char for char in text if char.isalnum())
