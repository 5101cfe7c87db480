"""The named faults fit the code as it is now."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import MUTANTS, ROOT, TESTS, place_of
from tests.mutations import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.area}, {m.name}")
def test_a_fault_fits_one_place_and_is_python(mutant: Mutant) -> None:
    assert mutant.code != mutant.fault
    path = place_of(mutant, ROOT)
    ast.parse(path.read_text().replace(mutant.code, mutant.fault))


def test_faults_have_names_of_their_own_and_tests_that_exist() -> None:
    assert len({(m.area, m.name) for m in MUTANTS}) == len(MUTANTS)
    assert {m.area for m in MUTANTS} == TESTS.keys()
    assert all((ROOT / path).exists() for paths in TESTS.values() for path in paths)
