"""A model's own description, read once and strictly into frozen dataclasses.

`config.json` and GGUF metadata are read through `Fields`, which names the file and the key in every error. Each model
family turns them into one `ModelConfig` (see `models/`), and nothing later looks at the files again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError

T = TypeVar("T", int, float, bool, str, list, dict)

MAX_CONFIG_BYTES = 16 << 20
MAX_COUNT = 1 << 24
"""Most tokens, rows, columns or heads that a config may name."""

MAX_LAYERS = 4096
_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Values that cannot be computed with are an `InvalidFileError`.

    Attributes:
        theta: base of the frequencies.
        dim: how many of a head's dimensions rotate.
        kind: default, linear, dynamic, llama3 or yarn.
        factor: by how much the context is stretched.
        original_max_position: context before stretching, in tokens.
        low_freq_factor, high_freq_factor: llama3's band limits, in turns over the original context.
        beta_fast, beta_slow: yarn's band limits, in turns over the original context.
        attention_factor: yarn's scale of cos and sin; None derives it from `factor`.
        truncate: yarn rounds its band limits to whole dimensions.
    """

    theta: float = 10000.0
    dim: int = 64
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        smallest = 4 if self.kind == "dynamic" else 2  # its exponent is dim / (dim - 2)
        if not smallest <= self.dim <= 1024 or self.dim % 2:
            raise InvalidFileError(
                f"{self.dim} rotary dimensions are not possible: {self.kind} rotary positions need an even number "
                f"from {smallest} to 1024"
            )
        self._check("base (rope_theta)", self.theta, 1, 1e30)
        if not 1 <= self.factor <= MAX_COUNT:
            raise InvalidFileError(f"the rotary factor is {self.factor}; it must be 1 to {MAX_COUNT}")
        if not 1 <= self.original_max_position <= MAX_COUNT:
            raise InvalidFileError(
                f"the context before stretching is {self.original_max_position} tokens; it must be 1 to {MAX_COUNT}"
            )
        if self.kind == "llama3":
            self._check("low_freq_factor", self.low_freq_factor, 0, 1e6)
            self._check("high_freq_factor", self.high_freq_factor, self.low_freq_factor, 1e6)
        if self.kind == "yarn":
            self._check("beta_slow", self.beta_slow, 0, 1e6)
            self._check("beta_fast", self.beta_fast, self.beta_slow, 1e6)
            if self.attention_factor is not None:
                self._check("attention_factor", self.attention_factor, 0, 1e6)

    def _check(self, name: str, value: float, low: float, high: float) -> None:
        if not low < value <= high:  # NaN is not within either
            raise InvalidFileError(f"the rotary {name} is {value}; it must be above {low:g} and at most {high:g}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the engine and the layers need to know of a decoder.

    Attributes:
        model_type: Hugging Face's name of the family.
        vocab_size: rows of the embedding table (the tokenizer may know fewer).
        max_position: longest context, scaling included.
        sliding_windows: per layer, how many tokens back a query sees, itself included; None sees all.
        qk_norm: q and k are RMS-normalised per head before rotation.
        eos_token_ids: as far as the config names them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidFileError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key-value heads")
        if not 0 < self.head_dim <= 1024 or self.rope.dim > self.head_dim:
            raise InvalidFileError(f"head size {self.head_dim} with {self.rope.dim} rotary dimensions is not possible")
        if not 0 < self.max_position <= MAX_COUNT:
            raise InvalidFileError(
                f"the model's config says its context is {self.max_position} tokens; at most {MAX_COUNT} are possible"
            )
        if not 0 < self.vocab_size <= MAX_COUNT:
            raise InvalidFileError(f"the model has {self.vocab_size} tokens; it must have 1 to {MAX_COUNT}")
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"the model's config says the epsilon of its norms is {self.norm_eps}")
        for window in self.sliding_windows:
            if window is not None and not 0 < window <= MAX_COUNT:
                raise InvalidFileError(
                    f"the model's config says its sliding window is {window} tokens; it must be 1 to {MAX_COUNT}"
                )
        assert len(self.sliding_windows) == self.num_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What the engine and the layers need to know of an encoder, which reads a text whole and in both directions.

    Attributes:
        model_type: Hugging Face's name of the family.
        vocab_size: rows of the embedding table.
        max_position: longest text, in tokens.
        first_position: row of the position table for a text's first token (RoBERTa's begin behind the padding token).
        token_types: rows of the table that tells a pair's texts apart; 1 where a model does not.
        activation: of the feed-forward layer.
        scores: the model is a cross-encoder, whose head gives one number for a text or pair.
        sigmoid: that number is brought to 0..1.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position: int
    norm_eps: float
    first_position: int = 0
    token_types: int = 1
    activation: str = "gelu"
    scores: bool = False
    sigmoid: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InvalidFileError(f"hidden states of {self.hidden_size} cannot be cut into {self.num_heads} heads")
        if not 0 < self.max_position <= MAX_COUNT:
            raise InvalidFileError(f"the model's config leaves room for texts of {self.max_position} tokens")
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"the model's config says the epsilon of its norms is {self.norm_eps}")


