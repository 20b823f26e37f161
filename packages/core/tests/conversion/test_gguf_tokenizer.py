"""Tokenizers as GGUF metadata, and back: the vocabularies that llama.cpp tests its own tokenizers with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from candle_vllm.core.conversion.gguf_tokenizer import cut_name, tokenizer_metadata
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.text import tokenizer as ours
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS

NAMES = ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "starcoder", "deepseek-coder", "falcon"]


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", sorted(name for name, entry in PRE_TOKENIZERS.items() if entry.byte_level))
def test_a_named_cut_is_found(name: str) -> None:
    """Where several cut the probe alike, the first of them: they differ in texts that hardly occur."""
    entry = PRE_TOKENIZERS[name]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in entry.patterns]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    found = PRE_TOKENIZERS[cut_name(backend, entry.ignore_merges)]
    assert found.ignore_merges == entry.ignore_merges
    usual = {"llama3", "dbrx", "glm4", "qwen2"}
    assert found.patterns == entry.patterns or any(found is PRE_TOKENIZERS[each] for each in usual)


def test_gpt2s_own_cut_is_found() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert cut_name(backend, False) == "gpt-2"


def test_an_unknown_cut_is_refused() -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Split("e", "isolated")
    with pytest.raises(UnsupportedModelError, match=r"as none of GGUF's named cuts does.*--isq"):
        cut_name(backend, False)


@pytest.mark.parametrize("model", [models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"), models.Unigram([("a", 0.0)])])
def test_other_kinds_are_refused(model: models.Model) -> None:
    with pytest.raises(UnsupportedModelError, match="byte-pair tokenizers, and this is a"):
        tokenizer_metadata(ours.Tokenizer(Tokenizer(model)), 1, ())
