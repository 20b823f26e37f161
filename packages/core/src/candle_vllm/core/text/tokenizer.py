# SPDX-License-Identifier: MIT
"""Tokenizer: text to token ids and back (step 3 of a request; the detokenizer of step 9 uses its token bytes)."""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import InvalidFileError, InvalidParameterError
from candle_vllm.core.text.gguf_backend import build_backend, ids_by_text, refusing_panics
from candle_vllm.core.text.gguf_vocab import MAX_NAMED_TEMPLATES, GgufVocab, read_gguf_vocab
from candle_vllm.core.text.infill import InfillMarks, infill_marks
from candle_vllm.core.text.special_tokens import CHATML, end_of_file_ids, end_of_turn_ids
from candle_vllm.core.text.token_bytes import byte_rule

utf8_decoder = codecs.getincrementaldecoder("utf-8")

ChatTemplateSource = str | dict[str, str]
_CHAT_TEMPLATE = "tokenizer.chat_template"
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_/]+\]")


class Tokenizer:
    """Tokenizer of a model; made by `from_folder` or `from_gguf`, and safe to share between threads.

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
        vocab_size: one more than the highest token id, or more after `cover`.
        bos_token_id: the token that begins a text, or None.
        eos_token_ids: the tokens that end a turn or a file, the vocabulary's own end-of-sequence token first.
        special_tokens: texts of special tokens by their names in templates: `bos_token`, `eos_token` and others.
        chat_template: the template in the tokenizer's files, a dict of templates by name, or None.
        response_template: `response_template` of tokenizer_config.json: how a model formats its answers; or None.
        strips_leading_space: a text begins without the space of its first token (SentencePiece, WordPiece).
        longest_token: number of characters in the longest entry of the vocabulary.
        infill: the marks for fill-in-the-middle, or None.
        suppressed_token_ids: tokens that are never sampled, by the model's generation config.

    Args:
        backend, bos_token_id, eos_token_ids, special_tokens, chat_template, response_template: see above.
        types_pairs: whether the second text of a pair has another token_type_id than the first.
        named_ids: a GGUF file's special token ids by name, such as `fim_pre`; used to find infill marks.
        tokens: every token's text and id, if the caller has them: reading them from `backend` is slow.
    """

    suppressed_token_ids: tuple[int, ...] = ()

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplateSource | None = None,
        response_template: Mapping[str, Any] | None = None,
        types_pairs: bool = True,
        named_ids: Mapping[str, int] | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        self.backend, self.types_pairs, self.named_ids = backend, types_pairs, dict(named_ids or {})
        added, tokens = backend.get_added_tokens_decoder(), backend.get_vocab() if tokens is None else tokens
        self.vocab_size: int = 1 + max(tokens.values(), default=-1)  # not the number of tokens: ids may be skipped
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.special_tokens: dict[str, str] = dict(special_tokens or {})
        self.chat_template = chat_template
        self.response_template = response_template
        self._special = frozenset(index for index, token in added.items() if token.special)
        self.mark_ids = {  # added tokens in brackets that are part of the text, such as `<tool_call>` of Qwen 2.5
            token.content: index
            for index, token in added.items()
            if not token.special and _MARK.fullmatch(token.content)
        }
        rule = byte_rule(backend)
        self._literals = {i: token.content for i, token in added.items() if token.special or not rule.spells_added}
        self.strips_leading_space: bool = rule.strips_leading_space
        self._convert = rule.convert
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        self.plain_texts: dict[int, str] = {}  # cache of `plain_text`
        self.longest_token = max(map(len, tokens), default=1)
        self.infill: InfillMarks | None = infill_marks(tokens.get, self.named_ids)
        self._literal: Backend | None = None
        self._literal_lock = threading.Lock()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a model folder; see `tokenizer_folder` for the files.

        Raises:
            UnsupportedModelError: the folder has no tokenizer file, or the file has unsupported parts.
            InvalidFileError: a file is damaged.
        """
        from candle_vllm.core.text.tokenizer_folder import load_folder

        return cls(**load_folder(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Load the tokenizer in a GGUF file's metadata (key -> value; arrays as lists or numpy arrays).

        Raises:
            InvalidFileError: a key is missing, wrong or contradicts another.
            UnsupportedModelError: this kind of tokenizer is not implemented.
        """
        vocab = read_gguf_vocab(metadata)
        return cls(
            build_backend(vocab),
            bos_token_id=vocab.ids.get("bos"),
            eos_token_ids=_gguf_eos_ids(vocab),
            special_tokens=vocab.named_tokens,
            chat_template=_gguf_chat_template(metadata, vocab.tokens[vocab.ids["bos"]] if vocab.add_bos else None),
            named_ids=vocab.ids,
            tokens=vocab.numbers,
        )

    def cover(self, num_ids: int) -> None:
        """Extend the vocabulary to all ids below `num_ids`; new ids have no text.

        Models often have more rows in their embedding table than their tokenizer has tokens.
        """
        self._bytes += [None] * (num_ids - self.vocab_size)
        self.vocab_size = max(self.vocab_size, num_ids)

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]:
        """Tokenize `text`.

        Args:
            text: any text that UTF-8 can encode.
            add_special_tokens: add BOS and EOS if the model uses them; rendered chat templates already contain them.
            parse_special: the text of a special token in `text` becomes that token rather than plain text.

        Raises:
            InvalidParameterError: the text is not a string, or has half a surrogate pair.
            InvalidFileError: the vocabulary lacks a token that this text needs.
        """
        return self.encode_batch([text], add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, *, parse_special: bool = True
    ) -> list[list[int]]:
        """Tokenize each text, as `encode`."""
        for text in texts:
            _check_text(text)
        backend = self.backend if parse_special else self._literal_backend()
        with refusing_panics("the model's vocabulary"):
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encoded]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Tokenize two texts as one input with the model's separators; also return each token's token_type_id.

        Errors as `encode`.
        """
        _check_text(first)
        _check_text(second)
        with refusing_panics("the model's vocabulary"):
            encoding = self.backend.encode(first, second)
        return encoding.ids, encoding.type_ids if self.types_pairs else [0] * len(encoding.ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, *, whole: bool = True) -> str:
        """Decode the token ids of a text from its beginning; invalid UTF-8 becomes U+FFFD.

        Args:
            skip_special_tokens: leave special tokens out.
            whole: no token follows; otherwise an incomplete character at the end is left out.

        Raises:
            InvalidParameterError: an id is outside the vocabulary.
        """
        pieces = [self.token_bytes(index) for index in ids if not (skip_special_tokens and index in self._special)]
        data = b"".join(pieces)
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return utf8_decoder("replace").decode(data, whole)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token adds to a text; for a special token, the bytes of its name.

        Raises InvalidParameterError if the id is outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise InvalidParameterError(f"there is no token {token_id}; ids run from 0 to {self.vocab_size - 1}")
        data = self._bytes[token_id]
        if data is None:
            data = self._bytes[token_id] = self._make_bytes(token_id)
        return data

    def plain_text(self, token_id: int) -> str | None:
        """Return the text of one token; None for special tokens and for parts of characters.

        Raises InvalidParameterError if the id is outside the vocabulary.
        """
        text = self.plain_texts.get(token_id)
        if text is None and token_id not in self._special:
            try:
                text = self.plain_texts[token_id] = self.token_bytes(token_id).decode()
            except UnicodeDecodeError:
                return None
        return text

    def token_name(self, token_id: int) -> str:
        """Return the token's entry in the vocabulary, such as "Ġthe" or "<0x0A>"; "" for an id without a token."""
        return self._literals.get(token_id) or self.backend.id_to_token(token_id) or ""

    def token_text(self, token_id: int) -> str:
        """Decode one token alone; an incomplete character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def special_token_ids(self) -> dict[str, int]:
        """Ids, by name, of the tokens that structure the text and are not part of it."""
        return {self._literals[index]: index for index in sorted(self._special)}

    def is_special(self, token_id: int) -> bool:
        """Whether a token structures the text and is not part of it."""
        return token_id in self._special

    def _make_bytes(self, token_id: int) -> bytes:
        name = self._literals.get(token_id)
        if name is not None:
            return name.encode()
        text = self.backend.id_to_token(token_id)
        return b"" if text is None else self._convert(text)  # None: an id that the vocabulary skips

    def _literal_backend(self) -> Backend:
        """Return a copy of the backend that reads names of special tokens as plain text; made at the first use."""
        with self._literal_lock:
            if self._literal is None:
                twin = Backend.from_str(self.backend.to_str())
                twin.encode_special_tokens = True
                self._literal = twin
            return self._literal


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise InvalidParameterError(f"a text to tokenize must be a string, not {type(text).__name__}", "prompt")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidParameterError(
            f"the text has half a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, which "
            "UTF-8 cannot carry; send whole characters",
            "prompt",
        ) from None


def _gguf_eos_ids(vocab: GgufVocab) -> list[int]:
    texts = ids_by_text(vocab)
    named = [vocab.ids[name] for name in ("eos", "eot", "eom") if name in vocab.ids]
    return [*named, *sorted(end_of_turn_ids(texts) | end_of_file_ids(texts, vocab.ids))]


def _gguf_chat_template(metadata: Mapping[str, object], bos: str | None) -> ChatTemplateSource | None:
    """Return the file's templates; as in llama.cpp, `bos` is put before a template that does not write BOS itself."""
    templates: dict[str, str] = {}
    for key, value in metadata.items():
        if key == _CHAT_TEMPLATE or key.startswith(f"{_CHAT_TEMPLATE}."):
            if not isinstance(value, str):
                raise InvalidFileError(f"{key} must be a string, not {type(value).__name__}")
            if value and bos is not None and "bos_token" not in value and bos not in value:
                value = "{{ bos_token }}" + value
            templates[key.removeprefix(_CHAT_TEMPLATE).removeprefix(".") or "default"] = value
    if len(templates) > MAX_NAMED_TEMPLATES:
        raise InvalidFileError(f"the file has {len(templates)} chat templates; at most {MAX_NAMED_TEMPLATES} allowed")
    if not templates:
        return CHATML if metadata.get("general.architecture") == "qwen" else None
    return templates["default"] if list(templates) == ["default"] else templates


