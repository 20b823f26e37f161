# SPDX-License-Identifier: MIT
"""The tables of tests in docs/models.md, made of the registry and of what the tests of this folder are run with.

`uv run --group dev python packages/core/tests/models/models_page.py` writes it anew; a test compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[4]))  # run as a program

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from candle_vllm.core.models.registry import HF_ENCODERS, HF_FAMILIES
from packages.core.tests.models.any_configs import ALONE, IN_BATCHES, REFUSED
from packages.core.tests.models.families import (
    CUDA_ISQ,
    FORMATS,
    ISQ_TYPES,
    RENAMED,
    ROWS,
    TOWERS,
    cuda_rows,
    first_rows,
)

PAGE = Path(__file__).parents[4] / "docs" / "models.md"
BEGIN, END = "<!-- table of families: begin -->", "<!-- table of families: end -->"
TYPES_BEGIN, TYPES_END = "<!-- causal types of transformers: begin -->", "<!-- causal types of transformers: end -->"
LEFT_OUT = {  # by transformers
    "deepseek_ocr2_text": "DeepseekOcr2ForCausalLM",
    "glm5_next_text": "Glm5NextForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "muse_glimmer_text": "MuseGlimmerForCausalLM",
    "step3p5": "Step3p5ForCausalLM",
    "unlimited_ocr_text": "UnlimitedOcrForCausalLM",
}
SPELLED = {
    "BailingMoeV3ForCausalLM": "BailingHybridForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "ExaoneMoEForCausalLM": "ExaoneMoeForCausalLM",
    "MiniMaxM3SparseForCausalLM": "MiniMaxM3VLForCausalLM",
}  # as published files have it
COMPILED, TORCH, INTERPRETED, REFERENCE, UNTESTED, NONE = (
    "compiled",
    "torch",
    "interpreted",
    "reference",
    "untested",
    "–",
)


ENCODED = "compiled on the CPU (DeBERTa: in torch) and in torch on a GPU"  # what `core/tests/pooling` compares


def rows_by_class() -> dict[str, list[str]]:
    """Names of test rows by the class that their checkpoints name."""
    found: dict[str, list[str]] = {name: [] for name in HF_FAMILIES}
    for name, row in ROWS.items():
        named = {**LEFT_OUT, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}[row.model_type]
        found[str(named)].append(name)
    found |= {name: list(found[same]) for name, same in SPELLED.items()}
    same = {"chatglm": "GlmForCausalLM", "mimo2": "MiMoV2FlashForCausalLM"}
    renamed = {name: same.get(gguf, "LlamaForCausalLM") for name, gguf in RENAMED.items()}
    for name, text in {**TOWERS, **renamed}.items():
        found[name] = list(found[text])
    return found


def table() -> str:
    """A table for the CPU, one for GPUs, and the encoders. A row has all architectures that are tested alike."""
    parts = [f"Formats: {', '.join(_FORMATS)}."]
    for title, cells in (("On the CPU", _on_cpu), ("On a GPU", _on_gpu)):
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, tests in sorted(rows_by_class().items()):
            alike.setdefault(tuple(cells(name, tests)), []).append(f"`{name}`")
        *few, (usual, many) = sorted(alike.items(), key=lambda item: len(item[1]))
        lines = [f"| {', '.join(names)} | {_formats_of(words)} |" for words, names in few]
        lines.append(f"| the other {len(many)} [architectures](#families) | {_formats_of(usual)} |")
        parts.append("\n".join([f"**{title}**\n", "| architectures | formats |\n|---|---|", *lines]))
    encoders = ", ".join(f"`{name}`" for name in sorted(HF_ENCODERS))
    return "\n\n".join([*parts, f"**Encoders**, {ENCODED}, from safetensors, and BERT from GGUF: {encoders}."])


_FORMATS = ("safetensors", "GGUF", f"`--isq` ({', '.join(ISQ_TYPES)})", *FORMATS)


def _formats_of(words: tuple[str, ...]) -> str:
    """The formats of each word, most formats last: "no GGUF; interpreted: safetensors; reference: other formats"."""
    alike: dict[str, list[str]] = {}
    for word, format in zip(words, _FORMATS, strict=True):
        alike.setdefault(word, []).append(format.partition(" (")[0])
    *few, (most, _) = sorted(alike.items(), key=lambda item: len(item[1]))
    shown = [f"no {', '.join(each)}" if word == NONE else f"{word}: {', '.join(each)}" for word, each in few]
    return "; ".join([*shown, f"{most}: {'other' if few else 'all'} formats"])


def _on_cpu(name: str, tests: list[str]) -> list[str]:
    """What is tested of one architecture, format by format."""
    word = COMPILED if all(ROWS[test].recorded for test in tests) else TORCH
    first = set(tests) & set(first_rows())
    return [
        word if tests else UNTESTED,
        _gguf(name, tests, word),
        *[word if first else UNTESTED for _ in ("isq", *FORMATS)],
    ]


def _on_gpu(name: str, tests: list[str]) -> list[str]:
    """The same; what is not interpreted is held by the GPU's layers, and multiplied by its kernels' references."""
    other = REFERENCE if set(tests) & set(first_rows()) else UNTESTED
    return [
        INTERPRETED if tests else UNTESTED,
        _gguf(name, tests, INTERPRETED),
        INTERPRETED if set(tests) & set(CUDA_ISQ) else other,
        *[INTERPRETED if set(tests) & set(cuda_rows(format)) else other for format in FORMATS],
    ]


def _gguf(name: str, tests: list[str], word: str) -> str:
    if HF_FAMILIES[TOWERS.get(name, name)].config_from_gguf is None:
        return NONE
    return word if any(ROWS[test].gguf for test in tests) else UNTESTED


def types() -> str:
    """Which causal types of transformers run here, and by whose layers."""
    own = {name for name, named in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if named in {*HF_FAMILIES, *TOWERS}}
    lists = {
        "By this project's own layers": own,
        "By layers of transformers, in batches": {*IN_BATCHES} - own,
        "By layers of transformers, one sequence at a time": {*ALONE} - own,
    }
    lines = [f"**{title}**: {', '.join(f'`{name}`' for name in sorted(names))}." for title, names in lists.items()]
    rest = "; ".join(f"`{name}` ({why})" for name, why in sorted(REFUSED.items()) if name not in own)
    return "\n\n".join([*lines, f"**Not tested or not running**: {rest}."])


def page(text: str) -> str:
    """The page with the table and the lists as they should be."""
    for begin, end, made in ((BEGIN, END, table()), (TYPES_BEGIN, TYPES_END, types())):
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{made}\n\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
