# SPDX-License-Identifier: MIT
"""The command line: help, one-line errors, exit statuses, and commands on a scripted engine."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from candle_vllm.core import EngineConfig, memory
from candle_vllm.core import config as core_config
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import choose_device
from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.server.cli import main
from candle_vllm.server.commands import chat as chat_module
from candle_vllm.server.commands import terminal as generate_module
from candle_vllm.server.settings import Settings, derived
from candle_vllm.server.settings.command_line import parse, split_command
from candle_vllm.server.settings.commands import COMMANDS
from candle_vllm.server.settings.configuration import load_configuration
from candle_vllm.server.settings.options import DEVICE, UsageError
from candle_vllm.server.settings.table import OPTIONS
from packages.core.tests.toy_adapter import write_adapter
from packages.core.tests.toy_encoder import write_toy_encoder
from packages.core.tests.toy_sight import write_toy_sight
from packages.server.tests.server_fakes import PacedEngine
from packages.server.tests.terminals import Terminal

SPEAKING = Path(__file__).parents[2] / "core/tests/models/speaking/qwen3.5"


@pytest.fixture(autouse=True)
def _empty_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def _run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "candle_vllm.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, **options)


def _childrens_cpu() -> float:
    """Seconds of processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "config"])
def test_a_mistyped_file_is_refused_at_once_with_the_nearest_name(command: str, tmp_path: Path) -> None:
    (tmp_path / "SmolLM2-Q4_1.gguf").write_bytes(b"x")
    began = _childrens_cpu()
    done = _run(command, "--m", "./SmolLM-Q4_1.gguf", *(["hi"] if command == "generate" else []), cwd=tmp_path)
    seconds = _childrens_cpu() - began
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "there is no file or folder './SmolLM-Q4_1.gguf' (did you mean SmolLM2-Q4_1.gguf?)" in line
    assert seconds < 3  # 0.3 s on an idle machine; the engine's and a web framework's imports are not made


