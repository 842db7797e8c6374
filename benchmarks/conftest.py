import platform

import torch

import mapo_kernels


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a number depends on; and nothing about whose machine it was."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    cuda = torch.cuda.is_available()
    machine_info.clear()
    machine_info.update(
        device=torch.cuda.get_device_name() if cuda else platform.machine(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton_version,
        mapo_kernels=mapo_kernels.__version__,
        backend=mapo_kernels.describe_backend(),
    )


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("project", None)
    commit_info.pop("branch", None)
