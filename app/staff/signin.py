"""Signing in with an address and a password."""

from datetime import UTC, datetime

from ..extensions import db
from . import people, sessions


def sign_in(email: str, password: str) -> sessions.SignedIn | None:
    """Return the session that begins, None when address and password don't match."""
    person = people.find(email)
    if not people.is_password_of(person, password):
        return None
    person.last_sign_in_at = datetime.now(UTC)
    signed_in = sessions.begin(person)
    db.session.commit()
    return signed_in
