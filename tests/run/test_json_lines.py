"""With LOG_FORMAT=json every line of the whole system is an object with a time, whatever dies."""

import json
import os
import signal
import subprocess
import sys
from datetime import datetime

import pytest
import redis
from call import call
from client import free_port
from system import processes, start_system, stop_system
from waiting import patience, wait_until

from app.config import ROOT
from app.run.embedded import PostgresServer, RedisServer


def parsed(text: str) -> list[dict]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo, line
        assert line["level"], line
        assert line["message"], line
    return lines


@pytest.fixture
def system(tmp_path):
    started = start_system(tmp_path, LOG_FORMAT="json", LOG_LEVEL="warning", WEB_WORKERS="2")
    yield started
    if started.process.poll() is None:
        stop_system(started)


def sells(system) -> bool:
    """Tell whether a purchase is answered; for a moment after a kill nobody is there."""
    try:
        return call(f"{system.url}/purchase", {"userId": 1, "productId": 1}).status == 200
    except OSError:
        return False


@pytest.mark.drill
def test_a_whole_run(system):
    log = system.data_dir / "supervisor.log"
    wait_until(lambda: "Sign in:" in log.read_text())
    for words, name in (
        (["web.py"], "web process"),
        (["worker.py"], "worker"),
        (["app.run.serve"], "web"),
    ):
        os.kill(processes(system.data_dir, *words)[0], signal.SIGKILL)
        wait_until(lambda name=name: f'"{name} was killed by SIGKILL' in log.read_text())
    wait_until(lambda: sells(system))
    for server in (RedisServer(system.data_dir), PostgresServer(system.data_dir)):
        if server.name == "Redis":
            with redis.Redis.from_url(server.url) as client:
                pid = client.info("server")["process_id"]
        else:
            pid = int((server.directory / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda name=server.name: f'"{name} was killed by SIGKILL' in log.read_text(), 30)
        wait_until(server.is_running, 30)
    wait_until(lambda: call(f"{system.url}/readyz").status == 200, 60)
    system.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "new processes take over" in log.read_text())
    stop_system(system)
    messages = [line["message"] for line in parsed(log.read_text())]
    for begin in ("Starting Redis", "Starting Postgres", "Preparing", "Admin: ", "Seeded: ",
                  "Starting the web server", f"Ready: {system.url}", "Sign in: "):  # fmt: skip
        assert any(message.startswith(begin) for message in messages), begin
    text = log.read_text()
    assert system.admin_password not in text
    assert system.api_token not in text


@pytest.mark.parametrize(
    "program",
    [["-m", "app.run.supervisor"], ["-m", "app.run.serve"], ["worker.py"], ["-c", "import wsgi"],
     ["-m", "flask", "--app", "wsgi", "prepare"]],
    ids=lambda words: " ".join(words),
)  # fmt: skip
@pytest.mark.parametrize(
    "wrong",
    [{"PORT": "http"}, {"REDIS_URL": "redis://h", "DATABASE_URL": "postgresql://h/d"}],
    ids=["a setting", "no secret"],
)
def test_a_start_that_fails(tmp_path, program, wrong):
    environ = {"DATA_DIR": str(tmp_path), "PORT": str(free_port()), "SECRET_KEY": ""}
    environ |= {"LOG_FORMAT": "json", **wrong}
    done = subprocess.run(
        [sys.executable, *program],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode != 0
    (line,) = parsed(done.stdout + done.stderr)
    assert next(iter(wrong)) in line["message"] or "SECRET_KEY" in line["message"]


def test_what_nobody_catches():
    program = """
import threading, warnings
from app import telling
telling.begin()
warnings.warn("old")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
class Odd:
    def __del__(self): raise OSError("odd")
odd = Odd(); del odd
raise RuntimeError("at the\\nend")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 1
    warning, thread, odd, end = parsed(done.stdout + done.stderr)
    assert "old" in warning["message"]
    assert "ZeroDivisionError" in thread["exception"]
    assert "odd" in odd["exception"]
    assert "RuntimeError: at the\nend" in end["exception"]
