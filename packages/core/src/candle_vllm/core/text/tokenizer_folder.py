# SPDX-License-Identifier: MIT
"""Load a tokenizer from a Hugging Face model folder (loading, before step 3 of a request can run).

The vocabulary and its rules are in tokenizer.json, otherwise in Kimi's tiktoken.model or in qwen.tiktoken of the first
Qwen or GOT-OCR 2.0, otherwise in SentencePiece's tokenizer.model (sentencepiece.py), in BERT's vocab.txt, or in Qwen's
vocab.json and merges.txt. tokenizer_config.json, special_tokens_map.json and added_tokens.json define the special
tokens and the roles of tokens (docs/models.md: which file wins). The chat template is in the first of
chat_template.jinja with additional_chat_templates/, chat_template.json and tokenizer_config.json.
generation_config.json belongs to the model, not to the tokenizer: assembly/model.py reads it.
"""

from __future__ import annotations

import base64
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.gguf_backend import build_backend, byte_level, refusing_panics, set_frame
from candle_vllm.core.text.gguf_vocab import MAX_NAMED_TEMPLATES, USER_DEFINED, GgufVocab
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from candle_vllm.core.text.sentencepiece import read_sentencepiece
from candle_vllm.core.text.special_tokens import CHATML, end_of_turn_ids
from candle_vllm.core.text.token_bytes import BYTE_ALPHABET

logger = logging.getLogger(__name__)

MAX_TOKENIZER_FILE = 256 << 20  # bytes
MAX_SMALL_FILE = 32 << 20
MAX_RANK = 1 << 22
MAX_RANKED_BYTES = 512  # of a token in a tiktoken file; every split of each token is tried
_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))  # of Qwen
_GOT = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")  # of GOT-OCR 2.0
_TIKTOKEN = {"tiktoken.model": "TikTokenTokenizer", "qwen.tiktoken": "QWenTokenizer"}  # files and classes
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BERT = ("BertTokenizer", "DistilBertTokenizer")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def load_folder(folder: Path) -> dict[str, Any]:
    """Read the tokenizer files of `folder` as arguments of `Tokenizer`; errors as `Tokenizer.from_folder`."""
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    backend, known = _load_backend(folder, config)
    if _read_json(folder / "sentence_bert_config.json").get("do_lower_case") is True:  # of sentence-transformers
        own = backend.normalizer
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *(() if own is None else (own,))])
    named, extra = _special_tokens(config, folder)
    _add_tokens(backend, config, [*named.values(), *extra], folder)
    names = known | {name: _content(value) for name, value in named.items()}
    ids = {name: backend.token_to_id(text) for name, text in names.items()}
    _frame(backend, config, names, path)
    return {
        "backend": backend,
        "bos_token_id": ids.get("bos_token"),
        "eos_token_ids": _eos_ids(backend, ids.get("eos_token")),
        "special_tokens": names,
        "chat_template": _chat_template(folder, config),
        "response_template": response if isinstance(response := config.get("response_template"), dict) else None,
        "types_pairs": "token_type_ids" in str(config.get("model_input_names") or "token_type_ids"),
    }


