"""Which sale this is: its name on record in PostgreSQL, and what a Redis holds beside that.

The name is a generation: it changes with every reset and rebuild, and Redis has it only while the
sale in it may be sold from.
"""

from enum import Enum

from sqlalchemy import select

from .extensions import db
from .models import Sale


class Held(Enum):
    """What Redis holds."""

    NOTHING = "no sale, or one that is being rebuilt"
    ANOTHER = "a sale that is not the one on record"
    THIS = "the sale on record"
    UNCOMPARED = "a sale, and PostgreSQL can't tell whether it is this one"


def on_record() -> str:
    """Return the name of the sale that Redis should hold, "" before the first one."""
    return db.session.scalar(select(Sale.generation)) or ""


def held(generation: str | None, expected: str | None) -> Held:
    """Compare the name in Redis, empty where there is none, with the one on record.

    `expected` is None where PostgreSQL can't tell.
    """
    if not generation:
        return Held.NOTHING
    if expected is None:
        return Held.UNCOMPARED
    return Held.THIS if generation == expected else Held.ANOTHER
