# SPDX-License-Identifier: MIT
"""Open a model, before its weights are loaded: find its files, read their headers, load the tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from candle_vllm.core.config import EngineConfig, ModelImpl
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import ModelLoadError
from candle_vllm.core.fields import read_json
from candle_vllm.core.loading.gguf import check_kind, open_gguf
from candle_vllm.core.loading.source import ModelFiles
from candle_vllm.core.loading.tensors import Checkpoint, closed_on_error
from candle_vllm.core.loading.vocabulary import fit_tokenizer
from candle_vllm.core.memory import room_for
from candle_vllm.core.models.registry import tower_family
from candle_vllm.core.quantization.ggml_types import FILE_TYPES
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model's files and their contents.

    Attributes:
        checkpoint: the stored tensors of the text model.
        metadata: metadata of a GGUF file; empty for other formats.
        cache_scales: scales for an FP8 KV cache, by name.
        tower: tensors of a vision tower in the model's own folder; None without one, or if it is not supported.
    """

    files: ModelFiles
    checkpoint: Checkpoint
    metadata: Mapping[str, Any]
    cache_scales: Mapping[str, StoredTensor] = dataclasses.field(default_factory=dict)
    tower: Checkpoint | None = None


_TOKENIZER_BYTES, _TOKEN_BYTES = 16 << 20, 1 << 10  # estimated memory of a tokenizer, and of each of its tokens


def config_file(files: ModelFiles) -> Path:
    """Return the file with the model's config: config.json, or the GGUF file."""
    return files.weights[0] if files.format == "gguf" else files.config or files.folder


@contextmanager
def naming(source: object, *others: object) -> Iterator[None]:
    """Add `source` to the message of a loading error, unless the message names `source` or one of `others`."""
    try:
        yield
    except ModelLoadError as error:
        if any(str(name) in str(error) for name in (source, *others)):
            raise
        raise type(error)(f"{source}: {error}") from error


def open_model(files: ModelFiles, device: Device, impl: ModelImpl = "auto", *, is_draft_head: bool = False) -> Opened:
    """Open the files that `model_files` found; raises like `load_model`.

    `impl` chooses the layers for which the weights of a dummy are made. In safetensors files, the tensors of a draft
    head keep their names. For a GGUF file the modules for other formats are not imported, so that it loads faster.
    """
    with naming(config_file(files)), room_for(f"the file of {files.name}", 0):
        if files.format == "gguf":
            gguf = open_gguf(files.weights[0])
            with closed_on_error([gguf]):
                check_kind(gguf.metadata, gguf.path)
                if any(tensor.type_name == "NVFP4" for tensor in gguf.tensors.values()):
                    from candle_vllm.core.quantization.fp4 import with_scales

                    gguf = gguf.with_tensors(with_scales(gguf))
            return Opened(files, gguf, gguf.metadata)
        if files.format == "dummy":
            from candle_vllm.core.assembly.dummy import open_dummy

            assert files.config is not None
            return Opened(files, open_dummy(files.config, device, impl), {})
        from candle_vllm.core.assembly.cache_scales import split_cache_scales
        from candle_vllm.core.loading.quantised import read_quantised
        from candle_vllm.core.loading.safetensors import open_safetensors
        from candle_vllm.core.models.towers import split_towers
        from candle_vllm.core.models.trunks import prefixed

        stored = open_safetensors(files.folder)
        if files.config is None:
            return Opened(files, stored, {})
        with closed_on_error([stored]):
            config = read_json(files.config)
            if is_draft_head:
                return Opened(files, read_quantised(stored, config, files.config), {})
            text_model, tower = split_towers(config, stored)
            if tower is not None and tower_family(config) is None:
                left, tower = len(tower.tensors), None
                logger.info("%s: the vision tower (%d tensors) is not supported and not loaded", stored.path, left)
            tied = config.get("tie_word_embeddings") is not False  # Gemma's configs leave out the default, true
            named, scales = split_cache_scales(prefixed(text_model, tied=tied))
            return Opened(files, read_quantised(named, config, files.config), {}, scales, tower)


def open_tokenizer(config: EngineConfig, files: ModelFiles, metadata: Mapping[str, Any], rows: int) -> Tokenizer:
    """Load the tokenizer, and fit its vocabulary to the `rows` of the embedding table."""
    inside = files.format == "gguf" and config.tokenizer is None
    source = files.weights[0] if inside else config.tokenizer or files.tokenizer_folder or files.folder
    # The tokenizers library aborts the process if memory runs out, so the estimated memory is checked first.
    with naming(source), room_for(f"the tokenizer of {files.name}", _TOKENIZER_BYTES + rows * _TOKEN_BYTES):
        tokenizer = Tokenizer.from_gguf(metadata) if inside else Tokenizer.from_folder(source)
        return fit_tokenizer(tokenizer, rows, source)


def stored_types(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> str | None:
    """Return the stored types with counts, after the type that a GGUF file states; None if all are unquantised."""
    kinds = Counter(tensor.type_name for tensor in checkpoint.tensors.values())
    plain = {"F32", "F16", "BF16", "F64", "I64"}  # I64 tensors are buffers
    if set(kinds) <= plain:
        return None
    most = sorted(kinds.most_common(), key=lambda each: each[0] in plain)
    types = ", ".join(f"{kind} x {count}" for kind, count in most)
    named = FILE_TYPES.get(number) if isinstance(number := metadata.get("general.file_type"), int) else None
    return types if named in (None, most[0][0]) else f"{named} ({types})"
