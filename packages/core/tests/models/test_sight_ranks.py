# SPDX-License-Identifier: MIT
"""Models that see, divided among ranks and stages: the answers of one rank, whatever prompts are cut into.

The ranks are threads of one process; `tests/engine/test_sight_over_processes.py` has processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models import (
    test_glm4v,
    test_granite4_vision,
    test_internvl,
    test_minicpmv,
    test_qwen_vl,
    test_sight_families,
)
from packages.core.tests.models.sight import answers_of_ranks, answers_op_by_op, require_same
from packages.core.tests.models.tiny import load
from packages.core.tests.toy_sight import write_toy_sight
from tests.common_run import few

WRITERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "SmolVLM": (lambda folder: write_toy_sight(folder, splits=False), "<image>"),
    **{
        name: (lambda folder, name=name: test_sight_families.write_sight(folder, name), row.asks)
        for name, row in test_sight_families.ROWS.items()
    },
    **{
        name: (lambda folder, name=name: test_qwen_vl.write(folder, name), test_qwen_vl.ONE)
        for name in test_qwen_vl.KINDS
    },
    **{
        name: (lambda folder, name=name: test_glm4v.write(folder, name), test_glm4v.one(name))
        for name in test_glm4v.TEXTS
    },
    **{
        name: (lambda folder, name=name: test_internvl.write(folder, name), test_internvl.ONE)
        for name in test_internvl.TEXTS
    },
    "MiniCPM-V": (lambda folder: test_minicpmv.write(folder, "middle"), "<|image_pad|>"),
    "MiniCPM-V 4.7": (lambda folder: test_minicpmv.write(folder, "canvas"), "<|image_pad|>"),
    "granite4_vision": (test_granite4_vision.write, "<image>"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = WRITERS[name][0](tmp_path_factory.mktemp("sight"))
        return made[name]

    return folder


def prompts(name: str) -> list[tuple[str, Any]]:
    """Of two pictures, of none, of one, of one twice behind what an earlier one begins with."""
    asks, pictures = WRITERS[name][1], test_qwen_vl.PICTURES[:3]
    return [
        (f"Compare {asks} with {asks}", pictures[:2]),
        ("Nothing to see.", []),
        (f"{asks} and?", pictures[2:]),
        (f"Compare {asks} with {asks}", [pictures[0]] * 2),
    ]


DIVISIONS = ((2, 1), (1, 2), (2, 2))
CASES = [
    (name, size, stages)
    for name in WRITERS
    for size, stages in DIVISIONS
    if stages == 1 or name != "Gemma 4 E2B"  # whose layers read the caches of others
]


def cut(name: str) -> int:
    """Tokens of a step that cut a prompt; of Gemma 4 at least those of an image, which have 70."""
    return 94 if name.startswith("Gemma 4") else 40


@pytest.mark.parametrize(("name", "size", "stages"), few(CASES, ("Gemma 3", 2, 2)))
def test_answers_are_those_of_one_rank(name: str, size: int, stages: int, written: Callable[[str], Path]) -> None:
    """With prompts whole, and cut within a picture where that may be."""
    right = answers_op_by_op(load(written(name), op_by_op=True, max_images=64), prompts(name))
    for budget in (256, cut(name)):
        require_same(answers_of_ranks(written(name), prompts(name), size, stages, budget=budget), right)


GPU = [case for case in CASES if case[1:] in DIVISIONS[:2]]


@pytest.mark.parametrize(("name", "size", "stages"), few(GPU, ("qwen3_vl", 2, 1)))
def test_steps_of_gpus_have_the_same_answers(name: str, size: int, stages: int, written: Callable[[str], Path]) -> None:
    """What is launched and captured, with prompts cut; the first rank's tower works between the steps."""
    with exact_sums():
        right = answers_op_by_op(load(written(name), op_by_op=True, max_images=64), prompts(name))
        require_same(answers_of_ranks(written(name), prompts(name), size, stages, budget=cut(name), gpu=True), right)
