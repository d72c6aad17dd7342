"""Judges a run: what clients were told, against what is stored. Knows nothing of how it came about.

As a program: `python checker.py RECORD.json` judges the record that chaos.py keeps with --keep.
"""

import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

# The outcome of an attempt. Unknown: no answer, or 503; it may have been carried out, or will be.
OK, REFUSED, UNKNOWN = "ok", "refused", "unknown"


@dataclass(frozen=True)
class Attempt:
    """One request to buy. All attempts with one user and key are one purchase."""

    user: int
    product: int
    quantity: int
    key: str | None
    outcome: str
    status: int = 0
    order: int | None = None


@dataclass(frozen=True)
class Restock:
    key: str
    product: int
    units: int
    outcome: str


@dataclass(frozen=True)
class Cancel:
    order: int
    outcome: str
    units: int | None = None  # None: all that were left


@dataclass
class History:
    """What the clients did and were told."""

    attempts: list[Attempt] = field(default_factory=list)
    restocks: list[Restock] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)


@dataclass(frozen=True)
class Order:
    id: int
    user: int
    product: int
    quantity: int
    key: str | None
    status: str


@dataclass(frozen=True)
class Movement:
    id: int
    product: int
    kind: str
    units: int
    order: int | None = None
    key: str | None = None
    applied: bool = True