class ChatConventions(msgspec.Struct, frozen=True, kw_only=True):
    """Template and tokens that structure a conversation; they determine which parser reads a model's answers.

    Attributes:
        chat_template: the template in use, a dict of templates by name, or None.
        special_tokens: ids by name of the tokens that structure a text and are not part of it.
        mark_ids: ids by name of the tokens in brackets, such as `<tool_call>`, that are part of the text.
        token_names: texts of `bos_token`, `eos_token` and so on, for templates.
        response_template: key of tokenizer_config.json (transformers 5.13): how the model formats an answer; or None.
    """

    chat_template: ChatTemplateSource | None = None
    special_tokens: Mapping[str, int] = {}
    mark_ids: Mapping[str, int] = {}
    token_names: Mapping[str, str] = {}
    response_template: Mapping[str, Any] | None = None


def chat_conventions(tokenizer: Tokenizer, chat_template: ChatTemplateSource | None) -> ChatConventions:
    """Return a tokenizer's conventions, with `chat_template` in place of the tokenizer's own template."""
    return ChatConventions(
        chat_template=chat_template,
        special_tokens=tokenizer.special_token_ids,
        mark_ids=tokenizer.mark_ids,
        token_names=tokenizer.special_tokens,
        response_template=tokenizer.response_template,
    )
