# SPDX-License-Identifier: MIT
"""The command line parser, built from the table of settings in `table.py` (before step 1 of a request's life).

argparse splits the command line. The values are converted by the same kinds as those of the environment and of
models.yaml, so that every source has the same rules and error messages.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from candle_vllm.core.sampling.params import BOUNDS
from candle_vllm.core.setting_kinds import (
    Boolean,
    Choice,
    FilePath,
    FreeText,
    Integer,
    Kind,
    Number,
    Secret,
    Text,
    nearest,
)
from candle_vllm.server.settings.foreign_flags import COMMANDS as FOREIGN_COMMANDS
from candle_vllm.server.settings.foreign_flags import foreign_flags
from candle_vllm.server.settings.options import COMMAND_GROUPS, COMMANDS, NAMING, Option, UsageError, convert, switch
from candle_vllm.server.settings.sources import SettingsSource, origins
from candle_vllm.server.settings.table import BY_NAME, OPTIONS, settings_of
from candle_vllm.server.settings.translation import lines_of, translated

_EPILOG = """\
Settings may also come from the environment (CANDLE_VLLM_PORT=2000), from .env and from models.yaml.
Whole numbers may end in k, m, g (powers of 1000) or K, M, G (powers of 1024).
"""
_CHAT_EPILOG = """\
On a pipe every line is a message or a command, and what stands between \"\"\" and \"\"\" is one message of several
lines. Answers go to standard output, remarks and errors to standard error; the status is 1 where a message failed.
"""
_TOKENS = BOUNDS["max_tokens"]
_SPACED = ("serve", "config", "bench serve")  # these commands accept several values after one flag, as vLLM does
_TEXTS = {"generate": "PROMPT", "agent": "REQUEST"}  # commands with a text argument

_SYSTEM = Option("system", "command", ("--system",), FreeText(least=0), "system message of the conversation", "TEXT")
MAX_TOKENS = Option("max_tokens", "command", ("--max-tokens",), _TOKENS, "most tokens of an answer", "N")

_AS_JSON = Option("as_json", "command", (), Boolean(), "print one JSON object, not a table", constants={"--json": True})

SHORT: Mapping[str, str] = {"-m": "--m", "-p": "--p"}
"""Short flags of other programs. Some of them use -p for a prompt, so it is the port only for `serve`."""

_CONFIG = Option(
    "config", "command", ("--config",), FilePath(), "YAML file of flags: those given beside it win", "FILE"
)


def _own(name: str, kind: Kind, text: str, metavar: str, **more: Any) -> Option:
    """Return an option of one command; its flag is derived from its name."""
    return Option(name, "command", ("--" + name.replace("_", "-"), *more.pop("also", ())), kind, text, metavar, **more)


def _switch(name: str, text: str) -> Option:
    return Option(name, "command", (), Boolean(), text, constants={"--" + name.replace("_", "-"): True})


_SHARE = Number(0, 1, open_high=True)
_BACKENDS = Choice(("openai", "openai-chat", "openai-embeddings", "vllm"))
_LENGTHS = (
    _own("input_len", _TOKENS, "length of each prompt", "N", also=("--random-input-len",)),
    _own("output_len", _TOKENS, "length of each answer", "N", also=("--random-output-len",)),
)
_SEED = _own("seed", Integer(0, 1 << 32, units=False), "the same one makes the same requests", "N")
_DATA = (
    _own("dataset_name", Text(64), "random, sonnet, sharegpt, mt_bench, spec_bench, speed_bench or custom", "NAME"),
    _own("dataset_path", FilePath(), "file of a data set that is not made here", "FILE"),
    _own("num_prompts", Integer(1, 10_000_000), "how many requests (1000)", "N"),
    *_LENGTHS,
    _own("random_prefix_len", Integer(0, 1 << 24), "tokens that all random prompts begin with", "N"),
    _own("random_range_ratio", _SHARE, "random lengths are between 1 - X and 1 + X times these", "X"),
    _SEED,
)
_MEASURED = (
    _own("base_url", Text(), "the server, without /v1 (http://127.0.0.1:2000)", "URL"),
    _own("host", Text(512), "host of the server, in place of --base-url", "HOST"),
    _own("port", Integer(1, 65535, units=False), "port of the server, in place of --base-url", "PORT"),
    _own("endpoint", Text(512), "path of the route; default: the one of the backend", "PATH"),
    _own("backend", _BACKENDS, "openai (text completions; vllm too), openai-chat or openai-embeddings", "NAME",
         also=("--endpoint-type",)),
    _own("model", Text(512), "the model's name on the server; default: the first one", "NAME", also=("--m",)),
    _own("served_model_name", Text(512), "the model's name on the server; preferred to --model", "NAME"),
    _own("tokenizer", FilePath(), "folder or .gguf file that counts tokens; else the server's /tokenize", "PATH"),
    _own("api_key", Secret(), "key for the server", "KEY"),
    _own("header", Text(4096), "further headers", "NAME=VALUE", repeat=True),
    _switch("insecure", "do not check certificates"),
)  # fmt: skip
_ARRIVING = (
    _own("request_rate", Text(64), "requests per second; inf, the default, sends all at once", "X"),
    _own("burstiness", Number(0, 1000, open_low=True), "1 is a Poisson process; less is burstier", "X"),
    _own("ramp_up_strategy", Choice(("linear", "exponential")), "how the rate grows over the requests", "NAME"),
    _own("ramp_up_start_rps", Integer(1, 1_000_000), "requests a second at the start of the ramp", "N"),
    _own("ramp_up_end_rps", Integer(1, 1_000_000), "requests a second at the end of the ramp", "N"),
    _own("max_concurrency", Integer(1, 100_000), "most requests at a time", "N"),
    _own("num_warmups", Integer(0, 1000), "warm-up requests, which are not counted", "N"),
    _switch("ignore_eos", "answers go on to their length; random prompts have it always"),
    _own("temperature", BOUNDS["temperature"], "of every request", "X"),
    _own("top_p", BOUNDS["top_p"], "of every request", "X"),
    _own("top_k", BOUNDS["top_k"], "of every request", "K"),
    _own("extra_body", FreeText(), "further fields of every request", "JSON"),
)
_FIGURES = (
    _own("percentile_metrics", Text(64), "of ttft,tpot,itl,e2el", "NAMES"),
    _own("metric_percentiles", Text(128), "such as 50,90,99 (99)", "NUMBERS"),
    _own("goodput", Text(128), "most milliseconds of a good request: ttft:200 tpot:50", "NAME:MS", repeat=True),
    _switch("save_result", "save the figures as JSON"),
    _switch("save_detailed", "save every request as well"),
    _switch("append_result", "save them as one line more of the file"),
    _own("result_dir", FilePath(), "where they are saved", "FOLDER"),
    _own("result_filename", Text(255), "under which name", "NAME"),
    _own("metadata", Text(4096), "further fields of that file", "NAME=VALUE", repeat=True),
)
_TEXT = (
    _own("file", FilePath(), "the text, a file in UTF-8", "FILE", also=("-f",)),
    _own("window", _TOKENS, "tokens that are read together", "N", also=("-c",)),
    _own("tokens", _TOKENS, "most tokens of the text", "N"),
)
_WRITTEN = (
    _own("out", FilePath(), "the file to write, which ends in .gguf", "FILE", also=("-o",)),
    _switch("force", "replace a file of that name"),
    dataclasses.replace(BY_NAME["threads"], group="command"),
)
_OUTPUT_JSON = _own("output_json", FilePath(), "save the figures", "FILE")
_N = _own("n", Integer(1, 64), "answers of each request", "N")

COMMAND_OPTIONS: Mapping[str, tuple[Option, ...]] = {
    "serve": (_CONFIG,),
    "generate": (
        switch("chat", "command", "put the prompt into the model's chat template as a user message"),
        _SYSTEM,
        MAX_TOKENS,
        _own("stop", FreeText(1024), "text that ends the answer; repeatable", "TEXT", repeat=True),
    ),
    "chat": (_SYSTEM, MAX_TOKENS),
    "run": (_SYSTEM, MAX_TOKENS),
    "pull": (),
    "list": (_switch("known", "the names that are known, and what they take"),),
    "show": (),
    "rm": (),
    "ps": (),
    "agent": (
        _own(
            "base_url",
            Text(),
            "let a server with OpenAI's chat API answer, such as http://127.0.0.1:2000/v1; --m is then the model's "
            "name there",
            "URL",
        ),
        _own("api_key", Secret(), "key for that server", "KEY"),
        _switch("yes", "run every tool without asking"),
        _own("approve", Text(256), "tool that runs without asking, or server__*; repeatable", "NAME", repeat=True),
        _own("max_turns", Integer(1, 1000), "most turns of the model", "N"),
        _SYSTEM,
        MAX_TOKENS,
        Option("as_json", "command", (), Boolean(), "print every event as a line of JSON", constants={"--json": True}),
    ),
    "bench": (
        _own("prompt_tokens", _TOKENS, "length of each prompt", "N"),
        _own("output_tokens", _TOKENS, "length of each answer", "N"),
        _own("concurrency", Integer(1, 4096), "requests at the same time", "N"),
        _own("repeat", Integer(1, 1000), "measured rounds; the median is reported", "N"),
        _AS_JSON,
    ),
    "bench serve": (*_MEASURED, *_DATA, *_ARRIVING, *_FIGURES),
    "bench throughput": (*_DATA, _N, _OUTPUT_JSON),
    "bench latency": (
        *_LENGTHS,
        _own("batch_size", Integer(1, 4096), "requests at a time (8)", "N"),
        _N,
        _own("num_iters_warmup", Integer(0, 1000), "rounds before (10)", "N"),
        _own("num_iters", Integer(1, 10_000), "measured rounds (30)", "N"),
        _SEED,
        _OUTPUT_JSON,
    ),
    "bench speculation": (
        *_DATA[:3],
        _LENGTHS[1],
        _SEED,
        _own("pairs", Integer(1, 1000), "answers of each prompt with drafts and without (5)", "N"),
        _switch("skip_chat_template", "prompts are continued as they are"),
        _OUTPUT_JSON,
    ),
    "run-batch": (
        Option(
            "input_file",
            "command",
            ("-i", "--input-file"),
            FreeText(4096),
            "the requests, a line of JSON each: a file, or an http:// or https:// address",
            "FILE",
        ),
        Option(
            "output_file",
            "command",
            ("-o", "--output-file"),
            FreeText(4096),
            "where the answers go, in the same order: a file, which is written anew, or an address, by PUT",
            "FILE",
        ),
        _own("output_tmp_dir", FilePath(), "where they are gathered before they go to an address", "FOLDER"),
    ),
    "quantize": (
        *_WRITTEN,
        _own(
            "dtype", BY_NAME["dtype"].kind, "type of matrices without --isq: auto (as stored), f32, bf16, f16", "TYPE"
        ),
        _own("lora", Text(4096), "adapter to merge into it, times SCALE (1); repeatable", "PATH[:SCALE]", repeat=True),
        _own("lora_to_gguf", FilePath(), "write this adapter for it as a GGUF file instead", "FOLDER"),
    ),
    "imatrix": (*_TEXT, *_WRITTEN),
    "perplexity": (*_TEXT, _own("reference", Text(), "model to compare with, which runs first", "MODEL"), _AS_JSON),
    "config": (_CONFIG, _AS_JSON),
}
"""Options of single commands; they have no environment variable and no key in models.yaml."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command from its arguments; the default command is `serve`."""
    if not argv or argv[0].startswith("-"):
        return "serve", list(argv)
    if " ".join(argv[:2]) in COMMANDS:
        return " ".join(argv[:2]), list(argv[2:])
    if argv[0] == "ls":
        return "list", list(argv[1:])
    if argv[0] in ("help", "version"):
        command, rest = split_command(argv[1:]) if argv[1:] else ("serve", [])
        return command, [f"--{argv[0]}", *rest]
    for name in (" ".join(argv[:2]), argv[0]):
        if name in FOREIGN_COMMANDS and name not in COMMANDS:
            raise UsageError(f"there is no command {name!r}: {FOREIGN_COMMANDS[name]}")
    if argv[0] not in COMMANDS:
        raise UsageError(
            f"unknown command {argv[0]!r:.60}{nearest(argv[0], COMMANDS)}; commands: {', '.join(COMMANDS)}"
        )
    return argv[0], list(argv[1:])


