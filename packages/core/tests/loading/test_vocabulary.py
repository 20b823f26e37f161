# SPDX-License-Identifier: MIT
"""A tokenizer with more tokens than the model has rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.loading.vocabulary import fit_tokenizer
from candle_vllm.core.testing.toy_model import SPECIAL_TOKENS, TOY_VOCAB_SIZE, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer

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
