"""Holds in any order of acts, clock steps, crashes and outages, against a model; and planted bugs.

Real script, Redis and PostgreSQL. What a crash leaves half done is taken up by the acts that a
worker repeats for ever.
"""

import contextlib

import pytest
from drills import often
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from app.audit import CLI
from app.books import ledger, recovery
from app.config import NO_LIMIT
from app.extensions import db, stock
from app.orders import expiry, holds, intents, states
from app.orders.drain import drain_batch
from app.problems import Conflict, Unavailable
from app.products import catalogue, movements, sale
from app.stock.keys import KEYS

STOCK = 8
CAP = 4
STEPS = 40
FRESH = """
TRUNCATE orders, order_intents, dead_letters, batches, stock_movements, request_keys
  RESTART IDENTITY;
UPDATE product_totals SET confirmed_orders = 0, confirmed_units = 0, held_orders = 0,
  held_units = 0, released_orders = 0, released_units = 0, expired_orders = 0, expired_units = 0,
  moved_units = 0;
UPDATE sale SET generation = 'machine', epoch = 'machine', last_order_id = 0, first_order_id = 1,
  swept_at = NULL, expiry_from = NULL;
"""


class Crash(Unavailable):
    """The process dies here, or Redis gives no answer: either way nobody knows."""


@contextlib.contextmanager
def crash_at(name: str, after: bool):
    """Die when the named function of the stock is called, or when it returns."""
    # The drain settles with the shard that it has read.
    part = stock.first if name == "settle" else stock
    real = getattr(part, name)

    def die(*arguments, **options):
        if after:
            real(*arguments, **options)
        raise Crash("killed")

    setattr(part, name, die)
    try:
        yield
    finally:
        delattr(part, name)
        db.session.rollback()


@contextlib.contextmanager
def postgres_away():
    """Cut every session of the sale's database, and let nobody in."""
    url = db.engine.url
    others = create_engine(url.set(database="template1"), isolation_level="AUTOCOMMIT")
    admits = f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS {{}}'
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
    db.session.rollback()
    try:
        with others.connect() as connection:
            connection.execute(text(admits.format("false")))
            connection.execute(text(cut), {"name": url.database})
            try:
                yield
            finally:
                connection.execute(text(admits.format("true")))
                db.session.rollback()
                db.engine.dispose()
    finally:
        others.dispose()


PURCHASES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=6)
CRASHES = st.sampled_from([None, None, None, "before", "after"])


class Sale(RuleBasedStateMachine):
    """The model: what each order is, and the movements that Redis was not told of."""

    app = None
    steps = 0

    @initialize()
    def open(self):
        self.context = Sale.app.app_context()
        self.context.push()
        stock.first.clear()
        db.session.execute(text(FRESH))
        db.session.commit()
        stock.first.open("machine", first_order_id=1)
        catalogue.change(1, {"hold_seconds": 60, "per_user_limit": CAP}, CLI)
        db.session.execute(text("UPDATE products SET version = version + 1"))
        db.session.commit()
        sale.publish_stale()
        movements.restock(1, STOCK, None, CLI)
        # By order: user, units, state.
        self.orders: dict[int, list] = {}
        self.stored: set[int] = set()
        # Acts that wait for the order to be stored.
        self.wanted: dict[int, list[str]] = {}
        self.due: set[int] = set()
        self.extended: set[int] = set()
        # Whether ends wait, since nobody could sweep for a while.
        self.patient = False
        self.paid: set[int] = set()
        # Movements that Redis does not know, in their order: kind and the orders they are of.
        self.untold: list[tuple[str, list[int]]] = []

    def teardown(self):
        if hasattr(self, "context"):
            try:
                self.settle()
                self.agrees_with_the_model()
            finally:
                db.session.remove()
                self.context.pop()

    # The model

    def units(self, order):
        return self.orders[order][1]

    def taken(self, user=None):
        """Units that Redis counts as taken, of one user or of all."""
        out = {n for n, (_, _, state) in self.orders.items() if state in ("HELD", "CONFIRMED")}
        out |= {n for kind, ids in self.untold if kind == "return" for n in ids}
        return sum(self.units(n) for n in out if user in (None, self.orders[n][0]))

    def free(self):
        return STOCK - self.taken()

    def tell_all(self):
        # Returns go first.
        self.untold.sort(key=lambda entry: entry[0] == "reclaim")
        while self.untold:
            kind, ids = self.untold.pop(0)
            if kind == "reclaim" and self.fits(ids[0]):
                self.orders[ids[0]][2] = "CONFIRMED"

    def fits(self, order):
        user, units, _ = self.orders[order]
        return units <= self.free() and self.taken(user) + units <= CAP

    def apply_wanted(self):
        """Return the orders that give units back."""
        back = []
        for order in sorted(self.stored & self.wanted.keys()):
            for act in self.wanted.pop(order):
                if act == "extend":
                    self.extended.add(order)
                elif self.orders[order][2] == "HELD":
                    self.orders[order][2] = "CONFIRMED" if act == "confirm" else "RELEASED"
                    if act == "release":
                        back.append(order)
        return back

    # The acts

    @rule(
        purchases=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=6)
    )
    def buy(self, purchases):
        for user, units in purchases:
            self.buy_one(user, units)

    def buy_one(self, user, units):
        Sale.steps += 1
        claim = stock.claim(user, 1, units, None, "a")
        if self.taken(user) + units > CAP:
            assert claim.outcome == b"capped"
        elif units > self.free():
            assert claim.outcome in (b"sold_out", b"insufficient")
        else:
            assert claim.outcome == b"accepted"
            self.orders[claim.detail] = [user, units, "HELD"]

    @rule(most=st.integers(1, 6), crash=st.booleans())
    def drain(self, most, crash):
        waiting = stock.first.outbox_ids()[:most]
        if crash and waiting:
            with crash_at("settle", after=False), pytest.raises(Crash):
                drain_batch("test", "test", most)
        else:
            drain_batch("test", "test", most)
        self.stored.update(waiting)

    @rule(data=st.data(), crash=CRASHES)
    def confirm(self, data, crash):
        if not self.orders:
            return
        order = data.draw(st.sampled_from(sorted(self.orders)))
        wish = holds.Confirm(order, CLI, f"pay-{order}", data.draw(st.sampled_from([None, "k"])))
        wish = wish._replace(key=wish.key and f"k{order}-{Sale.steps}")
        Sale.steps += 1
        if order not in self.stored:
            if "release" in self.wanted.get(order, ()):
                with pytest.raises(Conflict):
                    holds.confirm(wish)
                return
            assert holds.confirm(wish).waits
            if "confirm" not in self.wanted.setdefault(order, []):
                self.wanted[order].append("confirm")
            return
        if order in self.wanted:
            # What was accepted before is done first, and told to Redis.
            self.settle()
        state = self.orders[order][2]
        if state in ("HELD", "CONFIRMED"):
            assert holds.confirm(wish).order["status"] == "CONFIRMED"
            self.orders[order][2] = "CONFIRMED"
            self.paid.add(order)
            return
        self.pay_late(order, wish, crash)

    def pay_late(self, order, wish, crash):
        """Its own return is told first; then its units are taken anew."""
        pending = next((entry for entry in self.untold if order in entry[1]), None)
        if pending and crash:
            # The first call to Redis is that of what is pending.
            function = "move_expired" if self.came_together(order, pending) else "move"
            with crash_at(function, crash == "after"), pytest.raises(Unavailable):
                holds.confirm(wish)
            if crash == "after":
                # Redis knows; only the mark is missing.
                self.untold.remove(pending)
                if pending[0] == "reclaim" and self.fits(order):
                    self.settle()
            return
        if pending and pending[0] == "return":
            self.untold.remove(pending)
            pending = None
        if crash:
            with crash_at("move", crash == "after"), pytest.raises(Unavailable):
                holds.confirm(wish)
            self.untold.append(("reclaim", [order]))
            if crash == "after":
                self.settle()
            return
        if pending:
            self.untold.remove(pending)
        if self.fits(order):
            done = holds.confirm(wish)
            assert done.reclaimed
            self.orders[order][2] = "CONFIRMED"
            self.paid.add(order)
        else:
            with pytest.raises(states.HoldExpired):
                holds.confirm(wish)

    def came_together(self, order, pending):
        return pending[0] == "return" and self.orders[order][2] == "EXPIRED"

    @rule(data=st.data(), crash=CRASHES)
    def release(self, data, crash):
        if not self.orders:
            return
        order = data.draw(st.sampled_from(sorted(self.orders)))
        if order not in self.stored:
            if "confirm" in self.wanted.get(order, ()) or "release" in self.wanted.get(order, ()):
                with pytest.raises(Conflict):
                    holds.release(order, "test", CLI)
                return
            assert holds.release(order, "test", CLI).waits
            self.wanted.setdefault(order, []).append("release")
            return
        self.settle()
        state = self.orders[order][2]
        if state == "CONFIRMED":
            with pytest.raises(Conflict):
                holds.release(order, "test", CLI)
            return
        with crash_at("move", crash == "after") if crash else contextlib.nullcontext():
            holds.release(order, "test", CLI)
        if state == "HELD":
            self.orders[order][2] = "RELEASED"
            if crash == "before":
                self.untold.append(("return", [order]))

    @rule(data=st.data())
    def extend(self, data):
        """Once for each order; what is over stays so, by the clock of this test."""
        if not self.orders:
            return
        order = data.draw(st.sampled_from(sorted(self.orders)))
        if order in self.stored:
            self.settle()
            allowed = self.orders[order][2] == "HELD" and order not in self.extended
        else:
            allowed = order not in self.wanted
        if not allowed:
            with pytest.raises(Conflict):
                holds.extend(order, 5, CLI)
        elif holds.extend(order, 5, CLI).waits:
            self.wanted[order] = ["extend"]
        else:
            self.extended.add(order)

    @rule(data=st.data())
    def step_clock(self, data):
        """From now on some holds are over, and others are not, whatever they were before."""
        ids = sorted(self.stored)
        if not ids:
            return
        self.due = set(data.draw(st.lists(st.sampled_from(ids), max_size=6)))
        self.put_clock()

    def put_clock(self):
        db.session.execute(
            text(
                "UPDATE orders SET held_until = now() + CASE WHEN id = ANY(:due)"
                " THEN interval '-1 h' ELSE interval '1 h' END"
            ),
            {"due": list(self.due)},
        )
        db.session.commit()

    @rule(crash=CRASHES)
    def expire(self, crash):
        ended = [
            n
            for n in sorted(self.due & self.stored)
            if self.orders[n][2] == "HELD" and n not in self.wanted
        ]
        # However slowly the test runs.
        self.unswept("now() - interval '10 min'" if self.patient else "greatest(swept_at, now())")
        if self.patient:
            ended = []
        with crash_at("move_expired", crash == "after") if crash else contextlib.nullcontext():
            assert not expiry.Expiry().step()
        for order in ended:
            self.orders[order][2] = "EXPIRED"
        if ended and crash == "before":
            self.untold.append(("return", ended))

    @rule(data=st.data(), crash=CRASHES)
    def nobody_pays(self, data, crash):
        """What waits is stored, and some of what is held ends."""
        self.drain(100, crash=False)
        self.settle()
        held = [n for n in sorted(self.stored) if self.orders[n][2] == "HELD"]
        if held:
            self.due = set(data.draw(st.lists(st.sampled_from(held), min_size=1, max_size=6)))
            self.put_clock()
            self.expire(crash)

    @rule(data=st.data())
    def be_without_postgres(self, data):
        """Holds end meanwhile: none is ended, and their payments have time to come again."""
        ids = sorted(self.stored)
        with postgres_away():
            if ids:
                order = data.draw(st.sampled_from(ids))
                for act in (holds.confirm, holds.confirm_together):
                    wish = holds.Confirm(order, CLI, f"pay-{order}", "away")
                    with pytest.raises(SQLAlchemyError):
                        act(wish if act is holds.confirm else [wish])
                    db.session.rollback()
            with pytest.raises(SQLAlchemyError):
                expiry.Expiry().step()
            db.session.rollback()
            # Selling goes on.
            self.buy_one(1, 1)
        self.patient = True
        if ids:
            self.due.update(data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=6)))
            self.put_clock()
            self.expire(None)

    def unswept(self, since):
        db.session.execute(text(f"UPDATE sale SET swept_at = {since}"))
        db.session.commit()

    @rule()
    def be_patient_no_more(self):
        if self.patient:
            db.session.execute(text("UPDATE sale SET swept_at = now(), expiry_from = now()"))
            db.session.commit()
            self.patient = False

    @rule(forward=st.booleans())
    def set_the_clock(self, forward):
        """PostgreSQL's, by an hour, for as long as no hold's end is between the two."""
        self.unswept(f"now() {'-' if forward else '+'} interval '1 h'")
        if forward:
            # It can't be told from an outage.
            self.patient = True

    @rule()
    def settle(self):
        """What the sweeper does."""
        movements.finish_pending()
        self.tell_all()
        intents.apply_open()
        self.apply_wanted()

    @rule(lose=st.booleans())
    def rebuild(self, lose):
        lost = set()
        if lose:
            lost = set(stock.first.outbox_ids()) - self.stored
            stock.client.flushdb()
        else:
            self.stored.update(stock.first.outbox_ids())
        recovery.rebuild(CLI)
        for order in lost:
            del self.orders[order]
            self.wanted.pop(order, None)
        self.tell_all()

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "untold"):
            return
        Sale.steps += 1
        assert int(stock.client.hget(KEYS.product(1), "free")) == self.free() >= 0
        rows = dict(db.session.execute(text("SELECT id, status FROM orders")).all())
        db.session.rollback()
        assert rows == {n: self.orders[n][2] for n in self.stored}
        assert all(rows[n] == "CONFIRMED" for n in self.paid)
        result = ledger.check(rows=True)
        assert result.ok, (result.problems, result.products[1].problems)


