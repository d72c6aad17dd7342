"""The sale as people watch it: every product's state and units, rates, and the health of the parts.

Nothing here costs more when there are more orders: products and sums in one statement, Redis in one
script call and one pipeline.
"""

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

import redis
from sqlalchemy import select

from ..extensions import db, stock
from ..models import Product, ProductTotals, Sale
from ..problems import Unavailable, UnknownProduct
from ..stock.gateway import HISTORY_SAMPLES
from ..stock.keys import Keys
from . import health

# A product's states in the order in which the claim checks them.
ENDED, PAUSED, SCHEDULED, SOLD_OUT, LIVE = "ended", "paused", "scheduled", "sold out", "live"

# A rate is taken over so many seconds: one alone flickers.
RATE_SECONDS = 3
# The ledger's proof is written every few seconds; an older one says nothing about now.
LEDGER_SECONDS = 15
# Which counters of the claim make up a rate.
RATES = {
    "accepted": ("accepted",),
    "sold_out": ("sold_out", "insufficient"),
    "limited": ("limited", "limited_address"),
    "replayed": ("replayed",),
    "refused": (
        "mismatched", "too_many", "ended", "paused", "not_open", "capped", "overloaded",
    ),
    "persisted": ("persisted",),
}  # fmt: skip
DURABILITY_SECONDS = 30


@dataclass(frozen=True)
class Item:
    """One product as it stands. Units are None while Redis can't be asked."""

    product: Product
    state: str
    sold: int
    held: int
    held_orders: int
    orders: int
    queued: int | None = None
    free: int | None = None
    # Seconds until it opens or closes, None where nothing is near.
    opens_in: float | None = None
    closes_in: float | None = None
    counters: dict[str, int] = field(default_factory=dict)
    # The ledger's proof: None when nothing is known.
    balanced: bool | None = None
    difference: int = 0

    @property
    def figures(self) -> tuple:
        """Everything that a row shows beside the product's terms, times in whole seconds."""
        return (
            self.state, self.sold, self.held, self.queued, self.free, self.balanced,
            self.difference, self.opens_in and int(self.opens_in),
            self.closes_in and int(self.closes_in),
        )  # fmt: skip

    @property
    def bar(self) -> list[tuple[str, float, float]]:
        """The units as parts of a bar: name, start and width in per cent."""
        parts = {
            "sold": self.sold,
            "queued": self.queued or 0,
            "held": self.held,
            "free": self.free or 0,
        }
        total = sum(parts.values()) or 1
        start, bar = 0.0, []
        for name, units in parts.items():
            width = units * 100 / total
            bar.append((name, round(start, 3), round(width, 3)))
            start += width
        return bar


@dataclass(frozen=True)
class Ledger:
    """The newest proof of invariant 1: ok is None when there is none of late."""

    ok: bool | None = None
    at: datetime | None = None
    products: dict[int, dict] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Board:
    """Everything the dashboard shows at one instant."""

    now: datetime
    items: list[Item]
    redis_error: str | None
    sale_error: str | None
    workers: int | None
    waiting: int | None
    oldest_seconds: float | None
    rates: dict[str, float | None]
    ledger: Ledger
    weak: list[str]
    dead_orders: int
    # The chart's newest seconds, as columns.
    samples: dict[str, list]

    @property
    def sold(self) -> int:
        return sum(item.sold for item in self.items)

    @property
    def free(self) -> int | None:
        return None if self.redis_error else sum(item.free or 0 for item in self.items)


def state_of(product: Product, free: int | None, now: datetime) -> str:
    """Return what the next purchase would meet."""
    if product.closes_at and product.closes_at <= now:
        return ENDED
    if product.paused:
        return PAUSED
    if product.opens_at and product.opens_at > now:
        return SCHEDULED
    return SOLD_OUT if free is not None and free <= 0 else LIVE


def items(
    product_id: int | None = None, among: list[int] | None = None
) -> tuple[list[Item], "_Live"]:
    """Return the products (or the one, or those `among` ids), and what else Redis said then.

    Redis being away is told in the second value. Raises UnknownProduct.
    """
    query = (
        select(Product, ProductTotals)
        .join(ProductTotals, ProductTotals.product_id == Product.id)
        .order_by(Product.id)
    )
    if product_id is not None:
        query = query.where(Product.id == product_id)
    if among is not None:
        query = query.where(Product.id.in_(among))
    rows = list(db.session.execute(query))
    if product_id is not None and not rows:
        raise UnknownProduct(product_id)
    live = _Live([product.id for product, _ in rows])
    now = datetime.now(UTC)
    return [_item(product, totals, live, now) for product, totals in rows], live


def item(product_id: int) -> Item:
    """Return one product as it stands. Raises UnknownProduct."""
    return items(product_id)[0][0]


