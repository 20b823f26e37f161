# SPDX-License-Identifier: MIT
"""Build a transformers model on the meta device and run it once, to record its calls of attention."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.models.any_architecture.attention import AttentionCall, NotPagedError, Pass, under_way
from candle_vllm.core.models.any_architecture.buffers import freeze_rotary

CACHES = ("past_key_values", "cache_params", "state")
"""Names of a cache in arguments and results."""


def without_memory(described: Any, attention: str | None, dtype: torch.dtype) -> Any:
    """Build the model of transformers on torch's meta device."""
    with torch.device("meta"):
        return class_of(described)._from_config(described, attn_implementation=attention, dtype=dtype).eval()


def class_of(described: Any) -> Any:
    """The causal-LM class for a config's type, or the class that the config names; None for another kind of config."""
    if type(described) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(described)]
    name = (described.architectures or [""])[0]
    listed = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    found = getattr(importlib.import_module("transformers"), name) if listed else None
    return found if found is not None and found.config_class is type(described) else None


def calls_of(model: Any) -> tuple[AttentionCall, ...]:
    """Record the attention calls of a short pass; raises NotPagedError if the model cannot run on the paged cache.

    Known reasons are other attention, no argument for positions, `_is_stateful`, and the signs of `_check_layers`.
    """
    if not model._supports_attention_backend:
        lines = inspect.getsource(inspect.getmodule(type(model))).splitlines()  # type: ignore[arg-type]
        asks = any("config.is_decoder" in line and ">>>" not in line for line in lines)
        if asks and getattr(model.config.get_text_config(decoder=True), "is_decoder", True) is False:
            raise NotPagedError("its config says is_decoder false, so that tokens see later ones", causal=False)
        raise NotPagedError(f"{type(model).__name__} does not declare that it follows the attention interface")
    if getattr(model, "_is_stateful", False):
        raise NotPagedError(f"{type(model).__name__} keeps a recurrent state")
    for module in model.modules():
        freeze_rotary(module)
    base = model.get_submodule(layers_of(model))
    if "position_ids" not in arguments(base):
        raise NotPagedError(f"{type(base).__name__} is not told the positions of tokens")
    tried, called = Pass({module: name for name, module in model.named_modules()}, []), set[str]()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    ids = torch.zeros(1, 3, dtype=torch.int64, device="meta")
    fx_config: Any = _config
    nonzero = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # every expert gets all tokens
    try:
        with under_way(tried), torch.inference_mode(), _Zeros(), nonzero:
            base(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, use_cache=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise NotPagedError(f"{type(model).__name__} cannot run on torch's meta device: {error!s:.200}") from error
    _check_layers(model, {call.module for call in tried.calls}, called)
    return tuple(tried.calls)


class _Zeros(TorchFunctionMode):
    """Mode in which `item`, `int` and `index` of a meta tensor are 0, for code that loops over indices of experts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, or return 0."""
        del types
        asks = func in (torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__index__)
        return 0 if asks and args[0].is_meta else func(*args, **(kwargs or {}))


def _check_layers(model: Any, callers: set[str], called: set[str]) -> None:
    """Raise NotPagedError if the model or a layer has none of the `callers` of attention, or a sign of state."""
    layers = {caller.split(f".{part}.")[0] for caller in callers for part in caller.split(".") if part.isdigit()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name in layers:
            for number in range(len(module)):
                if not any(caller.startswith(f"{name}.{number}.") for caller in callers):
                    raise NotPagedError(f"{name}.{number} does not call the attention interface")
        mixes = isinstance(module, torch.nn.Conv1d) or any(part in ("A_log", "dt_bias") for part in module._parameters)
        if mixes and (name in called or any(name.startswith(f"{stack}.") for stack in layers)):
            raise NotPagedError(f"{name} keeps a state beside attention")
    if not callers:
        raise NotPagedError(f"{type(model).__name__} does not call the attention interface")


def keeps_its_own_cache(model: Any) -> bool:
    """Whether the model can continue a sequence from a cache of transformers."""
    return any(name in arguments(model.get_submodule(layers_of(model))) for name in CACHES)


def layers_of(model: Any) -> str:
    """The name of the module that contains all of a model but the head."""
    for name in (model.base_model_prefix, "model", "transformer", "decoder"):
        if name and isinstance(getattr(model, name, None), torch.nn.Module):
            inside = dict(getattr(model, name).named_children())
            wraps = "input_ids" not in arguments(getattr(model, name)) and "decoder" in inside
            return f"{name}.decoder" if wraps else name  # the decoder of an encoder-decoder model without its encoder
    raise UnsupportedModelError(f"{type(model).__name__} has no layers apart from its head")


def arguments(module: Any) -> Mapping[str, Any]:
    """The arguments of a module by name, with those that it passes on to its inner text model."""
    found = inspect.signature(module.forward).parameters
    inside = module.get_decoder() if hasattr(module, "get_decoder") else module
    passes = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found.values())
    return {**arguments(inside), **found} if passes and inside is not None and inside is not module else found
