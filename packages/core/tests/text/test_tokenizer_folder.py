# SPDX-License-Identifier: MIT
"""Which file of a folder wins where two of them say different things of a tokenizer."""

from __future__ import annotations

import base64
import importlib
import json
import logging
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from candle_vllm.core.conversion.gguf_tokenizer import tokenizer_metadata
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import Tokenizer

S, E, CLS, SEP, END = range(257, 262)
NAMES = ["<s>", "</s>", "[CLS]", "[SEP]", "<end>"]
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
X, Y = 120 - 33, 121 - 33


def write(folder: Path, frame: str | None = None, pair: str | None = None, **files: dict[str, Any]) -> Path:
    """Byte pairs with five special tokens; `files` are the JSON files beside tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [chr(33 + index) for index in range(94)] + [text for text in alphabet if not "!" <= text <= "~"]
    backend = Backend(models.BPE({text: index for index, text in enumerate([*alphabet, "th"])}, [("t", "h")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in NAMES])
    if frame is not None:
        tokens = [(text, 257 + index) for index, text in enumerate(NAMES)]
        backend.post_processor = processors.TemplateProcessing(single=frame, pair=pair, special_tokens=tokens)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


FRAMES: list[tuple[str | None, dict[str, Any], list[int]]] = [
    # A key that says what the file says, or whose token has no name, or that is absent, changes nothing.
    ("$A <end>", {"add_bos_token": False, "bos_token": None}, [X, END]),  # Qwen3-Embedding
    ("$A <end>", {"add_bos_token": False, "add_eos_token": False, "eos_token": "</s>"}, [X, END]),
    ("$A", {"add_bos_token": True}, [X]),
    ("$A", {"add_bos_token": True, "bos_token": "<none of these>"}, [262, X]),  # it is added to the vocabulary
    ("<s> $A </s>", BOTH, [S, X, E]),
    ("<s> $A </s>", {**BOTH, "add_bos_token": True, "add_eos_token": True}, [S, X, E]),
    ("<s> $A </s>", {**BOTH, "add_bos_token": None, "add_eos_token": "yes"}, [S, X, E]),
    # A key that says something else changes its own side.
    ("<s> $A", {**BOTH, "add_eos_token": True}, [S, X, E]),  # e5-mistral
    ("<s> $A </s>", {**BOTH, "add_bos_token": False}, [X, E]),
    ("<s> $A </s>", {**BOTH, "add_eos_token": False}, [S, X]),
    ("<s> $A </s>", {**BOTH, "add_bos_token": False, "add_eos_token": False}, [X]),
    (None, {**BOTH, "add_bos_token": True, "add_eos_token": False}, [S, X]),  # DeepSeek
    ("<s> $A <end> </s>", {**BOTH, "add_bos_token": True, "add_eos_token": False}, [S, X]),  # Command R
    # A side of other tokens stays.
    ("[CLS] $A", {**BOTH, "add_bos_token": True, "add_eos_token": True}, [CLS, X, E]),
    ("$A <end>", {**BOTH, "add_eos_token": True}, [X, END]),
    ("[CLS] $A [SEP]", {"add_bos_token": False}, [CLS, X, SEP]),  # BERT
    ("[CLS] $A [SEP]", {**BOTH, "add_bos_token": False, "add_eos_token": False}, [CLS, X, SEP]),
]


@pytest.mark.parametrize(("frame", "config", "ids"), FRAMES, ids=[f"{frame} {list(c)}" for frame, c, _ in FRAMES])
def test_the_frame_around_a_text(frame: str | None, config: dict[str, Any], ids: list[int], tmp_path: Path) -> None:
    pair = None if frame is None or "[" not in frame else "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer = Tokenizer.from_folder(write(tmp_path, frame, pair, tokenizer_config=config))
    assert tokenizer.encode("x") == ids
    assert tokenizer.encode("x", add_special_tokens=False) == [X]
    if ids == [CLS, X, SEP]:
        assert tokenizer.encode_pair("x", "y") == ([CLS, X, SEP, Y, SEP], [0, 0, 0, 1, 1])
    if len(ids) - ids.index(X) < 3 and ids[0] in (S, X) and ids[-1] in (E, X):  # GGUF has the end token alone behind
        metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size, ())
        said = [metadata[f"tokenizer.ggml.add_{side}_token"] for side in ("bos", "eos")]
        assert said == [ids[0] != X, ids[-1] != X]
        assert Tokenizer.from_gguf(metadata).encode("x") == ids


def test_an_embedder_is_exported_with_its_end_token(tmp_path: Path) -> None:
    config = {"add_bos_token": False, "bos_token": None, "eos_token": "</s>", "pad_token": "<end>"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, "$A <end>", tokenizer_config=config))
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size, [E, END])
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.add_eos_token"] is True
    assert Tokenizer.from_gguf(metadata).encode("x") == [X, END]


def test_a_key_that_is_not_followed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, "$A <end>", tokenizer_config={**BOTH, "add_eos_token": True})
    Tokenizer.from_folder(folder)
    assert "tokenizer_config.json: add_eos_token is true, which is ignored: tokenizer.json has ['<end>']" in caplog.text


def test_the_newest_of_several_chat_templates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = write(tmp_path, tokenizer_config={"chat_template": "old"})
    assert Tokenizer.from_folder(folder).chat_template == "old"
    (folder / "chat_template.json").write_text('{"chat_template": "new"}')
    assert Tokenizer.from_folder(folder).chat_template == "new"
    (folder / "chat_template.jinja").write_text("newest")
    assert Tokenizer.from_folder(folder).chat_template == "newest"
    assert caplog.text.count("tokenizer_config.json has another chat template; the newer file's is used") == 2
    caplog.clear()
    write(tmp_path, tokenizer_config={"chat_template": "newest"}, chat_template={})
    assert Tokenizer.from_folder(folder).chat_template == "newest"
    assert "chat template" not in caplog.text


def test_the_frame_that_a_key_changes_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, "<s> $A", tokenizer_config={**BOTH, "add_eos_token": True})
    with caplog.at_level(logging.INFO):
        pair = Tokenizer.from_folder(folder).encode_pair("x", "y")
    assert "tokenizer_config.json: add_eos_token is True" in caplog.text
    assert pair == ([S, X, E, S, Y, E], [0, 0, 0, 1, 1, 1])


# ---- names and flags -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [True, False])
def test_which_file_names_the_special_tokens(decoder: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """tokenizer_config.json where it has added_tokens_decoder, else special_tokens_map.json, as in transformers."""
    config: dict[str, Any] = {"eos_token": "</s>", "bos_token": "<s>"} | (
        {"added_tokens_decoder": {}} if decoder else {}
    )
    names = {"eos_token": {"content": "<end>"}, "cls_token": "[CLS]"}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config, special_tokens_map=names))
    won, lost = ("</s>", "<end>") if decoder else ("<end>", "</s>")
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": won, "cls_token": "[CLS]"}
    assert tokenizer.eos_token_ids[0] == (E if decoder else END)
    assert f"eos_token is {won!r}" in caplog.text
    assert f"says {lost!r}, which is ignored" in caplog.text


def test_a_token_is_special_where_any_file_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = {
        "image_token": "th",
        "additional_special_tokens": ["!", {"content": "%", "lstrip": True}],
        "extra_special_tokens": {"audio_token": "&", "other": "+"},
        "added_tokens_decoder": {"258": {"content": "</s>", "special": False}, "9": {"content": "*", "special": True}},
    }
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config=config))
    assert set(tokenizer.special_token_ids) == {*NAMES, "th", "!", "%", "&", "+", "*"}
    assert tokenizer.special_tokens == {"image_token": "th", "audio_token": "&"}
    assert 'flags of 1 tokens differ from tokenizer.json: AddedToken("</s>"' in caplog.text
    ids = tokenizer.encode("ax th !y %z")
    assert [tokenizer.special_token_ids[text] for text in ("th", "!", "%")] == [
        i for i in ids if tokenizer.is_special(i)
    ]
    assert tokenizer.decode(tokenizer.encode("a%b</s>")) == "ab"


def test_tokens_that_older_files_add(tmp_path: Path) -> None:
    files = {"added_tokens": {"<pad>": 262, "<think>": 263, "</s>": 258}, "special_tokens_map": {"pad_token": "<pad>"}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, **files))
    assert tokenizer.encode("<pad><think></s>") == [262, 263, E]
    assert [tokenizer.is_special(index) for index in (262, 263, E)] == [True, False, True]


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"},
        {"extra_special_tokens": {"a_token": "<a>", "b": "<b>"}, "mask_token": "<mask>", "bos_token": "<bos>"},
        {"extra_special_tokens": ["<a>"], "image_token": "<image>", "unk_token": "<unk>"},
    ],
)
def test_tokens_that_tokenizer_json_lacks_get_the_ids_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(write(tmp_path, tokenizer_config=config))
    ours = Tokenizer.from_folder(tmp_path).special_token_ids
    assert {text: theirs.convert_tokens_to_ids(text) for text in ours} == ours


def test_an_id_that_two_files_give_differently_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoder = {"5": {"content": "</s>", "special": True}, "300": {"content": "<new>"}, "258": {"content": "<other>"}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.encode("</s><other><new>") == [E, 262, 263]
    for said in (
        "'</s>' has the id 258, not 5",
        "'<other>' has the id 262, not 258",
        "'<new>' has the id 263, not 300",
    ):
        assert said in caplog.text


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<a>": "x"}},
        {"added_tokens": {"<a>": True}},
        {"added_tokens": {"": 3}},
        {"special_tokens_map": {"cls_token": [1]}},
        {"tokenizer_config": {"mask_token": 3.5}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
    ],
    ids=str,
)
def test_files_that_cannot_be_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match=next(iter(files))):
        Tokenizer.from_folder(write(tmp_path, **files))


def test_a_folder_without_tokenizer_json_is_told_how_to_write_it(tmp_path: Path) -> None:
    """Older GPT-2 repositories have vocab.json and merges.txt alone, so that there is no other file to download."""
    for name, content in (("vocab.json", '{"a": 0}'), ("merges.txt", "#version: 0.2")):
        (tmp_path / name).write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"no tokenizer\.json: .*\.save_pretrained\(FOLDER\)"):
        Tokenizer.from_folder(tmp_path)


def test_qwens_vocabulary_and_merges_are_read_as_by_transformers(tmp_path: Path) -> None:
    """Files of a slow tokenizer, without tokenizer.json."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u00c3", "\u00a9"), ("1", "2"), ("#", "#")]
    words = [*letters, *(left + right for left, right in merges)]
    (tmp_path / "vocab.json").write_text(json.dumps({text: index for index, text in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]))
    marks = {str(len(words) + n): {"content": text, "special": True} for n, text in enumerate(("<|im_end|>", "<img>"))}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "added_tokens_decoder": marks}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_ids[0] == len(words)
    for text in ("the other 12 ## the<img>then<|im_end|>", "e\u0301t\u00e9 It's\n\n  x", "\u4e16\u754c \U0001f600", ""):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_keys_that_name_no_token_are_left_alone(tmp_path: Path) -> None:
    config = {
        "hf_token": 3,
        "x_token": None,
        "y_token": [],
        "extra_special_tokens": 7,
        "additional_special_tokens": [None, 4],
    }
    assert Tokenizer.from_folder(write(tmp_path, tokenizer_config=config)).special_tokens == {}


