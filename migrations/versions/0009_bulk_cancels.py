"""What a token may do, and cancelling many orders at once. Processes of 0.1.0 go on beside it."""

import sqlalchemy as sa
from alembic import op
from online import lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0009_bulk_cancels"
down_revision = "0008_order_states"
branch_labels = None
depends_on = None

FORMER_TOTALS = """
CREATE PROCEDURE add_order_totals(product bigint, status text, n bigint, units bigint)
LANGUAGE sql AS $$
  UPDATE product_totals SET
    confirmed_orders = confirmed_orders + CASE WHEN status = 'CONFIRMED' THEN n ELSE 0 END,
    confirmed_units = confirmed_units + CASE WHEN status = 'CONFIRMED' THEN units ELSE 0 END,
    cancelled_orders = cancelled_orders + CASE WHEN status = 'CANCELLED' THEN n ELSE 0 END,
    cancelled_units = cancelled_units + CASE WHEN status = 'CANCELLED' THEN units ELSE 0 END
  WHERE product_id = product
$$
"""


def upgrade():
    moment = postgresql.TIMESTAMP(timezone=True)
    with op.get_context().autocommit_block():
        # Tokens of 0.1.0, and those that its processes still make, may do everything.
        lock_briefly(
            "ALTER TABLE api_tokens ADD COLUMN IF NOT EXISTS scopes text NOT NULL DEFAULT '*'"
        )
        op.create_table(
            "bulk_cancels",
            sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
            sa.Column("product_id", sa.BigInteger(), nullable=False),
            sa.Column("user_text", sa.Text()),
            sa.Column("reference", sa.Text()),
            sa.Column("since", moment),
            sa.Column("until", moment),
            sa.Column("through_order_id", sa.BigInteger(), nullable=False),
            sa.Column("orders", sa.BigInteger(), nullable=False),
            sa.Column("reason", sa.Text(), nullable=False),
            sa.Column("actor", sa.Text(), nullable=False),
            sa.Column("address", sa.Text()),
            sa.Column("last_order_id", sa.BigInteger(), server_default="0", nullable=False),
            sa.Column("cancelled_orders", sa.BigInteger(), server_default="0", nullable=False),
            sa.Column("cancelled_units", sa.BigInteger(), server_default="0", nullable=False),
            sa.Column("created_at", moment, server_default=sa.text("now()"), nullable=False),
            sa.Column("stopped_at", moment),
            sa.Column("stopped_by", sa.Text()),
            sa.Column("finished_at", moment),
            sa.PrimaryKeyConstraint("id", name="pk_bulk_cancels"),
            sa.ForeignKeyConstraint(
                ["product_id"], ["products.id"], name="fk_bulk_cancels_product_id"
            ),
            if_not_exists=True,
        )
        op.create_index(
            "ix_bulk_cancels_open",
            "bulk_cancels",
            ["id"],
            postgresql_where=sa.text("finished_at is null"),
            if_not_exists=True,
        )
        # Nothing calls it since the sums of orders know every status.
        op.execute("DROP PROCEDURE IF EXISTS add_order_totals(bigint, text, bigint, bigint)")


def downgrade():
    op.execute(FORMER_TOTALS)
    op.drop_table("bulk_cancels")
    op.drop_column("api_tokens", "scopes")
