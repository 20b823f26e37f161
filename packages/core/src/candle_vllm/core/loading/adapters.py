"""Reads adapters (LoRA) as files hold them: a PEFT folder, or one GGUF file; nothing here knows the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from candle_vllm.core.quantization.tensors import StoredTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLimits:
    """What an adapter may take; looked at before its weights are read.

    Attributes:
        max_rank: the largest rank of a matrix.
        max_bytes: of its weights.
    """

    max_rank: int = 256
    max_bytes: int = 4 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What an adapter says about itself.

    Attributes:
        scale: of a module's product, by the module's name in the file and its rank r.
        bias: which biases were trained: "none", "all" or "lora_only".
        dora: magnitudes are stored.
        tied: what is said of the embedding table holds for a head that is the same matrix.
        trained_tokens: rows of tables that were trained, by the module's name; "" stands for the embedding table.
        targets: parameters that are no modules, as `target_parameters` names them.
    """

    scale: Callable[[str, int], float]
    bias: str = "none"
    dora: bool = False
    tied: bool = False
    trained_tokens: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredAdapter:
    """An adapter as its files hold it, mapped and lazy.

    Attributes:
        path: the folder or the file.
        format: "peft" or "gguf": whose names the tensors bear.
        config: what it says about itself.
        tensors: by name; PEFT's "base_model.model." is left off.
        digest: SHA-256 of the configuration's and the weights' bytes.
        alora: tokens from whose last occurrence on it acts; None: on all of a sequence.
        base: the model that it was trained for, as the files name it.
        notes: what an operator should know: keys that nobody here knows, what was not compared.
    """

    path: Path
    format: Literal["peft", "gguf"]
    config: AdapterConfig
    tensors: Mapping[str, StoredTensor]
    digest: bytes
    alora: tuple[int, ...] | None = None
    base: str | None = None
    notes: tuple[str, ...] = ()
