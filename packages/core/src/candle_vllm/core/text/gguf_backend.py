# SPDX-License-Identifier: MIT
"""Build a `tokenizers.Tokenizer` from a GGUF vocabulary (loading, before step 3 of a request can run).

Each kind of tokenizer (`tokenizer.ggml.model`) gives the same token ids as llama.cpp:

- gpt2: byte-pair merges over GPT-2's byte alphabet, after the pre-tokenizer in `tokenizer.ggml.pre`;
- gemma4, gpt2 without `byte_level`: byte-pair merges over UTF-8, U+2581 for spaces, <0xNN> for missing characters;
- llama: SentencePiece's byte-pair model. Its merges are not stored, but every token that is the concatenation of two
  tokens is a merge, ranked by the token's score;
- t5: SentencePiece's unigram model;
- bert: WordPiece. The file marks the first token of a word with U+2581 and leaves the other tokens unmarked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import compress

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.text import gguf_vocab
from candle_vllm.core.text.pretokenizers import PreTokenizer
from candle_vllm.core.text.special_tokens import END_OF_TURN, VISIBLE_FRAME, end_of_turn_ids

SPACE = "\u2581"
_LONGEST_WORD = 100  # characters, BERT's own limit; WordPiece's search is quadratic in the length of a word


def build_backend(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    """Build the tokenizer of a checked vocabulary.

    Raises InvalidFileError if the vocabulary does not make a working tokenizer.
    """
    builders = {"gpt2": _byte_level, "gemma4": _raw_bpe, "llama": _spm, "t5": _unigram, "bert": _wordpiece}
    build = builders["gemma4" if vocab.model == "gpt2" and not vocab.pre.byte_level else vocab.model]
    marks = {gguf_vocab.CONTROL, gguf_vocab.UNKNOWN, gguf_vocab.USER_DEFINED}
    marked = set(compress(range(len(vocab.types)), map(marks.__contains__, vocab.types)))  # fast: 262,144 types
    hidden = _special_ids(vocab, marked)
    try:
        with refusing_panics(f"the vocabulary ({gguf_vocab.PREFIX}*)"):
            backend = build(vocab)
            backend.add_special_tokens(_added(vocab, hidden, special=True))
            backend.add_tokens(_added(vocab, marked - hidden, special=False))
            _frame(backend, vocab)
    except InvalidFileError:
        gguf_vocab.check_merges(vocab)  # the error names the wrong merge, if there is one
        raise
    return backend


@contextmanager
def refusing_panics(what: str) -> Iterator[None]:
    """Convert exceptions and panics of the tokenizers library, except a MemoryError, to an InvalidFileError."""
    try:
        yield
    except BaseException as error:
        # A panic of the library is a BaseException whose class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, MemoryError):
            raise
        raise InvalidFileError(f"{what} cannot be used as a tokenizer: {error}") from error


def ids_by_text(vocab: gguf_vocab.GgufVocab) -> dict[str, int]:
    """Return the id of each token by its text, without a `</s>` that is the HTML tag, as Qwen and Gemma have it."""
    html = vocab.numbers.get("</s>")
    plain = (gguf_vocab.NORMAL, gguf_vocab.USER_DEFINED)
    if html is None or html == vocab.ids.get("eos") or vocab.types[html] not in plain:
        return vocab.numbers
    texts = vocab.numbers.copy()
    del texts["</s>"]
    return texts


def _special_ids(vocab: gguf_vocab.GgufVocab, marked: set[int]) -> set[int]:
    """Return the ids hidden from the text: control, unknown and end-of-turn tokens, except `shown`."""
    hidden = {index for index in marked if vocab.types[index] != gguf_vocab.USER_DEFINED}
    texts = ids_by_text(vocab)
    ends = end_of_turn_ids(texts)
    # Frame tokens, and tokens of `END_OF_TURN` that do not end a turn in this vocabulary.
    shown = {texts[text] for text in (*VISIBLE_FRAME, *END_OF_TURN) if text in texts} - ends
    return (hidden | ends) - shown


def _added(vocab: gguf_vocab.GgufVocab, ids: set[int], *, special: bool) -> list[AddedToken]:
    phi3 = "phi-3" in vocab.general_name or "phi3" in vocab.general_name
    added = []
    for index in sorted(ids):
        text = vocab.tokens[index]
        # Phi-3's own tokenizer swallows the line break after its role tokens; GGUF has no field for it.
        rstrip = phi3 and text not in ("<unk>", "<s>", "<|endoftext|>")
        added.append(AddedToken(text, rstrip=rstrip, normalized=False, special=special))
    return added


def _frame(backend: Tokenizer, vocab: gguf_vocab.GgufVocab) -> None:
    """Add BOS and EOS to prompts by `add_bos` and `add_eos`; a pair of texts has one BOS, as in llama.cpp."""
    before = [vocab.ids["bos"]] if vocab.add_bos else []
    behind = [vocab.ids["eos"]] if vocab.add_eos else []
    if before or behind:
        texts = [[(vocab.tokens[i], i) for i in side] for side in (before, behind)]
        set_frame(backend, *texts, again=False)


def set_frame(
    backend: Tokenizer, before: list[tuple[str, int]], behind: list[tuple[str, int]], *, again: bool = True
) -> None:
    """Make `backend` put the (text, id) pairs of `before` and `behind` around every prompt.

    With `again`, `before` also precedes the second text of a pair, as in transformers.
    """
    # `TemplateProcessing` splits its texts at spaces and colons, so placeholders stand for the tokens.
    head = [f"HEAD{i}" for i in range(len(before))]
    tail = [f"TAIL{i}" for i in range(len(behind))]
    tokens = [
        {"id": name, "ids": [index], "tokens": [text]}
        for name, (text, index) in zip((*head, *tail), (*before, *behind))
    ]
    first, second = [*head, "$A", *tail], [*(head if again else []), "$B", *tail]
    backend.post_processor = processors.TemplateProcessing(
        single=first, pair=[*first, *(f"{piece}:1" for piece in second)], special_tokens=tokens
    )


def _byte_level(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab.numbers, vocab.merges, ignore_merges=vocab.pre.ignore_merges))
    byte_level(backend, vocab.pre)
    return backend


def byte_level(backend: Tokenizer, pre: PreTokenizer) -> None:
    """Make `backend` pre-tokenize as `pre`, and spell bytes in GPT-2's alphabet."""
    backend.pre_tokenizer = byte_level_cuts(pre)
    backend.decoder = decoders.ByteLevel()


