# SPDX-License-Identifier: MIT
"""Rotary position embedding: the kinds of scaling, and their configuration in Hugging Face and GGUF files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Invalid values raise `InvalidFileError`.

    Attributes:
        theta: base of the frequencies.
        dim: R, number of a head's dimensions that are rotated; for kind proportional, all of them (see `rotated`).
        kind: name of the scaling, a key of `ROPE_KINDS`.
        rotated: for kind proportional, number of dimensions with a frequency above 0.
        factor: factor by which the context is extended.
        original_max_position: context length before scaling, in tokens.
        low_freq_factor, high_freq_factor: llama3's band limits, in rotations over the original context.
        beta_fast, beta_slow: yarn's band limits, in rotations over the original context.
        attention_factor: scale of cos and sin of yarn and longrope; None computes it: `RopeKind.scale`.
        mscale, mscale_all_dim: coefficients of yarn's two scales: of cos and sin, and of the attention scores.
        truncate: whether yarn rounds its band limits to whole dimensions.
        query_scale: coefficient of the growth of queries beyond the original context: see `layers/rotary.py`.
        short_factor, long_factor: longrope's divisors of frequencies [dim / 2]; `long_factor` is used if the model's
            context exceeds the original one.
        axes: for each of the dim / 2 frequencies, whether a token's time (0), height (1), width (2) or its image's
            number (3) rotates it (M-RoPE); empty if one position rotates all frequencies.
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
        row = ROPE_KINDS[self.kind]
        if not row.least_dim <= self.dim <= 1024 or self.dim % 2:
            raise InvalidFileError(
                f"{self.dim} rotary dimensions are not possible: {self.kind} rotary positions need an even number "
                f"from {row.least_dim} to 1024"
            )
        self.check("base (rope_theta)", self.theta, 1, 1e30)
        if not 0 <= self.query_scale <= 1e6:
            raise InvalidFileError(f"the growth of queries (llama_4_scaling_beta) is {self.query_scale}, not 0 to 1e6")
        if not 1 <= self.factor <= MAX_COUNT:
            raise InvalidFileError(f"the rotary factor is {self.factor}; it must be 1 to {MAX_COUNT}")
        if not 1 <= self.original_max_position <= MAX_COUNT:
            raise InvalidFileError(
                f"the context before scaling is {self.original_max_position} tokens; it must be 1 to {MAX_COUNT}"
            )
        row.check(self)
        if "attention_factor" in row.keys and self.attention_factor is not None:
            self.check("attention_factor", self.attention_factor, 0, 1e6)

    def check(self, name: str, value: float, low: float, high: float) -> None:
        """Raise `InvalidFileError` unless low < value <= high; NaN is refused too."""
        if not low < value <= high:
            raise InvalidFileError(f"the rotary {name} is {value}; it must be above {low:g} and at most {high:g}")


class RopeKind(NamedTuple):
    """One kind of scaling.

    Attributes:
        frequencies: returns the angle per position [R/2] in fp32, from the configuration and the model's context.
        keys: Hugging Face's keys that are read for this kind, not for every kind; each is a field of `RopeConfig`.
        needed: the keys without a default.
        check: raises `InvalidFileError` if values are not possible for this kind.
        scale: returns the factor of cos and sin.
        context: returns the context length after scaling, from a `RopeConfig` and the length in the file.
        least_dim: smallest number of rotary dimensions.
        names: other names of this kind in Hugging Face's files.
        refused: keys that are not implemented.
        by_context: whether the original context may be outside the rotary settings, as in Phi-3, and the factor is by
            default the model's context divided by the original one.
        pads: whether all dimensions are rotated, those beyond `partial_rotary_factor` with a frequency of 0.
        in_gguf: whether this kind is a value of GGUF's `rope.scaling.type`.
    """

    frequencies: Callable[[RopeConfig, int], np.ndarray]
    keys: tuple[str, ...] = ("factor",)
    needed: tuple[str, ...] = ()
    check: Callable[[RopeConfig], None] = lambda _: None
    scale: Callable[[RopeConfig], float] = lambda _: 1.0
    context: Callable[[RopeConfig, int], int] = lambda _, length: length
    least_dim: int = 2
    names: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    by_context: bool = False
    pads: bool = False
    in_gguf: bool = False


# ---- the kinds -------------------------------------------------------------------------------------------------------


def _plain(rope: RopeConfig, theta: float | None = None) -> np.ndarray:
    """Return theta^(-2 i / R) for i below R / 2, without scaling."""
    exponents = (np.arange(0, rope.dim, 2, dtype=np.float32) / rope.dim).astype(np.float64)
    return 1 / np.power(np.float64(np.float32(rope.theta if theta is None else theta)), exponents).astype(np.float32)


def _dynamic(rope: RopeConfig, max_position: int) -> np.ndarray:
    """Raise the base for the longest context, so that cached keys stay valid as a sequence grows."""
    if max_position <= rope.original_max_position:
        return _plain(rope)
    stretch = rope.factor * max_position / rope.original_max_position - (rope.factor - 1)
    return _plain(rope, rope.theta * stretch ** (rope.dim / (rope.dim - 2)))


def _proportional(rope: RopeConfig, _: int) -> np.ndarray:
    plain = _plain(rope)
    return np.where(np.arange(len(plain)) < rope.rotated // 2, plain / np.float32(rope.factor), np.float32(0))


def _llama3(rope: RopeConfig, _: int) -> np.ndarray:
    """Interpolate slow dimensions, keep fast ones, and blend those between."""
    plain = _plain(rope)
    turns = rope.original_max_position * plain / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / max(rope.high_freq_factor - rope.low_freq_factor, 1e-9)).clip(0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def _check_llama3(rope: RopeConfig) -> None:
    low, high = rope.low_freq_factor, rope.high_freq_factor
    rope.check("low_freq_factor", low, 0, 1e6)
    if not low <= high <= 1e6:  # Llama 4's are equal
        raise InvalidFileError(f"the rotary high_freq_factor is {high}; it must be between {low} and 1e6")


def _yarn(rope: RopeConfig, _: int) -> np.ndarray:
    """Keep dimensions with over beta_fast rotations, interpolate those below beta_slow, and ramp in between."""

    def dimension(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    plain, low, high = _plain(rope), dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    stretch = ((np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)).clip(0, 1)
    return plain * (1 - stretch) + plain / rope.factor * stretch


def _check_yarn(rope: RopeConfig) -> None:
    slow, fast = rope.beta_slow, rope.beta_fast
    rope.check("beta_slow", slow, 0, 1e6)
    if not slow <= fast <= 1e6:  # Kimi-K2's are equal
        raise InvalidFileError(f"the rotary beta_fast is {fast}; it must be beta_slow, {slow:g}, to 1e6")
    for name, value in (("mscale", rope.mscale), ("mscale_all_dim", rope.mscale_all_dim)):
        if value is not None and not 0 <= value <= 1e6:
            raise InvalidFileError(f"the rotary {name} is {value}; it must be 0 to 1e6")


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Return 0.1 mscale ln(factor) + 1, yarn's attention factor for a context extended by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(rope: RopeConfig) -> float:
    """Return yarn's attention factor without the part that is applied to the scores."""
    if rope.mscale and rope.mscale_all_dim:
        return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    return yarn_scale(rope.factor)


