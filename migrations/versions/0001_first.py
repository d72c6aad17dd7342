"""The first schema: products and their ledger, orders, dead letters, staff, tokens, audit."""

from alembic import op
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


# Sums over orders, dead letters and movements, kept per statement (not per row), so that a batch of
# 2,000 orders costs one update per product in it.
TOTALS = """
CREATE FUNCTION add_product_totals() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO product_totals (product_id) VALUES (new.id);
  RETURN NULL;
END $$;
CREATE TRIGGER totals AFTER INSERT ON products FOR EACH ROW EXECUTE FUNCTION add_product_totals();

CREATE FUNCTION sum_orders() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  change record;
BEGIN
  IF TG_OP <> 'INSERT' THEN
    FOR change IN SELECT product_id, status, count(*) AS n, sum(quantity) AS units
                  FROM old_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(change.product_id, change.status, -change.n, -change.units);
    END LOOP;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    FOR change IN SELECT product_id, status, count(*) AS n, sum(quantity) AS units
                  FROM new_rows GROUP BY 1, 2 ORDER BY 1, 2 LOOP
      CALL add_order_totals(change.product_id, change.status, change.n, change.units);
    END LOOP;
  END IF;
  RETURN NULL;
END $$;
CREATE PROCEDURE add_order_totals(product bigint, status text, n bigint, units bigint)
LANGUAGE sql AS $$
  UPDATE product_totals SET
    confirmed_orders = confirmed_orders + CASE WHEN status = 'CONFIRMED' THEN n ELSE 0 END,
    confirmed_units = confirmed_units + CASE WHEN status = 'CONFIRMED' THEN units ELSE 0 END,
    cancelled_orders = cancelled_orders + CASE WHEN status = 'CANCELLED' THEN n ELSE 0 END,
    cancelled_units = cancelled_units + CASE WHEN status = 'CANCELLED' THEN units ELSE 0 END
  WHERE product_id = product
$$;

CREATE FUNCTION sum_dead_letters() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET dead_orders = dead_orders - n, dead_units = dead_units - units
    FROM (SELECT product_id, count(*) AS n, sum(quantity) AS units FROM old_rows
          WHERE resolution IS NULL GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET dead_orders = dead_orders + n, dead_units = dead_units + units
    FROM (SELECT product_id, count(*) AS n, sum(quantity) AS units FROM new_rows
          WHERE resolution IS NULL GROUP BY 1) c WHERE t.product_id = c.product_id;
  END IF;
  RETURN NULL;
END $$;

CREATE FUNCTION sum_movements() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE product_totals t SET moved_units = moved_units - c.units
    FROM (SELECT product_id, sum(units) AS units FROM old_rows GROUP BY 1) c
    WHERE t.product_id = c.product_id;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    UPDATE product_totals t SET moved_units = moved_units + c.units
    FROM (SELECT product_id, sum(units) AS units FROM new_rows GROUP BY 1) c
    WHERE t.product_id = c.product_id;
  END IF;
  RETURN NULL;
END $$;
"""

TRIGGER = """
CREATE TRIGGER totals_insert AFTER INSERT ON {table} REFERENCING NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER totals_update AFTER UPDATE ON {table}
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
  FOR EACH STATEMENT EXECUTE FUNCTION {function}();
CREATE TRIGGER totals_delete AFTER DELETE ON {table} REFERENCING OLD TABLE AS old_rows
  FOR EACH STATEMENT EXECUTE FUNCTION {function}();
"""

APPEND_ONLY = """
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '% is append-only', TG_TABLE_NAME;
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
  FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
"""


