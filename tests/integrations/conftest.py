import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--must-run",
        action="store_true",
        help="fail if no test passed: where a trainer has been installed, skipping is no pass",
    )


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.getoption("--must-run") and not reporter.stats.get("passed"):
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED
