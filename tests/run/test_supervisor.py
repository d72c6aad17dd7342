"""`make run` keeps everything running, says what it does, and leaves nothing behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import psycopg2
import pytest
import redis
from call import call
from client import free_port
from system import end, processes, spawn
from waiting import patience, wait_until

from app.config import ROOT
from app.run.embedded import EmbeddedError, PostgresServer, RedisServer
from app.run.processes import Kept, Program

# Of the watchdog, whose limit of a minute is more than a test should wait.
LIMIT = 6
# The real programs, of which threads hang when the files appear that HANG names.
WORKER = f"""
import os, threading
from app.worker import alive, caller, relay

alive.MOST_BEATS_STUCK = {LIMIT}


def hanging(step, file):
    def run_once(self, stopped):
        if os.path.exists(file):
            os.remove(file)
            threading.Event().wait()
        step(self, stopped)

    return run_once


relay.Sweeper.run_once = hanging(relay.Sweeper.run_once, os.environ["HANG"] + "worker")
caller.Caller.run_once = hanging(caller.Caller.run_once, os.environ["HANG"] + "webhooks")

{(ROOT / "worker.py").read_text()}
"""
MAIN = f"""
import pathlib, sys
from app.run import pulse, supervisor

pulse.MOST_MISSED = {LIMIT}
sys.exit(supervisor.main(pathlib.Path(sys.argv[1])))
"""


class Run:
    """One supervisor, and what it printed."""

    def __init__(self, tmp_path, name="data", port=None, **environ):
        self.port, self.data_dir = port or free_port(), tmp_path / name
        tree = tmp_path / "tree"
        tree.mkdir(exist_ok=True)
        (tree / "app").unlink(missing_ok=True)
        (tree / "app").symlink_to(ROOT / "app")
        # Copies: Python looks for modules where a script really lies.
        for program in ("wsgi.py", "web.py", "webhooks.py"):
            shutil.copy(ROOT / program, tree)
        (tree / "worker.py").write_text(WORKER)
        self.hang = tmp_path / "hang"
        settings = {"DATA_DIR": self.data_dir, "PORT": self.port, "WEB_WORKERS": 1, "HOST": ""}
        settings |= {"REDIS_URL": "", "DATABASE_URL": "", "SECRET_KEY": "", "APP_ENV": ""}
        settings |= {"HANG": self.hang}
        self.process = spawn(
            [sys.executable, "-c", MAIN, tree],
            env=os.environ | {name: str(value) for name, value in (settings | environ).items()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.output += line

    def says(self, pattern):
        wait_until(lambda: re.search(pattern, self.output) or self.process.poll() is not None)
        assert re.search(pattern, self.output), self.output

    def ends(self):
        """Wait for the end; return the exit code."""
        code = self.process.wait(patience(60))
        self.reader.join(patience(5))
        return code

    def processes(self, *words):
        return processes(self.data_dir, *words)

    def clean_up(self):
        end(self.process, self.data_dir)
        self.reader.join()
        self.process.stdout.close()


@pytest.fixture
def run(tmp_path):
    with ExitStack() as ends:

        def start(**options):
            started = Run(tmp_path, **options)
            ends.callback(started.clean_up)
            return started

        yield start


@pytest.mark.drill
def test_a_run_from_start_to_end(run):
    first = run()
    url = f"http://127.0.0.1:{first.port}"
    first.says(f"Ready: {url}\n")
    first.says(f"Sign in:   {url}/admin as admin@example.com, password in {first.data_dir}/admin_p")
    for word in ("Redis", "Postgres", "Preparing the database", "Starting the web server"):
        assert re.search(f"^(Starting )?{word}", first.output, re.MULTILINE), word
    assert "Seeded:    product 1 with 100 items" in first.output

    second = run()
    assert second.ends() == 1
    assert f"error: already running on {second.data_dir} (process" in second.output

    third = run(name="other", port=first.port)
    assert third.ends() == 1
    assert f"can't listen on 127.0.0.1:{first.port}" in third.output
    assert not (third.data_dir / "redis").exists()

    for name, words in {
        "worker": ["worker.py"],
        "webhooks": ["webhooks.py"],
        "web": ["app.run.serve"],
        "Redis": ["valkey-server"],
        "Postgres": ["bin/postgres"],
    }.items():
        before = first.processes(*words)
        os.kill(before[0], signal.SIGKILL)
        first.says(f"{name} was killed by SIGKILL; starting it again in 0.2 s")
        wait_until(lambda words=words, before=before: set(first.processes(*words)) - set(before))
    postgres = PostgresServer(first.data_dir).url.replace("+psycopg2", "")
    wait_until(lambda: RedisServer(first.data_dir).is_running())
    wait_until(lambda: PostgresServer(first.data_dir).is_running())
    assert redis.from_url(RedisServer(first.data_dir).url).ping()
    psycopg2.connect(postgres).close()

    (note,) = (first.data_dir.parent / "tree" / ".runs").iterdir()
    assert json.loads(note.read_text()) == {"url": url, "data_dir": str(first.data_dir)}
    first.process.terminate()
    assert first.ends() == 0
    assert first.processes() == []
    assert not note.exists()


@pytest.mark.drill
def test_sighup_renews_the_web_processes_and_the_worker(run):
    it = run()
    it.says("Ready")
    (main,), workers = it.processes("app.run.serve"), it.processes("web.py")
    worker = it.processes("worker.py")
    it.process.send_signal(signal.SIGHUP)
    wait_until(lambda: (now := it.processes("worker.py")) and not set(worker) & set(now))
    wait_until(lambda: (now := it.processes("web.py")) and not set(workers) & set(now))
    assert it.processes("app.run.serve") == [main]


@pytest.mark.drill
def test_a_killed_run_takes_all_with_it_and_can_be_repeated_at_once(run):
    first = run()
    first.says("Ready")
    first.process.kill()
    again = run(port=first.port)
    again.says("Ready")
    again.process.send_signal(signal.SIGINT)
    assert again.ends() == 0
    assert again.processes() == []


@pytest.mark.drill
def test_a_second_ctrl_c_hurries(run):
    it = run()
    it.says("Ready")
    (worker,) = it.processes("worker.py")
    os.kill(worker, signal.SIGSTOP)  # it hears of no signal but one
    it.process.send_signal(signal.SIGINT)
    wait_until(lambda: not it.processes("app.run.serve"))  # the worker's turn
    it.process.send_signal(signal.SIGINT)
    asked_at = time.monotonic()
    assert it.ends() == 0
    assert time.monotonic() - asked_at < patience(5)
    assert it.processes() == []


@pytest.mark.drill
def test_a_failed_preparation_ends_the_start(run):
    it = run(ADMIN_EMAIL="nobody")
    assert it.ends() == 1
    assert "error: ADMIN_EMAIL, ADMIN_PASSWORD: " in it.output
    assert "error: prepare ended with exit code 1: not started" in it.output
    assert it.processes() == []


@pytest.mark.drill
@pytest.mark.parametrize("program", ["worker", "webhooks"])
@pytest.mark.parametrize(
    ("cause", "words"),
    [("standstill", "it stands still"), ("thread", "one of its threads stands still")],
)
def test_a_worker_that_lives_and_no_longer_works_is_replaced(run, program, cause, words):
    it = run()
    it.says("Ready")
    url = f"http://127.0.0.1:{it.port}"
    (worker,) = it.processes(f"{program}.py")
    if cause == "standstill":
        os.kill(worker, signal.SIGSTOP)
    else:
        it.hang.with_name(f"{it.hang.name}{program}").touch()
    it.says(f"{program} {worker}: {words}; it is killed")
    it.says(f"{program} was killed by SIGKILL; starting it again in 0.2 s")
    wait_until(lambda: set(it.processes(f"{program}.py")) - {worker}, what="the next worker")
    wait_until(lambda: call(f"{url}/readyz").status == 200, what="readiness")
    token = (it.data_dir / "admin_api_token").read_text().strip()

    def counted():
        text = call(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"}).body.decode()
        found = re.findall(r'flashsale_worker_restarts_total{cause="(\w+)"} (\S+)', text)
        return {name: float(count) for name, count in found}

    expected = dict.fromkeys(("died", "standstill", "thread"), 0) | {cause: 1}
    wait_until(lambda: counted() == expected, what="the restart to be counted")
    assert it.output.count("it is killed") == 1


def test_a_wrong_setting_is_told_in_one_line(run):
    it = run(port="eighty")
    assert it.ends() == 2
    assert it.output == "error: PORT must be a whole number from 1 to 65535\n"


class Brittle(Program):
    """Dies whenever it is looked at."""

    name = "brittle"

    def __init__(self, error=None):
        self.launches, self.error = 0, error

    def launch(self):
        self.launches += 1
        if self.error:
            raise self.error

    def is_alive(self):
        return False


def test_restarts_back_off(caplog):
    kept, now = Kept(Brittle(), started_at=100), 100.0
    delays = []
    for _ in range(7):
        kept.check(now)
        delays.append(kept.restart_at - now)
        kept.check(kept.restart_at - 0.01)
        assert kept.program.launches == len(delays) - 1
        now = kept.restart_at
        kept.check(now)
        assert kept.program.launches == len(delays)
    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5, 5])
    kept.check(now + 10)
    assert kept.restart_at == pytest.approx(now + 10.2)
    assert caplog.messages[-1] == "brittle is gone; starting it again in 0.2 s"


def test_a_server_that_cannot_be_started_again_is_told(caplog):
    kept = Kept(Brittle(EmbeddedError("Redis can't use /data: No space left on device")))
    kept.check(0)
    kept.check(kept.restart_at)
    assert "No space left" in caplog.text
    assert kept.restart_at is None
