"""Products as shops have them: a sku, who sees them, the archive, and what they were called.

The products are few, and every default is a constant: no row is rewritten, and processes of before
go on beside it. What a product was called until when is kept by a trigger, so that an old process
keeps it, too; what was renamed before is taken from the audit. Every step can be repeated.
"""

from alembic import op
from online import add_check, add_index, lock_briefly

revision = "0010_shop"
down_revision = "0009_bulk_cancels"
branch_labels = None
depends_on = None

COLUMNS = """
ALTER TABLE products
    ADD COLUMN IF NOT EXISTS sku text,
    ADD COLUMN IF NOT EXISTS visibility varchar(8) NOT NULL DEFAULT 'listed',
    ADD COLUMN IF NOT EXISTS archived boolean NOT NULL DEFAULT false,
    -- Empty where nobody has said whether the amounts are in the currency's own minor unit.
    ADD COLUMN IF NOT EXISTS minor_units boolean
"""
NAMES = """
CREATE TABLE IF NOT EXISTS product_names (
    product_id bigint NOT NULL
        CONSTRAINT fk_product_names_product_id REFERENCES products (id) ON DELETE CASCADE,
    until timestamptz NOT NULL,
    name text NOT NULL,
    CONSTRAINT pk_product_names PRIMARY KEY (product_id, until)
)
"""
KEEP_NAME = """
CREATE OR REPLACE FUNCTION keep_product_name() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO product_names (product_id, until, name)
    VALUES (OLD.id, clock_timestamp(), OLD.name)
    ON CONFLICT (product_id, until) DO NOTHING;
    RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS keep_product_name ON products;
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
    with op.get_context().autocommit_block():
        lock_briefly(COLUMNS)
        add_check("products", "ck_products_visibility", "visibility in ('draft', 'hidden', 'listed')")
        add_check("products", "ck_products_sku", "length(sku) between 1 and 64")
        add_index("uq_products_sku", "products (sku)")
        lock_briefly(NAMES)
        lock_briefly(KEEP_NAME)
        op.execute(NAMES_IN_THE_AUDIT)


def downgrade():
    op.execute("DROP TRIGGER keep_product_name ON products; DROP FUNCTION keep_product_name")
    op.drop_table("product_names")
    op.drop_index("uq_products_sku", "products")
    for column in ("minor_units", "archived", "visibility", "sku"):
        op.drop_column("products", column)
