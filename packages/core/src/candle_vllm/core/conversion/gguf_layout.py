# SPDX-License-Identifier: MIT
"""How a family is laid out in a GGUF file, and what llama.cpp refuses in files of its kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from candle_vllm.core.errors import UnsupportedModelError

Keys = dict[str, Any]

DIVISORS = "rope_freqs.weight"
BIASES = (".attn_output.bias", ".ffn_gate.bias", ".ffn_up.bias", ".ffn_down.bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a family is described in GGUF metadata.

    Attributes:
        name: `general.architecture`.
        more: keys beyond those that all have, without the architecture's prefix; they win.
        otherwise: fields of the model's description that its file has otherwise: how what is stored is laid out, and
            what is left out.
        eps: key of the norms' epsilon.
        interleaved: q and k rows are stored in pairs of neighbours.
        names: parts of the names that files of this kind have, where a tensor has several; else the first is meant.
        head: llama.cpp wants a head in the file, also where it is the embedding table once more.
        log_multiplier: times what the share of yarn's scale that scores get is written; None where there is no key.
        unread: ends of the names of tensors that llama.cpp has no place for; it refuses files that have them.
        square: the heads together must be as wide as the hidden state.
        every: all layers must have experts.
        norm: whether the weights of chosen experts sum to 1; None where the file says it.
    """

    name: str
    more: Callable[[Any], Keys] = lambda _: {}
    otherwise: Callable[[Any], Keys] = lambda _: {}
    eps: str = "attention.layer_norm_rms_epsilon"
    interleaved: bool = False
    names: Callable[[Any], Sequence[str]] = lambda _: ()
    head: bool = False
    log_multiplier: float | None = None
    unread: tuple[str, ...] = (DIVISORS, *BIASES)
    square: bool = False
    every: bool = False
    norm: bool | None = None

    def stored(self, config: Any) -> Any:
        """The description of the model as a file of this architecture has it."""
        tied = config.tie_embeddings and not self.head
        usual: Keys = {"interleaved_rotary": self.interleaved, "tie_embeddings": tied, "has_head": True}
        return dataclasses.replace(config, **usual | self.otherwise(config))

    def check(self, config: Any, names: Iterable[str], source: Path) -> None:
        """Refuses a model whose file llama.cpp would not load, or would compute otherwise.

        Args:
            config: the model's description.
            names: of the file's tensors.
            source: the file to blame.

        Raises:
            UnsupportedModelError: the message names all that has no place.
        """
        found = tuple(names)
        lacks = [end.removeprefix(".") for end in self.unread if any(name.endswith(end) for name in found)]
        if self.square and config.num_heads * config.head_dim != config.hidden_size:
            lacks.append("heads that together are not as wide as the hidden state")
        mixture = getattr(config, "mixture", None)
        if self.every and len(config.sparse_layers) < config.num_layers:
            lacks.append("layers without experts")
        if mixture is not None and self.norm not in (None, mixture.renormalise):
            lacks.append(f"norm_topk_prob {str(mixture.renormalise).lower()}")
        if lacks:
            raise UnsupportedModelError(
                f"{source}: llama.cpp's {self.name} has no {', no '.join(lacks)}; such a model can be served from its "
                "folder, with `isq` where that is wanted"
            )
