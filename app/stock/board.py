"""What processes tell one another by Redis: samples, proofs, who is alive, what each has counted.

Every time in it is of Redis's clock, since the machines' own ones differ.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

import redis

from ..problems import Unavailable
from .keys import KEYS
from .link import Link, asking

# A worker says that it is alive once a second; after this it counts as gone.
WORKER_SEEN_SECONDS = 5
WORKER_FORGOTTEN_SECONDS = 600
# Two readings of one clock by way of a script and a command; what is further ahead is a mistake.
AHEAD_SECONDS = 1.0
# The dashboard's chart: one sample a second, 15 minutes; and one a minute, a day.
HISTORY_SAMPLES = 900
HISTORY_MINUTES = 24 * 60


@dataclass(frozen=True)
class News:
    """What is on the board at one instant."""

    now: float  # seconds since 1970, by Redis's clock
    workers: int
    proof: dict[str, Any] | None  # the ledger's newest, however old
    samples: list[tuple[int, dict[str, Any]]]  # (second, figures), the oldest first

    @property
    def sampled(self) -> list[tuple[int, dict[str, Any]]]:
        """The samples that are not from the future."""
        return [sample for sample in self.samples if sample[0] <= self.now + AHEAD_SECONDS]


@dataclass(frozen=True)
class Counted:
    """What the processes have counted, for Prometheus."""

    now: float
    refused: dict[str, str]
    telemetry: dict[str, str]
    processes: dict[str, dict[str, Any]]


class Noticeboard:
    """Reads and writes it. Every method raises Unavailable when Redis gives no answer."""

    def __init__(self, link: Link) -> None:
        """`link` leads to where the board is; its keys are the same in every sale."""
        self.client, self.raw_client = link.client, link.raw_client
        self._run = link.run

    def now(self) -> float:
        """Return Redis's clock, in seconds since 1970."""
        with asking():
            return _seconds(self.client.time())

    def alive(self, worker: str) -> None:
        """Note that a worker process is alive."""
        self._run("alive", [KEYS.workers], [worker, WORKER_FORGOTTEN_SECONDS])

    def gone(self, worker: str) -> None:
        """Note that a worker process has ended."""
        with asking():
            self.client.zrem(KEYS.workers, worker)

    def sample(self, figures: dict[str, Any]) -> bool:
        """Keep this second's figures; False when somebody else has."""
        text = json.dumps(figures, separators=(",", ":"))
        keys = [KEYS.history, KEYS.history_by_minute]
        return bool(self._run("sample", keys, [text, HISTORY_SAMPLES, HISTORY_MINUTES]))

    def news(self, samples: int) -> News:
        """Return what is on the board, with the newest `samples`."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.zrange(KEYS.workers, 0, -1, withscores=True)
            pipe.get(KEYS.ledger)
            if samples:
                pipe.xrevrange(KEYS.history, count=samples)
            time, workers, proof, *more = pipe.execute()
        now = _seconds(time)
        seen = [now - at for _, at in workers]
        return News(
            now,
            sum(-AHEAD_SECONDS <= ago <= WORKER_SEEN_SECONDS for ago in seen),
            json.loads(proof) if proof else None,
            _samples(more[0] if more else []),
        )

    def history(
        self, since: int, most: int = HISTORY_SAMPLES, by_minute: bool = False
    ) -> list[tuple[int, dict[str, Any]]]:
        """Return the newest `most` samples from the second `since` on, oldest first.

        They are a second apart, or with `by_minute` a minute.
        """
        key = KEYS.history_by_minute if by_minute else KEYS.history
        with asking():
            found = self.client.xrevrange(key, min=f"{since}-0", count=most)
        return _samples(cast("list[tuple[str, dict[str, str]]]", found))

    def tell_head(self, epoch: str, number: int) -> None:
        """Tell where the feed of events ends, so that nobody has to ask PostgreSQL in vain."""
        with asking():
            self.client.set(KEYS.feed_head, f"{epoch} {number}")

    def feed_head(self) -> tuple[str, int] | None:
        """Return the epoch and the number at which the feed ends, None where nobody has told."""
        with asking():
            told = self.client.get(KEYS.feed_head)
        epoch, _, number = cast("str", told or "").partition(" ")
        return (epoch, int(number)) if number.isdecimal() else None

    def take_turn(self, seconds: int) -> bool:
        """Return whether it is the caller's turn to prove the ledger; it then is for so long."""
        with asking():
            return bool(self.client.set(KEYS.ledger_turn, "1", nx=True, ex=seconds))

    def put_proof(self, proof: dict[str, Any]) -> None:
        """Keep the ledger's newest proof; its `at` is what `now` said."""
        with asking():
            self.client.set(KEYS.ledger, json.dumps(proof))

    def put_shelf(self, products: dict[int, str]) -> None:
        """Keep what a page needs of these products when PostgreSQL is away, as JSON."""
        if products:
            with asking():
                self.client.hset(KEYS.shelf, mapping=dict(products.items()))

    def shelf(self) -> dict[int, str]:
        """Return what was kept of the products."""
        with asking():
            kept = cast("dict[str, str]", self.client.hgetall(KEYS.shelf))
            return {int(product): text for product, text in kept.items()}

    def count(
        self, amounts: dict[str, int | float], process: tuple[str, dict[str, Any]] | None = None
    ) -> None:
        """Add to the sums of all processes; note, if given, a process by name and its state."""
        with asking(), self.client.pipeline() as pipe:
            for field, amount in amounts.items():
                if isinstance(amount, float):
                    pipe.hincrbyfloat(KEYS.telemetry, field, amount)
                else:
                    pipe.hincrby(KEYS.telemetry, field, amount)
            if process:
                name, state = process
                pipe.hset(KEYS.processes, name, json.dumps(state | {"at": self.now()}))
            if pipe.command_stack:
                pipe.execute()

    def counted(self, processes_last: float) -> Counted:
        """Return what was counted; a process that was silent for longer is forgotten."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            pipe.time()
            pipe.hgetall(KEYS.refused)
            pipe.hgetall(KEYS.telemetry)
            pipe.hgetall(KEYS.processes)
            time, refused, telemetry, written = pipe.execute()
            now = _seconds(time)
            states = {name: json.loads(text) for name, text in written.items()}
            gone = [
                name for name, state in states.items() if abs(now - state["at"]) > processes_last
            ]
            if gone:
                self.client.hdel(KEYS.processes, *gone)
        alive = {name: state for name, state in states.items() if name not in gone}
        return Counted(now, refused, telemetry, alive)

    def take_drain_lease(self, milliseconds: int) -> bool:
        """Return whether no drain is under way; then the caller's is, for so long at most."""
        with asking():
            return bool(self.raw_client.set(KEYS.drain_lease, b"1", nx=True, px=milliseconds))

    def take_webhook_lease(self, name: str, milliseconds: int) -> bool:
        """Return whether nobody is about to send there; then the caller is, for so long at most."""
        with asking():
            return bool(
                self.raw_client.set(
                    KEYS.webhook_lease_prefix + name, b"1", nx=True, px=milliseconds
                )
            )

    def end_webhook_lease(self, *names: str) -> None:
        with asking():
            self.raw_client.delete(*(KEYS.webhook_lease_prefix + name for name in names))

    def end_drain_lease(self, after_ms: int = 0) -> None:
        """End it, at once or after so long; one that ends earlier is left alone."""
        with asking():
            if after_ms:
                self.raw_client.pexpire(KEYS.drain_lease, after_ms, lt=True)
            else:
                self.raw_client.delete(KEYS.drain_lease)

    def setting(self, name: str) -> str | None:
        """Return one of Redis's own settings; None where it does not tell them."""
        try:
            with asking():
                return self.client.config_get(name).get(name)
        except Unavailable as error:
            if isinstance(error.__cause__, redis.ResponseError):
                return None
            raise


def _samples(found: list[tuple[str, dict[str, str]]]) -> list[tuple[int, dict[str, Any]]]:
    return [
        (int(stream_id.partition("-")[0]), json.loads(fields["sample"]))
        for stream_id, fields in reversed(found)
    ]


def _seconds(time: tuple[int, int]) -> float:
    return time[0] + time[1] / 1e6