def parse(command: str, argv: Sequence[str]) -> tuple[SettingsSource, dict[str, Any]]:
    """Parse the command line into settings and the command's own values (`prompt`, `max_tokens`, ...).

    Raises:
        UsageError: a flag is unknown, or a value is missing or invalid.
        SystemExit: after `--help` or `--version`.
    """
    argv, remarks = translated(command, _in_full(command, argv), flag_commands())
    parser = build_parser(command)
    given, rest = parser.parse_known_args(argv)
    arguments = vars(given)
    if command == "serve" and len(rest) == 1 and "model" not in arguments and _may_be_model(rest[0]):
        arguments["model"] = rest.pop()
    if rest:
        raise UsageError(_unknown(command, rest[0]))
    settings: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for option in settings_of(command):
        if option.name in arguments:
            settings[option.name] = _value(option, arguments[option.name])
            spelled[option.name] = _flag(option)
    own = {option.name: _value(option, arguments[option.name])
           for option in COMMAND_OPTIONS[command] if option.name in arguments}  # fmt: skip
    if command in _TEXTS or "prompt" in arguments:
        own["prompt"] = convert(FreeText(), arguments["prompt"], _TEXTS.get(command, "PROMPT"))
    if command in NAMING:
        own["name"] = convert(Text(), arguments["name"], "MODEL")
    source = SettingsSource("the command line", settings, spelled, tuple(remarks))
    return _over_file(command, source, own.pop("config", None)), own


