"""The ledger's proof: what Redis sells, PostgreSQL stores, and was ever put on sale, to the unit.

    put on sale − stored orders − orders that wait = free stock

holds for each product at every instant. Redis is read at one instant, between two readings of
PostgreSQL; when these two agree, nothing was stored meanwhile and the three are one view. So the
check never locks a busy sale, and never cries wolf.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from typing import Any, NamedTuple

from psycopg2.errorcodes import LOCK_NOT_AVAILABLE
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from ..audit import Actor, record
from ..database import sqlstate
from ..extensions import db, stock
from ..generation import Held, held, on_record
from ..locks import DRAIN_LOCK, REPAIR_LOCK
from ..problems import Conflict, Unavailable, Unprepared
from ..products.movements import expired
from ..stock.figures import Account, Accounts
from ..stock.gather import all_of, gathered, reached
from ..stock.shard import Shard
from ..stock.shards import Part

# Under load a batch is stored every 200 ms and a reading takes a few: the first mostly succeeds.
READINGS = 20
# Entry by entry the outbox is counted up to here, at about 1 µs each during which claims wait.
COUNTED_ORDERS = 1000
COUNTED_ORDERS_BY_HAND = 100_000
CHECK_SECONDS = 5
# A drill-down is for people: past so many ids nobody reads on.
MOST_IDS = 1000

STORED = text("""
SELECT coalesce((SELECT generation FROM sale), ''), coalesce((SELECT shards FROM sale), 1),
       -- A batch that was read again, and cut shorter, ends below the one before it.
       (SELECT json_agg(coalesce((SELECT max(last_order_id)
                                  FROM (SELECT last_order_id FROM batches WHERE shard = number
                                        ORDER BY id DESC LIMIT 50) newest
                                  -- What was stored before this dealing was of other shards.
                                  WHERE last_order_id >= (SELECT first_order_id FROM sale)), 0)
                         ORDER BY number)
        FROM generate_series(0, :shards - 1) AS number),
       (SELECT json_agg(json_build_array(shard, product_id, moved_units,
               stored_units + dead_units + abandoned_units, stored_orders)
               ORDER BY shard, product_id)
        FROM product_totals),
       (SELECT json_agg(json_build_array(id, product_id, units, user_id, user_name, order_ids)
               ORDER BY id)
        FROM stock_movements WHERE applied_at IS NULL)
""")
# Nobody writes while these are held. Whoever needs several tables takes them in this order, but for
# the drain, hence its own lock.
STANDSTILL = f"""
SET LOCAL lock_timeout = '3s';
SELECT pg_advisory_xact_lock({DRAIN_LOCK});
LOCK TABLE orders, dead_letters, stock_movements IN SHARE MODE
"""
# The totals are kept by triggers; this counts the rows themselves.
ROWS = """
SELECT t.product_id, t.moved_units, t.confirmed_units, t.held_units, t.cancelled_units,
       t.released_units, t.expired_units, t.stored_orders, t.dead_units, t.abandoned_units,
       coalesce(m.units, 0), coalesce(o.confirmed, 0), coalesce(o.held, 0),
       coalesce(o.cancelled, 0), coalesce(o.released, 0), coalesce(o.expired, 0),
       coalesce(o.stored, 0), coalesce(d.dead, 0), coalesce(d.abandoned, 0)
FROM product_sums t
-- Of several shards a movement counts once it is applied.
LEFT JOIN (SELECT product_id, sum(units) AS units FROM stock_movements
           WHERE applied_at IS NOT NULL OR (SELECT shards FROM sale) = 1 GROUP BY 1) m
  USING (product_id)
LEFT JOIN (SELECT product_id, count(*) AS stored,
                  sum(quantity - returned_units) FILTER (WHERE status = 'CONFIRMED') AS confirmed,
                  sum(quantity - returned_units) FILTER (WHERE status = 'HELD') AS held,
                  sum(returned_units) FILTER (WHERE status NOT IN ('RELEASED', 'EXPIRED'))
                    AS cancelled,
                  sum(returned_units) FILTER (WHERE status = 'RELEASED') AS released,
                  sum(returned_units) FILTER (WHERE status = 'EXPIRED') AS expired
           FROM orders GROUP BY 1) o USING (product_id)
LEFT JOIN (SELECT product_id, sum(quantity) FILTER (WHERE resolution IS NULL) AS dead,
                  sum(quantity) FILTER (WHERE resolution = 'abandoned') AS abandoned
           FROM dead_letters GROUP BY 1) d USING (product_id)
