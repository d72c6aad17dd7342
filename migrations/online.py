"""Steps of a migration beside a sale that goes on. Each is a transaction of its own."""

import logging
import time

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.exc import OperationalError

log = logging.getLogger("alembic.runtime.migration")

# A lock was not to be had in time; a deadlock.
IN_USE = ("55P03", "40P01")
# Two or three minutes of tries; who still holds the table then is no transaction of ours.
ATTEMPTS = 150
PAUSE_SECONDS = 0.5
# Who needs two tables waits for the second one with the first one in hand. That is over before
# PostgreSQL looks for deadlocks (deadlock_timeout, 1 s), so that nobody else is ended for it.
LOCK_MILLISECONDS = 400


def lock_briefly(statement: str) -> None:
    """Run what locks tables, which everybody waits for: not for longer than a second at a time."""
    for attempt in range(1, ATTEMPTS + 1):
        op.execute(f"SET lock_timeout = '{LOCK_MILLISECONDS}ms'")
        try:
            op.execute(statement)
            return
        except OperationalError as error:
            if getattr(error.orig, "pgcode", "") not in IN_USE or attempt == ATTEMPTS:
                raise
            log.warning("%s…: in use, try %d of %d", statement[:40], attempt, ATTEMPTS)
            time.sleep(PAUSE_SECONDS)
        finally:
            op.execute("RESET lock_timeout")


def add_check(table: str, name: str, condition: str) -> None:
    """Put a check in force for new rows at once, and for the others while writers go on."""
    lock_briefly(
        f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name},"
        f" ADD CONSTRAINT {name} CHECK ({condition}) NOT VALID"
    )
    op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def add_index(name: str, definition: str) -> None:
    """Build an index while writers go on; one that a killed try left unfinished is made anew."""
    unfinished = sa.text(
        "SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass(:name)"
        " AND NOT indisvalid)"
    )
    if not context.is_offline_mode() and op.get_bind().scalar(unfinished, {"name": name}):
        op.execute(f"DROP INDEX CONCURRENTLY {name}")
    unique = "UNIQUE " if name.startswith("uq_") else ""
    op.execute(f"CREATE {unique}INDEX CONCURRENTLY IF NOT EXISTS {name} ON {definition}")
