# SPDX-License-Identifier: MIT
"""Read and check the vocabulary of a GGUF file.

The file is not trusted: the type and length of every value, and the range of ids, are checked here for later code.
Source: the GGUF specification, section "Tokenizer" (keys), and llama.cpp (defaults).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter, methodcaller
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.infill import GGUF_NAMES as INFILL_NAMES
from candle_vllm.core.text.pretokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from candle_vllm.core.text.special_tokens import TEMPLATE_NAMES

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."
MAX_TOKENS = 1 << 22
MAX_MERGES = 1 << 23
MAX_TOKEN_LENGTH = 1 << 16  # characters
MAX_CHARSMAP = 1 << 26  # bytes
MAX_NAMED_TEMPLATES = 64

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SUPPORTED_MODELS = ("gpt2", "llama", "bert", "t5", "gemma4")

# Default ids of each kind of tokenizer.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "bert": {"bos": 101, "seperator": 102, "unknown": 100, "padding": 0, "mask": 103},
    "t5": {"eos": 1, "unknown": 2, "padding": 0},
    "gpt2": {},
    "gemma4": {},
}
# "seperator" is the spelling of the specification.
_ID_NAMES = (
    *("bos", "eos", "unknown", "padding", "seperator", "mask", "cls", "eot", "eom", "fim_pad", "fim_rep", "fim_sep"),
    *INFILL_NAMES,
)


@dataclass(frozen=True, eq=False)
class GgufVocab:
    """Vocabulary of a GGUF file, with consistent parts.

    Attributes:
        model: kind of tokenizer, one of SUPPORTED_MODELS.
        tokens: the texts of all ids, all different and not empty.
        numbers: the id of each text.
        types: the token type of each id.
        scores: log-probability per id; empty for a file without scores.
        merges: pairs of texts in order of priority; `build_backend` checks them if the tokenizers library fails.
        ids: special token ids by name ("bos", "eos", "unknown", ...).
        pre: pre-tokenizer of gpt2 and gemma4; `DEFAULT` otherwise.
        add_bos, add_eos: add BOS before a prompt, EOS after it.
        add_space_prefix: add a space before a text.
        charsmap: precompiled normalisation of SentencePiece, or empty.
        general_name: `general.name` in lower case, by which `gguf_backend` recognises Phi-3.
    """

    model: str
    tokens: list[str]
    numbers: dict[str, int]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[tuple[str, str]] = field(default_factory=list)
    ids: Mapping[str, int] = field(default_factory=dict)
    pre: PreTokenizer = DEFAULT
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    remove_extra_whitespaces: bool = False
    lowercase: bool = True
    strip_accents: bool = True
    charsmap: bytes = b""
    general_name: str = ""

    @property
    def named_tokens(self) -> dict[str, str]:
        """Texts of special tokens by their names in templates, such as `bos_token`."""
        return {TEMPLATE_NAMES[name]: self.tokens[i] for name, i in self.ids.items() if name in TEMPLATE_NAMES}


def read_gguf_vocab(metadata: Mapping[str, object]) -> GgufVocab:
    """Check the tokenizer keys of a GGUF file's metadata.

    Raises:
        InvalidFileError: a key is missing, has the wrong type, or contradicts another; the message names it.
        UnsupportedModelError: the kind of tokenizer is not implemented.
    """
    reader = _Reader(metadata)
    model = reader.text("model")
    if model is None:
        raise InvalidFileError(f"the GGUF metadata has no {PREFIX}model: the file has no tokenizer")
    if model not in SUPPORTED_MODELS:
        supported = ", ".join(SUPPORTED_MODELS)
        raise UnsupportedModelError(f"{PREFIX}model {model!r:.80} is not implemented; supported are {supported}")
    numbers = _read_tokens(reader)
    tokens = list(numbers)
    pre = _read_pre(reader, model)
    ids = _read_ids(reader, model, len(tokens))
    lowercase = reader.flag("normalizer.lowercase", True)
    spm_like = model in ("llama", "t5")
    add_bos = reader.flag("add_bos_token", pre.add_bos or model in ("llama", "bert"))
    return GgufVocab(
        model=model,
        tokens=tokens,
        numbers=numbers,
        types=_read_types(reader, len(tokens)),
        scores=_read_scores(reader, len(tokens), required=spm_like),
        merges=_read_merges(reader) if model in ("gpt2", "gemma4") else [],
        ids=ids,
        pre=pre,
        # Some Gemma 4 files disable BOS by mistake; the model does not work without it.
        add_bos=(add_bos or pre is PRE_TOKENIZERS["gemma4"]) and "bos" in ids,
        add_eos=reader.flag("add_eos_token", model in ("t5", "bert")) and "eos" in ids,
        add_space_prefix=reader.flag("add_space_prefix", spm_like),
        remove_extra_whitespaces=reader.flag("remove_extra_whitespaces", False),
        lowercase=lowercase,
        strip_accents=reader.flag("normalizer.strip_accents", lowercase),
        charsmap=_read_charsmap(reader),
        general_name=str(metadata.get("general.name", ""))[:200].lower(),
    )


class _Reader:
    """Typed access to the metadata; converts numpy scalars and arrays to Python values."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata

    def _get(self, key: str) -> Any:
        value: Any = self._metadata.get(PREFIX + key)
        return value.tolist() if hasattr(value, "tolist") else value

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise _wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(key, "a boolean", value)
        return value

    def index(self, key: str, size: int) -> int | None:
        value = self._get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(key, "an integer", value)
        # Some writers store -1 for a missing token, in an unsigned field.
        if value in (-1, (1 << 32) - 1):
            return None
        if not 0 <= value < size:
            logger.warning(
                "%s%s is %d, which is ignored: the vocabulary has the ids 0 to %d", PREFIX, key, value, size - 1
            )
            return None
        return value

    def array(self, key: str, most: int) -> list[Any] | None:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise _wrong(key, "an array", value)
        if len(value) > most:
            raise InvalidFileError(f"{PREFIX}{key} has {len(value)} entries; at most {most} are allowed")
        return list(value)

    def raw(self, key: str) -> Any:
        return self._metadata.get(PREFIX + key)


