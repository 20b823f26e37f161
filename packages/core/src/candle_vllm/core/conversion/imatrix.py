# SPDX-License-Identifier: MIT
"""Measure and write an importance matrix in llama.cpp's GGUF format; `loading/imatrix.py` reads it.

The model runs a text op by op in float32. Each matrix product sums the squares of its inputs by column, and counts its
inputs; experts count the tokens that are routed to them. The head is left out, as by `llama-imatrix`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.model import describe_family
from candle_vllm.core.assembly.opening import open_model
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.conversion.gguf_file import PlannedTensor
from candle_vllm.core.conversion.write import WrittenFile, write_plans
from candle_vllm.core.devices import CPU, require_torch
from candle_vllm.core.errors import UnsupportedModelError
from candle_vllm.core.inference_engine import InferenceEngine
from candle_vllm.core.kernels.lora import Place
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.loading.views import ColumnOrder, constant
from candle_vllm.core.loading.weights import beside_gguf
from candle_vllm.core.perplexity import cut
from candle_vllm.core.progress import tell
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType


class _Inputs:
    """Sums by adapter site, [experts, K + 1]: K sums of squares, the number of inputs; replaces `EagerAdapters`."""

    def __init__(self) -> None:
        self.sums: dict[int, NDArray[np.float64]] = {}

    def add(self, place: Place, x: Any, y: Any, _bias: Any) -> Any:
        self.add_expert(place, 0, None, x, y)
        return y

    def add_expert(self, place: Place, expert: int, _tokens: Any, x: Any, _y: Any) -> None:
        if len(x):  # the head has no rows, and gets no entry
            sums = self.sums.setdefault(place.number, np.zeros((max(1, place.experts), place.columns + 1)))
            sums[expert] += np.append(x.double().square().sum(0).numpy(), len(x))

    def look_up(self, _place: Place, _ids: Any, rows: Any) -> Any:
        return rows


def write_imatrix(
    config: EngineConfig, text: str, name: str, out: Path, window: int = 512, tokens: int | None = None
) -> WrittenFile:
    """Run the model of `config` on a text in windows, see `perplexity.cut`, and write the sums to a .gguf file.

    `name` is the text's name in the file; an existing file is replaced. Raises ConfigError if torch is not installed,
    UnsupportedModelError if GGUF has no names for the matrices, and the errors of `InferenceEngine` and `cut`.
    """
    require_torch("the inputs of layers are measured")
    plain: dict[str, Any] = {"device": "cpu", "dtype": "f32", "op_by_op": True, "enable_prefix_caching": False}
    config, inputs = dataclasses.replace(config, **plain, max_model_len=window, max_num_seqs=1), _Inputs()
    with InferenceEngine(config) as engine:
        if engine.model_info.implementation != "native":
            said = "runs on layers of transformers, whose matrices have no GGUF names: no imatrix is written"
            raise UnsupportedModelError(f"{config.model} {said}")
        before, windows = cut(engine, text, window, tokens)
        places = number_places(getattr(engine._require()[1], "decoder", None), cast("Any", inputs))
        for number, each in enumerate(windows):
            tell("reading the text", number, len(windows), "")
            engine.read_logits(before + each, None)
    plans: list[PlannedTensor] = []
    for tensor, sums in _by_name(config, places, inputs.sums, out).items():
        for end, part in ((".in_sum2", sums[:, :-1]), (".counts", sums[:, -1:])):
            plans.append(PlannedTensor(tensor + end, constant(tensor, part, out), GGMLQuantizationType.F32))
    if not plans:
        raise UnsupportedModelError(f"{config.model}: its matrices have no names in GGUF files")
    metadata = {"general.architecture": "imatrix", "general.type": "imatrix", "imatrix.datasets": [name]}
    metadata |= {"imatrix.chunk_count": len(windows), "imatrix.chunk_size": window}
    return write_plans(plans, metadata, out, lambda *_: None)


def _by_name(
    config: EngineConfig, places: Mapping[str, tuple[Place, ...]], sums: Mapping[int, NDArray[np.float64]], out: Path
) -> dict[str, NDArray[np.float64]]:
    """Return the sums by the matrices' names in GGUF files; names of single experts only if there are no others."""
    opened, found = open_model(model_files(config), CPU), dict[str, NDArray[np.float64]]()
    with opened.checkpoint:
        family, model = describe_family(opened.files, opened.checkpoint, opened.metadata, config.model_impl)
    for stored_line, line in beside_gguf(family.weights, model):
        path, _, part = stored_line.target.partition(":")
        prefix = part.removesuffix("weight")
        place = next((each for each in places.get(path, ()) if prefix in each.parts and prefix != part), None)
        for (written, view), name in zip(line.names, line.spelled, strict=True):
            if place is None or place.number not in sums or (name != written and len(line.names) > 1):
                continue
            own = sums[place.number]
            own = own if line.expert is None or name == written else own[line.expert, None]
            if isinstance(view, ColumnOrder):  # the file has other columns than the layer's input
                squares = view.undone(constant(name, own[:, :-1], out), model).load("F32")
                own = np.append(squares, own[:, -1:], 1)
            found.setdefault(name, own)
    return found
