# SPDX-License-Identifier: MIT
"""Register this engine's paged attention in transformers' attention interface, and record the calls of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from candle_vllm.core.layers.attention import PagedAttention, StepInput
from candle_vllm.core.loading.cache_specs import PagedSpec

PAGED, PROBE = "candle_vllm", "candle_vllm_probe"
"""Names in transformers' attention interface: for steps, and for the one pass that records the layers' calls."""


class NotPagedError(Exception):
    """The model cannot run on the paged cache: its attention is of another kind, it has a state, or it cannot be tried.

    Args:
        message: the reason.
        causal: no token's result depends on later tokens, so the model may still run with a cache of transformers.
    """

    def __init__(self, message: str, *, causal: bool = True) -> None:
        super().__init__(message)
        self.causal = causal


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface in a pass through the model. All passes make the same calls in order.

    Attributes:
        module: name of the module that calls.
        heads, kv_heads: number of query heads H and of key-value heads K.
        key_dim, value_dim: elements of a key head and of a value head; values are padded with zeros to `key_dim`.
        window: number of positions that a token attends to, itself included; -n for chunks of n tokens; None for all.
        scale, softcap: scale and softcap of the attention scores, see `kernels/attention`.
    """

    module: str
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    scale: float
    softcap: float | None

    @property
    def spec(self) -> PagedSpec:
        """The cache that the call needs for each token."""
        return PagedSpec(self.kv_heads, self.key_dim, self.key_dim, self.reach)

    @property
    def reach(self) -> int | None:
        """The maximum number of positions that a token attends to; None for all."""
        return None if self.window is None else abs(self.window)

    def attention(self, number: int) -> PagedAttention:
        """Make the attention layer of the call, which uses the cache with index `number`."""
        return PagedAttention(number, self.key_dim, None, window=self.window, scale=self.scale, softcap=self.softcap)


@dataclasses.dataclass
class Pass:
    """One pass through a model's layers: a step, or the pass that records the layers' calls.

    Attributes:
        names: name of each module of the model while calls are recorded; empty in a step.
        calls: the recorded calls.
        step: the step's input; None while calls are recorded.
        attentions: in a step, the attention layer of each call.
        done: number of calls that a step has executed; 0 while calls are recorded.
    """

    names: dict[Any, str]
    calls: list[AttentionCall]
    step: StepInput | None = None
    attentions: list[PagedAttention] = dataclasses.field(default_factory=list)
    done: int = 0


PASS: ContextVar[Pass] = ContextVar("pass")


@contextmanager
def under_way(each: Pass) -> Iterator[Pass]:
    """Context in which `each` is the current pass through the model."""
    token = PASS.set(each)
    try:
        yield each
    finally:
        PASS.reset(token)


def _write_down(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> tuple[Any, None]:
    """Record the call of q [1, H, T, D], k [1, K, T, D] and v [1, K, T, V], and return zeros [1, T, H, V]."""
    this = PASS.get()
    name = this.names.get(module, type(module).__name__)
    tokens, (_, heads, count, dim) = query.shape[2], query.shape
    if query.shape[0] != 1 or key.shape[2] != count or value.shape[2] != count:
        raise NotPagedError(f"{name} attends to other tokens than those of the sequence")
    if key.shape[3] != dim or heads % key.shape[1] or value.shape[3] > dim:
        raise NotPagedError(f"{name} has queries {list(query.shape)} and keys {list(key.shape)}")
    if more.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise NotPagedError(f"{name} attends to tokens after its own", causal=False)
    others = {key for key, given in more.items() if isinstance(given, torch.Tensor) and key not in _KNOWN}
    if others := sorted(others | {key for key in _UNKNOWN if more.get(key) is not None}):
        raise NotPagedError(f"{name} adds {', '.join(others)} to its scores")
    window = more.get("sliding_window")
    if attention_mask is not None:
        if not hasattr(attention_mask, "window"):
            raise NotPagedError(f"{name} has a mask of its own")
        window = attention_mask.window  # transformers' own attention uses the mask only
        if isinstance(window, NotPagedError):
            raise window
    scale = dim**-0.5 if more.get("scaling") is None else float(more["scaling"])
    sizes = heads, key.shape[1], dim, value.shape[3]
    this.calls.append(AttentionCall(name, *sizes, window, scale, more.get("softcap")))
    return query.new_zeros(1, tokens, heads, value.shape[3]), None


_KNOWN = ("s_aux", "position_ids", "cache_position", "attention_mask")  # tensors that may be given beside q, k and v
_UNKNOWN = ("position_bias", "alibi", "attention_bias", "bias", "indices", "block_indices", "sinks")


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any) -> tuple[Any, None]:
    """Write k [1, K, T, D] and v [1, K, T, V] to the call's cache; return attention of q [1, H, T, D]: [1, T, H, V]."""
    del module, attention_mask
    this = PASS.get()
    assert this.step is not None
    attention, call = this.attentions[this.done], this.calls[this.done]
    this.done += 1
    attention.sinks = None if more.get("s_aux") is None else more["s_aux"].float()
    q, k, v = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    if call.value_dim < call.key_dim:
        v = torch.nn.functional.pad(v, (0, call.key_dim - call.value_dim))
    y = attention(q, k, v, this.step)[:, :, : call.value_dim]
    return y[None].to(query.dtype), None


def _mask(q_length: int, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any) -> torch.Tensor:
    """A mask [1, 1, T, T] without memory; its attribute `window` is the window of `mask_function`, or an error.

    The error for an unsupported mask is not raised here, because models also make masks that no layer uses.
    """
    mask: Any = torch.empty(1, 1, q_length, q_length, device=torch.device("meta"))
    try:
        mask.window = _window(_without_padding(mask_function), local_size)
    except (NotPagedError, RuntimeError) as error:
        known = isinstance(error, NotPagedError)
        mask.window = error if known else NotPagedError("a mask depends on more than positions")
    return mask


def _window(mask_function: Callable[..., Any], local_size: int | None) -> int | None:
    """Find a mask's window, as in `AttentionCall`, by testing positions at its edge; NotPagedError for other masks."""
    size = local_size or 1

    def sees(query: int, key: int) -> bool:
        return bool(mask_function(0, 0, torch.tensor(query), torch.tensor(key)))

    if sees(0, 1) or sees(size, size + 1):
        raise NotPagedError("a mask lets tokens see those behind their own", causal=False)
    if sees(2 * size, 0):
        return None
    if local_size and sees(size, 1) and not sees(size, 0) and sees(2 * size, size + 1) and not sees(2 * size, size):
        return local_size
    if local_size and sees(size - 1, 0) and sees(2 * size - 1, size) and not sees(size, size - 1):
        return -local_size
    raise NotPagedError("a mask is neither causal nor a sliding window")


def _without_padding(value: Any) -> Any:
    """Copy a mask function, with zeros for its counts of padding tokens, which are on the meta device."""
    if isinstance(value, torch.Tensor) and value.is_meta and value.dim() == 1:
        return torch.zeros_like(value, device="cpu")
    if isinstance(value, tuple):
        return tuple(map(_without_padding, value))
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(CellType(_without_padding(cell.cell_contents)) for cell in value.__closure__)
    return FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)


AttentionInterface.register(PAGED, _attend)
AttentionInterface.register(PROBE, _write_down)
AttentionMaskInterface.register(PROBE, _mask)
