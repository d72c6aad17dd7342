"""Indexes for finding orders: dead letters by order id, orders by Idempotency-Key alone.

They are made in place, some ten seconds for a million orders with keys: drains and cancellations wait for
it, purchases do not. (CONCURRENTLY would wait for a second `flask prepare`, and that one for this.)
"""

from alembic import op
from sqlalchemy import text

revision = "0006_pages"
down_revision = "0005_products"
branch_labels = None
depends_on = None


def upgrade():
    op.create_index("ix_dead_letters_order_id", "dead_letters", ["order_id"])
    op.create_index(
        "ix_orders_idempotency_key",
        "orders",
        ["idempotency_key"],
        postgresql_using="hash",
        postgresql_where=text("idempotency_key is not null"),
    )


def downgrade():
    op.drop_index("ix_orders_idempotency_key", "orders")
    op.drop_index("ix_dead_letters_order_id", "dead_letters")