# ---- a tiktoken file -------------------------------------------------------------------------------------------------

_CASES = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_UPPER, _LOWER, _TAIL = rf"[\p{{Lu}}\p{{Lt}}{_CASES}", rf"[\p{{Ll}}{_CASES}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = "|".join(  # as Kimi's own tokenizer has it
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
TEXTS = [
    "The theory that the others' THEIRS don't gather: 12345 things,  then\n\n  the end. ",
    "北京的天气很好,the 東京タワー is über-tall 🗼🗼 かな交じり文",
    "aaaaaaa aaa\tababab\r\n\r\n\n x = {'a': [1, 22, 333, 4444]}\n",
]


QWEN = "|".join(  # and Qwen's
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)


def cut(text: str, pattern: str = KIMI) -> list[str]:
    regex: Any = importlib.import_module("regex")  # of transformers, without types
    return regex.findall(pattern, text, regex.V1)


def some_ranks(pattern: str = KIMI) -> dict[bytes, int]:
    """A vocabulary of bytes and merges, made of the texts by counting pairs, in an order of bytes of its own."""
    ranks = {bytes([byte]): 255 - byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for text in TEXTS for word in cut(text, pattern)]
    while len(ranks) < 656:
        pairs = Counter(pair for word in words for pair in pairwise(word) if pair[0] + pair[1] not in ranks)
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[left + right] = len(ranks)
        words = [merged(word, ranks) for word in words]
    return ranks


