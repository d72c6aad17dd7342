"""A sale of six shards on a cluster of three primaries: each shopper is sold to by one node."""

import contextlib
import threading
from dataclasses import replace
from unittest.mock import patch

import pytest
from nodes import Cluster
from sqlalchemy import text
from test_shards import buy_all, drained, is_even
from waiting import wait_until

from app import create_app
from app.audit import CLI
from app.books import recovery
from app.config import NO_LIMIT
from app.extensions import db, stock
from app.orders import cancelling
from app.problems import Unavailable
from app.products import brake, movements
from app.stock.keys import KEYS
from app.watch import health
from app.worker import relay


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster("valkey", tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture
def shop(cluster, make_app, settings):
    # Whatever stands in PostgreSQL is another sale's.
    make_app()
    app = create_app(
        replace(
            settings,
            shards=6,
            redis_url=cluster.url,
            jobs_redis_url=settings.redis_url,
            purchase_user_limit=NO_LIMIT,
        )
    )
    with app.app_context():
        recovery.reset(CLI)
        yield app
        db.session.remove()


def test_it_sells_stores_proves_and_rebuilds(cluster, shop):
    nodes = {shard.server.address() for shard in stock.shards}
    assert len(nodes) == 3
    outcomes = buy_all([*range(1, 31), *(f"user-{n}" for n in range(30))], key="k")
    sold = outcomes["accepted"]
    assert sold > 50
    assert movements.restock(1, 9, None, CLI).free == 109 - sold
    assert is_even().queued == sold
    drained()
    assert is_even().stored == sold
    assert recovery.rebuild(CLI).free_units == 109 - sold
    assert buy_all(range(1, 31), key="k")["replayed"] > 0
    is_even()


def test_the_plan_tells_where_each_shard_is(cluster, shop):
    plan = shop.test_cli_runner().invoke(args=["cluster", "plan"])
    lines = plan.output.splitlines()
    shards = [line for line in lines if line.startswith("shard ")]
    assert len(shards) == 6
    for node in (cluster.x, cluster.y, cluster.a):
        assert sum(f"primary 127.0.0.1:{node.port} " in line for line in shards) == 2
    assert sum(f"replicas 127.0.0.1:{cluster.b.port}" in line for line in shards) == 2
    # Two of the three have none.
    assert sum(line.startswith("warning: ") for line in lines) == 2
    assert plan.exit_code == 1


def test_a_node_s_death_refuses_its_own_shoppers_alone(cluster, shop):
    """And its shards' orders are drained, and its units sold, when it is back."""
    buy_all(range(1, 31))
    dead = {
        shard.part.shard for shard in stock.shards if shard.server.address()[1] == cluster.x.port
    }
    assert len(dead) == 2
    of = {user: stock.shard_of(user).part.shard for user in range(100, 160)}
    cluster.x.kill()
    try:
        told: dict[int, set[str]] = {}
        for user, shard in of.items():
            try:
                told.setdefault(shard, set()).add(stock.claim(user, 1, 1, None, "a").outcome)
            except Unavailable as error:
                told.setdefault(shard, set()).add(error.executed)
        for shard, answers in told.items():
            if shard in dead:
                # Only the claim that was on its way is in doubt.
                assert answers <= {False, None}, shard
            else:
                assert answers <= {b"accepted", b"sold_out", b"dry"}, shard
        view = stock.view([1])
        assert set(view.missing) == dead
        assert health.check(shop)["redis"]["state"] == "2 of 6 shards unreachable"
        assert view.products[1]["free"] >= 0
    finally:
        cluster.x.start()
    wait_until(lambda: not stock.view([1]).missing, 30, "the node to be back")
    drained()
    is_even()


def test_a_sweep_does_all_that_needs_no_lost_node(cluster, shop):
    """What must wait for the node is done when it is back; everything else at once."""
    buy_all(range(1, 41))
    drained()
    dead = {of.part.shard for of in stock.shards if of.server.address()[1] == cluster.x.port}
    ids = db.session.execute(text("SELECT id, user_id FROM orders ORDER BY id")).all()
    away, here = (
        next(order for order, user in ids if (stock.shard_of(user).part.shard in dead) is is_dead)
        for is_dead in (True, False)
    )
    sweeper = relay.Sweeper()
    pending = text("SELECT count(*) FROM stock_movements WHERE applied_at IS NULL")
    cluster.x.kill()
    try:
        # The oldest of what is pending waits for the node.
        with pytest.raises(Unavailable):
            movements.restock(1, 6, None, CLI)
        with pytest.raises(Unavailable):
            brake.brake(True, None, CLI)
        assert stock.braked().sale
        with contextlib.suppress(Unavailable):
            cancelling.cancel(away, "changed their mind", CLI)
        killed = patch.object(cancelling, "apply_movement", side_effect=Unavailable("killed"))
        with killed, contextlib.suppress(Unavailable):
            cancelling.cancel(here, "changed their mind", CLI)
        assert db.session.scalar(pending) == 3
        stock.jobs_client.delete(KEYS.ledger_turn, KEYS.ledger, KEYS.shelf)
        with pytest.raises(Unavailable):
            sweeper.run_once(threading.Event())
        assert db.session.scalar(pending) == 2
        proof = stock.board.news(0).proof
        assert proof["ok"]
        assert set(proof["missing"]) == dead
        assert stock.board.shelf()
        carried = text("SELECT count(*) FROM audit_log WHERE action = 'sale.brake'")
        assert db.session.scalar(carried) == 1
        db.session.rollback()
    finally:
        cluster.x.start()
    wait_until(lambda: not stock.view([1]).missing, 30, "the node to be back")
    sweeper.run_once(threading.Event())
    assert db.session.scalar(pending) == 0
    assert all(of.read().sale for of in stock.brakes._gateways)
    assert is_even().free == 100 + 6 - 40 + 2
    brake.brake(False, None, CLI)
    sweeper.run_once(threading.Event())
    assert not stock.braked().sale
