"""The Redis side of the sale: its scripts and their typed results. The only caller of the scripts.

Claims go by the hot roads of lines.py; everything else goes through an ordinary client here.
"""

import contextlib
import itertools
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import NamedTuple

import hiredis
import redis

from ..config import Settings
from ..problems import Unavailable, Unprepared
from ..reading import User
from .board import HISTORY_SAMPLES, Noticeboard
from .brakes import BrakeGateway, Brakes
from .doorkeeper import Doorkeeper
from .entries import FAILED, Entry, former_key_record, key_record
from .keys import Keys
from .lines import Claim, ClaimScript, LoopLine, Request, ThreadLine
from .outcomes import REFUSALS
from .place import queued_score
from .servers import Server

log = logging.getLogger(__name__)

# A product's terms of sale, in the order of put_product.lua.
TERMS = ("opens", "closes", "pause", "cap", "max", "price", "hold")


class Expired(NamedTuple):
    """An order that expired together with others; `record` is what its key says, if it has one."""

    user: User
    units: int
    key: str | None
    record: str


class Ended(NamedTuple):
    """An order that came with an Idempotency-Key, and its status now; standing() if it holds."""

    key: str
    order_id: int
    status: str


@dataclass(frozen=True)
class View:
    """What Redis holds of the sale at one instant, by product id."""

    generation: str
    last_order_id: int
    waiting: int
    oldest_claimed_ms: int | None
    applied_movements: frozenset[int]
    overlap: list[Entry]
    products: dict[int, dict[str, int]]
    brakes: Brakes


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


@dataclass(frozen=True)
class Accounts:
    """The Redis half of the ledger at one instant."""

    generation: str
    last_order_id: int
    waiting: int
    counted: bool
    applied_movements: frozenset[int]
    products: dict[int, Account]


def _publication(product_id: int, version: int, terms: dict[str, object]) -> tuple[list, list]:
    """Return keys and arguments of put_product.lua."""
    values = ["" if terms[name] is None else terms[name] for name in TERMS]
    keys = [Keys.generation, Keys.products, Keys.product(product_id)]
    return keys, [product_id, version, *values]


