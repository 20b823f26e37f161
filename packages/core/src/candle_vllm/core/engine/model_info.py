# SPDX-License-Identifier: MIT
"""What an engine says of its model and of its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec

from candle_vllm.core.shown import ShownStruct


class AdapterInfo(ShownStruct, frozen=True, kw_only=True):
    """An adapter that an engine knows.

    Attributes:
        name, path: as it was given.
        digest: SHA-256 of its files, as hexadecimal digits; empty until it was read.
        rank: the highest of its matrices.
        modules: how many matrices of the model it changes.
        delta_norm: Frobenius norm of all that it adds.
        nbytes: bytes in memory, now or when it was there last.
        state: "cold" on disk alone, "loading", "ready" in memory, "failed".
        pinned: stays in memory.
        base: the base that its files name.
        notes: what its files say that counts for nothing here, and the like.
        error: why it could not be loaded.
    """

    unshown: ClassVar[frozenset[str]] = frozenset({"digest", "notes"})

    name: str
    path: str
    digest: str = ""
    rank: int = 0
    modules: int = 0
    delta_norm: float = 0.0
    nbytes: int = 0
    state: Literal["cold", "loading", "ready", "failed"] = "cold"
    pinned: bool = False
    base: str | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


class ModelInfo(ShownStruct, frozen=True, kw_only=True):
    """What is served, for people and for `/v1/models`.

    Attributes:
        default_sampling: what counts where a request says nothing of it.
        model_sampling: what the model's files say of it, and how many tokens an answer has ("max_tokens").
        tasks: what the model does: "generate", "embed", "score", "classify".
        modalities: what it reads: "text", and "image" where it sees.
        max_images: of a prompt; 0 where it reads text alone.
        image_text: what its template writes for one; empty there.
        labels: names of what a classifier tells apart, or of a cross-encoder's score.
        embedding_size: length of its vectors; 0 where it gives none.
        pooling: how they, or what a head is given, are made of a text: "mean", "cls", "last"; "all", one of each token;
            "sparse", a weight of each token of the vocabulary.
        prompts: words that it wants before a text, by what the text is, as sentence-transformers' files name them.
        implementation: whose layers run, "native" or "transformers", and with "one sequence at a time" behind it where
            these keep a cache of their own.
        max_num_seqs: most sequences in one step.
        kv_cache_bytes: size of the KV cache when it is full, states of layers included; memory of a CPU is taken as it
            fills.
        state_bytes: bytes of these for states of layers and their checkpoints.
    """

    unshown: ClassVar[frozenset[str]] = frozenset(
        {
            "vocab_size",
            "weight_bytes",
            "eos_token_ids",
            "has_chat_template",
            "embedding_size",
            "implementation",
            "max_num_seqs",
            "kv_cache_bytes",
            "state_bytes",
            "model_sampling",
            "max_images",
            "image_text",
            "labels",
            "pooling",
            "prompts",
        }
    )

    name: str
    architecture: str
    num_parameters: int
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str
    quantization: str | None
    weight_bytes: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    default_sampling: Mapping[str, float | int]
    model_sampling: Mapping[str, float | int] = msgspec.field(default_factory=dict)
    tasks: tuple[str, ...] = ("generate",)
    modalities: tuple[str, ...] = ("text",)
    max_images: int = 0
    image_text: str = ""
    labels: tuple[str, ...] = ()
    embedding_size: int = 0
    pooling: str = ""
    prompts: Mapping[str, str] = msgspec.field(default_factory=dict)
    implementation: str = "native"
    max_num_seqs: int = 1
    kv_cache_bytes: int = 0
    state_bytes: int = 0
