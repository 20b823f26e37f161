# SPDX-License-Identifier: MIT
"""A tiny checkpoint in a format of quantised weights, beside the plain checkpoint of the numbers that it means."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from packages.core.tests.models.families import FORMATS
from packages.core.tests.models.tiny import config_of
from packages.core.tests.quantization.format_writers import WRITERS

_KEPT_PLAIN = re.compile(
    r"embed|lm_head|altup\.|\.gate\.(wg\.)?weight|router|norm|shared_expert_gate|block_inject|kv_b_proj|g_proj|in_proj_(a|b|ba)\.|linear_attn\.[ab]_proj|(self_attn|attention)\.b_proj"
)
"""What the makers of quantised checkpoints leave alone."""


def write_format(source: Path, format: str, folder: Path) -> tuple[Path, Path]:
    """Folders of the quantised checkpoint and of the plain one, below `folder`.

    GPT-2's matrices, plain ones of which have inputs as rows, are quantised with outputs as rows, as GPTQ's makers do.
    """
    stored, plain = (shutil.copytree(source, folder / kind) for kind in ("stored", "plain"))
    weights = load_file(source / "model.safetensors")
    parts, config = dict(weights), {}
    names = [name for name, weight in weights.items() if weight.dim() == 2 and _quantised(name)]
    assert len(names) >= 2, "nothing to quantise"
    for matrix in names:
        turned = config_of(source)["model_type"] == "gpt2" and ".c_" in matrix
        weight = parts.pop(matrix)
        written = WRITERS[FORMATS[format]](weight.T.contiguous() if turned else weight)
        stem = matrix.removesuffix(".weight")
        parts |= {stem + end: part.contiguous() for end, part in written.parts.items()}
        weights[matrix] = written.weight.T.contiguous() if turned else written.weight
        config = written.config
    save_file(parts, stored / "model.safetensors")
    save_file(weights, plain / "model.safetensors")
    kept = [name.removesuffix(".weight") for name in weights if weights[name].dim() == 2 and name not in names]
    settings = config_of(source) | {"quantization_config": config | _left_plain(config, kept)}
    (stored / "config.json").write_text(json.dumps(settings))
    return stored, plain


def _quantised(name: str) -> bool:
    return name.endswith(".weight") and not _KEPT_PLAIN.search(name)


def _left_plain(config: Mapping[str, object], names: list[str]) -> dict[str, list[str]]:
    """What a checkpoint says of the layers that it leaves alone."""
    key = "ignore" if config["quant_method"] in ("compressed-tensors", "modelopt") else "modules_to_not_convert"
    return {} if config["quant_method"] == "gptq" else {key: names}