def byte_level_cuts(pre: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Return the library's pre-tokenizer of an entry over GPT-2's byte alphabet."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, letters])


def _raw_bpe(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    backend = _with_space_marks(vocab, vocab.merges, fuse_unk=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in vocab.pre.patterns]
    )
    return backend


def _spm(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    return _with_space_marks(vocab, _merges_by_score(vocab, vocab.numbers), fuse_unk=True)


def _with_space_marks(vocab: gguf_vocab.GgufVocab, merges: list[tuple[str, str]], *, fuse_unk: bool) -> Tokenizer:
    unknown = vocab.tokens[vocab.ids["unknown"]] if "unknown" in vocab.ids else None
    model = models.BPE(vocab.numbers, merges, unk_token=unknown, fuse_unk=fuse_unk, byte_fallback=True)
    backend, prefixed = Tokenizer(model), vocab.add_space_prefix
    first = [normalizers.Prepend(SPACE)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return backend


def _merges_by_score(vocab: gguf_vocab.GgufVocab, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return all pairs of tokens that form a token when joined, the likeliest token first, ties in order of id."""
    mergeable = (gguf_vocab.NORMAL, gguf_vocab.USER_DEFINED, gguf_vocab.UNUSED)
    types, scores = vocab.types, vocab.scores
    parts = {text for text, index in ids.items() if types[index] in mergeable}
    ranked = []
    for text in parts:
        index = ids[text]
        for cut in range(1, len(text)):
            left = text[:cut]
            if left in parts and text[cut:] in parts:
                ranked.append((-scores[index], index, cut, left, text[cut:]))
    ranked.sort(key=lambda entry: entry[:3])
    return [(left, right) for *_, left, right in ranked]


def _unigram(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    # The unigram model has no token types: a hidden token with a word's score could result from plain text, so
    # control, unknown and byte tokens get a score that no segmentation chooses.
    unaffordable = min(vocab.scores) - 1000.0
    usable = (gguf_vocab.NORMAL, gguf_vocab.USER_DEFINED, gguf_vocab.UNUSED)
    pieces = [
        (text, score if kind in usable else unaffordable)
        for text, score, kind in zip(vocab.tokens, vocab.scores, vocab.types)
    ]
    backend = Tokenizer(models.Unigram(pieces, vocab.ids.get("unknown", 0), byte_fallback=False))
    steps: list[normalizers.Normalizer] = []
    if vocab.charsmap:
        steps.append(normalizers.Precompiled(vocab.charsmap))
    if vocab.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if vocab.add_space_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    return backend


def _wordpiece(vocab: gguf_vocab.GgufVocab) -> Tokenizer:
    if "unknown" not in vocab.ids:
        raise InvalidFileError(
            f"{gguf_vocab.PREFIX}unknown_token_id is missing; WordPiece needs a token for unknown words"
        )
    names = [_wordpiece_name(text, kind) for text, kind in zip(vocab.tokens, vocab.types)]
    ids = {name: index for index, name in enumerate(names)}
    if len(ids) != len(names):
        twice = next(index for index, name in enumerate(names) if ids[name] != index)
        raise InvalidFileError(f"{gguf_vocab.PREFIX}tokens has the same word {names[twice]!r:.80} at {twice} and later")
    model = models.WordPiece(ids, unk_token=names[vocab.ids["unknown"]], max_input_chars_per_word=_LONGEST_WORD)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=vocab.strip_accents, lowercase=vocab.lowercase
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=True)
    return backend


def _wordpiece_name(text: str, kind: int) -> str:
    if kind in (gguf_vocab.CONTROL, gguf_vocab.UNKNOWN, gguf_vocab.USER_DEFINED):
        return text
    return text[1:] if text.startswith(SPACE) else f"##{text}"
