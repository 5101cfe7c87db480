"""Cases of a parametrized test, of which the fast tests take some and the slow tests the rest.

``some`` thins out one argument's values, and ``@pytest.mark.one_in(n)`` all of a test's cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

GOLDEN = (5**0.5 - 1) / 2


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Marks slow all but about one in n of the cases of each test that is marked ``one_in(n)``.

    The i-th case stays where the fraction of i·φ, φ the golden ratio, is below 1/n. Such numbers
    fall into step with no argument's values, as every n-th would, so that all values stay.
    """
    counts: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("one_in")
        if mark is not None and item.get_closest_marker("slow") is None:
            name = item.nodeid.partition("[")[0]
            if counts[name] * GOLDEN % 1 >= 1 / mark.args[0]:
                item.add_marker(pytest.mark.slow)
            counts[name] += 1


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Marks all cases slow but each ``every``-th, the first included."""
    found = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(pytest.param(*values, marks=[pytest.mark.slow] if i % every else []))
    return found
