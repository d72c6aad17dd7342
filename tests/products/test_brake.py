"""The brake: binds the next purchase, outlives whatever else changes, and needs Redis alone."""

import threading
from dataclasses import replace

import pytest
from crowd import at_once
from people import csrf_token
from sqlalchemy import select

from app import create_app
from app.audit import CLI, Actor
from app.books import recovery
from app.config import NO_LIMIT, RateLimit
from app.extensions import db, stock
from app.models import AuditEntry
from app.problems import Conflict, KeyMismatch, UnknownProduct
from app.products import catalogue, sale
from app.products.brake import ACTS_AT_ONCE, brake, carry_over
from app.stock.brakes import Brakes, Mark, newest
from app.stock.keys import KEYS
from app.stock.spread import SpreadBrakes
from app.worker.relay import Sweeper

LAMP = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 3}


@pytest.fixture
def lamp(client, admin_headers) -> int:
    return client.post("/products", json=LAMP, headers=admin_headers).json["id"]


@pytest.fixture
def post(client, admin_headers):
    """Brake by the API."""

    def send(body, key=None):
        headers = admin_headers | ({"Idempotency-Key": key} if key else {})
        return client.post("/sale/brake", json=body, headers=headers)

    return send


@pytest.fixture
def without_postgres(app, settings):
    """The same sale, seen by an app whose PostgreSQL is nowhere."""
    away = "postgresql+psycopg2://nobody@127.0.0.1:1/nothing"
    return create_app(replace(settings, database_url=away))


def entries() -> list[tuple]:
    query = select(AuditEntry).where(AuditEntry.action.in_(["sale.brake", "sale.release"]))
    rows = db.session.scalars(query.order_by(AuditEntry.id.desc()).limit(10))
    return [(row.action, row.target, row.actor, row.after) for row in rows][::-1]


def told(answer) -> tuple:
    body = answer.json
    return answer.status_code, body["on"], body["products"], body["saleBraked"], body["stillBraked"]


def code(answer) -> tuple:
    return answer.status_code, answer.json.get("code")


def test_it_stops_everything_and_what_is_made_later(client, buy, post, lamp, admin_headers):
    assert told(post({"on": True})) == (200, True, 2, True, [])
    assert code(buy(1)) == code(buy(1, product_id=lamp)) == (409, "paused")
    later = client.post("/products", json=LAMP, headers=admin_headers).json
    assert later["braked"] is True
    assert code(buy(1, product_id=later["id"])) == (409, "paused")
    assert [p["braked"] for p in client.get("/products").json] == [True] * 3
    # A member of its own: the terms are as they were.
    assert [p["paused"] for p in client.get("/products").json] == [False] * 3
    assert told(post({"on": False})) == (200, False, 3, False, [])
    assert buy(1).status_code == 200


def test_one_product_alone(client, buy, post, lamp):
    assert told(post({"on": True, "productId": lamp})) == (200, True, 1, False, [lamp])
    assert code(buy(1, product_id=lamp)) == (409, "paused")
    assert buy(1).status_code == 200
    assert client.get(f"/products/{lamp}").json["braked"] is True
    assert client.get("/products/1").json["braked"] is False


def test_releasing_the_sale_names_what_is_still_braked(buy, post, lamp):
    post({"on": True, "productId": lamp})
    post({"on": True})
    # One product's release lifts its own flag only.
    assert told(post({"on": False, "productId": 1})) == (200, False, 1, True, [lamp])
    assert code(buy(1)) == (409, "paused")
    assert told(post({"on": False})) == (200, False, 2, False, [lamp])
    assert buy(1).status_code == 200
    assert code(buy(1, product_id=lamp)) == (409, "paused")


def test_ids_are_compared_whole(buy, post, client, admin_headers):
    for _ in range(11):
        client.post("/products", json=LAMP, headers=admin_headers)
    post({"on": True, "productId": 12})
    assert [buy(product, product_id=product).status_code for product in (1, 2, 11)] == [200] * 3
    assert code(buy(12, product_id=12)) == (409, "paused")


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 400, "on"),
        ({"on": 1}, 400, "on"),
        ({"on": "true"}, 400, "on"),
        ({"on": True, "productId": 0}, 400, "productId"),
        ({"on": True, "productId": "1"}, 400, "productId"),
        ({"on": True, "productid": 1}, 400, "productid"),
        ({"on": True, "productId": 99}, 404, None),
        ({"on": False, "productId": 99}, 404, None),
    ],
)
def test_a_wrong_request_changes_nothing(client, buy, post, body, status, field):
    answer = post(body)
    assert (answer.status_code, answer.json.get("field")) == (status, field)
    assert buy(1).status_code == 200
    assert not stock.client.exists(KEYS.brakes, KEYS.brake_acts)


def test_who_may(client):
    assert client.post("/sale/brake", json={"on": True}).status_code == 401
    headers = {"Authorization": "Bearer wrong"}
    assert client.post("/sale/brake", json={"on": True}, headers=headers).status_code == 401


