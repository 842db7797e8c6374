"""The list of planted faults: each still fits the code that it is planted in."""

import pytest
from mutants import MUTANTS, occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.module}: {m.old[:40]}")
def test_a_fault_has_one_place(mutant):
    assert occurrences(mutant) == 1 and mutant.old != mutant.new


def test_every_layer_has_faults():
    modules = {mutant.module for mutant in MUTANTS}
    assert {"formula", "plan", "parallel", "vocab_parallel", "checks"} <= modules
    assert len(MUTANTS) >= 40
