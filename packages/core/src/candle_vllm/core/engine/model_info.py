# SPDX-License-Identifier: MIT
"""Information about an engine's model and its adapters, for callers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import msgspec

from candle_vllm.core.shown import ShownStruct


class AdapterInfo(ShownStruct, frozen=True, kw_only=True):
    """An adapter that an engine knows.

    Attributes:
        name, path: the name and path that it was registered with.
        digest: SHA-256 of its configuration and weights, as hexadecimal digits; empty before it was first loaded.
        rank: the highest rank of its matrices.
        modules: number of the model's matrices that it changes.
        delta_norm: Frobenius norm of all products B A times their scale; no replaced matrices, token rows or biases.
        nbytes: bytes in memory, now or when it was in memory last.
        state: "cold" (only on disk), "loading", "ready" (in memory) or "failed".
        pinned: whether it is never evicted from memory.
        base: the base model that its files name.
        notes: remarks on its files, such as settings that have no effect here.
        error: why its last load failed; None if it has not failed.
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
    """The served model, for people and for `/v1/models`.

    Attributes:
        default_sampling: values of sampling parameters that a request leaves out, without "max_tokens"; empty for a
            model that generates no text.
        model_sampling: the part of `default_sampling` from the model's own files, with "max_tokens" if they set it.
        tasks: what the model can do: "generate", "embed", "score", "classify".
        modalities: input types: "text", and "image" for a model with vision.
        max_images: maximum number of images of a prompt; 0 for a text-only model.
        image_text: the text that its chat template writes for an image; empty for a text-only model.
        labels: names of a classifier's classes, or of a cross-encoder's score.
        embedding_size: length of its vectors; 0 if it is not an embedding model.
        pooling: how hidden states are pooled to a vector, or to the input of a head: "mean", "weighted_mean", "cls",
            "last"; "all" for a vector of each token; "sparse" for a weight of each token of the vocabulary.
        pair_marks: number of special tokens around and between the two texts of a pair; 0 if it reads no pairs.
        prompts: instructions to prepend to a text, by purpose (`prompts` of sentence-transformers).
        implementation: "native" or "transformers", the library whose layers run; followed by "one sequence at a time"
            if these layers keep a cache of their own.
        max_num_seqs: maximum number of sequences in one step.
        kv_cache_bytes: size of the KV cache, states of layers included; on a CPU, memory is allocated as it fills.
        state_bytes: the part of the cache for recurrent states: of running sequences, and checkpoints of prefixes.
        index_bytes: memory outside the cache for the indexer of sparse attention: its scores and chosen positions.
        answer_window: see `ModelConfig`; tokens of an answer that are sent as a prompt then have other results.
    """

    unshown: ClassVar[frozenset[str]] = frozenset((
        "vocab_size", "weight_bytes", "eos_token_ids", "has_chat_template", "embedding_size", "implementation",
        "max_num_seqs", "kv_cache_bytes", "state_bytes", "index_bytes", "answer_window", "model_sampling", "max_images",
        "image_text", "labels", "pooling", "pair_marks", "prompts",
    ))  # fmt: skip

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
    pair_marks: int = 0
    prompts: Mapping[str, str] = msgspec.field(default_factory=dict)
    implementation: str = "native"
    max_num_seqs: int = 1
    kv_cache_bytes: int = 0
    state_bytes: int = 0
    index_bytes: int = 0
    answer_window: int | None = None
