# SPDX-License-Identifier: MIT
"""Vocabularies rebuilt from GGUF against llama.cpp's own tokenisations."""

from __future__ import annotations

from pathlib import Path

import pytest

from candle_vllm.core.loading.gguf import GgufFile
from candle_vllm.core.text.detokenizer import Detokenizer
from candle_vllm.core.text.tokenizer import Tokenizer

# fmt: off
WITH_REFERENCE = [
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
]
# fmt: on
WITHOUT_REFERENCE = ["aquila", "baichuan", "gpt-neox", "nomic-bert-moe"]
SEPARATOR = "\n__ggml_vocab_test__\n"


def load(folder: Path, name: str) -> Tokenizer:
    file = GgufFile(folder / f"ggml-vocab-{name}.gguf")
    try:
        return Tokenizer.from_gguf(file.metadata)
    finally:
        file.close()


def cases(folder: Path, name: str) -> list[tuple[str, list[int]]]:
    path = folder / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{path}.inp").read_bytes().decode().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().split("\n")
    return [(text, [int(word) for word in line.split()]) for text, line in zip(texts, lines)]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_same_ids_as_llama_cpp_and_back(llama_cpp_models: Path, name: str) -> None:
    tokenizer = load(llama_cpp_models, name)
    expected = cases(llama_cpp_models, name)
    assert len(expected) >= 46
    for text, ids in expected:
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        shown = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert shown == tokenizer.decode(ids, skip_special_tokens=False)
        assert shown == text or name == "bert-bge"  # BERT's normaliser drops case, accents and spaces


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_vocabularies_without_a_pre_tokenizer_name_load(llama_cpp_models: Path, name: str) -> None:
    tokenizer = load(llama_cpp_models, name)
    text = "Hello world, 3 apples. Größe 世界"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokenizer.encode(text))


def test_beginning_and_end_tokens(llama_cpp_models: Path) -> None:
    llama3 = load(llama_cpp_models, "llama-bpe")
    assert llama3.bos_token_id == 128000
    assert llama3.encode("Hi") == [128000, *llama3.encode("Hi", add_special_tokens=False)]
    assert {128001, 128009} <= set(llama3.eos_token_ids)  # <|end_of_text|> and <|eot_id|>
    assert llama3.encode("<|eot_id|>", add_special_tokens=False) == [128009]
    assert 128009 not in llama3.encode("<|eot_id|>", add_special_tokens=False, parse_special=False)
    assert llama3.decode([128009]) == ""
    assert llama3.decode([128009], skip_special_tokens=False) == "<|eot_id|>"

    bert = load(llama_cpp_models, "bert-bge")
    assert bert.encode("hello") == [101, *bert.encode("hello", add_special_tokens=False), 102]
    assert bert.decode(bert.encode("Hello, world")) == "hello, world"

    command_r = load(llama_cpp_models, "command-r")
    assert isinstance(command_r.chat_template, dict)
    assert set(command_r.chat_template) == {"default", "tool_use", "rag"}


def test_sentence_piece_writes_the_first_space_only_behind_a_prompt(llama_cpp_models: Path) -> None:
    tokenizer = load(llama_cpp_models, "llama-spm")
    assert tokenizer.bos_token_id is not None
    output = tokenizer.encode("Paris is", add_special_tokens=False)
    assert tokenizer.decode(output) == "Paris is"

    def show(prompt: list[int]) -> str:
        detokenizer = Detokenizer(tokenizer, prompt_token_ids=prompt)
        return "".join(map(detokenizer.add, output)) + detokenizer.finish()

    assert show([]) == "Paris is"
    assert show([tokenizer.bos_token_id]) == "Paris is"
    assert show(tokenizer.encode("The answer:")) == " Paris is"
