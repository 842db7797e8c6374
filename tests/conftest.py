import interpreted  # noqa: F401
import pytest
import torch
from backends import HAS_GPU, INTERPRETS
from parts import (  # noqa: F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_report_header,
    pytest_xdist_make_scheduler,
)

torch.set_num_threads(1)


@pytest.fixture(params=["eager", "interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Each backend that can run here, eager, interpreted or on a GPU; where its tensors go.

    `backends.with_two_threads_too` adds the eager backend with two threads.
    """
    import mapo_kernels

    if request.param == "gpu" and not HAS_GPU:
        pytest.skip("needs a GPU")
    if request.param == "interpreter" and not INTERPRETS:
        pytest.skip("Triton compiles here (the gpu variant runs instead) or is not installed")
    mapo_kernels.set_backend("eager" if request.param.startswith("eager") else "triton")
    torch.set_num_threads(2 if request.param == "eager-2-threads" else 1)
    yield torch.device("cuda" if request.param == "gpu" else "cpu")
    torch.set_num_threads(1)
    mapo_kernels.set_backend(None)


@pytest.fixture(autouse=True)
def fresh():
    """Whatever ran before, the same random numbers and the backend of the environment."""
    import mapo_kernels

    mapo_kernels.set_backend(None)
    torch.manual_seed(0)


@pytest.fixture
def nothing_computes(monkeypatch):
    """Fails a test in which anything is launched, on either backend: errors come before."""
    from mapo_kernels import hidden as hidden_level
    from mapo_kernels import operators

    def launched(*_, **__):
        raise AssertionError("something was launched")

    for module, names in (
        (operators, ("token_loss", "group_advantages", "logits_loss", "score_rows")),
        (hidden_level, ("linear_loss", "linear_scores")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, launched)
