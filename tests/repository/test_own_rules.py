"""The rules that the tests themselves are held to: see leftovers.py, strict.py and waiting.py."""

import sys

import pytest
from system import run_program
from waiting import wait_until

from app.config import ROOT

LEAK = """
import subprocess, sys
CODE = "import subprocess; subprocess.Popen(['sleep', '600'])"
def test_whose_childs_child_is_left():
    subprocess.run([sys.executable, "-c", CODE], check=True)
"""
SKIP = """
import pytest
def test_skips(): pytest.skip("no reason")
def test_compose_can_be_read_by_docker(): pytest.skip("the one exception")
@pytest.mark.xfail
def test_fails_as_expected(): assert False
"""


AGAIN = """
import itertools, pytest
made = itertools.count(1)
@pytest.fixture(scope="session")
def of_the_run(): return next(made)
@pytest.fixture(scope="module")
def of_the_file(of_the_run):
    yield (one := [of_the_run, next(made)])
    one.clear()
def test_before(of_the_file): assert of_the_file == [1, 2]
def test_that_uses_it_up(of_the_file): assert of_the_file.pop() == 3
def test_after(of_the_file): assert of_the_file == [1]
"""


@pytest.fixture
def suite(tmp_path):
    """Run a suite of one file under the rules."""

    def run(text: str, *arguments: str, **environ: str):
        (tmp_path / "test_one.py").write_text(text)
        # None but these: to import all that are installed takes longest.
        plugins = ("-p", "leftovers", "-p", "strict", "-p", "xdist", "-p", "no:cacheprovider")
        return run_program(
            [sys.executable, "-m", "pytest", "-c", "none.ini", *plugins, *arguments],
            60,
            tmp_path,
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
            PYTHONPATH=f"{ROOT / 'tests'}:{ROOT / 'stress'}:{ROOT}",
            **environ,
        )

    (tmp_path / "none.ini").write_text("[pytest]\n")
    return run


@pytest.mark.parametrize("arguments", [[], ["--numprocesses", "1"]], ids=["alone", "parallel"])
def test_what_is_left_running_fails_the_run_and_is_ended(suite, arguments):
    run = suite(LEAK, *arguments, TEST_PATIENCE="0.05")
    assert "1 passed" in run.stdout, run.stdout + run.stderr
    assert "LEFT RUNNING" in run.stdout
    assert run.returncode == 1


@pytest.mark.parametrize(("ci", "failed"), [("true", 1), ("", 0)])
def test_a_skip_fails_in_ci(suite, ci, failed):
    run = suite(SKIP, CI=ci)
    assert run.returncode == failed, run.stdout + run.stderr
    assert f"{2 - failed} skipped, 1 xfailed" in run.stdout
    assert ("1 failed" in run.stdout) == bool(failed)


def test_what_runs_again_shares_nothing_with_its_first_try(suite):
    run = suite(AGAIN, "-p", "pytest_rerunfailures", "--reruns", "1")
    assert "3 passed, 1 rerun" in run.stdout, run.stdout + run.stderr


def test_a_deadline_passes():
    with pytest.raises(pytest.fail.Exception, match="for the impossible"):
        wait_until(lambda: False, 0.01, "the impossible")
