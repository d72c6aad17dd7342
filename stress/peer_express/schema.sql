CREATE TABLE IF NOT EXISTS products (
    id    bigint PRIMARY KEY,
    name  text NOT NULL,
    stock bigint NOT NULL CHECK (stock >= 0)
);

-- The id is the BullMQ job's: a job that runs twice still stores one order.
CREATE TABLE IF NOT EXISTS orders (
    id         bigint PRIMARY KEY,
    user_id    bigint NOT NULL,
    product_id bigint NOT NULL REFERENCES products,
    quantity   integer NOT NULL CHECK (quantity > 0),
    status     text NOT NULL DEFAULT 'CONFIRMED',
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX IF NOT EXISTS orders_by_user ON orders (user_id, id);
