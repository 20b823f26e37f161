# SPDX-License-Identifier: MIT
"""GGUF metadata of Qwen4: the config from a file, and the keys of a file, as in llama.cpp's `qwen4exp`.

A file has at most one layer with n-grams, and gates of delta nets are sigmoids.
"""

from __future__ import annotations

from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models import qwen3_next_config
from candle_vllm.core.models.local_layers import listed
from candle_vllm.core.models.ngram_hash import MOST_HEADS, MOST_SPAN, NGramHash, NGrams
from candle_vllm.core.models.ngram_table import GGUF_TABLE
from candle_vllm.core.models.qwen3_next_config import Qwen3NextConfig
from candle_vllm.core.models.qwen4_exp_config import Qwen4ExpConfig, qwen4_config


def config_from_gguf(fields: Fields, checkpoint: Checkpoint) -> Qwen4ExpConfig:
    """Read GGUF metadata of qwen4exp."""
    base, at = qwen3_next_config.config_from_gguf(fields, checkpoint), "attention.indexer."
    ratios = listed(fields, "attention.compress_ratios", base.num_layers, 0)
    pools = [ratio for layer, ratio in enumerate(ratios) if layer not in base.delta_layers]
    if not pools or not all(type(pool) is int and 0 < pool == pools[0] for pool in pools):
        raise UnsupportedModelError(
            f"{fields.path}: {fields.prefix}attention.compress_ratios is {ratios!r:.80}: attention without an indexer, "
            "or with groups of several sizes, is not implemented"
        )
    return qwen4_config(
        fields,
        base,
        index=(fields.count(f"{at}head_count"), fields.count(f"{at}key_length"), fields.count(f"{at}top_k"), pools[0]),
        streams=fields.count("hyper_connection.count"),
        mix_rank=fields.count("hyper_connection.low_rank"),
        gate="sigmoid",
        ngrams=_ngrams(fields, base, checkpoint),
    )


def _ngrams(fields: Fields, config: Qwen3NextConfig, checkpoint: Checkpoint) -> NGrams | None:
    layers = fields.get("ple.layers", list, [])
    if not layers:
        return None
    if len(layers) != 1 or type(layers[0]) is not int or layers[0] not in config.delta_layers:
        raise InvalidFileError(
            f"{fields.path}: {fields.prefix}ple.layers is {layers!r:.80}, not one layer with a delta net"
        )
    longest, taps = fields.count("ple.ngram_size", most=MOST_SPAN), fields.count("ple.conv_kernel", most=MOST_SPAN)
    heads = (longest - 1) * fields.count("ple.heads_per_ngram", most=MOST_HEADS)
    names = ("layer_multipliers", "head_vocab_sizes", "head_offsets")
    factors, sizes, offsets = (_numbers(fields, f"ple.{name}") for name in names)
    stored = checkpoint.tensors.get(GGUF_TABLE)
    rows = stored.shape[0] if stored is not None and stored.shape else 0
    if (len(factors), len(sizes), len(offsets)) != (longest, heads, heads) or heads < 1 or min(sizes) < 1:
        raise InvalidFileError(f"{fields.path}: {fields.prefix}ple.{', '.join(names)} do not fit {heads} heads")
    if any(offset + size > rows for offset, size in zip(offsets, sizes, strict=True)):
        raise InvalidFileError(f"{fields.path}: {GGUF_TABLE} has {rows} rows, too few for its hashes")
    hashes = {layers[0]: NGramHash(factors, sizes, offsets, fields.get("ple.eos_token_id", int))}
    size = heads * fields.count("embedding_length_per_layer_input")
    return NGrams(size, longest, taps, hashes, {layers[0]: rows}).checked(fields, config.vocab_size)


def _numbers(fields: Fields, key: str) -> tuple[int, ...]:
    values = fields.get(key, list)
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        raise InvalidFileError(f"{fields.path}: {fields.prefix + key} is {values!r:.80}, not whole numbers")
    return tuple(values)


def require_gguf(config: Any) -> dict[str, Any]:
    """Return no fields for `Architecture.otherwise`.

    Raises:
        UnsupportedModelError: llama.cpp does not support several layers with n-grams, or other gates than sigmoids.
    """
    several = config.ngrams is not None and len(config.ngrams.hashes) > 1
    lacks = ["several layers with n-grams"] * several
    lacks += [f"output_gate_type {config.gate}"] * (config.gate != "sigmoid")
    if lacks:
        raise UnsupportedModelError(
            f"llama.cpp's qwen4exp does not support {', '.join(lacks)}; serve it from its folder with `isq` to "
            "quantise it"
        )
    return {}


def gguf_keys(config: Any) -> dict[str, Any]:
    """The metadata in addition to that of every model."""
    at, ngrams = "attention.indexer.", config.ngrams
    pools = [0 if layer in config.delta_layers else config.index_pool for layer in range(config.num_layers)]
    keys = qwen3_next_config.qwen35_keys(config) | {
        "hyper_connection.count": config.streams,
        "hyper_connection.low_rank": config.mix_rank,
        f"{at}head_count": config.index.heads,
        f"{at}key_length": config.index.nope,
        f"{at}top_k": config.index_top - config.index_pool + 1,
        "attention.compress_ratios": pools,
    }
    if ngrams is None:
        return keys
    ((layer, hashes),) = ngrams.hashes.items()
    heads = len(hashes.sizes)
    return keys | {
        "ple.layers": [layer],
        "ple.ngram_size": ngrams.longest,
        "ple.heads_per_ngram": heads // (ngrams.longest - 1),
        "ple.conv_kernel": ngrams.taps,
        "ple.eos_token_id": hashes.eos,
        "embedding_length_per_layer_input": ngrams.size // heads,
        "ple.layer_multipliers": list(hashes.factors),
        "ple.head_vocab_sizes": list(hashes.sizes),
        "ple.head_offsets": list(hashes.offsets),
    }
