"""A sale of six shards on a cluster of three primaries: each shopper is sold to by one node."""

import contextlib
import threading
from contextvars import Context
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
from documented import DocumentedClient
from flask import render_template
from nodes import Cluster
from people import create_person, csrf_token, sign_in, sign_in_once
from sqlalchemy import text
from test_shards import buy_all, drained, is_even
from waiting import wait_until

from app import create_app
from app.audit import CLI
from app.books import ledger, recovery
from app.config import NO_LIMIT
from app.extensions import db, stock
from app.orders import cancelling
from app.problems import Unavailable
from app.products import brake, movements
from app.stock.board import Noticeboard
from app.stock.brakes import Brakes
from app.stock.keys import KEYS
from app.stock.link import Link
from app.stock.servers import Server
from app.stock.shard import Shard
from app.stock.shards import Part
from app.watch import health, monitor, telemetry
from app.worker import relay


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster("valkey", tmp_path_factory.mktemp("cluster"))
    for node in (cluster.x, cluster.y, cluster.a):
        # As the documentation asks: the others sell on when a node is lost for good.
        node.client.config_set("cluster-require-full-coverage", "no")
    yield cluster
    cluster.stop()


def is_away(answer: object) -> bool:
    return isinstance(answer, Unavailable)


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
        # A node that was killed for the test before is back.
        wait_until(lambda: not any(map(is_away, stock.asked(Shard.try_write))), what="the nodes")
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
    browser = shop.test_client()
    sign_in_once(shop, browser, "admin")
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
        ledger.keep_proof()
        lacking = f"Shards {', '.join(map(str, sorted(dead)))} can’t be reached"
        for path in ("/admin/products/", "/admin/products/live?id=1", "/admin/products/1"):
            assert lacking in browser.get(path).text, path
        assert "Ledger partly proved" in browser.get("/admin/products/1").text
        assert "Partly proved" in browser.get("/admin/ledger/").text
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
        assert set(brake.brake(True, None, CLI).pending) == dead
        assert stock.braked().sale
        with contextlib.suppress(Unavailable):
            cancelling.cancel(away, "changed their mind", CLI)
        killed = patch.object(cancelling, "apply_movement", side_effect=Unavailable("killed"))
        with killed, contextlib.suppress(Unavailable):
            cancelling.cancel(here, "changed their mind", CLI)
        assert db.session.scalar(pending) == 3
        stock.jobs_client.delete(KEYS.ledger_turn, KEYS.ledger, KEYS.shelf)

        def swept() -> bool:
            with pytest.raises(Unavailable):
                sweeper.run_once(threading.Event())
            return db.session.scalar(pending) == 2 and stock.board.news(0).proof is not None

        # Each sweep tries everything; on a busy machine a healthy node may be late, too.
        wait_until(swept, 30, "what needs no lost node")
        proof = stock.board.news(0).proof
        assert proof["ok"]
        assert set(proof["missing"]) >= dead
        assert stock.board.shelf()
        carried = text("SELECT count(*) FROM audit_log WHERE action = 'sale.brake'")
        assert db.session.scalar(carried) == 1
        db.session.rollback()
    finally:
        cluster.x.start()
    wait_until(lambda: not stock.view([1]).missing, 30, "the node to be back")
    sweeper.run_once(threading.Event())
    assert db.session.scalar(pending) == 0
    relay.Sampler("test").run_once(threading.Event())
    assert all(of.read().sale for of in stock.brakes.gateways)
    assert is_even().free == 100 + 6 - 40 + 2
    brake.brake(False, None, CLI)
    sweeper.run_once(threading.Event())
    assert not stock.braked().sale


def test_terms_and_brakes_are_in_force_where_they_can_be(cluster, shop, admin_headers):
    """202 and which shards are to follow; a worker brings it there, and the audit is told once."""
    shop.test_client_class = DocumentedClient
    client, runner = shop.test_client(), shop.test_cli_runner()
    person = shop.test_client()
    email = create_person(shop, "admin")
    # Apart from the test's own context, whose `g` every request would share.
    Context().run(sign_in, person, email)
    dead = {of.part.shard for of in stock.shards if of.server.address()[1] == cluster.x.port}
    buyers = {
        is_dead: next(u for u in range(1, 99) if (stock.shard_of(u).part.shard in dead) is is_dead)
        for is_dead in (True, False)
    }

    def change(terms: dict) -> tuple[int, list[int]]:
        answer = client.patch("/products/1", json=terms, headers=admin_headers)
        return answer.status_code, answer.json.get("pendingShards", [])

    def by_page(path: str, **form: str) -> str:
        form["csrf_token"] = Context().run(csrf_token, person)
        return Context().run(partial(person.post, path, data=form, follow_redirects=True)).text

    def braked(**body: object) -> tuple[int, list[int], bool]:
        headers = admin_headers | {"Idempotency-Key": "k"}
        answer = client.post("/sale/brake", json=body, headers=headers)
        told = answer.json
        return answer.status_code, told.get("pendingShards", []), told["saleBraked"]

    cluster.x.kill()
    try:
        assert change({"perUserLimit": 1}) == (202, sorted(dead))
        assert change({"perUserLimit": 1}) == (202, sorted(dead))
        claims = [stock.claim(buyers[False], 1, 1, None, "a").outcome for _ in range(2)]
        assert claims == [b"accepted", b"capped"]
        assert braked(on=True) == (202, sorted(dead), True)
        assert braked(on=True) == (202, sorted(dead), True)
        assert stock.claim(buyers[False], 1, 1, None, "a").outcome == b"paused"
        where = " and ".join(map(str, sorted(dead)))
        told = f"Not yet in shards {where}, out of reach now"
        assert told in runner.invoke(args=["brake", "1", "--yes"]).output
        assert told in by_page("/admin/products/1/sale", act="pause")
        assert told in by_page("/admin/brake", on="0", product="1")
    finally:
        cluster.x.start()
    wait_until(lambda: not stock.view([1]).missing, 30, "the node to be back")
    relay.Sampler("test").run_once(threading.Event())
    relay.Sweeper().run_once(threading.Event())
    for gateway in stock.brakes.gateways:
        assert gateway.read() == Brakes(True, frozenset())
    for shard in stock.shards:
        assert shard.view([1]).products[1]["cap"] == 1
        assert shard.view([1]).products[1]["pause"] == 1
    assert braked(on=True) == (200, [], True)
    assert change({"paused": False}) == (200, [])
    assert brake.brake(False, None, CLI).pending == ()
    assert stock.claim(buyers[True], 1, 1, None, "a").outcome == b"accepted"
    acts = text("SELECT action FROM audit_log WHERE action ~ :kind ORDER BY id")
    relay.Sweeper().run_once(threading.Event())
    assert db.session.scalars(acts, {"kind": "sale.(brake|release)"}).all() == [
        "sale.brake", "sale.brake", "sale.release", "sale.release",
    ]  # fmt: skip
    assert len(db.session.scalars(acts, {"kind": "product.change"}).all()) == 3


