"""One event for all orders that a movement ended: as many events as it has orders, once numbered.

Columns without a default to be written, or with a constant one: no row is rewritten, and a worker
of an earlier version stores, numbers and expires beside it.
"""

from alembic import op
from online import lock_briefly

revision = "0015_ended_together"
down_revision = "0014_shards"
branch_labels = None
depends_on = None


def upgrade():
    with op.get_context().autocommit_block():
        lock_briefly(
            "ALTER TABLE new_events ADD COLUMN IF NOT EXISTS count integer NOT NULL DEFAULT 1,"
            " ADD COLUMN IF NOT EXISTS movement_id bigint,"
            " ALTER COLUMN body DROP NOT NULL"
        )
        lock_briefly("ALTER TABLE events ADD COLUMN IF NOT EXISTS movement_id bigint")


def downgrade():
    """Refused while events are kept that an earlier version can't tell."""
    for table in ("new_events", "events"):
        op.execute(
            f"DO $$ BEGIN IF EXISTS (SELECT FROM {table} WHERE movement_id IS NOT NULL) THEN"
            " RAISE EXCEPTION 'there are events of holds that ended together'; END IF; END $$"
        )
    op.drop_column("events", "movement_id")
    op.alter_column("new_events", "body", nullable=False)
    op.drop_column("new_events", "movement_id")
    op.drop_column("new_events", "count")