def _load_backend(folder: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """Load the file with the vocabulary; also return texts by name (`bos_token`) of tokenizer.model or vocab.txt."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if file := next((file for file in _TIKTOKEN if (folder / file).is_file()), None):
            return _from_tiktoken(folder / file, config), {}
        if (model := folder / "tokenizer.model").is_file():
            _check_size(model, MAX_TOKENIZER_FILE)
            vocab = read_sentencepiece(model)
            sides = [side for side in ("add_bos", "add_eos") if f"{side}_token" in config]
            frame: dict[str, Any] = {side: config[f"{side}_token"] is True and side[4:] in vocab.ids for side in sides}
            vocab = _renamed(replace(vocab, **frame), _configured_tokens(config, set(), folder))
            backend = build_backend(vocab)
            if config.get("legacy") is False and vocab.add_space_prefix:  # then no space is put behind special tokens
                backend.normalizer = None
                backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            return backend, vocab.named_tokens
        if (folder / "vocab.txt").is_file():
            return _from_words(folder / "vocab.txt", config)
        if config.get("tokenizer_class") == "Qwen2Tokenizer" and (folder / "merges.txt").is_file():
            return _from_merges(folder), {}
        raise UnsupportedModelError(
            f"{folder} has no tokenizer.json: name a folder that has one, or let transformers write it: "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"
        )
    _check_size(path, MAX_TOKENIZER_FILE)
    with refusing_panics(str(path)):
        backend = Backend.from_file(str(path))
    # A file saved during training may enable truncation and padding, which are never used here.
    backend.no_truncation()
    backend.no_padding()
    return backend, {}


def _renamed(vocab: GgufVocab, configured: list[tuple[int, AddedToken]]) -> GgufVocab:
    """Give tokens the texts that other files have for their ids, as InternLM 2 names its unused tokens."""
    tokens, types, numbers = [*vocab.tokens], [*vocab.types], dict(vocab.numbers)
    for index, token in configured:
        if 0 <= index < len(tokens) and token.content not in numbers:
            del numbers[tokens[index]]
            tokens[index], types[index], numbers[token.content] = token.content, USER_DEFINED, index
    return replace(vocab, tokens=tokens, types=types, numbers=numbers)


def _from_tiktoken(path: Path, config: dict[str, Any]) -> Backend:
    """Load a tiktoken file of Kimi K2.5 or of the first Qwen: a line for each token, its bytes in base64 and its rank.

    The adjacent pair that forms the token of lowest rank is merged; so every split of a token into two is a merge.
    Ids after the ranks belong to tokens of tokenizer_config.json, or are reserved in Kimi's file and fixed marks in
    Qwen's. Sources: Kimi's `TikTokenTokenizer`, Qwen's `QWenTokenizer`.
    """
    folder, qwen = path.parent, path.name == "qwen.tiktoken"
    if (kind := config.get("tokenizer_class")) != _TIKTOKEN[path.name]:
        said = f"{folder} has {path.name} and no tokenizer.json, and its tokenizer_class is {kind!r:.80}"
        raise UnsupportedModelError(f"{said}; only {_TIKTOKEN[path.name]} is supported")
    ranks = _read_ranks(path)
    letters = {byte: letter for letter, byte in BYTE_ALPHABET.items()}
    spelt = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    cuts = (
        (spelt[token[:at]], spelt[token[at:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    )
    configured, first = dict(_configured_tokens(config, set(), folder)), max(ranks.values()) + 1
    with refusing_panics(str(path)):
        backend = Backend(
            models.BPE({spelt[token]: rank for token, rank in ranks.items()}, list(cuts), ignore_merges=True)
        )
        byte_level(backend, PRE_TOKENIZERS["qwen2" if qwen else "kimi-k2"])
        if qwen:
            backend.normalizer = normalizers.NFC()
        reserved = (f"<|reserved_token_{index}|>" for index in range(first, first + 256))
        for index, text in enumerate((*_MARKS, *_GOT * _is_got(folder)) if qwen else reserved, first):
            token = configured.get(index, AddedToken(text, special=True, normalized=False))
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != index:
                raise InvalidFileError(f"{folder}: tokenizer_config.json gives token {index} the name of another token")
    return backend


def _is_got(folder: Path) -> bool:
    """Whether a folder is GOT-OCR 2.0's, whose tokenizer has further marks and whose template is its family's."""
    return _read_json(folder / "config.json").get("model_type") == "GOT"


def _from_words(path: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, str]]:
    """Load vocab.txt of older BERTs, as transformers' `BertTokenizer`; also return special tokens by name."""
    if (kind := str(config.get("tokenizer_class") or _BERT[0])).removesuffix("Fast") not in _BERT:
        said = f"{path.parent} has no tokenizer.json, and vocab.txt of {kind!r:.80} is not supported"
        raise UnsupportedModelError(f"{said}: save the tokenizer with transformers, which writes tokenizer.json")
    ids = {token: index for index, token in enumerate((_read_text(path) or "").removesuffix("\n").split("\n"))}
    names = {name: str(_content(config.get(name)) or f"[{name[:-6].upper()}]") for name in _NAMES[2:]}
    if absent := [text for text in names.values() if text not in ids]:
        raise InvalidFileError(f"{path} lacks {', '.join(absent)}")
    first, end, accents = names["cls_token"], names["sep_token"], config.get("strip_accents")
    with refusing_panics(str(path)):
        backend = Backend(models.WordPiece(ids, unk_token=names["unk_token"], max_input_chars_per_word=100))
        backend.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
            strip_accents=accents if isinstance(accents, bool) else None,
            lowercase=config.get("do_lower_case") is not False,
        )
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        backend.post_processor = processors.BertProcessing((end, ids[end]), (first, ids[first]))
        backend.add_special_tokens([*names.values()])
    return backend, names