@pytest.mark.parametrize("given", [[], ["--m", "demo"]])
def test_the_demo_model_has_a_name(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / core_config.DEMO_FILE).write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(core_config, "DEMO_PACKAGE", "llm")
    settings, _ = parse("serve", given)
    configuration = load_configuration(settings, {}, folder=tmp_path, home=tmp_path)
    assert derived.model_source(configuration.settings) == (str(tmp_path / "llm" / core_config.DEMO_FILE), None)
    assert configuration.catalogue.default.names == ("SmolLM2-135M-Instruct.Q4_1",)
    (tmp_path / "demo").mkdir()  # a folder of that name is meant before it
    monkeypatch.chdir(tmp_path)
    assert derived.model_source(Settings(model="demo")) == ("demo", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_what_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    takes = COMMANDS[command]
    assert ("--dtype" in text) == (command == "quantize" or DEVICE in takes.uses)
    if command == "serve":
        assert all(flag in text for option in OPTIONS for flag in option.flags)
    assert all(option.metavar for option in (*takes.settings, *takes.options) if option.flags), (
        "a value looks like none"
    )
    own = {flag for option in (*takes.settings, *takes.options) for flag in option.flags}
    assert all(option.flags[0] in own or f"{option.flags[0]} " not in text for option in OPTIONS if option.flags)
    assert ("cuda:N" in text) == (DEVICE in takes.uses or "device" in takes.plus)


def test_help_loads_neither_torch_nor_a_web_framework() -> None:
    code = (
        "import sys\nfrom candle_vllm.server.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit(', '.join(sorted({'torch', 'fastapi', 'uvicorn', 'pydantic', 'yaml'} & set(sys.modules))) or 0)"
    )
    begin = _childrens_cpu()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert _childrens_cpu() - begin < 3  # 0.1 s on an idle machine; torch alone would be above


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "unknown flag --modle (did you mean --model?); see candle-vllm --help"),
        (["serve", "nowhere.gguf"], "there is no file or folder 'nowhere.gguf'"),
        (["chat", "nowhere.gguf"], "there is no file or folder 'nowhere.gguf'"),
        (["serve", "-m", "nowhere.gguf", "-p", "0"], "there is no file or folder 'nowhere.gguf'"),
        (["generate", "hi", "-m", "nowhere.gguf"], "there is no file or folder 'nowhere.gguf'"),
        (["serve", "-p", "none"], "--p"),
        (["serve", "a", "--m", "b"], "unexpected argument 'a': a model is named with --m a"),
        (["--p", "0", "demo", "b"], "unexpected argument 'demo': a model is named with --m demo"),
        (["serv"], "unknown command 'serv' (did you mean serve?)"),
        (["cp", "a", "b"], "there is no command 'cp': a model has further names by --served-model-name"),
        (["--m", "x", "chat"], "the command comes first (candle-vllm chat ...)"),
        (["bench", "--temperature", "1"], "--temperature does not apply to `candle-vllm bench`"),
        (["generate"], "the following arguments are required: PROMPT"),
        (["generate", "-hello"], "required: PROMPT; a text that begins with - comes last, after --"),
        (["generate", "--seed", "1", "--", "-hello world", "b"], "unexpected argument 'b'"),
        (["run", "x", "-hello"], "a text that begins with - comes last, after --"),
        (["generate", "-hello you", "b"], "unexpected argument 'b'"),
        (["generate", "x", "--system", "y"], "--system needs --chat"),
        (["generate", ""], "PROMPT must have 1 to"),
        (["generate", "a\udcff"], "PROMPT must be UTF-8: character 2 is not"),
        (["generate", "x", "--max-queued-requests", "3"], "does not apply to `candle-vllm generate`"),
        (["generate", "x", "--max-num-seqs", "3"], "does not apply to `candle-vllm generate`"),
        (["generate", "x", "--disable-prefix-cache"], "does not apply to `candle-vllm generate`"),
        (["generate", "x", "--served-model-name", "n"], "does not apply to `candle-vllm generate`"),
        (["quantize", "a", "q4_k_m"], "unexpected argument 'a': candle-vllm quantize --m MODEL --isq q4k --out FILE"),
        (["bench", "forward", "--model", "a"], "there is no command 'bench forward': to measure: candle-vllm bench"),
        (["signin"], "there is no command 'signin': a token of Hugging Face is given by HF_TOKEN"),
        (
            ["chat", "hello you"],
            "unexpected argument 'hello you': one question is asked with candle-vllm generate --chat",
        ),
        (["chat", "--served-model-name", "n"], "does not apply to `candle-vllm chat`"),
        (["bench", "--served-model-name", "n"], "does not apply to `candle-vllm bench`"),
        (["bench", "--enable-prefix-caching"], "does not apply to `candle-vllm bench`"),
        (["bench", "--max-num-seqs", "3"], "does not apply to `candle-vllm bench`"),
        (["bench", "--seed", "3"], "does not apply to `candle-vllm bench`"),
        (["bench", "--chat-template", "x"], "does not apply to `candle-vllm bench`"),
        (["bench", "--concurrency", "4097"], "between 1 and 4096"),
        (["quantize", "--m", "x"], "--out FILE.gguf is missing"),
        (["quantize", "--m", "x", "--out", "x.bin"], "x.bin does not end in .gguf"),
        (["quantize", "--m", "x", "--out", "no/x.gguf"], "no is not a folder"),
        (["quantize", "--m", "x", "--out", "x.gguf", "--isq", "q4"], "--isq must be one of q4_0"),
        (["quantize", "--m", "x", "--out", "x.gguf", "--lora", "a:b"], "'b' is not a scale"),
        (["quantize", "--m", "x", "--out", "x.gguf", "--lora", "a", "--lora-to-gguf", "b"], "give one of them"),
        (["perplexity", "--m", "x"], "-f FILE is missing"),
        (["perplexity", "--m", "x", "-f", "none.txt"], "cannot read the text none.txt: No such file"),
        (["perplexity", "--m", "x", "-f", sys.executable], "it is not UTF-8 text"),
        (["imatrix", "--m", "x", "-f", __file__], "-o FILE.gguf is missing"),
        (["imatrix", "--m", "x", "-f", __file__, "-o", "x.dat"], "x.dat does not end in .gguf"),
        (["quantize", "--device", "cpu"], "--device does not apply to `candle-vllm quantize`"),
        (["--m", ".", "--revision", "main"], "--revision chooses a version on Hugging Face, but the model is ."),
        (["--w", ".", "--revision", "main"], "--revision chooses a version on Hugging Face"),
        (["--w", "nowhere"], "weight path nowhere is not a folder"),
        (["--f", "no.gguf"], "weight file no.gguf does not exist"),
        (["--m", "~no_such_user/a.gguf"], "there is no file or folder '~no_such_user/a.gguf'"),
        (["--log-file", "~no_such_user/a"], "--log-file names the home folder of an unknown user, ~no_such_user"),
        (["run-batch", "-i", "~no_such_user/a", "-o", "b"], "No such file or directory: ~no_such_user/a"),
        (["--m", ".", "--host", "0.0.0..0"], "host '0.0.0..0' is not an address of this machine"),
    ],
)
def test_a_user_error_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("candle-vllm: error: ")
    assert message in error


def test_a_user_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a container that runs as a number which has no entry in its passwd."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(RuntimeError):
        Path.home()
    assert main(["config", "--m", "org/name"]) == 0
    assert "org/name" in capsys.readouterr().out
    assert Path.home() == Path("/")  # which the chat's history, the hub's folder and the caches read


def test_no_traceback_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings, **changes: Any) -> None:
        raise ModelNotFoundError("no such model")

    monkeypatch.setattr(generate_module, "load_engine", fail)
    assert main(["generate", "x"]) == 2
    with pytest.raises(ModelNotFoundError):
        main(["generate", "x", "--log-level", "debug"])


def test_without_a_demo_model_the_message_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_config, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match="pass --m with a Hugging Face id"):
        derived.model_source(Settings())


def test_engine_config_gets_what_was_given_and_keeps_its_own_defaults(tmp_path: Path) -> None:
    from candle_vllm.core import EngineConfig

    (tmp_path / "t.jinja").write_text("{{ messages }}")
    settings = Settings(
        model="m", mem=2, prefill_chunk_size=128, dtype="bf16", chat_template=tmp_path / "t.jinja", threads=3, seed=4
    )
    assert derived.engine_config(settings) == EngineConfig(
        model="m",
        kv_cache_memory=2 << 20,
        max_num_batched_tokens=128,
        dtype="bf16",
        chat_template="{{ messages }}",
        threads=3,
        seed=4,
    )
    assert derived.engine_config(Settings(model="m")) == EngineConfig(model="m")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> PacedEngine:
    engine = PacedEngine(["Hel", "lo!"])
    for module in (generate_module, chat_module):
        monkeypatch.setattr(module, "load_engine", lambda *_, **__: engine)
    return engine


