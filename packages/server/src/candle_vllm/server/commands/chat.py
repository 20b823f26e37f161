# SPDX-License-Identifier: MIT
"""`candle-vllm chat`: a conversation on the terminal.

Each turn enters the life of a request at step 2. Ctrl+C stops the current answer and keeps its text; while a new model
is loading, it restores the previous model.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from candle_vllm.core import InferenceEngine
from candle_vllm.core.engine.outputs import FinishReason
from candle_vllm.core.engine.requests import LoRARequest
from candle_vllm.core.errors import CandleVllmError, PromptTooLongError
from candle_vllm.core.setting_kinds import nearest
from candle_vllm.core.vision.pictures import LIMITS, decode_picture
from candle_vllm.server.commands.interactive import answer_display, keys_unseen, line_reader, sign_of_life
from candle_vllm.server.commands.terminal import Message, answer_pieces, require_stdin, terminal_safe, unfinished
from candle_vllm.server.loop_threads import run_stoppable
from candle_vllm.server.settings.adapters import read_specs
from candle_vllm.server.settings.commands import MAX_TOKENS
from candle_vllm.server.settings.derived import adapter_of, in_flags, load_engine, refuse_missing
from candle_vllm.server.settings.options import SAMPLING, UsageError, convert
from candle_vllm.server.settings.table import OPTIONS, AdapterOptions

if TYPE_CHECKING:
    from candle_vllm.openai import OpenAIAdapter
    from candle_vllm.server.settings.configuration import Configuration

logger = logging.getLogger(__name__)

_MAX_SAVED = 64 << 20  # maximum bytes of a file that /load reads
_ALIASES = {"/reset": "/clear", "/?": "/help", "/bye": "/exit", "/quit": "/exit"}
_SHOWN_TURNS, _SHOWN = 4, 200  # messages that /load shows, and maximum characters of each
_MAX_STOPS, _MAX_STOP = 4, 1024  # maximum number of stop strings, and maximum characters of one
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
Listed = Mapping[str, AdapterOptions]  # settings of models by name
_NO_MODEL = "no model is loaded: /model MODEL loads one"
_SET = {option.name: option for option in (*OPTIONS, MAX_TOKENS) if option.group == SAMPLING or option is MAX_TOKENS}
_OTHER_MODEL: dict[str, Any] = {"lora_modules": ()} | dict.fromkeys(
    ("weight_path", "weight_file", "revision", "tokenizer", "chat_template", "mmproj", "imatrix", "tool_parser",
     "reasoning_parser")
)  # fmt: skip


def chat(configuration: Configuration, system: str | None = None, max_tokens: int | None = None) -> int:
    """Run a conversation as `converse` does; /model takes the names of models.yaml."""
    listed = {name: entry.settings for entry in configuration.catalogue.entries for name in entry.names}
    return converse(configuration.settings, system, max_tokens, listed)


def converse(settings: AdapterOptions, system: str | None, max_tokens: int | None, listed: Listed) -> int:
    """Run a conversation until /exit or the end of input; return 1 if input is no terminal and a line failed, else 0.

    Unless standard input and output are terminals, Ctrl+C between answers also ends it. Arguments are those of `Chat`.
    """
    require_stdin()
    with contextlib.closing(Chat(settings, system, max_tokens, listed)) as talk:
        read = line_reader(Path.home(), list(talk.commands))
        talk.say(f"{talk.name}: /help lists the commands; Ctrl+C stops an answer, Ctrl+D ends the chat")
        while (line := read()) is not None and not talk.ends_with(line):
            with keys_unseen():
                talk.take(line)
    return int(talk.failed and not sys.stdin.isatty())


class _Command(NamedTuple):
    run: Callable[[str], None]
    usage: str
    help: str


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """Format of the files that /save writes."""

    model: str
    messages: list[Message]


class Chat:
    """A conversation, and the model that answers in it. `failed` is True after a line of the input has failed.

    `system` is the system message of every conversation, `max_tokens` limits each answer, and `listed` has the settings
    of the models that /model knows, by name.
    """

    def __init__(self, settings: AdapterOptions, system: str | None, max_tokens: int | None, listed: Listed) -> None:
        self.failed = False
        self._listed = listed
        self._typed: dict[str, Any] = {}  # what /set has set
        self._runner = asyncio.Runner()
        self._settings = settings
        self._engine: InferenceEngine | None = load_engine(settings, max_num_seqs=1)
        self._max_tokens = max_tokens
        self._messages: list[Message] = []
        self._stop: tuple[str, ...] = ()
        self._left_out = 0  # number of earliest messages that no longer fit into the context
        self._images: list[str] = []  # for the next message, as data URLs
        self._own_file: Path | None = None
        self._lora: LoRARequest | None = None
        self._set_system(system or None)
        sets = f"sets a sampling parameter ({', '.join([*_SET, 'stop'])}); the value default resets it"
        self.commands = {
            "/help": _Command(self._help, "", "this list"),
            "/set": _Command(self._set, "[NAME VALUE]", sets),
            "/system": _Command(self._system, "[TEXT]", "the system message from here on; - removes it"),
            "/image": _Command(self._image, "FILE", "an image for the next message; its path alone is enough"),
            "/model": _Command(self._model, "[MODEL [FILE]]", "a model, by its name in models.yaml too, or an adapter"),
            "/save": _Command(self._save, "FILE", "writes the conversation to a file"),
            "/load": _Command(self._load, "FILE", "continues a conversation from a file"),
            "/clear": _Command(self._clear, "", "starts over; /reset is the same"),
            "/regenerate": _Command(self._regenerate, "", "replaces the last answer with a new one"),
            "/exit": _Command(lambda _: None, "", "ends; so do /bye and Ctrl+D"),
        }

    @property
    def name(self) -> str:
        """The name of the model and adapter; UsageError if no model is loaded."""
        if self._engine is None:
            raise UsageError(_NO_MODEL)
        model = self._engine.model_info.name
        return model if self._lora is None else f"{model}:{self._lora.lora_name}"

    def close(self) -> None:
        self._runner.close()
        if self._engine is not None:
            self._engine.close()

    def say(self, text: str) -> None:
        """Print a line that is not part of an answer: to standard error if answers are redirected."""
        stream = sys.stdout if sys.stdout.isatty() else sys.stderr
        stream.write(terminal_safe(text, stream) + "\n")
        stream.flush()

    def ends_with(self, line: str) -> bool:
        """Whether this line ends the conversation. Without a terminal, the words `exit` and `quit` are messages."""
        return _ALIASES.get(line, line) == "/exit" or (line in ("exit", "quit") and sys.stdin.isatty())

    def _fail(self, text: str) -> None:
        self.failed = True
        self.say(text)

    def take(self, line: str) -> None:
        """Process one line of input: a command, or a message for the model."""
        try:
            self._carry_out(line)
        except BrokenPipeError:
            raise  # the output is closed
        except KeyboardInterrupt:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise
            self.say("(stopped)")
        except CandleVllmError as error:
            self._fail(f"error: {in_flags(str(error))}")
        except Exception as error:  # no error may end the conversation
            logger.debug("this input failed", exc_info=True)
            self._fail(f"error: {' '.join(str(error).split()) or 'no reason given'} ({type(error).__name__})")

    def _carry_out(self, line: str) -> None:
        word, *more = line.split(maxsplit=1) or [""]
        if "/" in word[1:] or not line.startswith("/"):  # a path is not a command
            text = line[1:] if line.startswith("//") else line
            if text and not self._is_image(text):
                self._ask(text)
            return
        if (command := self.commands.get(_ALIASES.get(word, word))) is None:
            known = f"{', '.join(self.commands)}; a message that begins with / is written with //"
            raise UsageError(f"unknown command {word}{nearest(word, self.commands)}: the commands are {known}")
        rest = "".join(more).strip()
        if rest and not command.usage:
            raise UsageError(f"{word} takes no argument, but has {rest!r:.60}")
        command.run(rest)

    def _is_image(self, line: str) -> bool:
        """Attach an image if the line is its path, as terminals insert it for dropped files; return whether it is."""
        if self._engine is None or "image" not in self._engine.model_info.modalities:
            return False
        words = line.strip("'\" ").replace("\\ ", " ")
        if not words.lower().endswith(_PICTURES) or not os.path.isfile(os.path.expanduser(words)):
            return False
        self._image(words)
        return True

    def _ask(self, text: str) -> None:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in self._images]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        self._turn([*self._messages, {"role": "user", "content": content}])
        self._images = []

    def _turn(self, messages: list[Message]) -> None:
        """Generate one answer; a message that the engine refuses leaves the conversation unchanged."""
        if self._engine is None:
            raise UsageError(_NO_MODEL)
        shown = any("image_url" in part for message in messages for part in message["content"])  # a part or a character
        if shown and "image" not in self._engine.model_info.modalities:
            raise UsageError(f"{self.name} takes text only, but there are images: /clear starts over without them")
        parts: list[str] = []
        ended = None
        try:
            try:
                ended = self._runner.run(self._answer(self._engine, self._sent(messages), self._max_tokens, parts))
            except PromptTooLongError:
                sent, most = self._fitting(self._engine, messages)
                ended = self._runner.run(self._answer(self._engine, sent, most, parts))
        except KeyboardInterrupt:
            self.say("(stopped)")
        if text := unfinished(ended, "max_tokens, which /set changes, or at the context's end"):
            self.say(f"({text})")
        self._messages = [*messages, {"role": "assistant", "content": "".join(parts)}]

    def _sent(self, messages: list[Message]) -> list[Message]:
        return [*self._start, *messages[len(self._start) + self._left_out :]]

    def _fitting(self, engine: InferenceEngine, messages: list[Message]) -> tuple[list[Message], int | None]:
        """Leave out the oldest messages until `max_tokens`, or a quarter of the context if that is less, are free.

        Returns the messages, and a `max_tokens` that fits; raises UsageError if the last message fills the context.
        """
        context, adapter = engine.model_info.max_model_len, adapter_of(engine, self._settings)
        wanted = min(self._max_tokens or context, max(1, context // 4))
        left_out, last = self._left_out, len(messages) - len(self._start) - 1
        while (length := self._length(adapter, self._sent(messages))) + wanted > context and self._left_out < last:
            self._left_out += 1
            while self._left_out < last and messages[len(self._start) + self._left_out]["role"] != "user":
                self._left_out += 1
        if length >= context:
            self._left_out = left_out
            raise UsageError(
                f"this message, with the system message, fills the context of {context} tokens: shorten it "
                "or the message of /system; /clear starts over, and /set max_tokens says how long an answer may be"
            )
        if self._left_out > left_out:
            self.say(f"(the context is full: the oldest {self._left_out} messages are left out from here on)")
        if self._max_tokens is None or length + self._max_tokens <= context:
            return self._sent(messages), self._max_tokens
        self.say(f"(max_tokens is {context - length} for this answer: the context of {context} has no room for more)")
        return self._sent(messages), context - length

    def _length(self, adapter: OpenAIAdapter, messages: list[Message]) -> int:
        """Return the number of tokens of the prompt, images included; 2^62 if the engine refuses it as too long."""
        from candle_vllm.openai.requests import parse_chat_request, read_chat

        task = read_chat(parse_chat_request({"messages": messages, **self._settings.default_sampling}))
        try:
            return self._runner.run(adapter.count_tokens(lambda: task))
        except PromptTooLongError:
            return 1 << 62

    async def _answer(
        self, engine: InferenceEngine, messages: list[Message], max_tokens: int | None, parts: list[str]
    ) -> FinishReason | None:
        """Print an answer, and append its text without the reasoning to `parts`; return why it ended."""
        first = ended = None
        answer = answer_pieces(engine, messages, self._settings, max_tokens, self._stop, self._uses())
        with contextlib.closing(answer_display()) as display, sign_of_life() as no_more:
            async with contextlib.aclosing(answer) as pieces:
                async for piece in pieces:
                    first = first or time.perf_counter()
                    if piece.text:
                        no_more()
                    ended = piece.ended
                    if not piece.thought:
                        parts.append(piece.text)
                    display.show(piece)
                    if piece.tokens is not None:
                        display.tell_rate(piece.tokens, time.perf_counter() - first)
        return ended

    # ---- commands ----------------------------------------------------------------------------------------------------

    def _help(self, _: str) -> None:
        lines = [(f"{name} {command.usage}".rstrip(), command.help) for name, command in self.commands.items()]
        self.say("\n".join(f"{usage:<24}{text}" for usage, text in lines))
        pasted = "paste them, or " if sys.stdin.isatty() else ""
        self.say(f'Several lines: {pasted}put them between """ and """. // begins a message that begins with /.')

    def _set(self, rest: str) -> None:
        name, *more = rest.split(maxsplit=1) or [""]
        text = "".join(more)
        if not name:
            self.say("\n".join([*(f"{each} {self._value(each)}" for each in _SET), f"stop {self._shown_stop()}"]))
            return
        if name == "stop":
            self._set_stop(text)
            return
        if (option := _SET.get(name)) is None:
            raise UsageError(
                f"/set has no parameter {name}{nearest(name, (*_SET, 'stop'))}: it has {', '.join(_SET)}, stop"
            )
        if not text:
            raise UsageError(f"/set {name} needs a value ({option.help}), or default; it is {self._value(name)}")
        value: Any = None if text == "default" else convert(option.kind, text, name)
        if option is MAX_TOKENS:
            self._max_tokens = value
        else:
            self._typed[name] = value
            self._settings = dataclasses.replace(self._settings, **self._typed)
        self.say(f"{name} is {self._value(name)}")

    def _set_stop(self, text: str) -> None:
        if not text:
            raise UsageError(f"/set stop needs a text that ends the answer, or default; it is {self._shown_stop()}")
        wanted = f"/set stop takes 1 to {_MAX_STOPS} texts"
        stop = () if text == "default" else tuple(_words(text, _MAX_STOPS, wanted))
        if not all(0 < len(each) <= _MAX_STOP for each in stop):
            raise UsageError(f"{wanted} of 1 to {_MAX_STOP} characters")
        self._stop = stop
        self.say(f"stop is {self._shown_stop()}")

    def _shown_stop(self) -> str:
        return shlex.join(self._stop) or "default"

    def _value(self, name: str) -> Any:
        value = self._max_tokens if name == MAX_TOKENS.name else getattr(self._settings, name)
        return "default" if value is None else value

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system(None if rest == "-" else rest)
        self.say(f"the system message is: {self._start[0]['content']}" if self._start else "there is no system message")

    def _set_system(self, text: str | None) -> None:
        turns = [message for message in self._messages if message["role"] != "system"]
        self._start: list[Message] = [{"role": "system", "content": text}] if text is not None else []
        self._messages = [*self._start, *turns]

    def _model(self, rest: str) -> None:
        """Switch adapter or model. The old model is unloaded first, as both may not fit, and restored on a failure."""
        if not rest:
            self.say(self.name)
            return
        if self._choose_adapter(rest):
            self.say(f"{self.name} answers from here on")
            return
        if (listed := self._listed.get(rest)) is not None:
            settings = dataclasses.replace(listed, **self._typed)
        else:
            whole = os.path.expanduser(rest)  # a path may contain spaces
            model, *file = [whole] if os.path.exists(whole) else _words(rest, 2, "/model takes MODEL and FILE")
            if not model:
                raise UsageError("/model takes a model: an id, a folder, a .gguf file or a name of models.yaml")
            model = os.path.expanduser(model)
            other: dict[str, Any] = {**_OTHER_MODEL, "model": model, "weight_file": file[0] if file else None}
            settings = dataclasses.replace(self._settings, **other)
        refuse_missing(settings)
        if (failure := self._bring(settings)) is None:
            self._settings, self._lora, self._left_out = settings, None, 0
            self.say(f"{self.name} answers from here on")
            return
        self._fail(f"{failure}; going back to the model before")
        if (failure := self._bring(self._settings)) is not None:
            self._fail(f"{failure}; {_NO_MODEL}")

    def _choose_adapter(self, name: str) -> bool:
        """Select an adapter of --lora-modules, or deselect it by the model's name; return whether either was done."""
        if self._engine is None:
            return False
        if self._lora is not None and name == self._engine.model_info.name:
            self._lora = None
            return True
        for spec in read_specs(self._settings.lora_modules):
            if spec.name == name:
                wanted = LoRARequest(name, lora_path=spec.path)
                self._engine.add_lora(wanted)
                self._lora = wanted
                return True
        return False

    def _uses(self) -> list[tuple[LoRARequest, float]]:
        """Return the chosen adapter with scale 1, or else the adapters of `lora_modules` that have a scale."""
        if self._lora is not None:
            return [(self._lora, 1.0)]
        specs = read_specs(self._settings.lora_modules)
        return [(LoRARequest(spec.name, lora_path=spec.path), spec.scale) for spec in specs if spec.scale]

    def _bring(self, settings: AdapterOptions) -> str | None:
        """Replace the current model; return the error if no model is loaded afterwards."""
        old, self._engine = self._engine, None

        def load() -> InferenceEngine:
            if old is not None:
                old.close()
            return load_engine(settings, max_num_seqs=1)

        try:
            self._engine = run_stoppable(self._runner, load, "load", InferenceEngine.close)
        except Exception as error:  # whatever it is, the model before must come back
            logger.debug("the model cannot be loaded", exc_info=True)
            return f"error: {str(error) or ('the memory ran out' if isinstance(error, MemoryError) else repr(error))}"
        except KeyboardInterrupt:
            return "(stopped)"
        return None

    def _image(self, rest: str) -> None:
        path = _path(rest, "/image")
        if self._engine is None:
            raise UsageError(_NO_MODEL)
        if "image" not in self._engine.model_info.modalities:
            raise UsageError(f"{self.name} takes text only")
        data = _read(path, LIMITS.max_image_bytes + 1)
        picture = decode_picture(data, name=str(path))
        self._images.append(f"data:;base64,{base64.b64encode(data).decode()}")
        self.say(f"({path.name}, {picture.width} x {picture.height}: it is sent with the next message)")

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        data = msgspec.json.format(msgspec.json.encode(_Saved(self.name, self._messages)), indent=1)
        if path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it")
        mode = os.O_TRUNC if path == self._own_file else os.O_EXCL  # overwrite only this conversation's file
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | mode, 0o600), "wb") as file:
                file.write(data + b"\n")
        except FileExistsError:
            raise UsageError(f"{path} exists and is not replaced: name another file, or /load it first") from None
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from None
        self._own_file = path
        self.say(f"{len(self._messages)} messages are in {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        self._messages, self._left_out = read_saved(path), 0
        self._start = [message for message in self._messages[:1] if message["role"] == "system"]
        self._own_file = path
        for message in self._messages[len(self._start) :][-_SHOWN_TURNS:]:
            text = " ".join(_text_of(message["content"]).split())
            self.say(f"{message['role']}: {text[:_SHOWN]}{' ...' * (len(text) > _SHOWN)}")
        self.say(f"{len(self._messages)} messages of {path}")

    def _clear(self, _: str) -> None:
        self._messages = list(self._start)
        self._left_out, self._images, self._own_file = 0, [], None
        self.say("(new conversation)")

    def _regenerate(self, _: str) -> None:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer yet: write something first")
        self._turn(self._messages[:-1])


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part.get("type") == "text" else "(image)" for part in content)


