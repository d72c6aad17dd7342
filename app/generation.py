"""Which sale this is: its name on record in PostgreSQL, and what a Redis holds beside that.

The name is a generation: it changes with every reset and rebuild, and Redis has it only while the
sale in it may be sold from.
"""

from enum import Enum

from sqlalchemy import select, text

from .extensions import db, stock
from .locks import SALE_LOCK
from .models import Sale


class Held(Enum):
    """What Redis holds."""

    NOTHING = "no sale, or one that is being rebuilt"
    ANOTHER = "a sale that is not the one on record"
    THIS = "the sale on record"
    UNCOMPARED = "a sale, and PostgreSQL can't tell whether it is this one"


def on_record() -> str:
    """Return the name of the sale that Redis should hold, "" before the first one."""
    found = db.session.execute(select(Sale.generation, Sale.shards)).one_or_none()
    return _name(*found) if found else ""


def keep_on_record() -> str:
    """Do as on_record, and let nobody replace that sale before this transaction ends.

    Best a transaction's first statement: see locks.py.
    """
    db.session.execute(text(f"SELECT pg_advisory_xact_lock_shared({SALE_LOCK})"))
    return on_record()


def _name(generation: str, shards: int) -> str:
    """Return a sale's name; no Redis has that of one which this process would deal otherwise."""
    if shards == len(stock.shards):
        return generation
    return f"{generation} in {shards} shards, which SHARDS must say"


ISSUED = text("""
    SELECT generation, shards, number, greatest(
      CASE WHEN shards = 1 THEN sale.last_order_id
           ELSE (SELECT last_order_id FROM sale_shards s WHERE s.shard = number) END,
      -- One from before this dealing was another shard's.
      (SELECT CASE WHEN b.last_order_id >= sale.first_order_id THEN b.last_order_id END
       FROM batches b WHERE b.shard = number ORDER BY id DESC LIMIT 1))
    FROM sale, generate_series(0, shards - 1) AS number ORDER BY number
""")


def issued() -> tuple[str, list[int]]:
    """Return the sale's name, and the highest order id that each shard is known to have issued."""
    rows = db.session.execute(ISSUED).all()
    db.session.rollback()
    if not rows:
        return "", [0] * len(stock.shards)
    name = _name(rows[0].generation, rows[0].shards)
    return name, [last or 0 for *_, last in rows] if name == rows[0].generation else []


def held(generation: str | None, expected: str | None) -> Held:
    """Compare the name in Redis, empty where there is none, with the one on record.

    `expected` is None where PostgreSQL can't tell.
    """
    if not generation:
        return Held.NOTHING
    if expected is None:
        return Held.UNCOMPARED
    return Held.THIS if generation == expected else Held.ANOTHER
