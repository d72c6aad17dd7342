"""The sale in Redis, over all its shards. Whoever is about one shopper or order asks its shard."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import NamedTuple, TypeVar

from ..config import Settings
from ..problems import Unavailable
from ..reading import User
from .board import Noticeboard
from .brakes import BrakeGateway, Brakes
from .claims import Claim, Request
from .dealing import abreast, ask_once, finish, pull, unseal
from .doorkeeper import Doorkeeper
from .entries import Entry
from .figures import View, merged
from .gather import all_of, asked, away, gathered, reached
from .keys import Keys
from .link import Link, Question
from .loop_line import LoopLine
from .moves import Ended, Expired, Movement, Terms, Together
from .place import place
from .pulls import MOST_SECONDS, carry_out, names_of
from .servers import Server
from .shard import Shard
from .shards import Part
from .spread import LoopLines, Pending, SpreadBrakes, ThreadLines
from .thread_line import ThreadLine

Answer = TypeVar("Answer")
# The sale's name on record, and of each shard an order id that it has issued.
OnRecord = Callable[[], tuple[str, list[int]] | None]


class Moved(NamedTuple):
    """What became of a movement, the free stock after it, and what each shard got of its units."""

    outcome: str
    free: int
    parts: list[int] | None = None


class Stock:
    """One for each app; safe to use from several threads."""

    def init_app(self, settings: Settings, on_record: OnRecord = lambda: None) -> None:
        """Prepare the clients; nothing is connected before the first use."""
        self._settings, self._on_record = settings, on_record
        self.shards = self.dealt(settings.shards)
        self.first = self.shards[0]
        self.client, self.raw_client = self.first.client, self.first.raw_client
        # What is no part of the sale: RQ, limits of other routes, who is signed in. To lose it
        # loses no order, and it may be a server of its own.
        self.jobs_server, self.jobs_client = self.first.server, self.client
        # RQ wants answers undecoded.
        self.jobs_raw_client = self.raw_client
        if settings.jobs_redis_url:
            self.jobs_server = Server(settings.jobs_redis_url)
            self.jobs_client = self.jobs_server.client(decode=True)
            self.jobs_raw_client = self.jobs_server.client(decode=False)
        # What is about the sale as a whole lies with its only shard, or apart from all of them.
        several = len(self.shards) > 1
        self.board = Noticeboard(Link(Part(), self.jobs_server, 0) if several else self.first)
        self.brakes = SpreadBrakes([BrakeGateway(shard) for shard in self.shards])
        self.thread_line: ThreadLine | ThreadLines = self.first.thread_line
        loop_line: LoopLine | LoopLines = self.first.loop_line
        if several:
            self.thread_line = ThreadLines(self.shards)
            loop_line = LoopLines(self.shards)
        self.loop_line = Doorkeeper(loop_line, self.turn_away)

    def dealt(self, shards: int) -> list[Shard]:
        """Return the shards of the sale as it is, or was, dealt to so many."""
        # Whoever builds an app has filled in the URL (run/embedded.py).
        server = Server(self._settings.redis_url or "")

        def of(shard: int) -> tuple[str, int] | None:
            found = self._on_record()
            if found is None:
                return None
            name, issued = found
            return name, issued[shard] if shard < len(issued) else 0

        return [
            Shard(part, server.for_keys(Keys(part).prefix), self._settings, partial(of, number))
            for number, part in enumerate(Part(number, shards) for number in range(shards))
        ]

    def shard_of(self, user: User) -> Shard:
        """Return the shard that a shopper (in canonical form) belongs to."""
        return self.shards[place(user, len(self.shards)).shard]

    def shard_of_order(self, order_id: int) -> Shard:
        """Return the shard that has, or had, an order which this sale has issued."""
        return self.shards[order_id % len(self.shards)]

    def each(self, do: Callable[[Shard], Answer]) -> list[Answer]:
        """Have it done in every shard. Raises Unavailable where one fails, once all were asked."""
        return all_of(self.asked(do))

    def asked(self, do: Callable[[Shard], Answer]) -> list[Answer | Unavailable]:
        """Have it done in every shard; return what each answered, or why it could not."""
        return asked(self.shards, do)

    def gathered(self, question: Callable[[Shard], Question[Answer]]) -> list[Answer | Unavailable]:
        """Ask every shard, in one round trip for each node; answers as those of `asked`."""
        return gathered(self.shards, [question(shard) for shard in self.shards])

    def gathered_of_all(self, question: Callable[[Shard], Question[Answer]]) -> list[Answer]:
        """Ask every shard as `gathered`. Raises Unavailable where one can't be reached."""
        answers = self.gathered(question)
        return all_of(answers)

    def gathered_in_reach(self, question: Callable[[Shard], Question[Answer]]) -> list[Answer]:
        """Ask every shard as `gathered`. Raises Unavailable where none can be reached."""
        answers = self.gathered(question)
        return reached(answers)

    def claim(
        self,
        user: User,
        product_id: int,
        quantity: int,
        key: str | None,
        address: str,
        expected_cents: int | None = None,
        reference: str | None = None,
    ) -> Claim:
        """Decide one purchase, a `Request`, in one round trip.

        Raises Unavailable when Redis gave no answer: the order may or may not exist.
        """
        request = Request(user, product_id, quantity, key, address, expected_cents, reference)
        return self.thread_line.claim(request)

    def braked(self) -> Brakes:
        """Return (whether the whole sale is braked, ids of products with brakes of their own)."""
        return self.brakes.read()

    def put_product(self, product_id: int, version: int, terms: Terms) -> bool:
        """Publish the terms of sale; False when this or a later version is in force everywhere.

        Raises Pending where some shards have it now, and others can't be reached.
        """
        answers = self.gathered(lambda shard: shard.putting_product(product_id, version, terms))
        missing = away(answers)
        if 0 < len(missing) < len(answers):
            raise Pending(missing, answers[missing[0]])
        return any(all_of(answers))

    def put_new(
        self, generation: str | None, products: Sequence[tuple[int, int, Terms, int, int]]
    ) -> list[Moved]:
        """Publish new products and their first stock, dealt to all shards. See Moves.put_new."""

        def put(shard: Shard) -> list[tuple[int, int]]:
            dealt = [
                (product_id, version, terms, movement_id, shard.part.deals(units, movement_id))
                for product_id, version, terms, movement_id, units in products
            ]
            free = shard.put_new(generation, dealt)
            return [(of[-1], left) for of, left in zip(dealt, free, strict=True)]

        return [
            Moved("applied", sum(free for _, free in parts), self._parts(parts))
            for parts in zip(*self.each(put), strict=True)
        ]

    def _parts(self, parts: Iterable[tuple[int, int]]) -> list[int] | None:
        return [units for units, _ in parts] if len(self.shards) > 1 else None

    def move(
        self,
        generation: str | None,
        movement_id: int,
        product_id: int,
        units: int,
        user: User | None = None,
        ended: Ended | None = None,
    ) -> Moved:
        """Apply a `Movement` at most once, see Moves.move_all."""
        (moved,) = self.move_all(
            generation, [Movement(movement_id, product_id, units, user, ended)]
        )
        return moved

    def move_all(self, generation: str | None, movements: Sequence[Movement]) -> list[Moved]:
        """Apply stock movements, each at most once. See Moves.move_all.

        A shopper's go to the shopper's shard; others are dealt to all. What is taken from nobody in
        particular is gathered in one shard, as is what a shopper's shard lacks.
        """
        if len(self.shards) == 1:
            return [Moved(*moved) for moved in self.first.move_all(generation, movements)]
        moved = self._move_parts(generation, movements)
        short = [index for index, of in enumerate(moved) if of.outcome == "short"]
        if short and generation:
            for index in short:
                self._gather(generation, movements[index])
            again = self._move_parts(generation, [movements[index] for index in short])
            for index, of in zip(short, again, strict=True):
                moved[index] = of
        self._unseal({movement.product_id for movement in movements if movement.units > 0})
        return moved

    def _gather(self, generation: str, movement: Movement) -> None:
        """Have other shards lend the one that is to take a movement's units what it lacks."""
        (shard,) = self.parts_of(movement)
        names = names_of(self.shards, generation)
        steps = pull(names, shard, movement.product_id, -movement.units, gather=True)
        pulled = carry_out(self.shards, steps, MOST_SECONDS)
        if pulled and pulled.rest:
            carry_out(self.shards, ask_once(pulled.rest))

    def _unseal(self, product_ids: Iterable[int]) -> None:
        """Have claims in every shard look for units that have just come to some of them."""
        for product_id in product_ids:
            carry_out(self.shards, unseal(len(self.shards), product_id))

    def finish_lent(self, generation: str) -> int:
        """Give what shards lent a while ago, whoever died over it; return how much was done.

        What can't be reached is left for the next time.
        """
        if len(self.shards) == 1:
            return 0
        names = names_of(self.shards, generation)
        sources = range(len(self.shards))
        done = carry_out(self.shards, abreast([finish(names, source) for source in sources]))
        return sum(done or ())

    def _move_parts(self, generation: str | None, movements: Sequence[Movement]) -> list[Moved]:
        parts = [self.parts_of(movement) for movement in movements]

        def move(shard: Shard) -> dict[int, tuple[str, int]]:
            number = shard.part.shard
            mine = [index for index, part in enumerate(parts) if number in part]
            told = [movements[index]._replace(units=parts[index][number]) for index in mine]
            return dict(zip(mine, shard.move_all(generation, told), strict=True)) if told else {}

        moved = self.each(move)
        free = self._free({movement.product_id for movement in movements})
        return [
            self._moved(
                parts[index], [of[index] for of in moved if index in of], free[movement.product_id]
            )
            for index, movement in enumerate(movements)
        ]

    def parts_of(self, movement: Movement) -> dict[int, int]:
        """Return what each shard gets of a movement's units, the same whenever it is asked."""
        if movement.user is not None:
            return {self.shard_of(movement.user).part.shard: movement.units}
        if movement.units < 0:
            return {movement.movement_id % len(self.shards): movement.units}
        return {
            number: shard.part.deals(movement.units, movement.movement_id)
            for number, shard in enumerate(self.shards)
        }

    def _free(self, product_ids: Iterable[int]) -> dict[int, int]:
        products = self.view(sorted(product_ids)).products
        return defaultdict(int, {of: figures["free"] for of, figures in products.items()})

    def _moved(self, parts: dict[int, int], moved: list[tuple[str, int]], free: int) -> Moved:
        """Return what became of a movement by what became of its parts."""
        outcomes = {outcome for outcome, _ in moved}
        for outcome in ("unknown", "short", "capped", "applied"):
            if outcome in outcomes:
                break
        else:
            outcome = "repeated"
        return Moved(outcome, free, [parts.get(number, 0) for number in range(len(self.shards))])

    def move_expired(self, generation: str | None, movements: Sequence[Together]) -> list[Moved]:
        """Apply movements of orders that expired together, each at most once. See Moves.move_all.

        With one round trip to each shard.
        """
        if len(self.shards) == 1:
            return [Moved(*moved) for moved in self.first.move_expired(generation, movements)]
        of_each = [self.of_each_shard(movement.orders) for movement in movements]

        def move(shard: Shard) -> dict[int, tuple[str, int]]:
            parts = [by_shard[shard.part.shard] for by_shard in of_each]
            mine = [index for index, orders in enumerate(parts) if orders]
            told = [movements[index]._replace(orders=parts[index]) for index in mine]
            return dict(zip(mine, shard.move_expired(generation, told), strict=True))

        moved = self.each(move)
        products = {movement.product_id for movement in movements}
        self._unseal(products)
        free = self._free(products)
        return [
            self._moved(
                {number: sum(of.units for of in part) for number, part in enumerate(by_shard)},
                [of[index] for of in moved if index in of],
                free[movement.product_id],
            )
            for index, (movement, by_shard) in enumerate(zip(movements, of_each, strict=True))
        ]

    def of_each_shard(self, orders: Iterable[Expired]) -> list[list[Expired]]:
        """Return the orders by the shards of their shoppers."""
        by_shard: list[list[Expired]] = [[] for _ in self.shards]
        for order in orders:
            by_shard[self.shard_of(order.user).part.shard].append(order)
        return by_shard

    def put_held(
        self, generation: str, stored: dict[int, int], before: list[View | Unavailable]
    ) -> None:
        """Note how many units of each product may come back because they are held.

        `stored` is of orders in PostgreSQL, of whichever shard; `before` what shards held before
        PostgreSQL was asked. Raises Unavailable where none can be reached.
        """
        reached(before)
        asks: dict[Shard, Question[None]] = {
            shard: shard.putting_held(generation, held)
            for shard, view in zip(self.shards, before, strict=True)
            if not isinstance(view, Unavailable) and (held := _held(view, stored))
        }
        if asks:
            answers = gathered(list(asks), list(asks.values()))
            reached(answers)

    def keep_counts(self, product_ids: list[int]) -> None:
        """Write products' counts of refusals, as they stand, to the log of shards in reach."""
        self.gathered_in_reach(lambda shard: shard.keeping_counts(product_ids))

    def try_write(self) -> None:
        """Find out whether shards take writes. Raises Unavailable where none does."""
        self.gathered_in_reach(Shard.asking_to_write)

    def first_waiting(self) -> dict[int, bytes]:
        """Return the first order's stream id of each shard in reach in which one waits."""
        found = self.gathered(Shard.asking_first)
        reached(found)
        return {n: head for n, head in enumerate(found) if isinstance(head, bytes)}

    def queued_orders(self, user: User, most: int) -> list[tuple[int, Entry]]:
        """Return the user's orders that wait to be persisted, newest first."""
        return self.shard_of(user).queued_orders(user, most)

    def newest_waiting(self, most: int, before: int | None = None) -> list[tuple[int, Entry]]:
        """Return the waiting orders with the highest ids (below one), the highest first."""
        found = self.each(lambda shard: shard.newest_waiting(most, before))
        return sorted((entry for of in found for entry in of), key=lambda of: -of[0])[:most]

    def waiting_order(self, order_id: int) -> Entry | None:
        """Return an order that waits in the outbox, None when it does not."""
        return self.shard_of_order(order_id).waiting_order(order_id)

    def stand(self, generation: str, stream_id: str, entry: Entry, order_id: int) -> bool:
        """Let a replay of a dead letter's purchase tell `order_id`. See Outbox.stand."""
        return self.shard_of(entry.user).stand(generation, stream_id, entry, order_id)

    def new_order_id(self, user: User) -> int:
        """Issue an order id. Raises Unavailable; Unprepared when the counter can't be trusted."""
        return self.shard_of(user).new_order_id()

    def put_keys(self, keys: Iterable[tuple[User, str, str]]) -> int:
        """Write Idempotency-Keys: (user, key, its record, see entries.key_record) each."""
        by_shard: dict[int, list[tuple[User, str, str]]] = defaultdict(list)
        for of in keys:
            by_shard[self.shard_of(of[0]).part.shard].append(of)
        return sum(self.shards[shard].put_keys(of) for shard, of in by_shard.items())

    def view(self, product_ids: Sequence[int], others: Sequence[int] = ()) -> View:
        """Return what the shards that can be reached hold of these products, and of `others` sums.

        Raises Unavailable where none can.
        """
        if len(self.shards) == 1:
            return self.first.view(product_ids, others)
        views = self.views(product_ids, others)
        reached(views)
        return merged(dict(enumerate(views)))

    def views(
        self, product_ids: Sequence[int], others: Sequence[int] = ()
    ) -> list[View | Unavailable]:
        """Return what each shard holds, see Figures.asking_view."""
        return self.gathered(lambda shard: shard.asking_view(product_ids, others))

    def product_ids(self) -> list[int]:
        """Return the ids of the products on sale in Redis, ascending."""
        found = self.gathered_in_reach(Shard.asking_product_ids)
        return sorted({product_id for ids in found for product_id in ids})

    def waiting(self) -> int:
        """Return the number of orders claimed and not yet taken out of the outbox."""
        return sum(self.gathered_of_all(Shard.asking_waiting))

    def generation(self) -> str | None:
        """Return the name of the sale that the shards hold, None when they hold none.

        Of those that can be reached: one that is closed has none, and does not keep others from it.
        """
        names = {name for name in self.gathered_in_reach(Shard.asking_generation) if name}
        return " or ".join(sorted(names)) or None

    def clocks(self) -> list[datetime]:
        """Return the times by which the shards in reach judge claims, each its own node's."""
        return self.gathered_in_reach(Shard.asking_clock)

    def clock(self) -> datetime:
        """Return the time by which claims are judged, in whole milliseconds, rounded down."""
        failed = None
        for shard in self.shards:
            try:
                return shard.clock()
            except Unavailable as error:
                failed = failed or error
        raise failed or Unavailable

    def turn_away(self, refusals: dict[int, int]) -> None:
        """Count refusals for the user's limit that Redis was not asked about, by product id."""
        self.first.turn_away(refusals)


def _held(view: View, stored: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Return of each product of which units are, or were, held: those stored, those settled."""
    return {
        product_id: (units, figures.get("settled_units", 0))
        for product_id, units in stored.items()
        if (figures := view.products.get(product_id)) and (units or figures.get("held"))
    }
