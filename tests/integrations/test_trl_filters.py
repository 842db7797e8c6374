"""`SamplingMask.from_logits` keeps what transformers' own filters keep, ties included."""

import pytest
import torch

import mapo_kernels as mk

transformers = pytest.importorskip("transformers")

SETTINGS = [
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 3},
    {"top_k": 1},
    {"top_k": 100},
    {"min_p": 0.1},
    {"top_k": 7, "top_p": 0.8},
    {"top_p": 0.7, "min_p": 0.2},
    {"top_k": 9, "top_p": 0.95, "min_p": 0.05, "temperature": 0.6},
    {"top_p": 0.9, "temperature": 1.7},
]


def kept_by_transformers(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Columns that generation can sample, [n, V] bool; the order is that of `generate`."""
    found = transformers.TemperatureLogitsWarper(float(temperature))(None, logits)
    if top_k:
        found = transformers.TopKLogitsWarper(top_k)(None, found)
    if top_p < 1.0:
        found = transformers.TopPLogitsWarper(top_p)(None, found)
    if min_p:
        found = transformers.MinPLogitsWarper(min_p)(None, found)
    return found > -torch.inf


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_kept_columns_are_those_of_the_warpers(settings, ties):
    logits = torch.randn(200, 50) * 2
    if ties:
        logits = logits.round()
        logits[0] = 1.0
    expected = kept_by_transformers(logits, **settings)
    mask = mk.SamplingMask.from_logits(logits.view(4, 50, 50), **settings)
    kept = torch.zeros_like(expected)
    row = torch.repeat_interleave(mask.counts)
    kept[row, mask.token_ids.long()] = True
    kept[mask.counts == 0] = True
    assert torch.equal(kept, expected)
