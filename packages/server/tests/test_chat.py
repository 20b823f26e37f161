# SPDX-License-Identifier: MIT
"""`candle-vllm chat` on a terminal, with a scripted engine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyte
import pytest
from PIL import Image
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.server.cli import main
from candle_vllm.server.commands import chat as chat_module
from candle_vllm.server.commands import markdown
from candle_vllm.server.commands.chat import read_saved
from candle_vllm.server.commands.interactive import HISTORY_FILE, MAX_HISTORY, editor, line_reader
from candle_vllm.server.commands.terminal import Said
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import AdapterOptions
from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.terminals import Terminal

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


def saved(terminal: Terminal, folder: Path) -> list[dict[str, str]]:
    """The question and the answer that `/save` writes; the session ends."""
    terminal.wait_for_prompt()
    terminal.type("/save talk.json\r")
    terminal.wait_for("2 messages are in talk.json")
    terminal.wait_for_prompt()
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    return json.loads((folder / "talk.json").read_text())["messages"]


class TestOnATerminal:
    def test_a_pasted_text_of_several_lines_is_one_question(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "First.", "Second.")
        terminal.wait_for_prompt()
        terminal.type("\x1b[200~one\ntwo\x1b[201~\r")
        terminal.wait_for("First.")
        question, answer = saved(terminal, tmp_path)
        assert (question["content"], answer["content"]) == ("one\ntwo", "First.")

    def test_triple_quotes_hold_several_lines(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "First.")
        terminal.wait_for_prompt()
        terminal.type('"""one\r')
        terminal.wait_for("\n...")
        terminal.type('two"""\r')
        terminal.wait_for("First.")
        assert saved(terminal, tmp_path)[0]["content"] == "one\ntwo"

    def test_ctrl_c_in_a_command_ends_it_and_not_the_conversation(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        terminal = Terminal(tmp_path, ["chat"], "First.")
        terminal.wait_for_prompt()
        terminal.type("one\r")
        terminal.wait_for("First.")
        terminal.wait_for_prompt()
        terminal.type("/load pipe\r")
        terminal.wait_until(lambda: not terminal.echoes)
        time.sleep(0.1)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(stopped)")
        assert saved(terminal, tmp_path)[0]["content"] == "one"

    def test_what_was_typed_is_there_in_the_next_session(self, tmp_path: Path) -> None:
        for keys, answer in (("remember me\r", "Yes."), (UP + "\r", "Again.")):
            terminal = Terminal(tmp_path, ["chat"], answer)
            terminal.wait_for_prompt()
            terminal.type(keys)
            terminal.wait_for(answer)
            terminal.wait_for_prompt()
            terminal.type(CTRL_D)
            assert terminal.end() == 0
        assert "> remember me" in terminal.screen
        assert (tmp_path / HISTORY_FILE).stat().st_mode & 0o777 == 0o600

    def test_ctrl_c_clears_the_line_and_stops_an_answer(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "word " * 2000, "Short.", pause=0.01)
        terminal.wait_for_prompt()
        terminal.type("never sent")
        terminal.wait_for("never sent")
        terminal.type(CTRL_C)
        terminal.wait_for_prompt()
        terminal.type("One\r")
        terminal.wait_for("word word")
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped)")
        question, answer = saved(terminal, tmp_path)
        assert question["content"] == "One"
        assert answer["content"].startswith("word word")
        assert "Traceback" not in terminal.shown

    def test_keys_typed_while_an_answer_runs_wait_for_the_prompt(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "word " * 60, "Second.", pause=0.01)
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for("word word")
        assert not terminal.echoes
        os.kill(terminal.process.pid, signal.SIGSTOP)
        terminal.set_echo()  # as a shell does
        os.kill(terminal.process.pid, signal.SIGCONT)
        terminal.wait_until(lambda: not terminal.echoes)
        terminal.type("ahead")  # a key pressed before may reach the terminal's line only once it echoes
        terminal.wait_for("> ahead")
        assert terminal.screen.count("ahead") == 1
        assert terminal.screen.count("word") == 60
        terminal.type(CTRL_C + CTRL_D)
        assert terminal.end(lambda: terminal.echoes) == 0

    @pytest.mark.parametrize("end", [CTRL_C, "failure"])
    def test_keys_are_seen_again_behind_an_answer(self, end: str, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], *["word " * 2000] * (end == CTRL_C), pause=0.01)
        terminal.wait_until(lambda: "/help lists" in terminal.shown)
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        if end == CTRL_C:
            terminal.wait_for("word word")
            terminal.type(CTRL_C)
        terminal.wait_for("(stopped)" if end == CTRL_C else "error:")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end(lambda: terminal.echoes) == 0

    def test_markdown_is_coloured_and_whole(self, tmp_path: Path) -> None:
        code = "\n".join(f"value_{number} = {number}" for number in range(60))
        answer = (
            f"# Title\n\nSome **bold** text with `vector<int>`.\n\n```python\n{code}\n```\n\n- one\n- two <b>\n\nEnd."
        )
        terminal = Terminal(tmp_path, ["chat"], answer, pause=0.002, lines=20)
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for("a second)")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert "**" not in terminal.screen
        assert "```" not in terminal.screen
        assert "\x1b[" in terminal.shown
        assert [terminal.screen.count(line) for line in ("bold text with vector<int>", "two <b>", "End.")] == [1, 1, 1]
        assert re.findall(r"value_(\d+) = \1\b", terminal.screen) == [str(number) for number in range(60)]
        assert re.search(r"\(\d+ tokens, [\d.]+ a second\)", terminal.screen)

    @pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colour", "plain"])
    def test_a_sign_of_life_until_the_text_begins(self, environment: dict[str, str], tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "Yes", pause=0.8, environment=environment)
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for(" reading")
        assert "reading" in terminal.screen
        terminal.wait_for("a second)")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert re.fullmatch(r"[^>]*> Go\nYes\n\(4 tokens, [\d.]+ a second\)\n>", terminal.screen)
        assert terminal.shown.rindex("\x1b[?25h") > terminal.shown.rindex("\x1b[?25l")  # the cursor is there again

    def test_ctrl_c_before_the_text_leaves_no_sign(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "Never", "Short", pause=60.0)
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for(" reading")
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped)")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert "reading" not in terminal.screen

    def test_ctrl_c_while_a_model_loads_goes_back_to_the_one_before(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "Still here.")
        terminal.wait_for_prompt()
        terminal.type("/model slow\r")
        terminal.wait_for("loading the slow one")
        terminal.type(CTRL_C)
        terminal.wait_for("(stopped); going back to the model before")
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for("Still here.")
        assert saved(terminal, tmp_path)[1]["content"] == "Still here."

    def test_without_colour_markdown_keeps_its_shape(self, tmp_path: Path) -> None:
        text = "# Title\n\nSome **bold** `code`.\n"
        terminal = Terminal(tmp_path, ["chat"], text, environment={"NO_COLOR": "1"})
        terminal.wait_for_prompt()
        terminal.type("Go\r")
        terminal.wait_for("a second)")
        terminal.wait_for_prompt()
        terminal.type(CTRL_D)
        assert terminal.end() == 0
        assert "Some bold code." in terminal.screen
        assert not re.search(r"\x1b\[[0-9;]*[34]\dm", terminal.shown.partition("Go")[2].partition("a second")[0])

    def test_a_dumb_terminal_gets_no_escapes_with_an_answer(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"], "Some **bold** text.\n", environment={"TERM": "dumb"})
        terminal.wait_for("/help lists")
        terminal.type("Go\r")
        terminal.wait_for("a second)")
        terminal.wait_for_prompt()
        terminal.type("/exit\r")  # its prompt is there before its keys are
        assert terminal.end() == 0
        answer = terminal.shown[terminal.shown.index("Some") : terminal.shown.index("a second)")]
        assert "Some **bold** text." in answer
        assert "\x1b" not in answer

    def test_ctrl_c_at_an_empty_prompt_names_ctrl_d(self, tmp_path: Path) -> None:
        terminal = Terminal(tmp_path, ["chat"])
        terminal.wait_for_prompt()
        terminal.type(CTRL_C)
        terminal.wait_for("(Ctrl+D or /exit leaves)")
        terminal.wait_for_prompt()
        terminal.type("exit\r")
        assert terminal.end() == 0


WHOLE = [
    "See [one][1] and ![a picture](http://host/p.png).\n\n[1]: http://host/path\n\nDone \\(x\\) &amp; <i>so</i>.",
    "Roses red\nViolets blue\n\n1. one\n\n1. again\n\n   ```sh\n   ls\n\n   cd\n   ```\n2. last\n",
    "| a | b |\n|---|---|\n| "
    + "w" * 90
    + " | short |\n\nafter\n"
    + "|x" * 60
    + "\n"
    + "|-" * 60
    + "\n"
    + "|y" * 60
    + "\n",
    "````md\n```py\na = 1\n```\n````\ntext at once\n~~~\nnever closed\n" + "row\n" * 50,
    "> quoted\n> more\nlazy\n\nSetext\n===\n***\n    indented\n\n    still\n",
    "long " * 30_000,
    "```\n" + "many lines\n" * 8000 + "```\nend",
]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("source", WHOLE, ids=range(len(WHOLE)))
@pytest.mark.parametrize("size", [1, 7, 5000])
def test_no_letter_is_lost_or_shown_twice(
    source: str, size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if size == 1 and len(source) > 5000:
        size = 50
    monkeypatch.setattr(markdown, "_EVERY", 0.0 if len(source) < 5000 else 0.5)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="256", width=60, height=20, _environ={})
    display = markdown.MarkdownDisplay(console)
    for begin in range(0, len(source), size):
        display.show(Said(source[begin : begin + size]))
    display.close()
    screen = pyte.HistoryScreen(60, 20, history=100_000)
    pyte.Stream(screen).feed((file.getvalue() + capsys.readouterr().out).replace("\n", "\r\n"))
    rows = [*screen.history.top, *screen.buffer.values()]
    seen = Counter(row[x].data for row in rows for x in range(60) if row[x].data.isalnum())
    languages = Counter("".join(re.findall(r"^ *`{3,}(\w+)$", source, re.MULTILINE)))
    written = Counter(char for char in source if char.isalnum())
    assert not seen - written
    assert not written - seen - languages


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_reasoning_without_an_answer_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen())
    monkeypatch.setenv("TERM", "dumb")
    display = markdown.MarkdownDisplay(Console(file=screen, force_terminal=True, color_system=None, width=60))
    display.show(Said("Hm", thought=True))
    display.tell_rate(5, 1.0)
    display.close()
    assert screen.getvalue() == "Hm\n(5 tokens, 4.0 a second)\n"