def test_generate(engine: PacedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Once", "--temperature", "0", "--max-tokens", "20", "--stop", "zzz"]) == 0
    assert capsys.readouterr().out == "Hello!\n"
    (request,) = engine.requests
    assert engine.detokenize(request.prompt_token_ids) == "Once"
    assert (request.params.temperature, request.params.max_tokens) == (0, 20)
    assert request.params.stop_strings == ("zzz",)
    assert engine.closed


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_who_talks_alone_reserves_room_for_one(
    command: str, engine: PacedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    module = generate_module if command == "generate" else chat_module
    monkeypatch.setattr(module, "load_engine", lambda _, **changes: asked.append(changes) or engine)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main([command, *(["Hi"] if command == "generate" else [])]) == 0
    assert asked == [{"max_num_seqs": 1}]


def test_texts_of_people_are_taken_as_they_are(engine: PacedEngine) -> None:
    line = ["generate", " a\n", "--stop", "\n", "--stop", " ", "--chat", "--system", "a\nb"]
    assert main(line) == 0
    assert engine.requests[0].params.stop_strings == ("\n", " ")
    assert [message["content"] for message in engine.template_calls[0].messages] == ["a\nb", " a\n"]


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--chat-template-kwargs", '{"enable_thinking": false}'], {"enable_thinking": False}),
        (["--reasoning", "off"], {"enable_thinking": False}),
        (["--think=false"], {"enable_thinking": False}),
        (["--think"], {"enable_thinking": True}),
        (["--think", "high"], {"reasoning_effort": "high"}),
    ],
)
@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat", "Hi"], ["run", "demo", "Hi"]])
def test_thinking_is_switched_by_the_flags_of_other_programs(
    command: list[str],
    flags: list[str],
    variables: dict[str, Any],
    engine: PacedEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    assert main([*command, *flags]) == 0
    (call,) = engine.template_calls
    assert variables.items() <= call.options.items()


def test_a_terminal_that_knows_ascii_only_shows_question_marks() -> None:
    code = (
        "import sys\nfrom candle_vllm.server import cli\n"
        "cli.run_command = lambda *_: sys.stdout.write('Gr\\u00fc\\u00dfe') and 0\n"
        "sys.exit(cli.main(['generate', 'x']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Gr??e", b"")


def test_generate_reads_standard_input_and_applies_the_template(
    engine: PacedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Grüß\n\r\n".encode())))
    assert main(["generate", "-", "--chat", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out == "Hello!\n"
    messages = engine.template_calls[0].messages
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "Be brief."),
        ("user", "Grüß\n"),  # without the line end that `echo` adds
    ]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("config > /dev/full", "No space left on device"),
        ("generate hi --m {model} --max-tokens 1 > /dev/full", "No space left on device"),
        ("generate - --m {model} <&-", "standard input is closed"),
        ("chat --m {model} <&-", "standard input is closed"),
    ],
)
def test_streams_that_cannot_be_used_are_one_line(command: str, why: str, tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "toy")
    line = f"{sys.executable} -m candle_vllm.server.cli {command.format(model=model)}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"candle-vllm: error: {why}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_what_goes_to_a_closed_stream_goes_nowhere(closed: str, tmp_path: Path) -> None:
    model = write_toy_model(tmp_path / "toy")
    line = f"{sys.executable} -m candle_vllm.server.cli generate hi --m {model} --max-tokens 1 {closed}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout == "") == (">&-" in closed.replace("2>&-", ""))
    assert (done.stderr == "") == ("2>&-" in closed)


def test_one_question_is_answered_to_the_end_of_the_turn(engine: PacedEngine) -> None:
    for line in (["generate", "Hi"], ["generate", "--chat", "Hi"], ["run", "demo", "Hi"]):
        assert main(line) == 0
    room = engine.model_info.max_model_len
    limits = [request.params.max_tokens for request in engine.requests]
    assert limits[0] == 256
    assert all(limit is None or 256 < limit < room for limit in limits[1:])


@pytest.mark.parametrize("more", [[], ["--chat"]])
def test_generate_says_where_the_answer_was_cut(
    more: list[str], engine: PacedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "Hi", *more]) == 0
    assert capsys.readouterr().err == ""
    assert main(["generate", "Hi", "--max-tokens", "1", *more]) == 0
    assert capsys.readouterr().err == (
        "not finished: the answer was cut at its token limit (--max-tokens, or the model's context)\n"
    )


