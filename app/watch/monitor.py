"""The sale as people watch it: every product's state and units, rates, and the health of the parts.

Nothing here costs more when there are more orders: products and sums in one statement, Redis in one
script call and one pipeline.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from ..database import is_unavailable
from ..extensions import db, stock
from ..generation import Held, held, on_record
from ..models import Order, Product, ProductTotals, WebhookEndpoint
from ..problems import Unavailable, UnknownProduct
from ..stock.board import News
from ..stock.brakes import Brakes
from ..stock.figures import View
from . import health, samples, shelf
from .samples import Span

# A product's states in the order in which the claim checks them. What the next purchase would meet
# can't be told without Redis, unless the terms refuse it.
ENDED, BRAKED, PAUSED, SCHEDULED = "ended", "braked", "paused", "scheduled"
SOLD_OUT, LIVE, UNKNOWN = "sold out", "live", "unknown"
# What shoppers can't buy at all, whatever its other terms say.
ARCHIVED, DRAFT = "archived", "draft"

# The ledger's proof is written every few seconds; an older one says nothing about now.
LEDGER_SECONDS = 15
NOT_THIS_SALE = "This Redis does not hold this sale. Nothing is sold until it is rebuilt."
DURABILITY_SECONDS = 30
# Among which a product's next end is looked for: some milliseconds.
MOST_HOLDS = 10_000


@dataclass(frozen=True)
class Item:
    """One product as it stands. Units are None while Redis can't be asked."""

    product: Product
    state: str
    sold: int
    # Of orders that are held until they are paid for, as far as they are stored.
    held: int
    held_orders: int
    # Of orders that could not be stored, and wait for a decision.
    failed: int
    failed_orders: int
    orders: int
    # Of a product that holds its orders, or did: how many of them have ended, and how many as paid.
    ended_holds: int = 0
    paid_holds: int = 0
    # Seconds until its next hold ends; only where one product was asked for.
    hold_ends_in: float | None = None
    queued: int | None = None
    free: int | None = None
    # Seconds until it opens or closes, None where nothing is near.
    opens_in: float | None = None
    closes_in: float | None = None
    # Nothing while Redis can't be asked.
    counters: dict[str, int] = field(default_factory=dict)
    # Whether it has a brake of its own; the whole sale's may bind it, too.
    own_brake: bool = False
    # Whether its terms can be changed now, which takes both servers, and this sale in Redis.
    changeable: bool = True
    # The ledger's proof: None when nothing is known.
    balanced: bool | None = None
    difference: int = 0
    # Shards out of reach, so that these figures are without theirs; and whether the proof is
    # without some.
    away: tuple[int, ...] = ()
    partly_proved: bool = False

    @property
    def conversion(self) -> float | None:
        """How many per cent of the holds that have ended were paid; None where none has."""
        return conversion([self])

    @property
    def figures(self) -> tuple[object, ...]:
        """Everything that a row shows beside the product's terms, times in whole seconds."""
        return (
            self.state, self.sold, self.held, self.failed, self.queued, self.free, self.balanced,
            self.difference, self.opens_in and int(self.opens_in),
            self.closes_in and int(self.closes_in), self.own_brake, self.changeable,
        )  # fmt: skip

    @property
    def bar(self) -> list[tuple[str, float, float]]:
        """The units as parts of a bar: name, start and width in per cent; none if not all known."""
        if self.queued is None or self.free is None:
            return []
        parts = {
            "sold": self.sold,
            "held": self.held,
            "queued": self.queued,
            "failed": self.failed,
            "free": self.free,
        }
        total = sum(parts.values()) or 1
        start, bar = 0.0, []
        for name, units in parts.items():
            width = units * 100 / total
            bar.append((name, round(start, 3), round(width, 3)))
            start += width
        return bar


def conversion(items: Sequence[Item]) -> float | None:
    """Return it for all of these products together."""
    ended = sum(item.ended_holds for item in items)
    return sum(item.paid_holds for item in items) * 100 / ended if ended else None


@dataclass(frozen=True)
class ShardState:
    """One of several shards; figures are None while it can't be asked."""

    number: int
    # host:port of its node as last seen, empty where the URL itself says it.
    node: str
    # What is wrong with it, in words that name no server; None when nothing is.
    error: str | None
    free: int | None = None
    waiting: int | None = None
    # Lent by it and not yet given, by the newest proof.
    in_transit: int | None = None