def merged(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """The rule of tiktoken: of all neighbours that are a token, the first two of the lowest rank become one."""
    while True:
        sums = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not sums:
            return parts
        at = min(sums)[1]
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]


def write_kimi(folder: Path, lines: list[str] | None = None, **config: Any) -> Path:
    ranks = some_ranks()
    given = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()] if lines is None else lines
    (folder / "tiktoken.model").write_text("\n".join(given))
    first = len(ranks)
    added = {first: "[BOS]", first + 2: "<|im_end|>", first + 20: "<think>"}
    tokens = {str(index): {"content": text, "special": text != "<think>"} for index, text in added.items()}
    both = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": tokens, "bos_token": "[BOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(both | config))
    return folder


def test_a_tiktoken_file_is_kimis_vocabulary(tmp_path: Path) -> None:
    ranks, tokenizer = some_ranks(), Tokenizer.from_folder(write_kimi(tmp_path))
    for text in [*TEXTS, *(text[::-1] for text in TEXTS)]:
        words = [[bytes([byte]) for byte in word.encode()] for word in cut(text)]
        ids = [ranks[token] for word in words for token in merged(word, ranks)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    first = len(ranks)
    assert tokenizer.vocab_size == first + 256
    marked = f"<|im_end|><|reserved_token_{first + 1}|>a<think>"
    assert tokenizer.encode(marked) == [first + 2, first + 1, ranks[b"a"], first + 20]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (first, (first + 2,))
    assert tokenizer.decode([first + 2, ranks[b"a"], first + 20]) == "a<think>", "no special one is shown"
    stored = Tokenizer.from_gguf(tokenizer_metadata(tokenizer, first + 256, tokenizer.eos_token_ids))
    assert [stored.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def write_qwen(folder: Path, **config: Any) -> dict[bytes, int]:
    ranks = some_ranks(QWEN)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("\n".join([*lines, ""]))
    kept = {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    return ranks


def test_a_tiktoken_file_is_the_first_qwens_vocabulary(tmp_path: Path) -> None:
    """With fixed marks behind it, texts that are composed, and ChatML, which its repositories do not store."""
    ranks = write_qwen(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in [*TEXTS, *(text[::-1] for text in TEXTS), "e\u0301t\u00e9"]:
        composed = unicodedata.normalize("NFC", text)
        words = [[bytes([byte]) for byte in word.encode()] for word in cut(composed, QWEN)]
        ids = [ranks[token] for word in words for token in merged(word, ranks)]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == composed
    first = len(ranks)
    assert tokenizer.vocab_size == first + 208
    assert tokenizer.encode("<|endoftext|><|im_start|>a<|im_end|><|extra_0|><|extra_204|>") == [
        *(first, first + 1, ranks[b"a"], first + 2, first + 3, first + 207)
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, (first, first + 2))
    assert isinstance(tokenizer.chat_template, str)
    rendered = ChatTemplate(tokenizer.chat_template, {}).render([{"role": "user", "content": "Hi"}])
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    metadata = tokenizer_metadata(tokenizer, first + 208, tokenizer.eos_token_ids)
    stored = Tokenizer.from_gguf(metadata)
    assert [stored.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    bare = {key: value for key, value in metadata.items() if "template" not in key}
    assert Tokenizer.from_gguf(bare).chat_template is None
    assert Tokenizer.from_gguf(bare | {"general.architecture": "qwen"}).chat_template == tokenizer.chat_template
    write_qwen(tmp_path, chat_template="own")
    assert Tokenizer.from_folder(tmp_path).chat_template == "own"


BYTES = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["!"], "line 1 is '!'"),
        ([*BYTES, "YWI= -1"], "line 257"),
        ([*BYTES, "YWI= ٣"], "line 257"),
        ([*BYTES, "YWI= 99999999"], "line 257"),
        ([*BYTES, f"{base64.b64encode(bytes(600)).decode()} 300"], "line 257"),
        ([*BYTES, "YQ== 300"], "line 257 has a token that an earlier one has"),
        ([*BYTES, "YWI= 255"], "two tokens of one rank"),
        ([*BYTES, "YWI= 9999999"], "a rank of 4194304 and more"),
        (BYTES[1:], "a token for each byte"),
        ([], "a token for each byte"),
    ],
)
def test_a_damaged_tiktoken_file_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InvalidFileError, match=message):
        Tokenizer.from_folder(write_kimi(tmp_path, lines, added_tokens_decoder={}))


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "Able", "able", "caf", "##e", "##é", "中", "!"]


@pytest.mark.parametrize("config", [None, {"do_lower_case": False}, {"strip_accents": False}])
def test_a_list_of_words_is_berts_vocabulary(config: dict[str, Any] | None, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Tokenizer.from_folder(tmp_path), transformers.BertTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(WORDS)
    for text in ("unable Able!", "café 中中 zebra", "a [MASK] b", ""):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode_pair(text, "able") == tuple(
            theirs(text, "able")[name] for name in ("input_ids", "token_type_ids")
        )
    assert ours.decode(ours.encode("unable!")) == "unable!"


def test_other_lists_of_words_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\nword\n")
    with pytest.raises(InvalidFileError, match=r"vocab.txt lacks \[SEP\]"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(UnsupportedModelError, match="'BertJapaneseTokenizer'"):
        Tokenizer.from_folder(tmp_path)


def test_other_tiktoken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'QWenTokenizer'; only TikTokenTokenizer is"):
        Tokenizer.from_folder(write_kimi(tmp_path, tokenizer_class="QWenTokenizer"))
    with pytest.raises(InvalidFileError, match="name of another token"):
        Tokenizer.from_folder(write_kimi(tmp_path, added_tokens_decoder={str(len(some_ranks()) + 3): {"content": "!"}}))
