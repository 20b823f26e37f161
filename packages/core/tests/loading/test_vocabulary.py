# SPDX-License-Identifier: MIT
"""A tokenizer with more tokens than the model has rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.vocabulary import fit_tokenizer
from candle_vllm.core.testing.toy_model import SPECIAL_TOKENS, TOY_VOCAB_SIZE, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.toy_gguf import write_toy_gguf

TOKENS = 256 + len(SPECIAL_TOKENS)


def folder_with(folder: Path, *added: str, vocabulary: dict[str, int] | None = None, **config: Any) -> Path:
    """The toy's tokenizer with more added tokens, and with more keys in tokenizer_config.json."""
    write_toy_model(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    data["added_tokens"] += [{"id": TOKENS + i, "content": text, **flags} for i, text in enumerate(added)]
    data["model"]["vocab"] |= vocabulary or {}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


def fit(folder: Path, rows: int) -> Tokenizer:
    return fit_tokenizer(Tokenizer.from_folder(folder), rows, folder)


def test_rows_without_a_token_are_covered(tmp_path: Path) -> None:
    tokenizer = fit(write_toy_model(tmp_path), TOY_VOCAB_SIZE)
    assert tokenizer.vocab_size == TOY_VOCAB_SIZE
    assert tokenizer.decode([TOY_VOCAB_SIZE - 1]) == ""


def test_added_tokens_without_a_row_become_plain_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = folder_with(tmp_path, "<kept>", "<lost>", pad_token="<lost>")
    assert Tokenizer.from_folder(folder).encode("<lost>") == [TOKENS + 1]
    with caplog.at_level(logging.WARNING):
        tokenizer = fit(folder, TOKENS + 1)
    assert f"has {TOKENS + 2} token ids and the model's embedding has {TOKENS + 1} rows" in caplog.text
    assert tokenizer.vocab_size == TOKENS + 1
    assert tokenizer.encode("<kept>") == [TOKENS]
    ids = tokenizer.encode("a<lost>b")
    assert max(ids) < 256
    assert tokenizer.decode(ids) == "a<lost>b"
    assert "pad_token" not in tokenizer.special_tokens
    assert tokenizer.chat_template == Tokenizer.from_folder(folder).chat_template
    assert tokenizer.eos_token_ids[0] == 258


def test_a_pairs_token_types_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "<lost>", model_input_names=["input_ids", "attention_mask"])
    assert Tokenizer.from_folder(folder).encode_pair("a", "b")[1] == [0, 0]
    assert fit(folder, TOKENS).encode_pair("a", "b")[1] == [0, 0]


def test_an_added_token_may_stand_in_the_vocabulary_too(tmp_path: Path) -> None:
    """As of GGUF files, and of tokenizers that were saved anew with a padding token."""
    names = {text: 256 + index for index, text in enumerate([*SPECIAL_TOKENS, "[PAD]"])}
    folder = folder_with(tmp_path, "[PAD]", vocabulary=names, pad_token="[PAD]")
    assert Tokenizer.from_folder(folder).encode("[PAD]") == [TOKENS]
    ids = fit(folder, TOKENS).encode("a[PAD]b")
    assert max(ids) < 256
    assert fit(folder, TOKENS).decode(ids) == "a[PAD]b"


def test_a_gguf_vocabulary_with_one_token_too_many(tmp_path: Path) -> None:
    with open_gguf(write_toy_gguf(tmp_path / "m.gguf")) as checkpoint:
        metadata = dict(checkpoint.metadata)
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata |= {"tokenizer.ggml.fim_pre_token_id": 97, "tokenizer.ggml.fim_suf_token_id": 98}
    more = {"tokens": "[PAD]", "token_type": 3}
    added = {key: [*metadata[key], value] for name, value in more.items() for key in [f"tokenizer.ggml.{name}"]}
    tokenizer = Tokenizer.from_gguf({**metadata, **added, "tokenizer.ggml.padding_token_id": size})
    assert tokenizer.encode("[PAD]") == [size]
    fitted = fit_tokenizer(tokenizer, size, tmp_path)
    assert fitted.vocab_size == size
    assert size not in fitted.encode("a[PAD]b")
    assert fitted.decode(fitted.encode("a[PAD]b")) == "a[PAD]b"
    assert fitted.eos_token_ids == tuple(index for index in tokenizer.eos_token_ids if index < size)
    assert fitted.infill is not None
    assert fitted.infill == tokenizer.infill


def test_a_vocabulary_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, vocabulary={"zz": 300})
    with pytest.raises(
        InvalidFileError, match=r"has 301 token ids and the model's embedding has 272 rows.*first is 300"
    ):
        fit(folder, TOY_VOCAB_SIZE)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_token_that_frames_texts_is_needed(name: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {name: "<frame>"}
    folder = folder_with(tmp_path, "<frame>", **config)
    with pytest.raises(InvalidFileError, match=f"{TOKENS} rows; a token that begins or ends texts is {TOKENS}"):
        fit(folder, TOKENS)
    assert fit(folder, TOKENS + 1).vocab_size == TOKENS + 1