def _from_merges(folder: Path) -> Backend:
    """Load vocab.json and merges.txt, as transformers' `Qwen2Tokenizer`."""
    lines = (_read_text(folder / "merges.txt") or "").split("\n")
    merges = [
        (left, right) for left, _, right in (line.partition(" ") for line in lines) if right and left != "#version:"
    ]
    with refusing_panics(str(folder / "vocab.json")):
        backend = Backend(models.BPE(_read_json(folder / "vocab.json"), merges))
    byte_level(backend, PRE_TOKENIZERS["qwen2"])
    backend.normalizer = normalizers.NFC()
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read tokens and ranks; check that every byte is a token, and that all tokens and all ranks differ."""
    ranks = dict[bytes, int]()
    for number, line in enumerate((_read_text(path) or "").splitlines(), 1):
        text, _, rank = line.partition(" ")
        try:
            token = base64.b64decode(text, validate=True)
        except ValueError:
            token = b""
        if not (0 < len(token) <= MAX_RANKED_BYTES and rank.isascii() and rank.isdecimal() and len(rank) < 8):
            raise InvalidFileError(f"{path}: line {number} is {line!r:.80}, not a token in base64 and its rank")
        if token in ranks:
            raise InvalidFileError(f"{path}: line {number} has a token that an earlier one has")
        ranks[token] = int(rank)
    if len(set(ranks.values())) < len(ranks) or max(ranks.values(), default=0) >= MAX_RANK:
        raise InvalidFileError(f"{path} has two tokens of one rank, or a rank of {MAX_RANK} and more")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise InvalidFileError(f"{path} must have a token for each byte")
    return ranks


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


def _special_tokens(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return the tokens with a name (`bos_token`, every other key that ends in `_token`), and other special tokens.

    Each is a text or an object with `content`. Which of two files wins is transformers' rule: tokenizer_config.json
    if it has `added_tokens_decoder`, otherwise special_tokens_map.json.
    """
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    files = [(config, paths[0]), (_read_json(paths[1]), paths[1])]
    (values, path), (weaker, shadowed) = files if config.get("added_tokens_decoder") is not None else files[::-1]
    named: dict[str, Any] = {}
    extra: list[Any] = []
    for part, of in ((values, path), (weaker, shadowed)):
        for key in ("extra_special_tokens", "additional_special_tokens"):
            more = part.get(key) or []
            part = {**part, **more, **part} if isinstance(more, dict) else part  # the keys of `part` first
            extra += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        for name in (name for name in part if name.endswith("_token")):
            text = _text(part[name], name, of)
            if text is not None and (found := _text(named.setdefault(name, part[name]), name, path)) != text:
                logger.warning("%s: %s is %r; %s says %r, which is ignored", path, name, found, of.name, text)
    named = {name: named[name] for name in (*_NAMES, *named) if name in named}  # in the order of new ids
    return named, [value for value in extra if _text(value, "", path) is not None]


def _text(value: Any, name: str, path: Path) -> str | None:
    """Return the text of a token under the key `name`; None if `value` is no token."""
    value = _content(value)
    if value is not None and not isinstance(value, str):
        if name in _NAMES:
            raise InvalidFileError(f"{path}: {name} must be a text, not {type(value).__name__}")
        return None
    return value or None


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _add_tokens(backend: Backend, config: dict[str, Any], special: list[Any], folder: Path) -> None:
    """Add the tokens of the other files to those of tokenizer.json, and set the flags of all tokens.

    A token is special if any file says so. A special token that is `_torn` is found before normalisation.
    """
    path = folder / "tokenizer_config.json"
    before = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    configured = _configured_tokens(config, set(map(_content, special)), folder)
    wanted = dict(before)
    for _, token in configured:
        text = token.content
        if text in before and config.get("added_tokens_decoder") is None:
            continue  # tokenizer.json has more flags of a token than added_tokens.json
        wanted[text] = _with(token, special=token.special or (text in before and before[text].special))
    for value in special:
        text = _content(value)
        given = value if isinstance(value, dict) else {"content": text, "normalized": False}
        wanted[text] = _with(wanted.get(text) or _added(given), special=True)
    for text, token in wanted.items():
        if token.special and token.normalized and _torn(backend, text):
            wanted[text] = _with(token, normalized=False)
    changed = [text for text, token in wanted.items() if repr(token) != repr(before.get(text))]
    if differing := [text for text in changed if text in before]:
        said = ", ".join(repr(wanted[text]) for text in differing[:5])
        logger.info("%s: the flags of %d tokens differ from tokenizer.json: %s", folder, len(differing), said)
    with refusing_panics(str(path)):
        backend.add_tokens([wanted[text] for text in changed])
    ids = [(token.content, index, backend.token_to_id(token.content)) for index, token in configured]
    other = [f"{text!r} has the id {found}, not {index}" for text, index, found in ids if found != index]
    if other:
        logger.warning("%s: the vocabulary has other ids of %d tokens: %s", folder, len(other), ", ".join(other[:5]))


