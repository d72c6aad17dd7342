"""Who changed what: one row per change, in the same transaction as the change itself."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, SQLColumnExpression, func, select, text

from .extensions import db
from .models import ApiToken, AuditEntry, Product, Staff

# Every action that is recorded somewhere; a test reads the calls.
ACTIONS = (
    "product.create", "product.change", "product.import", "product.currency", "product.restock",
    "product.correct", "movement.refused",
    "order.cancel", "order.release", "order.confirm", "order.extend", "order.reclaim",
    "order.bulk-cancel",
    "order.bulk-cancel.stop", "order.bulk-cancel.done", "dead-letter.replay",
    "dead-letter.abandon", "ledger.repair",
    "sale.reset", "sale.rebuild.start", "sale.rebuild", "sale.rebuild.done",
    "sale.rebuild.failed",
    "session.begin", "session.refuse", "session.end",
    "staff.create", "staff.activate", "staff.deactivate", "staff.role", "staff.password",
    "token.create", "token.revoke", "sale.brake", "sale.release",
    "webhook.create", "webhook.change", "webhook.on", "webhook.off", "webhook.remove",
    "webhook.rotate", "webhook.test", "webhook.redeliver",
)  # fmt: skip
# A step of a long export: few statements, and little memory.
EXPORT_ENTRIES = 2000
# A time is nearly an id, so that old entries need no walk from the newest. So many more are looked
# at on either side, and judged by their own time: an entry has the time at which its transaction
# began.
ID_MARGIN = 2000
# Products, people or tokens whose name holds a text; a shorter text than that finds enough.
MOST_NAMED = 200


class Actor(NamedTuple):
    """Who acts: a name like "staff admin@example.com" or "token 3 checkout", and from where."""

    name: str
    address: str | None = None


SYSTEM = Actor("system")
CLI = Actor("command line")
# Who is not known, such as somebody with a wrong password.
NOBODY = Actor("nobody")


def record(
    actor: Actor,
    action: str,
    target: str,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
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


@dataclass(frozen=True)
class Filter:
    """What is looked for in the audit; None where everything will do."""

    # A part of the name: "sue@example.com", "token 3", "checkout".
    actor: str | None = None
    action: str | None = None
    # A target as it is written ("product 5", in any case), a number, or a part of a name.
    target: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def find(wanted: Filter, before: int | None = None, limit: int = 50) -> list[AuditEntry]:
    """Return the newest entries of the filter, below the id `before` if given.

    Names are looked up first, and then entries by their index: no text of a million entries is
    read.
    """
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if wanted.actor:
        query = query.where(AuditEntry.actor.in_(_actors(wanted.actor)))
    if wanted.action:
        query = query.where(AuditEntry.action == wanted.action)
    if wanted.target:
        query = query.where(AuditEntry.target.in_(_targets(wanted.target)))
    if wanted.since:
        first = _id_at(AuditEntry.at >= wanted.since, AuditEntry.at)
        query = query.where(AuditEntry.at >= wanted.since, AuditEntry.id >= first - ID_MARGIN)
    if wanted.until:
        last = _id_at(AuditEntry.at < wanted.until, AuditEntry.at.desc())
        query = query.where(AuditEntry.at < wanted.until, AuditEntry.id <= last + ID_MARGIN)
    if before:
        query = query.where(AuditEntry.id < before)
    return list(db.session.scalars(query))


def _id_at(side: ColumnElement[bool], order: SQLColumnExpression[datetime]) -> int:
    """Return the entry's id nearest to a moment on one side of it, 0 where there is none."""
    return db.session.scalar(select(AuditEntry.id).where(side).order_by(order).limit(1)) or 0


def export(wanted: Filter) -> Iterator[AuditEntry]:
    """Return every entry of the filter, newest first, holding one step of them at a time."""
    before = None
    while page := find(wanted, before, EXPORT_ENTRIES):
        # A slow reader must not hold a connection, nor a transaction open.
        db.session.expunge_all()
        db.session.remove()
        yield from page
        before = page[-1].id


# Each different actor is one look into the index (a "loose index scan").
_DIFFERENT_ACTORS = text(
    "WITH RECURSIVE names AS ("
    " (SELECT actor FROM audit_log ORDER BY actor LIMIT 1) UNION ALL"
    " SELECT (SELECT a.actor FROM audit_log a WHERE a.actor > n.actor ORDER BY a.actor LIMIT 1)"
    " FROM names n WHERE n.actor IS NOT NULL)"
    " SELECT actor FROM names WHERE strpos(lower(actor), lower(:part)) > 0"
)


def _actors(part: str) -> list[str]:
    """Return the actors whose name has this part; that of exactly this name alone, if there is."""
    found = list(db.session.scalars(_DIFFERENT_ACTORS, {"part": part}))
    return [name for name in found if name.lower() == part.lower()] or found


def _targets(wanted: str) -> set[str]:
    """Return the targets that may be meant by this."""
    wanted = wanted.strip().lower()
    if match := re.fullmatch(r"#?(\d{1,16})", wanted, re.ASCII):
        kinds = ("product", "order", "dead letter", "token")
        return {f"{kind} {int(match[1])}" for kind in kinds}
    found = {re.sub(r" #?(?=\d+$)", " ", wanted)}
    for column, target in (
        (Product.name, func.concat("product ", Product.id)),
        (Staff.email, func.concat("staff ", Staff.email)),
        (ApiToken.name, func.concat("token ", ApiToken.id)),
    ):
        named = func.strpos(func.lower(column), wanted) > 0
        found.update(db.session.scalars(select(target).where(named).limit(MOST_NAMED)))
    return found
