from benchmarks import environment


def pytest_benchmark_update_machine_info(config, machine_info):
    """What a number depends on; and nothing about whose machine it was."""
    machine_info.clear()
    machine_info.update(environment.describe())


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info.pop("project", None)
    commit_info.pop("branch", None)
