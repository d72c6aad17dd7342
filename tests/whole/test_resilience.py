"""Each server gone, hanging or slow: what every route answers, how fast, and how it comes back."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

import psutil
import psycopg2
import pytest
import redis
from sqlalchemy.exc import DatabaseError, OperationalError, PendingRollbackError
from system import UNLIMITED, Server, start_system, stop_system
from waiting import patience, wait_until

from app.config import ROOT
from app.products import catalogue
from app.run.embedded import PostgresServer, RedisServer
from app.stock.board import WORKER_SEEN_SECONDS

# A dead dependency may cost a client so much, and not more.
LONGEST_SECONDS = 2.0
BACK_WITHIN_SECONDS = 2.0
CLIENTS = 64


@dataclass
class Rig:
    """The whole system, with servers that the test holds in its hands."""

    system: Server
    redis: RedisServer
    postgres: PostgresServer
    # Of a signed-in admin.
    cookie: str

    def server(self, name):
        return {"redis": self.redis, "postgres": self.postgres}[name]

    def signal(self, name, number) -> None:
        """Send a signal to the server and to its children, each a group of its own."""
        process = psutil.Process(self.server(name).process.pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def call(self, method, path, body=None, **headers) -> tuple[int, dict, bytes, float]:
        return self.system.call(method, path, body, **headers)

    def ask(self, name) -> tuple[int, dict, bytes, float]:
        """Call a route of the matrix, as somebody who may."""
        if name in PAGES:
            return self.call("GET", PAGES[name], Cookie=self.cookie, **POLLS.get(name, {}))
        return self.call(*ROUTES[name], Authorization=f"Bearer {self.system.api_token}")

    def buy(self, user: int = 1) -> int:
        return self.call("POST", "/purchase", {"userId": user, "productId": 1})[0]


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rig")
    servers = RedisServer(folder), PostgresServer(folder)
    for server in servers:
        server.start()
    system = start_system(
        tmp_path_factory.mktemp("system"),
        REDIS_URL=servers[0].url,
        DATABASE_URL=servers[1].url,
        SECRET_KEY="secret-key-of-the-tests",
        **UNLIMITED,
        WEB_WORKERS="2",
    )
    rig = Rig(system, *servers, system.sign_in())
    rig.call(
        "POST", "/products/restock", {"productId": 1, "amount": 100_000},
        Authorization=f"Bearer {system.api_token}",
    )  # fmt: skip
    # Order 1, for its page.
    assert rig.buy() == 200
    wait_until(lambda: b"CONFIRMED" in rig.call("GET", "/purchase/orders/1")[2], 10, "order 1")
    yield rig
    for server in servers:
        if server.process and server.process.poll() is None:
            rig.signal(server.name.lower(), signal.SIGCONT)
    stop_system(system)
    for server in servers:
        server.stop()


def is_well(rig: Rig) -> bool:
    """Tell whether every web process sells again: each refuses for a moment after a failure."""
    return rig.call("GET", "/readyz")[0] == 200 and all(rig.buy() == 200 for _ in range(12))


@pytest.fixture
def healthy(rig):
    """The rig with everything up, before the test and after it."""
    wait_until(lambda: is_well(rig), 30, "recovery")
    yield rig
    for name in ("redis", "postgres"):
        server = rig.server(name)
        if server.process.poll() is None:
            rig.signal(name, signal.SIGCONT)
        else:
            server.start()
    wait_until(lambda: is_well(rig), 30, "recovery")


ROUTES = {
    "buy": ("POST", "/purchase", {"userId": 1, "productId": 1}),
    "orders": ("GET", "/purchase/orders/1", None),
    "metrics": ("GET", "/purchase/metrics", None),
    "products": ("GET", "/products", None),
    "product": ("GET", "/products/1", None),
    "restock": ("POST", "/products/restock", {"productId": 1, "amount": 1}),
    "create": ("POST", "/products", {"name": "p", "priceCents": 1, "currency": "USD", "stock": 1}),
    "change": ("PATCH", "/products/1", {"priceCents": 1}),
    "sign-in page": ("GET", "/admin/sign-in", None),
    "dashboard": ("GET", "/admin/", None),
    "alive": ("GET", "/healthz", None),
    "ready": ("GET", "/readyz", None),
    "ready to sell": ("GET", "/readyz/sale", None),
    "description": ("GET", "/openapi.json", None),
}
PAGES = {
    "page: dashboard": "/admin/",
    "page: dashboard, polled": "/admin/live",
    "page: chart": "/admin/chart.json",
    "page: products": "/admin/products/",
    "page: products, polled": "/admin/products/live",
    "page: product": "/admin/products/1",
    "page: product, polled": "/admin/products/1/live",
    "page: product's form": "/admin/products/1/edit",
    "page: restock": "/admin/products/1/restock",
    "page: orders": "/admin/orders/",
    "page: order": "/admin/orders/1",
    "page: order, polled": "/admin/orders/1/live",
    "page: dead letters": "/admin/dead-letters/",
    "page: ledger": "/admin/ledger/",
    "page: ledger, polled": "/admin/ledger/live",
    "page: staff": "/admin/staff/",
    "page: audit": "/admin/audit/",
    "page: password": "/admin/password",
    "page: jobs": "/admin/rq/",
    "page: jobs, polled": "/admin/rq/0/data/queues.json",
}
POLLS = {name: {"X-Poll": "1"} for name in PAGES if name.endswith("polled")}
# What is answered while a server is gone; every other route: 503. A page shows what the other
# server knows: without PostgreSQL these are the dashboard and a product's figures.
WITHOUT = {
    "redis": {
        "alive": 200,
        **dict.fromkeys(PAGES.keys() - {"page: chart", "page: jobs, polled"}, 200),
    },
    "postgres": {
        "buy": 200,
        "metrics": 200,
        "alive": 200,
        "ready to sell": 200,
        "page: dashboard": 200,
        "page: dashboard, polled": 200,
        "page: chart": 200,
        "page: product": 200,
        "page: product, polled": 200,
        "page: ledger": 200,
        "page: ledger, polled": 200,
        "page: password": 200,
        "page: jobs, polled": 200,
    },
}
# Pages that need no server of their own are let through or refused, as the limiter can tell.
EITHER = {
    "sign-in page": {200, 503},
    "dashboard": {302, 503},
    "description": {200, 503},
    # Forms and lists that can be drawn without PostgreSQL; sending them can't be done.
    "page: products": {200, 503},
    "page: products, polled": {200, 503},
    "page: product's form": {200, 503},
    "page: restock": {200, 503},
    # The frame of RQ's figures: rq-dashboard may look into Redis for it, or not.
    "page: jobs": {200, 503},
}


def hammer(rig: Rig, seconds: float) -> dict[str, list[tuple[int, dict, float]]]:
    """Call every route from many clients at once; return status, headers, time of each."""
    answers = defaultdict(list)
    end = time.monotonic() + seconds

    def run(number):
        names = [*ROUTES, *PAGES]
        position = number
        while time.monotonic() < end:
            name = names[position % len(names)]
            position += 1
            try:
                status, headers, _, took = rig.ask(name)
            except OSError as error:
                status, headers, took = repr(error), {}, 0.0
            answers[name].append((status, headers, took))
            time.sleep(0.02)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.drill
@pytest.mark.parametrize("server", ["redis", "postgres"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_without_a_server(healthy, server, how):
    rig = healthy
    rig.signal(server, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "killed":
        rig.server(server).process.wait()
    answers = hammer(rig, 2.5)
    assert answers.keys() == ROUTES.keys() | PAGES.keys()
    for name, seen in answers.items():
        expected = {WITHOUT[server].get(name, 503)} | EITHER.get(name, set())
        assert {status for status, _, _ in seen} <= expected, name
        for status, headers, _ in seen:
            assert status != 503 or name == "ready" or "retry-after" in headers, name
    slowest = {name: round(max(took for _, _, took in seen), 2) for name, seen in answers.items()}
    print(f"{server} {how}: slowest {max(slowest.values())} s of {sum(map(len, answers.values()))}")
    assert max(slowest.values()) < patience(LONGEST_SECONDS), slowest
    if how == "stopped":
        rig.signal(server, signal.SIGCONT)
    else:
        rig.server(server).start()
    back_at = time.monotonic()
    for name in (*ROUTES, *PAGES):
        wait_until(
            lambda name=name: rig.ask(name)[0] in (200, 201, 302),
            BACK_WITHIN_SECONDS - (time.monotonic() - back_at),
            f"{name} to work again",
        )


@pytest.mark.drill
@pytest.mark.parametrize("server", ["redis", "postgres"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_ready_again_with_its_server(healthy, server, how):
    """Away for so long that the worker counts as gone, or that orders wait for too long."""
    rig = healthy
    rig.signal(server, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "killed":
        rig.server(server).process.wait()
    if server == "postgres":
        assert [rig.buy(user) for user in range(600, 650)] == [200] * 50

    def checks():
        return json.loads(rig.call("GET", "/readyz")[2])["checks"]

    away_at = time.monotonic()
    if server == "postgres":
        wait_until(lambda: not checks()["queue"]["ok"], 30, "the orders to wait for long")
    wait_until(lambda: time.monotonic() - away_at > WORKER_SEEN_SECONDS + 1)
    assert not checks()[server]["ok"]
    if how == "stopped":
        rig.signal(server, signal.SIGCONT)
    else:
        rig.server(server).start()
    back_at, seen = time.monotonic(), {}
    while (answer := rig.call("GET", "/readyz"))[0] != 200:
        lacking = {n: c["state"] for n, c in json.loads(answer[2])["checks"].items() if not c["ok"]}
        seen[round(time.monotonic() - back_at, 2)] = lacking
        assert time.monotonic() - back_at < patience(30), seen
    took = time.monotonic() - back_at
    print(f"{server} {how}: ready after {took:.2f} s")
    assert took < patience(BACK_WITHIN_SECONDS), seen


@pytest.mark.drill
def test_a_slow_redis_and_a_slow_postgres_still_serve(healthy):
    """50 ms for every answer of a server: slower, and nothing else."""
    rig = healthy
    stopped = threading.Event()

    def stutter():
        while not stopped.is_set():
            for name in ("redis", "postgres"):
                rig.signal(name, signal.SIGSTOP)
            time.sleep(0.05)
            for name in ("redis", "postgres"):
                rig.signal(name, signal.SIGCONT)
            time.sleep(0.01)

    thread = threading.Thread(target=stutter)
    thread.start()
    try:
        for user in range(2, 12):
            assert rig.buy(user) == 200
            assert rig.call("GET", f"/purchase/orders/{user}")[0] == 200
    finally:
        stopped.set()
        thread.join()


@pytest.mark.drill
def test_the_worker_gone_is_seen_and_costs_no_sale(healthy):
    rig = healthy
    worker = subprocess.run(
        ["pgrep", "-P", str(rig.system.process.pid), "-f", "worker.py"],
        capture_output=True, text=True, check=True,
    ).stdout.split()[0]  # fmt: skip
    os.kill(int(worker), signal.SIGSTOP)
    try:
        assert rig.buy(500) == 200
        wait_until(lambda: rig.call("GET", "/readyz")[0] == 503, 10, "the worker to be missed")
        (order,) = json.loads(rig.call("GET", "/purchase/orders/500")[2])
        assert order["status"] == "QUEUED"
    finally:
        # Unless it has been replaced meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(worker), signal.SIGCONT)
    wait_until(
        lambda: json.loads(rig.call("GET", "/purchase/orders/500")[2])[0]["status"] == "CONFIRMED",
        5,
        "the order to be stored",
    )


@pytest.mark.parametrize(
    "error",
    [
        DatabaseError("SELECT", {}, psycopg2.DatabaseError("error with status PGRES_TUPLES_OK")),
        OperationalError("SELECT", {}, psycopg2.OperationalError("server closed the connection")),
        PendingRollbackError("reconnect"),
        redis.TimeoutError("Timeout reading from socket"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_cut_off_is_no_internal_error(client, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(catalogue, "listed", fail)
    answer = client.get("/products")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]


def test_a_full_redis_refuses_and_forgets_nothing(tmp_path):
    """maxmemory reached: 503 before anything is written, and reads go on."""
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from app.config import NO_LIMIT, load_settings
from app.problems import Unavailable
from app.stock.gateway import Stock

url = sys.argv[1]
stock = Stock()
stock.init_app(replace(load_settings({}), redis_url=url, purchase_user_limit=NO_LIMIT,
                       purchase_address_limit=NO_LIMIT, secret_key="x" * 16))
stock.first.open("test", 1)
terms = {"opens": None, "closes": None, "pause": 0, "cap": None, "max": 10, "price": "1 USD",
         "hold": None}
stock.put_product(1, 1, terms)
stock.move("test", 1, 1, 10_000_000)
used = stock.client.info("memory")["used_memory"]
stock.client.config_set("maxmemory", used + 2_000_000)
sold = 0
try:
    while True:
        assert stock.claim(sold + 1, 1, 1, "k" * 200, "a").outcome == b"accepted"
        sold += 1
except Unavailable as error:
    assert "maxmemory" in str(error), error
view = stock.view([1])
assert sold > 1000
assert view.waiting == view.last_order_id == sold
assert view.products[1]["free"] == 10_000_000 - sold
assert view.products[1]["claimed"] == sold
stock.client.config_set("maxmemory", 0)
assert stock.claim(1, 1, 1, "k" * 200, "a").outcome == b"replayed"
assert stock.claim(10**9, 1, 1, None, "a").outcome == b"accepted"
"""
    redis_server = RedisServer(tmp_path, extra=("appendfsync=no",))
    redis_server.start()
    try:
        subprocess.run([sys.executable, "-c", script, redis_server.url], cwd=ROOT, check=True)
    finally:
        redis_server.stop()