def run(make_app, examples, phases=tuple(Phase)):
    Sale.steps = 0
    Sale.app = make_app(purchase_user_limit=NO_LIMIT, purchase_address_limit=NO_LIMIT)
    # No machine dies here, and waiting for the disk would take most of the time.
    stock.client.config_set("appendfsync", "no")
    try:
        run_state_machine_as_test(
            Sale,
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=True,
                database=None,
                report_multiple_bugs=False,
                phases=phases,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        stock.client.config_set("appendfsync", "always")


@pytest.mark.parametrize(
    "examples", [10, pytest.param(often(70, 1000), marks=pytest.mark.drill)], ids=["few", "many"]
)
def test_every_order_of_acts_keeps_the_promises(make_app, examples):
    run(make_app, examples)
    assert Sale.steps >= 40 * examples


# What each would do: an order that is confirmed and whose unit is sold again; units that come back
# twice.
PLANTED = {
    "a confirmation that ignores EXPIRED": {
        (holds, "LOCKED"): ("status", "CASE status WHEN 'EXPIRED' THEN 'HELD' ELSE status END"),
        (states, "CONFIRM"): (
            "AND o.status || '' = 'HELD'",
            "",
            "acts = acts + 1",
            "acts = acts + 1, returned_units = 0, cancelled_at = NULL",
        ),
    },
    "two returns": {
        (states, "EXPIRE"): (
            "FROM parted GROUP BY product_id, part",
            "FROM parted, generate_series(1, 2) AS twice GROUP BY product_id, part, twice",
        ),
    },
    "an end that does not compare the state": {
        (states, "EXPIRE"): (
            "WHERE status = 'HELD' AND held_until",
            "WHERE held_until",
            "AND o.status || '' = 'HELD'",
            "",
        ),
    },
    "an end whose units return without the order's row": {
        (states, "EXPIRE"): (
            "UPDATE orders o SET status = 'EXPIRED', returned_units = quantity, acts = acts + 1,"
            "\n                      cancelled_at = now(), cancelled_by = :actor,"
            " cancel_reason = :reason",
            "UPDATE orders o SET held_until = o.held_until + interval '2 h'",
        ),
    },
    "a release whose units return without the order's row": {
        (states, "GIVE_BACK"): (
            "WHEN part.units = part.standing THEN :status ELSE o.status END",
            "WHEN part.units = 0 THEN :status ELSE o.status END",
            "returned_units = returned_units + part.units",
            "returned_units = returned_units",
            "cancelled_at = CASE WHEN part.units = part.standing",
            "cancelled_at = CASE WHEN part.units = 0",
        ),
    },
    "ends that do not wait after an outage": {
        (expiry, "SWEPT"): ("coalesce(expiry_from <= now(), true)", "true"),
    },
}


@pytest.mark.drill
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(make_app, monkeypatch, bug):
    for (module, name), changes in PLANTED[bug].items():
        statement = getattr(module, name).text
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in statement
            statement = statement.replace(old, new, 1)
        monkeypatch.setattr(module, name, text(statement))
    with pytest.raises(AssertionError):
        # The first case will do, however long it is.
        run(make_app, 10, (Phase.generate,))
