"""`make stress` finds the system that runs here, or says what is missing."""

import json
import os
import subprocess
import sys

import client as stress
import pytest
from client import free_port
from waiting import patience

NAMES = ("URL", "PORT", "HOST", "DATA_DIR", "ADMIN_API_TOKEN")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project's directory of its own, and nothing in the environment."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(stress, "ROOT", tmp_path)

    def run(number, pid=None):
        data_dir = tmp_path / f"data{number}"
        data_dir.mkdir()
        (data_dir / "admin_api_token").write_text(f"token{number}\n")
        (tmp_path / ".runs").mkdir(exist_ok=True)
        note = {"url": f"http://127.0.0.1:{number}", "data_dir": str(data_dir)}
        (tmp_path / ".runs" / str(pid or os.getpid())).write_text(json.dumps(note))
        return data_dir

    return run


def found(url=None, token=None):
    server = stress.find_server(url, token)
    return server.url.geturl(), server.token


def dead_pid():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_the_one_that_runs(here):
    here(8001, dead_pid())
    here(8002)
    assert found() == ("http://127.0.0.1:8002", "token8002")


def test_one_of_several_has_to_be_named(here, monkeypatch):
    here(8001)
    there = here(8002, os.getppid())
    with pytest.raises(stress.CannotRun, match="several systems run here"):
        found()
    assert found("http://127.0.0.1:8001") == ("http://127.0.0.1:8001", "token8001")
    monkeypatch.setenv("DATA_DIR", str(there))
    assert found() == ("http://127.0.0.1:8002", "token8002")
    monkeypatch.delenv("DATA_DIR")
    monkeypatch.setenv("PORT", "8001")
    assert found() == ("http://127.0.0.1:8001", "token8001")


def test_what_is_given_counts(here, monkeypatch, tmp_path):
    assert found("https://shop.example", "t") == ("https://shop.example", "t")
    (tmp_path / ".env").write_text("PORT=8123\nADMIN_API_TOKEN=of-the-file\n")
    assert found() == ("http://127.0.0.1:8123", "of-the-file")
    monkeypatch.setenv("ADMIN_API_TOKEN", "of-the-environment")
    assert found() == ("http://127.0.0.1:8123", "of-the-environment")


def test_what_is_missing_is_said(here):
    with pytest.raises(stress.CannotRun, match="start `make run`, or give --url and --token"):
        found()
    with pytest.raises(stress.CannotRun, match="no admin token: give --token, ADMIN_API_TOKEN or"):
        found("http://127.0.0.1:1")


def test_without_an_argument_the_running_system_is_tested(server):
    """The whole way: from the note that the run left in the project's directory."""
    environ = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "stress/idempotency_test.py"],
        cwd=stress.ROOT,
        # Other systems of these tests may be running beside it.
        env=environ | {"DATA_DIR": str(server.data_dir)},
        capture_output=True,
        text=True,
        timeout=patience(120),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout


def test_a_server_that_is_away_is_told_in_one_line():
    done = subprocess.run(
        [sys.executable, "stress/stress_test.py", "--url", f"127.0.0.1:{free_port()}"],
        cwd=stress.ROOT,
        env=os.environ | {"ADMIN_API_TOKEN": "x"},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("stress_test.py: can't reach http://127.0.0.1:")
    assert done.stderr.count("\n") == 1