class Fields:
    """Typed access to a mapping from a file.

    Args:
        values: the mapping.
        path: the file, for messages.
        prefix: put before every key (GGUF keys begin with the architecture).
    """

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(self.prefix + key) is not None

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """The value of `key`, which must be of `kind` (a float: finite); `default` where it is absent or null."""
        value = self.values.get(self.prefix + key)
        if value is None:
            if default is _REQUIRED:
                raise InvalidFileError(f"{self.path}: {self.prefix + key} is missing")
            return default
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            value = self._finite(key, value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.80}, not a {kind.__name__}")
        return value

    def _finite(self, key: str, value: float) -> float:
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond 1.8e308
            number = math.inf
        if not math.isfinite(number):
            raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.40}, not a finite number")
        return number

    def count(self, key: str, default: Any = _REQUIRED, *, most: int = MAX_COUNT) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, int, default)
        if value is not default and not 0 < value <= most:
            raise InvalidFileError(f"{self.path}: {self.prefix + key} is {value!r:.40}; it must be 1 to {most}")
        return value

    def choice(self, key: str, default: str, *allowed: str) -> str:
        """A text that must be one of `allowed`."""
        value = self.get(key, str, default)
        if value not in allowed:
            raise UnsupportedModelError(
                f"{self.path}: {self.prefix + key} is {value!r}; implemented: {', '.join(allowed)}"
            )
        return value

    def section(self, key: str) -> Fields:
        """A nested mapping; empty where absent."""
        return Fields(self.get(key, dict, {}), self.path)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id, from 0 to 2^24, or a list of them, as a tuple."""
        value = self.values.get(self.prefix + key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_COUNT for item in ids):
            raise InvalidFileError(
                f"{self.path}: {self.prefix + key} is {value!r:.80}, not a token id or a list of them"
            )
        return tuple(ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most 16 MiB."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidFileError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidFileError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidFileError(f"{path}: holds no JSON object")
    return value


def rope_from_hf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    nested = fields.section("rope_parameters") if "rope_parameters" in fields else fields.section("rope_scaling")
    kind = nested.get("rope_type", str, nested.get("type", str, "default"))
    theta = nested.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    partial = nested.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UnsupportedModelError(
            f"{fields.path}: rope_type is {kind!r}; implemented: default, linear, dynamic, llama3, yarn"
        )
    if not 0 < partial <= 1:
        raise InvalidFileError(f"{fields.path}: partial_rotary_factor is {partial}; it must be above 0 and at most 1")
    attention_factor = nested.get("attention_factor", float, None)
    if kind == "yarn" and attention_factor is None and "mscale" in nested:
        raise UnsupportedModelError(f"{fields.path}: yarn with mscale is not implemented for this model")
    return RopeConfig(
        theta=theta,
        dim=int(head_dim * partial),
        kind=kind,
        factor=nested.get("factor", float, 1.0) if kind == "default" else nested.get("factor", float),
        original_max_position=nested.get("original_max_position_embeddings", int, max_position),
        low_freq_factor=nested.get("low_freq_factor", float, 1.0),
        high_freq_factor=nested.get("high_freq_factor", float, 4.0),
        beta_fast=nested.get("beta_fast", float, 32.0),
        beta_slow=nested.get("beta_slow", float, 1.0),
        attention_factor=attention_factor,
        truncate=nested.get("truncate", bool, True),
    )


def rope_from_gguf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Reads `<arch>.rope.*`. Llama 3's scaling is not here: it comes as the tensor `rope_freqs.weight`."""
    kind = {"none": "default"}.get(name := fields.get("rope.scaling.type", str, "none"), name)
    if kind not in ("default", "linear", "yarn"):
        raise UnsupportedModelError(f"{fields.path}: rope scaling {kind!r} is not implemented")
    return RopeConfig(
        theta=fields.get("rope.freq_base", float, 10000.0),
        dim=fields.get("rope.dimension_count", int, head_dim),
        kind=kind,
        factor=fields.get("rope.scaling.factor", float, 1.0),
        original_max_position=fields.get("rope.scaling.original_context_length", int, max_position),
        beta_fast=fields.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=fields.get("rope.scaling.yarn_beta_slow", float, 1.0),
        attention_factor=fields.get("rope.scaling.attn_factor", float, None),
    )


def stretched_context(rope: RopeConfig, max_position: int) -> int:
    """The context that a scaled rotary embedding reaches; llama3's configs name it themselves."""
    if rope.kind in ("linear", "dynamic"):
        return int(max_position * rope.factor)
    if rope.kind == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position