def _longrope(rope: RopeConfig, max_position: int) -> np.ndarray:
    """Divide by the same list at every length: `long_factor` if the model's context exceeds the original one."""
    long = max_position > rope.original_max_position
    return _plain(rope) / np.array(rope.long_factor if long else rope.short_factor, np.float32)


def _check_longrope(rope: RopeConfig) -> None:
    """Check the divisors, which may have any type in a file, and the context before scaling."""
    rope.check("context before scaling", rope.original_max_position, 1, MAX_COUNT)
    for name in ("short_factor", "long_factor"):
        values: tuple[Any, ...] = getattr(rope, name)
        if len(values) != rope.dim // 2:
            raise InvalidFileError(
                f"the rotary {name} has {len(values)} divisors; it must have {rope.dim // 2}, one for each pair of the "
                f"{rope.dim} rotary dimensions"
            )
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e6:
                raise InvalidFileError(
                    f"the rotary {name} holds {value!r:.40}; its numbers must be above 0 and at most 1e6"
                )


def _times_factor(rope: RopeConfig, length: int) -> int:
    return int(length * rope.factor)


ROPE_KINDS: Mapping[str, RopeKind] = MappingProxyType({
    "default": RopeKind(lambda rope, _: _plain(rope), names=("mrope",), in_gguf=True),
    "linear": RopeKind(
        lambda rope, _: _plain(rope) / rope.factor, needed=("factor",), context=_times_factor, in_gguf=True
    ),
    "dynamic": RopeKind(
        _dynamic, needed=("factor",), context=_times_factor, least_dim=4  # the base's exponent is dim / (dim - 2)
    ),
    "llama3": RopeKind(
        _llama3, ("factor", "low_freq_factor", "high_freq_factor"), needed=("factor",), check=_check_llama3
    ),
    "yarn": RopeKind(
        _yarn, ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate"), needed=("factor",),
        check=_check_yarn, scale=_yarn_attention, in_gguf=True,
        context=lambda rope, length: max(length, int(rope.original_max_position * rope.factor)),
    ),
    "longrope": RopeKind(
        _longrope, ("factor", "attention_factor", "short_factor", "long_factor"),
        needed=("short_factor", "long_factor"), check=_check_longrope, names=("su",), by_context=True,
        refused=("short_mscale", "long_mscale"),
        scale=lambda rope: math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position)),
    ),
    "proportional": RopeKind(_proportional, pads=True),
})  # fmt: skip
"""Every kind of scaling by its name in `rope_type`.

Sources: linear, kaiokendev 2023; dynamic (NTK-aware), bloc97 2023; llama3, Meta's reference code; yarn, Peng et al.,
arXiv:2309.00071; longrope, Ding et al., arXiv:2402.13753.
"""


