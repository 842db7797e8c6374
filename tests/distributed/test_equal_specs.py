"""Specs that are equal have the same text, which is what ranks compare."""

import enum

import numpy as np
import pytest

import mapo_kernels as mk


class Name(str, enum.Enum):
    """A choice as configuration libraries write it."""

    CLIP = "clip"


PAIRS = [
    (mk.LossSpec, {"beta": 0}, {"beta": 0.0}),
    (mk.LossSpec, {"beta": -0.0}, {"beta": 0.0}),
    (mk.LossSpec, {"beta": 1, "eps_high": 1}, {"beta": 1.0, "eps_high": 1.0}),
    (mk.LossSpec, {"dual_clip": 3, "rollout_cap": 2}, {"dual_clip": 3.0, "rollout_cap": 2.0}),
    (mk.LossSpec, {"rollout_mask": [0, 2]}, {"rollout_mask": (-0.0, 2.0)}),
    (mk.LossSpec, {"eps_low": np.float64(0.25)}, {"eps_low": 0.25}),
    (mk.LossSpec, {"objective": np.str_("clip")}, {"objective": "clip"}),
    (mk.LossSpec, {"objective": Name.CLIP}, {"objective": "clip"}),
    (mk.AdvantageSpec, {"success_threshold": 1}, {"success_threshold": 1.0}),
    (mk.AdvantageSpec, {"success_threshold": -0.0}, {"success_threshold": 0}),
    (mk.AdvantageSpec, {"certainty": 1, "max_abs": 5}, {"certainty": 1.0, "max_abs": 5.0}),
    (mk.AdvantageSpec, {"difficulty": np.str_("focal")}, {"difficulty": "focal"}),
    (mk.AdvantageSpec, {"difficulty_exponent": 1}, {"difficulty_exponent": 1.0}),
    (mk.AdvantageSpec, {"std_correction": 1.0, "eps": 1}, {"std_correction": 1, "eps": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "one", "other"), PAIRS)
def test_equal_specs_have_one_text(kind, one, other):
    one, other = kind(**one), kind(**other)
    assert one == other and hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert one.pack() == other.pack()
    assert kind.unpack(*one.pack()) == one
