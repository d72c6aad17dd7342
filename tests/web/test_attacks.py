"""Attacks on a whole system with two web processes: what they cost in memory and in time.

`pytest -s` prints the figures that docs/security.md tells.
"""

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from call import call
from system import processes
from waiting import patience, wait_until

pytestmark = pytest.mark.drill

STYLES = b"GET /static/vendor/tabler-1.6.1.min.css HTTP/1.1\r\nHost: x\r\n\r\n"
SELL = b"POST /purchase HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
# A shopper's patience, and a process's share of a small machine.
MOST_SECONDS = 2.0
MOST_GROWTH_MB = 100


@pytest.fixture(scope="module")
def system(system):
    bearer = {"Authorization": f"Bearer {system.api_token}"}
    restock = {"productId": 1, "amount": 1_000_000}
    assert call(f"{system.url}/products/restock", restock, headers=bearer).status == 200
    return system


class Attack:
    """Connections that send something, beside shoppers who buy and look at pages meanwhile."""

    def __init__(self, system) -> None:
        self.system = system
        url = urlsplit(system.url)
        self.address = url.hostname, url.port
        self.wires: list[socket.socket] = []
        self.slowest = {"/purchase": 0.0, "/healthz": 0.0}
        self.asked = 0
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(path,)) for path in self.slowest]

    def _ask(self, path: str) -> None:
        user = int(time.time() * 1000)
        while not self._over.is_set():
            user += 1
            body = {"userId": user, "productId": 1} if path == "/purchase" else None
            started = time.monotonic()
            answer = call(f"{self.system.url}{path}", body)
            self.slowest[path] = max(self.slowest[path], time.monotonic() - started)
            assert answer.status == 200
            self.asked += 1
            time.sleep(0.02)

    def memory(self) -> float:
        """Return the memory of the larger web process, in MB."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in processes(self.system.data_dir, "web.py")
        ]
        return max(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def __enter__(self):
        self.before = self.most = self.memory()
        for thread in self._threads:
            thread.start()
        return self

    def open(self, buffer: int | None = None) -> socket.socket:
        wire = socket.socket()
        if buffer:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        wire.settimeout(5)
        wire.connect(self.address)
        self.wires.append(wire)
        return wire

    def send(self, wire: socket.socket, data: bytes) -> None:
        """Send as much of it as is taken within a moment."""
        wire.settimeout(0.5)
        with contextlib.suppress(OSError):
            wire.sendall(data)

    def watch(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.most = max(self.most, self.memory())
            time.sleep(0.05)

    def __exit__(self, kind, *_):
        self.most = max(self.most, self.memory())
        self._over.set()
        for thread in self._threads:
            thread.join()
        for wire in self.wires:
            wire.close()
        if kind is None:
            growth = self.most - self.before
            print(
                f"\n{os.environ['PYTEST_CURRENT_TEST']}: {self.asked} asked meanwhile, slowest "
                f"{ {k: round(v, 2) for k, v in self.slowest.items()} } s, memory "
                f"{self.before:.0f} MB + {growth:.0f} MB"
            )
            assert growth < MOST_GROWTH_MB
            assert self.slowest["/purchase"] < patience(MOST_SECONDS)
            wait_until(lambda: call(f"{self.system.url}/healthz").status == 200)


@pytest.fixture
def attack(system):
    return Attack(system)


def test_who_asks_twice_and_goes(attack):
    with attack:
        for _ in range(100):
            wire = attack.open()
            attack.send(wire, STYLES + STYLES)
            with contextlib.suppress(OSError):
                wire.recv(1000)
            wire.close()
        attack.watch(2)


@pytest.mark.parametrize("path", [b"/static/vendor/tabler-1.6.1.min.css", b"/docs?x=1"])
def test_slow_readers(attack, path):
    with attack:
        for _ in range(50):
            attack.send(attack.open(2048), STYLES.replace(STYLES.split()[1], path) * 60)
        attack.watch(5)


def test_trailers_without_end(attack):
    head = SELL + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    with attack:
        for _ in range(4):
            attack.send(attack.open(), head + b"a:\r\n" * 2_000_000)
        attack.watch(2)


@pytest.mark.parametrize("connections", [10, 50, 100])
@pytest.mark.parametrize(
    "request_", [b"GET / HTTP/1.1\r\nHost:\r\n\r\n", b"POST /purchase HTTP/1.1\r\nHost:\r\n\r\n"]
)
def test_ten_thousand_sent_ahead(attack, connections, request_):
    with attack:
        for _ in range(connections):
            wire = attack.open()
            wire.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                wire.send(request_ * 10_000)
        attack.watch(8)


def test_unfinished_heads(attack):
    with attack:
        for _ in range(600):
            attack.send(attack.open(), b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 90)
        for _ in range(600):
            attack.send(attack.open(), b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"x" * 60_000)
        for _ in range(600):
            attack.send(attack.open(), b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 15_000)
        attack.watch(3)


def test_resets_in_the_middle_of_an_answer(attack):
    with attack:
        for number in range(300):
            wire = attack.open()
            body = json.dumps({"userId": 9_000_000_000 + number, "productId": 1}).encode()
            sale = SELL + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            attack.send(
                wire, (STYLES if number % 2 else b"GET /docs?x HTTP/1.1\r\nHost: x\r\n\r\n") + sale
            )
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            wire.close()
        attack.watch(2)
