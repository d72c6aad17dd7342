"""Products as shops have them: a sku, who sees them, the archive, and what they were called.

The products are few, and every default is a constant: no row is rewritten, and processes of before
go on beside it. What a product was called until when is kept by a trigger, so that an old process
keeps it, too; what was renamed before is taken from the audit.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008_shop"
down_revision = "0011_bulk_cancels"
branch_labels = None
depends_on = None

KEEP_NAME = """
CREATE FUNCTION keep_product_name() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO product_names (product_id, until, name)
    VALUES (OLD.id, clock_timestamp(), OLD.name)
    ON CONFLICT (product_id, until) DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER keep_product_name AFTER UPDATE OF name ON products FOR EACH ROW
    WHEN (OLD.name IS DISTINCT FROM NEW.name) EXECUTE FUNCTION keep_product_name();
"""
# A reset begins the products' ids anew; the audit keeps what was before it.
NAMES_IN_THE_AUDIT = """
INSERT INTO product_names (product_id, until, name)
SELECT p.id, a.at, a.before ->> 'name'
FROM audit_log a JOIN products p ON a.target = 'product ' || p.id AND a.at >= p.created_at
WHERE a.action = 'product.change' AND a.before ? 'name'
ON CONFLICT (product_id, until) DO NOTHING
"""


def upgrade():
    # Whoever waits for the table makes everybody else wait behind it.
    op.execute("SET LOCAL lock_timeout = '5s'")
    op.add_column("products", sa.Column("sku", sa.Text()))
    op.add_column(
        "products", sa.Column("visibility", sa.String(8), server_default="listed", nullable=False)
    )
    op.add_column(
        "products",
        sa.Column("archived", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )
    # Empty where nobody has said whether the amounts are in the currency's own minor unit.
    op.add_column("products", sa.Column("minor_units", sa.Boolean()))
    op.create_check_constraint(
        op.f("ck_products_visibility"), "products", "visibility in ('draft', 'hidden', 'listed')"
    )
    op.create_check_constraint(op.f("ck_products_sku"), "products", "length(sku) between 1 and 64")
    op.create_index(op.f("uq_products_sku"), "products", ["sku"], unique=True)
    op.create_table(
        "product_names",
        sa.Column(
            "product_id",
            sa.BigInteger(),
            sa.ForeignKey(
                "products.id", name=op.f("fk_product_names_product_id"), ondelete="CASCADE"
            ),
            nullable=False,
        ),
        sa.Column("until", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("product_id", "until", name=op.f("pk_product_names")),
    )
    op.execute(KEEP_NAME)
    op.execute(NAMES_IN_THE_AUDIT)


def downgrade():
    op.execute("DROP TRIGGER keep_product_name ON products; DROP FUNCTION keep_product_name")
    op.drop_table("product_names")
    op.drop_index(op.f("uq_products_sku"), "products")
    for column in ("minor_units", "archived", "visibility", "sku"):
        op.drop_column("products", column)
