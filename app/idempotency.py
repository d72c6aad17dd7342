"""Keys of acts that create something: an act with a key is done once, and answered alike again.

A key stands in PostgreSQL, in the transaction of its act: both are there, or neither. (Purchases
keep theirs in Redis, restocks in their movement.)
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from sqlalchemy import delete, null, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert

from .extensions import db
from .models import RequestKey
from .problems import KeyMismatch

KEPT_DAYS = 30
# So that nobody waits for a long past to be cleared away.
FORGOTTEN_AT_ONCE = 100


FORGET = f"""
DELETE FROM request_keys WHERE ctid = ANY(ARRAY(
  SELECT ctid FROM request_keys WHERE created_at < now() - interval '{KEPT_DAYS} days'
  -- By the index, also before PostgreSQL's statistics know how young the keys are.
  ORDER BY created_at LIMIT {FORGOTTEN_AT_ONCE} FOR UPDATE SKIP LOCKED))
"""  # noqa: S608
# Its parameters are those of `values_of`.
PUT = """
INSERT INTO request_keys (route, resource, key, fingerprint, answer)
SELECT CAST(:route AS text), resource, key, fingerprint, CAST(answer AS json)
FROM unnest(CAST(:resources AS text[]), CAST(:keys AS text[]), CAST(:fingerprints AS text[]),
            CAST(:answers AS text[])) AS new (resource, key, fingerprint, answer)
ON CONFLICT DO NOTHING RETURNING 1
"""
PUT_ALL = text(f"WITH forgotten AS ({FORGET}) {PUT}")

# By (resource, key) an act's content and its answer.
Keys = Mapping[tuple[str, str], tuple[object, dict[str, Any]]]


def take(route: str, resource: str, key: str, content: object) -> RequestKey:
    """Take a key in this transaction, for the act that it ends with.

    The row's `answer` is None for the first request: the act sets it, and commits both. Otherwise
    it is what the act answered. Of two at once, the second waits here for the first.

    Raises KeyMismatch when the key came with another content before.
    """
    _forget()
    identity = {"route": route, "resource": resource, "key": key}
    expected = fingerprint(content)
    db.session.execute(
        insert(RequestKey).values(**identity, fingerprint=expected).on_conflict_do_nothing()
    )
    row = db.session.scalars(select(RequestKey).filter_by(**identity)).one()
    if row.fingerprint != expected:
        db.session.rollback()
        raise KeyMismatch
    return row


def find_all(route: str, keys: Collection[tuple[str, str]]) -> dict[tuple[str, str], RequestKey]:
    """Return the keys that are taken, by (resource, key); the resources are locked otherwise."""
    if not keys:
        return {}
    found = select(RequestKey).where(
        RequestKey.route == route, tuple_(RequestKey.resource, RequestKey.key).in_(keys)
    )
    return {(row.resource, row.key): row for row in db.session.scalars(found)}


def put_all(route: str, done: Keys) -> bool:
    """Take keys together with their acts' answers.

    False when somebody took one meanwhile: then nothing of this transaction may stay.
    """
    if not done:
        return True
    return len(db.session.execute(PUT_ALL, values_of(route, done)).all()) == len(done)


def values_of(route: str, done: Keys) -> dict[str, object]:
    """Return the parameters of PUT."""
    keys = sorted(done)
    return {
        "route": route,
        "resources": [resource for resource, _ in keys],
        "keys": [key for _, key in keys],
        "fingerprints": [fingerprint(done[key][0]) for key in keys],
        "answers": [msgspec.json.encode(done[key][1]).decode() for key in keys],
    }


def reopen(route: str, keys: Collection[tuple[str, str]]) -> None:
    """Let whoever comes again with one of these keys, (resource, key) each, be decided anew."""
    if keys:
        taken = tuple_(RequestKey.resource, RequestKey.key).in_(keys)
        reopened = update(RequestKey).where(RequestKey.route == route, taken)
        db.session.execute(reopened.values(answer=null()))


def forget(routes: Collection[str]) -> None:
    """Delete the keys of these routes, since what they made is being deleted."""
    db.session.execute(delete(RequestKey).where(RequestKey.route.in_(routes)))


_write = json.JSONEncoder(sort_keys=True, default=str).encode


def fingerprint(content: object) -> str:
    """Return by what a request is known again."""
    written = _write(content)
    return hashlib.sha256(written.encode()).hexdigest()


def _forget() -> None:
    """Delete keys that are past their time; who takes one clears away, so no clock has to."""
    db.session.execute(text(FORGET))
