"""The window that an ended sale was planned with, and the keys of requests that create something."""

import sqlalchemy as sa
from alembic import op
from online import add_index, lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0005_products"
down_revision = "0004_staff"
branch_labels = None
depends_on = None


def upgrade():
    moment = postgresql.TIMESTAMP(timezone=True)
    with op.get_context().autocommit_block():
        # Without a default: no row is rewritten, and processes of 0.1.0 go on beside it.
        lock_briefly(
            "ALTER TABLE products ADD COLUMN IF NOT EXISTS planned_opens_at timestamptz,"
            " ADD COLUMN IF NOT EXISTS planned_closes_at timestamptz"
        )
        op.create_table(
            "request_keys",
            sa.Column("route", sa.Text(), nullable=False),
            sa.Column("resource", sa.Text(), nullable=False),
            sa.Column("key", sa.String(255), nullable=False),
            sa.Column("fingerprint", sa.String(64), nullable=False),
            sa.Column("answer", sa.JSON()),
            sa.Column("created_at", moment, server_default=sa.text("now()"), nullable=False),
            sa.PrimaryKeyConstraint("route", "resource", "key"),
            if_not_exists=True,
        )
        add_index("ix_request_keys_created_at", "request_keys (created_at)")


def downgrade():
    op.drop_table("request_keys")
    op.drop_column("products", "planned_closes_at")
    op.drop_column("products", "planned_opens_at")
