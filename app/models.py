"""Tables and constraints. No HTTP and no Redis here.

The rules that must never break stand in the schema itself, so that no path around this code can
break them either: see the checks, the unique indexes, and the triggers of the first migration.
"""

from datetime import date, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    ColumnElement,
    Computed,
    Date,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    String,
    Text,
    func,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP
from sqlalchemy.orm import Mapped, aliased, mapped_column

from .extensions import Model
from .reading import MAX_QUANTITY, User

Timestamp = TIMESTAMP(timezone=True)
# Names are compared byte for byte, whatever the database's collation.
UserName = Text(collation="C")
# A name is none that reading.canonical() takes for a number: a shopper has one form.
USER_NAME = (
    "case when user_name ~ '^[1-9][0-9]{0,15}$' then user_name::numeric > 9007199254740991"
    " else user_name ~ '^[A-Za-z0-9._~:@|+-]{1,64}$' end"
)


def user_columns(user: User | None) -> dict[str, User | None]:
    """Return the values of the columns that say whose a row is."""
    number = isinstance(user, int)
    return {"user_id": user if number else None, "user_name": None if number else user}


# The statuses of a stored order: it has all or a part of its units, or gave all of them back.
# (One that waits in Redis is QUEUED, one that could not be stored FAILED: neither is a row.)
STANDING_STATUSES = ("CONFIRMED", "HELD")
ENDED_STATUSES = ("CANCELLED", "RELEASED", "EXPIRED")


# Less is no time to pay in; more is no flash sale.
MIN_HOLD_SECONDS = 30
MAX_HOLD_SECONDS = 86_400


class OfUser:
    """A row that is a shopper's: `user_id` has the number or `user_name` the text, never both."""

    user_id: Mapped[int | None] = mapped_column(BigInteger)
    user_name: Mapped[str | None] = mapped_column(UserName)

    @property
    def user(self) -> User | None:
        """Whose it is; it can be set, too."""
        return self.user_name if self.user_id is None else self.user_id

    @user.setter
    def user(self, user: User | None) -> None:
        for column, value in user_columns(user).items():
            setattr(self, column, value)

    @classmethod
    def is_of(cls, user: User) -> ColumnElement[bool]:
        """Return the condition for rows of this shopper."""
        return cls.user_id == user if isinstance(user, int) else cls.user_name == user


