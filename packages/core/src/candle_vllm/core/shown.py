# SPDX-License-Identifier: MIT
"""Format objects and URLs for people and logs: short, and without secrets."""

from __future__ import annotations

import contextlib
import datetime
import enum
import json
import logging
import re
import reprlib
import unicodedata
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import msgspec

_MOST = 6  # maximum number of entries of a list that are shown
HIDDEN = "***"
MAX_MESSAGE = 8_192  # characters of a log record without fields
FIELDS = "candle_vllm_fields"  # attribute of a record with fields

_PLAIN = re.compile(r"[A-Za-z0-9._:/+-]{1,256}")  # values without quotation marks

# The pattern checks the scheme backwards from its colon: a forward search would try every letter of a long word.
# Error messages of urllib3 have only a path; `//user:password@host` has no scheme.
_REST = r"([^{0}/\\?#]*)([^{0}?#]*)(?:[?#][^{0}]*)?"
_ADDRESS = (
    r"((?:(?<=\w\w:)|(?<=with url: ))//?|(?<=\w\w:)\\{{2,4}}|(?<=\b\w:)//|(?<![\w:/\\])//(?=[^{0}/?#@]*@))" + _REST
)
# Without slashes `a:b@c` may also be an e-mail address, a model's tag and revision, or a time: so the user must not be
# a number, and the host must have a port, or, in a text that is one value, be a name with a dot, localhost or an IP
# address. No match begins after a colon: its text was already tried as a password, unless a number precedes the colon.
_SLASHLESS = (
    r"(?<![\w.%+~/\\-])(?<!\D:)()"
    r"(?=(?!\d+:)[\w.%+~-]{{0,64}}+:(?:[^{0}\s/?#@]{{1,128}}+@){{1,3}}?(?!sha\d+:){1})" + _REST
)
_PORT = r"(?:[\w.-]{1,253}|\[[\da-fA-F:.]+\]):\d{1,5}(?!\w)"
_NAME = r"(?:[\w.-]{0,253}\.[a-z][\w-]+|\d+(?:\.\d+){3}|\[[\da-fA-F:.]+\]|localhost)(?![\w.@:])"
_ADDRESSES = tuple(  # within a text, and as a whole value
    (re.compile(_ADDRESS.format(stop)), re.compile(_SLASHLESS.format(stop, host)))
    for stop, host in ((r"\s\"<>\\", _PORT), ('"', f"(?:{_PORT}|{_NAME})"))
)
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:(\d*|\*|port|PORT|\{\w*\}))?[:.,;)}\]!']*")
_EXAMPLE = re.compile(r"\[?user:password@\]?host(\[?:port\]?)?[\[:.,;)}\]!']*")  # an example of an address
_CUT = re.compile(r"(?!localhost)\w+:\d+")  # a user and the beginning of a password, if the path has an @


def without_secrets(text: str, *, alone: bool = False) -> str:
    """Return `text` with its URLs reduced to scheme, host and path.

    User, password, query and fragment are left out. If the port is no number, as in a URL whose password is truncated
    or contains a slash, only the scheme stays. In a text that is one value (`alone`), a URL ends only at a quotation
    mark; otherwise also at a space.
    """
    address, slashless = _ADDRESSES[alone]
    text = address.sub(_bare, text) if "/" in text or "\\" in text else text
    return slashless.sub(_bare, text) if "@" in text else text


def _bare(found: re.Match[str]) -> str:
    slashes, authority, path = found.groups()
    if _EXAMPLE.fullmatch(authority):
        return f"{slashes}{authority}{path}"
    host = authority.rpartition("@")[2]
    cut = found.re is _ADDRESSES[True][0] and "@" in path and _CUT.fullmatch(authority)
    return f"{slashes}{host}{path}" if _HOST.fullmatch(host) and not cut else slashes + HIDDEN


