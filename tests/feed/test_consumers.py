"""The consumers of docs/clients: they verify, answer fast, and take every event once."""

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time

import pytest
from consumer import number
from sqlalchemy import text
from standardwebhooks import Webhook
from waiting import patience

from app.audit import CLI
from app.config import ROOT
from app.extensions import db
from app.feed import delivery, sending, webhooks

CLIENTS = ROOT / "docs" / "clients"
SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


@pytest.fixture(scope="session")
def go_program(tmp_path_factory):
    """The Go example, compiled."""
    program = tmp_path_factory.mktemp("go") / "consume"
    subprocess.run(
        ["go", "build", "-o", program, CLIENTS / "consume.go"],
        check=True,
        timeout=patience(300),
        env=os.environ
        | {"GO111MODULE": "off", "GOFLAGS": "", "GOCACHE": str(program.parent / "c")},
    )
    return program


class Running:
    """One of the examples at work."""

    def __init__(self, command: list[object], inbox, secrets: str) -> None:
        self.process = subprocess.Popen(
            [*map(str, command), "0", str(inbox)],
            env=os.environ | {"WEBHOOK_SECRET": secrets, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        word, port = self.line().split()
        assert word == "listening"
        self.url = f"http://127.0.0.1:{port}/hook"

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line.strip())

    def line(self) -> str:
        return self.lines.get(timeout=patience(30))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(params=["consume.py", "consume.js", "consume.go"])
def start(request, tmp_path):
    """Start one of the examples on an inbox of the test's own, once or again."""
    needs = {"consume.py": sys.executable, "consume.js": "node", "consume.go": "go"}[request.param]
    if not shutil.which(needs):
        pytest.skip(f"{needs} is not installed")
    if request.param == "consume.go":
        command = [request.getfixturevalue("go_program")]
    else:
        command = [needs, CLIENTS / request.param]
    started = []

    def run(secrets: str = SECRET) -> Running:
        started.append(Running(command, tmp_path / "inbox", secrets))
        return started[-1]

    run.inbox = tmp_path / "inbox"
    yield run
    for each in started:
        if each.process.poll() is None:
            each.kill()


def post(url: str, body: bytes, secret: str = SECRET, **changes: str) -> int:
    """Send a delivery that is signed now, with other headers if given; return the status."""
    now = int(time.time())
    from datetime import UTC, datetime

    moment = datetime.fromtimestamp(int(changes.get("webhook_timestamp", now)), UTC)
    headers = {
        "Content-Type": "application/json",
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", moment, body.decode()),
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    with sending.Sender(allow_private=True) as sender:
        outcome = sender.post(url, headers, body)
    assert outcome.status, outcome.error
    return outcome.status


def message(*ids: int) -> bytes:
    events = [
        {"id": f"epoch-{n}", "type": "order.confirmed", "order": {"id": n, "userId": "ü"}}
        for n in ids
    ]
    return json.dumps({"type": "events", "timestamp": "", "data": {"events": events}}).encode()


def test_takes_events_once_also_after_a_crash(start):
    running = start()
    assert post(running.url, message(1, 2)) == 204
    assert post(running.url, message(1, 2)) == 204
    assert post(running.url, message(2, 3)) == 204
    assert [running.line() for _ in range(3)] == [f"order.confirmed {n}" for n in (1, 2, 3)]
    running.kill()
    # A line that was being written when it was killed.
    with start.inbox.open("a") as file:
        file.write('{"id":"epoch-4","type":"ord')
    running = start()
    assert post(running.url, message(3, 4)) == 204
    assert running.line() == "order.confirmed 4"
    kept = [json.loads(line)["id"] for line in start.inbox.read_text().splitlines()]
    assert kept == ["epoch-1", "epoch-2", "epoch-3", "epoch-4"]


def test_refuses_what_is_not_ours(start):
    running = start()
    other = "whsec_" + "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
    old = str(int(time.time()) - 400)
    early = str(int(time.time()) + 400)
    assert post(running.url, message(1), secret=other) == 401
    assert post(running.url, message(1), webhook_timestamp=old) == 401
    assert post(running.url, message(1), webhook_timestamp=early) == 401
    assert post(running.url, message(1), webhook_id="msg_2") == 401
    assert post(running.url, message(1), webhook_signature="v1,nonsense v2,xyz") == 401
    assert post(running.url, message(1), webhook_signature="") == 401
    assert not start.inbox.read_text()


def test_takes_either_secret_while_both_are_valid(start):
    other = "whsec_" + "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
    running = start(f"{other} {SECRET}")
    assert post(running.url, message(1)) == 204
    assert post(running.url, message(2), secret=other) == 204


def test_with_the_system_itself(start, shop, sell):
    """The shop sends, the example takes; a rotation of the secret changes nothing for it."""
    first = start("whsec_eA==")
    endpoint, secret = webhooks.create({"url": first.url}, CLI)
    number_of = endpoint.id
    sell(2)
    delivery.Job(number_of).run()
    db.session.remove()
    # It knows another secret, and says 401: the delivery waits.
    assert webhooks.get(number_of).failures == 1
    first.kill()
    running = start(secret)
    webhooks.change(number_of, {"url": running.url}, CLI)
    db.session.execute(text("UPDATE webhook_endpoints SET next_at = now()"))
    db.session.commit()
    sell(1)
    delivery.Job(number_of).run()
    db.session.remove()
    webhooks.rotate(number_of, CLI)
    sell(1)
    number()
    delivery.Job(number_of).run()
    assert [running.line() for _ in range(4)] == [f"order.confirmed {n}" for n in range(1, 5)]