@dataclass(frozen=True)
class Ledger:
    """The newest proof of invariant 1: ok is None when there is none of late."""

    ok: bool | None = None
    at: datetime | None = None
    products: dict[int, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    # Shards of which nothing is proved; and by shard what it lent and is not yet given.
    missing: list[int] = field(default_factory=list)
    in_transit: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Board:
    """Everything the dashboard shows at one instant."""

    now: datetime
    # Without the archived ones, which stay in the ledger.
    items: list[Item]
    archived: list[Item]
    # What is wrong with each, in words that name no server; None when nothing is.
    redis_error: str | None
    postgres_error: str | None
    sale_error: str | None
    # Of the Redis of jobs, where that is another; None when nothing is wrong.
    jobs_error: str | None
    # Of a sale of several.
    shards: list[ShardState]
    # Whether the brake of the whole sale is set.
    braked: bool
    workers: int | None
    waiting: int | None
    oldest_seconds: float | None
    rates: dict[str, float | None]
    ledger: Ledger
    weak: list[str]
    failed_orders: int
    held_orders: int
    # When the next hold ends, if it is not paid before.
    next_end: datetime | None
    # Endpoints of webhooks that were switched off because they failed.
    webhooks_off: int
    # The chart's newest seconds, as columns.
    samples: samples.Columns

    @property
    def sold(self) -> int:
        return sum(item.sold for item in self.items)

    @property
    def held(self) -> int:
        return sum(item.held for item in self.items)

    @property
    def conversion(self) -> float | None:
        """See Item.conversion."""
        return conversion(self.items)

    @property
    def free(self) -> int | None:
        known = not self.redis_error and not self.sale_error
        # What nobody can buy is not free: a draft's units are in its row alone, as in the chart.
        free = sum(item.free or 0 for item in self.items if item.state != DRAFT)
        return free if known else None

    @property
    def spans(self) -> dict[str, Span]:
        """How far back the chart can look."""
        return samples.SPANS

    @property
    def charted(self) -> list[Product]:
        """The products that the chart can show by themselves, the newest first."""
        return [item.product for item in self.items[: -samples.MOST_PRODUCTS - 1 : -1]]

    @property
    def is_stuck(self) -> bool:
        """Whether orders have been waiting for long, although a worker and PostgreSQL are there."""
        late = (self.oldest_seconds or 0) > health.QUEUE_SECONDS
        return late and bool(self.workers) and not self.postgres_error

    @property
    def live(self) -> int | None:
        """The number of products that sell; None when that can't be told."""
        states = [item.state for item in self.items]
        return None if UNKNOWN in states else states.count(LIVE)


def state_of(product: Product, free: int | None, now: datetime, braked: bool = False) -> str:
    """Return what the next purchase would meet, as far as it can be told."""
    if product.archived:
        return ARCHIVED
    if product.visibility == "draft":
        return DRAFT
    if product.closes_at and product.closes_at <= now:
        return ENDED
    if braked:
        return BRAKED
    if product.paused:
        return PAUSED
    if product.opens_at and product.opens_at > now:
        return SCHEDULED
    if free is None:
        return UNKNOWN
    return SOLD_OUT if free <= 0 else LIVE


def items(
    product_id: int | None = None, among: list[int] | None = None
) -> tuple[list[Item], "_Live"]:
    """Return the products (or the one, or those `among` ids), and what else Redis said then.

    With one of the two servers away it is told in the second value, and what the other knows is
    returned. Raises UnknownProduct, and PostgreSQL's error when both are away.
    """
    expected: str | None = None
    error: SQLAlchemyError | None = None
    try:
        query = shelf.products_and_totals()
        if product_id is not None:
            query = query.where(Product.id == product_id)
        if among is not None:
            query = query.where(Product.id.in_(among))
        rows: list[shelf.Row] = [(product, totals) for product, totals in db.session.execute(query)]
        expected = on_record()
    except SQLAlchemyError as failed:
        if not is_unavailable(failed):
            raise
        db.session.rollback()
        error = failed
        try:
            rows = [
                row
                for row in shelf.read()
                if product_id in (None, row[0].id) and (among is None or row[0].id in among)
            ]
        except Unavailable:
            raise failed from None
    if product_id is not None and not rows:
        raise UnknownProduct(product_id)
    live = _Live([product.id for product, _ in rows], expected)
    if live.foreign and error is None:
        # Perhaps a rebuild has ended between the two readings.
        expected = on_record()
        live = _Live([product.id for product, _ in rows], expected)
    live.postgres_error = health.in_words(error) if error else None
    found = [_item(product, totals, live) for product, totals in rows]
    if product_id is not None and found[0].held and error is None:
        ends_in = _seconds_until(_next_end(product_id), live.now)
        found = [replace(found[0], hold_ends_in=ends_in)]
    return found, live


def item(product_id: int) -> Item:
    """Return one product as it stands. Raises UnknownProduct."""
    return items(product_id)[0][0]


def _item(product: Product, totals: ProductTotals, live: "_Live") -> Item:
    now = live.now
    figures = live.products.get(product.id)
    paid, unpaid = _holds(product, totals)
    free = figures["free"] if figures else None
    proof = live.ledger.products.get(product.id, {})
    return Item(
        product=product,
        state=state_of(product, free, now, live.brakes.bind(product.id)),
        sold=totals.confirmed_units,
        held=totals.held_units,
        held_orders=totals.held_orders,
        failed=totals.dead_units,
        failed_orders=totals.dead_orders,
        orders=totals.confirmed_orders,
        ended_holds=paid + unpaid,
        paid_holds=paid,
        queued=max(0, figures["claimed"] - figures["settled_units"]) if figures else None,
        free=free,
        opens_in=_seconds_until(product.opens_at, now),
        closes_in=_seconds_until(product.closes_at, now),
        counters=figures or {},
        own_brake=product.id in live.brakes.products,
        changeable=not live.error and not live.postgres_error and not live.foreign,
        balanced=proof.get("ok"),
        difference=proof.get("difference", 0),
        away=live.away,
        partly_proved=bool(live.ledger.missing),
    )


def _holds(product: Product, totals: ProductTotals) -> tuple[int, int]:
    """Return how many holds ended as paid, and how many unpaid; none where there never was one.

    Which of its orders were sold without a hold, before it had them, the sums don't know.
    """
    unpaid = totals.released_orders + totals.expired_orders
    if not (product.hold_seconds or unpaid):
        return 0, 0
    # What was cancelled later was paid.
    return totals.confirmed_orders + totals.cancelled_orders, unpaid


def _seconds_until(moment: datetime | None, now: datetime) -> float | None:
    return (moment - now).total_seconds() if moment and moment > now else None


_readings = samples.Readings()


class _Live:
    """The Redis half: one script call for the sale, one pipeline for everything about it."""

    def __init__(self, product_ids: list[int], expected: str | None) -> None:
        """`expected` is the sale's name in PostgreSQL, None when that can't tell."""
        self.error: str | None = None
        self.postgres_error: str | None = None
        self.generation = ""
        self.foreign = False
        self.now = datetime.now(UTC)
        self.products: dict[int, dict[str, int]] = {}
        self.waiting = self.oldest_seconds = self.workers = None
        self.brakes = Brakes(False, frozenset())
        self.ledger = Ledger()
        self.samples: list[tuple[int, dict[str, Any]]] = []
        self.jobs_error: str | None = None
        self.shards: list[ShardState] = []
        self.away: tuple[int, ...] = ()
        news: News | None = None
        try:
            view = stock.view(product_ids)
            news, self.jobs_error = self._news()
            self.now = datetime.fromtimestamp(news.now, UTC) if news else stock.clock()
        except Unavailable as error:
            self.error = health.in_words(error)
            return
        self.workers = news.workers if news else None
        self.generation = view.generation
        self.brakes = view.brakes
        self.foreign = held(view.generation, expected) in (Held.NOTHING, Held.ANOTHER)
        if self.foreign:
            # Whatever it holds, it is not this sale's.
            return
        self.products = view.products
        self.waiting = view.waiting
        self.away = view.missing
        now = self.now.timestamp()
        if view.oldest_claimed_ms is not None:
            self.oldest_seconds = max(0.0, now - view.oldest_claimed_ms / 1000)
        if news:
            self.ledger = read_ledger(news.proof, news.now, view.generation)
            self.samples = news.sampled
        self.point = now, samples.totals(view)
        self.shards = [
            _shard_state(number, part, view.generation, self.ledger)
            for number, part in view.parts.items()
        ]

    @staticmethod
    def _news() -> tuple[News | None, str | None]:
        """Return what is on the board, or what ails a Redis of its own that it is on."""
        try:
            return stock.board.news(samples.RATE_SECONDS + 1), None
        except Unavailable as error:
            if len(stock.shards) == 1:
                raise
            return None, health.in_words(error)


def _shard_state(
    number: int, part: View | Unavailable, generation: str, ledger: Ledger
) -> ShardState:
    at = stock.shards[number].server.last_at
    node = "{}:{}".format(*at) if at else ""
    if isinstance(part, Unavailable):
        return ShardState(number, node, health.in_words(part))
    held_by_it = held(part.generation, generation)
    return ShardState(
        number,
        node,
        None if held_by_it is Held.THIS else "without this sale",
        free=part.sums()["on_sale"],
        waiting=part.waiting,
        in_transit=ledger.in_transit.get(number),
    )


def read_ledger(proof: dict[str, Any] | None, now: float, generation: str) -> Ledger:
    """Return the stored proof; one of another sale, of long ago or of the future says nothing."""
    if not proof or proof.get("generation", generation) != generation:
        return Ledger()
    if not -samples.GAP_SECONDS <= now - proof["at"] <= LEDGER_SECONDS:
        return Ledger()
    return Ledger(
        ok=proof["ok"],
        at=datetime.fromtimestamp(proof["at"], UTC),
        products={int(product_id): found for product_id, found in proof["products"].items()},
        problems=proof.get("problems", []),
        missing=proof.get("missing", []),
        in_transit={int(of): units for of, units in proof.get("in_transit", {}).items()},
    )


def board() -> Board:
    """Return what the dashboard shows. Raises PostgreSQL's error when Redis is away, too."""
    found, live = items()
    rates: dict[str, float | None] = dict.fromkeys(samples.RATES)
    if live.products:
        earlier = [*live.samples, *_readings.add(live.generation, live.point)]
        rates = samples.rates(live.point, earlier)
    return Board(
        now=live.now,
        items=[item for item in found if item.state != ARCHIVED],
        archived=[item for item in found if item.state == ARCHIVED],
        redis_error=live.error,
        postgres_error=live.postgres_error,
        sale_error=NOT_THIS_SALE if live.foreign else None,
        jobs_error=live.jobs_error,
        shards=live.shards,
        braked=live.brakes.sale,
        workers=live.workers,
        waiting=live.waiting,
        oldest_seconds=live.oldest_seconds,
        rates=rates,
        ledger=live.ledger,
        weak=_durability.weak() if not live.error else [],
        failed_orders=sum(item.failed_orders for item in found),
        held_orders=sum(item.held_orders for item in found),
        next_end=_next_end() if any(item.held for item in found) else None,
        webhooks_off=0 if live.postgres_error else _webhooks_off(),
        samples=samples.columns(live.samples, live.now.timestamp()),
    )


def _next_end(product_id: int | None = None) -> datetime | None:
    """Return when the next hold ends, of a product or of all, that is not paid before.

    None where so many of other products end earlier that it would take long to find.
    """
    held = select(Order.held_until, Order.product_id).where(Order.status == "HELD")
    first = held.order_by(Order.held_until, Order.id).limit(MOST_HOLDS).subquery()
    ends = select(first.c.held_until).order_by(first.c.held_until).limit(1)
    if product_id is not None:
        ends = ends.where(first.c.product_id == product_id)
    try:
        return db.session.scalar(ends)
    except SQLAlchemyError as error:
        if not is_unavailable(error):
            raise
        db.session.rollback()
        return None


def _webhooks_off() -> int:
    try:
        off = WebhookEndpoint.off_reason.is_not(None)
        return db.session.scalar(select(func.count(WebhookEndpoint.id)).where(off)) or 0
    except SQLAlchemyError:
        # PostgreSQL went away a moment ago, which the next look tells.
        db.session.rollback()
        return 0


class _Durability:
    """Redis's own settings, asked again every half minute: they hardly ever change."""

    def __init__(self) -> None:
        self._asked = float("-inf")
        self._weak: list[str] = []

    def weak(self) -> list[str]:
        if time.monotonic() - self._asked > DURABILITY_SECONDS:
            self._weak = health.weak_durability()
            self._asked = time.monotonic()
        return self._weak


_durability = _Durability()
