"""In what order a parallel run takes the files, and which of them share a running system."""

import gc
from collections import Counter
from contextlib import ExitStack

import pytest
from system import SHARED

from app.run.collector import spare_what_is_loaded

# The fixture `server` is a whole system: it costs as much as fifty tests to start, and goes on
# costing while it runs. Each group is run by one process, before all others: these take longest.
SYSTEMS = (
    (
        "tests/admin/test_browser.py",
        "tests/admin/test_accessibility.py",
        "tests/web/test_shop_page.py",
        "tests/web/test_clients.py",
    ),
    (
        "tests/admin/test_browser_pages.py",
        "tests/web/test_security.py",
        "tests/feed/test_feed.py",
        "tests/web/test_checkout.py",
        "tests/web/test_generated_client.py",
        "tests/whole/test_stress_finds.py",
        "tests/watch/test_telemetry.py",
    ),
)
# Few tests that take long: begun at the end, one of them would be waited for.
LONG = {
    "tests/run/test_embedded.py",
    "tests/run/test_supervisor.py",
    "tests/stock/test_refusals.py",
    "tests/stock/test_shards_on_nodes.py",
    "tests/whole/test_holds_machine.py",
    "tests/whole/test_resilience.py",
    "tests/whole/test_state_machine.py",
    "tests/worker/test_ending.py",
}
SYSTEM_OF = {file: number for number, files in enumerate(SYSTEMS) for file in files}


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def group_of(nodeid: str) -> str:
    """Name the files that share a system, or the one that has its own."""
    file = file_of(nodeid)
    return f"system {SYSTEM_OF[file]}" if file in SYSTEM_OF else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the systems' files first, then what else takes long: the last ones are short."""
    tests = Counter(file_of(item.nodeid) for item in items)

    def rank(item: pytest.Item) -> tuple[int, bool, int]:
        file = file_of(item.nodeid)
        return SYSTEM_OF.get(file, len(SYSTEMS)), file not in LONG, -tests[file]

    items.sort(key=rank)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the system that the files of a group have shared with the last of them."""
    if nextitem is None or group_of(nextitem.nodeid) != group_of(item.nodeid):
        item.config.stash[SHARED].close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run that was cut short has not come to the last of them."""
    session.config.stash[SHARED].close()


def pytest_configure(config: pytest.Config) -> None:
    """Look for no garbage while all is imported and collected: there is none."""
    gc.disable()
    config.stash[SHARED] = ExitStack()


def pytest_collection_finish() -> None:
    gc.enable()
    spare_what_is_loaded()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Run each file's tests, and those of one system's files, by one process after the other."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)
