"""A sale on a primary and its replica, of Sentinel's or in a cluster: the primary dies in the rush.

Nothing that was answered is lost or doubled, nobody has to rebuild, and the sale goes on by itself.
"""

import contextlib
import threading
import time
from itertools import count

import psycopg2
import pytest
from checker import OK, UNKNOWN, History, Restock, Stored, check
from drills import often
from nodes import DOWN_AFTER_MS, KINDS, Cluster, Node, Pair
from rush import attempt, stored_by
from system import start_system, stop_system
from waiting import patience, wait_until

from app.run.embedded import PostgresServer, RedisServer
from app.stock.keys import KEYS

pytestmark = pytest.mark.drill

BUYERS = 8
UNITS = 200_000
# What the Sentinel, the replica and a worker need, on a machine that does other things as well.
WITHIN_SECONDS = DOWN_AFTER_MS / 1000 + 10


class Rush:
    """Shoppers who buy, each with a key; who does not know what became of it asks once more."""

    def __init__(self, server) -> None:
        self.server, self.history = server, History()
        self.ended = threading.Event()
        # When purchases were answered 200, monotonic.
        self.sold: list[float] = []
        users = count(1)
        self.threads = [threading.Thread(target=self.buy, args=(users,)) for _ in range(BUYERS)]
        for thread in self.threads:
            thread.start()

    def buy(self, users) -> None:
        while not self.ended.is_set():
            user = next(users)
            for _ in range(100):
                if self.attempt(user) != UNKNOWN:
                    break
                time.sleep(0.1)

    def attempt(self, user: int) -> str:
        outcome = attempt(self.server, self.history, user)
        if outcome == OK:
            self.sold.append(time.monotonic())
        return outcome

    def sells_since(self, moment: float) -> bool:
        return bool(self.sold) and self.sold[-1] > moment

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(patience(60))


def read_stored(server, primary: Node) -> Stored:
    url = PostgresServer(server.data_dir).url.replace("+psycopg2", "")
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM audit_log WHERE action LIKE 'sale.rebuild%'")
        ((rebuilds,),) = cursor.fetchall()
    assert rebuilds == 0
    free = int(primary.client.hget(KEYS.product(1), "free"))
    return stored_by(server, free, primary.client.xlen(KEYS.outbox), [])


@pytest.fixture
def jobs(tmp_path):
    """A Redis for what is no part of the sale."""
    server = RedisServer(tmp_path / "jobs")
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("how", ["sentinel", "cluster"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_primary_dies_again_and_again(kind, how, jobs, tmp_path):
    gaps = drill(kind, how, jobs, tmp_path, Node.kill, lambda pair: pair.restart, often(3, 100))
    assert max(gaps) < patience(WITHIN_SECONDS)


@pytest.mark.parametrize("how", ["sentinel", "cluster"])
def test_a_primary_stands_still_and_comes_back(how, jobs, tmp_path):
    """It believes to be the primary still, and knows orders that nobody else does."""
    drill("valkey", how, jobs, tmp_path, Node.stop, lambda pair: Node.go_on, often(1, 30))


def drill(kind, how, jobs, tmp_path, fail, mend, times) -> list[float]:
    """Let the primary fail so often in the rush; return for how long nothing was sold each time.

    `fail` is done to the node, and what `mend` of the pair returns once the other is promoted.
    """
    nodes = tmp_path / "nodes"
    pair = Cluster(kind, nodes) if how == "cluster" else Pair(kind, nodes, watched=True)
    (data_dir := tmp_path / "data").mkdir()
    server = start_system(
        data_dir,
        REDIS_URL=pair.url,
        REDIS_REPLICAS="1",
        JOBS_REDIS_URL=jobs.url,
        PURCHASE_ADDRESS_LIMIT="off",
        WEB_WORKERS="2",
    )
    try:
        token = {"Authorization": f"Bearer {server.api_token}", "Idempotency-Key": "more"}
        restock = {"productId": 1, "amount": UNITS}
        assert server.call("POST", "/products/restock", restock, **token)[0] == 200
        rush, gaps = Rush(server), []
        rush.history.restocks.append(Restock("more", 1, UNITS, OK))
        for _ in range(times):
            before = len(rush.sold)
            wait_until(lambda before=before: len(rush.sold) > before + 200, 60, "a sale under way")
            primary, replica = (pair.a, pair.b) if pair.a.link() == "" else (pair.b, pair.a)
            wait_until(lambda replica=replica: replica.link() == "up", 30, "the replica")
            died = time.monotonic()
            fail(primary)
            wait_until(lambda replica=replica: replica.link() == "", 30, "the promotion")
            mend(pair)(primary)
            wait_until(lambda died=died: rush.sells_since(died + 0.5), 60, "the sale to go on")
            gaps.append(rush.sold[-1] - max(at for at in rush.sold if at <= died + 0.5))
        rush.end()
        primary = pair.a if pair.a.link() == "" else pair.b
        wait_until(lambda: not primary.client.xlen(KEYS.outbox), 60, "all orders to be stored")
        sold = sum(attempt.outcome == OK for attempt in rush.history.attempts)
        unknown = sum(attempt.outcome == UNKNOWN for attempt in rush.history.attempts)
        print(f"{kind}, {how}: {sold} sold, {unknown} unknown, seconds without a sale: {gaps}")
        assert check(rush.history, read_stored(server, primary)) == []
        assert server.call("GET", "/readyz/sale")[0] == 200
        return gaps
    finally:
        stop_system(server)
        pair.stop()