def _item(product: Product, totals: ProductTotals, live: "_Live", now: datetime) -> Item:
    figures = live.products.get(product.id)
    free = figures["free"] if figures else None
    proof = live.ledger.products.get(product.id, {})
    return Item(
        product=product,
        state=state_of(product, free, now),
        sold=totals.confirmed_units,
        held=totals.dead_units,
        held_orders=totals.dead_orders,
        orders=totals.confirmed_orders,
        queued=max(0, figures["claimed"] - figures["settled_units"]) if figures else None,
        free=free,
        opens_in=_seconds_until(product.opens_at, now),
        closes_in=_seconds_until(product.closes_at, now),
        counters=figures or {},
        balanced=proof.get("ok"),
        difference=proof.get("difference", 0),
    )


def _seconds_until(moment: datetime | None, now: datetime) -> float | None:
    return (moment - now).total_seconds() if moment and moment > now else None


class _Live:
    """The Redis half: one script call for the sale, one pipeline for everything about it."""

    def __init__(self, product_ids: list[int]) -> None:
        self.error: str | None = None
        self.generation = ""
        self.products: dict[int, dict[str, int]] = {}
        self.waiting = self.oldest_ms = self.workers = None
        self.ledger = Ledger()
        self.samples: list[tuple[int, dict]] = []
        try:
            view = stock.view(product_ids)
            with stock.client.pipeline(transaction=False) as pipe:
                pipe.zcount(Keys.workers, time.time() - health.WORKER_SEEN_SECONDS, "+inf")
                pipe.get(Keys.ledger)
                pipe.xrevrange(Keys.history, count=RATE_SECONDS + 1)
                self.workers, ledger, samples = pipe.execute()
        except (Unavailable, redis.RedisError) as error:
            self.error = str(error)
            return
        self.generation = view.generation
        self.products = view.products
        self.waiting = view.waiting
        self.oldest_ms = view.oldest_claimed_ms
        self.ledger = read_ledger(ledger)
        self.samples = [
            (int(stream_id.partition("-")[0]), json.loads(fields["sample"]))
            for stream_id, fields in reversed(samples)
        ]


def read_ledger(text: str | None) -> Ledger:
    """Return the stored proof; one that is too old says nothing."""
    found = json.loads(text) if text else None
    if not found or time.time() - found["at"] > LEDGER_SECONDS:
        return Ledger()
    return Ledger(
        ok=found["ok"],
        at=datetime.fromtimestamp(found["at"], UTC),
        products={int(product_id): proof for product_id, proof in found["products"].items()},
        problems=found.get("problems", []),
    )


def ledger() -> Ledger:
    """Return the newest proof; when Redis is away, one that knows nothing."""
    try:
        return read_ledger(stock.client.get(Keys.ledger))
    except redis.RedisError:
        return Ledger()


def board() -> Board:
    """Return what the dashboard shows."""
    found, live = items()
    expected = db.session.scalar(select(Sale.generation))
    now = datetime.now(UTC)
    oldest = None
    if live.oldest_ms is not None:
        oldest = max(0.0, now.timestamp() - live.oldest_ms / 1000)
    sale_error = None
    if not live.error and live.generation != expected:
        sale_error = "This Redis does not hold this sale. Nothing is sold until it is rebuilt."
    return Board(
        now=now,
        items=found,
        redis_error=live.error,
        sale_error=sale_error,
        workers=live.workers,
        waiting=live.waiting,
        oldest_seconds=oldest,
        rates=rates(live.samples, now.timestamp()),
        ledger=live.ledger,
        weak=_durability.weak() if not live.error else [],
        dead_orders=sum(item.held_orders for item in found),
        samples=columns(live.samples),
    )


def rates(samples: list[tuple[int, dict]], now: float) -> dict[str, float | None]:
    """Return each rate per second, None when nobody has sampled of late."""
    if len(samples) < 2 or now - samples[-1][0] > LEDGER_SECONDS:
        return dict.fromkeys(RATES)
    (start, first), (end, last) = samples[0], samples[-1]
    return {name: _difference(first, last, names) / (end - start) for name, names in RATES.items()}


def _difference(before: dict, after: dict, names: tuple[str, ...]) -> int:
    # A counter that went down was set anew (a reset, a rebuild): that second says nothing.
    return max(0, sum(after.get(name, 0) - before.get(name, 0) for name in names))


def chart(since: int = 0) -> dict[str, list]:
    """Return the samples after the second `since` as columns. Raises stock.Unavailable."""
    return columns(stock.history(since, HISTORY_SAMPLES))


def columns(samples: list[tuple[int, dict]]) -> dict[str, list]:
    """Return what the chart shows of successive samples; rates are per second."""
    found: dict[str, list] = {
        name: [] for name in ("second", "accepted", "refused", "waiting", "free")
    }
    refusals = sum((RATES[name] for name in ("sold_out", "limited", "refused")), ())
    for (start, before), (end, after) in pairwise(samples):
        found["second"].append(end)
        found["accepted"].append(_difference(before, after, ("accepted",)) / (end - start))
        found["refused"].append(_difference(before, after, refusals) / (end - start))
        found["waiting"].append(after["waiting"])
        found["free"].append(after["free"])
    return found


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