def test_a_repeated_request_does_not_brake_again(buy, post):
    first = post({"on": True}, "k")
    post({"on": False})
    again = post({"on": True}, "k")
    assert told(again)[:3] == told(first)[:3]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert buy(1).status_code == 200
    assert code(post({"on": False}, "k")) == (422, "idempotency_mismatch")
    assert code(post({"on": True, "productId": 1}, "k")) == (422, "idempotency_mismatch")


def test_nothing_but_its_own_act_releases_it(app, client, buy, post, lamp, admin_headers):
    post({"on": True})
    post({"on": True, "productId": lamp})
    client.patch("/products/1", json={"paused": False, "opensAt": None}, headers=admin_headers)
    with app.app_context():
        Sweeper().run_once(threading.Event())
        recovery.rebuild(CLI)
        sale.publish_stale()
    assert code(buy(1)) == (409, "paused")
    brakes = stock.braked()
    assert (brakes.sale, set(brakes.products)) == (True, {lamp})


def test_open_now_says_that_a_brake_is_set(app, post):
    post({"on": True, "productId": 1})
    with app.app_context():
        with pytest.raises(Conflict) as refused:
            catalogue.open_now(1, CLI)
        assert refused.value.code == "braked"
        post({"on": False, "productId": 1})
        catalogue.open_now(1, CLI)


def test_a_seed_clears_the_brakes_and_loses_no_entry_of_the_audit(app, runner, buy, post):
    post({"on": True})
    assert runner.invoke(args=["seed", "--yes"]).exit_code == 0
    assert buy(1).status_code == 200
    with app.app_context():
        assert carry_over() == 1
        assert entries()[-1] == ("sale.brake", "sale", "token ADMIN_API_TOKEN", {"braked": True})
        # What the audit is told late sets nothing once more.
        stock.brakes.agree()
        assert stock.braked() == Brakes(False, frozenset())


@pytest.fixture
def six(make_app):
    app = make_app(shards=6, purchase_user_limit=NO_LIMIT)
    with app.app_context():
        yield app


def in_all() -> list[Brakes]:
    return [gateway.read() for gateway in stock.brakes.gateways]


def without_the_last() -> SpreadBrakes:
    """Return the brakes of a sale as they are changed while its last shard is out of reach."""
    return SpreadBrakes(stock.brakes.gateways[:-1])


def told_as(name: str) -> dict:
    return {"id": name, "actor": "a", "address": None}


