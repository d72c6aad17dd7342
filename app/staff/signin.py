"""Signing in with an address and a password."""

from datetime import UTC, datetime

import limits

from ..audit import NOBODY, Actor, record
from ..extensions import db, limiter
from ..models import Staff
from . import guesses, people, sessions

# Failed sign-ins that the audit tells, so that a flood of them fills neither it nor its pages.
AUDITED_FAILURES = limits.parse("100/hour")


def sign_in(
    email: str, password: str, address: str, devices: dict[int, str]
) -> sessions.SignedIn | None:
    """Return the session that begins, None when address and password don't match.

    `devices` are the browser's names by the people (ids) who have signed in with it. Raises
    TooManyGuesses.
    """
    person = people.find(email)
    device = devices.get(person.id) if person else None
    counted_as = guesses.whose(person, device, address)
    guess = guesses.Guess(person, email, counted_as, address)
    if not people.is_password_of(person, password) or person is None:
        _note_failure(person, address)
        return None
    guess.take_back()
    guesses.know(person, address)
    person.last_sign_in_at = datetime.now(UTC)
    signed_in = sessions.begin(person)
    record(Actor(f"staff {person.email}", address), "session.begin", f"staff {person.email}")
    db.session.commit()
    return signed_in


def confirm_password(signed_in: sessions.SignedIn, password: str, address: str) -> Staff | None:
    """Return the person if it is their password; wrong ones count for this session alone.

    Raises TooManyGuesses.
    """
    person = people.get(signed_in.id)
    counted_as = f"device session {signed_in.session_id}"
    guess = guesses.Guess(person, signed_in.email, counted_as, address)
    if not people.is_password_of(person, password):
        return None
    guess.take_back()
    return person


def _note_failure(person: Staff | None, address: str) -> None:
    counted = AUDITED_FAILURES, "limits", "audit", "failures"
    if not limiter.limiter.hit(*counted):
        return
    last = limiter.limiter.get_window_stats(*counted).remaining == 0
    # What was entered for an unknown address may be anything, a password too.
    target = f"staff {person.email}" if person else "staff unknown"
    after = {"note": "further ones of this hour are not listed"} if last else None
    record(Actor(NOBODY.name, address), "session.refuse", target, after=after)
    db.session.commit()
