"""Cases of a parametrized test, of which the fast tests take some and the slow tests the rest.

``some`` thins out one argument's values, and ``@pytest.mark.one_in(n)`` all of a test's cases.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def is_left_out(item: pytest.Function) -> bool:
    """Tells whether the fast tests leave out this case of a test that is marked ``one_in(n)``.

    The case stays if the places of its values, one for each parametrization, have a sum that n
    divides: each value stays in some case where another parametrization has n values.
    """
    mark = item.get_closest_marker("one_in")
    if mark is None:
        return False
    places = dict(item.callspec.indices)
    for parametrized in item.iter_markers("parametrize"):
        names = parametrized.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        for name in names[1:]:
            del places[name]
    return sum(places.values()) % int(mark.args[0]) != 0


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Marks all cases slow but each ``every``-th, the first included."""
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.slow] if i % every else []))
    return found
