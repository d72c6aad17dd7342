"""Shoppers who buy from every shard without a pause while things break, and what became of it."""

import json
import threading
import time
from collections.abc import Iterator
from itertools import count, pairwise

from checker import OK, REFUSED, UNKNOWN, Attempt, History, Stored
from stored import read_rows
from system import Server
from waiting import patience

from app.run.embedded import PostgresServer
from app.stock.place import place


def attempt(server: Server, history: History, user: int) -> str:
    """Buy a unit of product 1 by the user's key; note the outcome in the history, and return it."""
    body = {"userId": user, "productId": 1}
    try:
        status, _, content, _ = server.call("POST", "/purchase", body, **{"Idempotency-Key": "k"})
        answer = json.loads(content)
    except OSError:
        status, answer = 0, {}
    outcome = OK if status == 200 else REFUSED if 400 <= status < 500 else UNKNOWN
    history.attempts.append(Attempt(user, 1, 1, "k", outcome, status, answer.get("orderId")))
    return outcome


class ShardedRush:
    """Each shard has shoppers of its own; who does not know what became of it asks once more."""

    def __init__(self, server: Server, shards: int, each: int = 2, pause: float = 0.02) -> None:
        """`pause` is a shopper's between two orders, in seconds."""
        self.server, self.shards, self.history = server, shards, History()
        self.pause = pause
        self.ended = threading.Event()
        # When purchases were answered 200, and when somebody was left without an answer,
        # monotonic, by shard.
        self.sold: list[list[float]] = [[] for _ in range(shards)]
        self.failed = [0.0] * shards
        self.threads = []
        for shard in range(shards):
            users = self._users(shard)
            lock = threading.Lock()
            for _ in range(each):
                self.threads.append(threading.Thread(target=self._buy, args=(shard, users, lock)))
        for thread in self.threads:
            thread.start()

    def _users(self, shard: int) -> Iterator[int]:
        return (user for user in count(1) if place(user, self.shards).shard == shard)

    def _buy(self, shard: int, users: Iterator[int], lock: threading.Lock) -> None:
        while not self.ended.is_set():
            with lock:
                user = next(users)
            # Until it is known, however long that takes: what was promised must be kept.
            while self._attempt(shard, user) == UNKNOWN and not self.ended.is_set():
                self.failed[shard] = time.monotonic()
                time.sleep(0.1)
            time.sleep(self.pause)

    def _attempt(self, shard: int, user: int) -> str:
        outcome = attempt(self.server, self.history, user)
        if outcome == OK:
            self.sold[shard].append(time.monotonic())
        return outcome

    def sells(self, since: float) -> bool:
        """Tell whether every shard has sold since a moment."""
        return all(of and of[-1] > since for of in self.sold)

    def sold_since(self, shard: int, since: float) -> int:
        return sum(at > since for at in list(self.sold[shard]))

    def fails(self, shard: int, since: float) -> bool:
        """Tell whether a purchase of a shard has failed since a moment."""
        return self.failed[shard] > since

    def gap(self, shard: int, since: float) -> float:
        """Return the longest time since then, in seconds, for which a shard has sold nothing."""
        times = [since, *(at for at in list(self.sold[shard]) if at > since), time.monotonic()]
        return max(after - before for before, after in pairwise(times))

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(patience(60))


def stored_by(server: Server, free: int, waiting: int, ledger: list[str]) -> Stored:
    """Return what the system's PostgreSQL holds, beside what its Redis does of product 1."""
    url = PostgresServer(server.data_dir).url.replace("+psycopg2", "")
    return Stored(*read_rows(url), {1: free}, waiting, ledger)
