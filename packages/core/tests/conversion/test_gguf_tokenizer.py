# SPDX-License-Identifier: MIT
"""Tokenizers as GGUF metadata, and back: the vocabularies that llama.cpp tests its own tokenizers with."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from candle_vllm.core.conversion.gguf_file import write_file
from candle_vllm.core.conversion.gguf_tokenizer import _around, pre_tokenizer_name, tokenizer_metadata, unigram
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.text import tokenizer as ours
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from tests.common_run import few

NAMES = ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "starcoder", "deepseek-coder", "deepseek-llm", "falcon"]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", few(NAMES, "llama-spm", "gpt-2", "deepseek-coder"))
def test_texts_have_the_same_tokens_afterwards(name: str, llama_cpp_models: Path) -> None:
    file = llama_cpp_models / f"ggml-vocab-{name}.gguf"
    with open_gguf(file) as checkpoint:
        before = ours.Tokenizer.from_gguf(checkpoint.metadata)
    metadata = tokenizer_metadata(before, before.vocab_size, before.eos_token_ids)
    after = ours.Tokenizer.from_gguf(metadata)
    texts = file.with_name(f"{file.name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    assert len(texts) > 30
    assert after.encode_batch(texts) == before.encode_batch(texts)
    assert after.encode_batch(texts, add_special_tokens=False) == before.encode_batch(texts, add_special_tokens=False)
    assert set(before.eos_token_ids) <= set(after.eos_token_ids)
    assert after.bos_token_id == before.bos_token_id or before.bos_token_id is None


@pytest.mark.one_of_each(27)
@pytest.mark.parametrize("name", sorted(name for name, entry in PRE_TOKENIZERS.items() if entry.byte_level))
def test_a_named_cut_is_found(name: str) -> None:
    """Where several cut the probe alike, the first of them: they differ in texts that hardly occur."""
    entry = PRE_TOKENIZERS[name]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in entry.patterns]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    found = PRE_TOKENIZERS[pre_tokenizer_name(backend, entry.ignore_merges)]
    assert found.ignore_merges == entry.ignore_merges
    usual = {"llama3", "dbrx", "glm4", "qwen2"}
    assert found.patterns == entry.patterns or any(found is PRE_TOKENIZERS[each] for each in usual)


def test_gpt2s_own_cut_is_found() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert pre_tokenizer_name(backend, False) == "gpt-2"


def test_digits_that_are_cut_by_another_step() -> None:
    """DeepSeek LLM's tokenizer.json ends so."""
    backend = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in PRE_TOKENIZERS["deepseek-llm"].patterns[:-1]]
    digits = pre_tokenizers.Digits(individual_digits=True)
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, digits, spelling])
    assert pre_tokenizer_name(backend, False) == "deepseek-llm"


def test_an_unknown_cut_is_refused() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("e", "isolated")
    with pytest.raises(UnsupportedModelError, match=r"like none of the pre-tokenizers that GGUF has names for.*`isq`"):
        pre_tokenizer_name(backend, False)


def test_special_tokens_in_the_middle_of_a_text_are_refused() -> None:
    cuts = SimpleNamespace(encode=lambda _, add_special_tokens=True: [1, 0, 2] if add_special_tokens else [1, 2])
    with pytest.raises(UnsupportedModelError, match="changes a text to which it adds special tokens"):
        _around(cuts)  # type: ignore[arg-type]


def test_other_kinds_are_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match="byte-pair, WordPiece and unigram tokenizers, and this is a WordLevel"
    ):
        tokenizer_metadata(ours.Tokenizer(Tokenizer(models.WordLevel({"a": 0}))), 1, ())


@pytest.mark.parametrize("template", ["[gMASK]<sop>{{ messages }}", {"default": "", "tools": "[gMASK]<sop>"}])
def test_tokens_before_every_text_that_a_template_writes(
    template: str | dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """GLM-4's tokenizers put two there; llama.cpp's converter leaves them out."""
    metadata = tokenizer_metadata(framed(template), 259, ())
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert "GGUF cannot add [gMASK]<sop> before every text" in caplog.text
    after = ours.Tokenizer.from_gguf(metadata)
    assert after.encode("[gMASK]<sop>a") == framed(template).encode("a")


def test_tokens_before_every_text_that_nothing_else_writes() -> None:
    with pytest.raises(UnsupportedModelError, match=r"puts the tokens \[257, 258\] before and \[\] behind every text"):
        tokenizer_metadata(framed("{{ messages }}"), 259, ())


def framed(template: str | dict[str, str]) -> ours.Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({text: index for index, text in enumerate([*letters, "th"])}, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["[gMASK]", "<sop>"])
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=[("[gMASK]", 257), ("<sop>", 258)]
    )
    return ours.Tokenizer(backend, chat_template=template)


# ---- read again ------------------------------------------------------------------------------------------------------

FROM_THE_CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)


