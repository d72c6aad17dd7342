"""Making a shard anew: closed, cleared, filled from PostgreSQL, opened."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

from ..problems import Unavailable
from ..reading import User
from .figures import Figures
from .link import asking
from .moves import Terms
from .servers import pack


class Remaking(Figures):
    """Closes, fills and opens it. Every method raises Unavailable."""

    def close(self, generation: str, issued: int = 0) -> bool:
        """Refuse every claim and movement from now on; tell whether this call did it.

        With `issued`, an order id surely given out, only if Redis has forgotten it.
        """
        return bool(
            self.run_surely(
                "close",
                [self.keys.generation, self.keys.order_ids],
                [self.named(generation), issued],
            )
        )

    def clear(self) -> None:
        """Delete every key of the sale; the generation first, which stops all claims.

        What the audit is still to be told stays.
        """
        with asking():
            self.client.delete(self.keys.generation)
            self._unlink(self.keys.prefix, keep={self.keys.brake_acts})

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
                      "settled_units", "persisted", "held", "sealed")  # fmt: skip
        with asking():
            self.client.unlink(
                self.keys.generation, self.keys.outbox, self.keys.queued, self.keys.movements,
                self.keys.sends, self.keys.sent,
            )  # fmt: skip
            self._unlink(self.keys.lent_prefix)
            self._unlink(self.keys.given_prefix)
            self._unlink(self.keys.bought_prefix)
            self._unlink(self.keys.idempotency_prefix)
            self._unlink(self.keys.former_idempotency_prefix)
            for product_id in self.product_ids():
                self.client.hdel(self.keys.product(product_id), *accounting)
            self.client.unlink(self.keys.products, self.keys.order_ids)

    def put_accounts(
        self,
        accounts: dict[int, dict[str, int]],
        terms: dict[int, tuple[int, Terms]],
    ) -> None:
        """Write the counters and (version, terms) of products that are not on sale yet."""
        with asking(), self.client.pipeline() as pipe:
            for product_id, account in accounts.items():
                version, values = terms[product_id]
                in_force = {name: "" if value is None else value for name, value in values.items()}
                # redis-py's type leaves out that a mapping may be of one kind of value.
                figures: Any = account | in_force | {"version": version}
                pipe.hset(self.keys.product(product_id), mapping=figures)
                pipe.sadd(self.keys.products, product_id)
            pipe.execute()

    def put_movements(self, bits: bytes) -> None:
        """Write which movements are applied, the first bit being that of movement 0."""
        with asking():
            self.raw_client.set(self.keys.movements, bits)

    def put_bought(self, buckets: Iterable[tuple[int, str, list[str], list[int]]]) -> None:
        """Write what users have bought: (product id, bucket, fields, units) each."""
        self._write(
            (
                "HSET",
                self.keys.bucket(product_id, bucket),
                *itertools.chain(*zip(fields, units, strict=True)),
            )
            for product_id, bucket, fields, units in buckets
        )

    def put_keys(self, keys: Iterable[tuple[User, str, str]]) -> int:
        """Write Idempotency-Keys: (user, key, its record, see entries.key_record) each."""
        return self._write(
            ("HSET", *self.keys.idempotency(user, key), record) for user, key, record in keys
        )

    def _write(self, commands: Iterable[tuple[Any, ...]]) -> int:
        """Send many commands at once, packed by hand: a pipeline takes 5 times as long."""
        packed = [pack(*map(str, command)) for command in commands]
        if not packed:
            return 0
        with asking():
            connection: Any = self.raw_client.connection_pool.get_connection()
            try:
                connection.send_packed_command([b"".join(packed)])
                for _ in packed:
                    connection.read_response()
            except BaseException:
                connection.disconnect()
                raise
            finally:
                self.raw_client.connection_pool.release(connection)
        return len(packed)

    def open(self, generation: str, first_order_id: int, made_on: str | None = None) -> None:
        """Let claims in: from here on order ids start at `first_order_id`.

        `made_on` is the server_id from when the sale began to be made. Raises Unavailable where it
        is another by now: that one may have the first half of what was written, or the second.
        """
        if made_on is not None and self.server_id() != made_on:
            raise Unavailable("Redis has failed over or restarted meanwhile: start again")
        with asking(), self.client.pipeline() as pipe:
            first = self.part.first_id(first_order_id)
            pipe.set(self.keys.order_ids, first - self.part.shards)
            pipe.set(self.keys.generation, self.part.generation(generation))
            pipe.execute()