def test_a_shard_that_missed_acts_gets_the_newest(six):
    most = without_the_last()
    for number, on in enumerate((True, False, True)):
        for product_id in (None, 1):
            most.change(on, product_id, told_as(f"{number} {product_id}"), None)
            stock.brakes.agree()
            assert len(set(in_all())) == 1
            assert stock.brakes.agree() is None
    assert in_all() == [Brakes(True, frozenset({1}))] * 6
    # More than the audit takes at once.
    for number in range(ACTS_AT_ONCE // 2):
        most.change(False, None, told_as(f"release {number}"), None)
        most.change(True, None, told_as(f"brake {number}"), None)
    most.change(False, None, told_as("last"), None)
    assert carry_over() == ACTS_AT_ONCE
    stock.brakes.agree()
    assert in_all() == [Brakes(False, frozenset({1}))] * 6


def test_an_older_act_that_comes_late_changes_nothing(six):
    """Whoever spreads an act may be slow, and another one come meanwhile."""
    states = [gateway.state() for gateway in stock.brakes.gateways]
    assert newest(states) == {}
    brake(True, None, CLI)
    (late,) = newest([stock.brakes.gateways[0].state()]).values()
    brake(False, None, CLI)
    for gateway in stock.brakes.gateways:
        assert gateway.change("*", late, None).outcome == "outdated"
    assert in_all() == [Brakes(False, frozenset())] * 6
    # By a clock that is ahead; an operator's act is later all the same.
    ahead = Mark(stock.brakes.gateways[0].state().now_ms + 60_000, "z", True)
    assert stock.brakes.gateways[3].change("*", ahead, None).outcome == "done"
    assert not brake(False, None, CLI).sale
    stock.brakes.agree()
    assert in_all() == [Brakes(False, frozenset())] * 6


def test_a_shard_that_lacks_the_product_is_pending(six):
    """It is braked all the same, before it is told the terms; a sweep does not stumble over it."""
    last = stock.shards[-1]
    last.client.delete(last.keys.product(1))
    assert brake(True, 1, CLI).pending == (5,)
    stock.brakes.agree()
    assert in_all() == [Brakes(False, frozenset({1}))] * 6
    with pytest.raises(UnknownProduct):
        brake(True, 77, CLI)
    assert in_all() == [Brakes(False, frozenset({1}))] * 6


def test_a_key_that_some_shards_know_for_something_else_changes_nothing(six):
    without_the_last().change(True, None, told_as("first"), "k")
    for on, product_id in ((False, None), (True, 1)):
        with pytest.raises(KeyMismatch):
            brake(on, product_id, CLI, "k")
    assert in_all()[-1] == Brakes(False, frozenset())
    repeated = brake(True, None, CLI, "k")
    assert (repeated.replayed, repeated.pending) == (True, ())
    assert in_all() == [Brakes(True, frozenset())] * 6


def test_a_brake_outlives_another_number_of_shards(make_app, settings):
    """All of them are braked; what a shard knew of a sale long ago does not come back."""
    with make_app(shards=6).app_context():
        brake(True, None, CLI)
        brake(True, 1, CLI)
    with create_app(replace(settings, shards=1)).app_context():
        recovery.rebuild(CLI)
        assert in_all() == [Brakes(True, frozenset({1}))]
        brake(False, None, CLI)
    with create_app(replace(settings, shards=3)).app_context():
        recovery.rebuild(CLI)
        assert in_all() == [Brakes(False, frozenset({1}))] * 3
    with create_app(replace(settings, shards=6)).app_context():
        recovery.rebuild(CLI)
        assert in_all() == [Brakes(False, frozenset({1}))] * 6
        stock.brakes.agree()
        assert in_all() == [Brakes(False, frozenset({1}))] * 6


def test_the_audit_is_told_once_each(app, post):
    with app.app_context():
        carry_over()
        known = len(entries())
        brake(True, None, Actor("staff a@example.com", "192.0.2.1"))
        brake(True, None, CLI)  # changes nothing
        brake(True, 1, CLI)
        brake(False, None, CLI)
        acts = stock.client.lrange(KEYS.brake_acts, 0, -1)

    def carry(_):
        with app.app_context():
            return carry_over()

    at_once(carry, range(4))
    # Read again, as if the first time had been killed before Redis was told.
    stock.client.rpush(KEYS.brake_acts, *acts)
    stock.client.rpush(KEYS.brake_acts, "rubbish")
    with app.app_context():
        carry_over()
        assert entries()[known:] == [
            ("sale.brake", "sale", "staff a@example.com", {"braked": True}),
            ("sale.brake", "product 1", "command line", {"braked": True}),
            ("sale.release", "sale", "command line", {"braked": False}),
        ]
        newest = db.session.scalar(
            select(AuditEntry)
            .where(AuditEntry.address == "192.0.2.1")
            .order_by(AuditEntry.id.desc())
            .limit(1)
        )
        assert abs((newest.at - stock.clock()).total_seconds()) < 60
    assert not stock.client.exists(KEYS.brake_acts)


def test_it_works_without_postgres(app, without_postgres, buy, admin_headers):
    client = without_postgres.test_client()
    answer = client.post("/sale/brake", json={"on": True}, headers=admin_headers)
    assert (answer.status_code, answer.json["on"], answer.json["products"]) == (200, True, 1)
    assert code(buy(1)) == (409, "paused")
    result = without_postgres.test_cli_runner().invoke(args=["brake", "--release", "--yes"])
    assert (result.exit_code, result.output) == (0, "Every product is released.\n")
    assert buy(1).status_code == 200
    with app.app_context():
        assert carry_over() == 2


def test_the_command(runner, buy, lamp):
    assert runner.invoke(args=["brake"], input="n\n").exit_code == 1
    assert buy(1).status_code == 200
    assert runner.invoke(args=["brake", str(lamp), "--yes"]).output == "Product 2 is braked.\n"
    assert runner.invoke(args=["brake"], input="y\n").exit_code == 0
    assert code(buy(2)) == (409, "paused")
    released = runner.invoke(args=["brake", "--yes", "--release"])
    assert released.output.splitlines()[1] == "Still braked: product 2"
    for wrong in ("99", "0", "x", "-1"):
        assert runner.invoke(args=["brake", "--yes", "--", wrong]).exit_code != 0


@pytest.fixture
def full_redis(app):
    """A Redis past its maxmemory, from here on."""
    yield lambda: stock.client.config_set("maxmemory", "1")
    stock.client.config_set("maxmemory", "0")


def test_it_works_in_a_redis_that_is_full(app, buy, full_redis):
    full_redis()
    with app.app_context():
        assert brake(True, None, CLI).sale
    assert code(buy(1)) == (409, "paused")


@pytest.mark.parametrize("limit", [NO_LIMIT, RateLimit(5, 60_000)])
def test_a_token_may_use_it_though_no_limit_can_be_counted(
    make_app, admin_headers, full_redis, limit
):
    client = make_app(api_token_limit=limit).test_client()
    full_redis()
    for on in (True, False, True):
        answer = client.post("/sale/brake", json={"on": on}, headers=admin_headers)
        assert told(answer)[:2] == (200, on)
    body = {"userId": 1, "productId": 1, "quantity": 1}
    assert code(client.post("/purchase", json=body)) == (409, "paused")


def test_a_page_may_use_it_in_a_redis_that_is_full(admin, buy, full_redis):
    token = csrf_token(admin)
    full_redis()
    form = {"csrf_token": token, "on": "1", "confirmed": "yes"}
    assert admin.post("/admin/brake", data=form).status_code == 302
    assert code(buy(1)) == (409, "paused")