class Product(Model):
    """What is sold, on which terms. `version` rises with each change; Redis obeys the highest."""

    # Whether a brake is set: Redis knows, and who reads a product from there notes it.
    braked = False

    __tablename__ = "products"
    __table_args__ = (
        CheckConstraint("length(name) between 1 and 200", name="name"),
        CheckConstraint("price_cents between 0 and 9007199254740991", name="price"),
        CheckConstraint("currency ~ '^[A-Z]{3}$'", name="currency"),
        CheckConstraint("opens_at < closes_at", name="window"),
        CheckConstraint(f"per_user_limit between 1 and {MAX_QUANTITY}", name="per_user_limit"),
        CheckConstraint(f"max_quantity between 1 and {MAX_QUANTITY}", name="max_quantity"),
        CheckConstraint(
            f"hold_seconds between {MIN_HOLD_SECONDS} and {MAX_HOLD_SECONDS}", name="hold_seconds"
        ),
        CheckConstraint("visibility in ('draft', 'hidden', 'listed')", name="visibility"),
        CheckConstraint("length(sku) between 1 and 64", name="sku"),
        Index("uq_products_sku", "sku", unique=True),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    price_cents: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    opens_at: Mapped[datetime | None] = mapped_column(Timestamp)
    closes_at: Mapped[datetime | None] = mapped_column(Timestamp)
    # The window that ending the sale by hand has set aside, for whoever reopens it.
    planned_opens_at: Mapped[datetime | None] = mapped_column(Timestamp)
    planned_closes_at: Mapped[datetime | None] = mapped_column(Timestamp)
    per_user_limit: Mapped[int | None] = mapped_column(Integer)
    max_quantity: Mapped[int] = mapped_column(Integer, server_default="10")
    paused: Mapped[bool] = mapped_column(server_default=text("false"))
    # An order is held so long until it is confirmed; sold at once where there is none.
    hold_seconds: Mapped[int | None] = mapped_column(Integer)
    # The shop's own name for it.
    sku: Mapped[str | None] = mapped_column(Text)
    visibility: Mapped[str] = mapped_column(String(8), server_default="listed")
    archived: Mapped[bool] = mapped_column(server_default=text("false"))
    # Whether its amounts are surely in its currency's own minor unit; empty where versions before
    # may have written hundredths, see products/currency.py.
    minor_units: Mapped[bool | None] = mapped_column()
    version: Mapped[int] = mapped_column(BigInteger, server_default="1")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(
        Timestamp, server_default=func.now(), onupdate=func.now()
    )


class ProductName(Model):
    """What a product was called until it was renamed; a trigger keeps it."""

    __tablename__ = "product_names"

    product_id: Mapped[int] = mapped_column(
        ForeignKey("products.id", ondelete="CASCADE"), primary_key=True
    )
    until: Mapped[datetime] = mapped_column(Timestamp, primary_key=True)
    name: Mapped[str] = mapped_column(Text)


def _sum_of(what: str) -> str:
    return " + ".join(
        f"{s}_{what}" for s in ("confirmed", "held", "cancelled", "released", "expired")
    )


class SumColumns:
    """Sums of a product's orders, dead letters, movements; kept by triggers in the same commit.

    They make every figure of a page a read of few rows, however many orders there are. Every status
    of an order has its columns. Units count where they are: those of an order that were given back
    as how it ended, and as cancelled where a part of it still stands.
    """

    confirmed_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    confirmed_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cancelled_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cancelled_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    held_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    held_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    released_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    released_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    expired_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    expired_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # All orders that were ever stored, and the units that they took when they were claimed.
    stored_orders: Mapped[int] = mapped_column(BigInteger, Computed(_sum_of("orders")))
    stored_units: Mapped[int] = mapped_column(BigInteger, Computed(_sum_of("units")))
    dead_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    dead_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    moved_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Dead letters given up: their units went out, and came back by a movement.
    abandoned_units: Mapped[int] = mapped_column(BigInteger, server_default="0")


class ShardTotals(SumColumns, Model):
    """A product's sums by shard.

    Of one shard all count in row 0. Of several there is row -1 too, for what is older than this
    dealing of the sale: no unit of it is free. A movement counts in them once it is applied.
    """

    __tablename__ = "product_totals"

    product_id: Mapped[int] = mapped_column(
        ForeignKey("products.id", ondelete="CASCADE"), primary_key=True
    )
    shard: Mapped[int] = mapped_column(
        SmallInteger, primary_key=True, autoincrement=False, server_default="0"
    )


class ProductTotals(SumColumns, Model):
    """A product's sums over all shards: a view."""

    __tablename__ = "product_sums"
    __table_args__ = ({"info": {"is_view": True}},)

    product_id: Mapped[int] = mapped_column(primary_key=True)


def sums_by_id() -> type[ProductTotals]:
    """Return the sums for a join of Product `ON true`: each is looked up by its product's id.

    Whatever PostgreSQL expects: with statistics from before a large import it would go through all
    of them for each product.
    """
    sums = select(ProductTotals).where(ProductTotals.product_id == Product.id).offset(0)
    return aliased(ProductTotals, sums.lateral())


class StockMovement(OfUser, Model):
    """Units put into or taken out of the sale by something else than a purchase: the ledger."""

    __tablename__ = "stock_movements"
    __table_args__ = (
        CheckConstraint(
            "case kind when 'initial' then units >= 0 when 'restock' then units > 0"
            " when 'return' then units > 0 when 'reclaim' then units < 0"
            " when 'correction' then true else false end",
            name="what",
        ),
        CheckConstraint("num_nonnulls(user_id, user_name) <= 1", name="one_user"),
        Index("ix_stock_movements_product_id_id", "product_id", "id"),
        # What a crash left between the row and Redis; the sweeper reads only this.
        Index("ix_stock_movements_pending", "id", postgresql_where=text("applied_at is null")),
        # Each act of an order moves units once, and so does a dead letter.
        Index(
            "uq_stock_movements_order_id_act",
            "order_id",
            "act",
            unique=True,
            postgresql_where=text("order_id is not null"),
        ),
        # Of an order's late payment one at a time.
        Index(
            "uq_stock_movements_open_reclaim",
            "order_id",
            unique=True,
            postgresql_where=text("kind = 'reclaim' and applied_at is null"),
        ),
        # By which movement an order's units came back, see Order.cancelled_at.
        Index(
            "ix_stock_movements_expired",
            "created_at",
            postgresql_where=text("order_ids is not null"),
        ),
        Index(
            "uq_stock_movements_dead_letter_id",
            "dead_letter_id",
            unique=True,
            postgresql_where=text("dead_letter_id is not null"),
        ),
        Index(
            "uq_stock_movements_idempotency_key",
            "idempotency_key",
            unique=True,
            postgresql_where=text("idempotency_key is not null"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"))
    kind: Mapped[str] = mapped_column(String(16))
    units: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str | None] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    order_id: Mapped[int | None] = mapped_column(BigInteger)
    # Which of the order's acts, counted from 1.
    act: Mapped[int] = mapped_column(Integer, server_default="1")
    # Instead of one order all that expired together: they ended at this row's `created_at`.
    order_ids: Mapped[list[int] | None] = mapped_column(ARRAY(BigInteger))
    dead_letter_id: Mapped[int | None] = mapped_column(BigInteger)
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    applied_at: Mapped[datetime | None] = mapped_column(Timestamp)
    stock_after: Mapped[int | None] = mapped_column(BigInteger)
    # What each shard got of the units, written when all have; none in a sale of one shard.
    parts: Mapped[list[int] | None] = mapped_column(ARRAY(BigInteger))


class Batch(Model):
    """One run of the drain: which job stored which orders."""

    __tablename__ = "batches"
    __table_args__ = (
        Index("ix_batches_unnumbered", "id", postgresql_where=text("event_number is null")),
        Index("ix_batches_shard_id", "shard", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(Text)
    worker: Mapped[str] = mapped_column(Text)
    first_order_id: Mapped[int] = mapped_column(BigInteger)
    last_order_id: Mapped[int] = mapped_column(BigInteger)
    # Whose orders they are: every so many ids one is this shard's.
    shard: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    orders: Mapped[int] = mapped_column(Integer)
    dead_letters: Mapped[int] = mapped_column(Integer)
    persisted_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    # The number of its last order's event; none while it has none, 0 from before there were events.
    event_number: Mapped[int | None] = mapped_column(BigInteger)


class Order(OfUser, Model):
    """A purchase that was promised. The claim gave it its id, so it can't be stored twice."""

    __tablename__ = "orders"
    __table_args__ = (
        CheckConstraint("id > 0", name="id"),
        CheckConstraint("user_id between 1 and 9007199254740991", name="user_id"),
        CheckConstraint("num_nonnulls(user_id, user_name) = 1", name="one_user"),
        CheckConstraint(USER_NAME, name="user_name"),
        CheckConstraint("length(reference) between 1 and 64", name="reference"),
        CheckConstraint("quantity > 0", name="quantity"),
        CheckConstraint("unit_price_cents >= 0", name="unit_price"),
        CheckConstraint("returned_units between 0 and quantity", name="returned_units"),
        CheckConstraint(
            f"case when status in {STANDING_STATUSES}"
            " then returned_units < quantity and cancelled_at is null"
            f" when status in {ENDED_STATUSES}"
            " then returned_units = quantity and cancelled_at is not null else false end",
            name="state",
        ),
        CheckConstraint("status <> 'HELD' or held_until is not null", name="held"),
        CheckConstraint("length(payment) between 1 and 128", name="payment"),
        Index("ix_orders_user_id_id", "user_id", "id"),
        Index(
            "ix_orders_user_name_id",
            "user_name",
            "id",
            postgresql_where=text("user_name is not null"),
        ),
        Index(
            "ix_orders_reference_id",
            "reference",
            "id",
            postgresql_where=text("reference is not null"),
        ),
        Index("ix_orders_product_id_id", "product_id", "id"),
        Index("ix_orders_claimed_at", "claimed_at"),
        Index(
            "ix_orders_status_id", "status", "id", postgresql_where=text("status <> 'CONFIRMED'")
        ),
        Index("ix_orders_held_until", "held_until", "id", postgresql_where=text("status = 'HELD'")),
        # One order for each (user, Idempotency-Key), also after Redis has forgotten the key. The
        # key comes first, since the support desk looks one up without knowing whose it is; the
        # first index has the keys of all users.
        Index(
            "uq_orders_idempotency_key_user_id",
            "idempotency_key",
            "user_id",
            unique=True,
            postgresql_where=text("idempotency_key is not null"),
        ),
        Index(
            "uq_orders_idempotency_key_user_name",
            "idempotency_key",
            "user_name",
            unique=True,
            postgresql_where=text("user_name is not null and idempotency_key is not null"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # Of a product that exists: the sums' trigger sees to it, once for all orders of a batch.
    product_id: Mapped[int] = mapped_column(BigInteger)
    quantity: Mapped[int] = mapped_column(Integer)
    unit_price_cents: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    status: Mapped[str] = mapped_column(String(9), server_default="CONFIRMED")
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    # The shop's own name for it: a cart, or a line of one.
    reference: Mapped[str | None] = mapped_column(Text)
    claimed_at: Mapped[datetime] = mapped_column(Timestamp)
    persisted_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    batch_id: Mapped[int | None] = mapped_column(BigInteger)
    # So many of `quantity`, which never changes, were given back.
    returned_units: Mapped[int] = mapped_column(Integer, server_default="0")
    # How often its state was changed, counted under its row's lock: (order, act) names a change.
    acts: Mapped[int] = mapped_column(Integer, server_default="0")
    # When, by whom and why it ended, if it did: cancelled, released or expired.
    cancelled_at: Mapped[datetime | None] = mapped_column(Timestamp)
    cancelled_by: Mapped[str | None] = mapped_column(Text)
    cancel_reason: Mapped[str | None] = mapped_column(Text)
    # Of an order that is, or was, held until it is paid for; and what paid it.
    held_until: Mapped[datetime | None] = mapped_column(Timestamp)
    # When the hold would have ended, had it not been extended.
    extended_from: Mapped[datetime | None] = mapped_column(Timestamp)
    payment: Mapped[str | None] = mapped_column(Text)


class OrderIntent(Model):
    """An act that was accepted for an order that still waits in Redis, and is done once stored.

    `applied_at` says that it was done or, with a `refusal`, that it could not be.
    """

    __tablename__ = "order_intents"
    __table_args__ = (
        CheckConstraint("act in ('cancel', 'confirm', 'release', 'extend')", name="act"),
        CheckConstraint("units > 0", name="units"),
        Index("ix_order_intents_open", "order_id", postgresql_where=text("applied_at is null")),
    )

    # Of the sale, whose order ids these are: see Sale.
    epoch: Mapped[str] = mapped_column(String(32), primary_key=True)
    order_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    # In the order in which they came, from 1.
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    act: Mapped[str] = mapped_column(String(9))
    # To give back; None for all that are left. The seconds of an extension.
    units: Mapped[int | None] = mapped_column(Integer)
    reason: Mapped[str | None] = mapped_column(Text)
    payment: Mapped[str | None] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    address: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    applied_at: Mapped[datetime | None] = mapped_column(Timestamp)
    refusal: Mapped[str | None] = mapped_column(Text)


class BulkCancel(Model):
    """Many orders of a product that are being cancelled, some hundreds at a time."""

    __tablename__ = "bulk_cancels"
    __table_args__ = (
        Index("ix_bulk_cancels_open", "id", postgresql_where=text("finished_at is null")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"))
    # What else is looked for; NULL where everything will do.
    user_text: Mapped[str | None] = mapped_column(Text)
    reference: Mapped[str | None] = mapped_column(Text)
    since: Mapped[datetime | None] = mapped_column(Timestamp)
    until: Mapped[datetime | None] = mapped_column(Timestamp)
    # What is sold later is left alone.
    through_order_id: Mapped[int] = mapped_column(BigInteger)
    # How many there were, as whoever began it has confirmed.
    orders: Mapped[int] = mapped_column(BigInteger)
    reason: Mapped[str] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Text)
    address: Mapped[str | None] = mapped_column(Text)
    # Where the next batch begins, and what was done before it.
    last_order_id: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cancelled_orders: Mapped[int] = mapped_column(BigInteger, server_default="0")
    cancelled_units: Mapped[int] = mapped_column(BigInteger, server_default="0")
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    stopped_at: Mapped[datetime | None] = mapped_column(Timestamp)
    stopped_by: Mapped[str | None] = mapped_column(Text)
    finished_at: Mapped[datetime | None] = mapped_column(Timestamp)

    @property
    def state(self) -> str:
        if self.finished_at is None:
            return "running"
        return "stopped" if self.stopped_at else "done"


class DeadLetter(OfUser, Model):
    """An order that could not be stored. Its stock stays held until a person decides."""

    __tablename__ = "dead_letters"
    __table_args__ = (
        CheckConstraint("resolution in ('replayed', 'abandoned')", name="resolution"),
        CheckConstraint("(resolution is null) = (resolved_at is null)", name="resolved"),
        CheckConstraint("num_nonnulls(user_id, user_name) <= 1", name="one_user"),
        # The same entry may be read again after a crash between the commit and the trim.
        Index("uq_dead_letters_entry", "stream_id", text("md5(payload)"), unique=True),
        Index("ix_dead_letters_open", "id", postgresql_where=text("resolution is null")),
        Index("ix_dead_letters_user_id_id", "user_id", "id"),
        Index(
            "ix_dead_letters_user_name_id",
            "user_name",
            "id",
            postgresql_where=text("user_name is not null"),
        ),
        Index(
            "ix_dead_letters_reference_id",
            "reference",
            "id",
            postgresql_where=text("reference is not null"),
        ),
        Index("ix_dead_letters_order_id", "order_id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    stream_id: Mapped[str] = mapped_column(String(41))
    payload: Mapped[str] = mapped_column(Text)
    error: Mapped[str] = mapped_column(Text)
    # Empty where the payload can't be read as an order.
    order_id: Mapped[int | None] = mapped_column(BigInteger)
    product_id: Mapped[int | None] = mapped_column(BigInteger)
    quantity: Mapped[int | None] = mapped_column(BigInteger)
    reference: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    resolution: Mapped[str | None] = mapped_column(String(9))
    resolved_at: Mapped[datetime | None] = mapped_column(Timestamp)
    resolved_by: Mapped[str | None] = mapped_column(Text)
    resolve_reason: Mapped[str | None] = mapped_column(Text)
    # A replay under a new id, where the old one belonged to another order.
    replayed_as: Mapped[int | None] = mapped_column(BigInteger)

    @classmethod
    def not_replayed(cls) -> ColumnElement[bool]:
        """Return the condition for letters whose order is no row of `orders`: it stays listed."""
        return cls.resolution.is_distinct_from("replayed")


class Sale(Model):
    """One row: which sale this is, so that a Redis that lost it or holds another one is noticed."""

    __tablename__ = "sale"
    __table_args__ = (
        CheckConstraint("id = 1", name="one_row"),
        CheckConstraint("shards in (1, 2, 3, 4, 6, 8, 12, 24)", name="shards"),
    )

    id: Mapped[int] = mapped_column(Integer, primary_key=True, server_default="1")
    # Into how many parts it is dealt.
    shards: Mapped[int] = mapped_column(SmallInteger, server_default="1")
    generation: Mapped[str] = mapped_column(String(32))
    # The sale whose order ids these are. A reset begins another one; a rebuild goes on with it.
    epoch: Mapped[str | None] = mapped_column(String(32))
    # Copied from Redis once a second; bounds what a loss of Redis can have taken with it. Several
    # shards have their own: see SaleShard.
    last_order_id: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Where this generation's ids begin: those between the last one's and these never were.
    first_order_id: Mapped[int] = mapped_column(BigInteger, server_default="1")
    sampled_at: Mapped[datetime | None] = mapped_column(Timestamp)
    # When ends of holds were looked for last; and before when none is carried out, see expiry.py.
    swept_at: Mapped[datetime | None] = mapped_column(Timestamp)
    expiry_from: Mapped[datetime | None] = mapped_column(Timestamp)


class SaleShard(Model):
    """Of a sale of several shards: the last order id that each has surely issued."""

    __tablename__ = "sale_shards"

    shard: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    last_order_id: Mapped[int] = mapped_column(BigInteger)
    sampled_at: Mapped[datetime | None] = mapped_column(Timestamp)


class Staff(Model):
    """A person who signs in. `session_key` changes with the password and ends all sessions."""

    __tablename__ = "staff"
    __table_args__ = (
        CheckConstraint("role in ('admin', 'support')", name="role"),
        CheckConstraint("email = lower(email)", name="email"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    email: Mapped[str] = mapped_column(String(254), unique=True)
    password_hash: Mapped[str] = mapped_column(Text)
    role: Mapped[str] = mapped_column(String(16))
    active: Mapped[bool] = mapped_column(server_default=text("true"))
    session_key: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_sign_in_at: Mapped[datetime | None] = mapped_column(Timestamp)


class StaffSession(Model):
    """A session of a person in one browser. It ends with the row, and with another password."""

    __tablename__ = "staff_sessions"
    __table_args__ = (Index("ix_staff_sessions_staff_id", "staff_id"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    staff_id: Mapped[int] = mapped_column(ForeignKey("staff.id", ondelete="CASCADE"))
    # The person's at the sign-in.
    session_key: Mapped[str] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class ApiToken(Model):
    """A bearer token of the admin API; only its SHA-256 is kept."""

    __tablename__ = "api_tokens"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    # The first characters, by which people tell tokens apart; older tokens have none.
    hint: Mapped[str | None] = mapped_column(String(16))
    # What it may do, one word each (RFC 6749, 3.3).
    scopes: Mapped[str] = mapped_column(Text, server_default="*")
    created_by: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    last_used_at: Mapped[datetime | None] = mapped_column(Timestamp)
    revoked_at: Mapped[datetime | None] = mapped_column(Timestamp)


class RequestKey(Model):
    """An Idempotency-Key that an act has used up; `answer` is what was answered, to be repeated."""

    __tablename__ = "request_keys"
    # What is past its time is found without reading the rest.
    __table_args__ = (Index("ix_request_keys_created_at", "created_at"),)

    route: Mapped[str] = mapped_column(Text, primary_key=True)
    resource: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    # JSON, not JSONB: the members keep their order.
    answer: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class AuditEntry(Model):
    """Who changed what, when and from where. A trigger refuses to change or delete a row."""

    __tablename__ = "audit_log"
    __table_args__ = (
        Index("ix_audit_log_target_id", "target", "id"),
        Index("ix_audit_log_actor_id", "actor", "id"),
        Index("uq_audit_log_act_id", "act_id", unique=True),
        Index("ix_audit_log_action_id", "action", "id"),
        Index("ix_audit_log_at", "at"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(String(40))
    target: Mapped[str] = mapped_column(Text)
    before: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    address: Mapped[str | None] = mapped_column(Text)
    # Of an act that was noted in Redis first: it is carried over once.
    act_id: Mapped[str | None] = mapped_column(String(32))


class NewEvent(Model):
    """Something that happened and has no number yet: written with what it tells, and committed.

    The id is taken after the row that it is about was locked, so of one order the later has the
    higher. Orders that the drain stored are no rows here: their batch is the event. Those that a
    movement ended together are one row, without a body.
    """

    __tablename__ = "new_events"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.clock_timestamp())
    type: Mapped[str] = mapped_column(Text)
    order_id: Mapped[int | None] = mapped_column(BigInteger)
    # The order's own count of what happened to it: 0 when it was stored.
    sequence: Mapped[int | None] = mapped_column(Integer)
    # JSON, not JSONB: it is passed on as the text it was written as.
    body: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    # Of several orders: by which movement they ended, and how many.
    count: Mapped[int] = mapped_column(Integer, server_default="1")
    movement_id: Mapped[int | None] = mapped_column(BigInteger)


class Event(Model):
    """Numbered events, a partition for each day.

    A batch is one row, with a number per order; so are orders that ended together.
    """

    __tablename__ = "events"
    __table_args__ = (
        Index("ix_events_order_id", "order_id", postgresql_where=text("order_id is not null")),
        {"postgresql_partition_by": "RANGE (day)"},
    )

    # Of the last event in it, where the row is of several orders.
    number: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    # When it was numbered, by PostgreSQL's clock in UTC.
    day: Mapped[date] = mapped_column(Date, primary_key=True)
    count: Mapped[int] = mapped_column(Integer)
    at: Mapped[datetime] = mapped_column(Timestamp)
    type: Mapped[str] = mapped_column(Text)
    # The first one's, of those that ended together.
    order_id: Mapped[int | None] = mapped_column(BigInteger)
    sequence: Mapped[int | None] = mapped_column(Integer)
    batch_id: Mapped[int | None] = mapped_column(BigInteger)
    first_order_id: Mapped[int | None] = mapped_column(BigInteger)
    last_order_id: Mapped[int | None] = mapped_column(BigInteger)
    body: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    movement_id: Mapped[int | None] = mapped_column(BigInteger)


class Feed(Model):
    """One row: how far events are numbered, and up to where they are dropped again."""

    __tablename__ = "feed"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, server_default="1")
    head: Mapped[int] = mapped_column(BigInteger, server_default="0")
    floor: Mapped[int] = mapped_column(BigInteger, server_default="0")


class SoldOut(Model):
    """A product that was seen without free units, until it is seen with some."""

    __tablename__ = "sold_out"

    product_id: Mapped[int] = mapped_column(
        ForeignKey("products.id", ondelete="CASCADE"), primary_key=True
    )
    at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())


class WebhookEndpoint(Model):
    """An address of the shop to which events are sent, in their order, as far as `number`."""

    __tablename__ = "webhook_endpoints"
    __table_args__ = (
        CheckConstraint("state in ('on', 'off')", name="state"),
        # Found by whoever calls for deliveries, several times a second.
        Index("ix_webhook_endpoints_due", "next_at", postgresql_where=text("state = 'on'")),
    )

    id: Mapped[int] = mapped_column(Integer, Identity(), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text, server_default="")
    # Empty for every type.
    types: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default="{}")
    # Encrypted (feed/secret.py); the former one signs too until its time is over.
    secret: Mapped[str] = mapped_column(Text)
    former_secret: Mapped[str | None] = mapped_column(Text)
    former_until: Mapped[datetime | None] = mapped_column(Timestamp)
    state: Mapped[str] = mapped_column(String(3), server_default="on")
    # Why it was switched off by itself; none where a person did so.
    off_reason: Mapped[str | None] = mapped_column(Text)
    # Where it goes on: the sale's epoch, and the number of the last event that is done with.
    epoch: Mapped[str] = mapped_column(String(32))
    number: Mapped[int] = mapped_column(BigInteger, server_default="0")
    # Of the delivery that fails now.
    failures: Mapped[int] = mapped_column(Integer, server_default="0")
    failing_since: Mapped[datetime | None] = mapped_column(Timestamp)
    next_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    created_by: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())

    @property
    def shown_url(self) -> str:
        """The address as it may be shown and kept: a query often holds the consumer's secret."""
        address, mark, _ = self.url.partition("?")
        return address + (mark and "?…")


class WebhookDelivery(Model):
    """Events in one message: its contents and webhook-id are fixed before it is first sent."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("kind in ('events', 'test')", name="kind"),
        Index("ix_webhook_deliveries_endpoint_id_id", "endpoint_id", "id"),
        Index("ix_webhook_deliveries_endpoint_id_last_number", "endpoint_id", "last_number"),
        Index("ix_webhook_deliveries_created_at", "created_at"),
        # The one that an endpoint's next ones wait for.
        Index(
            "uq_webhook_deliveries_pending",
            "endpoint_id",
            unique=True,
            postgresql_where=text("pending"),
        ),
        Index(
            "ix_webhook_deliveries_wanted",
            "endpoint_id",
            postgresql_where=text("wanted_at is not null"),
        ),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    endpoint_id: Mapped[int] = mapped_column(ForeignKey("webhook_endpoints.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(6))
    message_id: Mapped[str] = mapped_column(Text, unique=True)
    first_number: Mapped[int | None] = mapped_column(BigInteger)
    last_number: Mapped[int | None] = mapped_column(BigInteger)
    events: Mapped[int] = mapped_column(Integer)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    # It is sent until it is delivered; a test, or a copy that a person asked for, is sent once.
    pending: Mapped[bool] = mapped_column(server_default=text("false"))
    wanted_at: Mapped[datetime | None] = mapped_column(Timestamp)
    attempts: Mapped[int] = mapped_column(Integer, server_default="0")
    delivered_at: Mapped[datetime | None] = mapped_column(Timestamp)


class WebhookAttempt(Model):
    """One sending of a delivery, and what came of it."""

    __tablename__ = "webhook_attempts"
    __table_args__ = (Index("ix_webhook_attempts_delivery_id_id", "delivery_id", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    delivery_id: Mapped[int] = mapped_column(
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE")
    )
    at: Mapped[datetime] = mapped_column(Timestamp, server_default=func.now())
    milliseconds: Mapped[int] = mapped_column(Integer)
    # None where there was no answer: `error` then says why.
    status: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[str | None] = mapped_column(Text)