@np.errstate(all="ignore")  # `layers/rotary.py` refuses non-finite values
def inverse_frequencies(rope: RopeConfig, max_position: int) -> np.ndarray:
    """Return the angle per position [R/2] in fp32, for a context of `max_position` tokens."""
    return ROPE_KINDS[rope.kind].frequencies(rope, max_position)


def attention_scale(rope: RopeConfig) -> float:
    """Return the factor of cos and sin."""
    row = ROPE_KINDS[rope.kind]
    given = rope.attention_factor if "attention_factor" in row.keys else None
    return row.scale(rope) if given is None else given


def stretched_context(rope: RopeConfig, max_position: int) -> int:
    """Return the context length after scaling; it differs from `max_position` only for linear, dynamic and yarn."""
    return ROPE_KINDS[rope.kind].context(rope, max_position)


# ---- files -----------------------------------------------------------------------------------------------------------


def rope_from_hf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) and `rope_scaling` (earlier versions, or added by hand), which wins."""
    nested, scaling = fields.section("rope_parameters"), fields.section("rope_scaling").values
    if scaling and (nested.values or "rope_parameters" not in fields):
        nested = Fields({**nested.values, "rope_type": None, **scaling}, fields.path)
    name = nested.get("rope_type", str, nested.get("type", str, "default"))
    kind = next((kind for kind, row in ROPE_KINDS.items() if name in row.names), name)
    theta = nested.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    partial = nested.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(f"{fields.path}: rope_type is {kind!r}; implemented: {', '.join(ROPE_KINDS)}")
    if not 0 < partial <= 1:
        raise InvalidFileError(f"{fields.path}: partial_rotary_factor is {partial}; it must be above 0 and at most 1")
    row, rotated, original = ROPE_KINDS[kind], int(head_dim * partial), "original_max_position_embeddings"
    if refused := [key for key in row.refused if key in nested]:
        raise UnsupportedModelError(f"{fields.path}: {refused[0]} in the rotary settings is not implemented")
    if row.by_context:
        context = fields.count(original, nested.count(original, max_position))
        factor = max(1.0, max_position / context)
    else:
        # Dynamic scaling starts where the model's own context ends, as in transformers.
        context, factor = max_position if kind == "dynamic" else nested.get(original, int, max_position), 1.0
    interleaved = nested.get("mrope_interleaved", bool, False) or _interleaves(fields.get("model_type", str, ""))
    own: dict[str, Any] = {}
    for key in row.keys:
        default: Any = factor if key == "factor" else getattr(RopeConfig, key)
        of_type: type[Any] = {tuple: list, bool: bool}.get(type(default), float)
        value = nested.get(key, of_type, *([] if key in row.needed else [default]))
        own[key] = tuple(value) if isinstance(value, list) else value
    return RopeConfig(
        theta=theta,
        dim=head_dim if row.pads else rotated,
        kind=kind,
        rotated=2 * int(head_dim * partial / 2) if row.pads else 0,
        original_max_position=context,
        mscale=nested.get("mscale", float, None),
        mscale_all_dim=nested.get("mscale_all_dim", float, None),
        query_scale=nested.get("llama_4_scaling_beta", float, 0.0),
        axes=_axes(fields, nested.get("mrope_section", list, []), rotated, interleaved=interleaved),
        **own,
    )


def _interleaves(name: str) -> bool:
    """Whether a text model of this name, in Hugging Face or GGUF files, interleaves the axes of M-RoPE."""
    return name.replace("_", "").startswith(("qwen3vl", "qwen35", "qwen4"))


def _axes(fields: Fields, sections: list[Any], dim: int, *, interleaved: bool) -> tuple[int, ...]:
    """Compute `RopeConfig.axes`: time rotates the first frequencies, height the next ones, and width the last ones.

    If interleaved, height has every third frequency from the second, and width every third from the third, until each
    has its number of frequencies; time has the rest.
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


def rope_from_gguf(fields: Fields, head_dim: int, max_position: int) -> RopeConfig:
    """Read `<arch>.rope.*`, but not the scalings of Llama 3 and longrope, which GGUF files store as tensors."""
    factor = fields.get("rope.scaling.factor", float, fields.get("rope.scale_linear", float, 0.0)) or 1.0
    name = fields.get("rope.scaling.type", str, "none" if factor == 1 else "linear")  # as llama.cpp reads old files
    kind = "default" if name in ("none", "longrope") else name  # longrope's divisors are tensors: see `models/phi3.py`
    if kind not in ROPE_KINDS or not ROPE_KINDS[kind].in_gguf:
        raise UnsupportedModelError(f"{fields.path}: rope scaling {kind!r} is not implemented")
    multiplier = fields.get("rope.scaling.yarn_log_multiplier", float, None)
    sharpened = fields.get("rope.scaling.attn_factor", float, None)
    if sharpened is not None and kind == "yarn" and factor > 1:  # GGUF's attn_factor multiplies yarn's own scale
        sharpened *= 0.1 * math.log(factor) + 1
    dim, sections = fields.get("rope.dimension_count", int, head_dim), fields.get("rope.dimension_sections", list, [])
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
        axes=_axes(fields, sections, dim, interleaved=_interleaves(fields.prefix)),
    )