def test_remarks_cannot_move_the_cursor_beside_redirected_answers(
    monkeypatch: pytest.MonkeyPatch, engine: PacedEngine, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "\x1b]0;title\x07"}]
    (tmp_path / "t.json").write_text(json.dumps({"model": "m", "messages": messages}))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/load t.json\n")))
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    assert main(["chat", "--m", "first"]) == 0
    assert "user: ]0;title\n" in screen.getvalue()


def test_a_long_text_in_triple_quotes_is_read_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'"""' + b"x\n" * 200_000 + b'"""\nnext'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    began = time.process_time()
    read = line_reader(Path())
    assert (len(read() or ""), read(), read()) == (399_999, "next", None)
    assert time.process_time() - began < 2


def test_an_old_history_keeps_its_newer_half(tmp_path: Path) -> None:
    from candle_vllm.server.commands.interactive import private_history

    path = tmp_path / HISTORY_FILE
    path.parent.mkdir()
    path.write_text("".join(f"\n# then\n+entry {number}\n+# more\n" for number in range(MAX_HISTORY // 20)))
    path.chmod(0o644)
    kept = list(private_history(path).load_history_strings())
    assert kept[0] == f"entry {MAX_HISTORY // 20 - 1}\n# more"
    assert all(re.fullmatch(r"entry \d+\n# more", entry) for entry in kept)
    assert path.stat().st_size <= MAX_HISTORY // 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PacedEngine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    engine = PacedEngine(["Hel", "lo!"])
    engine.loaded: list[str | None] = []  # type: ignore[attr-defined]

    def load(settings: Settings, **_: object) -> PacedEngine:
        engine.loaded.append(settings.model)  # type: ignore[attr-defined]
        if settings.model == "missing":
            raise ModelNotFoundError("there is no model missing")
        if settings.model == "huge":
            raise MemoryError
        if settings.model == "locked":
            raise PermissionError(13, "Permission denied", "locked")
        return engine

    monkeypatch.setattr(chat_module, "load_engine", load)
    return engine


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *lines: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    status = main(["chat", "--m", "first", "--system", "S"])
    captured = capsys.readouterr()
    assert status == ("error: " in captured.err)
    assert "error: " not in captured.out
    return captured.out + captured.err


def asked(engine: PacedEngine) -> list[list[str]]:
    return [[message["content"] for message in call.messages] for call in engine.template_calls]


def test_keys_that_are_no_utf8_can_be_kept(tmp_path: Path) -> None:
    with create_pipe_input() as keys:
        keys.send_bytes(b"a\xffb\r\x04")
        read = editor(tmp_path / "history", keys, DummyOutput())
        text = read()
        assert read() is None
    assert text is not None
    assert (text.encode()[:1], text.encode()[-1:]) == (b"a", b"b")


def test_tab_completes_commands_and_paths(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text("x")
    terminal = Terminal(tmp_path, ["chat"])
    terminal.wait_for_prompt()
    terminal.type("/loa\t")
    terminal.wait_for("/load")
    terminal.type(" ta\t")
    terminal.wait_for("/load talk.json")
    terminal.type("\r")
    terminal.wait_for("talk.json is not a conversation that /save wrote")
    terminal.wait_for_prompt()
    terminal.type(CTRL_D)
    assert terminal.end() == 0


class TestImages:
    def test_they_go_with_the_next_message_and_are_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        engine = PacedEngine("I see.", sees=True)
        monkeypatch.setattr(chat_module, "load_engine", lambda *_, **__: engine)
        for name, shade in (("a b.png", 10), ("c.PNG", 200)):
            Image.new("RGB", (4, 3), (shade, 0, 0)).save(tmp_path / name)
        (tmp_path / "no.png").write_bytes(b"none")
        out = talk(
            monkeypatch, capsys, "/image a b.png", f"'{tmp_path}/c.PNG'", "What?", "And?", "/save s.json", "/clear",
            "/load s.json", "/image no.png", "/image none.png", "Still?",
        )  # fmt: skip
        assert "(a b.png, 4 x 3: it is sent with the next message)" in out
        assert "(c.PNG, 4 x 3: it is sent with the next message)" in out
        assert "user: (image) (image) What?" in out
        assert "error: no.png: this is not an image" in out
        assert "cannot read none.png" in out
        assert [int(each.pixels[0, 0, 0]) for each in engine.pictures] == [10, 200] * 3

    def test_one_that_reads_text_takes_none(
        self, engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
        out = talk(monkeypatch, capsys, "/image a.png", "a.png")
        assert "error: scripted takes text only" in out
        assert asked(engine)[-1][-1] == "a.png"

    def test_a_model_that_reads_text_says_how_to_go_on_without_earlier_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        engines = {model: PacedEngine("Yes.", sees=model == "first") for model in ("first", "blind")}
        monkeypatch.setattr(chat_module, "load_engine", lambda settings, **_: engines[settings.model])
        Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
        for lines in (["/image a.png", "A", "/model blind"], ["/image a.png", "/model blind"]):
            out = talk(monkeypatch, capsys, *lines, "B", "/clear", "C")
            assert "error: scripted takes text only, but there are images: /clear starts over without them" in out
            assert asked(engines["blind"])[-1] == ["S", "C"]

    @pytest.mark.parametrize("content", [5, None, {}, [5], [{"type": "text"}], [{"type": "audio"}]])
    def test_what_is_none_is_not_loaded(self, content: Any, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        path.write_text(json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}))
        with pytest.raises(UsageError, match="message 1 must have a text"):
            read_saved(path)


class TestOnAPipe:
    def test_one_line_is_a_message_and_triple_quotes_hold_several(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = ["/system -", "A", "/clear", '"""one', "", 'two"""', "/clear", '"""', "three", '"""', ""]
        talk(monkeypatch, capsys, *lines)
        assert asked(engine) == [["A"], ["one\n\ntwo"], ["three"]]

    def test_what_begins_with_a_slash_can_be_said(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        texts = ["//help me", '"""/help"""', '"""//x"""', "/usr/bin/ls is what?"]
        talk(monkeypatch, capsys, *texts)
        last = asked(engine)[-1]
        assert last[1::2] == ["/help me", "/help", "//x", "/usr/bin/ls is what?"]

    def test_answers_alone_are_on_standard_output(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf/clear\nA\n/nothing\n/load nowhere\nB\n"))
        )
        assert main(["chat", "--m", "first"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "Hello!\nHello!\n"
        assert [line.split(" ")[0] for line in captured.err.splitlines()] == ["scripted:", "(new", "error:", "error:"]

    @pytest.mark.parametrize(
        ("data", "why"), [(b"A\nx\xff\n", "message on standard input is not UTF-8: byte 1"), (b'"""A', "ended before")]
    )
    def test_what_cannot_be_read(
        self,
        data: bytes,
        why: str,
        engine: PacedEngine,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main(["chat", "--m", "first"]) == 2
        assert why in capsys.readouterr().err


def test_a_message_that_ends_like_an_image_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = PacedEngine("I see.", sees=True)
    monkeypatch.setattr(chat_module, "load_engine", lambda *_, **__: engine)
    long, unknown = "Who draws " + "a" * 300 + ".png", "~nobody is in it.png"
    talk(monkeypatch, capsys, long, unknown, "/image ~nobody/a.png")
    assert asked(engine)[-1][1::2] == [long, unknown]


class TestFullContext:
    @pytest.fixture
    def small(self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch) -> PacedEngine:
        small = PacedEngine("Yes.", max_model_len=300)
        monkeypatch.setattr(chat_module, "load_engine", lambda *_, **__: small)
        return small

    def test_the_oldest_turns_are_left_out(
        self, small: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        questions = [f"{number} " + "x" * 40 for number in range(8)]
        out = talk(monkeypatch, capsys, *questions, "/save t.json")
        assert out.count("Yes.\n") == 8
        assert "(the context is full: the oldest 4 messages are left out from here on)" in out
        assert 1 <= out.count("are left out") < 4
        sent = [message["content"] for message in small.template_calls[-1].messages]
        assert (sent[0], sent[-1]) == ("S", questions[-1])
        assert questions[0] not in sent
        assert len(json.loads((tmp_path / "t.json").read_text())["messages"]) == 17

    def test_images_count_in_the_length_of_a_conversation(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        engine = PacedEngine("I see.", sees=True, max_model_len=600)
        look = engine.look

        def wide(ids: Any, images: Any, *args: Any, **options: Any) -> Any:
            seen, inputs = look(ids, images, *args, **options)
            added = sum(
                not isinstance(image, ImageInput) for image in images
            )  # the engine looks at prepared ones again
            return seen + seen[-1:] * 150 * added, inputs  # an image takes 150 tokens

        monkeypatch.setattr(engine, "look", wide)
        monkeypatch.setattr(chat_module, "load_engine", lambda *_, **__: engine)
        Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
        out = talk(monkeypatch, capsys, *["/image a.png", "What?"] * 5)
        assert out.count("I see.\n") == 5
        assert "(the context is full: the oldest 4 messages are left out from here on)" in out

    def test_max_tokens_is_lowered_to_what_is_left(
        self, small: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(monkeypatch, capsys, "/set max_tokens 4000", "A")
        (request,) = small.requests
        assert request.params.max_tokens == 300 - len(request.prompt_token_ids)
        assert f"(max_tokens is {request.params.max_tokens} for this answer" in out

    def test_a_message_that_never_fits_is_told_what_helps(
        self, small: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(monkeypatch, capsys, "A", "x" * 400, "B")
        assert "/clear starts over" in out
        assert "/set max_tokens" in out
        assert asked(small)[-1] == ["S", "A", "Yes.", "B"]


def test_an_answer_that_was_cut_says_so(
    engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = talk(monkeypatch, capsys, "A", "/set max_tokens 1", "B")
    assert out.count("not finished: the answer was cut at max_tokens") == 1


class TestCommands:
    def test_set(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = ["/set temperature 0.5", "/set max_tokens 7", "A", "/set temperature default", "B", "/set temprature 1"]
        out = talk(monkeypatch, capsys, *lines, "/set top_p 2", "/set top_k", "/set")
        first, second = (request.params for request in engine.requests)
        assert (first.temperature, first.max_tokens) == (0.5, 7)
        assert second.temperature != 0.5
        assert "no parameter temprature (did you mean temperature?): it has temperature, top_p" in out
        assert "error: top_p must be" in out
        assert "/set top_k needs a value (keep the K most likely" in out
        assert "max_tokens 7" in out

    def test_models_of_models_yaml_have_their_own_settings_but_for_what_was_set(
        self, engine: PacedEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        models = [{"name": f"m{number}", "hf_id": f"org/m{number}", "params": {"top_k": number}} for number in (1, 2)]
        (tmp_path / "models.yaml").write_text(json.dumps({"models": models}))
        lines = b"A\n/model m2\nB\n/set top_k 9\nC\n/model m1\nD\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert main(["chat"]) == 0
        assert engine.loaded == ["org/m1", "org/m2", "org/m1"]  # type: ignore[attr-defined]
        assert [request.params.top_k for request in engine.requests] == [1, 2, 9, 9]

    @pytest.mark.parametrize("between", [" ", "\t", "  ", "\n"])
    def test_what_is_between_a_command_and_its_words(
        self, between: str, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with contextlib.closing(chat_module.Chat(AdapterOptions(model="first"), None, None, {})) as chat:
            for words in (("/system", "T"), ("/set", "max_tokens", "7"), ("/set", "stop", "END"), ("A",)):
                chat.take(between.join(words))
        assert asked(engine) == [["T", "A"]]
        assert (engine.requests[0].params.max_tokens, engine.requests[0].params.stop_strings) == (7, ("END",))
        assert "error" not in capsys.readouterr().out

    def test_set_stop(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = ["/set stop END", "A", "/set stop 'a b' c", "B", "/set", "/set stop default", "C"]
        out = talk(monkeypatch, capsys, *lines, "/set stop", "/set stop ''")
        assert [request.params.stop_strings for request in engine.requests] == [("END",), ("a b", "c"), ()]
        assert "\nstop 'a b' c\n" in out
        assert "error: /set stop needs a text" in out
        assert "error: /set stop takes 1 to 4 texts of 1 to 1024 characters" in out

    def test_system_clear_and_regenerate(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(monkeypatch, capsys, "/regenerate", "A", "/system T", "/regenerate", "/clear", "/system -", "B")
        assert asked(engine) == [["S", "A"], ["T", "A"], ["B"]]
        assert "error: there is no answer yet" in out

    def test_another_model_and_back(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(
            monkeypatch, capsys, "/model second", "A", "/model missing", "/model huge", "/model no.gguf", "B", "/model"
        )
        assert engine.loaded == ["first", "second", "missing", "second", "huge", "second"]  # type: ignore[attr-defined]
        assert asked(engine)[-1] == ["S", "A", "Hello!", "B"]
        assert "error: there is no model missing; going back" in out
        assert "no.gguf" in out
        assert "error: the memory ran out; going back" in out

    def test_a_model_that_fails_in_any_way_gives_the_model_before_back(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(monkeypatch, capsys, "/model locked", "B")
        assert "error: [Errno 13] Permission denied: 'locked'; going back to the model before" in out
        assert asked(engine) == [["S", "B"]]

    def test_an_adapter_answers_from_here_on_and_its_model_again(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("CANDLE_VLLM_LORA_MODULES", "tone=/srv/tone")
        monkeypatch.setenv("CANDLE_VLLM_ENABLE_LORA", "true")
        out = talk(
            monkeypatch, capsys, "A", "/model tone", "B", "/model scripted", "C", "/model tone", "/model org/x", "D"
        )
        assert "scripted:tone answers from here on" in out
        assert [[use.name for use in request.adapters] for request in engine.requests] == [[], ["tone"], [], []]
        assert engine.adapters["tone"].path == "/srv/tone"
        assert [len(messages) for messages in asked(engine)] == [2, 4, 6, 8]  # the conversation goes on

    def test_adapters_with_a_scale_apply_from_the_start_and_not_to_another_model(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A\n/model b\nB\n/model scripted\nC\n/model x\nD"))
        )
        flags = ["--lora", "/srv/a.gguf", "--lora-scaled", "/srv/b.gguf:0.5", "--lora-modules", "c=/srv/c"]
        assert main(["chat", "--m", "first", *flags]) == 0
        scales = [{use.name: use.scale for use in request.adapters} for request in engine.requests]
        assert scales == [{"a": 1.0, "b": 0.5}, {"b": 1.0}, {"a": 1.0, "b": 0.5}, {}]

    def test_a_model_and_its_file(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        asked_for: list[tuple[str | None, str | None]] = []
        weights: list[Path | None] = []

        def load(settings: Settings, **_: object) -> PacedEngine:
            asked_for.append((settings.model, settings.weight_file))
            weights.append(settings.imatrix)
            return engine

        monkeypatch.setattr(chat_module, "load_engine", load)
        monkeypatch.setenv("CANDLE_VLLM_IMATRIX", "first.imatrix")
        (tmp_path / "my models").mkdir()
        path = tmp_path / "my models" / "a b.gguf"
        path.write_bytes(b"x")
        lines = ["/model org/name q4.gguf", f"/model {path}", f'/model "{path}"', "/model '~/my models/a b.gguf'"]
        wrong = ["/model a b c", '/model "open', '/model ""', "/model ~nobody/m"]
        out = talk(monkeypatch, capsys, *lines, "/model org/name", *wrong)
        assert asked_for == [
            ("first", None),
            ("org/name", "q4.gguf"),
            *[(str(path), None)] * 3,
            ("org/name", None),
        ]
        assert weights == [Path("first.imatrix"), *[None] * 5]
        assert out.count("error: /model takes MODEL and FILE: ") == 2
        assert "error: /model takes a model" in out
        assert "RuntimeError" not in out

    def test_nothing_typed_ends_the_chat_with_a_traceback(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fails(*_: object) -> list[dict[str, str]]:
            raise ZeroDivisionError("two\nlines")

        monkeypatch.setattr(chat_module, "read_saved", fails)
        assert "error: two lines (ZeroDivisionError)\n" in talk(monkeypatch, capsys, "/load x", "A")
        assert asked(engine) == [["S", "A"]]

    def test_the_model_before_may_be_gone_as_well(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = iter([True, False, False, True])

        def load(settings: Settings, **_: object) -> PacedEngine:
            if not next(given):
                raise ModelNotFoundError(f"there is no model {settings.model}")
            return engine

        monkeypatch.setattr(chat_module, "load_engine", load)
        out = talk(monkeypatch, capsys, "/model second", "A", "/model", "/save t.json", "/model third", "B")
        assert out.count("error: no model is loaded: /model MODEL loads one") == 3
        assert "there is no model second; going back" in out
        assert "there is no model first; no model is loaded" in out
        assert asked(engine) == [["S", "B"]]

    def test_a_conversation_is_kept_and_taken_up(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "other.txt").write_text("mine")
        lines = ["A", "/save t.json", "B", "/save t.json", "/save other.txt", "/clear", "/save t.json", "/load t.json"]
        out = talk(monkeypatch, capsys, *lines, "C", "/save", "/load nowhere", "/load other.txt")
        assert "t.json exists and is not replaced: name another file" in out
        assert asked(engine)[-1] == ["S", "A", "Hello!", "B", "Hello!", "C"]
        assert (tmp_path / "t.json").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "other.txt").read_text() == "mine"
        assert "other.txt exists and is not replaced: name another file" in out
        assert "/save needs the name of a file" in out
        assert "cannot read nowhere: No such file" in out
        assert "other.txt is not a conversation that /save wrote" in out

    def test_words_behind_a_command_that_takes_none(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = ["/help", "/clear", "/regenerate", "/exit", "/reset"]
        out = talk(monkeypatch, capsys, "A", *[f"{name} now" for name in names], "/?", "B", "/bye", "C")
        assert all(f"error: {name} takes no argument, but has 'now'" in out for name in names)
        assert "/regenerate             replaces the last answer" in out
        assert asked(engine)[1:] == [["S", "A", "Hello!", "B"]]

    def test_a_folder_is_no_file_and_what_is_loaded_is_shown(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        out = talk(monkeypatch, capsys, "A" * 300, f"/save {tmp_path}", "/save t.json", "/load t.json")
        assert f"error: {tmp_path} is a folder: name a file in it" in out
        assert f"user: {'A' * 200} ...\nassistant: Hello!\n3 messages of t.json" in out

    def test_a_quoted_file_name(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        talk(monkeypatch, capsys, "A", '/save "q r.json"', "/save '~/s t.json'", "/save u v.json")
        assert sorted(path.name for path in tmp_path.glob("*.json")) == ["q r.json", "s t.json", "u v.json"]

    @pytest.mark.parametrize(
        "messages",
        [[{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": "x", "name": "n"}]],
    )
    def test_a_kept_conversation_is_checked(
        self,
        messages: list[dict[str, str]],
        engine: PacedEngine,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        (tmp_path / "t.json").write_text(json.dumps({"model": "m", "messages": messages}))
        assert "t.json: message 1 must have" in talk(monkeypatch, capsys, "/load t.json", "A")
        assert asked(engine) == [["S", "A"]]

    def test_help_and_unknown_commands(
        self, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = talk(monkeypatch, capsys, "/help", "/regenrate")
        assert all(name in out for name in ("/set", "/system", "/model", "/save", "/load", "/clear", "/exit"))
        assert "unknown command /regenrate (did you mean /regenerate?): the commands are /help, /set" in out
        assert "; a message that begins with / is written with //" in out
        assert engine.requests == []


def test_a_pipe_imports_nothing_of_a_terminal() -> None:
    code = (
        "import sys\nfrom candle_vllm.server import serve\n"
        "from candle_vllm.server.commands import chat, terminal, agent\n"
        "from candle_vllm.server.commands.interactive import answer_display\nanswer_display()\n"
        "sys.exit(', '.join({'prompt_toolkit', 'rich', 'markdown_it'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("他说**「重要」**的事", "他说「重要」的事"),
        ("**加粗（x）**后面", "加粗（x）后面"),
        ("**중요(주의)**입니다", "중요(주의)입니다"),
        ("*斜体（x）*后面", "斜体（x）后面"),
        ("~~**删除线（test）**~~后面", "删除线（test）后面"),
        ("a**(b)**c，好", "a**(b)**c，好"),
    ],
)
def test_emphasis_beside_cjk_punctuation(source: str, wanted: str) -> None:
    file = io.StringIO()
    display = markdown.MarkdownDisplay(Console(file=file, force_terminal=True, color_system=None, width=60))
    display.show(Said(source))
    display.close()
    screen = pyte.Screen(60, 20)
    pyte.Stream(screen).feed(file.getvalue().replace("\n", "\r\n"))
    shown = "".join(screen.buffer[0][x].data for x in range(60)).strip()
    assert shown == wanted
