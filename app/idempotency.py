"""Keys of acts that create something: an act with a key is done once, and answered alike again.

A key stands in PostgreSQL, in the transaction of its act: both are there, or neither. (Purchases
keep theirs in Redis, restocks in their movement.)
"""

import hashlib
import json

from sqlalchemy import delete, select, text
from sqlalchemy.dialects.postgresql import insert

from .extensions import db
from .models import RequestKey
from .problems import KeyMismatch

KEPT_DAYS = 30
# So that nobody waits for a long past to be cleared away.
FORGOTTEN_AT_ONCE = 100


def take(route: str, resource: str, key: str, content: object) -> RequestKey:
    """Take a key in this transaction, for the act that it ends with.

    The row's `answer` is None for the first request: the act sets it, and commits both. Otherwise
    it is what the act answered. Of two at once, the second waits here for the first.

    Raises KeyMismatch when the key came with another content before.
    """
    _forget()
    identity = {"route": route, "resource": resource, "key": key}
    fingerprint = _fingerprint(content)
    db.session.execute(
        insert(RequestKey).values(**identity, fingerprint=fingerprint).on_conflict_do_nothing()
    )
    row = db.session.scalars(select(RequestKey).filter_by(**identity)).one()
    if row.fingerprint != fingerprint:
        db.session.rollback()
        raise KeyMismatch
    return row


def forget(route: str) -> None:
    """Delete a route's keys, since what it made is being deleted."""
    db.session.execute(delete(RequestKey).where(RequestKey.route == route))


def _fingerprint(content: object) -> str:
    written = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(written.encode()).hexdigest()


def _forget() -> None:
    """Delete keys that are past their time; who takes one clears away, so no clock has to."""
    db.session.execute(
        text(
            "DELETE FROM request_keys WHERE ctid = ANY(ARRAY(SELECT ctid FROM request_keys"
            " WHERE created_at < now() - make_interval(days => :days)"
            " LIMIT :most FOR UPDATE SKIP LOCKED))"
        ),
        {"days": KEPT_DAYS, "most": FORGOTTEN_AT_ONCE},
    )