def upgrade():
    op.create_table('api_tokens',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('name', sa.String(length=100), nullable=False),
    sa.Column('token_hash', sa.String(length=64), nullable=False),
    sa.Column('created_by', sa.Text(), nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('last_used_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('revoked_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_api_tokens')),
    sa.UniqueConstraint('token_hash', name=op.f('uq_api_tokens_token_hash'))
    )
    op.create_table('audit_log',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('action', sa.String(length=40), nullable=False),
    sa.Column('target', sa.Text(), nullable=False),
    sa.Column('before', postgresql.JSONB(astext_type=sa.Text()), nullable=True),
    sa.Column('after', postgresql.JSONB(astext_type=sa.Text()), nullable=True),
    sa.Column('address', sa.Text(), nullable=True),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_audit_log'))
    )
    with op.batch_alter_table('audit_log', schema=None) as batch_op:
        batch_op.create_index('ix_audit_log_actor_id', ['actor', 'id'], unique=False)
        batch_op.create_index('ix_audit_log_target_id', ['target', 'id'], unique=False)

    op.create_table('batches',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('job_id', sa.Text(), nullable=False),
    sa.Column('worker', sa.Text(), nullable=False),
    sa.Column('first_order_id', sa.BigInteger(), nullable=False),
    sa.Column('last_order_id', sa.BigInteger(), nullable=False),
    sa.Column('orders', sa.Integer(), nullable=False),
    sa.Column('dead_letters', sa.Integer(), nullable=False),
    sa.Column('persisted_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_batches'))
    )
    op.create_table('dead_letters',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('stream_id', sa.String(length=41), nullable=False),
    sa.Column('payload', sa.Text(), nullable=False),
    sa.Column('error', sa.Text(), nullable=False),
    sa.Column('order_id', sa.BigInteger(), nullable=True),
    sa.Column('user_id', sa.BigInteger(), nullable=True),
    sa.Column('product_id', sa.BigInteger(), nullable=True),
    sa.Column('quantity', sa.BigInteger(), nullable=True),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('resolution', sa.String(length=9), nullable=True),
    sa.Column('resolved_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('resolved_by', sa.Text(), nullable=True),
    sa.Column('resolve_reason', sa.Text(), nullable=True),
    sa.Column('replayed_as', sa.BigInteger(), nullable=True),
    sa.CheckConstraint("resolution in ('replayed', 'abandoned')", name=op.f('ck_dead_letters_resolution')),
    sa.CheckConstraint('(resolution is null) = (resolved_at is null)', name=op.f('ck_dead_letters_resolved')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_dead_letters'))
    )
    with op.batch_alter_table('dead_letters', schema=None) as batch_op:
        batch_op.create_index('ix_dead_letters_open', ['id'], unique=False, postgresql_where=sa.text('resolution is null'))
        batch_op.create_index('ix_dead_letters_user_id_id', ['user_id', 'id'], unique=False)
        batch_op.create_index('uq_dead_letters_entry', ['stream_id', sa.text('md5(payload)')], unique=True)

    op.create_table('products',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('name', sa.Text(), nullable=False),
    sa.Column('price_cents', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('opens_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('closes_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('per_user_limit', sa.Integer(), nullable=True),
    sa.Column('max_quantity', sa.Integer(), server_default='10', nullable=False),
    sa.Column('paused', sa.Boolean(), server_default=sa.text('false'), nullable=False),
    sa.Column('version', sa.BigInteger(), server_default='1', nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("currency ~ '^[A-Z]{3}$'", name=op.f('ck_products_currency')),
    sa.CheckConstraint('length(name) between 1 and 200', name=op.f('ck_products_name')),
    sa.CheckConstraint('max_quantity between 1 and 1000000', name=op.f('ck_products_max_quantity')),
    sa.CheckConstraint('opens_at < closes_at', name=op.f('ck_products_window')),
    sa.CheckConstraint('per_user_limit between 1 and 1000000', name=op.f('ck_products_per_user_limit')),
    sa.CheckConstraint('price_cents between 0 and 9007199254740991', name=op.f('ck_products_price')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_products'))
    )
    op.create_table('sale',
    sa.Column('id', sa.Integer(), server_default='1', nullable=False),
    sa.Column('generation', sa.String(length=32), nullable=False),
    sa.Column('last_order_id', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('sampled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.CheckConstraint('id = 1', name=op.f('ck_sale_one_row')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_sale'))
    )
    op.create_table('staff',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('email', sa.String(length=254), nullable=False),
    sa.Column('password_hash', sa.Text(), nullable=False),
    sa.Column('role', sa.String(length=16), nullable=False),
    sa.Column('active', sa.Boolean(), server_default=sa.text('true'), nullable=False),
    sa.Column('session_key', sa.String(length=32), nullable=False),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('last_sign_in_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.CheckConstraint("role in ('admin', 'support')", name=op.f('ck_staff_role')),
    sa.CheckConstraint('email = lower(email)', name=op.f('ck_staff_email')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_staff')),
    sa.UniqueConstraint('email', name=op.f('uq_staff_email'))
    )
    op.create_table('orders',
    sa.Column('id', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('user_id', sa.BigInteger(), nullable=False),
    sa.Column('product_id', sa.BigInteger(), nullable=False),
    sa.Column('quantity', sa.Integer(), nullable=False),
    sa.Column('unit_price_cents', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('status', sa.String(length=9), server_default='CONFIRMED', nullable=False),
    sa.Column('idempotency_key', sa.String(length=255), nullable=True),
    sa.Column('claimed_at', postgresql.TIMESTAMP(timezone=True), nullable=False),
    sa.Column('persisted_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('batch_id', sa.BigInteger(), nullable=True),
    sa.Column('cancelled_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('cancelled_by', sa.Text(), nullable=True),
    sa.Column('cancel_reason', sa.Text(), nullable=True),
    sa.CheckConstraint("(status = 'CONFIRMED' and cancelled_at is null) or (status = 'CANCELLED' and cancelled_at is not null)", name=op.f('ck_orders_status')),
    sa.CheckConstraint('id > 0', name=op.f('ck_orders_id')),
    sa.CheckConstraint('quantity > 0', name=op.f('ck_orders_quantity')),
    sa.CheckConstraint('unit_price_cents >= 0', name=op.f('ck_orders_unit_price')),
    sa.CheckConstraint('user_id between 1 and 9007199254740991', name=op.f('ck_orders_user_id')),
    sa.ForeignKeyConstraint(['product_id'], ['products.id'], name=op.f('fk_orders_product_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_orders'))
    )
    with op.batch_alter_table('orders', schema=None) as batch_op:
        batch_op.create_index('ix_orders_cancelled', ['id'], unique=False, postgresql_where=sa.text("status = 'CANCELLED'"))
        batch_op.create_index('ix_orders_claimed_at', ['claimed_at'], unique=False)
        batch_op.create_index('ix_orders_product_id_id', ['product_id', 'id'], unique=False)
        batch_op.create_index('ix_orders_user_id_id', ['user_id', 'id'], unique=False)
        batch_op.create_index('uq_orders_user_id_idempotency_key', ['user_id', 'idempotency_key'], unique=True, postgresql_where=sa.text('idempotency_key is not null'))

    op.create_table('product_totals',
    sa.Column('product_id', sa.BigInteger(), nullable=False),
    sa.Column('confirmed_orders', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('confirmed_units', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('cancelled_orders', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('cancelled_units', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('dead_orders', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('dead_units', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('moved_units', sa.BigInteger(), server_default='0', nullable=False),
    sa.ForeignKeyConstraint(['product_id'], ['products.id'], name=op.f('fk_product_totals_product_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('product_id', name=op.f('pk_product_totals'))
    )
    op.create_table('stock_movements',
    sa.Column('id', sa.BigInteger(), sa.Identity(always=False), nullable=False),
    sa.Column('product_id', sa.BigInteger(), nullable=False),
    sa.Column('kind', sa.String(length=16), nullable=False),
    sa.Column('units', sa.BigInteger(), nullable=False),
    sa.Column('reason', sa.Text(), nullable=True),
    sa.Column('actor', sa.Text(), nullable=False),
    sa.Column('user_id', sa.BigInteger(), nullable=True),
    sa.Column('order_id', sa.BigInteger(), nullable=True),
    sa.Column('dead_letter_id', sa.BigInteger(), nullable=True),
    sa.Column('idempotency_key', sa.String(length=255), nullable=True),
    sa.Column('created_at', postgresql.TIMESTAMP(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('applied_at', postgresql.TIMESTAMP(timezone=True), nullable=True),
    sa.Column('stock_after', sa.BigInteger(), nullable=True),
    sa.CheckConstraint("kind in ('initial', 'restock', 'return', 'correction')", name=op.f('ck_stock_movements_kind')),
    sa.CheckConstraint("units > 0 or kind = 'correction' or (kind = 'initial' and units = 0)", name=op.f('ck_stock_movements_units')),
    sa.ForeignKeyConstraint(['product_id'], ['products.id'], name=op.f('fk_stock_movements_product_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_stock_movements'))
    )
    with op.batch_alter_table('stock_movements', schema=None) as batch_op:
        batch_op.create_index('ix_stock_movements_pending', ['id'], unique=False, postgresql_where=sa.text('applied_at is null'))
        batch_op.create_index('ix_stock_movements_product_id_id', ['product_id', 'id'], unique=False)
        batch_op.create_index('uq_stock_movements_dead_letter_id', ['dead_letter_id'], unique=True, postgresql_where=sa.text('dead_letter_id is not null'))
        batch_op.create_index('uq_stock_movements_idempotency_key', ['idempotency_key'], unique=True, postgresql_where=sa.text('idempotency_key is not null'))
        batch_op.create_index('uq_stock_movements_order_id', ['order_id'], unique=True, postgresql_where=sa.text('order_id is not null'))

    op.execute(TOTALS)
    op.execute(TRIGGER.format(table="orders", function="sum_orders"))
    op.execute(TRIGGER.format(table="dead_letters", function="sum_dead_letters"))
    op.execute(TRIGGER.format(table="stock_movements", function="sum_movements"))
    op.execute(APPEND_ONLY)


def downgrade():
    with op.batch_alter_table('stock_movements', schema=None) as batch_op:
        batch_op.drop_index('uq_stock_movements_order_id', postgresql_where=sa.text('order_id is not null'))
        batch_op.drop_index('uq_stock_movements_idempotency_key', postgresql_where=sa.text('idempotency_key is not null'))
        batch_op.drop_index('uq_stock_movements_dead_letter_id', postgresql_where=sa.text('dead_letter_id is not null'))
        batch_op.drop_index('ix_stock_movements_product_id_id')
        batch_op.drop_index('ix_stock_movements_pending', postgresql_where=sa.text('applied_at is null'))

    op.drop_table('stock_movements')
    op.drop_table('product_totals')
    with op.batch_alter_table('orders', schema=None) as batch_op:
        batch_op.drop_index('uq_orders_user_id_idempotency_key', postgresql_where=sa.text('idempotency_key is not null'))
        batch_op.drop_index('ix_orders_user_id_id')
        batch_op.drop_index('ix_orders_product_id_id')
        batch_op.drop_index('ix_orders_claimed_at')
        batch_op.drop_index('ix_orders_cancelled', postgresql_where=sa.text("status = 'CANCELLED'"))

    op.drop_table('orders')
    op.drop_table('staff')
    op.drop_table('sale')
    op.drop_table('products')
    with op.batch_alter_table('dead_letters', schema=None) as batch_op:
        batch_op.drop_index('uq_dead_letters_entry')
        batch_op.drop_index('ix_dead_letters_user_id_id')
        batch_op.drop_index('ix_dead_letters_open', postgresql_where=sa.text('resolution is null'))

    op.drop_table('dead_letters')
    op.drop_table('batches')
    with op.batch_alter_table('audit_log', schema=None) as batch_op:
        batch_op.drop_index('ix_audit_log_target_id')
        batch_op.drop_index('ix_audit_log_actor_id')

    op.drop_table('audit_log')
    op.drop_table('api_tokens')
    op.execute("DROP FUNCTION sum_orders, sum_dead_letters, sum_movements, add_product_totals,"
               " refuse_change")
    op.execute("DROP PROCEDURE add_order_totals")
