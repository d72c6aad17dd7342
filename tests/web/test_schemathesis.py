"""The running server against its own description: thousands of requests, right and wrong ones."""

import json
import sys
from pathlib import Path

import pytest
from drills import often
from system import run_program, start_system, stop_system

pytestmark = pytest.mark.drill

HERE = Path(__file__).parent / "schemathesis"
# For each operation, in each way of making requests up; about 15 s in all.
EXAMPLES = often(20, 300)
PHASES = "examples,coverage,fuzzing,stateful"


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """A system of its own: products are changed at will, and no rate limit hides what is behind."""
    started = start_system(tmp_path_factory.mktemp("run"), PURCHASE_USER_LIMIT="off")
    yield started
    stop_system(started)


def test_the_server_is_as_described(system, tmp_path):
    report = tmp_path / "report.json"
    run = run_program(
        [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("--config-file", HERE / "schemathesis.toml", "run", f"{system.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {system.api_token}"),
            *("--max-examples", str(EXAMPLES), "--phases", PHASES, "--continue-on-failure"),
            *("--report", "json", "--report-json-path", report, "--no-color"),
        ],
        3600,
        tmp_path,
        SCHEMATHESIS_HOOKS="hooks",
        PYTHONPATH=str(HERE),
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    seen = json.loads(report.read_text())
    assert seen["operations"]["tested"] == seen["operations"]["total"]
    assert {phase["status"] for phase in seen["phases"].values()} == {"success"}
    assert (seen["test_cases"]["unique_failures"], seen["test_cases"]["errored"]) == (0, 0)
    assert seen["test_cases"]["generated"] > 800