"""


class Unquiet(Exception):
    """No consistent view was found in time; another try will do."""


@dataclass(frozen=True)
class ProductCheck:
    """A product's ledger, in a shard or over all. `difference` above 0: so many could oversell."""

    product_id: int
    moved: int  # put on sale, as far as Redis has been told
    stored: int  # units of orders and dead letters in PostgreSQL, cancelled and abandoned included
    queued: int  # units of orders that wait and are not stored
    free: int
    expected_free: int
    pending: int  # units of movements that Redis is still to be told
    problems: list[str] = field(default_factory=list)
    # What a repair would add to each counter of Redis, where it is a shard's.
    amounts: dict[str, int] = field(default_factory=dict)
    shard: int = 0
    # Lent by a shard, and not yet given to the other one.
    in_transit: int = 0

    @property
    def difference(self) -> int:
        return self.free - self.expected_free

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Check:
    """The ledger of every product at one instant, and problems that belong to none."""

    at: float  # by Redis's clock
    generation: str
    products: dict[int, ProductCheck]
    problems: list[str]
    # What `products` are the sums of, where there are several shards.
    parts: list[ProductCheck]
    # By shard and product Redis' counter of stored orders minus what PostgreSQL has; a display
    # figure, mended as found.
    uncounted: dict[tuple[int, int], int]
    # Shards out of reach: nothing is proved of them, and the sums are without them.
    missing: tuple[int, ...] = ()
    # By shard: units that it lent and that are not yet given.
    in_transit: dict[int, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems and all(product.ok for product in self.products.values())

    def as_proof(self) -> dict[str, Any]:
        """Return the check in the form that the dashboard reads; see Noticeboard.put_proof."""
        products = {
            product.product_id: {
                **{
                    k: v
                    for k, v in asdict(product).items()
                    if k not in ("product_id", "amounts", "shard")
                },
                "ok": product.ok,
                "difference": product.difference,
            }
            for product in self.products.values()
        }
        return {
            "at": self.at,
            "generation": self.generation,
            "ok": self.ok,
            "problems": self.problems,
            "missing": self.missing,
            "in_transit": self.in_transit,
            "products": products,
        }


class Pending(NamedTuple):
    """A movement that is not marked as applied."""

    movement_id: int
    product_id: int
    units: int
    user_id: int | None
    user_name: str | None
    order_ids: list[int] | None

    def part_of(self, part: Part, is_applied: bool) -> int:
        """Return what a shard gets, or got, of its units: see Stock.parts_of."""
        if part.shards == 1:
            return self.units
        if self.order_ids is not None:
            orders = expired([self.movement_id])[self.movement_id]
            return sum(order.units for order in stock.of_each_shard(orders)[part.shard])
        user = self.user_name if self.user_id is None else self.user_id
        if user is not None:
            return self.units if stock.shard_of(user).part == part else 0
        if self.units >= 0:
            return part.deals(self.units, self.movement_id)
        # Taken from one shard, wherever there was enough.
        return self.units if is_applied else 0


@dataclass(frozen=True)
class Stored:
    """The PostgreSQL half of the ledger; equal readings mean that nothing happened in between."""

    generation: str
    shards: int
    last_order_ids: list[int]  # by shard
    totals: dict[int, dict[int, tuple[int, int, int]]]  # by shard: moved units, units out, orders
    pending: list[Pending]

    def of(self, shard: int) -> tuple[object, ...]:
        """Return what is about a shard."""
        return (
            self.generation, self.shards, self.last_order_ids[shard], self.totals.get(shard),
            self.pending,
        )  # fmt: skip


def _read_stored() -> Stored:
    values = {"shards": len(stock.shards)}
    generation, shards, last, totals, pending = db.session.execute(STORED, values).one()
    of_shards: dict[int, dict[int, tuple[int, int, int]]] = defaultdict(dict)
    for shard, product, *sums in totals or ():
        of_shards[shard][product] = tuple(sums)
    return Stored(generation, shards, last, of_shards, [Pending(*of) for of in pending or ()])


def check(
    count_up_to: int = COUNTED_ORDERS_BY_HAND, rows: bool = False, reachable: bool = False
) -> Check:
    """Prove the ledger of every product, while selling goes on.

    Outboxes of up to `count_up_to` orders in all are counted entry by entry; beyond it Redis'
    counters are believed. With `rows` the totals in PostgreSQL are compared with the rows
    themselves, which takes about half a second for a million orders. `reachable` proves those
    shards alone.

    Raises stock.Unavailable, stock.Unprepared when Redis holds no sale or another one, and Unquiet.
    """
    result = _compare(_consistent_views(count_up_to, reachable))
    if len(stock.shards) > 1:
        _count_in_transit(result)
    if rows:
        _compare_rows(result)
    return result


def _consistent_views(count_up_to: int, reachable: bool) -> dict[int, tuple[Stored, Accounts]]:
    """Return both halves of each shard, as they were while nothing about it was stored."""
    found: dict[int, tuple[Stored, Accounts]] = {}
    away: set[int] = set()
    try:
        before = _read_stored()
        for reading in range(READINGS):
            if reading == READINGS // 2:
                # A reset holds the drain's lock while it waits for the tables that were read.
                db.session.rollback()
                db.session.execute(text(STANDSTILL))
                before = _read_stored()
            numbers = [n for n in range(len(stock.shards)) if n not in found and n not in away]
            read = _read_accounts(before, numbers, count_up_to)
            if not reachable:
                all_of(read)
            elif not found:
                reached(read)
            answers = dict(zip(numbers, read, strict=True))
            away |= {n for n, of in answers.items() if isinstance(of, Unavailable)}
            after = _read_stored()
            if after.shards != len(stock.shards):
                raise Unprepared(f"the sale has {after.shards} shards, which SHARDS must say")
            found |= {
                number: (after, accounts)
                for number, accounts in answers.items()
                if isinstance(accounts, Accounts) and after.of(number) == before.of(number)
            }
            if len(found) + len(away) == len(stock.shards):
                return dict(sorted(found.items()))
            before = after
    except OperationalError as error:
        if sqlstate(error) != LOCK_NOT_AVAILABLE:
            raise
    finally:
        db.session.rollback()
    raise Unquiet("the ledger found no quiet moment; try again")


def _read_accounts(
    stored: Stored, numbers: Sequence[int], count_up_to: int
) -> list[Accounts | Unavailable]:
    """Return Redis's half of these shards, or why one has no answer."""
    on_record = {product for sums in stored.totals.values() for product in sums}
    ids = sorted(on_record.union(stock.product_ids()))
    movements = [pending.movement_id for pending in stored.pending]
    shards = [stock.shards[number] for number in numbers]
    # A node counts those of all its shards at one go.
    most = count_up_to // len(stock.shards)
    questions = [
        shard.asking_accounts(ids, stored.last_order_ids[number], movements, most)
        for number, shard in zip(numbers, shards, strict=True)
    ]
    return gathered(shards, questions)


def _compare(views: dict[int, tuple[Stored, Accounts]]) -> Check:
    holds = {
        number: held(accounts.generation, stored.generation)
        for number, (stored, accounts) in views.items()
    }
    if Held.THIS not in holds.values():
        raise Unprepared("Redis does not hold this sale")
    stored, _ = views[max(views)]
    missing = tuple(number for number in range(len(stock.shards)) if number not in views)
    result = Check(stock.board.now(), stored.generation, {}, [], [], {}, missing)
    for number, (of, accounts) in views.items():
        part = stock.shards[number].part
        if holds[number] is Held.THIS:
            _compare_shard(result, part, of, accounts)
        else:
            result.problems.append(_of(part, "it does not hold this sale"))
    if len(stock.shards) > 1:
        _sum_up(result, stored.totals.get(-1, {}))
    else:
        result.products.update({of.product_id: of for of in result.parts})
    return result


def _of(part: Part, problem: str) -> str:
    return problem if part.shards == 1 else f"shard {part.shard}: {problem}"


def _compare_shard(result: Check, part: Part, stored: Stored, accounts: Accounts) -> None:
    for product_id, account in accounts.products.items():
        moved, out, orders = stored.totals.get(part.shard, {}).get(product_id, (0, 0, 0))
        unapplied = applied = 0
        for pending in stored.pending:
            if pending.product_id != product_id:
                continue
            if pending.movement_id in accounts.applied_movements:
                applied += pending.part_of(part, is_applied=True)
            else:
                unapplied += pending.part_of(part, is_applied=False)
        result.parts.append(
            _compare_product(
                part,
                product_id,
                account,
                accounts.counted,
                # Of several shards what is pending is in no total yet.
                moved=moved - unapplied if part.shards == 1 else moved + applied,
                out=out,
                pending=unapplied,
            )
        )
        # Where stored orders still wait it can't be told which of them are dead letters.
        if account.on_sale and not account.overlap and account.persisted != orders:
            result.uncounted[part.shard, product_id] = account.persisted - orders
    counted = sum(account.accepted - account.settled for account in accounts.products.values())
    if counted != accounts.waiting:
        problem = f"{accounts.waiting} orders wait in the outbox, the counters say {counted}"
        result.problems.append(_of(part, problem))
    last_stored = stored.last_order_ids[part.shard]
    if accounts.last_order_id < last_stored:
        problem = (
            f"Redis counts orders up to {accounts.last_order_id},"
            f" but order {last_stored} is stored: it has gone back in time"
        )
        result.problems.append(_of(part, problem))


def _sum_up(result: Check, before: dict[int, tuple[int, int, int]]) -> None:
    """Add the shards' figures up, and those of `before` this dealing: all that moved went out."""
    for product_id in sorted({of.product_id for of in result.parts} | before.keys()):
        moved, out, _ = before.get(product_id, (0, 0, 0))
        parts = [of for of in result.parts if of.product_id == product_id]
        problems = [f"shard {of.shard}: {problem}" for of in parts for problem in of.problems]
        if moved != out:
            problems.append(f"before this dealing {moved} units were put on sale, {out} went out")
        result.products[product_id] = ProductCheck(
            product_id=product_id,
            moved=moved + sum(of.moved for of in parts),
            stored=out + sum(of.stored for of in parts),
            queued=sum(of.queued for of in parts),
            free=sum(of.free for of in parts),
            expected_free=moved - out + sum(of.expected_free for of in parts),
            pending=sum(of.pending for of in parts),
            problems=problems,
        )


def _count_in_transit(result: Check) -> None:
    """Note what was lent and is not given yet; a shard that got more than that has too much.

    What was received is read before what was sent, so that what is given meanwhile does not seem to
    come from nowhere.
    """
    ids = sorted(result.products)
    there = [number for number in range(len(stock.shards)) if number not in result.missing]
    shards = [stock.shards[number] for number in there]

    def told() -> dict[int, list[dict[str, int]]]:
        answers = gathered(shards, [shard.asking_lent(ids) for shard in shards])
        return dict(zip(there, all_of(answers), strict=True))

    received, sent = told(), told()
    for index, product_id in enumerate(ids):
        product, in_transit = result.products[product_id], 0
        for source, target in permutations(there, 2):
            lent = sent[source][index].get(f"sent.{target}", 0)
            given = received[target][index].get(f"recv.{source}", 0)
            in_transit += lent - given
            result.in_transit[source] = result.in_transit.get(source, 0) + lent - given
            if given > lent:
                product.problems.append(
                    f"shard {source} lent shard {target} {lent} units, and that one got {given}"
                )
        result.products[product_id] = replace(product, in_transit=in_transit)


def _compare_product(
    part: Part,
    product_id: int,
    account: Account,
    counted: bool,
    *,
    moved: int,
    out: int,
    pending: int,
) -> ProductCheck:
    """Compare each counter with its source; the sources alone say what should be free."""
    settled = out - account.overlap_units
    waiting = account.waiting_units if counted else account.claimed - account.settled_units
    queued = waiting - account.overlap_units
    result = ProductCheck(
        product_id=product_id,
        moved=moved,
        stored=out,
        queued=queued,
        free=account.free,
        expected_free=moved - out - queued + account.received,
        pending=pending,
        shard=part.shard,
    )
    wanted = {"moved": moved, "settled_units": settled, "claimed": settled + waiting}
    for name, value in wanted.items():
        if amount := value - getattr(account, name):
            result.amounts[name] = amount
    if account.moved != moved:
        result.problems.append(f"{moved} units were put on sale, Redis says {account.moved}")
    if account.settled_units != settled:
        result.problems.append(
            f"{settled} units are stored, Redis has taken {account.settled_units} out of the outbox"
        )
    if account.claimed - account.settled_units != waiting:
        result.problems.append(
            f"{waiting} units wait in the outbox,"
            f" the counters say {account.claimed - account.settled_units}"
        )
    if counted and account.accepted - account.settled != account.waiting:
        result.problems.append(
            f"{account.waiting} orders wait in the outbox,"
            f" the counters say {account.accepted - account.settled}"
        )
        result.amounts["accepted"] = account.waiting - (account.accepted - account.settled)
    left = account.moved + account.received - account.claimed
    if account.free != left:
        lent = f", {account.received} from other shards" if account.received else ""
        result.problems.append(
            f"{account.free} units are free,"
            f" {account.moved} put on sale{lent} and {account.claimed} claimed leave {left}"
        )
    if result.difference:
        result.problems.append(
            f"{abs(result.difference)} units {'too many' if result.difference > 0 else 'too few'}"
            " are free"
        )
    return result


def _compare_rows(result: Check) -> None:
    names = (
        "moved units", "confirmed units", "held units", "cancelled units", "released units",
        "expired units", "stored orders", "dead-lettered units", "abandoned units",
    )  # fmt: skip
    for product_id, *figures in db.session.execute(text(ROWS)):
        totals, rows = figures[: len(names)], figures[len(names) :]
        for name, total, counted in zip(names, totals, rows, strict=True):
            if total != counted:
                result.products[product_id].problems.append(
                    f"the total of {name} is {total}, its rows sum up to {counted}"
                )
    db.session.rollback()


def check_in_turn() -> None:
    """Keep the newest check for the dashboard, every few seconds, whichever worker comes first."""
    if stock.board.take_turn(CHECK_SECONDS):
        keep_proof()


def keep_proof() -> None:
    """Prove the ledger now, for the dashboard. A sale that is not in Redis is a proof, too."""
    try:
        result = check(COUNTED_ORDERS, reachable=True)
    except Unquiet:
        return
    except Unprepared as error:
        broken = {"at": stock.board.now(), "generation": on_record() or None, "ok": False}
        stock.board.put_proof(broken | {"problems": [str(error)], "products": {}})
        return
    stock.board.put_proof(result.as_proof())
    count_persisted(result)


def count_persisted(result: Check) -> None:
    """Correct the figure of stored orders, which a replay changes in PostgreSQL alone.

    It decides nothing, so that being late or wrong by a few for some seconds does no harm.
    """
    for (shard, product_id), excess in result.uncounted.items():
        stock.shards[shard].mend(result.generation, product_id, 0, {"persisted": -excess})


@dataclass(frozen=True)
class Differences:
    """Where to look: what one side of the ledger has and the other has not."""

    # Order ids that were issued and are nowhere: first and last of each gap.
    missing_orders: list[tuple[int, int]]
    # Orders stored, of this product, that Redis has never issued.
    unknown_orders: list[int]
    # Movements marked as applied that Redis has not applied.
    unapplied_movements: list[int]
    # Orders listed as waiting that are not in the outbox.
    not_waiting: list[int]

    def __bool__(self) -> bool:
        return any(asdict(self).values())


def differences(product_id: int) -> Differences:
    """Find the ids behind a difference; gaps in the order ids can't be told apart by product.

    Reads every id of the sale: seconds for millions of orders. Raises stock.Unavailable.
    """
    missing: list[tuple[int, int]] = []
    not_waiting: list[int] = []
    unknown: list[int] = []
    first = db.session.scalar(BEGUN, {"shards": len(stock.shards)}) or 1
    for shard in stock.shards:
        gaps, not_listed, foreign = _differences_of(shard, product_id, first)
        missing += gaps
        not_waiting += not_listed
        unknown += foreign
    applied = db.session.scalars(
        text(
            "SELECT id FROM stock_movements WHERE product_id = :product AND applied_at IS NOT NULL"
        ),
        {"product": product_id},
    ).all()
    db.session.rollback()
    # Of several shards each has its part of some.
    unapplied = set.intersection(
        *(set(shard.unapplied_movements(list(applied))) for shard in stock.shards)
    )
    return Differences(
        missing_orders=sorted(missing)[:MOST_IDS],
        unknown_orders=sorted(unknown)[:MOST_IDS],
        unapplied_movements=sorted(unapplied)[:MOST_IDS],
        not_waiting=sorted(not_waiting)[:MOST_IDS],
    )


def _differences_of(
    shard: Shard, product_id: int, first: int
) -> tuple[list[tuple[int, int]], set[int], list[int]]:
    """Return a shard's missing orders, those listed and not waiting, and those never issued.

    Its ids are every so many from `first` on; of several shards what is older was of other ones.
    """
    part = shard.part
    # In this order an order that is being stored is seen at least once.
    issued = shard.view([]).last_order_id
    waiting = shard.outbox_ids()
    queued = shard.queued_ids() - set(waiting)
    # An order that was settled between the two readings waits in neither.
    queued -= set(shard.outbox_ids())
    still_queued = queued & shard.queued_ids()
    values = {
        "issued": issued,
        "waiting": waiting,
        "most": MOST_IDS,
        "shards": part.shards,
        "shard": part.shard,
        "before": part.first_id(first) - part.shards,
        "product": product_id,
    }
    gaps = db.session.execute(GAPS, values).all()
    values["issued"] = max(issued, shard.view([]).last_order_id)
    unknown = db.session.scalars(UNKNOWN, values).all()
    return [(first, last) for first, last in gaps], still_queued, list(unknown)


# Of one shard all ids since a reset are looked at, or those since it was several.
BEGUN = text("""
SELECT CASE WHEN :shards > 1 THEN (SELECT first_order_id FROM sale)
       ELSE (SELECT max((after ->> 'first_order_id')::bigint) FROM audit_log
             WHERE action = 'sale.rebuild' AND (after ->> 'former_shards')::int > 1
               AND id > coalesce((SELECT max(id) FROM audit_log WHERE action = 'sale.reset'), 0))
       END
""")
GAPS = text("""
WITH jumps AS (
  SELECT (after ->> 'last_known_order_id')::bigint AS last,
         (after ->> 'first_order_id')::bigint AS first
  FROM audit_log WHERE action = 'sale.rebuild' AND :shards = 1
    AND id > coalesce((SELECT max(id) FROM audit_log WHERE action = 'sale.reset'), 0)
), ids AS (
  SELECT id FROM orders
  UNION SELECT order_id FROM dead_letters WHERE order_id IS NOT NULL
  UNION SELECT split_part(stream_id, '-', 1)::bigint FROM dead_letters
  UNION SELECT unnest(CAST(:waiting AS bigint[]))
  UNION SELECT generate_series(last + 1, last + 1) FROM jumps WHERE first > last + 1
  UNION SELECT generate_series(first - 1, first - 1) FROM jumps WHERE first > last + 1
  UNION SELECT CAST(:before AS bigint) UNION SELECT CAST(:issued AS bigint) + :shards
), gaps AS (
  SELECT id + :shards AS first, lead(id) OVER (ORDER BY id) - :shards AS last FROM ids
  WHERE id % :shards = :shard AND id >= :before
)
SELECT first, last FROM gaps
WHERE last >= first AND last <= :issued
  AND NOT EXISTS (SELECT FROM jumps j WHERE gaps.first = j.last + 2 AND gaps.last = j.first - 2)
ORDER BY first LIMIT :most
""")
UNKNOWN = text("""
SELECT id FROM orders WHERE product_id = :product AND id > :issued AND id % :shards = :shard
LIMIT :most
""")


@dataclass(frozen=True)
class Repair:
    """What a repair does to one product: units taken out of free stock, counters set right."""

    product_id: int
    take: int
    amounts: dict[str, int]
    # Units that should be free and are not. Giving them back could oversell; a rebuild may.
    held_back: int
    shard: int = 0


def plan_repair(result: Check) -> list[Repair]:
    """Return what `repair` would do, product by product; nothing for a product in order."""
    return [
        Repair(
            product.product_id,
            take=max(product.difference, 0),
            amounts=product.amounts,
            held_back=max(-product.difference, 0),
            shard=product.shard,
        )
        for product in result.parts
        if product.difference or product.amounts
    ]


def repair(actor: Actor) -> list[Repair]:
    """Bring Redis' counters in line with PostgreSQL and the outbox; free stock is only lowered.

    Returns what was done. Raises like `check`, and Conflict while another repair is at work.
    """
    with db.engine.connect() as connection:
        if not connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({REPAIR_LOCK})")):
            raise Conflict("Another repair is at work", "repair_running")
        result = check()
        done = []
        for planned in plan_repair(result):
            shard = stock.shards[planned.shard]
            taken = shard.mend(result.generation, planned.product_id, planned.take, planned.amounts)
            if taken < 0:
                continue
            carried_out = replace(planned, take=taken)
            (before,) = (
                of
                for of in result.parts
                if (of.shard, of.product_id) == (planned.shard, planned.product_id)
            )
            record(
                actor,
                "ledger.repair",
                f"product {planned.product_id}",
                before={"free": before.free, "problems": before.problems},
                after=asdict(carried_out),
            )
            done.append(carried_out)
        db.session.commit()
    return done
