"""Redis fails over behind an address that stays, and nobody cuts the connections to the old node.

Two real servers with replication; a proxy sends new connections to the new primary, as HAProxy, a
virtual address or a service name does, and leaves the open ones where they are. READONLY is then
the only sign.
"""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import redis
from client import free_port
from waiting import patience, wait_until
from wire import purchase, serving

from app import create_app
from app.audit import CLI
from app.books import recovery
from app.config import NO_LIMIT, ROOT
from app.extensions import stock
from app.problems import Unavailable
from app.products import movements
from app.run.embedded import RedisServer
from app.stock import loop_line, thread_line
from app.stock.claims import Request
from app.stock.keys import KEYS
from app.stock.servers import UNFIT, code_of
from app.worker import relay

WITHIN_SECONDS = 2.0


class Pair:
    """A primary and its replica behind a proxy."""

    def __init__(self, folder):
        self.servers, self.ports = [], []
        for name in ("a", "b"):
            port = free_port()
            options = (
                f"port={port}",
                "bind=127.0.0.1",
                "appendfsync=no",
                "repl-diskless-sync-delay=0",
            )
            server = RedisServer(folder / name, extra=options)
            server.start()
            self.servers.append(server)
            self.ports.append(port)
        self.nodes = [redis.Redis.from_url(server.url) for server in self.servers]
        self.nodes[1].replicaof("127.0.0.1", self.ports[0])
        self.synced(1)
        self.socket = folder / "proxy.sock"
        command = [sys.executable, ROOT / "stress" / "fault_proxy.py", self.socket]
        self.proxy = subprocess.Popen(
            [*command, self.servers[0].socket], stdin=subprocess.PIPE, text=True
        )
        self.url = f"unix://{self.socket}"
        wait_until(self.socket.exists, 10, "the proxy")

    def synced(self, replica: int) -> None:
        node = self.nodes[replica]
        wait_until(lambda: node.info("replication")["master_link_status"] == "up", 10, "a replica")

    def point_to(self, node: int) -> None:
        self.proxy.stdin.write(f"target {self.servers[node].socket}\n")
        self.proxy.stdin.flush()

    def fail_over(self) -> None:
        """Lossless, as an operator or a managed service does it."""
        self.nodes[0].execute_command("FAILOVER", "TO", "127.0.0.1", self.ports[1])
        wait_until(
            lambda: self.nodes[1].info("replication")["role"] == "master", 10, "the failover"
        )
        self.point_to(1)

    def switch(self) -> None:
        """As Sentinel does it: the replica is promoted, the old primary follows it afterwards."""
        self.nodes[1].replicaof("NO", "ONE")
        self.nodes[0].replicaof("127.0.0.1", self.ports[1])
        self.point_to(1)

    def stop(self) -> None:
        self.proxy.terminate()
        self.proxy.wait()
        for server in self.servers:
            server.stop()


@pytest.fixture
def pair(tmp_path):
    pair = Pair(tmp_path)
    yield pair
    pair.stop()


@pytest.fixture
def app(pair, make_app, settings):
    """The app on the pair; what it opens stays open."""
    yield make_app(redis_url=pair.url, purchase_user_limit=NO_LIMIT)
    # The limits of the other routes are the newest app's, for all apps of this process.
    create_app(settings)


