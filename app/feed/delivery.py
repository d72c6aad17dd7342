"""Sending events to one endpoint: in their order, each until it was taken or the endpoint is off.

What is sent, and its webhook-id, stand in a row that is committed before the first attempt. Killed
between a sending and its record, the same message is sent again: consumers know it by its id.
"""

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
from flask import current_app
from sqlalchemy import select, text
from standardwebhooks import Webhook

from ..audit import SYSTEM, record
from ..extensions import db, stock
from ..locks import WEBHOOK_LOCKS
from ..models import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from ..problems import CursorExpired, Unavailable
from . import reading, webhooks
from .secret import Unreadable
from .sending import Outcome, Sender

log = logging.getLogger(__name__)

EVENTS_PER_DELIVERY = 100
# So much of the feed is looked through at once for what an endpoint wants.
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


class Job:
    """One turn of an endpoint. `run` sends what there is, for JOB_SECONDS at most."""

    def __init__(self, endpoint_id: int, sender: Sender | None = None) -> None:
        self._endpoint_id = endpoint_id
        self._sender = sender
        self.delivered = self.events = self.failed = 0
        # Whether there was more to send when the time was up.
        self.more = False

    def run(self) -> str:
        """Send, and tell what was sent.

        Raises psycopg2.Error and SQLAlchemyError; then what was not recorded is sent again.
        """
        started = time.monotonic()
        allow = current_app.config["SETTINGS"].webhook_allow_private
        with _alone(self._endpoint_id) as is_mine, self._sender or Sender(allow) as sender:
            longest = 0.0
            # Not begun if one as slow as the slowest would not fit.
            while time.monotonic() - started + longest < JOB_SECONDS:
                is_mine()
                begun = time.monotonic()
                if not self._step(sender):
                    break
                longest = max(longest, time.monotonic() - begun)
            else:
                self.more = True
        return str(self)

    def __str__(self) -> str:
        text = f"webhook {self._endpoint_id}: {self.delivered} deliveries with {self.events} events"
        return text + (f", {self.failed} failed" if self.failed else "")

    def _step(self, sender: Sender) -> bool:
        """Send one message; False when there is none to be sent now."""
        # Locked before its deliveries are looked at, as a reset does: neither waits for the other.
        endpoint = db.session.get(
            WebhookEndpoint, self._endpoint_id, with_for_update=True, populate_existing=True
        )
        if endpoint is None:
            return self._nothing()
        delivery = db.session.scalar(
            select(WebhookDelivery)
            .where(
                WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.wanted_at.is_not(None)
            )
            .order_by(WebhookDelivery.wanted_at, WebhookDelivery.id)
            .limit(1)
        )
        if delivery is None:
            if endpoint.state != "on" or endpoint.next_at > datetime.now(UTC):
                return self._nothing()
            delivery = self._pending(endpoint)
            if delivery is None:
                return self._nothing()
        try:
            headers = signed(endpoint, delivery)
        except Unreadable:
            delivery.wanted_at = None
            switch_off(endpoint, "SECRET_KEY was changed: make a new secret for this endpoint")
            db.session.commit()
            return False
        # No transaction is open while somebody else's server takes its time.
        url, body, delivery_id = endpoint.url, delivery.body.encode(), delivery.id
        db.session.commit()
        outcome = sender.post(url, headers, body)
        self._record(self._endpoint_id, delivery_id, outcome)
        return True

    def _nothing(self) -> bool:
        db.session.rollback()
        return False

    def _pending(self, endpoint: WebhookEndpoint) -> WebhookDelivery | None:
        """Return the delivery that comes next, committed; None when there are no events."""
        pending = db.session.scalar(
            select(WebhookDelivery).where(
                WebhookDelivery.endpoint_id == endpoint.id, WebhookDelivery.pending
            )
        )
        if pending:
            return pending
        of = reading.ends()
        if endpoint.epoch != of.epoch:
            endpoint.epoch, endpoint.number = of.epoch, 0
        if endpoint.number < of.floor:
            log.warning("webhook %d: events before %d are no longer kept", endpoint.id, of.floor)
            endpoint.number = of.floor
        chosen: list[reading.Event] = []
        while not chosen and endpoint.number < of.head:
            looked = EVENTS_PER_DELIVERY if not endpoint.types else LOOKED_THROUGH
            try:
                page = reading.read(endpoint.number, looked, of)
            except CursorExpired:
                # The next turn sees where the feed begins now.
                break
            for event in page.events:
                if len(chosen) == EVENTS_PER_DELIVERY:
                    break
                endpoint.number = event.number
                if not endpoint.types or event.type in endpoint.types:
                    chosen.append(event)
            if not page.events:
                break
        if not chosen:
            db.session.commit()
            return None
        now = datetime.now(UTC)
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
        db.session.flush()
        return delivery

    def _record(self, endpoint_id: int, delivery_id: int, outcome: Outcome) -> None:
        """Put an attempt on record, and what follows from it."""
        # Read anew: meanwhile both may have been changed, or removed.
        db.session.expunge_all()
        endpoint = db.session.get(WebhookEndpoint, endpoint_id, with_for_update=True)
        delivery = db.session.get(WebhookDelivery, delivery_id)
        if endpoint is None or delivery is None:
            # Removed meanwhile.
            db.session.rollback()
            return
        now = datetime.now(UTC)
        asked_for, delivery.wanted_at = delivery.wanted_at is not None, None
        delivery.attempts += 1
        db.session.add(
            WebhookAttempt(
                delivery_id=delivery_id,
                milliseconds=outcome.milliseconds,
                status=outcome.status,
                error=None if outcome.delivered else str(outcome),
            )
        )
        if outcome.delivered:
            self.delivered += 1
            self.events += delivery.events
            delivery.delivered_at = delivery.delivered_at or now
            if delivery.pending or not asked_for:
                endpoint.failures, endpoint.failing_since, endpoint.next_at = 0, None, now
            delivery.pending = False
        else:
            self.failed += 1
            if delivery.pending and not asked_for:
                put_off(endpoint, outcome, now)
        db.session.commit()
        with suppress(Unavailable):
            result = "delivered" if outcome.delivered else "failed"
            events = delivery.events if outcome.delivered else 0
            stock.board.count({f"webhook:{result}": 1, "webhook:events": events})


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


def signed(endpoint: WebhookEndpoint, delivery: WebhookDelivery) -> dict[str, str]:
    """Return the headers of an attempt that is made now (Standard Webhooks). Raises Unreadable."""
    now = datetime.now(UTC)
    signatures = [
        Webhook(secret).sign(delivery.message_id, now, delivery.body)
        for secret in webhooks.secrets_of(endpoint)
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
            found = cursor.fetchone()[0]
        # Not left idle in a transaction.
        connection.commit()
        return found

    try:
        if not ask("SELECT pg_try_advisory_lock(%s, %s)", WEBHOOK_LOCKS, endpoint_id):
            raise Busy
        yield lambda: ask("SELECT 1")
    finally:
        try:
            connection.rollback()
            ask("SELECT pg_advisory_unlock_all() IS NULL")
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
