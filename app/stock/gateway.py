"""The sale in Redis, over all its shards. Whoever is about one shopper or order asks its shard."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from ..config import Settings
from ..reading import User
from .board import Noticeboard
from .brakes import BrakeGateway, Brakes
from .claims import Claim, Request
from .doorkeeper import Doorkeeper
from .entries import Entry
from .figures import View
from .moves import Ended, Expired, Movement, Terms
from .place import place
from .servers import Server
from .shard import Shard
from .shards import Part


class Stock:
    """One for each app; safe to use from several threads."""

    def init_app(
        self, settings: Settings, on_record: Callable[[], tuple[str, int] | None] = lambda: None
    ) -> None:
        """Prepare the clients; nothing is connected before the first use.

        `on_record` tells the sale's name and an order id that it has issued: see claims.py.
        """
        # Whoever builds an app has filled in the URL (run/embedded.py).
        server = Server(settings.redis_url or "")
        self.shards = [Shard(Part(), server, settings, on_record)]
        (self.first,) = self.shards
        self.client, self.raw_client = self.first.client, self.first.raw_client
        # What is no part of the sale: RQ, limits of other routes, who is signed in. To lose it
        # loses no order, and it may be a server of its own.
        self.jobs_server, self.jobs_client = server, self.client
        # RQ wants answers undecoded.
        self.jobs_raw_client = self.raw_client
        if settings.jobs_redis_url:
            self.jobs_server = Server(settings.jobs_redis_url)
            self.jobs_client = self.jobs_server.client(decode=True)
            self.jobs_raw_client = self.jobs_server.client(decode=False)
        self.board = Noticeboard(self.first)
        self.brakes = BrakeGateway(self.first)
        self.thread_line = self.first.thread_line
        self.loop_line = Doorkeeper(self.first.loop_line, self.turn_away)

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

    def shard_of(self, user: User) -> Shard:
        """Return the shard that a shopper (in canonical form) belongs to."""
        return self.shards[place(user, len(self.shards)).shard]

    def shard_of_order(self, order_id: int) -> Shard:
        """Return the shard that has, or had, an order which this sale has issued."""
        return self.shards[order_id % len(self.shards)]

    def braked(self) -> Brakes:
        """Return (whether the whole sale is braked, ids of products with brakes of their own)."""
        return self.brakes.read()

    def put_product(self, product_id: int, version: int, terms: Terms) -> bool:
        """Publish the terms of sale; False when this or a later version is in force already."""
        return self.first.put_product(product_id, version, terms)

    def put_new(
        self, generation: str | None, products: Iterable[tuple[int, int, Terms, int, int]]
    ) -> list[int]:
        """Publish new products and their first stock; return what is free. See Moves.put_new."""
        return self.first.put_new(generation, products)

    def move(
        self,
        generation: str | None,
        movement_id: int,
        product_id: int,
        units: int,
        user: User | None = None,
        ended: Ended | None = None,
    ) -> tuple[str, int]:
        """Apply a `Movement` at most once: (what became of it, free stock), see move_all."""
        (moved,) = self.move_all(
            generation, [Movement(movement_id, product_id, units, user, ended)]
        )
        return moved

    def move_all(
        self, generation: str | None, movements: Iterable[Movement]
    ) -> list[tuple[str, int]]:
        """Apply stock movements, each at most once. See Moves.move_all."""
        return self.first.move_all(generation, movements)

    def move_expired(
        self, generation: str | None, movement_id: int, product_id: int, orders: Iterable[Expired]
    ) -> tuple[str, int]:
        """Apply the movement of orders that expired together, as `move` does of one."""
        return self.first.move_expired(generation, movement_id, product_id, orders)

    def put_held(self, generation: str, units: dict[int, int]) -> None:
        """Note how many units of each product are held by stored orders."""
        self.first.put_held(generation, units)

    def queued_orders(self, user: User, most: int) -> list[tuple[int, Entry]]:
        """Return the user's orders that wait to be persisted, newest first."""
        return self.shard_of(user).queued_orders(user, most)

    def newest_waiting(self, most: int, before: int | None = None) -> list[tuple[int, Entry]]:
        """Return the orders that entered the outbox last (before an id), newest first."""
        return self.first.newest_waiting(most, before)

    def waiting_order(self, order_id: int) -> Entry | None:
        """Return an order that waits in the outbox, None when it does not."""
        return self.shard_of_order(order_id).waiting_order(order_id)

    def stand(self, generation: str, stream_id: str, entry: Entry, order_id: int) -> bool:
        """Let a replay of a dead letter's purchase tell `order_id`. See Outbox.stand."""
        return self.shard_of(entry.user).stand(generation, stream_id, entry, order_id)

    def new_order_id(self, user: User) -> int:
        """Issue an order id. Raises Unavailable; Unprepared when the counter can't be trusted."""
        return self.shard_of(user).new_order_id()

    def view(self, product_ids: list[int], movement_ids: Sequence[int] = ()) -> View:
        """Return what Redis holds, read at one instant. See Figures.view."""
        return self.first.view(product_ids, movement_ids=movement_ids)

    def product_ids(self) -> list[int]:
        """Return the ids of the products on sale in Redis, ascending."""
        return self.first.product_ids()

    def waiting(self) -> int:
        """Return the number of orders claimed and not yet taken out of the outbox."""
        return self.first.waiting()

    def generation(self) -> str | None:
        """Return the name of the sale that Redis holds, None when it holds none."""
        return self.first.generation()

    def turn_away(self, refusals: dict[int, int]) -> None:
        """Count refusals for the user's limit that Redis was not asked about, by product id."""
        self.first.turn_away(refusals)

    def clock(self) -> datetime:
        """Return the time by which claims are judged, in whole milliseconds, rounded down."""
        return self.first.clock()
