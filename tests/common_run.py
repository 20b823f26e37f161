# SPDX-License-Identifier: MIT
"""Plugin of pytest: choose the cases of a test in the common run; the other cases have the marker `every_case`.

    @pytest.mark.one_of_each
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("size", [16, 256])

has three cases in the common run instead of six: case i has value i of every `parametrize`. Shorter lists are repeated,
each time rotated by one more, so that two short lists give other pairs. `one_of_each(2)` leaves at most two cases,
evenly spread over the longest list. `few` names the common cases of one list, and `combined` those of a product of
lists. `docs/checks.md` says when the others run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

_MARKED = type(pytest.param(None))


def few(cases: Iterable[Any], *common: Any) -> list[Any]:
    """Return all cases for `parametrize`; cases that are not named as common get the marker."""
    cases = list(cases)
    assert all(case in cases for case in common), "a common case is no case"
    return [_param(case, marks=[] if case in common else [pytest.mark.every_case]) for case in cases]


def combined(
    names: str, *lists: Iterable[Any], common: Iterable[tuple[Any, ...]], indirect: Sequence[str] = ()
) -> pytest.MarkDecorator:
    """Return `parametrize` with every combination of values of the lists; those that are not common get the marker."""
    return pytest.mark.parametrize(names.split(), few(itertools.product(*lists), *common), indirect=list(indirect))


def _param(case: Any, marks: list[pytest.MarkDecorator]) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)


def is_common(item: pytest.Function, most: int | None = None) -> bool:
    """Whether the common run has this case of a test with the marker `one_of_each`; it has at most `most` cases."""
    places = []
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        given, several = [item.callspec.params[name] for name in names], len(names) > 1
        rows = [one.values if isinstance(one, _MARKED) else one if several else (one,) for one in values]
        place = next(n for n, row in enumerate(rows) if all(a is b for a, b in zip(row, given, strict=True)))
        places.append((place, len(values)))
    longest = max(length for _, length in places)
    turns = list(enumerate(places))
    cases = range(longest) if most is None else [n * longest // most for n in range(most)]
    return any(
        all(place == (case + nth * (case // length)) % length for nth, (place, length) in turns) for case in cases
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("one_of_each"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for each in cases.values():
        marker = each[0].get_closest_marker("one_of_each")
        most = marker.args[0] if marker and marker.args else None
        by_fixture = next(each[0].iter_markers("parametrize"), None) is None
        first = {n * len(each) // most for n in range(most)} if most else range(len(each))
        for number, item in enumerate(each):
            if not (number in first if by_fixture else is_common(item, most)):
                item.add_marker("every_case")
