# SPDX-License-Identifier: MIT
"""The `candle-vllm` command: finds a command by its name, and runs it (before step 1 of a request's life).

Every error that a user can cause ends as one line on standard error and exit status 2, or 1 if the next start may
succeed without a change; the traceback is shown only with `--log-level debug`. Before Ctrl+C is handled, only a few
small modules are imported, so that hardly any time passes until then.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from candle_vllm.server.settings.configuration import Configuration

EXIT_FAILED, EXIT_USAGE = 1, 2
EXIT_BROKEN_PIPE = 141  # the status that a shell reports for a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 for a user's error, 130 after Ctrl+C, 141 if a pipe closed.

    It is 1 if the next start may succeed without a change, and for some commands also otherwise: for `agent`, if the
    request was not carried out. Without `argv`, this call ends the process if daemon threads still run.
    """
    try:
        from candle_vllm.server.interrupts import leave

        return leave(_run(sys.argv[1:])) if argv is None else _run(argv)
    except KeyboardInterrupt:
        os.write(2, b"candle-vllm: stopped\n")
        return 130  # EXIT_INTERRUPTED, which may not be imported yet


def _run(argv: Sequence[str]) -> int:
    from candle_vllm.server.interrupts import EXIT_INTERRUPTED, leaving_at_once, say_stopped

    with leaving_at_once(lambda: "it started"):
        import io
        from pathlib import Path

        from candle_vllm.core.errors import CandleVllmError, EngineDeadError, HubUnreachableError, NotReadyError
        from candle_vllm.core.threads import collect_seldom

        debug = False
        collect_seldom()
        if os.path.expanduser("~") == "~":  # the user has no home folder: "/", as containers set it
            os.environ["HOME" if os.name == "posix" else "USERPROFILE"] = os.path.abspath("/")
        for number, name in ((1, "stdout"), (2, "stderr")):
            if getattr(sys, name) is None:  # it is closed: what is written must not go to a socket with its number
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
                setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        with leaving_at_once(lambda: "it started"):
            from candle_vllm.server.settings.command_line import parse, split_command
            from candle_vllm.server.settings.configuration import load_configuration

            command, rest = split_command(argv)
            given, own = parse(command, rest)
            places = {"folder": Path.cwd(), "home": Path.home()}
            configuration = load_configuration(given, os.environ, **places, command=command, remote="base_url" in own)
            settings = configuration.settings
            debug = settings.log_level == "debug"
            level = settings.log_level
            if command != "serve" and level == "info" and "log_level" not in given.values:
                level = "warning"  # other commands write to the terminal
            configure_logging(level, settings.log_format, settings.log_file if command == "serve" else None)
            say(configuration.remarks)
        status = run_command(command, configuration, own)
        if sys.stdout is not None:
            sys.stdout.flush()  # a failure at exit would print a traceback
        return status
    except BrokenPipeError:
        _write_nowhere()  # the reader of the output has closed the pipe
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if debug:
            raise
        _write_nowhere()
        where = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"candle-vllm: error: {error.strerror or error}{where}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        say_stopped()
        return EXIT_INTERRUPTED
    except (CandleVllmError, MemoryError) as error:
        if debug:
            raise
        from candle_vllm.core.shown import without_secrets
        from candle_vllm.server.settings.derived import in_flags

        reason = "the memory ran out; allow the process more, or take less: --mem, --max-num-seqs, --threads"
        said = reason if isinstance(error, MemoryError) else without_secrets(in_flags(str(error)))
        sys.stderr.write(f"candle-vllm: error: {said}\n")
        return EXIT_FAILED if isinstance(error, EngineDeadError | HubUnreachableError | NotReadyError) else EXIT_USAGE


def _write_nowhere() -> None:
    """If standard output fails, redirect it to the null device, because it is flushed again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(command: str, configuration: Configuration, own: dict[str, Any]) -> int:
    """Run one command; `own` are the values of flags that only this command has."""
    from importlib import import_module

    from candle_vllm.core.threads import collector_paused
    from candle_vllm.server.interrupts import leaving_at_once
    from candle_vllm.server.settings.commands import COMMANDS

    takes = COMMANDS[command]
    has_model = any(option.name == "model" for option in takes.settings)
    settings = configuration.settings if has_model else configuration.unlisted
    module, _, name = takes.runs.partition(":")
    with leaving_at_once(lambda: "it started"):
        if not takes.elsewhere:
            from candle_vllm.server.settings.derived import refuse_missing

            refuse_missing(settings)
        with collector_paused():  # the engine's modules are many objects, and none of them is garbage
            program = getattr(import_module(f"candle_vllm.server.{module}"), name)
    return program(configuration if takes.whole else settings, **own)


def say(remarks: Sequence[str]) -> None:
    """Log warnings about settings that have no effect."""
    if remarks:
        import logging

        for remark in remarks:
            logging.getLogger(__name__).warning("%s", remark)


def configure_logging(level: str, style: str = "text", file: Path | None = None) -> None:
    """Send the log to standard error and to the file, one line per record, in a style of `LOG_STYLES`."""
    import logging

    from candle_vllm.core.shown import start_logging
    from candle_vllm.server.observing.request_log import LogFile

    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        handlers.append(LogFile(file, encoding="utf-8"))
    start_logging(level.upper(), style, handlers=handlers)
    logging.getLogger("PIL").setLevel(logging.WARNING)  # else PIL logs a line for each chunk of an image file
    if level != "debug":
        for noisy in ("httpx", "httpx2", "filelock", "uvicorn.error", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # The MCP SDK logs tracebacks for errors of an MCP server; the link logs them in one line.
        for loud in ("mcp", "client"):
            logging.getLogger(loud).setLevel(logging.CRITICAL)


if __name__ == "__main__":
    sys.exit(main())
