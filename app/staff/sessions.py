"""Who is signed in: a row in PostgreSQL, and a record in Redis for when PostgreSQL can't answer.

The row decides. Only where PostgreSQL gives no answer, a record that it confirmed within the last
12 hours lets a person go on: to look, and to stop the sale.
"""

import json
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import redis
from sqlalchemy import Label, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from ..audit import Actor, record
from ..extensions import db, stock
from ..models import Staff, StaffSession
from ..problems import Unavailable
from ..stock.keys import StaffKeys

log = logging.getLogger(__name__)

# A session ends after so long however busy it is, which also bounds the table.
LONGEST = timedelta(days=7)
RECORD_SECONDS = 12 * 60 * 60
# A record is written anew so often, not with each request: 12 hours are not less exact for it.
CONFIRM_EVERY_SECONDS = 60
# In a bar: until the change that is being made is committed, no record counts.
UNTIL_COMMITTED = "inf"
# Sessions that this process has confirmed lately: forgotten together once there are so many.
MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class SignedIn:
    """A person who is signed in; `current_user` of every page.

    `confirmed` is False where only Redis vouches for the session: PostgreSQL could not be asked.
    """

    id: int
    email: str
    role: str
    session_id: str
    confirmed: bool = True

    # Flask-Login's protocol.
    is_authenticated = is_active = True
    is_anonymous = False

    @property
    def is_admin(self) -> bool:
        return self.role == "admin"

    def get_id(self) -> str:
        return f"{self.id}:{self.session_id}"


def begin(person: Staff) -> SignedIn:
    """Add a session of this person to the transaction; the caller commits."""
    session_id = secrets.token_hex(16)
    db.session.execute(
        delete(StaffSession).where(
            StaffSession.staff_id == person.id, StaffSession.created_at < func.now() - LONGEST
        )
    )
    db.session.add(StaffSession(id=session_id, staff_id=person.id, session_key=person.session_key))
    return SignedIn(person.id, person.email, person.role, session_id)


def renew(person: Staff) -> SignedIn:
    """Begin a session of somebody who has just proved who they are, and commit."""
    signed_in = begin(person)
    db.session.commit()
    return signed_in


def end(person: SignedIn, actor: Actor) -> None:
    """End this session, for whoever kept its cookie too.

    Raises Unavailable before anything is changed.
    """
    with revoking(person.session_id):
        db.session.execute(delete(StaffSession).where(StaffSession.id == person.session_id))
        record(actor, "session.end", f"staff {person.email}")
        db.session.commit()


def find(text: str) -> SignedIn | None:
    """Return whose session this is (`SignedIn.get_id`), None when it has ended.

    Raises SQLAlchemyError when nobody can tell.
    """
    staff_id, _, session_id = text.partition(":")
    if not staff_id.isdigit() or not session_id:
        return None
    try:
        found = db.session.execute(
            select(Staff.email, Staff.role, _clock())
            .join(StaffSession, StaffSession.staff_id == Staff.id)
            .where(
                StaffSession.id == session_id,
                StaffSession.staff_id == int(staff_id),
                # A process of an older version changes this key alone.
                StaffSession.session_key == Staff.session_key,
                StaffSession.created_at > func.now() - LONGEST,
                Staff.active,
            )
        ).one_or_none()
    except SQLAlchemyError as error:
        db.session.rollback()
        person = _on_record(int(staff_id), session_id)
        if person is None:
            raise
        log.warning("PostgreSQL can't confirm a session, Redis does: %s", error)
        return person
    if found is None:
        return None
    person = SignedIn(int(staff_id), found.email, found.role, session_id)
    _confirm(person, found.clock)
    return person


def _clock() -> Label[int]:
    """PostgreSQL's clock in ms, before the statement sees what others have committed."""
    return func.floor(func.extract("epoch", func.statement_timestamp()) * 1000).label("clock")


_confirmed: dict[tuple[str, str], float] = {}


def _confirm(person: SignedIn, clock: int) -> None:
    """Let Redis remember that PostgreSQL knows this session; without Redis it does not."""
    now, known = time.monotonic(), (person.session_id, person.role)
    if now < _confirmed.get(known, 0.0):
        return
    words = {"id": person.id, "email": person.email, "role": person.role, "at": int(clock)}
    try:
        stock.jobs_client.set(
            StaffKeys.session(person.session_id), json.dumps(words), ex=RECORD_SECONDS
        )
    except redis.RedisError as error:
        log.info("Redis can't remember a session: %s", error)
        return
    if len(_confirmed) >= MOST_REMEMBERED:
        _confirmed.clear()
    _confirmed[known] = now + CONFIRM_EVERY_SECONDS


def _on_record(staff_id: int, session_id: str) -> SignedIn | None:
    """Return whom Redis knows by this session, unless that is older than what was revoked."""
    try:
        text, *bars = stock.jobs_client.mget(
            StaffKeys.session(session_id), StaffKeys.bar(session_id), StaffKeys.bar(staff_id)
        )
    except redis.RedisError:
        return None
    words = json.loads(text) if text else None
    if not words or words["id"] != staff_id or any(words["at"] <= float(bar or 0) for bar in bars):
        return None
    return SignedIn(staff_id, words["email"], words["role"], session_id, confirmed=False)


@contextmanager
def revoking(subject: int | str) -> Iterator[None]:
    """Make a change (committed inside) after which no older record of Redis lets anybody in.

    `subject` is a person's id, or one session's. Instead of finding and deleting records, which a
    request that has read PostgreSQL just before could write again, those confirmed before the
    change are barred. Raises Unavailable before anything is changed. Should the outcome of the
    commit be unknown, they stay barred: PostgreSQL alone decides then, as it does at any other
    time.
    """
    key = StaffKeys.bar(subject)
    try:
        stock.jobs_client.set(key, UNTIL_COMMITTED, ex=RECORD_SECONDS)
    except redis.RedisError as error:
        raise Unavailable(str(error)) from error
    yield
    try:
        after = db.session.scalars(select(_clock())).one()
        db.session.rollback()
        stock.jobs_client.set(key, int(after), ex=RECORD_SECONDS)
    except (SQLAlchemyError, redis.RedisError) as error:
        log.warning("%s stays barred from signing in without PostgreSQL: %s", subject, error)
