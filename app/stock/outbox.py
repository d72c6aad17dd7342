"""The orders of a shard that are sold and not yet stored."""

import contextlib
from collections.abc import Iterable
from typing import Any, cast

from ..problems import Unprepared
from ..reading import User
from .entries import FAILED, Entry, former_key_record, key_record
from .link import Link, Question, asking
from .place import queued_score

# (stream id, fields) each, undecoded.
RawEntries = list[tuple[bytes, dict[bytes, bytes]]]


class Outbox(Link):
    """Reads them, and takes out what is stored. Every method raises Unavailable."""

    def asking_waiting(self) -> Question[int]:
        return Question([("XLEN", self.keys.outbox)], lambda answers: int(answers[0]))

    def waiting(self) -> int:
        """Return the number of orders claimed and not yet taken out of the outbox."""
        return self.ask(self.asking_waiting())

    def asking_first(self) -> Question[bytes | None]:
        """Ask for the stream id of the first order, as first_waiting does without waiting."""
        return Question(
            [("XRANGE", self.keys.outbox, "-", "+", "COUNT", 1)],
            lambda answers: answers[0][0][0].encode() if answers[0] else None,
        )

    def first_waiting(self, wait_ms: int) -> bytes | None:
        """Return the stream id of the first order; wait so long for one."""
        with asking():
            streams = self.raw_client.xread({self.keys.outbox: "0"}, count=1, block=wait_ms)
        found = cast("list[tuple[bytes, RawEntries]]", streams)
        return found[0][1][0][0] if found else None

    def read_outbox(self, count: int, after: str | None = None) -> RawEntries:
        """Return the oldest waiting entries, or those after a stream id, as (stream id, fields).

        Once replicas have them: what is stored must not be sold again by a promoted one.
        """
        with asking(), self.raw_client.pipeline(transaction=False) as pipe:
            pipe.xrange(self.keys.outbox, f"({after}" if after else "-", count=count)
            return cast("RawEntries", self.replicas.run(pipe)[0])

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
        args = [
            stream_ids[0],
            stream_ids[-1],
            self.named(generation),
            len(order_ids),
            len(products),
        ]
        args += order_ids
        for figures in products.values():
            args.extend(figures)
        keys = [
            self.keys.outbox,
            self.keys.queued,
            self.keys.generation,
            *(self.keys.product(product) for product in products),
        ]
        for order_id, entry in failed:
            if key := entry.idempotency_key:
                bucket, field = self.keys.idempotency(entry.user, key)
                keys += [bucket, self.keys.former_idempotency(entry.user, key)]
                args += [field, key_record(order_id, entry), former_key_record(order_id, entry)]
                args.append(key_record(order_id, entry, FAILED))
        return bool(self.run("settle", keys, args))

    def stand(self, generation: str, stream_id: str, entry: Entry, order_id: int) -> bool:
        """Let a replay of a dead letter's purchase tell `order_id`, under which it is stored.

        False while its entry has not left the outbox. Raises Unavailable; Unprepared when Redis
        holds another sale than `generation`.
        """
        if entry.idempotency_key is None:
            return True
        bucket, field = self.keys.idempotency(entry.user, entry.idempotency_key)
        former = self.keys.former_idempotency(entry.user, entry.idempotency_key)
        outcome = self.run(
            "stand",
            [self.keys.generation, self.keys.outbox, bucket, former],
            [self.named(generation), stream_id, field, key_record(order_id, entry)],
        )
        if outcome == "unprepared":
            raise Unprepared("the sale is not in Redis")
        return bool(outcome == "done")

    def new_order_id(self) -> int:
        """Issue an order id. Raises Unavailable; Unprepared when the counter can't be trusted."""
        with asking(), self.client.pipeline(transaction=False) as pipe:
            pipe.get(self.keys.generation)
            pipe.incrby(self.keys.order_ids, self.part.shards)
            generation, order_id = self.replicas.run(pipe)
        if generation is None:
            raise Unprepared("the sale is not in Redis")
        return int(order_id)

    def queued_orders(self, user: User, most: int) -> list[tuple[int, Entry]]:
        """Return the user's orders that wait to be persisted, newest first."""
        found = self.run(
            "queued", [self.keys.queued, self.keys.outbox], [queued_score(user), str(user), most]
        )
        return [(int(order_id), Entry.parse(text)) for order_id, text in found]

    def newest_waiting(self, most: int, before: int | None = None) -> list[tuple[int, Entry]]:
        """Return the orders that entered the outbox last (before an id), newest first."""
        newest = "+" if before is None else f"({before}-0"
        return self._entries(max=newest, min="-", count=most)

    def waiting_order(self, order_id: int) -> Entry | None:
        """Return an order that waits in the outbox, None when it does not."""
        found = self._entries(max=f"{order_id}-0", min=f"{order_id}-0", count=1)
        return found[0][1] if found else None

    def _entries(self, **bounds: Any) -> list[tuple[int, Entry]]:
        with asking():
            found = self.client.xrevrange(self.keys.outbox, **bounds)
        pairs = cast("list[tuple[str, dict[str, str]]]", found)
        entries = []
        for stream_id, fields in pairs:
            # What is no order at all becomes a dead letter, and is shown there.
            with contextlib.suppress(ValueError):
                entry = Entry.parse(fields.get("order", ""))
                entries.append((int(stream_id.partition("-")[0]), entry))
        return entries

    def outbox_ids(self) -> list[int]:
        """Return the ids of the orders that wait, ascending, read in pages."""
        ids: list[int] = []
        while True:
            start = f"({ids[-1]}-0" if ids else "-"
            with asking():
                page = self.raw_client.xrange(self.keys.outbox, start, "+", count=10_000)
            if not page:
                return ids
            ids += [int(stream_id.partition(b"-")[0]) for stream_id, _ in cast("RawEntries", page)]

    def queued_ids(self) -> set[int]:
        """Return the ids of the orders that a shopper is shown as waiting."""
        with asking():
            return set(map(int, cast("list[str]", self.client.zrange(self.keys.queued, 0, -1))))
