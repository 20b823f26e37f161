# SPDX-License-Identifier: MIT
"""Fill-in-the-middle: find a vocabulary's infill marks, and make prompts with them.

A model trained for it reads the prefix and the suffix of a gap, each after its mark, and continues with the text of the
gap. Marks and their order differ between models. They are found by the names of tokens, or by ids in a GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from candle_vllm.core.errors import InvalidParameterError


class InfillMarks(NamedTuple):
    """Infill marks of one vocabulary.

    Attributes:
        prefix, suffix: marks that precede the text before the gap, and the text after it.
        middle: token after both texts, where the answer begins; None if the answer follows them directly.
        suffix_first: the suffix comes first in the prompt.
        ends: tokens that end the answer, these marks included.
    """

    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool
    ends: tuple[int, ...]


class InfillPrompt(NamedTuple):
    """Infill prompt, and the tokens that end its answer besides the model's own end tokens."""

    token_ids: tuple[int, ...]
    stop_token_ids: tuple[int, ...]


class _Names(NamedTuple):
    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False


_KNOWN = (
    _Names("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, Granite 4, CodeGemma
    _Names("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, Refact
    _Names("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    _Names("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM-4
    _Names("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder
    _Names("▁<PRE>", "▁<SUF>", "▁<MID>"),  # CodeLlama
    _Names("<PRE>", "<SUF>", "<MID>"),
    _Names("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
    _Names("[PREFIX]", "[SUFFIX]", None, suffix_first=True),  # Codestral
)
_ENDS = (
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<reponame>"),
    *("<|file_sep|>", "<|file_separator|>", "▁<EOT>", "<EOT>", "<[fim-pad]>", "<filename>"),
)
# Keys of the ids in GGUF files, newer keys first.
GGUF_NAMES = ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle")


def infill_marks(token_id: Callable[[str], int | None], named: Mapping[str, int]) -> InfillMarks | None:
    """Find the infill marks of a vocabulary; None for a vocabulary without infill marks.

    `token_id` returns a token's id by its text, or None; `named` are ids in a GGUF file, by `GGUF_NAMES` and others.
    """
    found = next(filter(None, (_by_names(one, token_id) for one in _KNOWN)), None) or _by_ids(named)
    if found is None:
        return None
    ends = [token_id(name) for name in _ENDS] + [named.get(name) for name in ("eot", "fim_pad", "fim_rep", "fim_sep")]
    all_ends = dict.fromkeys(
        end for end in (found.prefix, found.suffix, found.middle, *ends) if end is not None and end >= 0
    )
    return found._replace(ends=tuple(all_ends))


def _by_ids(named: Mapping[str, int]) -> InfillMarks | None:
    for prefix, suffix, middle in (GGUF_NAMES[:3], GGUF_NAMES[3:]):
        if prefix in named and suffix in named:
            return InfillMarks(named[prefix], named[suffix], named.get(middle), middle not in named, ())
    return None


def _by_names(names: _Names, token_id: Callable[[str], int | None]) -> InfillMarks | None:
    prefix, suffix = token_id(names.prefix), token_id(names.suffix)
    middle = None if names.middle is None else token_id(names.middle)
    if prefix is None or suffix is None or (middle is None and names.middle is not None):
        return None
    return InfillMarks(prefix, suffix, middle, names.suffix_first, ())


class _Tokenizer(Protocol):
    @property
    def bos_token_id(self) -> int | None: ...

    def encode(self, text: str, add_special_tokens: bool = True, *, parse_special: bool = True) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...


def infill_prompt(
    tokenizer: _Tokenizer, marks: InfillMarks | None, prefix: str | Sequence[int], suffix: str
) -> InfillPrompt:
    """Make a prompt whose answer belongs between `prefix` (a text or its tokens) and `suffix`.

    Names of special tokens in the texts are plain text. Raises InvalidParameterError if the model has no infill marks,
    or a text cannot be tokenized.
    """
    if marks is None:
        said = "suffix: this model cannot fill in the middle: its vocabulary has no infill marks"
        raise InvalidParameterError(said, "suffix")
    before = tokenizer.encode(prefix, False, parse_special=False) if isinstance(prefix, str) else list(prefix)
    try:
        behind = _continued(tokenizer, suffix)
    except InvalidParameterError as error:
        error.param = "suffix"
        raise
    parts = ([marks.prefix, *before], [marks.suffix, *behind])
    first = tokenizer.encode("")[:1]
    begin = first if first and first[0] == tokenizer.bos_token_id else []
    middle = [] if marks.middle is None else [marks.middle]
    ids = [*begin, *(token for part in (parts[::-1] if marks.suffix_first else parts) for token in part), *middle]
    return InfillPrompt(tuple(ids), marks.ends)


def _continued(tokenizer: _Tokenizer, text: str) -> list[int]:
    """Tokenize a text that continues another one, without the space that some tokenizers write before every text."""
    alone = tokenizer.encode(text, False, parse_special=False)
    written = b"".join(map(tokenizer.token_bytes, alone))
    if not written.startswith(b" ") or written == text.encode():
        return alone
    behind = tokenizer.encode(f"\n{text}", False, parse_special=False)
    place = next((i for i, token in enumerate(behind) if tokenizer.token_bytes(token) == b"\n"), None)
    return alone if place is None else behind[place + 1 :]
