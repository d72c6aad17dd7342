"""A web process that lives and no longer works is replaced; one that is busy or was stopped is not.

The deadlines are shortened to LIMIT seconds; everything else is the real thing, with a few views
that hang in every way there is.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from call import call
from client import free_port
from waiting import patience, wait_until

from app.config import ROOT
from app.run.pulse import ALIVE, MOST_MISSED, STUCK, Pulse, Trouble

LIMIT = 4

WSGI = f"""
import ctypes
import os
import threading
import time

from app import create_app, logs
from app.config import load_settings
from app.web import alive

alive.MOST_BEATS_STUCK = {LIMIT}
logs.configure(load_settings())
app = create_app()
app.add_url_rule("/pid", view_func=lambda: str(os.getpid()), endpoint="pid")
app.add_url_rule("/hang", view_func=lambda: threading.Event().wait(), endpoint="hang")
app.add_url_rule("/slow", view_func=lambda: time.sleep(0.8) or "slow", endpoint="slow")
# Unlike CDLL, PyDLL keeps the interpreter's lock: no thread of the process runs any more.
app.add_url_rule(
    "/standstill", view_func=lambda: ctypes.PyDLL(None).sleep(100), endpoint="standstill"
)
"""
SERVE = f"from app.run import pulse, serve; pulse.MOST_MISSED = {LIMIT}; serve.main()"


class WebServer:
    def __init__(self, folder, settings, workers):
        (folder / "wsgi.py").write_text(WSGI)
        (folder / "web.py").write_text((ROOT / "web.py").read_text())
        (folder / "app").symlink_to(ROOT / "app")
        self.port, self.log = free_port(), folder / "log"
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "PORT": self.port,
            "DATA_DIR": settings.data_dir,
            "REDIS_URL": settings.redis_url,
            "DATABASE_URL": settings.database_url,
            "SECRET_KEY": settings.secret_key,
            "ADMIN_API_TOKEN": settings.admin_api_token,
            "PURCHASE_ADDRESS_LIMIT": "off",
            "WEB_WORKERS": workers,
            "WEB_THREADS": 2,
        }
        with self.log.open("w") as log:
            self.main = subprocess.Popen(
                [sys.executable, "-c", SERVE],
                cwd=folder,
                env=os.environ | {name: str(value) for name, value in given.items()},
                stderr=log,
            )
        seen = set()
        wait_until(lambda: seen.add(self.pid()) or len(seen - {None}) == workers, 60, "the start")

    def pid(self):
        """Return the id of the process that answers, None when none does."""
        with suppress(OSError):
            return int(call(f"{self.url}/pid").body)

    def processes(self):
        children = f"/proc/{self.main.pid}/task/{self.main.pid}/children"
        with open(children) as file:
            return {int(pid) for pid in file.read().split()}

    def says(self, pattern):
        return re.search(pattern, self.log.read_text())

    def ask_in_vain(self, path):
        """Send a request and leave it unanswered; return the connection."""
        client = socket.create_connection(("127.0.0.1", self.port))
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return client


@pytest.fixture
def start(app, settings, tmp_path):
    started = []

    def begin(workers=1):
        started.append(WebServer(tmp_path, settings, workers))
        return started[-1]

    yield begin
    for each in started:
        for pid in each.processes():
            os.kill(pid, signal.SIGCONT)
        each.main.send_signal(signal.SIGCONT)
        each.main.terminate()
        each.main.wait(20)


def restarts(web, cause):
    text = call(f"{web.url}/metrics", headers={"Authorization": "Bearer test-token-0123456789"})
    found = re.search(rf'flashsale_web_restarts_total{{cause="{cause}"}} (\S+)', text.body.decode())
    return found and float(found[1])


@pytest.mark.drill
def test_a_stopped_process_is_replaced_and_its_neighbour_sells_meanwhile(start):
    web = start(workers=2)
    before = web.processes()
    victim = min(before)
    os.kill(victim, signal.SIGSTOP)
    user = 0
    deadline = time.monotonic() + patience(30)
    while victim in web.processes():
        assert time.monotonic() < deadline
        user += 1
        answer = call(f"{web.url}/purchase", {"userId": user, "productId": 1})
        assert answer.status in (200, 409)
    wait_until(lambda: len(web.processes()) == 2)
    assert web.processes() & before == before - {victim}
    assert web.says(f"web process {victim}: the event loop stands still")
    wait_until(lambda: restarts(web, "event_loop") == 1, 30)


@pytest.mark.drill
def test_an_event_loop_that_stands_still_is_replaced(start):
    web = start()
    (before,) = web.processes()
    with web.ask_in_vain("/standstill"):
        wait_until(lambda: web.says(f"web process {before}: the event loop stands still"), 30)
        wait_until(web.pid, 30)
    assert before not in web.processes()


@pytest.mark.drill
def test_page_threads_that_are_gone_are_replaced_and_no_purchase_fails(start):
    web = start()
    (before,) = web.processes()
    stopped, failed = threading.Event(), []

    def buy():
        user = 100
        while not stopped.is_set():
            user += 1
            if call(f"{web.url}/purchase", {"userId": user, "productId": 1}).status != 409:
                failed.append(user)
            time.sleep(0.02)

    for user in range(1, 101):
        assert call(f"{web.url}/purchase", {"userId": user, "productId": 1}).status == 200
    buyer = threading.Thread(target=buy)
    buyer.start()
    try:
        with web.ask_in_vain("/hang"), web.ask_in_vain("/hang"):
            wait_until(lambda: web.says(f"web process {before}: no page thread answers"), 30)
            wait_until(lambda: before not in web.processes(), 60)
    finally:
        stopped.set()
        buyer.join()
    assert failed == []
    assert web.pid()
    wait_until(lambda: restarts(web, "page_threads") == 1, 30)


@pytest.mark.drill
def test_busy_page_threads_are_left_alone(start):
    """Twelve clients share two threads for longer than the limit: each waits, and gets on."""
    web = start()
    before = web.processes()
    clients = [
        threading.Thread(target=lambda: [call(f"{web.url}/slow") for _ in range(2)])
        for _ in range(12)
    ]
    began = time.monotonic()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert time.monotonic() - began > 2 * LIMIT
    assert web.processes() == before
    assert not web.says("replaced|stands still")


@pytest.mark.drill
@pytest.mark.parametrize("all_of_them", [False, True], ids=["parent", "everything"])
def test_who_was_stopped_does_not_blame_the_others(start, all_of_them):
    web = start()
    before = web.processes()
    stopped = [web.main.pid, *(before if all_of_them else ())]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT + 2)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    time.sleep(LIMIT + 1)
    assert web.processes() == before
    assert web.pid()
    assert not web.says("replaced|stands still")


@pytest.fixture
def pipe():
    ours, theirs = os.pipe()
    yield ours, theirs
    for end in (ours, theirs):
        with suppress(OSError):
            os.close(end)


def test_looks_are_counted_and_no_clock(pipe):
    ours, theirs = pipe
    pulse = Pulse(ours, now=0.0)
    os.write(theirs, ALIVE)
    assert pulse.feel(0.1) is None
    assert pulse.begun
    # An hour passes between two looks: one look in vain.
    assert pulse.feel(3600.0) is None
    for second in range(1, MOST_MISSED - 1):
        assert pulse.feel(3600.0 + second) is None
        assert pulse.feel(3600.1 + second) is None  # too soon to count
    assert pulse.feel(3700.0) is Trouble.SILENT
    os.write(theirs, ALIVE)
    assert pulse.feel(3701.0) is None


def test_a_process_that_never_begins_is_given_up_later(pipe):
    pulse = Pulse(pipe[0], now=0.0)
    found = [pulse.feel(float(second)) for second in range(1, 100)]
    assert MOST_MISSED < found.index(Trouble.SILENT) < 70


def test_what_is_stuck_is_told_among_other_beats(pipe):
    ours, theirs = pipe
    pulse = Pulse(ours, now=0.0)
    os.write(theirs, ALIVE + STUCK + ALIVE)
    assert pulse.feel(1.0) is Trouble.STUCK
    assert pulse.feel(1.1) is None