class Stock:
    """The sale in Redis. One for each app; safe to use from several threads."""

    def init_app(
        self, settings: Settings, on_record: Callable[[], tuple[str, int] | None] = lambda: None
    ) -> None:
        """Prepare the clients; nothing is connected before the first use.

        `on_record` tells the sale's name and an order id that it has issued: see lines.py.
        """
        # Whoever builds an app has filled in the URL (run/embedded.py).
        self.server = Server(settings.redis_url or "")
        self.client = self.server.client(decode=True)
        # RQ, and the drain's batches, want answers undecoded.
        self.raw_client = self.server.client(decode=False)
        # What is no part of the sale: RQ, limits of other routes, who is signed in. To lose it
        # loses no order, and it may be a server of its own.
        self.jobs_server, self.jobs_client = self.server, self.client
        self.jobs_raw_client = self.raw_client
        if settings.jobs_redis_url:
            self.jobs_server = Server(settings.jobs_redis_url)
            self.jobs_client = self.jobs_server.client(decode=True)
            self.jobs_raw_client = self.jobs_server.client(decode=False)
        scripts = {
            path.name.removesuffix(".lua"): path.read_text()
            for path in resources.files("app.stock.lua").iterdir()
            if path.name.endswith(".lua")
        }
        script = ClaimScript(scripts.pop("claim"), settings)
        self._scripts = {name: self.client.register_script(text) for name, text in scripts.items()}
        self.replicas = script.replicas
        self.board = Noticeboard(self.client, self.raw_client, self._run)
        self.brakes = BrakeGateway(self.client, self._run_surely)
        self.thread_line = ThreadLine(self.server, script, on_record)
        self.loop_line = Doorkeeper(LoopLine(self.server, script, on_record), self.turn_away)

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

    def _run(self, name: str, keys: list, args: list):
        try:
            return self._scripts[name](keys=keys, args=args)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def _run_surely(self, name: str, keys: list, args: list):
        """Run a script; return once replicas have what it wrote, and what it read.

        Raises Unavailable, also when too few replicas answer: then it is done all the same.
        """
        if not self.replicas.count:
            return self._run(name, keys, args)
        try:
            with self.client.pipeline(transaction=False) as pipe:
                self._scripts[name](keys=keys, args=args, client=pipe)
                return self.replicas.run(pipe)[0]
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def check_replicas(self) -> None:
        """Raise Unavailable unless as many replicas as are asked for have all that there is."""
        if self.replicas.count:
            try:
                with self.client.pipeline(transaction=False) as pipe:
                    self.replicas.run(pipe)
            except redis.RedisError as error:
                raise Unavailable(str(error)) from error

    def braked(self) -> Brakes:
        """Return (whether the whole sale is braked, ids of products with brakes of their own)."""
        return self.brakes.read()

    def put_product(self, product_id: int, version: int, terms: dict[str, object]) -> bool:
        """Publish the terms of sale; False when this or a later version is in force already.

        `terms` holds TERMS: opens and closes in ms since 1970, None where there is none.
        """
        outcome = self._run("put_product", *_publication(product_id, version, terms))
        if outcome == "unprepared":
            raise Unprepared("the sale is not in Redis")
        return outcome == "published"

    def put_new(
        self, generation: str | None, products: Iterable[tuple[int, int, dict, int, int]]
    ) -> list[int]:
        """Publish new products and their first stock, all in one round trip; return what is free.

        Each is (id, version, terms, id of the movement, its units), and may be there already.
        Raises Unprepared when Redis holds another sale than `generation`.
        """
        try:
            with self.client.pipeline(transaction=False) as pipe:
                for product_id, version, terms, movement_id, units in products:
                    keys, args = _publication(product_id, version, terms)
                    self._scripts["put_product"](keys, args, client=pipe)
                    keys = [Keys.generation, Keys.movements, Keys.product(product_id)]
                    args = [movement_id, units, generation or ""]
                    self._scripts["move"](keys, args, client=pipe)
                moved = pipe.execute()[1::2]
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        if any(outcome == "unprepared" for outcome, _ in moved):
            raise Unprepared("the sale is not in Redis")
        return [free for _, free in moved]

    def move(
        self,
        generation: str | None,
        movement_id: int,
        product_id: int,
        units: int,
        user: User | None = None,
        ended: Ended | None = None,
    ) -> tuple[str, int]:
        """Apply a stock movement at most once: (what became of it, free stock).

        That is applied | repeated | short (too few are free) | capped (the user has bought too
        many) | unknown (there is no such product).

        With `user` the units also go back to what this user may still buy, and a replay of the
        purchase with the key of the order that `ended` tells what has become of it. Raises
        Unprepared when Redis holds another sale than `generation`.
        """
        (moved,) = self.move_all(generation, [(movement_id, product_id, units, user, ended)])
        return moved

    def move_all(
        self,
        generation: str | None,
        movements: Iterable[tuple[int, int, int, User | None, Ended | None]],
    ) -> list[tuple[str, int]]:
        """Apply movements as `move` does each, all of them in one round trip."""
        move = self._scripts["move"]
        try:
            with self.client.pipeline(transaction=False) as pipe:
                for movement_id, product_id, units, user, ended in movements:
                    keys = [Keys.generation, Keys.movements, Keys.product(product_id)]
                    args = [movement_id, units, generation or ""]
                    if user is not None:
                        bucket, field = Keys.bought(product_id, user)
                        keys.append(bucket)
                        args.append(field)
                        if ended:
                            name, field = Keys.idempotency(user, ended.key)
                            keys += [name, Keys.former_idempotency(user, ended.key)]
                            args += [field, ended.order_id, ended.status]
                    move(keys=keys, args=args, client=pipe)
                moved = self.replicas.run(pipe)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        if any(outcome == "unprepared" for outcome, _ in moved):
            raise Unprepared("the sale is not in Redis")
        return [(outcome, free) for outcome, free in moved]

    def move_expired(
        self,
        generation: str | None,
        movement_id: int,
        product_id: int,
        orders: Iterable[Expired],
    ) -> tuple[str, int]:
        """Apply the movement of orders that expired together, as `move` does of one."""
        bought: dict[str, list[str | int]] = defaultdict(list)
        records: dict[str, list[str | int]] = defaultdict(list)
        units = 0
        for order in orders:
            bucket, field = Keys.bought(product_id, order.user)
            bought[bucket] += field, order.units
            units += order.units
            if order.key is not None:
                bucket, field = Keys.idempotency(order.user, order.key)
                records[bucket] += field, order.record
        args: list[str | int] = [movement_id, units, generation or "", len(bought)]
        for pairs in (*bought.values(), *records.values()):
            args += len(pairs) // 2, *pairs
        keys = [Keys.generation, Keys.movements, Keys.product(product_id), *bought, *records]
        outcome, free = self._run("move_expired", keys, args)
        if outcome == "unprepared":
            raise Unprepared("the sale is not in Redis")
        return outcome, free

    def put_held(self, generation: str, units: dict[int, int]) -> None:
        """Note how many units of each product are held by stored orders."""
        keys = [Keys.generation, *map(Keys.product, units)]
        self._run("put_held", keys, [generation, *units.values()])

    def queued_orders(self, user: User, most: int) -> list[tuple[int, Entry]]:
        """Return the user's orders that wait to be persisted, newest first."""
        found = self._run(
            "queued", [Keys.queued, Keys.outbox], [queued_score(user), str(user), most]
        )
        return [(int(order_id), Entry.parse(text)) for order_id, text in found]

    def read_outbox(
        self, count: int, after: str | None = None
    ) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """Return the oldest waiting entries, or those after a stream id, as (stream id, fields).

        Once replicas have them: what is stored must not be sold again by a promoted one.
        """
        try:
            with self.raw_client.pipeline(transaction=False) as pipe:
                pipe.xrange(Keys.outbox, f"({after}" if after else "-", count=count)
                return self.replicas.run(pipe)[0]
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def settle(
        self,
        generation: str | None,
        stream_ids: list[str],
        order_ids: list[int],
        products: dict[int, tuple[int, int, int]],
        failed: Iterable[tuple[int, Entry]] = (),
    ) -> bool:
        """Take a stored batch out of the outbox; False when somebody did it already.

        `generation` is the sale that the batch was read from: a reset in between starts ids anew.
        `products` maps a product id to (orders, units, orders persisted) of the batch; `failed`
        are (order id, order) of its dead letters.
        """
        args = [stream_ids[0], stream_ids[-1], generation or "", len(order_ids), len(products)]
        args += order_ids
        for figures in products.values():
            args.extend(figures)
        keys = [
            Keys.outbox,
            Keys.queued,
            Keys.generation,
            *(Keys.product(product) for product in products),
        ]
        for order_id, entry in failed:
            if key := entry.idempotency_key:
                bucket, field = Keys.idempotency(entry.user, key)
                keys += [bucket, Keys.former_idempotency(entry.user, key)]
                args += [field, key_record(order_id, entry), former_key_record(order_id, entry)]
                args.append(key_record(order_id, entry, FAILED))
        return bool(self._run("settle", keys, args))

    def view(
        self,
        product_ids: list[int],
        stored_through: int | None = None,
        movement_ids: list[int] | tuple[int, ...] = (),
        surely: bool = False,
    ) -> View:
        """Return what Redis holds, read at one instant.

        `stored_through` asks for the entries up to this id that are still in the outbox,
        `movement_ids` which of these movements are applied. Unknown products are left out.
        `surely` waits until replicas have it all.
        """
        keys = [Keys.generation, Keys.movements, Keys.outbox, Keys.order_ids, Keys.brakes]
        keys += [Keys.product(product_id) for product_id in product_ids]
        through = "" if stored_through is None else stored_through
        run = self._run_surely if surely else self._run
        generation, last, waiting, head, applied, overlap, brakes, hashes = run(
            "view", keys, [through, *movement_ids]
        )
        products = {}
        for product_id, flat in zip(product_ids, hashes, strict=True):
            if flat:
                fields = dict(zip(flat[::2], flat[1::2], strict=True))
                fields.pop("price")
                products[product_id] = {
                    name: int(value) for name, value in fields.items() if value != ""
                }
        oldest = None
        with contextlib.suppress(ValueError):
            oldest = Entry.parse(head).claimed_ms
        return View(
            generation=generation,
            last_order_id=int(last),
            waiting=waiting,
            oldest_claimed_ms=oldest,
            applied_movements=frozenset(map(int, applied)),
            overlap=[Entry.parse(text) for text in overlap],
            products=products,
            brakes=Brakes.parse(brakes),
        )

    def accounts(
        self,
        product_ids: list[int],
        stored_through: int,
        movement_ids: list[int],
        count_up_to: int,
    ) -> Accounts:
        """Return the Redis half of the ledger, read at one instant.

        `stored_through` is the last order id known to be stored. An outbox of at most `count_up_to`
        orders is counted entry by entry, which takes about 1 µs each and delays claims meanwhile.
        """
        keys = [Keys.generation, Keys.movements, Keys.outbox, Keys.order_ids]
        keys += [Keys.product(product_id) for product_id in product_ids]
        generation, last, waiting, counted, applied, accounts = self._run(
            "account",
            keys,
            [stored_through, count_up_to, len(product_ids), *product_ids, *movement_ids],
        )
        return Accounts(
            generation=generation,
            last_order_id=int(last),
            waiting=waiting,
            counted=bool(counted),
            applied_movements=frozenset(map(int, applied)),
            products={
                product_id: Account(bool(account[0]), *account[1:])
                for product_id, account in zip(product_ids, accounts, strict=True)
            },
        )

    def outbox_ids(self) -> list[int]:
        """Return the ids of the orders that wait, ascending, read in pages."""
        ids: list[int] = []
        while True:
            start = f"({ids[-1]}-0" if ids else "-"
            try:
                page = self.raw_client.xrange(Keys.outbox, start, "+", count=10_000)
            except redis.RedisError as error:
                raise Unavailable(str(error)) from error
            if not page:
                return ids
            ids += [int(stream_id.partition(b"-")[0]) for stream_id, _ in page]

    def queued_ids(self) -> set[int]:
        """Return the ids of the orders that a shopper is shown as waiting."""
        try:
            return set(map(int, self.client.zrange(Keys.queued, 0, -1)))
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def unapplied_movements(self, movement_ids: list[int]) -> list[int]:
        """Return those of the movements that Redis has not applied."""
        unapplied = []
        try:
            for start in range(0, len(movement_ids), 10_000):
                page = movement_ids[start : start + 10_000]
                with self.client.pipeline(transaction=False) as pipe:
                    for movement_id in page:
                        pipe.getbit(Keys.movements, movement_id)
                    bits = pipe.execute()
                unapplied += [m for m, bit in zip(page, bits, strict=True) if not bit]
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        return unapplied

    def mend(self, generation: str, product_id: int, take: int, amounts: dict[str, int]) -> int:
        """Lower a product's free stock, add to its counters; return the units taken, or -1."""
        args = [generation, take, *(word for pair in amounts.items() for word in pair)]
        return self._run("mend", [Keys.generation, Keys.product(product_id)], args)

    def keep_counts(self, product_ids: list[int]) -> None:
        """Write these products' counts of refusals, as they stand, to Redis's log."""
        keys = [Keys.refused, *map(Keys.product, product_ids)]
        self._run("keep", keys, list(REFUSALS))

    def turn_away(self, refusals: dict[int, int]) -> None:
        """Count refusals for the user's limit that Redis was not asked about, by product id."""
        keys = [Keys.refused, *map(Keys.product, refusals)]
        self._run("turn_away", keys, list(refusals.values()))

    def close(self, generation: str, issued: int = 0) -> bool:
        """Refuse every claim and movement from now on; tell whether this call did it.

        With `issued`, an order id surely given out, only if Redis has forgotten it.
        """
        return bool(
            self._run_surely("close", [Keys.generation, Keys.order_ids], [generation, issued])
        )

    def product_ids(self) -> list[int]:
        """Return the ids of the products on sale in Redis, ascending."""
        try:
            return sorted(map(int, self.client.smembers(Keys.products)))
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def waiting(self) -> int:
        """Return the number of orders claimed and not yet taken out of the outbox."""
        try:
            return self.client.xlen(Keys.outbox)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def generation(self) -> str | None:
        """Return the name of the sale that Redis holds, None when it holds none."""
        try:
            return self.client.get(Keys.generation)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def newest_waiting(self, most: int, before: int | None = None) -> list[tuple[int, Entry]]:
        """Return the orders that entered the outbox last (before an id), newest first."""
        newest = "+" if before is None else f"({before}-0"
        return self._entries(max=newest, min="-", count=most)

    def waiting_order(self, order_id: int) -> Entry | None:
        """Return an order that waits in the outbox, None when it does not."""
        found = self._entries(max=f"{order_id}-0", min=f"{order_id}-0", count=1)
        return found[0][1] if found else None

    def _entries(self, **bounds: object) -> list[tuple[int, Entry]]:
        try:
            found = self.client.xrevrange(Keys.outbox, **bounds)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        entries = []
        for stream_id, fields in found:
            # What is no order at all becomes a dead letter, and is shown there.
            with contextlib.suppress(ValueError):
                entry = Entry.parse(fields.get("order", ""))
                entries.append((int(stream_id.partition("-")[0]), entry))
        return entries

    def history(
        self, since: int, most: int = HISTORY_SAMPLES, by_minute: bool = False
    ) -> list[tuple[int, dict]]:
        """Return the newest `most` samples from the second `since` on, oldest first.

        They are a second apart, or with `by_minute` a minute.
        """
        key = Keys.history_by_minute if by_minute else Keys.history
        try:
            found = self.client.xrevrange(key, min=f"{since}-0", count=most)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        return [
            (int(stream_id.partition("-")[0]), json.loads(fields["sample"]))
            for stream_id, fields in reversed(found)
        ]

    def clock(self) -> datetime:
        """Return the time by which claims are judged, in whole milliseconds, rounded down."""
        try:
            seconds, microseconds = self.client.time()
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        whole = datetime.fromtimestamp(seconds, UTC)
        return whole.replace(microsecond=microseconds // 1000 * 1000)

    def clear(self) -> None:
        """Delete every key of the sale; the generation first, which stops all claims.

        What the audit is still to be told stays.
        """
        try:
            self.client.delete(Keys.generation)
            self._unlink(Keys.prefix, keep={Keys.brake_acts})
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def _unlink(self, prefix: str, keep: Collection[str] = ()) -> None:
        """Delete every key that begins so, in pages: there may be millions."""
        cursor = 0
        while True:
            cursor, found = self.client.scan(
                cursor, match=prefix.replace("{", "\\{") + "*", count=5000
            )
            found = [key for key in found if key not in keep]
            if found:
                self.client.unlink(*found)
            if not cursor:
                return

    def clear_sale(self) -> None:
        """Delete what a rebuild makes anew; rates, samples and counts of refusals stay."""
        accounting = ("version", "free", "moved", "accepted", "claimed", "settled",
                      "settled_units", "persisted", "held")  # fmt: skip
        try:
            self.client.unlink(Keys.generation, Keys.outbox, Keys.queued, Keys.movements)
            self._unlink(Keys.bought_prefix)
            self._unlink(Keys.idempotency_prefix)
            self._unlink(Keys.former_idempotency_prefix)
            for product_id in self.product_ids():
                self.client.hdel(Keys.product(product_id), *accounting)
            self.client.unlink(Keys.products, Keys.order_ids)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def put_accounts(
        self,
        accounts: dict[int, dict[str, int]],
        terms: dict[int, tuple[int, dict[str, object]]],
    ) -> None:
        """Write the counters and (version, terms) of products that are not on sale yet."""
        try:
            with self.client.pipeline() as pipe:
                for product_id, account in accounts.items():
                    version, values = terms[product_id]
                    in_force = {
                        name: "" if value is None else value for name, value in values.items()
                    }
                    pipe.hset(
                        Keys.product(product_id),
                        mapping={**account, **in_force, "version": version},
                    )
                    pipe.sadd(Keys.products, product_id)
                pipe.execute()
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def put_movements(self, bits: bytes) -> None:
        """Write which movements are applied, the first bit being that of movement 0."""
        try:
            self.raw_client.set(Keys.movements, bits)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def put_bought(
        self, buckets: Iterable[tuple[int, int | str, list[int] | list[str], list[int]]]
    ) -> None:
        """Write what users have bought: (product id, bucket, fields, units) each."""
        self._write(
            (
                "HSET",
                Keys.bucket(product_id, bucket),
                *itertools.chain(*zip(fields, units, strict=True)),
            )
            for product_id, bucket, fields, units in buckets
        )

    def put_keys(self, keys: Iterable[tuple[User, str, str]]) -> int:
        """Write Idempotency-Keys: (user, key, its record, see entries.key_record) each."""
        return self._write(
            ("HSET", *Keys.idempotency(user, key), record) for user, key, record in keys
        )

    def _write(self, commands: Iterable[tuple]) -> int:
        """Send many commands at once, packed by hand: a pipeline takes 5 times as long."""
        packed = [hiredis.pack_command(tuple(map(str, command))) for command in commands]
        if not packed:
            return 0
        try:
            connection = self.raw_client.connection_pool.get_connection()
            try:
                connection.send_packed_command([b"".join(packed)])
                for _ in packed:
                    connection.read_response()
            except BaseException:
                connection.disconnect()
                raise
            finally:
                self.raw_client.connection_pool.release(connection)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        return len(packed)

    def new_order_id(self) -> int:
        """Issue an order id. Raises Unavailable; Unprepared when the counter can't be trusted."""
        try:
            with self.client.pipeline(transaction=False) as pipe:
                pipe.get(Keys.generation)
                pipe.incr(Keys.order_ids)
                generation, order_id = self.replicas.run(pipe)
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
        if generation is None:
            raise Unprepared("the sale is not in Redis")
        return order_id

    def stand(self, generation: str, stream_id: str, entry: Entry, order_id: int) -> bool:
        """Let a replay of a dead letter's purchase tell `order_id`, under which it is stored.

        False while its entry has not left the outbox. Raises Unavailable; Unprepared when Redis
        holds another sale than `generation`.
        """
        if entry.idempotency_key is None:
            return True
        bucket, field = Keys.idempotency(entry.user, entry.idempotency_key)
        former = Keys.former_idempotency(entry.user, entry.idempotency_key)
        outcome = self._run(
            "stand",
            [Keys.generation, Keys.outbox, bucket, former],
            [generation, stream_id, field, key_record(order_id, entry)],
        )
        if outcome == "unprepared":
            raise Unprepared("the sale is not in Redis")
        return outcome == "done"

    def attached_replicas(self) -> int:
        """Return how many replicas Redis has, in step or not."""
        try:
            return int(self.client.info("replication")["connected_slaves"])
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def server_id(self) -> str:
        """Return what tells this Redis from every other, and from itself before a restart."""
        try:
            with self.client.pipeline(transaction=False) as pipe:
                pipe.info("server")
                return str(self.replicas.run(pipe)[0]["run_id"])
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error

    def open(self, generation: str, first_order_id: int, made_on: str | None = None) -> None:
        """Let claims in: from here on order ids start at `first_order_id`.

        `made_on` is the server_id from when the sale began to be made. Raises Unavailable where it
        is another by now: that one may have the first half of what was written, or the second.
        """
        if made_on is not None and self.server_id() != made_on:
            raise Unavailable("Redis has failed over or restarted meanwhile: start again")
        try:
            with self.client.pipeline() as pipe:
                pipe.set(Keys.order_ids, first_order_id - 1)
                pipe.set(Keys.generation, generation)
                pipe.execute()
        except redis.RedisError as error:
            raise Unavailable(str(error)) from error
