"""Indexes for finding orders: dead letters by order id, orders by Idempotency-Key alone.

They are made CONCURRENTLY: who stores and cancels goes on meanwhile.
"""

from alembic import op
from online import add_index

revision = "0006_pages"
down_revision = "0005_products"
branch_labels = None
depends_on = None


def upgrade():
    with op.get_context().autocommit_block():
        add_index("ix_dead_letters_order_id", "dead_letters (order_id)")
        add_index(
            "ix_orders_idempotency_key",
            "orders USING hash (idempotency_key) WHERE idempotency_key IS NOT NULL",
        )


def downgrade():
    op.drop_index("ix_orders_idempotency_key", "orders")
    op.drop_index("ix_dead_letters_order_id", "dead_letters")
