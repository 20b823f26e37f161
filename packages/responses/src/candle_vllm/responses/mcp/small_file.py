"""A configuration file's text, within a limit."""

from __future__ import annotations

from pathlib import Path

from candle_vllm.core.errors import ConfigError

MAX_FILE = 1 << 20  # bytes


def read_small_file(path: Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: it is not there, no plain file, too large, or no text; the message begins with `what`.
    """
    try:
        if not path.is_file():  # a pipe would never end, and a device has no size
            problem = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "does not exist"
            raise ConfigError(f"{what}: {path} {problem}")
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path!s:.300}: {error.strerror}") from None
    if len(content) > MAX_FILE:
        raise ConfigError(f"{what}: {path} is larger than {MAX_FILE >> 20} MB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{what}: {path} is not UTF-8 text") from None
