"""The `candle-vllm` command: serve, generate, chat, bench.

Before step 1 of a request's life. Whatever a user can cause ends as one line on standard error and exit status 2;
the traceback is shown only with `--log-level debug`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from candle_vllm.core.errors import CandleVllmError
from candle_vllm.server.parser import parse, split_command
from candle_vllm.server.settings import Settings, load_settings

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 2 for a user's error, 130 after Ctrl+C."""
    debug = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        command, rest = split_command(sys.argv[1:] if argv is None else argv)
        given, own = parse(command, rest)
        settings = load_settings(given, os.environ, folder=Path.cwd(), home=Path.home())
        debug = settings.log_level == "debug"
        configure_logging(settings.log_level if command == "serve" else _quiet(given.values, settings))
        return run_command(command, settings, own)
    except BrokenPipeError:
        # Whoever read our output has left: standard output must not be flushed again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except CandleVllmError as error:
        if debug:
            raise
        sys.stderr.write(f"candle-vllm: error: {error}\n")
        return EXIT_USAGE


def run_command(command: str, settings: Settings, own: dict[str, Any]) -> int:
    """Runs one command; its module, and with it the engine, is imported only here."""
    if command == "serve":
        from candle_vllm.server.serve import serve

        return serve(settings)
    if command == "generate":
        from candle_vllm.server.commands.generate import generate

        return generate(settings, **own)
    if command == "chat":
        from candle_vllm.server.commands.chat import chat

        return chat(settings, **own)
    from candle_vllm.server.commands.bench import bench

    return bench(settings, **own)


def configure_logging(level: str) -> None:
    """Sends the log to standard error, one line per record."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if level != "debug":
        for noisy in ("httpx", "httpcore", "urllib3", "filelock", "uvicorn.error", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.WARNING)


def _quiet(given: Any, settings: Settings) -> str:
    """On the terminal, text is what counts: only warnings are logged unless a level was asked for."""
    return settings.log_level if "log_level" in given or settings.log_level != "info" else "warning"


if __name__ == "__main__":
    sys.exit(main())
