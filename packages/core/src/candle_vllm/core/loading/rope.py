# SPDX-License-Identifier: MIT
"""Configuration of rotary position embedding: `rope_parameters` or `rope_scaling`, and GGUF's `rope.*`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Invalid values raise `InvalidFileError`.

    Attributes:
        theta: base of the frequencies.
        dim: number of a head's dimensions that are rotated.
        kind: default, linear, dynamic, llama3, yarn, longrope or proportional.
        rotated: for kind proportional, how many of the `dim` dimensions are rotated; the other frequencies are 0.
        factor: factor by which the context is extended.
        original_max_position: context length before scaling, in tokens.
        low_freq_factor, high_freq_factor: llama3's band limits, in rotations over the original context.
        beta_fast, beta_slow: yarn's band limits, in rotations over the original context.
        attention_factor: scale of cos and sin of yarn and longrope; None computes it from `factor` and the next two.
        mscale, mscale_all_dim: shares of that scale for cos and sin, and for the attention scores.
        truncate: yarn rounds its band limits to whole dimensions.
        query_scale: coefficient of the growth of queries beyond the original context: see `layers/rotary.py`.
        short_factor, long_factor: longrope's divisors of frequencies [dim / 2], within the original context and beyond.
        axes: for each of the dim / 2 frequencies, whether a token's time (0), height (1) or width (2) rotates it
            (M-RoPE); empty if one position rotates all frequencies.
    """

    theta: float = 10000.0
    dim: int = 64
    kind: str = "default"
    rotated: int = 0
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    query_scale: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        smallest = 4 if self.kind == "dynamic" else 2  # the exponent of dynamic scaling is dim / (dim - 2)
        if not smallest <= self.dim <= 1024 or self.dim % 2:
            raise InvalidFileError(
                f"{self.dim} rotary dimensions are not possible: {self.kind} rotary positions need an even number "
                f"from {smallest} to 1024"
            )
        self._check("base (rope_theta)", self.theta, 1, 1e30)
        if not 0 <= self.query_scale <= 1e6:
            raise InvalidFileError(f"the growth of queries (llama_4_scaling_beta) is {self.query_scale}, not 0 to 1e6")
        if not 1 <= self.factor <= MAX_COUNT:
            raise InvalidFileError(f"the rotary factor is {self.factor}; it must be 1 to {MAX_COUNT}")
        if not 1 <= self.original_max_position <= MAX_COUNT:
            raise InvalidFileError(
                f"the context before stretching is {self.original_max_position} tokens; it must be 1 to {MAX_COUNT}"
            )
        if self.kind == "llama3":
            self._check("low_freq_factor", self.low_freq_factor, 0, 1e6)
            if not self.low_freq_factor <= self.high_freq_factor <= 1e6:  # Llama 4's are equal
                low, high = self.low_freq_factor, self.high_freq_factor
                raise InvalidFileError(f"the rotary high_freq_factor is {high}; it must be between {low} and 1e6")
        if self.kind == "yarn":
            self._check("beta_slow", self.beta_slow, 0, 1e6)
            if not self.beta_slow <= self.beta_fast <= 1e6:  # Kimi-K2's are equal
                raise InvalidFileError(
                    f"the rotary beta_fast is {self.beta_fast}; it must be beta_slow, {self.beta_slow:g}, to 1e6"
                )
            for name, value in (("mscale", self.mscale), ("mscale_all_dim", self.mscale_all_dim)):
                if value is not None and not 0 <= value <= 1e6:
                    raise InvalidFileError(f"the rotary {name} is {value}; it must be 0 to 1e6")
        if self.kind == "longrope":
            self._check("context before stretching", self.original_max_position, 1, MAX_COUNT)
            self._check_divisors("short_factor", self.short_factor)
            self._check_divisors("long_factor", self.long_factor)
        if self.kind in ("yarn", "longrope") and self.attention_factor is not None:
            self._check("attention_factor", self.attention_factor, 0, 1e6)

    def _check(self, name: str, value: float, low: float, high: float) -> None:
        if not low < value <= high:  # NaN is refused too
            raise InvalidFileError(f"the rotary {name} is {value}; it must be above {low:g} and at most {high:g}")

    def _check_divisors(self, name: str, values: tuple[Any, ...]) -> None:
        """Check longrope's divisors, which may have any type in a file."""
        if len(values) != self.dim // 2:
            raise InvalidFileError(
                f"the rotary {name} has {len(values)} numbers; it must have {self.dim // 2}, one for each pair of the "
                f"{self.dim} rotary dimensions"
            )
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
                raise InvalidFileError(
                    f"the rotary {name} holds {value!r:.40}; its numbers must be above 0 and at most 1e6"
                )


