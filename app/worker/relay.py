"""What a worker does beside RQ's work: relay, numberer, sampler and sweeper, each a `run_once`.

The relay calls for a drain when orders wait, and the numberer numbers the events of what was
stored. Once a second the sampler tells what Redis holds, and
the sweeper finishes what crashes left undone. Any number of worker processes may run; they do no
harm together.
"""

import logging
import threading
import time
from collections.abc import Callable

import psycopg2
import redis
from flask import Flask
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from ..books import ledger, recovery
from ..database import waiting_at_most
from ..extensions import db, stock
from ..feed import numbering
from ..generation import on_record
from ..orders import bulk, intents
from ..orders.drain import drain_batch
from ..orders.expiry import Expiry
from ..problems import Unavailable
from ..products import brake, movements, observed, sale
from ..stock.figures import View
from ..stock.outcomes import REFUSALS
from ..stock.replicas import Unreplicated
from ..watch import samples, shelf
from . import jobs

log = logging.getLogger(__name__)

# At full speed a batch is called for five times a second: RQ's cost stays below 4 % of a core.
PACE_SECONDS = 0.2
# How long one look at an empty outbox may last; an order that comes in ends it at once.
WATCH_MS = 500
# How often several shards are looked at.
LOOK_SECONDS = 0.05
SWEEP_SECONDS = 1.0
EXPIRE_SECONDS = 0.5
# How old an event may be before it is told, when nothing else is amiss.
NUMBER_SECONDS = 0.2
# The same order is the first in the outbox for so long only when nobody drains.
STUCK_SECONDS = 3.0
# All that a step of the relay or the sweeper may wait for PostgreSQL; past it nobody answers.
STEP_WAIT_SECONDS = 30
ERROR_PAUSE_SECONDS = 0.5


class Relay:
    """Sees that orders wait, and enqueues a job; when jobs don't get it done, drains by itself."""

    def __init__(self) -> None:
        self._last = 0.0
        # Of each shard in which orders wait the first one, and since when it has been that.
        self._heads: dict[int, tuple[bytes, float]] = {}
        # Whether it drains by itself, and more is waiting.
        self._behind = False

    def run_once(self, stopped: threading.Event) -> None:
        heads = self._first_waiting(stopped)
        now = time.monotonic()
        self._heads = {
            shard: (head, self._heads[shard][1] if self._was(shard, head) else now)
            for shard, head in heads.items()
        }
        if not heads:
            self._behind = False
            return
        stuck = any(now - since > STUCK_SECONDS for _, since in self._heads.values())
        if stuck or self._behind:
            # RQ's own data may be damaged, or its worker hang; the outbox needs neither.
            self._heads = {shard: (head, now) for shard, head in heads.items()}
            drained = drain_batch("", "relay")
            self._behind = drained.more
            if stuck:
                log.warning("orders wait although jobs are enqueued: %s", drained)
            return
        # The first order after a pause goes at once; under load orders gather to a batch.
        stopped.wait(max(0.0, self._last + PACE_SECONDS - time.monotonic()))
        self._last = time.monotonic()
        jobs.enqueue_drain()

    def _was(self, shard: int, head: bytes) -> bool:
        return shard in self._heads and self._heads[shard][0] == head

    @staticmethod
    def _first_waiting(stopped: threading.Event) -> dict[int, bytes]:
        """Return the first order's stream id of each shard in which one waits; wait for one."""
        if len(stock.shards) == 1:
            head = stock.first.first_waiting(WATCH_MS)
            return {} if head is None else {0: head}
        heads = stock.first_waiting()
        if not heads:
            # A command that waits names keys of one node: they are looked at in turn.
            stopped.wait(LOOK_SECONDS)
        return heads


class Numberer:
    """Numbers the events that were committed, a few times a second."""

    def __init__(self) -> None:
        self._numberer = numbering.Numberer()

    def run_once(self, stopped: threading.Event) -> None:
        if not self._numberer.run_once():
            stopped.wait(NUMBER_SECONDS)


class Sampler:
    """Once a second, with Redis alone: says that this worker is alive, and samples the sale.

    A shard that missed a brake while it was away is told of it here, whatever PostgreSQL does.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._kept: dict[int, list[int]] = {}

    def run_once(self, stopped: threading.Event) -> None:
        started = time.monotonic()
        stock.board.alive(self._worker)
        view = stock.view(stock.product_ids())
        stock.board.sample(samples.sample(view))
        stock.brakes.agree()
        self._keep_counts(view)
        stopped.wait(max(0.0, started + SWEEP_SECONDS - time.monotonic()))

    def _keep_counts(self, view: View) -> None:
        """Claims leave their refusals in Redis's memory alone; here they get to its log."""
        counts = {
            product_id: [figures.get(name, 0) for name in REFUSALS]
            for product_id, figures in view.products.items()
        }
        changed = [p for p in counts if counts[p] != self._kept.get(p)]
        stock.keep_counts(changed)
        self._kept = counts