def read_saved(path: Path) -> list[Message]:
    """Read the messages of a file that /save wrote; UsageError if it is unreadable, or has another format."""
    data = _read(path, _MAX_SAVED + 1)
    if len(data) > _MAX_SAVED:
        raise UsageError(f"{path} is larger than {_MAX_SAVED >> 20} MB")
    try:
        messages = msgspec.json.decode(data, type=_Saved).messages
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not a conversation that /save wrote: {error}") from None
    for number, message in enumerate(messages, 1):
        roles = ("user", "assistant") if number > 1 else ("system", "user", "assistant")
        if message.keys() != {"role", "content"} or message["role"] not in roles:
            raise UsageError(f"{path}: message {number} must have content, and a role of {', '.join(roles)}")
        if not isinstance(message["content"], str) and not _are_parts(message["content"]):
            raise UsageError(f"{path}: message {number} must have a text as its content, or texts and images")
    return messages


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _are_parts(content: Any) -> bool:
    """Whether the content of a message is a list of text and image parts, as in `Chat`."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and (isinstance(part.get("text"), str) if part.get("type") == "text" else part.get("type") == "image_url")
        for part in content
    )


def _path(text: str, command: str) -> Path:
    """Parse a path as a user types it: with or without quotes, and with its spaces."""
    path = _words(text, 1, f"{command} takes one file")[0] if text[:1] in ("'", '"') else text
    if not path:
        raise UsageError(f"{command} needs the name of a file")
    return Path(os.path.expanduser(path))


def _words(text: str, most: int, wanted: str) -> list[str]:
    """Split a text as a shell does, [""] if it is empty; UsageError for wrong quoting or over `most` words."""
    try:
        words = shlex.split(text)
    except ValueError:
        raise UsageError(f"{wanted}: a quotation mark is not closed, or a backslash is the last character") from None
    if len(words) > most:
        raise UsageError(f"{wanted}: put a name with blanks between quotation marks")
    return words or [""]
