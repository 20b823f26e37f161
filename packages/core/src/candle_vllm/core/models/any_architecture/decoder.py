# SPDX-License-Identifier: MIT
"""A decoder that transformers wires, over this engine's caches and products; and the family of one such model."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import MAX_COUNT, Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.loading.cache_specs import CacheSpec, PagedSpec
from candle_vllm.core.loading.config import MAX_EXPERTS, MAX_LAYERS, ModelConfig
from candle_vllm.core.loading.rope import RopeConfig
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.any_architecture.attention import (
    PAGED,
    PROBE,
    AttentionCall,
    NotPagedError,
    Pass,
    under_way,
)
from candle_vllm.core.models.any_architecture.modules import replace_products
from candle_vllm.core.models.any_architecture.weights import named_for
from candle_vllm.core.models.family import Family

logger = logging.getLogger(__name__)

_CACHES = ("past_key_values", "cache_params", "state")  # names of a cache, as arguments and in results
_TRIED = 3  # tokens of the pass that writes the calls down
_ROUTERS = ("gate", "router", "shared_expert_gate")  # which `isq` leaves plain
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyConfig(ModelConfig):
    """What transformers knows of a model, and what its layers keep.

    Attributes:
        described: its config, of transformers.
        calls: calls of attention in their order; none of a model that runs one sequence at a time.
        obstacle: why it runs one sequence at a time, on transformers' own cache; None where it does not.
    """

    described: Any
    calls: tuple[AttentionCall, ...] = ()
    obstacle: str | None = None

    @property
    def implementation(self) -> str:
        """See `ModelInfo`."""
        return "transformers" if self.obstacle is None else "transformers, one sequence at a time"

    @property
    def one_at_a_time(self) -> str | None:
        """See `ModelConfig`."""
        return self.obstacle

    @property
    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """See `ModelConfig`; a model on transformers' own cache has pages that only count its tokens."""
        return tuple(call.spec for call in self.calls) or (PagedSpec(1, 1, 1),) * self.num_layers