def _configured_tokens(config: dict[str, Any], special: set[str], folder: Path) -> list[tuple[int, AddedToken]]:
    """Return ids and tokens of `added_tokens_decoder` in order, or, without that key, those of added_tokens.json."""
    path, entries = folder / "tokenizer_config.json", config.get("added_tokens_decoder")
    if entries is None:
        path, ids = folder / "added_tokens.json", _read_json(folder / "added_tokens.json")
        if not all(text and type(index) is int for text, index in ids.items()):
            raise InvalidFileError(f"{path}: every token must have a text and a number")
        flags = {text: {"special": text in special, "normalized": text not in special} for text in ids}
        return [(ids[text], _added({"content": text, **flags[text]})) for text in sorted(ids, key=ids.__getitem__)]
    if not isinstance(entries, dict):
        raise InvalidFileError(f"{path}: added_tokens_decoder must be an object, not {type(entries).__name__}")
    for index, entry in entries.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not index.isdecimal():
            raise InvalidFileError(f"{path}: added_tokens_decoder[{index!r:.40}] must be an object with content")
    return [(int(index), _added(entries[index])) for index in sorted(entries, key=lambda each: (len(each), each))]


def _added(entry: dict[str, Any]) -> AddedToken:
    return AddedToken(entry["content"], **{flag: entry[flag] is True for flag in _FLAGS if flag in entry})


def _with(token: AddedToken, **flags: bool) -> AddedToken:
    return AddedToken(token.content, **{flag: getattr(token, flag) for flag in _FLAGS} | flags)


def _torn(backend: Backend, text: str) -> bool:
    """Whether a normalised token is not found after a letter: Llama 2's normaliser puts a space before it."""
    rule = backend.normalizer
    return rule is not None and not rule.normalize_str(f"a{text}").endswith(rule.normalize_str(text))


def _frame(backend: Backend, config: dict[str, Any], names: dict[str, str], path: Path) -> None:
    """Change the tokens that tokenizer.json puts around a prompt if add_bos_token or add_eos_token contradicts it.

    A key that is absent, or whose token is unknown, has no effect. True adds the token to a side without tokens; false
    empties a side that has the token. Any other side is unchanged.
    """
    sides = _sides(backend)
    if sides is None:
        return
    changed = False
    for side, name in enumerate(("bos_token", "eos_token")):
        wanted, text = config.get(f"add_{name}"), names.get(name)
        if not isinstance(wanted, bool) or text is None or backend.token_to_id(text) is None:
            continue
        before = sides[side]
        if wanted == (text in before):
            continue
        if before and wanted:
            logger.warning("%s: add_%s is true, which is ignored: tokenizer.json has %s there", path, name, before)
            continue
        sides[side] = [text] if wanted else []
        logger.info("%s: add_%s is %s: tokens around a text are %s and %s, not %s", path, name, wanted, *sides, before)
        changed = True
    if changed:
        before, behind = ([(text, backend.token_to_id(text) or 0) for text in side] for side in sides)
        set_frame(backend, before, behind)


def _sides(backend: Backend) -> list[list[str]] | None:
    """Return the tokens that tokenizer.json puts before and after a text; None if its rule is of another kind."""
    rule = backend.post_processor
    state = None if rule is None else msgspec.json.decode(rule.__getstate__())
    steps = [] if state is None else state.get("processors", [state])
    templates = [step["single"] for step in steps if step["type"] == "TemplateProcessing"]
    if len(templates) > 1 or any(step["type"] not in ("TemplateProcessing", "ByteLevel") for step in steps):
        return None
    pieces = templates[0] if templates else [{"Sequence": {}}]
    places = [place for place, piece in enumerate(pieces) if "Sequence" in piece]
    if len(places) != 1:
        return None
    parts = pieces[: places[0]], pieces[places[0] + 1 :]
    sides: list[list[str]] = [[piece["SpecialToken"]["id"] for piece in part] for part in parts]
    return sides if all(backend.token_to_id(text) is not None for side in sides for text in side) else None


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
    other = config.get("chat_template")
    if not named:
        named = _named_templates(_read_json(folder / "chat_template.json").get("chat_template", other), folder)
    if isinstance(other, str) and named.get("default", other) != other:
        logger.info("%s: tokenizer_config.json has another chat template; the newer file's is used", folder)
    if len(named) > MAX_NAMED_TEMPLATES:
        raise InvalidFileError(f"{folder} has more than {MAX_NAMED_TEMPLATES} chat templates")
    if not named:
        return CHATML if config.get("tokenizer_class") == "QWenTokenizer" and not _is_got(folder) else None
    return named["default"] if list(named) == ["default"] else named


def _named_templates(value: object, folder: Path) -> dict[str, str]:
    """Read a template, or a list of objects with `name` and `template`."""
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