def rope_from_hf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (earlier versions)."""
    nested = fields.section("rope_parameters") if "rope_parameters" in fields else fields.section("rope_scaling")
    named = {"su": "longrope", "mrope": "default"}
    kind = named.get(name := nested.get("rope_type", str, nested.get("type", str, "default")), name)
    theta = nested.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    partial = nested.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    kinds = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
    if kind not in kinds:
        raise UnsupportedModelError(f"{fields.path}: rope_type is {kind!r}; implemented: {', '.join(kinds)}")
    if not 0 < partial <= 1:
        raise InvalidFileError(f"{fields.path}: partial_rotary_factor is {partial}; it must be above 0 and at most 1")
    if kind == "longrope":
        return _longrope(fields, nested, theta, int(head_dim * partial), max_position)
    return RopeConfig(
        theta=theta,
        dim=head_dim if kind == "proportional" else int(head_dim * partial),
        kind=kind,
        rotated=2 * int(head_dim * partial / 2) if kind == "proportional" else 0,
        factor=nested.get("factor", float, *([1.0] if kind in ("default", "proportional") else [])),
        original_max_position=nested.get("original_max_position_embeddings", int, max_position),
        low_freq_factor=nested.get("low_freq_factor", float, 1.0),
        high_freq_factor=nested.get("high_freq_factor", float, 4.0),
        beta_fast=nested.get("beta_fast", float, 32.0),
        beta_slow=nested.get("beta_slow", float, 1.0),
        attention_factor=nested.get("attention_factor", float, None),
        mscale=nested.get("mscale", float, None),
        mscale_all_dim=nested.get("mscale_all_dim", float, None),
        truncate=nested.get("truncate", bool, True),
        query_scale=nested.get("llama_4_scaling_beta", float, 0.0),
        axes=_axes(
            fields,
            nested.get("mrope_section", list, []),
            int(head_dim * partial),
            interleaved=nested.get("mrope_interleaved", bool, False) or _interleaves(fields.get("model_type", str, "")),
        ),
    )


def _interleaves(name: str) -> bool:
    """Whether a text model of this name, in Hugging Face or GGUF files, interleaves the axes of M-RoPE."""
    return name.replace("_", "").startswith(("qwen3vl", "qwen35"))


def _axes(fields: Fields, sections: list[Any], dim: int, *, interleaved: bool) -> tuple[int, ...]:
    """Compute `RopeConfig.axes`: time rotates the first frequencies, height the next ones, and width the last ones.

    If interleaved, height has every third frequency from the second, and width every third from the third, until each
    has its number of frequencies; time has the others.
    Source: Wang et al., 2024, arXiv:2409.12191 (multimodal rotary position embedding); Bai et al., 2025,
    arXiv:2511.21631 (interleaved).
    """
    if not any(sections):
        return ()
    counts = [section for section in sections if isinstance(section, int) and section >= 0]
    if len(counts) != len(sections) or len(counts) < 3 or any(counts[3:]) or sum(counts) != dim // 2:
        raise InvalidFileError(
            f"{fields.path}: the rotary sections are {sections!r:.80}; they must be 3 numbers, of time, height and "
            f"width, {dim // 2} in all"
        )
    if interleaved:
        return tuple(axis if (axis := at % 3) and at < 3 * counts[axis] else 0 for at in range(dim // 2))
    return tuple(axis for axis, count in enumerate(counts) for _ in range(count))


def _longrope(fields: Fields, nested: Fields, theta: float, dim: int, max_position: int) -> RopeConfig:
    """Read longrope. Its original context may be outside `rope_scaling`, as in Phi-3; the factor is their ratio."""
    for key in ("short_mscale", "long_mscale"):
        if key in nested:
            raise UnsupportedModelError(f"{fields.path}: {key} in the rotary settings is not implemented")
    key = "original_max_position_embeddings"
    original = fields.count(key, nested.count(key, max_position))
    return RopeConfig(
        theta=theta,
        dim=dim,
        kind="longrope",
        factor=nested.get("factor", float, max(1.0, max_position / original)),
        original_max_position=original,
        attention_factor=nested.get("attention_factor", float, None),
        short_factor=tuple(nested.get("short_factor", list)),
        long_factor=tuple(nested.get("long_factor", list)),
    )


def rope_from_gguf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Read `<arch>.rope.*`. Llama 3's scaling is not included: GGUF files have it as the tensor `rope_freqs.weight`."""
    factor = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 0.0)) or 1.0
    name = fields.get("rope.scaling.type", str, "none" if factor == 1 else "linear")  # as llama.cpp reads old files
    kind = "default" if name in ("none", "longrope") else name  # longrope's divisors are tensors: see `models/phi3.py`
    if kind not in ("default", "linear", "yarn"):
        raise UnsupportedModelError(f"{fields.path}: rope scaling {kind!r} is not implemented")
    sharpened, multiplier = (
        fields.get(f"rope.scaling.{key}", float, None) for key in ("attn_factor", "yarn_log_multiplier")
    )
    if sharpened is not None and kind == "yarn" and factor > 1:  # in GGUF it is a factor of yarn's own scale
        sharpened *= 0.1 * math.log(factor) + 1
    dim = fields.get("rope.dimension_count", int, head_dim)
    return RopeConfig(
        theta=fields.get("rope.freq_base", float, 10000.0),
        dim=dim,
        kind=kind,
        factor=1.0 if kind == "default" else factor,
        original_max_position=fields.get("rope.scaling.original_context_length", int, max_position),
        beta_fast=fields.get("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=fields.get("rope.scaling.yarn_beta_slow", float, 1.0),
        attention_factor=sharpened,
        mscale=None if multiplier is None else 1.0,
        mscale_all_dim=multiplier,
        query_scale=fields.get("attention.temperature_scale", float, 0.0),
        axes=_axes(
            fields, fields.get("rope.dimension_sections", list, []), dim, interleaved=_interleaves(fields.prefix)
        ),
    )


def stretched_context(rope: RopeConfig, max_position: int) -> int:
    """Return the context length after scaling; configs of kinds other than linear, dynamic and yarn contain it."""
    if rope.kind in ("linear", "dynamic"):
        return int(max_position * rope.factor)
    if rope.kind == "yarn":
        return max(max_position, int(rope.original_max_position * rope.factor))
    return max_position