def _wrong(key: str, expected: str, value: object) -> InvalidFileError:
    return InvalidFileError(f"{PREFIX}{key} must be {expected}, not {type(value).__name__}")


def _texts(key: str, values: list[Any]) -> None:
    if not set(map(type, values)) <= {str} or max(map(len, values), default=0) > MAX_TOKEN_LENGTH:
        _name_wrong_text(key, values)
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise InvalidFileError(f"{PREFIX}{key} has a string that is not valid UTF-8") from None


def _name_wrong_text(key: str, values: list[Any]) -> None:
    """Raise the error that names the invalid text; this loop is too slow for valid vocabularies."""
    for index, value in enumerate(values):
        if type(value) is not str:
            raise InvalidFileError(f"{PREFIX}{key}[{index}] must be a string, not {type(value).__name__}")
        if len(value) > MAX_TOKEN_LENGTH:
            raise InvalidFileError(f"{PREFIX}{key}[{index}] has {len(value)} characters, above {MAX_TOKEN_LENGTH}")


def _read_tokens(reader: _Reader) -> dict[str, int]:
    tokens = reader.array("tokens", MAX_TOKENS)
    if not tokens:
        raise InvalidFileError(f"{PREFIX}tokens is missing or empty: the file has no vocabulary")
    _texts("tokens", tokens)
    if "" in tokens:
        tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    numbers = dict(zip(tokens, range(len(tokens))))
    if len(numbers) != len(tokens):
        seen: set[str] = set()
        twice = next(index for index, token in enumerate(tokens) if token in seen or seen.add(token))
        raise InvalidFileError(f"{PREFIX}tokens has {tokens[twice]!r:.80} twice, the second time at index {twice}")
    return numbers


def _read_types(reader: _Reader, size: int) -> list[int]:
    types = reader.array("token_type", MAX_TOKENS)
    if types is None:
        return [NORMAL] * size
    if len(types) != size:
        raise InvalidFileError(f"{PREFIX}token_type has {len(types)} entries for {size} tokens")
    if not set(map(type, types)) <= {int}:
        index, value = next((index, value) for index, value in enumerate(types) if type(value) is not int)
        raise InvalidFileError(f"{PREFIX}token_type[{index}] must be an integer, not {type(value).__name__}")
    return types