def start_logging(
    level: int | str, style: str = "text", process: str | None = None, handlers: Sequence[logging.Handler] = ()
) -> None:
    """Set up the log of this process; records never contain secrets of URLs.

    Secrets are removed when records are created, because libraries have their own handlers. Some loggers are limited to
    warnings: HTTP connections write targets and headers, and the MCP SDK session ids, arguments and outputs of tools.

    `style` is a name of `LOG_STYLES`; lines of a child process contain its name, `process`. The default of `handlers`,
    those of the root logger, is one that writes to standard error.
    """
    handlers = handlers or [logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(LogFormatter(style, process))
    logging.basicConfig(level=level, force=True, handlers=handlers)
    logging.setLogRecordFactory(_record)
    for name in ("httpcore", "httpcore2", "urllib3", "mcp"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mcp.client.sse").setLevel(logging.CRITICAL)  # `McpLink` reports the end of a stream in one line


def log_style() -> tuple[int, str]:
    """Return the level and the style of this process's log: the first arguments of `start_logging` in a child."""
    formatters = [handler.formatter for handler in logging.getLogger().handlers]
    styles = (formatter.style for formatter in formatters if isinstance(formatter, LogFormatter))
    return logging.getLogger("candle_vllm").getEffectiveLevel(), next(styles, "text")


class LogFormatter(logging.Formatter):
    """Formatter of log records in a style of `LOG_STYLES`.

    The name of a child process, if given, is a part of lines of text, and the field `process` in other styles.
    """

    def __init__(self, style: str, process: str | None = None) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {f'{process}: ' if process else ''}%(name)s: %(message)s")
        self.style = style
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        write = LOG_STYLES[self.style].line
        if write is None:
            return super().format(record)
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
        }
        fields = getattr(record, FIELDS, None)
        line |= {"message": cut(record.getMessage())} if fields is None else fields
        if record.exc_info:
            line["exception"] = record.exc_text or self.formatException(record.exc_info)
        return write({name: without_secrets(text) if isinstance(text, str) else text for name, text in line.items()})

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not hasattr(record, FIELDS):  # records with fields are escaped already
            record.message = escaped(cut(record.message))
        return super().formatMessage(record)


def cut(message: str) -> str:
    """Truncate a message: some contain names from a client, a model or an MCP server."""
    more = len(message) - MAX_MESSAGE
    return message if more <= 0 else f"{message[:MAX_MESSAGE]}... ({more} more characters)"


def json_line(fields: Mapping[str, Any]) -> str:
    """Return one JSON object in ASCII; fields with the value None are left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(known, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f")


def escaped(text: str) -> str:
    """Return the text with backslashes and unprintable characters, except spaces, escaped as in Python."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if character == "\\" or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else character
        for character in text
    )


def key_values(fields: Mapping[str, Any]) -> str:
    """Return `name=value name="a value"`, without the values that are None."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items() if value is not None)


def _value(value: Any) -> str:
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) else '"' + escaped(text).replace('"', '\\"') + '"'


class LogStyle(NamedTuple):
    """A style of log lines.

    Attributes:
        help: the style's part of the help of `--log-format`: its name, perhaps with a description.
        line: writes fields as one line, without fields that are None; None if lines are text.
    """

    help: str
    line: Callable[[Mapping[str, Any]], str] | None = None


LOG_STYLES: Mapping[str, LogStyle] = {
    "text": LogStyle("text"),
    "json": LogStyle("json: one object per line", json_line),
}


def _record(*given: Any, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord(*given, **more)
    with contextlib.suppress(Exception):  # the handler reports arguments that do not fit the message
        if (plain := without_secrets(said := record.getMessage())) != said:  # else keep `msg`, which filters match
            record.msg, record.args = plain, ()
    if record.exc_info and record.exc_info[0] is not None:
        record.exc_text = without_secrets(_FORMATTER.formatException(record.exc_info))
    return record


_FORMATTER = logging.Formatter()


class _Short(reprlib.Repr):
    """Short representation of values: texts without their middle; lists and vectors by their beginning and length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = 80
        self.maxother = 300
        self.maxdict = self.maxset = self.maxfrozenset = _MOST

    def repr_tuple(self, x: tuple[Any, ...], level: int) -> str:
        return f"({self._entries(x, level)}{',' * (len(x) == 1)})"

    def repr_list(self, x: list[Any], level: int) -> str:
        return f"[{self._entries(x, level)}]"

    def repr_array(self, x: array[Any], level: int) -> str:
        return f"[{self._entries([float(f'{value:.4g}') for value in x[:_MOST]], level, len(x))}]"

    def repr_instance(self, x: object, level: int) -> str:
        return repr(x.value) if isinstance(x, enum.StrEnum) else super().repr_instance(x, level)

    def _entries(self, values: Sequence[Any], level: int, length: int | None = None) -> str:
        length = len(values) if length is None else length
        most = (2 if values and isinstance(values[0], msgspec.Struct) else _MOST) if level > 0 else 0
        written = [self.repr1(value, level - 1) for value in values[:most]]
        return ", ".join(written if length <= most else [*written, f"... {length} in all"])


_SHORT = _Short()


class ShownStruct(msgspec.Struct, frozen=True):
    """Base of structs whose representation shows the fields that differ from the defaults, except `unshown` ones."""

    unshown: ClassVar[frozenset[str]] = frozenset()

    def __repr__(self) -> str:
        names, defaults = self.__struct_fields__, self.__struct_defaults__
        needed = [msgspec.NODEFAULT] * (len(names) - len(defaults))
        shown: list[str] = []
        for name, default in zip(names, [*needed, *defaults]):
            value = getattr(self, name)
            plain = type(value) is type(default) and value == default
            if name not in self.unshown and not plain:
                shown.append(f"{name}={_SHORT.repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"
