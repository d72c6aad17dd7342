"""Who changed what: one row per change, in the same transaction as the change itself."""

from typing import NamedTuple

from .extensions import db
from .models import AuditEntry


class Actor(NamedTuple):
    """Who acts: a name like "staff admin@example.com" or "token 3 checkout", and from where."""

    name: str
    address: str | None = None


SYSTEM = Actor("system")
CLI = Actor("command line")
# Who is not known, such as somebody with a wrong password.
NOBODY = Actor("nobody")


def record(
    actor: Actor, action: str, target: str, before: dict | None = None, after: dict | None = None
) -> None:
    """Add the entry to the current transaction; the caller commits both together."""
    db.session.add(
        AuditEntry(
            actor=actor.name,
            address=actor.address,
            action=action,
            target=target,
            before=before,
            after=after,
        )
    )
