"""The sale's counters over time: what a worker samples once a second, rates, and the chart."""

import threading
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..extensions import stock
from ..stock.board import HISTORY_MINUTES, HISTORY_SAMPLES
from ..stock.figures import View
from ..stock.outcomes import REFUSALS

# The counters' sums over all products, and the queue: `oldest_ms` is None where nothing waits.
Figures = dict[str, Any]
# A moment's counters: when, in seconds since 1970 by Redis's clock.
Point = tuple[float, Figures]

Columns = dict[str, list[float | None]]

# A rate is taken over so many seconds: one alone flickers.
RATE_SECONDS = 3
# Without a worker nobody samples: then a rate goes back to the newest reading of up to so long ago.
RATE_SECONDS_AT_MOST = 15
GAP_SECONDS = 3
# Which counters of the claim make up a rate.
RATES = {
    "accepted": ("accepted",),
    "sold_out": ("sold_out", "insufficient"),
    "limited": ("limited", "limited_address", "limited_network", "limited_early"),
    "replayed": ("replayed",),
    "refused": (
        "mismatched", "too_many", "ended", "paused", "not_open", "capped", "capped_address",
        "overloaded", "price_changed", "order_ended",
    ),
    "persisted": ("persisted",),
}  # fmt: skip
COLUMNS = ("accepted", "refused", "waiting", "free")
COUNTERS = ("accepted", "claimed", "settled", "persisted", *REFUSALS)
_REFUSALS = sum((RATES[name] for name in ("sold_out", "limited", "refused")), ())
# Beside the sums a sample has the newest products by themselves, as many as the dashboard shows.
MOST_PRODUCTS = 60


def totals(view: View) -> Figures:
    """Return the counters as they stand, over all products, and the queue."""
    sums = view.sums()
    found = {name: sums.get(name, 0) for name in COUNTERS}
    return found | {
        # What nobody can buy is not free.
        "free": sums["on_sale"],
        "waiting": view.waiting,
        "oldest_ms": view.oldest_claimed_ms,
    }


def sample(view: View) -> Figures:
    """Return what is kept of a moment: the totals, and COLUMNS of single products by their ids."""
    newest = sorted(view.products, reverse=True)[:MOST_PRODUCTS]
    return totals(view) | {"of": {str(p): _of_product(view.products[p]) for p in newest}}


def _of_product(figures: dict[str, int]) -> list[int]:
    refused = sum(figures.get(name, 0) for name in _REFUSALS)
    waiting = max(0, figures["accepted"] - figures["settled"])
    return [figures["accepted"], refused, waiting, figures["free"]]


def of_product(figures: Figures, product_id: int) -> Figures | None:
    """Return a sample's figures of one product, None where it has none."""
    known = figures.get("of", {}).get(str(product_id))
    if known is None:
        return None
    accepted, refused, waiting, free = known
    return {"accepted": accepted, _REFUSALS[0]: refused, "waiting": waiting, "free": free}


@dataclass(frozen=True)
class Span:
    """How far back a chart looks."""

    name: str
    seconds: int
    by_minute: bool = True

    @property
    def gap_seconds(self) -> int:
        """Samples that are further apart were not taken by a worker that was there all the time."""
        return 150 if self.by_minute else GAP_SECONDS


SPANS = {
    "15m": Span("15 minutes", HISTORY_SAMPLES, by_minute=False),
    "3h": Span("3 hours", 3 * 60 * 60),
    "24h": Span("24 hours", HISTORY_MINUTES * 60),
}


class Readings:
    """What this process has read of the counters lately: rates need no worker's samples."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=64)
        self._generation = ""
        self._lock = threading.Lock()

    def add(self, generation: str, point: Point) -> list[Point]:
        """Return the earlier readings of the same sale, and remember this one."""
        with self._lock:
            if generation != self._generation:
                self._points.clear()
                self._generation = generation
            earlier = list(self._points)
            self._points.append(point)
        return earlier


def rates(now: Point, earlier: list[Point]) -> dict[str, float | None]:
    """Return each rate per second up to now; None when there is nothing to compare with.

    Of the points of the last seconds the newest is taken that lies RATE_SECONDS back, else the
    oldest of those that lie at least one second back.
    """
    moment, counters = now
    known = sorted(
        (point for point in earlier if 1 <= moment - point[0] <= RATE_SECONDS_AT_MOST),
        key=lambda point: point[0],
    )
    if not known:
        return dict.fromkeys(RATES)
    far = [point for point in known if moment - point[0] >= RATE_SECONDS]
    start, before = far[-1] if far else known[0]
    return {
        name: _difference(before, counters, names) / (moment - start)
        for name, names in RATES.items()
    }


def _difference(before: Figures, after: Figures, names: tuple[str, ...]) -> int:
    # A counter that went down was set anew (a reset, a rebuild): that second says nothing.
    return max(0, sum(int(after.get(name, 0)) - int(before.get(name, 0)) for name in names))


def chart(since: int = 0, span: Span = SPANS["15m"], product_id: int | None = None) -> Columns:
    """Return the samples after the second `since` as columns. Raises stock.Unavailable."""
    most = span.seconds // 60 if span.by_minute else span.seconds
    found = stock.board.history(since, most, span.by_minute)
    if product_id is not None:
        of = [(second, of_product(figures, product_id)) for second, figures in found]
        found = [(second, figures) for second, figures in of if figures]
    return columns(found, stock.board.now(), span.gap_seconds)


def columns(
    samples: list[tuple[int, Figures]], now: float, gap_seconds: int = GAP_SECONDS
) -> Columns:
    """Return what the chart shows of successive samples; rates are per second.

    Where nobody sampled there is a gap: a second without values. So is what follows the last one.
    """
    found: Columns = {"second": [], **{name: [] for name in COLUMNS}}

    def add(second: int, *values: float | None) -> None:
        for name, value in zip(found, (second, *values), strict=True):
            found[name].append(value)

    for (start, before), (end, after) in pairwise(samples):
        if end - start > gap_seconds:
            add(start + 1, None, None, None, None)
            add(end, None, None, after["waiting"], after["free"])
            continue
        add(
            end,
            _difference(before, after, ("accepted",)) / (end - start),
            _difference(before, after, _REFUSALS) / (end - start),
            after["waiting"],
            after["free"],
        )
    newest = samples[-1][0] if samples else 0
    if samples and now - newest > gap_seconds:
        # Not up to now: the first sample of a worker that is back must still find its second free.
        if now - newest > 2 * gap_seconds:
            add(newest + 1, None, None, None, None)
        add(int(now) - 2, None, None, None, None)
    return found