def _read_scores(reader: _Reader, size: int, *, required: bool) -> list[float]:
    scores = reader.array("scores", MAX_TOKENS)
    if scores is None:
        if required:
            raise InvalidFileError(f"{PREFIX}scores is missing; this kind of tokenizer cannot work without it")
        return []
    if len(scores) != size:
        raise InvalidFileError(f"{PREFIX}scores has {len(scores)} entries for {size} tokens")
    for index, value in enumerate(scores):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InvalidFileError(f"{PREFIX}scores[{index}] must be a finite number, not {value!r:.60}")
    return [float(value) for value in scores]


def _read_merges(reader: _Reader) -> list[tuple[str, str]]:
    lines = reader.array("merges", MAX_MERGES)
    if lines is None:
        raise InvalidFileError(f"{PREFIX}merges is missing; a byte-pair tokenizer cannot work without it")
    _texts("merges", lines)
    pairs = [(left, right) for left, _, right in map(methodcaller("partition", " "), lines)]  # fast: 520,000 merges
    if not all(map(itemgetter(0), pairs)):  # the first part of a merge begins with a space
        pairs = [pair if line[:1] != " " else _halves(line) for pair, line in zip(pairs, lines)]
    return pairs


def _halves(line: str) -> tuple[str, str]:
    """Split a merge whose first part begins with a space."""
    left, _, right = line[1:].partition(" ")
    return " " + left, right


def check_merges(vocab: GgufVocab) -> None:
    """Raise the error for the first invalid merge. Slow; call it only if the tokenizers library refused the vocabulary.

    Raises InvalidFileError if a merge is not two tokens whose concatenation is a token.
    """
    for index, (left, right) in enumerate(vocab.merges):
        if not right:
            line = f"{left} {right}".rstrip()
            raise InvalidFileError(f"{PREFIX}merges[{index}] is {line!r:.80}; a space must separate two tokens")
        if not all(text in vocab.numbers for text in (left, right, left + right)):
            line = f"{left} {right}"
            raise InvalidFileError(f"{PREFIX}merges[{index}] is {line!r:.80}; its parts and both joined must be tokens")


def _read_pre(reader: _Reader, model: str) -> PreTokenizer:
    name = reader.text("pre")
    if model == "gemma4":
        return PRE_TOKENIZERS["gemma4"]
    if model != "gpt2":
        return DEFAULT
    if name is None or name not in PRE_TOKENIZERS:
        shown = "missing" if name is None else f"{name!r:.80}, which is unknown"
        logger.warning("%spre is %s: the default is used, so output may be worse than the model's", PREFIX, shown)
        return DEFAULT
    return PRE_TOKENIZERS[name]


def _read_ids(reader: _Reader, model: str, size: int) -> dict[str, int]:
    ids = {name: value for name, value in _DEFAULT_IDS[model].items() if value < size}
    for name in _ID_NAMES:
        value = reader.index(f"{name}_token_id", size)
        if value is not None:
            ids[name] = value
    if model == "bert":
        ids["bos"] = ids.get("cls", ids.get("bos", 0))
        ids["eos"] = ids.get("seperator", ids.get("eos", 0))
    return ids


def _read_charsmap(reader: _Reader) -> bytes:
    value = reader.raw("precompiled_charsmap")
    if value is None:
        return b""
    if not isinstance(value, (bytes, bytearray)):
        entries = reader.array("precompiled_charsmap", MAX_CHARSMAP) or []
        try:
            value = bytes(entry & 0xFF for entry in entries)
        except TypeError:
            raise _wrong("precompiled_charsmap", "an array of bytes", value) from None
    if len(value) > MAX_CHARSMAP:
        raise InvalidFileError(f"{PREFIX}precompiled_charsmap has {len(value)} bytes; at most {MAX_CHARSMAP} allowed")
    # Little-endian size of the trie, the trie, then the replacement texts.
    size = int.from_bytes(value[:4], "little")
    if value and (len(value) < 4 or size % 4 or size + 4 >= len(value)):
        raise InvalidFileError(f"{PREFIX}precompiled_charsmap gives its trie {size} bytes, and has {len(value)} in all")
    return bytes(value)
