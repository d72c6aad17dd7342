"""What is put on sale in a shard: products with their terms, and every movement of stock."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from ..problems import Unprepared
from ..reading import User
from .link import Link, Question

Args = list[Any]
# Of a product as Redis obeys them, by the names of TERMS: opens and closes in ms since 1970, None
# where there is none.
Terms = dict[str, object]
# A product's terms of sale, in the order of put_product.lua.
TERMS = ("opens", "closes", "pause", "cap", "max", "price", "hold")


class Expired(NamedTuple):
    """An order that expired together with others; `record` is what its key says, if it has one."""

    user: User
    units: int
    key: str | None
    record: str


class Together(NamedTuple):
    """The movement of orders that expired together."""

    movement_id: int
    product_id: int
    orders: Sequence[Expired]


class Ended(NamedTuple):
    """An order that came with an Idempotency-Key, and its status now; standing() if it holds."""

    key: str
    order_id: int
    status: str


class Movement(NamedTuple):
    """A stock movement that is to be applied.

    With `user` the units also go back to what this user may still buy, and a replay of the purchase
    with the key of the order that `ended` tells what has become of it.
    """

    movement_id: int
    product_id: int
    units: int
    user: User | None = None
    ended: Ended | None = None


def _prepared(moved: list[Any]) -> list[tuple[str, int]]:
    """Return what the script told of movements. Raises Unprepared."""
    if any(outcome == "unprepared" for outcome, _ in moved):
        raise Unprepared("the sale is not in Redis")
    return [(outcome, free) for outcome, free in moved]


class Moves(Link):
    """Carries them out, each once. Every method raises Unavailable."""

    def put_product(self, product_id: int, version: int, terms: Terms) -> bool:
        """Publish the terms of sale; False when this or a later version is in force already."""
        return self.ask(self.putting_product(product_id, version, terms))

    def putting_product(self, product_id: int, version: int, terms: Terms) -> Question[bool]:
        def read(outcome: str) -> bool:
            if outcome == "unprepared":
                raise Unprepared("the sale is not in Redis")
            return outcome == "published"

        publication = self._publication(product_id, version, terms)
        return self.asking_script("put_product", *publication, read)

    def _publication(self, product_id: int, version: int, terms: Terms) -> tuple[list[str], Args]:
        """Return keys and arguments of put_product.lua."""
        values = ["" if terms[name] is None else terms[name] for name in TERMS]
        keys = [self.keys.generation, self.keys.products, self.keys.product(product_id)]
        return keys, [product_id, version, *values]

    def put_new(
        self, generation: str | None, products: Iterable[tuple[int, int, Terms, int, int]]
    ) -> list[int]:
        """Publish new products and their first stock, all in one round trip; return what is free.

        Each is (id, version, terms, id of the movement, its units), and may be there already.
        Raises Unprepared when Redis holds another sale than `generation`.
        """
        calls: list[tuple[str, list[str], Args]] = []
        for product_id, version, terms, movement_id, units in products:
            keys = [self.keys.generation, self.keys.movements, self.keys.product(product_id)]
            calls += (
                ("put_product", *self._publication(product_id, version, terms)),
                ("move", keys, [movement_id, units, self.named(generation)]),
            )
        return [free for _, free in _prepared(self.run_all(calls)[1::2])]

    def move_all(
        self, generation: str | None, movements: Iterable[Movement]
    ) -> list[tuple[str, int]]:
        """Apply stock movements, each at most once: (what became of it, free stock) of each.

        That is applied | repeated | short (too few are free) | capped (the user has bought too
        many) | unknown (there is no such product). Raises Unprepared when Redis holds another sale
        than `generation`.
        """
        calls: list[tuple[str, list[str], Args]] = []
        for movement_id, product_id, units, user, ended in movements:
            keys = [self.keys.generation, self.keys.movements, self.keys.product(product_id)]
            args: Args = [movement_id, units, self.named(generation)]
            if user is not None:
                bucket, field = self.keys.bought(product_id, user)
                keys.append(bucket)
                args.append(field)
                if ended:
                    name, field = self.keys.idempotency(user, ended.key)
                    keys += [name, self.keys.former_idempotency(user, ended.key)]
                    args += [field, ended.order_id, ended.status]
            calls.append(("move", keys, args))
        return _prepared(self.run_all_surely(calls))

    def move_expired(
        self, generation: str | None, movements: Iterable[Together]
    ) -> list[tuple[str, int]]:
        """Apply movements of orders that expired together, as `move_all` does of single ones."""
        calls = [self._expired(generation, *movement) for movement in movements]
        return _prepared(self.run_all_surely(calls))

    def _expired(
        self, generation: str | None, movement_id: int, product_id: int, orders: Sequence[Expired]
    ) -> tuple[str, list[str], Args]:
        """Return the call of move_expired.lua."""
        bought: dict[str, dict[str, int]] = defaultdict(dict)
        records: dict[str, Args] = defaultdict(list)
        for user, units, key, record in orders:
            name, field = self.keys.bought(product_id, user)
            bucket = bought[name]
            bucket[field] = bucket.get(field, 0) + units
            if key is not None:
                name, field = self.keys.idempotency(user, key)
                records[name] += field, record
        units = sum(order.units for order in orders)
        args: Args = [movement_id, units, self.named(generation), len(bought)]
        for fields in bought.values():
            args += (len(fields), *fields, *fields.values())
        for pairs in records.values():
            args += (len(pairs) // 2, *pairs)
        product = self.keys.product(product_id)
        keys = [self.keys.generation, self.keys.movements, product, *bought, *records]
        return "move_expired", keys, args

    def putting_held(self, generation: str, units: dict[int, tuple[int, int]]) -> Question[None]:
        """Ask to note how many units of each product may come back because they are held.

        `units` are those held by stored orders, and those that were settled before that was asked.
        """
        keys = [self.keys.generation, *map(self.keys.product, units)]
        args = [self.named(generation), *chain.from_iterable(units.values())]
        return self.asking_script("put_held", keys, args, lambda _: None)
