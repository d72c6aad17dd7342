"""What RQ runs. A job only says "drain": a lost or doubled one does no harm."""

import logging
from contextlib import suppress

import psycopg2
import redis
import rq
from rq.serializers import JSONSerializer
from sqlalchemy.exc import SQLAlchemyError

from ..database import is_unavailable, waiting_at_most
from ..extensions import db, stock
from ..orders import intents
from ..orders.drain import drain_batch
from ..problems import Unavailable
from ..watch import telemetry

log = logging.getLogger(__name__)

QUEUE = "orders"
# While the lease stands nobody enqueues another job; a killed worker's lease runs out by itself.
LEASE_MS = 2000
# After a drain that failed: what waits is to be stored within 2 s of the servers' being well again,
# and an outage is not to cost a job every moment.
RETRY_MS = 1000
# Long enough to see a batch in rq-dashboard, short enough not to fill Redis.
RESULT_TTL_SECONDS = 300
FAILURE_TTL_SECONDS = 3600
JOB_TIMEOUT_SECONDS = 30
# A drain gives up before RQ ends the job, which would be kept as a failed one.
DRAIN_WAIT_SECONDS = 20


def orders_queue(connection: redis.Redis | None = None) -> rq.Queue:
    """Return the queue that every worker listens on. JSON, because pickle would run code."""
    return rq.Queue(
        QUEUE, connection=connection or stock.jobs_raw_client, serializer=JSONSerializer
    )


def enqueue_drain() -> rq.job.Job | None:
    """Enqueue one drain unless one is under way."""
    if not stock.board.take_drain_lease(LEASE_MS):
        return None
    return orders_queue().enqueue(
        persist_orders,
        description="store the waiting orders",
        job_timeout=JOB_TIMEOUT_SECONDS,
        result_ttl=RESULT_TTL_SECONDS,
        failure_ttl=FAILURE_TTL_SECONDS,
    )


def persist_orders() -> str:
    """Store one batch of waiting orders and tell what was done; a full one calls for the next.

    When a server is down the lease stands for a moment longer, so that an outage costs a job a
    second, and not five with a stack trace each.
    """
    job = rq.get_current_job()
    try:
        with waiting_at_most(DRAIN_WAIT_SECONDS):
            drained = drain_batch(job.id if job else "by hand", (job and job.worker_name) or "")
            if drained.persisted:
                # What fails here is done by the sweeper.
                with suppress(SQLAlchemyError):
                    intents.apply_open()
    except (Unavailable, SQLAlchemyError, psycopg2.Error) as error:
        reason = str(error).strip().partition("\n")[0]
        known = isinstance(error, Unavailable) or is_unavailable(error)
        level = logging.WARNING if known else logging.ERROR
        log.log(level, "nothing stored, the orders wait: %s", reason)
        with suppress(Unavailable):
            stock.board.end_drain_lease(RETRY_MS)
        return f"nothing stored, the orders wait: {reason}"
    finally:
        db.session.remove()
    if not drained.busy:
        stock.board.end_drain_lease()
    if drained.persisted:
        telemetry.count_batch(drained.persisted)
    if drained.more:
        enqueue_drain()
    return str(drained)
