# SPDX-License-Identifier: MIT
"""The layout of a model family in a GGUF file, and what llama.cpp refuses in such files."""

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
    """Description of a model family in GGUF metadata.

    Attributes:
        name: value of `general.architecture`.
        more: keys beyond those of all architectures, without the architecture's prefix; they take precedence.
        otherwise: fields of the model's description that differ in the file, such as the layout of stored tensors.
        eps: key of the norms' epsilon.
        interleaved: q and k rows are stored in pairs of adjacent rows.
        names: parts of tensor names in files of this kind, for tensors with several names; otherwise the first is used.
        head: llama.cpp requires a head in the file, even if it equals the embedding table.
        log_multiplier: factor of the share of yarn's scale in the attention scores; None if there is no key for it.
        unread: ends of names of tensors that llama.cpp does not know; it refuses files with such tensors.
        square: the width of all heads together must equal the hidden size.
        every: all layers must have experts.
        norm: whether the weights of chosen experts sum to 1; None if the file has a key for it.
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
        """Return the description of the model in a file of this architecture."""
        tied = config.tie_embeddings and not self.head
        usual: Keys = {"interleaved_rotary": self.interleaved, "tie_embeddings": tied, "has_head": True}
        return dataclasses.replace(config, **usual | self.otherwise(config))

    def check(self, config: Any, names: Iterable[str], source: Path) -> None:
        """Refuse a model whose file llama.cpp would not load, or would compute differently.

        Args:
            config: the model's description.
            names: names of the file's tensors.
            source: file that errors name.

        Raises:
            UnsupportedModelError: the message names everything that the file cannot represent.
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