def bytes_of(normaliser: Any = None, cut: Any = FROM_THE_CUT, ignore_merges: bool = False) -> ours.Tokenizer:
    """Merges over GPT-2's alphabet, and a token that none of them makes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {text: index for index, text in enumerate([*letters, "th", "zqz", "Ġx"])}
    backend = Tokenizer(models.BPE(ids, [("t", "h"), ("Ġ", "x")], ignore_merges=ignore_merges))
    if normaliser is not None:
        backend.normalizer = normaliser
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    return ours.Tokenizer(backend)


@pytest.mark.parametrize("before", [
    bytes_of(normalizers.Lowercase()), bytes_of(normalizers.NFKC()), bytes_of(ignore_merges=True),
    bytes_of(cut=pre_tokenizers.ByteLevel(add_prefix_space=True)),
], ids=["lowercase", "nfkc", "whole words", "space"])  # fmt: skip
def test_byte_pairs_that_gguf_would_cut_otherwise(before: ours.Tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="GGUF's gpt2 tokenizer splits texts differently"):
        tokenizer_metadata(before, before.vocab_size, ())


def test_a_normaliser_that_composes_is_left_out() -> None:
    """Qwen's; texts are composed as a rule."""
    assert tokenizer_metadata(bytes_of(normalizers.NFC()), 259, ())["tokenizer.ggml.pre"] == "gpt-2"


def test_two_tokens_with_one_text() -> None:
    """A row without a token gets a name, which a token may have."""
    before = bytes_of()
    before.backend.add_tokens(["[PAD260]"])
    with pytest.raises(UnsupportedModelError, match=r"cannot express this tokenizer: .*'\[PAD260\]' twice"):
        tokenizer_metadata(before, 261, ())


def sentencepiece(cut: Any = None, scheme: str | None = None, **options: Any) -> ours.Tokenizer:
    """A model of Llama's kind; with `scheme`, Metaspace puts the space before words, not the normaliser."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581the12", "th", "the", "12"]
    merges = [("t", "h"), ("th", "e"), ("1", "2")]
    ids = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    if cut is not None:
        backend.pre_tokenizer = cut
    if scheme is not None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return ours.Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}, **options)


def test_a_cut_before_sentencepieces_merges() -> None:
    before = sentencepiece()
    after = ours.Tokenizer.from_gguf(tokenizer_metadata(before, before.vocab_size, ()))
    for text in ("the 12 théy", " 1212 "):
        assert after.encode(text, False) == before.encode(text, False)
    with pytest.raises(UnsupportedModelError, match="GGUF's llama tokenizer splits texts differently"):
        tokenizer_metadata(sentencepiece(pre_tokenizers.Digits(individual_digits=True)), before.vocab_size, ())


def test_a_space_before_the_first_word_alone_is_left_out_of_chats(caplog: pytest.LogCaptureFixture) -> None:
    """Mistral's tokenizers since v0.3: GGUF's prefix would stand behind every special token of a chat too."""
    before = sentencepiece(scheme="first", chat_template="{{ bos_token }}{{ messages }}")
    after = ours.Tokenizer.from_gguf(tokenizer_metadata(before, before.vocab_size, ()))
    for text in ("<s>the 12</s>the", "<s> the</s> 12</s>", " the"):
        assert after.encode(text, False) == before.encode(text, False), text
    assert "only chats have the right tokens" in caplog.text
    for kept in (sentencepiece(scheme="first"), sentencepiece(scheme="always", chat_template="{{ bos_token }}")):
        after = ours.Tokenizer.from_gguf(tokenizer_metadata(kept, kept.vocab_size, ()))
        assert after.encode("the 12", False) == kept.encode("the 12", False)


@pytest.mark.parametrize(("merges", "name"), [(True, "gpt-4o"), (False, "granite-embed-multi-97m")])
def test_the_name_that_more_readers_know(merges: bool, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where no token is taken whole that merges would not make."""
    split = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["gpt-4o"].patterns[0]), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*letters, "zq", *([] if merges else ["zqz"])]
    ids = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(ids, [("z", "q")], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([split, spelling]), decoders.ByteLevel()
    before = ours.Tokenizer(backend)
    metadata = tokenizer_metadata(before, before.vocab_size, ())
    assert metadata["tokenizer.ggml.pre"] == name
    assert ours.Tokenizer.from_gguf(metadata).encode("zqz zq") == before.encode("zqz zq")
    assert ("older programs do not know" in caplog.text) is not merges


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_the_end_token_behind_every_text_is_the_end_token() -> None:
    """Qwen3-Embedding's is another one than its chats end with."""
    backend = bytes_of().backend
    backend.add_special_tokens(["<|text|>", "<|turn|>"])
    frame = [("<|text|>", 259)]
    backend.post_processor = processors.TemplateProcessing(single="$A <|text|>", special_tokens=frame)
    before = ours.Tokenizer(backend, eos_token_ids=[260], special_tokens={"eos_token": "<|turn|>"})
    found = tokenizer_metadata(before, 261, [259])
    ends = [found.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    assert ends == [259, 260, None]
    assert ours.Tokenizer.from_gguf(found).encode("a") == before.encode("a")


def test_more_end_tokens_than_gguf_has_names_for(caplog: pytest.LogCaptureFixture) -> None:
    before = bytes_of()
    before.backend.add_special_tokens([f"<|{index}|>" for index in range(5)])
    tokenizer_metadata(before, 264, [259, 260, 261])
    assert not caplog.text
    tokenizer_metadata(before, 264, [259, 260, 261, 262, 263])
    assert caplog.text.rstrip().endswith("<|3|>, <|4|> are left out")


# ---- encoders --------------------------------------------------------------------------------------------------------

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["The fox's naïve CAFÉ, 42 ?!", "", "a", "[MASK] x", "ab  abab"]


def pieces(lowercase: bool, accents: bool | None, *, prefix: str = "##") -> ours.Tokenizer:
    """WordPiece with its frame, and an added token that is no special one."""
    words = [*SPECIAL, *"abcdefoxhtsnviéï,?!'42", "the", "Th", "AB", "C", "F", "##", "C"]
    texts = list(dict.fromkeys([*words, *(f"{prefix}{letter}" for letter in "abcdefoxhtsnviéïÉAF42")]))
    ids = {text: index for index, text in enumerate(texts)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix=prefix))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame = [(text, ids[text]) for text in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool>"])
    return ours.Tokenizer(backend)


@pytest.mark.parametrize(("lowercase", "accents"), [(True, None), (True, False), (False, None), (False, True)])
def test_word_pieces_come_back(lowercase: bool, accents: bool | None) -> None:
    before = pieces(lowercase, accents)
    metadata = tokenizer_metadata(before, before.vocab_size + 2, ())
    after = ours.Tokenizer.from_gguf(metadata)
    assert after.encode_batch([*TEXTS, "a<tool>b"]) == before.encode_batch([*TEXTS, "a<tool>b"])
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert found["model"] == "bert"
    assert found["tokens"][5:7] == ["\u2581a", "\u2581b"]
    assert found["tokens"][before.backend.token_to_id("##o")] == "o"
    assert found["tokens"][-3:] == ["<tool>", *(f"\u2581[PAD{before.vocab_size + i}]" for i in range(2))]
    ids = {"bos": 2, "eos": 3, "seperator": 3, "cls": 2, "padding": 0, "unknown": 1, "mask": 4}
    assert {name: found[f"{name}_token_id"] for name in ids} == ids
    assert found["normalizer.strip_accents"] is (lowercase if accents is None else accents)


def test_pieces_that_gguf_would_cut_otherwise() -> None:
    with pytest.raises(UnsupportedModelError, match="GGUF's bert tokenizer splits texts differently"):
        tokenizer_metadata(pieces(True, None, prefix="@@"), 60, ())


def test_a_token_for_unknown_words_that_is_none() -> None:
    before = pieces(True, None)
    before.backend.model = models.WordPiece({"a": 0, "[CLS]": 2, "[SEP]": 3}, unk_token="[none]")
    with pytest.raises(UnsupportedModelError, match=r"unk_token is '\[none\]', which its vocabulary lacks"):
        tokenizer_metadata(before, 60, ())


def sentences(*, cut_first: bool) -> ours.Tokenizer:
    """A unigram model as XLM-RoBERTa has it; where words are cut first, line breaks are lost before the model."""
    listed = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581the", -3.0)]
    letters = [(letter, -5.0 - index / 10) for index, letter in enumerate("abcdefghinorstuvwxyz")]
    backend = Tokenizer(models.Unigram([*listed, *letters], 3, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    space = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space]) if cut_first else space
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return ours.Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})


