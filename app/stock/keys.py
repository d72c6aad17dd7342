"""The names of every key in Redis."""

from ..reading import User
from .place import place


class Keys:
    """Every Redis key of the sale. The tag {0} names the shard; a shopper's keys all share one."""

    prefix = "sale:{0}:"
    generation = "sale:{0}:generation"
    # Never written: deleting it does nothing, but only a server that takes writes lets it be tried.
    nothing = "sale:{0}:nothing"
    # Written to see that replicas have everything before it: see replicas.py.
    fence = "sale:{0}:fence"
    outbox = "sale:{0}:outbox"
    queued = "sale:{0}:queued"
    order_ids = "sale:{0}:order-ids"
    movements = "sale:{0}:movements"
    products = "sale:{0}:products"
    refused = "sale:{0}:refused"
    history = "sale:{0}:history"
    history_by_minute = "sale:{0}:history-by-minute"
    drain_lease = "sale:{0}:drain-lease"
    # The newest ledger check, as JSON; and whose turn the next one is.
    ledger = "sale:{0}:ledger"
    ledger_turn = "sale:{0}:ledger-turn"
    telemetry = "sale:{0}:telemetry"
    processes = "sale:{0}:processes"
    workers = "sale:{0}:workers"
    webhook_lease_prefix = "sale:{0}:webhook-lease:"
    # Where the feed of events ends: "epoch number".
    feed_head = "sale:{0}:feed-head"
    # What pages show of a product when PostgreSQL is away, as JSON by product id.
    shelf = "sale:{0}:shelf"
    # Attempts of users, addresses and networks, in two hashes by turns: see claim.lua.
    attempts = ("sale:{0}:attempts:0", "sale:{0}:attempts:1")
    # Which brakes are set, and changes of them that the audit lacks.
    brakes = "sale:{0}:brakes"
    brake_acts = "sale:{0}:brake-acts"
    bought_prefix = "sale:{0}:bought:"
    idempotency_prefix = "sale:{0}:keys:"
    former_idempotency_prefix = "sale:{0}:key:"

    @staticmethod
    def product(product_id: int) -> str:
        return f"sale:{{0}}:product:{product_id}"

    @staticmethod
    def brake_key(key: str) -> str:
        return f"sale:{{0}}:brake-key:{key}"

    @staticmethod
    def address_units(product_id: int) -> str:
        return f"sale:{{0}}:address-units:{product_id}"

    @staticmethod
    def bought(product_id: int, user: User) -> tuple[str, str]:
        """Return the hash and the field that count the units a user bought of a product."""
        _, bucket, field = place(user)
        return Keys.bucket(product_id, bucket), field

    @staticmethod
    def bucket(product_id: int, bucket: int | str) -> str:
        return f"sale:{{0}}:bought:{product_id}:{bucket}"

    @staticmethod
    def idempotency(user: User, key: str) -> tuple[str, str]:
        """Return the hash and the field that hold the record of a user's Idempotency-Key.

        A blank is in neither alphabet, so no two pairs of user and key share a field.
        """
        _, bucket, field = place(user)
        return f"sale:{{0}}:keys:{bucket}", f"{field} {key}"

    @staticmethod
    def former_idempotency(user: User, key: str) -> str:
        """Return where 0.1.0 kept the record; of a text, which it did not know, there is none."""
        return f"sale:{{0}}:key:{user}:{key}" if isinstance(user, int) else Keys.nothing


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
