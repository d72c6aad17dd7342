"""Sending events to one endpoint: in their order, each until it was taken or the endpoint is off.

What is sent, and its webhook-id, stand in a row that is committed before the first attempt. Killed
between a sending and its record, the same message is sent again: consumers know it by its id.
"""

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import psycopg2
from flask import current_app
from sqlalchemy import Row, text
from standardwebhooks import Webhook

from ..audit import SYSTEM, record
from ..extensions import db, stock
from ..locks import WEBHOOK_LOCKS
from ..models import WebhookDelivery, WebhookEndpoint
from ..problems import CursorExpired, Unavailable
from . import reading, webhooks
from .secret import Unreadable
from .sending import Outcome, Sender

log = logging.getLogger(__name__)

EVENTS_PER_DELIVERY = 100
# So much of the feed is read at once, and looked through for what an endpoint wants.
LOOKED_THROUGH = 1000
# All of a job, so that the next endpoint is not kept waiting.
JOB_SECONDS = 5.0
# Between the attempts of a delivery; the last pause is taken again and again.
PAUSES = (5, 15, 60, 300, 900, 1800, 3600, 7200, 14_400, 21_600)
# Those that failed together need not come back together.
JITTER = 0.2
GIVEN_UP_AFTER = timedelta(days=3)
LONGEST_RETRY_AFTER = 6 * 3600
# An answer that says "never" (a wrong path, a secret that is not known there) is believed then.
FINAL_ATTEMPTS = 4
GONE = 410
USER_AGENT = "flash-sale-webhooks"


class Busy(Exception):
    """Another process sends to this endpoint."""


# What there is to be sent to an endpoint: what a person asked for, or what waits to be delivered.
# All moments are of PostgreSQL's clock: a single process whose own is ahead would put an endpoint
# off for all of them.
WAITING = text("""
    SELECT clock_timestamp() AS now, coalesce(epoch, generation) AS epoch, head, floor,
      (SELECT d.id FROM webhook_deliveries d WHERE endpoint_id = :endpoint AND wanted_at IS NOT NULL
       ORDER BY wanted_at, d.id LIMIT 1) AS wanted,
      (SELECT d.id FROM webhook_deliveries d WHERE endpoint_id = :endpoint AND pending) AS pending
    FROM sale, feed
""")
RECORD = text("""
    WITH sent AS (
      SELECT id, events, pending, wanted_at IS NOT NULL AS asked_for
      FROM webhook_deliveries WHERE id = :delivery FOR UPDATE
    ), noted AS (
      INSERT INTO webhook_attempts (delivery_id, milliseconds, status, error)
      SELECT id, :milliseconds, :status, :error FROM sent
    ), changed AS (
      UPDATE webhook_deliveries d SET
        wanted_at = NULL, attempts = attempts + 1, pending = d.pending AND NOT :delivered,
        delivered_at = CASE WHEN :delivered THEN coalesce(delivered_at, now()) ELSE delivered_at END
      FROM sent WHERE d.id = sent.id
    )
    SELECT events, pending, asked_for, clock_timestamp() AS now FROM sent
""")


