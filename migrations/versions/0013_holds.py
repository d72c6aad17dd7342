"""Orders that are held until they are paid for: their length, their extension, their common end.

Columns without defaults, checks that are validated after they are in force, indexes CONCURRENTLY:
a system of an earlier version sells on beside it.
"""

from alembic import op
from online import add_check, add_index, lock_briefly

revision = "0013_holds"
down_revision = "0012_webhooks"
branch_labels = None
depends_on = None

COLUMNS = [
    "products ADD COLUMN IF NOT EXISTS hold_seconds integer",
    "orders ADD COLUMN IF NOT EXISTS extended_from timestamptz",
    "stock_movements ADD COLUMN IF NOT EXISTS order_ids bigint[]",
    "sale ADD COLUMN IF NOT EXISTS swept_at timestamptz,"
    " ADD COLUMN IF NOT EXISTS expiry_from timestamptz",
]
CHECKS = [
    ("products", "ck_products_hold_seconds", "hold_seconds BETWEEN 30 AND 86400"),
    (
        "order_intents",
        "ck_order_intents_act",
        "act IN ('cancel', 'confirm', 'release', 'extend')",
    ),
]
INDEXES = [
    (
        "uq_stock_movements_open_reclaim",
        "stock_movements (order_id) WHERE kind = 'reclaim' AND applied_at IS NULL",
    ),
    ("ix_stock_movements_expired", "stock_movements (created_at) WHERE order_ids IS NOT NULL"),
]


def upgrade():
    with op.get_context().autocommit_block():
        for columns in COLUMNS:
            lock_briefly(f"ALTER TABLE {columns}")
        for check in CHECKS:
            add_check(*check)
        for index in INDEXES:
            add_index(*index)


def downgrade():
    for name, _ in INDEXES:
        op.execute(f"DROP INDEX {name}")
    op.execute("DELETE FROM order_intents WHERE act = 'extend'")
    op.execute(
        "ALTER TABLE order_intents DROP CONSTRAINT ck_order_intents_act,"
        " ADD CONSTRAINT ck_order_intents_act CHECK (act IN ('cancel', 'confirm', 'release'))"
    )
    op.drop_column("sale", "expiry_from")
    op.drop_column("sale", "swept_at")
    op.drop_column("stock_movements", "order_ids")
    op.drop_column("orders", "extended_from")
    op.drop_column("products", "hold_seconds")
