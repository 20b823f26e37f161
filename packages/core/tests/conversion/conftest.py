# SPDX-License-Identifier: MIT
"""A tokenizer with merges, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer with a few merges and Qwen2's cut: the toy models' own has none."""
    folder = tmp_path_factory.mktemp("words")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e")]  # with them the end token is 258, as the tiny models' configs have it
    vocabulary = {text: index for index, text in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].patterns[0]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, spelling])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["<tool>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}')
    return folder