class Job:
    """One turn of an endpoint. `run` sends what there is, for JOB_SECONDS at most."""

    def __init__(self, endpoint_id: int, sender: Sender | None = None) -> None:
        self._endpoint_id = endpoint_id
        self._sender = sender
        self.delivered = self.events = self.failed = 0
        # Whether there was more to send when the time was up.
        self.more = False
        # The last attempt, as long as it is not on record: by the delivery's id.
        self._sent: tuple[int, Outcome] | None = None
        # Events that were read and not sent yet, and the epoch and number that they follow upon.
        self._ahead: tuple[str, int, list[reading.Event]] = "", 0, []

    def run(self) -> str:
        """Send, and tell what was sent.

        Raises psycopg2.Error and SQLAlchemyError; then what was not recorded is sent again.
        """
        started = time.monotonic()
        allow = current_app.config["SETTINGS"].webhook_allow_private
        with _alone(self._endpoint_id) as is_mine, self._sender or Sender(allow) as sender:
            longest = 0.0
            try:
                # Not begun if one as slow as the slowest would not fit.
                while time.monotonic() - started + longest < JOB_SECONDS:
                    is_mine()
                    begun = time.monotonic()
                    if not self._step(sender):
                        break
                    longest = max(longest, time.monotonic() - begun)
                else:
                    self.more = True
            except Exception:
                # Whatever it was about, what was sent need not be sent again.
                db.session.rollback()
                self._record_last()
                raise
            self._record_last()
        counts = {"delivered": self.delivered, "failed": self.failed, "events": self.events}
        with suppress(Unavailable):
            stock.board.count({f"webhook:{name}": count for name, count in counts.items() if count})
        return str(self)

    def __str__(self) -> str:
        text = f"webhook {self._endpoint_id}: {self.delivered} deliveries with {self.events} events"
        return text + (f", {self.failed} failed" if self.failed else "")

    def _step(self, sender: Sender) -> bool:
        """Put the attempt before on record, and send one message; False when there is none now.

        Both in one transaction, whose commit is what a delivery waits for; and none is open while
        somebody else's server takes its time.
        """
        endpoint = self._lock()
        if endpoint is None:
            return self._end()
        if self._sent:
            self._record(endpoint, *self._sent)
        waiting = db.session.execute(WAITING, {"endpoint": endpoint.id}).one_or_none()
        delivery = self._next(endpoint, waiting) if waiting else None
        if waiting is None or delivery is None:
            return self._end()
        try:
            headers = signed(endpoint, delivery, waiting.now)
        except Unreadable:
            delivery.wanted_at = None
            switch_off(endpoint, "SECRET_KEY was changed: make a new secret for this endpoint")
            return self._end()
        db.session.flush()
        url, body, delivery_id = endpoint.url, delivery.body.encode(), delivery.id
        self._end()
        self._sent = delivery_id, sender.post(url, headers, body)
        return True

    def _lock(self) -> WebhookEndpoint | None:
        # Read anew: meanwhile it may have been changed, or removed. Locked before its deliveries
        # are looked at, as a reset does: neither waits for the other.
        db.session.expunge_all()
        return db.session.get(WebhookEndpoint, self._endpoint_id, with_for_update=True)

    def _end(self) -> bool:
        db.session.commit()
        self._sent = None
        return False

    def _next(self, endpoint: WebhookEndpoint, waiting: Row[Any]) -> WebhookDelivery | None:
        """Return the delivery that comes next; None when there is nothing to be sent now."""
        if waiting.wanted:
            return db.session.get_one(WebhookDelivery, waiting.wanted)
        if endpoint.state != "on" or endpoint.next_at > waiting.now:
            return None
        if waiting.pending:
            return db.session.get_one(WebhookDelivery, waiting.pending)
        ends = reading.Ends(waiting.epoch, waiting.head, waiting.floor)
        return self._new(endpoint, ends, waiting.now)

    def _new(
        self, endpoint: WebhookEndpoint, of: reading.Ends, now: datetime
    ) -> WebhookDelivery | None:
        """Return a delivery of the next events that the endpoint wants; None without any."""
        if endpoint.epoch != of.epoch:
            endpoint.epoch, endpoint.number = of.epoch, 0
        if endpoint.number < of.floor:
            log.warning("webhook %d: events before %d are no longer kept", endpoint.id, of.floor)
            endpoint.number = of.floor
        chosen: list[reading.Event] = []
        while not chosen and endpoint.number < of.head:
            events = self._read(endpoint.number, of)
            if not events:
                break
            taken = 0
            for event in events:
                if len(chosen) == EVENTS_PER_DELIVERY:
                    break
                taken += 1
                endpoint.number = event.number
                if not endpoint.types or event.type in endpoint.types:
                    chosen.append(event)
            self._ahead = of.epoch, endpoint.number, events[taken:]
        if not chosen:
            return None
        delivery = WebhookDelivery(
            endpoint_id=endpoint.id,
            kind="events",
            message_id=webhooks.new_message_id(),
            first_number=chosen[0].number,
            last_number=chosen[-1].number,
            events=len(chosen),
            body=webhooks.message(now, [event.json for event in chosen]).decode(),
            created_at=now,
            pending=True,
        )
        db.session.add(delivery)
        return delivery

    def _read(self, after: int, of: reading.Ends) -> list[reading.Event]:
        """Return some events after a number: those of many deliveries are read at once."""
        epoch, number, events = self._ahead
        if events and (epoch, number) == (of.epoch, after):
            return events
        try:
            return reading.read(after, LOOKED_THROUGH, of).events
        except CursorExpired:
            # The next turn sees where the feed begins now.
            return []

    def _record_last(self) -> None:
        """Put the last attempt on record, if it is not."""
        if self._sent:
            endpoint = self._lock()
            if endpoint:
                self._record(endpoint, *self._sent)
            self._end()

    def _record(self, endpoint: WebhookEndpoint, delivery_id: int, outcome: Outcome) -> None:
        """Put an attempt on record, and what follows from it, in the current transaction."""
        values = {
            "delivery": delivery_id,
            "milliseconds": outcome.milliseconds,
            "status": outcome.status,
            "error": None if outcome.delivered else str(outcome),
            "delivered": outcome.delivered,
        }
        sent = db.session.execute(RECORD, values).one_or_none()
        if sent is None:
            # Removed meanwhile.
            return
        if outcome.delivered:
            self.delivered += 1
            self.events += sent.events
            if sent.pending or not sent.asked_for:
                endpoint.failures, endpoint.failing_since, endpoint.next_at = 0, None, sent.now
        else:
            self.failed += 1
            if sent.pending and not sent.asked_for:
                put_off(endpoint, outcome, sent.now)