@pytest.mark.parametrize("more", [[], ["--chat"]])
def test_a_text_ends_where_the_context_does_unless_more_is_asked_for(
    more: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_toy_model(tmp_path / "toy")
    line = ["generate", "hi", "--m", str(model), "--max-model-len", "40", "--temperature", "0", *more]
    assert main(line) == 0  # 256 tokens, which nobody asked for, do not fit
    assert main([*line, "--max-tokens", "50"]) == 2
    assert "and max_tokens is 50: together they are more" in capfd.readouterr().err
    assert main(["generate", "hi" * 40, *line[2:]]) == 2
    assert "this model's maximum context length is 40 tokens: shorten the prompt" in capfd.readouterr().err


@pytest.mark.parametrize("command", [["generate", "Hi", "--chat"], ["chat"]])
def test_an_empty_system_message_is_none(
    command: list[str], engine: PacedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi")))
    assert main([*command, "--system", ""]) == 0
    assert engine.template_calls[0].messages == [{"role": "user", "content": "Hi"}]


def test_chat_keeps_the_conversation_until_reset(
    engine: PacedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One\n\nTwo\n/reset\n/what\nThree\n/exit\nNever\n")))
    assert main(["chat", "--system", "S"]) == 1  # for /what
    turns = [[message["content"] for message in call.messages] for call in engine.template_calls]
    assert turns == [["S", "One"], ["S", "One", "Hello!", "Two"], ["S", "Three"]]
    out, err = capsys.readouterr()
    assert out == "Hello!\n" * 3
    assert "unknown command /what" in err
    assert "\x1b" not in err


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(
    engine: PacedEngine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import _thread

    engine.pause = 0.2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One\nTwo\n")))
    write = sys.stdout.write

    def written(text: str) -> int:
        if text and not engine.aborted and len(engine.template_calls) == 1:
            _thread.interrupt_main()  # the first piece of the first answer is there
        return write(text)

    monkeypatch.setattr(sys.stdout, "write", written)
    assert main(["chat"]) == 0
    assert "(stopped)" in capsys.readouterr().err
    assert len(engine.aborted) == 1
    first, said, second = (message["content"] for message in engine.template_calls[1].messages)
    assert (first, second) == ("One", "Two")
    assert said
    assert "Hello!".startswith(said)


def test_ctrl_c_leaves_the_answer_on_the_terminal(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, ("generate", "One"), "abc" * 1000, pause=0.01)
    terminal.wait_for("abcabc")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    lines = terminal.screen.splitlines()
    assert (lines[0][:6], lines[-1]) == ("abcabc", "candle-vllm: stopped")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys\nfrom candle_vllm.server import cli\n"
        "def run(*_):\n    [sys.stdout.write('x' * 1_000_000) for _ in range(50)]\n    return 0\n"
        "cli.run_command = run\nsys.exit(cli.main(['generate', 'x']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 141
        assert process.stderr.read() == b""


_NOT_FOR_A_PROMPT = {
    "fastapi", "gguf", "httpx", "huggingface_hub", "jsonschema", "llguidance", "mcp", "opentelemetry",
    "prometheus_client", "prompt_toolkit", "pydantic", "rich", "safetensors", "sqlalchemy", "torch", "tqdm",
    "transformers", "triton", "uvicorn", "zmq", "candle_vllm.openai", "candle_vllm.server.app",
}  # fmt: skip
_NOT_FOR_SERVING = {
    "gguf", "httpx", "huggingface_hub", "jsonschema", "mcp", "prompt_toolkit", "rich", "safetensors", "sqlalchemy",
    "torch", "tqdm", "transformers", "triton", "zmq",
}  # fmt: skip
_IMPORTED = """
import atexit, sys
from candle_vllm.server.cli import main
atexit.register(lambda: sys.stderr.write("imported " + " ".join(sys.modules)))
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def starting_model() -> Path:
    """A GGUF file as people have it."""
    found = derived.demo_model()
    if found is None:
        pytest.skip("the demo model is not installed")
    return found


def _imported(error: str) -> set[str]:
    assert "imported " in error, error
    return set(error.rpartition("imported ")[2].split())


def test_a_prompt_is_continued_with_the_imports_that_it_needs(starting_model: Path) -> None:
    command = [sys.executable, "-c", _IMPORTED, "generate", "hi", "--m", str(starting_model), "--max-tokens", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    imported = _imported(done.stderr)
    assert {"numpy", "tokenizers", "candle_vllm.core.inference_engine"} <= imported
    assert imported & _NOT_FOR_A_PROMPT == set()
    families = {name for name in imported if name.startswith("candle_vllm.core.models.")}
    assert families.isdisjoint(f"candle_vllm.core.models.{name}" for name in ("bert", "deepseek", "gemma", "phi"))


def test_a_server_starts_with_the_imports_that_it_needs(starting_model: Path) -> None:
    command = [sys.executable, "-c", _IMPORTED, "--m", str(starting_model), "--p", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Ctrl+C"):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    imported = _imported(error)
    assert {"fastapi", "candle_vllm.core.inference_engine"} <= imported
    assert imported & _NOT_FOR_SERVING == set()


def _config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["config", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["settings"]


def test_config_counts_what_a_model_sees_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights, and what its steps take, are no room for a cache."""
    model = write_toy_sight(tmp_path / "sight")
    monkeypatch.setattr(memory, "tightest_limit", lambda: memory.Limit(64 << 20, "the test", 0, 0))
    given = "--m", str(model), "--device", "cpu", "--kv-fraction", "0.5", "--threads", "2", "--max-num-seqs", "512"
    reads = _config(capsys, *given, "--max-images", "0")["kv_cache_memory_bytes"]["value"]
    sees = _config(capsys, *given)["kv_cache_memory_bytes"]["value"]
    config = EngineConfig(model=str(model), threads=2)
    tower = load_model(config, choose_device("cpu"), lambda *_: None).tower
    assert tower is not None
    expected = (tower.tower.config.step_bytes(2) + tower.weight_bytes) // 2
    assert expected > 1 << 17
    assert reads - sees == pytest.approx(expected, abs=1 << 16)  # blocks are whole


@pytest.mark.parametrize("drafts", ["none", "mtp"])
def test_config_counts_states_and_their_checkpoints(drafts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the engine has them; with a layer for further tokens the cache's elements are no larger."""
    model, memory = str(SPEAKING), 64 << 20
    method = f'{{"method": "{drafts}"}}'
    given = "--m", model, "--device", "cpu", "--kv-cache-memory-bytes", str(memory), "--speculative-config", method
    shown = _config(capsys, *given, "--max-num-seqs", "4", "--max-model-len", "512")
    settings = Settings(
        model=model, device="cpu", kv_cache_memory_bytes=memory, max_num_seqs=4, max_model_len=512,
        speculative_config={"method": drafts},
    )  # fmt: skip
    with derived.load_engine(settings) as engine:
        info, stats = engine.model_info, engine.stats()
    assert 0 < info.state_bytes < info.kv_cache_bytes
    assert shown["mem"]["value"] == info.kv_cache_bytes >> 20
    assert f", 4 states and {stats.checkpoint_slots} checkpoints of states," in shown["mem"]["from"]
    assert shown["key_cache_dtype"]["value"] == "bf16"


@pytest.mark.parametrize("more", [{}, {"prefill_chunk_size": 0}], ids=["cut", "whole"])
def test_config_counts_pages_of_windows(
    more: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the engine has them, for prompts that are cut and for prompts that are not."""
    window = {"sliding_window": 32, "max_position_embeddings": 4096}
    model = str(write_toy_model(tmp_path / "toy", toy_config("mistral", **window)))
    given = [each for name, value in more.items() for each in (f"--{name.replace('_', '-')}", str(value))]
    shown = _config(capsys, "--m", model, "--device", "cpu", "--max-num-seqs", "2", *given)
    with derived.load_engine(Settings(model=model, device="cpu", max_num_seqs=2, **more)) as engine:
        info = engine.model_info
    assert shown["kv_cache_memory_bytes"]["value"] == info.kv_cache_bytes
    found = re.search(r" ([\d,]+) tokens in layers with a window of 32,", shown["mem"]["from"])
    assert found is not None
    tokens = int(found[1].replace(",", ""))
    assert (tokens >= 4096) == bool(more), "a prompt that is one step needs a page for each of its blocks"


def test_config_shows_what_will_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the engine has it that is then loaded."""
    model = str(write_toy_model(tmp_path / "toy"))
    shown = _config(capsys, "--m", model, "--device", "cpu", "--max-num-seqs", "3", "--dtype", "bf16")
    with derived.load_engine(Settings(model=model, device="cpu", max_num_seqs=3, dtype="bf16")) as engine:
        info, stats = engine.model_info, engine.stats()
    assert shown["max_model_len"]["value"] == info.max_model_len
    assert shown["kv_cache_memory_bytes"]["value"] == info.kv_cache_bytes
    assert shown["block_size"]["value"] == stats.block_size
    assert shown["max_num_seqs"] == {"value": 3, "from": "the command line (--max-num-seqs)"}
    assert shown["prefill_chunk_size"]["value"] == 512
    assert shown["threads"]["value"] >= 1
    assert shown["served_model_name"]["value"] == ["toy"]
    assert [shown[f"{which}_cache_dtype"]["value"] for which in ("kv", "key", "value")] == ["bf16"] * 3
    assert shown["dtype"]["value"] == "bf16"
    assert shown["device"]["value"] == "cpu"
    ours = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "presence_penalty": 0.0}
    assert {name: shown[name] for name in ours} == {name: {"value": ours[name], "from": "default"} for name in ours}
    for name, value in (
        ("tool_parser", "llama3_json"),
        ("reasoning_parser", "none"),
        ("chat_template", "the model's own"),
    ):
        assert (shown[name]["value"], shown[name]["from"][:7]) == (value, "derived"), name
    engine_settings = {option.name for option in OPTIONS if option.engine}
    empty = {
        "revision",
        "hf_token",
        "tokenizer",
        "pooling",
        "mmproj",
        "imatrix",
        "max_loras",
        "max_cpu_loras",
        "lora_memory",
    }
    empty |= {"mm_processor_kwargs", "prompt_cache_path", "prompt_cache_url", "kv_offloading_size"}
    empty |= {"allowed_local_media_path", "cluster_key"}
    assert {name for name in engine_settings if shown[name]["value"] is None} <= empty


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, on which no other process starts."""

    def start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("candle_vllm.core.devices._driver_has_gpu", lambda: False)
    monkeypatch.setattr("candle_vllm.core.devices.gpu_obstacle", lambda index: "no GPU was found")
    monkeypatch.setattr(subprocess, "Popen", start)


def test_ranks_without_a_gpu_are_cpu_ranks(tmp_path: Path, no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_toy_model(tmp_path / "toy", toy_config(head_dim=32)))
    usual = "--m", model, "--threads", "2"
    asked = "generate", "the quick", *usual, "--temperature", "0", "--max-tokens", "8", "--log-level", "info"
    assert main([*asked, "--cpu-ranks", "1"]) == 0
    alone = capsys.readouterr().out
    assert alone.strip()
    assert main([*asked, "-tp", "2"]) == 0
    out, error = capsys.readouterr()
    assert out == alone
    assert error.count("no GPU is used: tensor_parallel_size=2 means cpu_ranks=2") == 1
    assert _config(capsys, *usual, "-tp", "2")["cpu_ranks"] == {
        "value": 2,
        "from": "derived: tensor_parallel_size, without a GPU",
    }


_NODES = "--nnodes 2 -tp 2 --cluster-key 0123456789abcdef"
_GPUS = "would divide the model among GPUs, but no GPU is used"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate hi -pp 2", f"--pipeline-parallel-size 2 {_GPUS}"),
        ("serve -tp 2 --pp-size 2", f"--pipeline-parallel-size 2 {_GPUS}"),
        ("config -tp 2 -pp 2", f"--pipeline-parallel-size 2 {_GPUS}"),
        (f"serve {_NODES}", f"--nnodes 2 {_GPUS}"),
        (f"serve {_NODES} --node-rank 1", f"--nnodes 2 {_GPUS}"),
        ("serve -tp 2 --worker-use-ray", f"--distributed-executor-backend ray {_GPUS}"),
        ("generate hi -tp 2 -ep", f"--enable-expert-parallel {_GPUS}"),
        ("serve -tp 2 -dp 2 --threads 3", "each rank of 2 replicas needs a thread, and there are 3"),
        ("generate hi -tp 2 --threads 1", "each rank needs a thread, and there are 1"),
        ("generate hi --d 0,1", "device 'cuda:0' cannot be used: no GPU was found"),
        ("config --d 0,1", "device 'cuda:0' cannot be used: no GPU was found"),
    ],
)
def test_ranks_that_need_a_gpu_are_refused_before_anything_is_loaded(
    line: str, message: str, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is nowhere: who looked for it would say so."""
    command, *arguments = line.split()
    port = ["--p", "0"] if command == "serve" else []
    assert main([command, *arguments, *port, "--m", "nobody/nothing", "--offline"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1, error
    assert error.startswith("candle-vllm: error: ")
    assert message in error


def test_a_hub_that_does_not_answer_has_another_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service manager starts again after status 1, and not after an error that the user has to correct."""
    monkeypatch.setattr("candle_vllm.core.loading.source._listing", lambda *_: None)
    assert main(["generate", "hi", "--m", "nobody/nothing"]) == 1


def test_op_by_op_without_torch_has_no_effect_beside_ranks(
    no_gpu: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    line = ["serve", "--p", "0", "--op-by-op", "-tp", "2", "--m", "nobody/nothing", "--offline"]
    assert main(line) == 2
    idle, *_, error = capsys.readouterr().err.splitlines()
    assert "op_by_op has no effect: torch is not installed, so the compiled kernels compute" in idle
    assert "nobody/nothing" in error


def test_config_says_which_format_and_how_much_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_toy_model(tmp_path / "toy"))
    shown = _config(capsys, "--m", model, "--device", "cpu", "--tool-parser", "hermes", "--mem", "1")
    assert shown["tool_parser"] == {"value": "hermes", "from": "the command line (--tool-parser)"}
    assert shown["kv_fraction"]["value"] == "not used"


def test_config_says_how_keys_and_values_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_toy_model(tmp_path / "toy", toy_config(head_dim=32)))
    shown = _config(capsys, "--m", model, "--device", "cpu", "--kv-cache-dtype", "q8_0", "--value-cache-dtype", "q4_0")
    assert [shown[f"{which}_cache_dtype"]["value"] for which in ("kv", "key", "value")] == ["q8_0", "q8_0", "q4_0"]


def test_config_says_what_does_not_fit_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sum as a start's, where a GPU of that much memory is."""
    pytest.importorskip("torch")
    from candle_vllm.core.assembly import offload, placement
    from candle_vllm.core.devices import Device
    from candle_vllm.server.commands import config as command

    monkeypatch.setattr(command, "choose_device", lambda _: Device("cuda:0"))
    monkeypatch.setattr(placement, "device_dtype", lambda *_: "BF16")
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (1 << 30, 2 << 30))
    model = str(write_toy_model(tmp_path / "toy"))
    shown = _config(capsys, "--m", model, "--device", "cuda")
    assert (shown["cpu_experts"]["value"], shown["gpu_layers"]["value"]) == (0, 0)
    assert "of 1024 MiB that are free on cuda:0, 1024 MiB are reserved for activations" in shown["gpu_layers"]["from"]
    shown = _config(capsys, "--m", model, "--device", "cuda", "--cpu-offload-gb", "0")
    assert (shown["gpu_layers"]["value"], shown["cpu_offload_gb"]["from"][:16]) == (2, "the command line")


_LEFT = "what is left of the GPU after loading, "
_SIZED = {"mem": (1024, "the command line (--mem)"), "kv_cache_memory_bytes": (1 << 30, "derived from mem")}
_OFF = "the KV cache's size is set"


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"kv_fraction": (0.9, "default on cuda"), "cpu_ranks": ("not used", "default on cuda")}),
        (["--mem", "1024"], _SIZED | dict.fromkeys(("kv_fraction", "gpu_memory_utilization"), ("not used", _OFF))),
        (["--kv-cache-memory-bytes", "1G"], {"mem": (1024, "MiB, derived from kv_cache_memory_bytes")}),
        (["--gpu-memory-utilization", "0.5"], {"kv_fraction": ("not used", "gpu_memory_utilization is set")}),
    ],
)
def test_config_of_a_gpus_memory(
    arguments: list[str], expected: dict[str, tuple[object, str]], here: bool, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("torch")
    from candle_vllm.core.assembly import offload, placement
    from candle_vllm.core.devices import Device
    from candle_vllm.server.commands import config as command

    monkeypatch.setattr(command, "choose_device", lambda _: Device("cuda:0"))
    monkeypatch.setattr(placement, "device_dtype", lambda *_: "BF16")
    monkeypatch.setattr(offload, "gpu_memory", lambda _: (64 << 30, 80 << 30))
    model = str(write_toy_model(tmp_path / "toy")) if here else "nobody/nothing"
    shown = _config(capsys, "--m", model, "--device", "cuda", *arguments)
    assert {name: (shown[name]["value"], shown[name]["from"]) for name in expected} == expected
    if not here:
        fits = {name: shown[name]["value"] for name in ("cpu_experts", "cpu_offload_gb", "gpu_layers")}
        assert list(fits.values()) == ["as many as do not fit", "as much as does not fit", "as many as fit"]
    elif "mem" not in expected:
        of_what = "within gpu_memory_utilization" if arguments else "times kv_fraction"
        assert shown["mem"]["value"].startswith(f"{_LEFT}{of_what}; a token takes ")


def test_config_of_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _config(capsys, "--m", str(write_toy_encoder(tmp_path / "encoder")), "--device", "cpu")
    unused = [name for name in shown if "is an encoder and generates no text" in shown[name]["from"]]
    assert {"mem", "kv_fraction", "gpu_memory_utilization", "gpu_layers", "cpu_experts", "cpu_offload_gb"} <= {*unused}


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing:Q4_K_M", "nobody/nothing:FILE.gguf"])
def test_config_of_a_model_that_is_not_here_yet(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _config(capsys, "--m", name, "--device", "cpu")
    assert shown["max_model_len"] == {
        "value": "unknown",
        "from": f"derived: the model is not on this machine yet; candle-vllm show {name} compares its size with the "
        "memory, candle-vllm pull fetches it",
    }
    assert shown["max_num_seqs"]["value"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tool-parser", "hermez"], "tool_parser is 'hermez', which is not a known format"),
        (["--reasoning-parser", "qwen99"], "reasoning_parser is 'qwen99', which is not a known format"),
        (["--block-size", "7"], "block_size 7 is not a power of two"),
        (["--prefill-chunk-size", "8"], "max_num_batched_tokens 8 is below max_num_seqs 64"),
        (["--kv-cache-dtype", "fp8"], "needs a GPU"),
        (["--mem", "999999999"], "set --mem"),
        (["--max-model-len", "99999"], "is beyond the model's context"),
        (["--api-key-file", "none.txt"], "cannot read the API keys in none.txt"),
        (["--responses-store", "redis://x"], "responses_store must be"),
        (["--lora-modules", "a=/nope/tone"], "--lora-modules needs --enable-lora"),
        (
            ["--lora-modules", "a=/nope/tone", "--enable-lora"],
            "'a' of --lora-modules cannot be loaded: there is no /nope/tone",
        ),
        (["--lora-modules", "a=~nobody9/tone", "--enable-lora"], "cannot be loaded: there is no ~nobody9/tone\n"),
        (
            ["--lora", "adapters/tone.gguf"],
            "'tone' of --lora-modules cannot be loaded: there is no adapters/tone.gguf\n",
        ),
        (
            ["--lora-modules", "a=acme/tone", "--enable-lora"],
            "there is no acme/tone; an adapter of Hugging Face also needs --lora-resolver hf=acme/tone",
        ),
        (["--mcp-execute"], "mcp_execute needs MCP servers"),
        (["--allow-model-changes", "--host", "0.0.0.0"], "lets everybody who reaches 0.0.0.0 download"),
        (["--otlp-endpoint", "collector"], "--otlp-endpoint takes a URL"),
        (["--lora-resolver", "ftp=x"], "--lora-resolver must be"),
        (["--allowed-local-media-path", "/nope"], "/nope"),
        (["--m", "nowhere.gguf"], "there is no file or folder 'nowhere.gguf'"),
        (["--m", "nobody/nothing", "--offline"], "is not in the cache"),
    ],
)
def test_config_refuses_what_serving_would(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--m" in arguments else ["--m", str(write_toy_model(tmp_path / "toy"))]
    assert main(["config", "--device", "cpu", *model, *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in f"{error.splitlines()[-1]}\n"


def test_an_adapter_may_be_a_task_of_the_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy_model(tmp_path / "toy")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"lora_adaptations": ["retrieval.query"]}), "utf-8")
    line = ["config", "--device", "cpu", "--m", str(folder), "--enable-lora", "--lora-modules"]
    assert main([*line, f"query={folder}/retrieval.query"]) == 0
    assert main([*line, f"query={folder}/retrieval.quory"]) == 2
    assert "'query' of --lora-modules cannot be loaded: there is no " in capsys.readouterr().err


@pytest.mark.parametrize("command", [["serve", "--p", "0"], ["generate", "hi"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reasoning-parser", "deepsek"], "not a known format; the nearest are deepseek"),
        (["--max-model-len", "99999"], "is beyond the model's context"),
    ],
)
def test_what_shows_without_weights_is_refused_before_they_are_read(
    command: list[str],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filled: list[object] = []
    monkeypatch.setattr("candle_vllm.core.assembly.model.load_weights", lambda *given, **_: filled.append(given))
    model = ["--m", str(write_toy_model(tmp_path / "toy"))]
    assert main([*command, "--device", "cpu", *model, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not filled


def test_version_from_a_process() -> None:
    done = _run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("candle-vllm 0.")


def write_words(folder: Path) -> Path:
    """A tokenizer with a merge, which GGUF files can hold; the toy models' own has none."""
    folder.mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: index for index, text in enumerate([*letters, "th"])}, [("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_quantize_writes_a_file_that_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_toy_model(tmp_path / "plain")
    words, out = write_words(tmp_path / "words"), tmp_path / "q.gguf"
    line = ["quantize", "--m", str(folder), "--tokenizer", str(words), "--isq", "q4_0", "--out", str(out)]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r".*q\.gguf: \d+\.\d MB, (Q4_0 x \d+|F32 x \d+|Q8_0 x \d+|, )+\n", said), said
    assert main(["quantize", "--m", str(out), "--isq", "q8_0", "--out", str(tmp_path / "more.gguf")]) == 0
    assert "\nnot smaller than the model's files (" in capsys.readouterr().out
    in_place = ["quantize", "--m", str(tmp_path / "more.gguf"), "--isq", "q4_0", "--out", str(tmp_path / "more.gguf")]
    assert main([*in_place, "--force"]) == 0
    assert "not smaller" not in capsys.readouterr().out
    assert main(["generate", "the", "--m", str(out), "--max-tokens", "3"]) == 0
    assert main(line) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*line, "--force", "--threads", "1"]) == 0
    adapter = write_adapter(tmp_path / "adapter", {"model.layers.1.mlp.down_proj": (64, 96)}, size=5.0)
    plain = [*line[:5], "--out"]
    for name, more in (("whole", [f"{adapter}"]), ("halves", [f"{adapter}:0.5", "--lora", f"{adapter}:0.5"])):
        assert main([*plain, str(tmp_path / f"{name}.gguf"), "--lora", *more]) == 0
    assert main([*plain, str(tmp_path / "none.gguf")]) == 0
    whole, halves, none = (
        {tensor.name: np.array(tensor.data) for tensor in GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("whole", "halves", "none")
    )
    assert [name for name in none if np.abs(whole[name] - none[name]).max() > 0.1] == ["blk.1.ffn_down.weight"]
    assert all(np.allclose(whole[name], halves[name], rtol=0, atol=1e-6) for name in none)
    assert (
        main(["quantize", "--m", str(folder), "--lora-to-gguf", str(adapter), "--out", str(tmp_path / "a.gguf")]) == 0
    )
    assert "F32 x 2" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["quantize", "imatrix"])
def test_sigterm_leaves_no_part_of_a_file(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, words = write_toy_model(tmp_path / "plain"), write_words(tmp_path / "words")
    parts: list[list[Path]] = []

    def replace(*_: object) -> None:
        parts.append([*tmp_path.glob(".*.part")])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("candle_vllm.core.conversion.write.os.replace", replace)
    line = [command, "--m", str(folder), "--tokenizer", str(words), "--out", str(tmp_path / "x.gguf")]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*line, *(["-f", __file__, "--tokens", "9"] if command == "imatrix" else [])]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (len(parts[0]), [*tmp_path.glob(".*.part")]) == (1, [])


def test_perplexity_beside_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its files are: without the types that the model beside it is quantised to."""
    folder, text, quantised = write_toy_model(tmp_path / "toy"), tmp_path / "text.txt", ["--isq", "q8_0"]
    text.write_text("What is measured of a text. " * 12, "utf-8")
    line = ["perplexity", "--m", str(folder), "-f", str(text), "--window", "64", "--tokens", "200", "--threads", "1"]
    assert main(line) == 0
    shown = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
    assert (shown["model"], shown["window"], shown["windows"]) == ("toy", "64", "4")
    found = []
    for options in (["--reference", str(folder)], [*quantised, "--reference", str(folder)], quantised):
        assert main([*line, "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    own, other, alone = found
    assert (own["kl"], own["ratio"], own["reference"]) == (0, 1, own["perplexity"])
    assert str(round(own["perplexity"], 6)) == shown["perplexity"]
    assert 0 < other["kl"] < 0.01
    assert (other["reference"], other["perplexity"]) == (own["perplexity"], alone["perplexity"])
    text.write_text("\ufeffA short text.", "utf-8")
    assert main(line) == 0
    shown = dict(row.split(maxsplit=1) for row in capsys.readouterr().out.splitlines())
    assert (shown["windows"], shown["tokens"], shown["perplexity_error"]) == ("1", "12", "-")
    for command in (line[:5], ["imatrix", *line[1:5], "-o", str(tmp_path / "x.gguf")]):
        assert main([*command, "--window", "513"]) == 2
        said = "--window 513: max_model_len 513 is beyond the model's context of 512 tokens: set --window 512\n"
        assert capsys.readouterr().err.endswith(said)


def test_imatrix_writes_a_file_that_quantize_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text, out = write_toy_model(tmp_path / "toy"), tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("What is measured of a text. " * 12, "utf-8")
    line = ["imatrix", "--m", str(folder), "-f", str(text), "-o", str(out), "-c", "64", "--threads", "1"]
    assert main(line) == 0
    assert re.fullmatch(r".*imatrix\.gguf: \d+\.\d MB, 16 entries\n", capsys.readouterr().out)
    assert main(line) == 2
    assert "--force" in capsys.readouterr().err
    line = ["quantize", "--m", str(folder), "--tokenizer", str(write_words(tmp_path / "words")), "--isq", "iq4_nl"]
    for name, more in (("with", ["--imatrix", str(out)]), ("without", [])):
        assert main([*line, *more, "--out", str(tmp_path / f"{name}.gguf")]) == 0
    assert (tmp_path / "with.gguf").read_bytes() != (tmp_path / "without.gguf").read_bytes()


def test_words_of_other_programs_for_help_version_and_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    for line in ("help", "--help", "help bench serve", "bench serve --help", "version", "--version", "-v", "--version"):
        with pytest.raises(SystemExit):
            parse(*split_command(line.split()))
        said.append(capsys.readouterr().out)
    assert said[::2] == said[1::2]
    for flag in ("-p", "--prompt"):
        assert parse("generate", [flag, "hi", "--temperature", "0"])[1] == {"prompt": "hi"}
    source, own = parse("generate", ["-no-cnv", "-p", "hi"])
    assert (own, source.remarks[0].split()[0]) == ({"prompt": "hi"}, "-no-cnv")
    words = ["qwen3:4b", "why", "is", "--temperature", "0", "the", "sky", "blue"]
    assert parse("run", words)[1] == {"name": "qwen3:4b", "prompt": "why is the sky blue"}
    with pytest.raises(UsageError, match="unknown flag --tmp"):
        parse("run", ["qwen3:4b", "why", "--tmp"])
