# SPDX-License-Identifier: MIT
"""The command line parser, built from the table of settings in `table.py` (before step 1 of a request's life).

argparse splits the command line. `Option.kind` converts the values, as it does for the environment and models.yaml, so
that every source has the same rules and error messages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from candle_vllm.core.setting_kinds import FreeText, Text, nearest
from candle_vllm.server.settings.commands import COMMANDS, Command
from candle_vllm.server.settings.foreign_flags import COMMANDS as FOREIGN_COMMANDS
from candle_vllm.server.settings.foreign_flags import foreign_flags, lines_of, translated
from candle_vllm.server.settings.options import GROUPS, Option, UsageError, convert
from candle_vllm.server.settings.sources import SettingsSource, origins
from candle_vllm.server.settings.table import BY_NAME

_EPILOG = """\
Settings may also come from the environment (CANDLE_VLLM_PORT=2000), from .env and from models.yaml.
Whole numbers may end in k, m, g (powers of 1000) or K, M, G (powers of 1024).
"""

SHORT: Mapping[str, str] = {"-m": "--m", "-p": "--p"}
"""Short flags of other programs. Some of them use -p for a prompt, so it is the port only for `serve` and `config`."""

_DASH = "; a text that begins with - comes last, after --"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        more = _DASH if message.endswith((": PROMPT", ": REQUEST")) else ""
        raise UsageError(message.removeprefix("argument ") + more)


def split_command(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command from its arguments; the default command is `serve`. Raises UsageError for an unknown one."""
    if argv == ["-v"]:  # alone --version, as in vLLM and Ollama; beside other flags --verbose, as in llama.cpp
        argv = ["--version"]
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
        UsageError: a flag is unknown, an argument is unexpected, or a value is missing or invalid.
        SystemExit: after `--help` or `--version`.
    """
    takes = COMMANDS[command]
    argv, remarks = translated(command, _in_full(command, argv), flag_commands())
    given, rest = build_parser(command).parse_known_args(argv)
    arguments = vars(given)
    if command in ("serve", "config", "chat") and len(rest) == 1 and "model" not in arguments:
        text = rest[0]
        if not text.startswith("-") and text not in COMMANDS and not any(map(str.isspace, text)):
            arguments["model"] = rest.pop()
    if command == "run" and "prompt" in arguments and not any(text.startswith("-") for text in rest):
        arguments["prompt"], rest = " ".join((arguments["prompt"], *rest)), []  # `ollama run MODEL why is the sky blue`
    if rest:
        raise UsageError(_unknown(command, rest[0]))
    settings: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for option in takes.settings:
        if option.name in arguments:
            settings[option.name] = _value(option, arguments[option.name])
            spelled[option.name] = _flag(option)
    own = {option.name: _value(option, arguments[option.name])
           for option in takes.options if option.name in arguments}  # fmt: skip
    if "prompt" in arguments:
        own["prompt"] = convert(FreeText(), arguments["prompt"], takes.text.strip("[]"))
    if takes.names_model:
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
        raise UsageError(f"{path}: {next(iter(more))} can only be set on the command line")
    deciding = origins([given, below])
    return SettingsSource(
        given.title,
        {name: source.values[name] for name, source in deciding.items()},
        {name: source.given_as[name] + ("" if source is given else f" in {path}") for name, source in deciding.items()},
        (*given.remarks, *below.remarks),
    )


def build_parser(command: str) -> argparse.ArgumentParser:
    """Return the argparse parser of one command."""
    takes = COMMANDS[command]
    parser = _Parser(
        prog="candle-vllm" if command == "serve" else f"candle-vllm {command}",
        description=takes.summary,
        usage=_usage(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_EPILOG + takes.epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    general = parser.add_argument_group("commands" if command == "serve" else "general")
    if command == "serve":
        general.description = "\n".join(f"{name:20}  {each.summary}" for name, each in COMMANDS.items())
    general.add_argument("--help", action="help", help="show this help and exit; also -h")
    general.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    if takes.names_model:
        parser.add_argument("name", metavar="MODEL", help="organisation/name:Q4_K_M, or a short name of `list --known`")
    if takes.needs_text:
        parser.add_argument(
            "prompt", metavar=takes.text, help=f"the {takes.text.lower()}; - reads it from standard input"
        )
    elif takes.text:
        text = "answer this prompt and exit"
        parser.add_argument("prompt", metavar=takes.text.strip("[]"), nargs="?", help=text)
    groups = {name: [option for option in takes.settings if option.group == name] for name in GROUPS}
    for title, options in {command: takes.options, **groups}.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option, takes)
    return parser


def _usage(command: str) -> str:
    if command == "serve":
        return f"candle-vllm [{' | '.join(COMMANDS)}] [options]\n       candle-vllm serve [MODEL] [options]"
    takes = COMMANDS[command]
    named = " MODEL" * takes.names_model + " [MODEL]" * (command in ("chat", "config"))
    return f"candle-vllm {command} [options]{named}" + (takes.text and f" {takes.text}")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        sys.stdout.write(f"candle-vllm {version('candle-vllm-server')}\n")
        parser.exit(0)


def _add(group: argparse._ArgumentGroup, option: Option, takes: Command) -> None:
    text = option.help + (f" (default: {option.usual})" if option.flags and option.usual != "" else "")
    if option.flags:
        several: dict[str, Any] = {"action": "extend", "nargs": "+"} if takes.several else {"action": "append"}
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
    """Rewrite forms that argparse would not accept here: -m, -p, --help=GROUP, `serve MODEL` and --mcp-args -X."""
    end = argv.index("--") if "--" in argv else len(argv)
    found = [SHORT.get(text, text) if text != "-p" or command in ("serve", "config") else text for text in argv[:end]]
    if command == "generate":  # llama-cli has flags for the prompt, which is a positional argument here
        found = [text for text in found if text not in ("-p", "--prompt")]
    found = ["--help" if text.startswith("--help=") else text for text in found]  # vLLM's --help=GROUP
    named = any(text.split("=", 1)[0] in BY_NAME["model"].flags for text in found)
    if command == "serve" and found and not found[0].startswith("-") and found[0] not in COMMANDS and not named:
        found.insert(0, "--m")
    for place, text in enumerate(found[:-1]):  # a value that argparse would parse as a flag: --mcp-args -m,server
        if text == "--mcp-args" and found[place + 1].startswith("-") and _is_argument(found[place + 1]):
            found[place : place + 2] = [f"{text}={found[place + 1]}"]
            break
    # argparse would find a flag -h also at the beginning of a text
    return [*("--help" if text == "-h" else text for text in found), *argv[end:]]


def _is_argument(text: str) -> bool:
    name = text.split("=", 1)[0]
    return name not in flag_commands() and name not in foreign_flags() and name not in SHORT.values()


def flag_commands() -> dict[str, list[str]]:
    """Return the commands of each flag."""
    known: dict[str, list[str]] = {}
    for command, takes in COMMANDS.items():
        for option in (*takes.settings, *takes.options):
            for flag in (*option.flags, *option.constants):
                known.setdefault(flag, []).append(command)
    return known


def _unknown(command: str, text: str) -> str:
    takes = COMMANDS[command]
    if not text.startswith("-"):
        more = ""
        if command == "serve" or (not takes.needs_text and "/" in text) or ".gguf" in text:
            more = f": a model is named with --m {text}"
        elif takes.hint:
            more = f": {takes.hint}"
        if text in COMMANDS:
            more = f": the command comes first (candle-vllm {text} ...)"
        return f"unexpected argument {text!r:.60}{more:.200}"
    flag = text.split("=", 1)[0]
    if commands := flag_commands().get(flag):
        return f"{flag} does not apply to `candle-vllm {command}`, only to `candle-vllm {', '.join(commands)}`"
    known = [name for option in (*takes.settings, *takes.options) for name in (*option.flags, *option.constants)]
    more = _DASH if takes.text else ""
    return f"unknown flag {flag[:60]}{nearest(flag, ['--help', '--version', *known])}; see candle-vllm --help{more}"
