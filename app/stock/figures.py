"""The figures of a shard: for people, the chart, the ledger's proof."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..problems import Unavailable
from .brakes import Brakes
from .entries import Entry
from .link import Command, Link, Question, asking
from .outcomes import REFUSALS

# Redis does nothing else while it reads so many products, 10 to 20 µs each.
MOST_AT_ONCE = 200


@dataclass(frozen=True)
class View:
    """What Redis holds of the sale, by product id; each product as it was at one instant."""

    generation: str
    last_order_id: int
    waiting: int
    oldest_claimed_ms: int | None
    products: dict[int, dict[str, int]]
    # What other products add up to, where only that was asked for; with `on_sale`.
    others: dict[str, int]
    brakes: Brakes
    # Shards that could not be asked: what they have is in none of the figures.
    missing: tuple[int, ...] = ()
    # Of several shards what each holds, or why it could not be asked.
    parts: "dict[int, View | Unavailable]" = field(default_factory=dict)

    def sums(self) -> dict[str, int]:
        """Return what all products add up to.

        `on_sale` are the free units that can be bought: not those of drafts.
        """
        sums = defaultdict(int, {"free": 0, "on_sale": 0} | self.others)
        for figures in self.products.values():
            for name, figure in figures.items():
                if name not in _SAME:
                    sums[name] += figure
            if can_be_bought(figures):
                sums["on_sale"] += figures["free"]
        return sums


def can_be_bought(figures: dict[str, int]) -> bool:
    """Tell whether there is any time at which a product can be bought: not a draft or archived."""
    return bool(figures.get("max"))


# Of a product in several shards: what is one for all of them, as it is where it is oldest.
_SAME = ("version", "opens", "closes", "pause", "cap", "max", "hold")


def merged(parts: dict[int, View | Unavailable]) -> View:
    """Return the sums of the shards' views, given by their numbers; at least one could be asked.

    Its generation is the sale's that they hold; one that is closed holds none.
    """
    views = {number: part for number, part in parts.items() if isinstance(part, View)}
    names = {view.generation for view in views.values() if view.generation}
    products: dict[int, dict[str, int]] = {}
    others: Counter[str] = Counter()
    for view in views.values():
        others.update(view.others)
        for product_id, figures in view.products.items():
            sums = products.setdefault(product_id, {})
            older = figures["version"] < sums.get("version", figures["version"] + 1)
            for name, figure in figures.items():
                if name not in _SAME:
                    sums[name] = sums.get(name, 0) + figure
                elif older:
                    sums[name] = figure
    oldest = [view.oldest_claimed_ms for view in views.values() if view.oldest_claimed_ms]
    return View(
        generation=" or ".join(sorted(names)),
        last_order_id=max(view.last_order_id for view in views.values()),
        waiting=sum(view.waiting for view in views.values()),
        oldest_claimed_ms=min(oldest, default=None),
        products=products,
        others=dict(others),
        brakes=Brakes(
            any(view.brakes.sale for view in views.values()),
            frozenset(of for view in views.values() for of in view.brakes.products),
        ),
        missing=tuple(number for number in parts if number not in views),
        parts=parts,
    )


@dataclass(frozen=True)
class Account:
    """One product's counters in Redis, and its share of the outbox, for the ledger."""

    on_sale: bool
    free: int
    moved: int
    accepted: int
    claimed: int
    settled: int
    settled_units: int
    persisted: int
    # In the outbox: already stored in PostgreSQL; and all together (only where counted).
    overlap: int
    overlap_units: int
    waiting: int
    waiting_units: int
    # From other shards, less what they were lent.
    received: int = 0


@dataclass(frozen=True)
class Accounts:
    """The Redis half of the ledger at one instant."""

    generation: str
    last_order_id: int
    waiting: int
    counted: bool
    applied_movements: frozenset[int]
    products: dict[int, Account]


def _pieces(product_ids: Sequence[int]) -> list[Sequence[int]]:
    return [
        product_ids[start : start + MOST_AT_ONCE]
        for start in range(0, len(product_ids), MOST_AT_ONCE)
    ]