def _over_file(command: str, given: SettingsSource, path: Path | None) -> SettingsSource:
    """Combine the command line with the flags of a YAML file, which have lower precedence."""
    if path is None:
        return given
    try:
        below, more = parse(command, lines_of(path, flag_commands()))
    except UsageError as error:
        raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if more:
        raise UsageError(f"{path}: {next(iter(more))} stands on the command line alone")
    deciding = origins([given, below])
    return SettingsSource(
        given.title,
        {name: source.values[name] for name, source in deciding.items()},
        {name: source.given_as[name] + ("" if source is given else f" in {path}") for name, source in deciding.items()},
        (*given.remarks, *below.remarks),
    )


def _may_be_model(text: str) -> bool:
    """Whether an argument may be the model, which vLLM accepts at any position; a command's name there is a mistake."""
    return not text.startswith("-") and text not in COMMANDS


def build_parser(command: str) -> argparse.ArgumentParser:
    """Return the argparse parser of one command."""
    parser = _Parser(
        prog="candle-vllm" if command == "serve" else f"candle-vllm {command}",
        description=COMMANDS[command],
        usage=_usage(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG + (_CHAT_EPILOG if command == "chat" else ""),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    general = parser.add_argument_group("commands" if command == "serve" else "general")
    if command == "serve":
        general.description = "\n".join(f"{name:20}  {text}" for name, text in COMMANDS.items())
    general.add_argument("-h", "--help", action="help", help="show this help and exit")
    general.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    if command in _TEXTS:
        name = _TEXTS[command]
        parser.add_argument("prompt", metavar=name, help=f"the {name.lower()}; - reads it from standard input")
    if command in NAMING:
        parser.add_argument("name", metavar="MODEL", help="as organisation/name:Q4_K_M, or of `list --known`")
    if command == "run":
        parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="is answered, in the place of a conversation")
    if COMMAND_OPTIONS[command]:
        own = parser.add_argument_group(command)
        for option in COMMAND_OPTIONS[command]:
            _add(own, option, command)
    for name in COMMAND_GROUPS[command]:
        group = parser.add_argument_group(name)
        for option in settings_of(command):
            if option.group == name:
                _add(group, option, command)
    return parser


def _usage(command: str) -> str:
    if command == "serve":
        return f"candle-vllm [{' | '.join(COMMANDS)}] [options]\n       candle-vllm serve [MODEL] [options]"
    named = " MODEL" * (command in NAMING) + " [PROMPT]" * (command == "run")
    return f"candle-vllm {command} [options]{named}" + (f" {_TEXTS[command]}" if command in _TEXTS else "")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        sys.stdout.write(f"candle-vllm {version('candle-vllm-server')}\n")
        parser.exit(0)


def _add(group: argparse._ArgumentGroup, option: Option, command: str) -> None:
    default = option.default
    text = option.help + (f" (default: {default})" if option.flags and default not in (None, (), False) else "")
    if option.flags:
        # Commands without a text argument accept several values after one flag, as vLLM does.
        several: dict[str, Any] = {"action": "extend", "nargs": "+"} if command in _SPACED else {"action": "append"}
        given: dict[str, Any] = several if option.repeat else {"action": "store"}
        group.add_argument(*option.flags, dest=option.name, metavar=option.metavar, help=text, **given)
    for value in dict.fromkeys(option.constants.values()):
        flags = [flag for flag, meaning in option.constants.items() if meaning == value]
        shown = text if value is True else f"the opposite of {_flag(option)}"
        if option.flags or flags == [f"--no{_flag(option)[1:]}"]:
            shown = argparse.SUPPRESS
        group.add_argument(*flags, dest=option.name, action="store_const", const=value, help=shown)


def _flag(option: Option) -> str:
    return option.flags[0] if option.flags else next(iter(option.constants))


def _value(option: Option, given: Any) -> Any:
    spelled = "/".join(option.flags) or _flag(option)
    if option.repeat:
        return tuple(convert(option.kind, item, spelled) for item in given)
    return convert(option.kind, given, spelled)


def _in_full(command: str, argv: Sequence[str]) -> list[str]:
    """Expand short forms: -m, -p for `serve`, and vLLM's `serve MODEL`."""
    end = argv.index("--") if "--" in argv else len(argv)
    found = [SHORT.get(text, text) if text != "-p" or command == "serve" else text for text in argv[:end]]
    if command == "generate":  # llama-cli has flags for the prompt, which is a positional argument here
        found = [text for text in found if text not in ("-p", "--prompt")]
    found = ["--help" if text.startswith("--help=") else text for text in found]  # with a group or flag, as in vLLM
    named = any(text.split("=", 1)[0] in BY_NAME["model"].flags for text in found)
    if command == "serve" and found and not found[0].startswith("-") and found[0] not in COMMANDS and not named:
        found.insert(0, "--m")
    for place, text in enumerate(found[:-1]):  # a value that argparse would parse as a flag: --mcp-args -m,server
        if text == "--mcp-args" and found[place + 1].startswith("-") and _is_argument(found[place + 1]):
            found[place : place + 2] = [f"{text}={found[place + 1]}"]
            break
    return [*found, *argv[end:]]


def _is_argument(text: str) -> bool:
    name = text.split("=", 1)[0]
    return name not in flag_commands() and name not in foreign_flags() and name not in SHORT.values()


def flag_commands() -> dict[str, list[str]]:
    """Return the commands of each flag."""
    known: dict[str, list[str]] = {}
    for command in COMMANDS:
        for option in (*settings_of(command), *COMMAND_OPTIONS[command]):
            for flag in (*option.flags, *option.constants):
                known.setdefault(flag, []).append(command)
    return known


def _unknown(command: str, text: str) -> str:
    if not text.startswith("-"):
        more = (
            f": a model is named with --m {text}"
            if command == "serve" or (command not in _TEXTS and "/" in text) or ".gguf" in text
            else ""
        )
        if command == "chat" and not more:
            more = ": one question is asked with candle-vllm generate --chat"
        if command == "quantize" and not more:
            more = ": candle-vllm quantize --m MODEL --isq q4k --out FILE.gguf"
        if text in COMMANDS:
            more = f": the command comes first (candle-vllm {text} ...)"
        return f"unexpected argument {text!r:.60}{more:.200}"
    flag = text.split("=", 1)[0]
    elsewhere = [option for option in OPTIONS if flag in (*option.flags, *option.constants)]
    if elsewhere:
        return f"{flag} does not apply to `candle-vllm {command}`"
    options = (*settings_of(command), *COMMAND_OPTIONS[command])
    known = [name for option in options for name in (*option.flags, *option.constants)]
    return f"unknown flag {flag[:60]}{nearest(flag, ['--help', '--version', *known])}; see candle-vllm --help"
