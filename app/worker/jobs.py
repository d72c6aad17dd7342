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
from ..feed import delivery
from ..orders import intents
from ..orders.drain import drain_batch
from ..problems import Unavailable
from ..watch import telemetry

log = logging.getLogger(__name__)

QUEUE = "orders"
# Of processes of its own: a consumer that takes its time never keeps an order waiting.
WEBHOOK_QUEUE = "webhooks"
# While the lease stands nobody enqueues another job; a killed worker's lease runs out by itself.
LEASE_MS = 2000
# After a drain that failed: what waits is to be stored within 2 s of the servers' being well again,
# and an outage is not to cost a job every moment.
RETRY_MS = 1000
# Long enough to see a batch in rq-dashboard, short enough not to fill Redis.
RESULT_TTL_SECONDS = 300
FAILURE_TTL_SECONDS = 3600
JOB_TIMEOUT_SECONDS = 30
# What stands in the queue before a job may take so long, each; and so much more for its own turn.
WEBHOOK_TURN_SECONDS = 6
WEBHOOK_LEASE_SECONDS = 15
# Of all endpoints that fail one at a time is tried: the others need not wait for more than that.
FAILING = "failing"
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


def webhooks_queue(connection: redis.Redis | None = None) -> rq.Queue:
    """Return the queue of those who send webhooks."""
    return rq.Queue(
        WEBHOOK_QUEUE, connection=connection or stock.jobs_raw_client, serializer=JSONSerializer
    )


def enqueue_webhook(endpoint_id: int, failing: bool) -> rq.job.Job | None:
    """Enqueue a turn of an endpoint unless one is under way."""
    queue = webhooks_queue()
    seconds = WEBHOOK_TURN_SECONDS * queue.count + WEBHOOK_LEASE_SECONDS
    if not stock.board.take_webhook_lease(str(endpoint_id), 1000 * seconds):
        return None
    if failing and not stock.board.take_webhook_lease(FAILING, 1000 * seconds):
        stock.board.end_webhook_lease(str(endpoint_id))
        return None
    return queue.enqueue(
        send_webhooks,
        endpoint_id,
        failing,
        description=f"send events to webhook {endpoint_id}",
        job_timeout=JOB_TIMEOUT_SECONDS,
        result_ttl=RESULT_TTL_SECONDS,
        failure_ttl=FAILURE_TTL_SECONDS,
    )


def send_webhooks(endpoint_id: int, failing: bool) -> str:
    """Send what an endpoint has not had, for some seconds, and tell what was done.

    A lost job does no harm: its lease runs out, and what was not recorded is sent again.
    """
    job = delivery.Job(endpoint_id)
    try:
        with waiting_at_most(DRAIN_WAIT_SECONDS):
            told = job.run()
    except delivery.Busy:
        return f"another process sends to webhook {endpoint_id}"
    except (Unavailable, SQLAlchemyError, psycopg2.Error) as error:
        reason = str(error).strip().partition("\n")[0]
        known = isinstance(error, Unavailable) or is_unavailable(error)
        level = logging.WARNING if known else logging.ERROR
        log.log(level, "webhook %d goes on later: %s", endpoint_id, reason)
        return f"it goes on later: {reason}"
    finally:
        db.session.remove()
    stock.board.end_webhook_lease(str(endpoint_id), *([FAILING] if failing else []))
    if job.more:
        enqueue_webhook(endpoint_id, failing=False)
    return told