class Canceller:
    """Cancels many orders at once, batch by batch, where somebody has asked for that."""

    def run_once(self, stopped: threading.Event) -> None:
        if not bulk.step():
            stopped.wait(SWEEP_SECONDS)


class Expirer:
    """Ends the holds that nobody paid for, so that their units are on sale again."""

    def __init__(self) -> None:
        self._expiry = Expiry()

    def run_once(self, stopped: threading.Event) -> None:
        if not self._expiry.step():
            stopped.wait(EXPIRE_SECONDS)


class Sweeper:
    """Once a second, with PostgreSQL: finishes what was left half done, and proves the ledger."""

    def __init__(self) -> None:
        self._shelf = shelf.Shelf()
        self._observer = observed.Observer()
        self._finisher = movements.Finisher()

    def run_once(self, stopped: threading.Event) -> None:
        started = time.monotonic()
        failed = self._done(
            record_issued, recovery.close_when_stale, brake.carry_over, self._finish,
            ledger.check_in_turn,
        )  # fmt: skip
        stopped.wait(max(0.0, started + SWEEP_SECONDS - time.monotonic()))
        if failed:
            raise failed

    def _finish(self) -> None:
        if sale.is_prepared():
            failed = self._done(
                sale.publish_stale, self._finisher.run_once,
                lambda: stock.finish_lent(on_record()), intents.apply_open, self._shelf.renew,
                self._observer.run_once,
            )  # fmt: skip
            if failed:
                raise failed

    @staticmethod
    def _done(*steps: Callable[[], object]) -> Unavailable | None:
        """Take every step, and return what failed first: a shard may be out of reach for hours."""
        failed = None
        for step in steps:
            try:
                step()
            except Unavailable as error:
                db.session.rollback()
                failed = failed or error
        return failed


ISSUED_OF_ALL = text("""
UPDATE sale SET last_order_id = greatest(last_order_id, :last), sampled_at = now()
WHERE generation = :generation
""")
ISSUED_OF_SHARDS = text("""
INSERT INTO sale_shards AS known (shard, last_order_id, sampled_at)
SELECT found.shard, found.last, now()
FROM unnest(CAST(:shards AS integer[]), CAST(:lasts AS bigint[]), CAST(:generations AS text[]))
     AS found (shard, last, generation)
JOIN sale ON sale.generation = found.generation
ORDER BY found.shard
ON CONFLICT (shard) DO UPDATE SET
  last_order_id = greatest(known.last_order_id, excluded.last_order_id), sampled_at = now()
""")


def record_issued() -> None:
    """Put on record which order ids Redis has surely issued. Raises stock.Unavailable.

    Not those that replicas lack: one that is promoted would seem to have forgotten them.
    """
    found = stock.gathered(lambda shard: shard.surely(shard.asking_view([])))
    issued = {n: of for n, of in enumerate(found) if isinstance(of, View) and of.generation}
    for error in found:
        if isinstance(error, Unreplicated):
            log.warning("no order ids are put on record: %s", error)
        elif isinstance(error, Unavailable) and len(found) == 1:
            raise error
    if len(found) == 1:
        for view in issued.values():
            told = {"last": view.last_order_id, "generation": view.generation}
            db.session.execute(ISSUED_OF_ALL, told)
    elif issued:
        told = {
            "shards": list(issued),
            "lasts": [view.last_order_id for view in issued.values()],
            "generations": [view.generation for view in issued.values()],
        }
        db.session.execute(ISSUED_OF_SHARDS, told)
    db.session.commit()


def run_forever(
    app: Flask,
    run_once: Callable[[threading.Event], None],
    stopped: threading.Event,
    turned: Callable[[], None] = lambda: None,
) -> None:
    """Repeat a step until `stopped` is set; a server that fails is waited for.

    `turned` is called at each turn, whatever comes of it.
    """
    failing = False
    while not stopped.is_set():
        turned()
        try:
            # A dead connection shows up at the end of the context too, when it is rolled back.
            with app.app_context(), waiting_at_most(STEP_WAIT_SECONDS):
                run_once(stopped)
            failing = False
        except (Unavailable, redis.RedisError, SQLAlchemyError, psycopg2.Error) as error:
            if not failing:
                log.warning("%s pauses: %s", run_once.__qualname__, str(error).partition("\n")[0])
            failing = True
            stopped.wait(ERROR_PAUSE_SECONDS)
        except Exception:
            log.exception("%s failed", run_once.__qualname__)
            stopped.wait(ERROR_PAUSE_SECONDS)