def config_from_hf(values: Mapping[str, Any], path: Path) -> AnyConfig:
    """Reads a `config.json` by transformers' own class, builds the model without memory and tries it.

    Raises:
        UnsupportedModelError: transformers has no such decoder, or none that runs here.
        InvalidFileError: the config contradicts itself, or claims sizes that no model has.
    """
    _check_sizes(values, path)
    kind = Fields(values, path).get("model_type", str)
    if kind not in transformers.CONFIG_MAPPING:
        code = "; code beside the weights is never run" if values.get("auto_map") else ""
        raise UnsupportedModelError(
            f"{path}: transformers {transformers.__version__} has no model_type {kind!r:.80} either{code}"
        )
    try:
        described = transformers.CONFIG_MAPPING[kind].from_dict(_with_floats(values))
        if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise UnsupportedModelError(f"{path}: {kind} of transformers {transformers.__version__} is no decoder")
        kind_of: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(described)]
        declared = kind_of._supports_attention_backend
        model = _without_memory(described, PROBE if declared else None, torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, IndexError) as error:
        raise InvalidFileError(f"{path}: transformers {transformers.__version__} refuses it: {error!s:.300}") from error
    calls, obstacle = tuple[AttentionCall, ...](), None
    try:
        calls = _calls_of(model)
    except NotPagedError as error:
        obstacle = str(error)
        if not error.causal or not _keeps_its_own_cache(model):
            raise UnsupportedModelError(f"{path}: {type(model).__name__} cannot run here: {obstacle}") from error
    text = described.get_text_config(decoder=True)
    first = calls[0] if calls else AttentionCall("", 1, 1, 2, 2, None, 1.0, None)
    hidden = _number(text, "hidden_size", "n_embd", "d_model") or 1
    return AnyConfig(
        model_type=kind,
        vocab_size=_number(text, "vocab_size") or 0,
        hidden_size=hidden,
        intermediate_size=_number(text, "intermediate_size", "n_inner", "ffn_dim", "d_ff") or 4 * hidden,
        num_layers=len(calls) or 1,
        num_heads=first.heads,
        num_kv_heads=first.kv_heads,
        head_dim=first.key_dim,
        max_position=_number(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length") or 1 << 15,
        norm_eps=1e-5,
        rope=RopeConfig(dim=2),
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        sliding_windows=tuple(call.window for call in calls) or (None,),
        eos_token_ids=Fields(values, path).token_ids("eos_token_id", lowest=-1),
        described=described,
        calls=calls,
        obstacle=obstacle,
    )


def _with_floats(value: Any) -> Any:
    """The values with the floats that JSON has no word for, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        special = value.get("__float__")
        return float(special) if isinstance(special, str) else {key: _with_floats(each) for key, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def _check_sizes(values: Mapping[str, Any], path: Path) -> None:
    """InvalidFileError for a config that would have more built than any model has."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_sizes(value, path)
        most = MAX_LAYERS if key in _LAYERS else MAX_EXPERTS if key.endswith("experts") else MAX_COUNT
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most and not key.endswith("_id"):
            raise InvalidFileError(f"{path}: {key} is {value}; at most {most} are possible")


def _number(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _without_memory(described: Any, attention: str | None, dtype: torch.dtype) -> Any:
    """The model of transformers on torch's meta device."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(described, attn_implementation=attention, dtype=dtype)
    return model.eval()


# ---- what the layers ask of attention --------------------------------------------------------------------------------


def _calls_of(model: Any) -> tuple[AttentionCall, ...]:
    """The calls of attention in a pass of some tokens; NotPagedError where not all of the model's memory is in them."""
    if not model._supports_attention_backend:
        if getattr(model.config.get_text_config(decoder=True), "is_decoder", True) is False:
            raise NotPagedError("its config says is_decoder false, so that tokens see later ones", causal=False)
        raise NotPagedError(f"{type(model).__name__} does not declare that it follows the attention interface")
    if getattr(model, "_is_stateful", False):
        raise NotPagedError(f"{type(model).__name__} keeps a recurrent state")
    for name, module in model.named_modules():
        _freeze_rotary(module)
        if isinstance(module, torch.nn.Conv1d) or any(part in ("A_log", "dt_bias") for part in module._parameters):
            raise NotPagedError(f"{name} keeps a state beside attention")
    base = getattr(model, _layers_of(model))
    if "position_ids" not in _arguments(base):
        raise NotPagedError(f"{type(base).__name__} is not told the positions of tokens")
    tried = Pass({module: name for name, module in model.named_modules()}, [])
    ids = torch.zeros(1, _TRIED, dtype=torch.int64, device="meta")
    try:
        with under_way(tried), torch.inference_mode(), _all_nonzero():
            base(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=ids, use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise NotPagedError(f"{type(model).__name__} cannot be tried without memory: {error!s:.200}") from error
    _check_layers(model, {call.module for call in tried.calls})
    return tuple(tried.calls)


@contextmanager
def _all_nonzero() -> Iterator[None]:
    """On the meta device, which has no numbers, experts are asked which tokens are theirs: all."""
    from torch.fx.experimental import _config

    config: Any = _config
    with config.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def _check_layers(model: Any, callers: set[str]) -> None:
    """NotPagedError where a layer mixes tokens by anything but attention."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in ("layers", "h", "blocks"):
            for number in range(len(module)):
                if not any(caller.startswith(f"{name}.{number}.") for caller in callers):
                    raise NotPagedError(f"{name}.{number} does not call the attention interface")


def _keeps_its_own_cache(model: Any) -> bool:
    """Whether the model continues a sequence from a cache of transformers."""
    return any(name in _arguments(getattr(model, _layers_of(model))) for name in _CACHES)


def _layers_of(model: Any) -> str:
    """The attribute of a model that has all of it but the head."""
    for name in (model.base_model_prefix, "model", "transformer", "decoder"):
        if name and isinstance(getattr(model, name, None), torch.nn.Module):
            return name
    raise UnsupportedModelError(f"{type(model).__name__} has no layers apart from its head")


def _arguments(module: torch.nn.Module) -> Mapping[str, Any]:
    return inspect.signature(module.forward).parameters


# ---- the model -------------------------------------------------------------------------------------------------------


class AnyDecoder:
    """Token ids [T] to hidden states [T, E] to logits [T, V], by a model of transformers.

    Args:
        config: its description.
        placement: where its weights live; layers run op by op.

    Attributes:
        named: its layers with weights by transformers' names.
        targets: where the table finds these layers: `embed`, `head`, or a number of `parts`.
        narrows: see `DecoderStack`.
    """

    narrows = False

    def __init__(self, config: AnyConfig, placement: Placement) -> None:
        self.config, self._placement = config, placement
        dtype = torch.float32 if placement.shapes_only else placement.torch_dtype
        self.model = _without_memory(config.described, None if config.obstacle else PAGED, dtype)
        tables = {self.model.get_input_embeddings(): "embed", self.model.get_output_embeddings(): "head"}
        at = {name: tables[module] for name, module in self.model.named_modules() if module in tables}
        self.named = replace_products(self.model, placement, self.model.all_tied_weights_keys)
        self.parts, self.targets = list[Any](), dict[str, str]()
        for number, (name, layer) in enumerate(self.named.items()):
            router = name.rpartition(".")[2] in _ROUTERS
            self.parts.append(SimpleNamespace(router=layer) if router else layer)
            self.targets[name] = at.get(name, f"parts.{number}{'.router' if router else ''}")
            if name in at:
                setattr(self, at[name], layer)
        if not placement.shapes_only:
            _make_buffers(self.model, placement, config)
        self._base = getattr(self.model, _layers_of(self.model))
        self._head = _Head(self._base)
        self._attentions = [call.attention(number) for number, call in enumerate(config.calls)]
        self._names = {module: name for name, module in self.model.named_modules()}
        self._first_position = _first_position(self.model)
        self._cache, self._length = dict[str, Any](), 0  # of the one sequence, where it is transformers'

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`; transformers computes its tables in each step."""

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """See `Decoder.forward`."""
        ids, positions = token_ids.long()[None], step.positions.long()[None]
        if self.config.obstacle is not None:
            return self._alone(ids, int(positions[0, 0]))
        this = Pass(self._names, list(self.config.calls), step, self._attentions)
        with under_way(this):
            out = self._base(
                input_ids=ids, position_ids=positions + self._first_position, use_cache=False, return_dict=True
            )
        assert this.done == len(this.calls), "a model's calls of attention are the same in each step"
        return out.last_hidden_state[0]

    def _alone(self, ids: torch.Tensor, first: int) -> torch.Tensor:
        """Hidden states [T, E] of tokens [1, T] of the one sequence from position `first` on, whose cache goes on."""
        if first == 0:
            self._cache, self._length = dict[str, Any](), 0
        assert first == self._length, "a sequence begins at its first token, and no other runs beside it"
        # Layers with a state begin with a prompt as a whole, and go on by one token.
        pieces = [ids] if first == 0 else ids.split(1, 1)
        return torch.cat([self._continued(piece) for piece in pieces])

    def _continued(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] of the next tokens [1, T]."""
        before, self._length = self._length, self._length + ids.shape[1]
        positions = torch.arange(before, self._length, device=ids.device)
        places = positions[None] + self._first_position
        given: dict[str, Any] = {"position_ids": places, "cache_position": positions}
        given = {name: value for name, value in given.items() if name in _arguments(self._base)} | self._cache
        out = self._base(input_ids=ids, use_cache=True, return_dict=True, **given)
        self._cache = {name: out[name] for name in _CACHES if out.get(name) is not None}
        if not self._cache:
            raise RuntimeError(f"{type(self._base).__name__} gave no cache to go on from")
        return out.last_hidden_state[0]

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """See `Decoder.logits`; whatever the class does behind its last norm is done by its own code."""
        prefix = _layers_of(self.model)
        self._head.hidden = hidden[None]
        setattr(self.model, prefix, self._head)
        try:
            scores = self.model(inputs_embeds=hidden[None], use_cache=False, return_dict=True).logits[0]
        finally:
            setattr(self.model, prefix, self._base)
        return scores.float() if out is None else out.copy_(scores)


class _Head(torch.nn.Module):
    """Stands in the place of a model's layers while logits are made of hidden states that are there."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self._base = [base]  # not a child of this

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.__dict__["_base"][0], name)
            return self if isinstance(found, transformers.PreTrainedModel) else found  # some heads ask an inner model

    def forward(self, *_: Any, **__: Any) -> _Output:
        """The hidden states as the layers' result."""
        assert self.hidden is not None
        return _Output(self.hidden)


class _Output:
    """A result of layers that knows nothing but hidden states."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


def _first_position(model: Any) -> int:
    """Row of the position table for a sequence's first token: RoBERTa's and its kin begin behind the padding token."""
    tables = (m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
    return next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)


def _make_buffers(model: Any, placement: Placement, config: AnyConfig) -> None:
    """Computes what no checkpoint stores, such as rotary frequencies, by each class's own rules."""
    owners: list[tuple[str, Any]] = [("", model)]
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel):
            owners.append((name, module))
        mine = [part for part in module._non_persistent_buffers_set if module._buffers.get(part) is not None]
        plain = [part for part, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        for part in mine:
            module._buffers[part] = torch.zeros_like(module.get_buffer(part), device=placement.device)
        for part in plain:
            setattr(module, part, torch.zeros_like(getattr(module, part), device=placement.device))
        if mine or plain:
            owner = max((o for o in owners if not o[0] or name.startswith(f"{o[0]}.")), key=lambda o: len(o[0]))[1]
            with torch.no_grad():
                owner._init_weights(module)
        for layer, kind in _freeze_rotary(module):
            _settle_rotary(module, layer, kind, config.max_position, placement.device)


def _freeze_rotary(module: Any) -> list[tuple[str | None, str]]:
    """The kinds of layers, and of their frequencies, that change with the longest text, which they do no more."""
    kinds = getattr(module, "rope_type", None)
    each = list(kinds.items()) if isinstance(kinds, dict) else [(None, kinds)]
    changing = [(layer, kind) for layer, kind in each if kind in ("dynamic", "longrope")]
    if changing:
        module.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    return changing


def _settle_rotary(module: Any, layer: str | None, kind: str, longest: int, device: Any) -> None:
    """Frequencies for the context that is served: by its own code they would depend on all sequences of a step."""
    prefix = "" if layer is None else f"{layer}_"
    which = {} if layer is None else {"layer_type": layer}
    found, scale = ROPE_INIT_FUNCTIONS[kind](module.config, device, seq_len=longest, **which)
    module._buffers[f"{prefix}inv_freq"] = found
    setattr(module, f"{prefix}attention_scaling", scale)


# ---- family ----------------------------------------------------------------------------------------------------------


def family_of(values: Mapping[str, Any], path: Path) -> tuple[Family, AnyConfig]:
    """The family of one model, and its description; errors as `config_from_hf`."""
    config = config_from_hf(values, path)
    shapes = AnyDecoder(config, SHAPES)
    table = list(_table(shapes))
    sizes = {name: part.shape for name, part in _parameters(shapes)}
    return Family(
        hf={},
        config_from_hf=lambda *_: config,
        build=lambda config, placement, _: AnyDecoder(config, placement),
        weights=table,
        ignored=partial(_ignored, shapes.model),
        prepared=partial(named_for, shapes.model, sizes),
    ), config


def _parameters(decoder: AnyDecoder) -> Iterator[tuple[str, Any]]:
    """Every parameter by transformers' name of it."""
    for name, layer in decoder.named.items():
        for part, parameter in layer.parameters().items():
            yield name if part == "tensor" else f"{name}.{part}", parameter


def _table(decoder: AnyDecoder) -> Iterator[WeightName]:
    for name, layer in decoder.named.items():
        for part in layer.parameters():
            stored = name if part == "tensor" else f"{name}.{part}"
            tied = decoder.model.all_tied_weights_keys.get(stored)  # of a head with a bias, which has its own copy
            yield WeightName(f"{decoder.targets[name]}:{part}", stored if tied is None else (tied, stored), None)


def _ignored(model: Any, config: Any) -> Sequence[str]:
    """Stored names that carry nothing: what transformers says so of, copies of a tied matrix, old buffers."""
    del config
    said = [*(model._keys_to_ignore_on_load_unexpected or ()), *map(_literal, model.all_tied_weights_keys)]
    return [*(f".*(?:{each}).*" for each in said), r".*rotary_emb\.inv_freq", r".*\.attn\.(?:masked_)?bias"]


def _literal(name: str) -> str:
    return name.replace(".", r"\.")