class Figures(Link):
    """Reads them, and sets them right. Every method raises Unavailable."""

    def asking_product_ids(self) -> Question[list[int]]:
        return Question(
            [("SMEMBERS", self.keys.products)], lambda answers: sorted(map(int, answers[0]))
        )

    def product_ids(self) -> list[int]:
        """Return the ids of the products on sale in Redis, ascending."""
        return self.ask(self.asking_product_ids())

    def view(self, product_ids: Sequence[int], others: Sequence[int] = ()) -> View:
        """Return what Redis holds. Unknown products are left out. See `asking_view`."""
        return self.ask(self.asking_view(product_ids, others))

    def asking_view(self, product_ids: Sequence[int], others: Sequence[int] = ()) -> Question[View]:
        """Ask for these products, and for what the `others` add up to, MOST_AT_ONCE at a time.

        In one round trip, between whose parts Redis decides purchases. What is no product's is as
        it was at the first of them.
        """
        apart = _pieces(product_ids) or [()]
        commands = [self._viewing("each", piece) for piece in apart]
        commands += [self._viewing("sums", piece) for piece in _pieces(others)]
        return Question(commands, partial(self._view, product_ids, len(apart)), "view")

    def _viewing(self, how: str, product_ids: Sequence[int]) -> Command:
        keys = [self.keys.generation, self.keys.outbox, self.keys.order_ids, self.keys.brakes]
        keys += [self.keys.product(product_id) for product_id in product_ids]
        return self.calling("view", keys, [how])

    def _view(self, product_ids: Sequence[int], apart: int, answers: Any) -> View:
        generation, last, waiting, head, brakes, _ = answers[0]
        hashes = [of for answer in answers[:apart] for of in answer[-1]]
        products = {}
        for product_id, flat in zip(product_ids, hashes, strict=True):
            if flat:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                fields.pop("price")
                # No figure: until when it is refused without asking other shards.
                fields.pop("sealed", None)
                products[product_id] = {
                    name: int(value) for name, value in fields.items() if value != ""
                }
        others: Counter[str] = Counter()
        for *_, (flat,) in answers[apart:]:
            others.update(dict(zip(flat[::2], flat[1::2], strict=True)))
        oldest = None
        with contextlib.suppress(ValueError):
            oldest = Entry.parse(head).claimed_ms
        return View(
            generation=self.part.sale_of(generation),
            last_order_id=int(last),
            waiting=waiting,
            oldest_claimed_ms=oldest,
            products=products,
            others=dict(others),
            brakes=Brakes.parse(brakes),
        )

    def asking_accounts(
        self,
        product_ids: Sequence[int],
        stored_through: int,
        movement_ids: Sequence[int],
        count_up_to: int,
    ) -> Question[Accounts]:
        """Ask for the Redis half of the ledger, read at one instant.

        `stored_through` is the last order id known to be stored. An outbox of at most `count_up_to`
        orders is counted entry by entry, which takes about 1 µs each and delays claims meanwhile.
        """
        keys = [self.keys.generation, self.keys.movements, self.keys.outbox, self.keys.order_ids]
        keys += [self.keys.product(product_id) for product_id in product_ids]
        if self.part.shards > 1:
            keys += [self.keys.lent(product_id) for product_id in product_ids]
        args = [stored_through, count_up_to, len(product_ids), *product_ids, *movement_ids]
        return self.asking_script("account", keys, args, partial(self._accounts, product_ids))

    def _accounts(self, product_ids: Sequence[int], answer: Any) -> Accounts:
        generation, last, waiting, counted, applied, accounts = answer
        return Accounts(
            generation=self.part.sale_of(generation),
            last_order_id=int(last),
            waiting=waiting,
            counted=bool(counted),
            applied_movements=frozenset(map(int, applied)),
            products={
                product_id: Account(bool(account[0]), *account[1:])
                for product_id, account in zip(product_ids, accounts, strict=True)
            },
        )

    def asking_lent(self, product_ids: Sequence[int]) -> Question[list[dict[str, int]]]:
        """Ask of each product what was sent.<shard> and recv.<shard>; and unsealed, a moment."""
        return Question(
            [("HGETALL", self.keys.lent(product_id)) for product_id in product_ids],
            lambda answers: [{name: int(of) for name, of in found.items()} for found in answers],
        )

    def unapplied_movements(self, movement_ids: list[int]) -> list[int]:
        """Return those of the movements that Redis has not applied."""
        unapplied = []
        with asking():
            for start in range(0, len(movement_ids), 10_000):
                page = movement_ids[start : start + 10_000]
                with self.client.pipeline(transaction=False) as pipe:
                    for movement_id in page:
                        pipe.getbit(self.keys.movements, movement_id)
                    bits = pipe.execute()
                unapplied += [m for m, bit in zip(page, bits, strict=True) if not bit]
        return unapplied

    def mend(self, generation: str, product_id: int, take: int, amounts: dict[str, int]) -> int:
        """Lower a product's free stock, add to its counters; return the units taken, or -1."""
        args = [self.named(generation), take, *(word for pair in amounts.items() for word in pair)]
        return int(self.run("mend", [self.keys.generation, self.keys.product(product_id)], args))

    def keeping_counts(self, product_ids: list[int]) -> Question[None]:
        """Ask to write these products' counts of refusals, as they stand, to Redis's log."""
        keys = [self.keys.refused, *map(self.keys.product, product_ids)]
        return self.asking_script("keep", keys, list(REFUSALS), lambda _: None)

    def turn_away(self, refusals: dict[int, int]) -> None:
        """Count refusals for the user's limit that Redis was not asked about, by product id."""
        keys = [self.keys.refused, *map(self.keys.product, refusals)]
        self.run("turn_away", keys, list(refusals.values()))
