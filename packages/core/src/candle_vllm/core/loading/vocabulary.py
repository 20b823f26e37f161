# SPDX-License-Identifier: MIT
"""Fit a model's tokenizer to the rows of its embedding table (loading, before step 3 of a request).

The vocabulary and the table often differ in size. Rows without a token are harmless, but a token without a row has no
embedding. Added tokens without a row (a padding token that was never trained) are removed, and their text is tokenized
as plain text. A model is refused if any other token, or a token that begins or ends texts, has no row.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.text.gguf_backend import refusing_panics
from candle_vllm.core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
SUPPRESSED = "tokenizer.ggml.suppress_tokens"  # key of GGUF metadata for `suppress_tokens` of generation_config.json


def fit_tokenizer(tokenizer: Tokenizer, rows: int, source: Path) -> Tokenizer:
    """Return a tokenizer that has exactly the ids below `rows`, the rows of the embedding table.

    The given one, from the file or folder `source`, may be changed. Raises InvalidFileError if a required token has no
    row.
    """
    if tokenizer.vocab_size > rows:
        tokenizer = _without_extra_tokens(tokenizer, tokenizer.vocab_size, rows, source)
    tokenizer.cover(rows)
    return tokenizer


def end_tokens(config: ModelConfig, generation: Fields, tokenizer: Tokenizer, source: Path) -> tuple[int, ...]:
    """Return the tokens that end a sequence, by `generation_config.json`, config and fitted tokenizer together.

    An id without a row can never be sampled: it is left out, and logged. `source` is the file of `config`, for logs.
    """
    named = [(generation.path, index) for index in generation.token_ids("eos_token_id", lowest=-1)]
    named += [(source, index) for index in config.eos_token_ids]
    last = config.vocab_size - 1
    for path, index in named:
        if not 0 <= index <= last:
            logger.warning("%s: eos_token_id %d is ignored: the model has the tokens 0 to %d", path, index, last)
    found = (index for _, index in named if 0 <= index <= last)
    return tuple(dict.fromkeys((*found, *tokenizer.eos_token_ids)))


def _without_extra_tokens(tokenizer: Tokenizer, size: int, rows: int, source: Path) -> Tokenizer:
    backend = tokenizer.backend
    sizes = f"{source}: the tokenizer has {size} token ids and the model's embedding has {rows} rows"
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    vocabulary = backend.get_vocab(with_added_tokens=False)
    extra = {text: index for text, index in vocabulary.items() if index >= rows and text not in added}
    if extra:
        raise InvalidFileError(
            f"{sizes}; {len(extra)} tokens of the vocabulary have no row (the first is {min(extra.values())}): the "
            "tokenizer belongs to another model"
        )
    framing = [text for name, text in tokenizer.special_tokens.items() if name in ("bos_token", "eos_token")]
    needed = [tokenizer.bos_token_id, *map(backend.token_to_id, framing)]
    _check_rows([index for index in needed if index is not None], rows, f"{sizes}; a token that begins or ends texts")
    kept = _remove_added(backend, rows, source)
    _check_rows(kept.encode("").ids, rows, f"{sizes}; a token that is added to every text")
    names = {name: text for name, text in tokenizer.special_tokens.items() if kept.token_to_id(text) is not None}
    logger.warning("%s; the added tokens from %d on are read as plain text", sizes, rows)
    return Tokenizer(
        kept,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=[index for index in tokenizer.eos_token_ids if index < rows],
        special_tokens=names,
        chat_template=tokenizer.chat_template,
        response_template=tokenizer.response_template,
        types_pairs=tokenizer.types_pairs,
        named_ids={name: index for name, index in tokenizer.named_ids.items() if index < rows},
    )


def _remove_added(backend: Backend, rows: int, source: Path) -> Backend:
    """Copy the backend without the added tokens from `rows` on; the library cannot remove tokens from a tokenizer."""
    data = json.loads(backend.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < rows]
    model = data["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {text: index for text, index in model["vocab"].items() if index < rows}
    with refusing_panics(str(source)):
        return Backend.from_str(json.dumps(data))


def _check_rows(ids: Iterable[int], rows: int, what: str) -> None:
    beyond = [index for index in ids if index >= rows]
    if beyond:
        raise InvalidFileError(f"{what} is {beyond[0]}, and the model has only the tokens 0 to {rows - 1}")
