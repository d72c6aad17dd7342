"""The feed: events that wait for a number, numbered ones by day, and batches that are events.

Orders that are stored already are no events; the feed begins with what happens from here on. No
row is rewritten, and a system of 0.1.0 goes on storing beside it: its batches are numbered too.
Each step can be repeated.
"""

import sqlalchemy as sa
from alembic import op
from online import add_index, lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0011_events"
down_revision = "0010_shop"
branch_labels = None
depends_on = None


def upgrade():
    moment = postgresql.TIMESTAMP(timezone=True)
    with op.get_context().autocommit_block():
        # Batches from before are told by the 0; from here on there is no default.
        lock_briefly(
            "ALTER TABLE batches ADD COLUMN IF NOT EXISTS event_number bigint DEFAULT 0;"
            " ALTER TABLE batches ALTER COLUMN event_number DROP DEFAULT"
        )
        add_index("ix_batches_unnumbered", "batches (id) WHERE event_number IS NULL")
        op.create_table(
            "new_events",
            sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
            sa.Column("at", moment, server_default=sa.text("clock_timestamp()"), nullable=False),
            sa.Column("type", sa.Text(), nullable=False),
            sa.Column("order_id", sa.BigInteger()),
            sa.Column("sequence", sa.Integer()),
            sa.Column("body", sa.JSON(), nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_new_events"),
            if_not_exists=True,
        )
        op.create_table(
            "events",
            sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
            sa.Column("day", sa.Date(), nullable=False),
            sa.Column("count", sa.Integer(), nullable=False),
            sa.Column("at", moment, nullable=False),
            sa.Column("type", sa.Text(), nullable=False),
            sa.Column("order_id", sa.BigInteger()),
            sa.Column("sequence", sa.Integer()),
            sa.Column("batch_id", sa.BigInteger()),
            sa.Column("first_order_id", sa.BigInteger()),
            sa.Column("last_order_id", sa.BigInteger()),
            sa.Column("body", sa.JSON()),
            sa.PrimaryKeyConstraint("number", "day", name="pk_events"),
            postgresql_partition_by="RANGE (day)",
            if_not_exists=True,
        )
        op.execute(
            "CREATE INDEX IF NOT EXISTS ix_events_order_id ON events (order_id)"
            " WHERE order_id IS NOT NULL"
        )
        op.create_table(
            "feed",
            sa.Column("id", sa.Integer(), server_default="1", nullable=False),
            sa.Column("head", sa.BigInteger(), server_default="0", nullable=False),
            sa.Column("floor", sa.BigInteger(), server_default="0", nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_feed"),
            sa.CheckConstraint("id = 1", name="one_row"),
            if_not_exists=True,
        )
        op.execute("INSERT INTO feed DEFAULT VALUES ON CONFLICT DO NOTHING")
        op.create_table(
            "sold_out",
            sa.Column("product_id", sa.BigInteger(), nullable=False),
            sa.Column("at", moment, server_default=sa.text("now()"), nullable=False),
            sa.PrimaryKeyConstraint("product_id", name="pk_sold_out"),
            sa.ForeignKeyConstraint(
                ["product_id"], ["products.id"], name="fk_sold_out_product_id", ondelete="CASCADE"
            ),
            if_not_exists=True,
        )


def downgrade():
    for table in ("sold_out", "feed", "events", "new_events"):
        op.drop_table(table)
    op.drop_index("ix_batches_unnumbered", "batches")
    op.drop_column("batches", "event_number")
