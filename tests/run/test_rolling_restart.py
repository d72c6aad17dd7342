"""New processes under load: no request fails, no order is lost or made twice."""

import http.client
import json
import os
import re
import resource
import signal
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

import pytest
from call import call
from system import processes
from waiting import patience, wait_until

pytestmark = pytest.mark.drill

BUYERS = 4
STOCK = 1_000_000


class Crowd:
    """Buyers who go on buying, each for itself, and remember every answer."""

    def __init__(self, url: str, first_user: int, keep_alive: bool) -> None:
        self.address = urlsplit(url).netloc
        self.keep_alive = keep_alive
        self.answers: Counter = Counter()
        self.bought: list[tuple[int, int]] = []
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=self._buy, args=(first_user + buyer * 10**6,))
            for buyer in range(BUYERS)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def _buy(self, user: int) -> None:
        connection = None
        while not self.stopped.is_set():
            user += 1
            body = json.dumps({"userId": user, "productId": 1})
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"key-{user}"}
            connection = connection or http.client.HTTPConnection(
                self.address, timeout=patience(10)
            )
            try:
                connection.request("POST", "/purchase", body, headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException) as error:
                self.answers[type(error).__name__] += 1
                connection.close()
                connection = None
                continue
            self.answers[response.status] += 1
            if response.status == 200:
                self.bought.append((user, answer["orderId"]))
            if not self.keep_alive or response.getheader("Connection") == "close":
                connection.close()
                connection = None
            time.sleep(0.002)


def all_persisted(system) -> bool:
    metrics = call(f"{system.url}/purchase/metrics").json
    return metrics["queue_depth"] == 0


def check_orders(system, bought: list[tuple[int, int]]) -> None:
    """Every order that was acknowledged is stored, once, as its buyer's."""
    wait_until(lambda: all_persisted(system), 30, "all orders to be stored")
    assert len({order for _, order in bought}) == len({user for user, _ in bought}) == len(bought)
    for user, order in bought[:: max(1, len(bought) // 60)]:
        (found,) = call(f"{system.url}/purchase/orders/{user}").json
        assert (found["id"], found["status"]) == (order, "CONFIRMED")


def test_everything_is_renewed_under_load(system):
    bearer = {"Authorization": f"Bearer {system.api_token}"}
    restock = {"productId": 1, "amount": STOCK}
    assert call(f"{system.url}/products/restock", restock, headers=bearer).status == 200
    before = call(f"{system.url}/purchase/metrics").json
    (main,) = processes(system.data_dir, "app.run.serve")
    web = processes(system.data_dir, "web.py")
    worker = processes(system.data_dir, "worker.py")
    fresh = Crowd(system.url, 10**9, keep_alive=False)
    kept = Crowd(system.url, 2 * 10**9, keep_alive=True)
    with fresh, kept:
        wait_until(lambda: min(len(fresh.bought), len(kept.bought)) > 50)
        system.process.send_signal(signal.SIGHUP)
        wait_until(
            lambda: (
                len(now := processes(system.data_dir, "web.py")) == len(web)
                and not set(now) & set(web)
                and processes(system.data_dir, "app.run.serve") == [main]
                and (new := processes(system.data_dir, "worker.py"))
                and not set(new) & set(worker)
            ),
            40,
            "new processes",
        )
        seen = len(fresh.bought), len(kept.bought)
        wait_until(lambda: len(fresh.bought) > seen[0] + 50 and len(kept.bought) > seen[1] + 50)
    bought = fresh.bought + kept.bought
    assert (set(fresh.answers), set(kept.answers)) == ({200}, {200})
    check_orders(system, bought)
    after = call(f"{system.url}/purchase/metrics").json
    sold = before["stock_remaining"] - after["stock_remaining"]
    assert sold == after["total_processed"] - before["total_processed"] == len(bought)


def test_what_was_done_is_told(system):
    log = (system.data_dir / "supervisor.log").read_text()
    assert re.search("web and worker: new processes take over", log)


def test_a_version_that_does_not_start_leaves_the_old_one(system):
    """Nothing is free for a new process: those that serve go on, and the next reload works."""
    (main,) = processes(system.data_dir, "app.run.serve")
    web = processes(system.data_dir, "web.py")
    soft, hard = resource.prlimit(main, resource.RLIMIT_NOFILE)
    resource.prlimit(main, resource.RLIMIT_NOFILE, (8, hard))
    try:
        os.kill(main, signal.SIGHUP)
        log = system.data_dir / "supervisor.log"
        wait_until(lambda: "those that serve go on" in log.read_text())
    finally:
        resource.prlimit(main, resource.RLIMIT_NOFILE, (soft, hard))
    assert processes(system.data_dir, "web.py") == web
    assert call(f"{system.url}/purchase", {"userId": 77, "productId": 1}).status == 200
    os.kill(main, signal.SIGHUP)
    wait_until(
        lambda: (
            len(now := processes(system.data_dir, "web.py")) == len(web) and not set(now) & set(web)
        ),
        20,
        "new processes",
    )


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=["hangs", "dies"])
def test_a_neighbour_takes_over_what_waits(system, number):
    """Half of the connections are one process's; nobody of them waits for its successor."""
    victim = processes(system.data_dir, "web.py")[0]
    started = time.monotonic()
    os.kill(victim, number)
    try:
        for user in range(40):
            body = {"userId": 5_000_000 + user, "productId": 1}
            begun = time.monotonic()
            assert call(f"{system.url}/purchase", body).status == 200
            assert time.monotonic() - begun < patience(0.8)
            if time.monotonic() - started > 1:
                break
    finally:
        if number == signal.SIGSTOP:
            os.kill(victim, signal.SIGCONT)
    wait_until(lambda: len(processes(system.data_dir, "web.py")) == 2)