@dataclass
class Stored:
    """What the servers hold when all is quiet."""

    orders: list[Order] = field(default_factory=list)
    dead_letters: list[Order] = field(default_factory=list)
    movements: list[Movement] = field(default_factory=list)
    free: dict[int, int] = field(default_factory=dict)
    waiting: int = 0
    # What the system's own ledger check complains about.
    ledger: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Violation:
    """A broken promise. Kinds: lost, altered, duplicate, refused-but-stored, unasked, dead-letter,
    oversold, ledger, restock, cancel, not-drained, error."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def check(history: History, stored: Stored) -> list[Violation]:
    """Return every broken promise that can be told from the two."""
    return [
        *_check_acknowledged(history, stored),
        *_check_keys(history, stored),
        *_check_keyless(history, stored),
        *_check_movements(history, stored),
        *_check_stock(stored),
    ]


def _check_acknowledged(history: History, stored: Stored):
    counts = Counter(order.id for order in stored.orders)
    for order_id, count in counts.items():
        if count > 1:
            yield Violation("duplicate", f"order {order_id} is stored {count} times")
    orders = {order.id: order for order in stored.orders}
    told: dict[int, Attempt] = {}
    for attempt in history.attempts:
        if attempt.status == 500:
            yield Violation("error", f"a purchase of user {attempt.user} was answered 500")
        if attempt.outcome != OK:
            continue
        order = orders.get(attempt.order)
        if order is None:
            yield Violation("lost", f"order {attempt.order} of user {attempt.user} was promised")
        elif (order.user, order.product, order.quantity, order.key) != (
            attempt.user,
            attempt.product,
            attempt.quantity,
            attempt.key,
        ):
            yield Violation("altered", f"order {attempt.order} is not what was promised: {order}")
        before = told.setdefault(attempt.order, attempt)
        if before is not attempt and (attempt.key is None or before != attempt):
            yield Violation("duplicate", f"order id {attempt.order} was promised to two purchases")
    for letter in stored.dead_letters:
        yield Violation("dead-letter", f"order {letter.id} of user {letter.user} was not stored")


def _check_keys(history: History, stored: Stored):
    """One (user, key) pair: at most one order; at least one if promised; none if only refused."""
    outcomes = defaultdict(set)
    promised = defaultdict(set)
    for attempt in history.attempts:
        if attempt.key is not None:
            outcomes[attempt.user, attempt.key].add(attempt.outcome)
            if attempt.outcome == OK:
                promised[attempt.user, attempt.key].add(attempt.order)
    found = Counter((order.user, order.key) for order in stored.orders if order.key is not None)
    for pair, count in found.items():
        if count > 1:
            yield Violation("duplicate", f"user {pair[0]} has {count} orders under key {pair[1]}")
        if pair not in outcomes:
            yield Violation("unasked", f"user {pair[0]} has an order under an unused key")
        elif outcomes[pair] == {REFUSED}:
            yield Violation("refused-but-stored", f"user {pair[0]}, key {pair[1]}")
    for pair, ids in promised.items():
        if len(ids) > 1:
            yield Violation("duplicate", f"user {pair[0]}, key {pair[1]} was promised {ids}")


def _check_keyless(history: History, stored: Stored):
    """Without a key: as many orders as promises, and no more than promises and unknowns."""
    outcomes = defaultdict(Counter)
    for attempt in history.attempts:
        if attempt.key is None:
            outcomes[attempt.user, attempt.product, attempt.quantity][attempt.outcome] += 1
    found = Counter(
        (order.user, order.product, order.quantity) for order in stored.orders if order.key is None
    )
    for purchase, count in found.items():
        user, product, quantity = purchase
        seen = outcomes[purchase]
        what = f"user {user} has {count} orders of {quantity} of product {product}"
        if not seen:
            yield Violation("unasked", what)
        elif seen[OK] + seen[UNKNOWN] == 0:
            yield Violation("refused-but-stored", what)
        elif count > seen[OK] + seen[UNKNOWN]:
            yield Violation(
                "duplicate", f"{what}, for {seen[OK]} promises and {seen[UNKNOWN]} unknowns"
            )


def _check_movements(history: History, stored: Stored):
    restocks = defaultdict(list)
    returns = Counter()
    for movement in stored.movements:
        if not movement.applied:
            yield Violation("not-drained", f"movement {movement.id} is not applied")
        if movement.kind == "restock":
            restocks[movement.key].append(movement)
        if movement.order is not None:
            returns[movement.order] += movement.units
    outcomes = defaultdict(set)
    for restock in history.restocks:
        outcomes[restock.key].add(restock.outcome)
        for movement in restocks[restock.key]:
            if (movement.product, movement.units) != (restock.product, restock.units):
                yield Violation("restock", f"{restock} became {movement}")
    for key, seen in outcomes.items():
        count = len(restocks[key])
        if count > 1 or (OK in seen and not count) or (seen == {REFUSED} and count):
            yield Violation("restock", f"restock {key}: {sorted(seen)}, {count} movements")
    for key in restocks.keys() - outcomes.keys():
        yield Violation("unasked", f"restock {key}")

    quantities = {order.id: order.quantity for order in stored.orders}
    cancelled = {order.id for order in stored.orders if order.status == "CANCELLED"}
    cancels = defaultdict(list)
    for cancel in history.cancels:
        cancels[cancel.order].append(cancel)
    for order_id, asked in cancels.items():
        quantity = quantities.get(order_id, 0)
        surely = _units(quantity, [c for c in asked if c.outcome == OK])
        perhaps = _units(quantity, [c for c in asked if c.outcome != REFUSED])
        if not surely <= returns[order_id] <= perhaps or (
            not quantity and any(c.outcome == OK for c in asked)
        ):
            yield Violation(
                "cancel",
                f"of order {order_id} {returns[order_id]} of {quantity} units came back,"
                f" not {surely} to {perhaps}",
            )
    for order_id in cancelled | returns.keys():
        if order_id not in cancels:
            yield Violation("unasked", f"order {order_id} is cancelled")
        if (order_id in cancelled) != (returns[order_id] == quantities.get(order_id)):
            yield Violation("cancel", f"order {order_id} returned {returns[order_id]} units")


def _units(quantity: int, cancels: list[Cancel]) -> int:
    """Return the units of an order that these gave back, those of the whole order included."""
    return min(quantity, sum(quantity if c.units is None else c.units for c in cancels))


def _check_stock(stored: Stored):
    if stored.waiting:
        yield Violation("not-drained", f"{stored.waiting} orders still wait")
    moved, taken, held = Counter(), Counter(), Counter()
    ever = Counter()
    for movement in stored.movements:
        moved[movement.product] += movement.units
        if movement.kind != "return":
            ever[movement.product] += movement.units
        elif movement.order is not None:
            held[movement.product] -= movement.units
    for order in stored.orders:
        taken[order.product] += order.quantity
        held[order.product] += order.quantity
    for letter in stored.dead_letters:
        taken[letter.product] += letter.quantity
    for product, free in stored.free.items():
        if free < 0:
            yield Violation("oversold", f"product {product} has {free} free units")
        if held[product] > ever[product]:
            yield Violation(
                "oversold", f"product {product}: {held[product]} of {ever[product]} units are sold"
            )
        expected = moved[product] - taken[product]
        if not stored.waiting and free != expected:
            yield Violation(
                "ledger", f"product {product} has {free} free units and should have {expected}"
            )
    for problem in stored.ledger:
        yield Violation("ledger", problem)


def save(path: Path, history: History, stored: Stored) -> None:
    path.write_text(json.dumps({"history": asdict(history), "stored": asdict(stored)}))


def load(path: Path) -> tuple[History, Stored]:
    record = json.loads(path.read_text())
    history, stored = record["history"], record["stored"]
    return (
        History(
            [Attempt(**row) for row in history["attempts"]],
            [Restock(**row) for row in history["restocks"]],
            [Cancel(**row) for row in history["cancels"]],
        ),
        Stored(
            [Order(**row) for row in stored["orders"]],
            [Order(**row) for row in stored["dead_letters"]],
            [Movement(**row) for row in stored["movements"]],
            {int(product): free for product, free in stored["free"].items()},
            stored["waiting"],
            stored["ledger"],
        ),
    )


if __name__ == "__main__":
    violations = check(*load(Path(sys.argv[1])))
    print("\n".join(map(str, violations)) or "Every promise was kept.")
    sys.exit(1 if violations else 0)
