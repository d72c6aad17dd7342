"""In CI nothing is skipped: a test that did not run has shown nothing. What runs again is new."""

import os
from collections.abc import Generator

import pytest

# Docker Compose comes from no registry that CI reaches.
MAY_BE_SKIPPED = {"test_compose_can_be_read_by_docker"}
IN_CI = os.environ.get("CI") == "true"


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    if report.skipped and not hasattr(report, "wasxfail") and name not in MAY_BE_SKIPPED:
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr[2]}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Make anew what a test shares with its file before it runs again: it may have used that up."""
    if getattr(item, "execution_count", 1) > 1:
        for fixtures in item._fixtureinfo.name2fixturedefs.values():
            for fixture in fixtures:
                if fixture.scope == "module":
                    fixture.finish(item._request)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI:
        _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """A module that skips itself."""
    report = yield
    if IN_CI:
        _refuse(report)
    return report
