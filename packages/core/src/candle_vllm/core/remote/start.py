"""The first words to the engine's process, over its standard input: how to reach its parent, and what to load.

Before step 1 of a request's life. Nothing of it stands on a command line, which others on the machine can read.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any, Final

import msgspec

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import ConfigError

MAX_START: Final = 1 << 24  # bytes
TOKEN_BYTES: Final = 32


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first words, over the child's standard input.

    Attributes:
        token: what both ends know and nobody else.
        address: where this process listens.
        folder: of the sockets; removed by the child where this process has gone without doing so.
        alive: descriptor that the child keeps open as long as it lives.
        log_level: of the child's log.
        config: fields of `EngineConfig`.
    """

    token: bytes
    address: str
    folder: str
    alive: int
    log_level: int
    config: dict[str, Any]


def write_start(config: EngineConfig, token: bytes, address: str, folder: str, alive: int) -> bytes:
    """The words, behind their length.

    Raises:
        ConfigError: a setting cannot be handed over.
    """
    level = logging.getLogger("candle_vllm").getEffectiveLevel()
    start = Start(
        token=token, address=address, folder=folder, alive=alive, log_level=level, config=config_fields(config)
    )
    try:
        data = msgspec.msgpack.encode(start)
    except (UnicodeEncodeError, TypeError) as error:
        raise ConfigError(f"a setting cannot be handed to another process: {error}") from None
    if len(data) > MAX_START:
        raise ConfigError(f"the settings have {len(data)} bytes, and {MAX_START} can be handed to another process")
    return len(data).to_bytes(4, "little") + data


def read_start(descriptor: int) -> Start:
    """What `write_start` wrote.

    Raises:
        ValueError: it did not write this.
        EOFError: the parent has gone.
    """
    size = int.from_bytes(_read_exactly(descriptor, 4), "little")
    if size > MAX_START:
        raise ValueError(f"the parent announces {size} bytes; at most {MAX_START} are read")
    return msgspec.msgpack.decode(_read_exactly(descriptor, size), type=Start)


def config_fields(config: EngineConfig) -> dict[str, Any]:
    """The fields of a configuration as plain values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _read_exactly(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            raise EOFError("the parent has gone")
        data += part
    return data