def test_restocks_and_new_products_wait_for_a_lost_node(cluster, shop, admin_headers):
    """503 until every shard has its units; those in reach sell theirs at once. The key tells."""
    shop.test_client_class = DocumentedClient
    client = shop.test_client()
    new = {"name": "Late", "priceCents": 100, "currency": "EUR", "stock": 6}
    dead = {of.part.shard for of in stock.shards if of.server.address()[1] == cluster.x.port}

    def post(path: str, body: dict):
        return client.post(path, json=body, headers=admin_headers | {"Idempotency-Key": path})

    def answers() -> list[int]:
        restocked = post("/products/restock", {"productId": 1, "amount": 12})
        return [restocked.status_code, post("/products", new).status_code]

    before = stock.view([1]).parts
    cluster.x.kill()
    try:
        assert answers() == [503, 503]
        assert answers() == [503, 503]
        for number, part in stock.view([1, 2]).parts.items():
            if number not in dead:
                had = before[number].products[1]["free"]
                assert part.products[1]["free"] == had + 2
                assert part.products[2]["free"] == 1
    finally:
        cluster.x.start()
    wait_until(lambda: not stock.view([1]).missing, 30, "the node to be back")
    assert answers() == [200, 201]
    assert answers() == [200, 201]
    products = stock.view([1, 2]).products
    assert (products[1]["free"], products[2]["free"]) == (112, 6)
    is_even()


def test_dashboard_and_metrics_tell_each_shard(cluster, shop):
    """Its node, health, free units, units in transit and waiting orders; those of a lost node."""
    told = telemetry.exposition().decode()
    assert told.count("flashsale_shard_up{") == 6
    buy_all(range(1, 31))
    stock.first.client.hset(stock.first.keys.lent(1), "sent.1", 2)
    ledger.keep_proof()
    board = monitor.board()
    assert [of.number for of in board.shards] == list(range(6))
    assert sum(of.free for of in board.shards) == 70
    assert sum(of.waiting for of in board.shards) == 30
    assert [of.in_transit for of in board.shards] == [2, 0, 0, 0, 0, 0]
    assert len({of.node for of in board.shards}) == 3
    dead = {n for n, of in enumerate(stock.shards) if of.server.address()[1] == cluster.x.port}
    closed = next(n for n in range(6) if n not in dead)
    stock.shards[closed].client.delete(stock.shards[closed].keys.generation)
    cluster.x.kill()
    try:
        board = monitor.board()
        told = telemetry.exposition().decode()
        # Of the others is proved what can be; of what is closed it is said.
        ledger.keep_proof()
        proof = monitor.board().ledger
    finally:
        cluster.x.start()
    assert {of.number for of in board.shards if of.error == "unreachable"} == dead
    assert [of.number for of in board.shards if of.error == "without this sale"] == [closed]
    assert all(of.free is None for of in board.shards if of.number in dead)
    for number in range(6):
        up = float(number not in dead and number != closed)
        assert f'flashsale_shard_up{{shard="{number}"}} {up}' in told
    assert proof.missing == sorted(dead)
    assert proof.problems == [f"shard {closed}: it does not hold this sale"]
    assert 'flashsale_up{server="redis"} 1.0' in told


def test_without_the_board_pages_show_the_shards(cluster, shop, settings):
    """It is on the Redis of jobs, which a sale of several shards does without."""
    jobs = stock.jobs_server, stock.board
    buy_all(range(1, 11))
    gone = Link(Part(), Server("redis://127.0.0.1:1"), 0)
    stock.board = Noticeboard(gone)
    try:
        board = monitor.board()
        told = telemetry.exposition().decode()
        with shop.test_request_context(), patch("flask_login.utils._get_user") as user:
            user.return_value.is_admin = True
            page = render_template("admin/_dashboard.html", board=board, shared=True)
        checks = health.check(shop)
    finally:
        stock.jobs_server, stock.board = jobs
    assert board.redis_error is None
    assert board.jobs_error == "unreachable"
    assert (board.workers, board.ledger.ok) == (None, None)
    assert (board.free, board.waiting) == (90, 10)
    assert "The Redis of jobs is unreachable" in page
    assert page.count("127.0.0.1:") == 6
    assert "flashsale_stock_units" in told or "flashsale_shard_stock_units" in told
    assert checks["redis"]["ok"]
    assert checks["sale"]["ok"]
    assert not checks["worker"]["ok"]
