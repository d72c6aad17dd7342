"""The brake: stops one product or the whole sale at once. It needs Redis, and nothing else.

The audit is in PostgreSQL, which may be away: an act is noted in Redis by the script that does it,
and carried over by the sweeper.
"""

import uuid
from dataclasses import dataclass

from sqlalchemy.dialects.postgresql import insert

from ..audit import Actor
from ..extensions import db, stock
from ..models import AuditEntry
from ..times import from_ms

ACTS_AT_ONCE = 100


@dataclass(frozen=True)
class Braked:
    """What a brake did: for how many products, and what is still braked after it."""

    on: bool
    products: int
    # Products with a brake of their own; and whether the whole sale's is set.
    still: list[int]
    sale: bool = False
    replayed: bool = False
    # Shards that can't be reached now: a worker brings it there.
    pending: tuple[int, ...] = ()


def brake(on: bool, product_id: int | None, actor: Actor, key: str | None = None) -> Braked:
    """Refuse the next purchase of a product, or of every one, as paused; or let it in again.

    Releasing the whole sale leaves products that have a brake of their own. Raises UnknownProduct,
    KeyMismatch, stock.Unavailable.
    """
    act = {"id": uuid.uuid4().hex, "actor": actor.name, "address": actor.address}
    done = stock.brakes.change(on, product_id, act, key)
    still = sorted(done.brakes.products)
    return Braked(on, done.products, still, done.brakes.sale, done.replayed, done.pending)


def carry_over() -> int:
    """Enter into the audit what was noted in Redis, once each; return the number of acts."""
    acts = stock.brakes.acts(ACTS_AT_ONCE)
    if not acts:
        return 0
    rows = [
        {
            "act_id": act.act_id,
            "at": from_ms(act.at_ms),
            "actor": act.actor,
            "address": act.address,
            "action": "sale.brake" if act.on else "sale.release",
            "target": "sale" if act.product_id is None else f"product {act.product_id}",
            "before": {"braked": not act.on},
            "after": {"braked": act.on},
        }
        for act in acts
    ]
    db.session.execute(
        insert(AuditEntry).values(rows).on_conflict_do_nothing(index_elements=["act_id"])
    )
    db.session.commit()
    stock.brakes.forget(acts)
    return len(acts)