def seconds_until(works: Callable[[], bool]) -> float:
    started = time.monotonic()
    while not works():
        assert time.monotonic() < started + patience(10)
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.mark.parametrize("how", ["fail_over", "switch"])
def test_everything_works_again_within_two_seconds(app, pair, client, admin_headers, how):
    user = iter(range(1, 1000))

    def buy():
        body = {"userId": next(user), "productId": 1}
        return client.post("/purchase", json=body).status_code

    def restock():
        body = {"productId": 1, "amount": 1}
        return client.post("/products/restock", json=body, headers=admin_headers).status_code

    def look():
        return client.get("/purchase/orders/1").status_code

    def brake():
        return client.post("/sale/brake", json={"on": False}, headers=admin_headers).status_code

    acts = (buy, restock, look, brake)
    # Several at once, so that each pool holds connections to the old primary.
    threads = [threading.Thread(target=act) for act in acts * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [act() for act in acts] == [200] * 4
    sold = stock.view([1]).products[1]["accepted"]
    getattr(pair, how)()
    answers = []

    def works(act):
        answers.append(act())
        assert answers[-1] in (200, 503)
        return answers[-1] == 200

    for act in acts:
        assert seconds_until(lambda act=act: works(act)) < patience(WITHIN_SECONDS)
    assert [act() for act in acts * 3] == [200] * 12
    # Nothing was asked twice: what was answered is what there is.
    view = stock.view([1])
    assert view.products[1]["accepted"] == sold + 4
    assert pair.nodes[1].get(KEYS.order_ids) == str(sold + 4).encode()


def test_the_event_loop_sells_again(app, pair):
    async def talk():
        async with serving(app) as process:
            wire = await process.connect()

            async def ask(user):
                wire.send(purchase(user))
                return await wire.reply()

            assert (await ask(1)).status == 200
            await asyncio.get_running_loop().run_in_executor(None, pair.fail_over)
            started = time.monotonic()
            replies = [await ask(2)]
            while replies[-1].status != 200:
                assert time.monotonic() < started + patience(10)
                await asyncio.sleep(0.02)
                replies.append(await ask(2))
            return time.monotonic() - started, replies, [await ask(3) for _ in range(20)]

    seconds, replies, after = asyncio.run(talk())
    assert seconds < patience(WITHIN_SECONDS)
    # The old primary said that it did nothing, and so do we.
    assert all(reply.json["executed"] is False for reply in replies[:-1])
    assert {reply.status for reply in after} == {200}
    # The first, the one that was asked until it was sold, and the twenty after it.
    assert stock.view([1]).products[1]["accepted"] == 22


def test_what_surely_did_not_run_is_sent_once_more(app, pair, monkeypatch):
    """The old primary says that it did nothing, and the new one is there: nobody is refused."""
    for line in (loop_line, thread_line):
        monkeypatch.setattr(line, "AGAIN_SECONDS", patience(1))
    assert stock.claim(1, 1, 1, None, "a").outcome == b"accepted"

    async def talk():
        line = loop_line.LoopLine(stock.first.server, stock.loop_line.line.script, lambda: None)
        claims = [await line.claim(Request(2, 1, 1, None, "a"))]
        await asyncio.get_running_loop().run_in_executor(None, pair.fail_over)
        asked = [line.claim(Request(user, 1, 1, None, "a")) for user in range(3, 10)]
        return claims + await asyncio.gather(*asked)

    claims = asyncio.run(talk())
    assert [claim.outcome for claim in claims] == [b"accepted"] * 8
    assert stock.claim(10, 1, 1, None, "a").outcome == b"accepted"
    assert stock.view([1]).products[1]["accepted"] == 10


def test_a_replica_is_not_sold_from_however_often_it_is_asked(app, pair):
    pair.nodes[0].replicaof("127.0.0.1", pair.ports[1])
    for user in range(1, 5):
        with pytest.raises(Unavailable) as refused:
            stock.claim(user, 1, 1, None, "a")
        assert refused.value.executed is False
        stock.thread_line.breaker.answered()


def test_what_replication_had_not_carried_over_closes_the_sale(app, pair):
    """A new primary that lacks orders: the comparison at the new connection notices."""
    for user in range(1, 6):
        assert stock.claim(user, 1, 1, None, "a").outcome == b"accepted"
    pair.synced(1)
    pair.nodes[1].replicaof("NO", "ONE")
    for user in range(6, 11):
        assert stock.claim(user, 1, 1, None, "a").outcome == b"accepted"
    with app.app_context():
        relay.record_issued()
    pair.nodes[0].replicaof("127.0.0.1", pair.ports[1])
    pair.point_to(1)
    for _ in range(3):
        with pytest.raises(Unavailable):
            stock.claim(20, 1, 1, None, "a")
        stock.thread_line.breaker.answered()
    assert pair.nodes[1].get(KEYS.order_ids) == b"5"
    with app.app_context():
        recovery.rebuild(CLI)
        movements.finish_pending()
    assert stock.claim(20, 1, 1, None, "a").outcome == b"accepted"


@pytest.mark.parametrize(
    ("error", "unfit"),
    [
        (redis.exceptions.ReadOnlyError("You can't write", status_code="READONLY"), True),
        (redis.exceptions.MasterDownError("Link down", status_code="MASTERDOWN"), True),
        (redis.exceptions.BusyLoadingError("loading", status_code="LOADING"), True),
        (redis.exceptions.ResponseError("NOREPLICAS Not enough good replicas"), True),
        (redis.exceptions.ResponseError("UNBLOCKED force unblock from blocking"), True),
        (redis.exceptions.OutOfMemoryError("not allowed", status_code="OOM"), False),
        (redis.exceptions.ResponseError("MISCONF Errors writing to the AOF"), False),
        (redis.exceptions.ResponseError("WRONGTYPE Operation against a key"), False),
    ],
)
def test_which_errors_mean_a_lost_connection(error, unfit):
    assert (code_of(error) in UNFIT) is unfit
