"""The list of planted faults: each still fits the code that it is planted in."""

import pytest
from mutants import MUTANTS, places


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.old[:40])
def test_a_fault_has_one_place(mutant):
    assert len(places(mutant)) == 1 and mutant.old != mutant.new


def test_every_layer_has_faults():
    assert len({places(mutant)[0] for mutant in MUTANTS}) >= 15
    assert len(MUTANTS) >= 40