def put_off(endpoint: WebhookEndpoint, outcome: Outcome, now: datetime) -> None:
    """Set when an endpoint is tried again after a failure, or switch it off."""
    endpoint.failures += 1
    endpoint.failing_since = endpoint.failing_since or now
    pause = PAUSES[min(endpoint.failures, len(PAUSES)) - 1] * random.uniform(1, 1 + JITTER)
    if outcome.retry_after is not None:
        pause = max(pause, min(outcome.retry_after, LONGEST_RETRY_AFTER))
    endpoint.next_at = now + timedelta(seconds=pause)
    if outcome.status == GONE:
        switch_off(endpoint, "it answered 410: gone")
    elif outcome.final and endpoint.failures >= FINAL_ATTEMPTS:
        switch_off(endpoint, f"it {outcome} {endpoint.failures} times in a row")
    elif now - endpoint.failing_since >= GIVEN_UP_AFTER:
        switch_off(endpoint, f"nothing was delivered for {GIVEN_UP_AFTER.days} days: {outcome}")


def switch_off(endpoint: WebhookEndpoint, reason: str) -> None:
    """Switch a failing endpoint off, in the current transaction: people are told of it."""
    endpoint.state, endpoint.off_reason = "off", reason
    record(SYSTEM, "webhook.off", f"webhook {endpoint.id}", after={"reason": reason})
    log.error("webhook %d is switched off: %s", endpoint.id, reason)


def signed(endpoint: WebhookEndpoint, delivery: WebhookDelivery, now: datetime) -> dict[str, str]:
    """Return the headers of an attempt that is made now (Standard Webhooks). Raises Unreadable."""
    signatures = [
        Webhook(secret).sign(delivery.message_id, now, delivery.body)
        for secret in webhooks.secrets_of(endpoint, now)
    ]
    return {
        "Content-Type": "application/json",
        "User-Agent": USER_AGENT,
        "webhook-id": delivery.message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


@contextmanager
def _alone(endpoint_id: int) -> Iterator[Any]:
    """Hold an endpoint for as long as this session of PostgreSQL lives; yield a check of that.

    Raises Busy where another process holds it.
    """
    pooled = db.engine.raw_connection()
    connection: Any = pooled.dbapi_connection

    def ask(statement: str, *values: int) -> Any:
        with connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchone()[0]

    try:
        # Not left idle in a transaction, and each question is one round trip.
        connection.autocommit = True
        if not ask("SELECT pg_try_advisory_lock(%s, %s)", WEBHOOK_LOCKS, endpoint_id):
            raise Busy
        yield lambda: ask("SELECT 1")
    finally:
        try:
            ask("SELECT pg_advisory_unlock_all() IS NULL")
            connection.autocommit = False
        except psycopg2.Error:
            # Never back to the pool with a lock.
            pooled.invalidate()
        pooled.close()


DUE = text("""
    SELECT e.id, e.failures > 0 AS failing FROM webhook_endpoints e, sale, feed
    WHERE EXISTS (SELECT FROM webhook_deliveries d
                  WHERE d.endpoint_id = e.id AND d.wanted_at IS NOT NULL)
       OR (e.state = 'on' AND e.next_at <= now()
           AND (e.number < feed.head OR e.epoch <> coalesce(sale.epoch, sale.generation)
                OR EXISTS (SELECT FROM webhook_deliveries d
                           WHERE d.endpoint_id = e.id AND d.pending)))
    ORDER BY failing, e.next_at, e.id
""")
FORGET = text("""
    DELETE FROM webhook_deliveries WHERE ctid = ANY(ARRAY(
      SELECT ctid FROM webhook_deliveries
      WHERE created_at < now() - make_interval(days => :days) AND NOT pending
      LIMIT :most))
    RETURNING id
""")
FORGOTTEN_AT_ONCE = 1000


def due() -> list[tuple[int, bool]]:
    """Return (id, whether it fails) of the endpoints that something is to be sent to now."""
    found = [(row.id, row.failing) for row in db.session.execute(DUE)]
    db.session.rollback()
    return found


def forget_old(days: int) -> int:
    """Delete some of the deliveries that are older than that; return how many."""
    values = {"days": days, "most": FORGOTTEN_AT_ONCE}
    deleted = len(db.session.execute(FORGET, values).all())
    db.session.commit()
    return deleted
