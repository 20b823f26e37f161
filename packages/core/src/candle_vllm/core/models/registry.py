"""Which family serves which architecture. One row per name that a checkpoint may carry."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import EncoderConfig, Fields, ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models import bert, llama

Row = TypeVar("Row")


class Decoder(Protocol):
    """What the engine needs of a model."""

    config: ModelConfig

    def prepare(self, positions: int) -> None:
        """Makes the tables for positions below `positions`, at most the config's; the first step makes them else."""
        ...

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Token ids [T] to hidden states [T, E]."""
        ...

    def logits(self, hidden: Value, out: torch.Tensor | None = None) -> Value:
        """Hidden states [T, E] to scores [T, V] in fp32; into `out` where it is given."""
        ...


class Encoder(Protocol):
    """What the engine needs of a model that reads texts whole; see `models/bert.py`."""

    config: EncoderConfig

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, types: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Token ids [T] of texts behind each other to hidden states [T, E] in fp32."""
        ...

    def scores(self, first: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, E] of the texts' first tokens to scores [R] in fp32; of a cross-encoder."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """How to read, build and fill the models of one file in this folder."""

    config_from_hf: Callable[[Fields, str], ModelConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], ModelConfig]
    build: Callable[[ModelConfig, Placement, Checkpoint], Decoder]
    weights: Sequence[WeightName]
    ignored: Callable[[ModelConfig], Sequence[str]]


_LLAMA = Family(llama.config_from_hf, llama.config_from_gguf, llama.Llama, llama.WEIGHTS, llama.ignored)

# Hugging Face class -> family, and the model_type by whose rules its config.json is read
HF_FAMILIES: Mapping[str, tuple[Family, str]] = {
    "LlamaForCausalLM": (_LLAMA, "llama"),
    "MistralForCausalLM": (_LLAMA, "mistral"),
    "Qwen2ForCausalLM": (_LLAMA, "qwen2"),
    "Qwen3ForCausalLM": (_LLAMA, "qwen3"),
}
GGUF_FAMILIES: Mapping[str, Family] = {"llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}
GGUF_INTERLEAVED = frozenset({"llama"})  # architectures whose q and k rows GGUF stores in interleaved rotary order


@dataclasses.dataclass(frozen=True)
class EncoderFamily:
    """How to read, build and fill the encoders of one file in this folder."""

    config_from_hf: Callable[..., EncoderConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], EncoderConfig]
    build: Callable[[EncoderConfig, Placement], Encoder]
    weights: Callable[[EncoderConfig, Iterable[str]], Sequence[WeightName]]
    ignored: Callable[[EncoderConfig], Sequence[str]]


_BERT = EncoderFamily(bert.config_from_hf, bert.config_from_gguf, bert.Bert, bert.weights, bert.ignored)

# Hugging Face class -> family, model_type, and whether it has a head for scores
HF_ENCODERS: Mapping[str, tuple[EncoderFamily, str, bool]] = {
    "BertModel": (_BERT, "bert", False),
    "BertForSequenceClassification": (_BERT, "bert", True),
    "RobertaModel": (_BERT, "roberta", False),
    "RobertaForSequenceClassification": (_BERT, "roberta", True),
    "XLMRobertaModel": (_BERT, "xlm-roberta", False),
    "XLMRobertaForSequenceClassification": (_BERT, "xlm-roberta", True),
}
GGUF_ENCODERS: Mapping[str, EncoderFamily] = {"bert": _BERT}


def encoder_from_hf(config: Mapping[str, Any], path: Path) -> tuple[EncoderFamily, EncoderConfig] | None:
    """The family and configuration of a `config.json`, if it describes an encoder."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    row = HF_ENCODERS.get(name) if isinstance(name, str) else None
    if row is None:
        return None
    family, model_type, scores = row
    return family, family.config_from_hf(Fields(config, path), model_type, scores=scores)


def encoder_from_gguf(
    metadata: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[EncoderFamily, EncoderConfig] | None:
    """The family and configuration of GGUF metadata, if it describes an encoder."""
    name = metadata.get("general.architecture")
    family = GGUF_ENCODERS.get(name) if isinstance(name, str) else None
    if family is None:
        return None
    return family, family.config_from_gguf(Fields(metadata, checkpoint.path, prefix=f"{name}."), checkpoint)


def family_from_hf(config: Mapping[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    """The family and configuration of a `config.json`."""
    names = Fields(config, path).get("architectures", list)
    if len(names) != 1 or not isinstance(names[0], str):
        raise InvalidFileError(f"{path}: architectures must name one model class, not {names!r:.80}")
    family, model_type = _find(names[0], HF_FAMILIES, path, HF_ENCODERS)
    return family, family.config_from_hf(Fields(config, path), model_type)


def family_from_gguf(metadata: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Family, ModelConfig]:
    """The family and configuration of GGUF metadata."""
    name = Fields(metadata, checkpoint.path).get("general.architecture", str)
    family = _find(name, GGUF_FAMILIES, checkpoint.path, GGUF_ENCODERS)
    return family, family.config_from_gguf(Fields(metadata, checkpoint.path, prefix=f"{name}."), checkpoint)


def gguf_heads(metadata: Mapping[str, Any], config: ModelConfig) -> Mapping[str, int]:
    """Head counts by which q and k rows must be brought back to half-split order; empty where they already are."""
    if metadata.get("general.architecture") not in GGUF_INTERLEAVED:
        return {}
    return {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}


def _find(name: str, families: Mapping[str, Row], path: Path, encoders: Iterable[str]) -> Row:
    """The row of a name; `encoders` are what else there is, for the message."""
    if name in families:
        return families[name]
    known = [*families, *encoders]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (the nearest is {near[0]})" if near else ""
    raise UnsupportedModelError(
        f"{path}: architecture {name!r:.80} is not implemented{hint}; implemented: {', '.join(known)}"
    )