def test_a_unigram_model_comes_back() -> None:
    before = sentences(cut_first=False)
    metadata = tokenizer_metadata(before, 30, ())
    texts = ["the fox", "  the   the", "x7y", "</s> a"]
    assert ours.Tokenizer.from_gguf(metadata).encode_batch(texts) == before.encode_batch(texts)
    found = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    assert (found["model"], found["scores"][5], found["scores"][-1]) == ("t5", -3.0, -10000.0)
    assert (found["padding_token_id"], found["unknown_token_id"], found["token_type"][3]) == (1, 3, 2)
    with pytest.raises(UnsupportedModelError, match="GGUF's t5 tokenizer splits texts differently"):
        tokenizer_metadata(sentences(cut_first=True), 30, ())


def test_sentencepieces_normalisation_is_kept(tmp_path: Path) -> None:
    """Its bytes, as an array of them."""
    charsmap = b"\x04\0\0\0" + b"\0\0\0\0" + b"x\0"
    data = {"model": {"vocab": [["a", -1.0]]}, "added_tokens": [], "normalizer": {"type": "Precompiled"}}
    data["normalizer"]["precompiled_charsmap"] = base64.b64encode(charsmap).decode()
    found = unigram(data, ["a"])
    assert found["precompiled_charsmap"] == charsmap
    write_file(tmp_path / "m.gguf", [], {"general.architecture": "bert", "map": charsmap})
    field = GGUFReader(tmp_path / "m.gguf").fields["map"]
    assert bytes(field.contents()) == charsmap
    assert [kind.name for kind in field.types] == ["ARRAY", "UINT8"]
