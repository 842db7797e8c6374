"""Sequences whose tokens are split over ranks equal those of one process."""

import pytest
import sequence_ranks as ranks
import torch
from spawn import run_ranks

import mapo_kernels as mk
from mapo_kernels._triton import HAS_TRITON, interprets

FOUR_INTERPRETED = pytest.param("interpreter-4", marks=pytest.mark.slow)


@pytest.fixture(params=["eager-2", "eager-4", "interpreter-2", FOUR_INTERPRETED])
def world(request):
    """Number of ranks, and their backend."""
    backend, size = request.param.split("-")
    if backend == "interpreter" and not (HAS_TRITON and interprets()):
        pytest.skip("Triton compiles here, or is not installed")
    return int(size), backend


JOBS = [
    ranks.every_level, ranks.odd_batches, ranks.with_plans, ranks.with_data_parallel,
    ranks.rollout_masks,
]  # fmt: skip


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_ranks_equal_one_process(job, world):
    size, backend = world
    run_ranks(size, job, backend)


def test_what_is_no_group():
    with pytest.raises(TypeError, match="sequence_group: expected a torch.distributed"):
        mk.mapo_loss(torch.zeros(2, 3), advantages=torch.ones(2), sequence_group="x")
