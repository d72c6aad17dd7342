"""The names of every key in Redis."""

from ..reading import User
from .place import place
from .shards import WHOLE, Part


class Keys:
    """Every Redis key of a shard. All have its tag, so that they lie together also in a cluster."""

    def __init__(self, part: Part) -> None:
        self._shards = part.shards
        self.prefix = prefix = f"sale:{{{part.tag}}}:"
        self.generation = f"{prefix}generation"
        # Never written: deleting it does nothing, but only a server that takes writes lets that be
        # tried.
        self.nothing = f"{prefix}nothing"
        # Written to see that replicas have everything before it: see replicas.py.
        self.fence = f"{prefix}fence"
        self.outbox = f"{prefix}outbox"
        self.queued = f"{prefix}queued"
        self.order_ids = f"{prefix}order-ids"
        self.movements = f"{prefix}movements"
        self.products = f"{prefix}products"
        self.refused = f"{prefix}refused"
        self.history = f"{prefix}history"
        self.history_by_minute = f"{prefix}history-by-minute"
        self.drain_lease = f"{prefix}drain-lease"
        # The newest ledger check, as JSON; and whose turn the next one is.
        self.ledger = f"{prefix}ledger"
        self.ledger_turn = f"{prefix}ledger-turn"
        self.telemetry = f"{prefix}telemetry"
        self.processes = f"{prefix}processes"
        self.workers = f"{prefix}workers"
        self.webhook_lease_prefix = f"{prefix}webhook-lease:"
        # Where the feed of events ends: "epoch number".
        self.feed_head = f"{prefix}feed-head"
        # What pages show of a product when PostgreSQL is away, as JSON by product id.
        self.shelf = f"{prefix}shelf"
        # Attempts of users, addresses and networks, in two hashes by turns: see claim.lua.
        self.attempts = (f"{prefix}attempts:0", f"{prefix}attempts:1")
        # Which brakes are set, of each the newest act, and acts that the audit lacks.
        self.brakes = f"{prefix}brakes"
        self.brake_marks = f"{prefix}brake-marks"
        self.brake_acts = f"{prefix}brake-acts"
        self.bought_prefix = f"{prefix}bought:"
        self.idempotency_prefix = f"{prefix}keys:"
        self.former_idempotency_prefix = f"{prefix}key:"
        # What shards lend each other: see dealing.py.
        self.sends = f"{prefix}sends"
        self.sent = f"{prefix}sent"
        self.lent_prefix = f"{prefix}lent:"
        self.given_prefix = f"{prefix}given:"
        self._product_prefix = f"{prefix}product:"
        self._key_prefix = f"{prefix}brake-key:"
        self._address_units_prefix = f"{prefix}address-units:"

    def product(self, product_id: int) -> str:
        return f"{self._product_prefix}{product_id}"

    def lent(self, product_id: int) -> str:
        """Return the hash of what of a product was sent to other shards and received from them."""
        return f"{self.lent_prefix}{product_id}"

    def given(self, source: int) -> str:
        """Return the bits of another shard's entries that were given here."""
        return f"{self.given_prefix}{source}"

    def brake_key(self, key: str) -> str:
        return f"{self._key_prefix}{key}"

    def address_units(self, product_id: int) -> str:
        return f"{self._address_units_prefix}{product_id}"

    def bought(self, product_id: int, user: User) -> tuple[str, str]:
        """Return the hash and the field that count the units a user bought of a product."""
        _, bucket, field = place(user, self._shards)
        return self.bucket(product_id, bucket), field

    def bucket(self, product_id: int, bucket: str) -> str:
        return f"{self.bought_prefix}{product_id}:{bucket}"

    def idempotency(self, user: User, key: str) -> tuple[str, str]:
        """Return the hash and the field that hold the record of a user's Idempotency-Key.

        A blank is in neither alphabet, so no two pairs of user and key share a field.
        """
        _, bucket, field = place(user, self._shards)
        return f"{self.idempotency_prefix}{bucket}", f"{field} {key}"

    def former_idempotency(self, user: User, key: str) -> str:
        """Return where 0.1.0 kept the record; of a text, which it did not know, there is none."""
        if isinstance(user, int):
            return f"{self.former_idempotency_prefix}{user}:{key}"
        return self.nothing


# Of a sale's only shard; and the first one's names, but for a shopper's, in every sale.
KEYS = Keys(WHOLE)


class StaffKeys:
    """Redis keys of who is signed in. No part of the sale, so that no reset signs anybody out."""

    @staticmethod
    def session(session_id: str) -> str:
        return f"staff:session:{session_id}"

    @staticmethod
    def bar(subject: int | str) -> str:
        """Of a person (by number) or a session: up to when records of it do not count."""
        return f"staff:bar:{subject}"

    @staticmethod
    def known_address(staff_id: int, client: str) -> str:
        """Of a client (addresses.py) that a person has signed in from."""
        return f"staff:known:{staff_id}:{client}"
