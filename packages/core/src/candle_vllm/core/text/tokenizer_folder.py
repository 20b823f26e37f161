# SPDX-License-Identifier: MIT
"""A tokenizer from a Hugging Face model folder (loading, before step 3 of a request can run).

tokenizer.json holds the vocabulary and its rules; tokenizer_config.json and special_tokens_map.json say which tokens
play which part; the chat template stands in one of four places, the newest first: chat_template.jinja with
additional_chat_templates/, chat_template.json, tokenizer_config.json. generation_config.json belongs to the model, not
to the tokenizer: loading/model.py reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.gguf_backend import refusing_panics, set_frame
from candle_vllm.core.text.special_tokens import end_of_turn_ids

MAX_TOKENIZER_FILE = 256 << 20  # bytes
MAX_SMALL_FILE = 32 << 20
MAX_NAMED_TEMPLATES = 64
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass
class FolderParts:
    """What a folder says about its tokenizer; see `Tokenizer` for the fields."""

    backend: Backend
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    response_template: dict[str, Any] | None = None


def load_folder(folder: Path) -> FolderParts:
    """Reads the tokenizer files of `folder`; errors as `Tokenizer.from_folder`."""
    backend = _load_backend(folder)
    config = _read_json(folder / "tokenizer_config.json")
    names = {**_token_names(folder / "special_tokens_map.json"), **_token_names(folder / "tokenizer_config.json")}
    _add_configured_tokens(backend, config, names, folder / "tokenizer_config.json")
    ids = {name: backend.token_to_id(text) for name, text in names.items()}
    _frame(backend, config, names)
    return FolderParts(
        backend=backend,
        bos_token_id=ids.get("bos_token"),
        eos_token_ids=_eos_ids(backend, ids.get("eos_token")),
        special_tokens=names,
        chat_template=_chat_template(folder, config),
        response_template=_response_template(config),
    )


def _response_template(config: dict[str, Any]) -> dict[str, Any] | None:
    value = config.get("response_template")
    return value if isinstance(value, dict) else None


def _load_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UnsupportedModelError(
                f"{folder} has tokenizer.model (SentencePiece) and no tokenizer.json; convert it once with "
                "transformers (AutoTokenizer.from_pretrained(folder).save_pretrained(folder)), or use a GGUF file"
            )
        raise UnsupportedModelError(
            f"{folder} has no tokenizer.json; download it from the model's page, or name a folder that has one"
        )
    _check_size(path, MAX_TOKENIZER_FILE)
    with refusing_panics(str(path)):
        backend = Backend.from_file(str(path))
    # A file saved in the middle of training may ask for both; a prompt is never cut or filled up here.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_size(path: Path, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise InvalidFileError(f"{path} has {size} bytes; at most {most} are read")


def _read_text(path: Path) -> str | None:
    if not path.is_file():
        return None
    _check_size(path, MAX_SMALL_FILE)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidFileError(f"{path} is not UTF-8: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if text is None:
        return {}
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidFileError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidFileError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _token_names(path: Path) -> dict[str, str]:
    """bos_token and its kind; each is a text or an object with `content`."""
    names = {}
    config = _read_json(path)
    for name in _NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str):
            raise InvalidFileError(f"{path}: {name} must be a text, not {type(value).__name__}")
        names[name] = value
    return names


def _add_configured_tokens(backend: Backend, config: dict[str, Any], names: dict[str, str], path: Path) -> None:
    """Tokens that only tokenizer_config.json knows are part of the vocabulary too."""
    extra = config.get("added_tokens_decoder") or {}
    if not isinstance(extra, dict):
        raise InvalidFileError(f"{path}: added_tokens_decoder must be an object, not {type(extra).__name__}")
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    known = backend.get_added_tokens_decoder()
    tokens = []
    for index, entry in sorted(extra.items(), key=lambda item: (len(item[0]), item[0])):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not index.isdecimal():
            raise InvalidFileError(f"{path}: added_tokens_decoder[{index!r:.40}] must be an object with content")
        if int(index) not in known:
            tokens.append(
                AddedToken(entry["content"], **{flag: entry[flag] is True for flag in flags if flag in entry})
            )
    named = [AddedToken(text, normalized=False, special=True) for text in names.values()]
    missing = [token for token in named if backend.token_to_id(token.content) is None]
    with refusing_panics(str(path)):
        backend.add_tokens(tokens)
        backend.add_special_tokens(missing)


def _frame(backend: Backend, config: dict[str, Any], names: dict[str, str]) -> None:
    """add_bos_token and add_eos_token, where the folder says either; as transformers does, they replace the rule."""
    if not isinstance(config.get("add_bos_token"), bool) and not isinstance(config.get("add_eos_token"), bool):
        return
    around = []
    for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        index = backend.token_to_id(names[name]) if config.get(flag) and name in names else None
        around.append([] if index is None else [(names[name], index)])
    set_frame(backend, *around)


def _eos_ids(backend: Backend, eos: int | None) -> list[int]:
    named = [] if eos is None else [eos]
    special = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return [*named, *sorted(end_of_turn_ids(special))]


def _chat_template(folder: Path, config: dict[str, Any]) -> str | dict[str, str] | None:
    default = _read_text(folder / "chat_template.jinja")
    named = {} if default is None else {"default": default}
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        for path in sorted(extra.glob("*.jinja"))[: MAX_NAMED_TEMPLATES + 1]:
            named[path.stem] = _read_text(path) or ""
    if not named:
        value = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
        named = _named_templates(value, folder)
    if len(named) > MAX_NAMED_TEMPLATES:
        raise InvalidFileError(f"{folder} has more than {MAX_NAMED_TEMPLATES} chat templates")
    if not named:
        return None
    return named["default"] if list(named) == ["default"] else named


def _named_templates(value: object, folder: Path) -> dict[str, str]:
    """A template, or a list of objects with `name` and `template`."""
    if value is None:
        return {}
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise InvalidFileError(f"{folder}: chat_template must be a text or a list, not {type(value).__name__}")
    named = {}
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise InvalidFileError(f"{folder}: each entry of chat_template must have a name and a template")
        named[name] = template
    return named
