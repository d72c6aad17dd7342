"""The pages while a part is away: what is known is shown, what is not known is shown as unknown."""

import json
import re
import threading

import psycopg2
import pytest
import redis
from people import send
from sqlalchemy.exc import OperationalError

from app.books import ledger
from app.extensions import db, stock
from app.staff import sessions
from app.stock.keys import KEYS
from app.watch import monitor, samples, shelf
from app.web import polls
from app.worker.relay import Sampler, Sweeper

GONE = "redis://127.0.0.1:1"


@pytest.fixture(autouse=True)
def nothing_shared(built_app, monkeypatch):
    """No figures of another test: polls share theirs for a moment."""
    monkeypatch.setitem(built_app.extensions, "polls", polls.Polls())
    monkeypatch.setattr(monitor, "_readings", samples.Readings())
    # Each test empties Redis, so that a process must not remember what it has written there.
    monkeypatch.setattr(sessions, "_confirmed", {})


def stopped() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def sample() -> None:
    Sampler("test").run_once(stopped())


@pytest.fixture
def without_redis(app, monkeypatch):
    """Redis answers nobody, from here on."""

    def stop():
        away = redis.Redis.from_url(GONE)
        for holder in (stock.first, stock.board):
            monkeypatch.setattr(holder, "client", away)
        for script in stock.first._scripts.values():
            monkeypatch.setattr(script, "registered_client", away)

    return stop


@pytest.fixture
def without_postgres(app, monkeypatch):
    """PostgreSQL answers nobody, from here on; who is signed in stands in Redis."""

    def stop():
        def fail(*_, **__):
            cause = psycopg2.OperationalError("connection to server at 10.9.8.7 failed")
            raise OperationalError("SELECT 1", {}, cause)

        monkeypatch.setattr(db.session.session_factory.class_, "execute", fail)
        monkeypatch.setattr(db.session.session_factory.class_, "scalars", fail)
        monkeypatch.setattr(db.session.session_factory.class_, "scalar", fail)

    return stop


def live(browser) -> str:
    return browser.get("/admin/live").text


def tile(page: str, name: str) -> str:
    found = re.search(rf"</i>{name}</dt><dd>(.*?)</dd>|<dt>{name}</dt><dd>(.*?)</dd>", page)
    return re.sub("<.*?>", "", found[1] or found[2]).strip()


class TestWithoutPostgres:
    @pytest.fixture
    def page(self, app, admin, buy, drain, without_postgres):
        for user in range(3):
            buy(user + 1)
        drain()
        with app.app_context():
            sample()
            Sweeper().run_once(stopped())
        buy(9, quantity=2)
        live(admin)
        without_postgres()
        return live(admin)

    def test_the_dashboard_shows_what_redis_knows(self, page):
        assert "Flash-sale item" in page
        assert "USD 999.99" in page
        assert re.search(r"3</b> sold.*2</b> queued.*95</b> free", page, re.DOTALL)
        assert tile(page, "Queue") == "1 waiting"
        assert tile(page, "Units free") == "95"

    def test_postgres_is_red_and_the_words_are_true(self, page):
        assert '<span class="state state-bad">PostgreSQL</span>' in page
        assert '<span class="state state-good">Redis</span>' in page
        assert "PostgreSQL is unreachable. Selling goes on" in page
        assert "10.9.8.7" not in page

    def test_nothing_is_offered_that_needs_postgres(self, page):
        assert "Restock" not in page
        assert ">Pause<" not in page
        assert "Stop everything" in page
        assert "<span>Brake" in page

    def test_the_product_page_and_its_poll(self, page, admin):
        for path in ("/admin/products/1", "/admin/products/1/live"):
            answer = admin.get(path)
            assert answer.status_code == 200
            assert "PostgreSQL is away" in answer.text
            assert "<b data-free>95</b>" in answer.text

    def test_no_page_leads_to_what_needs_it(self, page, admin):
        products = admin.get("/admin/products/").text
        assert "PostgreSQL is unreachable. Selling goes on" in products
        for path in ("/admin/products/", "/admin/products/1", "/admin/ledger/"):
            shown = admin.get(path).text
            for words in ("New product", "Import", "Edit", ">Rebuild<", "/restock"):
                assert words not in shown, (path, words)

    def test_the_worker_is_not_blamed_for_the_missing_proof(self, page, admin):
        stock.board.client.delete(KEYS.ledger)
        shown = admin.get("/admin/ledger/").text
        assert "PostgreSQL is unreachable, so nothing can be proved." in shown
        for text in (shown, live(admin)):
            assert "It is made from Redis and PostgreSQL, and PostgreSQL is away." in text
            assert "A worker makes one" not in text

    def test_pages_that_need_it_say_so(self, page, admin):
        for path in ("orders/", "audit/", "orders/orders.csv", "audit/audit.csv"):
            answer = admin.get(f"/admin/{path}")
            assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "1"), path
        # Whoever Redis vouches for keeps the menu.
        assert 'href="/admin/ledger/"' in admin.get("/admin/orders/").text

    def test_the_brake_works(self, page, admin, buy, app):
        press(admin, on="1", confirmed="yes")
        assert buy(10).json["code"] == "paused"
        assert "The brake is on." in live(admin)
        press(admin, on="0")
        assert buy(11).status_code == 200

    def test_an_unknown_product_is_404(self, page, admin):
        assert admin.get("/admin/products/77").status_code == 404

    def test_a_product_that_redis_was_not_told_of_is_not_made_up(self, page, admin):
        stock.client.delete(KEYS.shelf)
        assert "No products" in live(admin)


def press(browser, headers: dict | None = None, **data):
    """Press a button of the brake."""
    token = re.search(r'X-CSRFToken": "([^"]+)', browser.get("/admin/").text)[1]
    return browser.post("/admin/brake", data=data | {"csrf_token": token}, headers=headers)


class TestBrake:
    def test_it_asks_first(self, admin, buy):
        answer = press(admin, on="1")
        assert "Stop selling everything now?" in answer.text
        assert buy(1).status_code == 200

    def test_everything_at_once_and_back(self, admin, buy, client, admin_headers):
        body = {"name": "Lamp", "priceCents": 1, "currency": "USD", "stock": 5}
        lamp = client.post("/products", json=body, headers=admin_headers).json["id"]
        answer = press(admin, {"HX-Request": "true"}, on="1", confirmed="yes")
        assert "The brake is on." in answer.text
        assert "<html" not in answer.text
        assert {buy(1).json["code"], buy(2, lamp).json["code"]} == {"paused"}
        page = live(admin)
        assert page.count('state-braked">Braked') == 2
        assert "Release the brake" in page
        assert tile(page, "Products live") == "0 of 2"
        answer = press(admin, {"HX-Request": "true"}, on="0")
        assert "Stop everything" in answer.text
        assert buy(3).status_code == buy(4, lamp).status_code == 200

    def test_one_product(self, admin, buy):
        data = {"on": "1", "confirmed": "yes", "product": "1", "view": "row"}
        answer = press(admin, {"HX-Request": "true"}, **data)
        assert "Product 1 is braked" in json.loads(answer.headers["HX-Trigger"])["note"]["text"]
        assert 'id="product-1"' in answer.text
        assert "Release" in answer.text
        assert buy(1).json["code"] == "paused"
        press(admin, on="0", product="1", view="page")
        assert buy(1).status_code == 200

    def test_twice_is_once(self, admin, buy):
        for _ in range(2):
            assert press(admin, on="1", confirmed="yes").status_code == 302
        assert buy(1).json["code"] == "paused"
        press(admin, on="0")
        assert buy(1).status_code == 200

    @pytest.mark.parametrize(
        "data", [{}, {"on": "2"}, {"on": "1", "product": "x"}, {"on": "1", "product": "0"}]
    )
    def test_nonsense_changes_nothing(self, admin, buy, data):
        assert press(admin, confirmed="yes", **data).status_code == 400
        assert buy(1).status_code == 200

    def test_unknown_product(self, admin):
        assert press(admin, on="1", confirmed="yes", product="99").status_code == 404

    def test_support_sees_it_and_may_not_use_it(self, admin, support, buy):
        assert "Stop everything" not in live(support)
        assert send(support, "/admin/brake", on="1", confirmed="yes").status_code == 403
        press(admin, on="1", confirmed="yes")
        page = live(support)
        assert "The brake is on." in page
        assert "Release the brake" not in page

    def test_it_needs_a_token(self, admin, buy):
        assert admin.post("/admin/brake", data={"on": "1", "confirmed": "yes"}).status_code == 400
        assert buy(1).status_code == 200


class TestWithoutRedis:
    @pytest.fixture
    def stop(self, app, admin, buy, drain, without_redis):
        buy(1)
        drain()
        admin.get("/admin/products/1")
        return without_redis

    def test_unknown_is_not_zero_nor_sold_out(self, stop, admin):
        stop()
        for path in ("/admin/live", "/admin/products/1"):
            page = admin.get(path).text
            assert "<b data-free>–</b> free" in page
            assert "<b>–</b> queued" in page
            assert "<b>1</b> sold" in page
            assert "<rect" not in page
            assert 'state-unknown">Unknown' in page
        page = live(admin)
        assert tile(page, "Products live") == "– of 1"
        for name in ("Accepted", "Sold out", "Queue", "Units free"):
            assert tile(page, name).startswith("–"), name
        assert "Stop everything" not in page

    def test_the_product_page_has_a_banner_and_no_zeros(self, stop, admin):
        stop()
        page = admin.get("/admin/products/1").text
        assert 'role="alert"' in page
        counters = re.search(r'<dl class="counters">(.*?)</dl>', page, re.DOTALL)[1]
        assert set(re.findall("<dd>(.*?)</dd>", counters)) == {"–"}

    def test_the_lists_say_so_and_lead_to_nothing_that_needs_it(self, stop, admin):
        stop()
        for path in ("/admin/", "/admin/products/", "/admin/ledger/"):
            page = admin.get(path).text
            assert "Redis is unreachable" in page, path
            for words in ("New product", "Import", ">Rebuild<"):
                assert words not in page, (path, words)

    def test_another_sale_tells_nothing_of_this_one(self, app, admin):
        stock.client.set(KEYS.generation, "somebody-else")
        page = live(admin)
        assert "This Redis does not hold this sale." in page
        assert '<a href="/admin/ledger/">Rebuild it</a>' in page
        for button in ("Pause", "Restock", "Open now"):
            assert button not in page, button
        assert "<b data-free>–</b> free" in page

    def test_both_away_is_a_503_page(self, stop, without_postgres, admin):
        without_postgres()
        stop()
        answer = admin.get("/admin/")
        assert answer.status_code == 503


def test_after_a_rebuild_nothing_is_said_to_be_missing(app, admin):
    with app.app_context():
        stock.client.delete(KEYS.generation)
        ledger.keep_proof()
        assert "does not hold this sale" in admin.get("/admin/ledger/").text
    send(admin, "/admin/ledger/rebuild", confirmed="yes")
    for path in ("/admin/ledger/", "/admin/live"):
        page = admin.get(path).text
        assert "does not hold this sale" not in page
        assert re.search("balanced", page, re.IGNORECASE)


class TestWithoutWorker:
    def test_rates_come_from_the_counters(self, app, admin, buy, monkeypatch):
        """Nobody samples: the web process reads the counters itself, and compares."""
        first = samples.totals(stock.view([1]))
        now = stock.board.now()
        monitor._readings.add(stock.generation(), (now - 4, first))
        for user in range(8):
            buy(user + 1)
        shown = float(tile(live(admin), "Accepted").removesuffix(" / s"))
        assert 8 / (4 + stock.board.now() - now) - 0.05 <= shown <= 2

    def test_a_first_look_knows_no_rate(self, app, admin):
        assert tile(live(admin), "Accepted") == "– / s"

    def test_a_reset_begins_anew(self):
        readings = samples.Readings()
        readings.add("one", (1.0, {"accepted": 5}))
        assert readings.add("two", (2.0, {"accepted": 1})) == []

    @pytest.mark.parametrize(
        ("earlier", "rate"),
        [
            ([(97, 70), (99, 90)], 10),  # three seconds, not one
            ([(99, 90)], 10),
            ([(99.5, 90)], None),  # too near to say anything
            ([(80, 0)], None),  # too far
            ([(101, 0)], None),  # of the future
            ([(97, 500)], 0),  # set anew since
        ],
    )
    def test_rates(self, earlier, rate):
        points = [(moment, {"accepted": accepted}) for moment, accepted in earlier]
        assert samples.rates((100.0, {"accepted": 100}), points)["accepted"] == rate

    def test_a_gap_is_a_gap(self):
        def at(second, accepted):
            return second, {"accepted": accepted, "waiting": 0, "free": 9}

        found = samples.columns([at(1, 0), at(2, 5), at(60, 605), at(61, 606)], 62)
        assert found["second"] == [2, 3, 60, 61]
        assert found["accepted"] == [5, None, None, 1]
        assert found["free"] == [9, None, 9, 9]

    def test_the_chart_goes_on_without_values(self):
        def at(second):
            return second, {"accepted": 0, "waiting": 0, "free": 9}

        found = samples.columns([at(1), at(2)], 100.5)
        assert found["second"] == [2, 3, 98]
        assert found["free"] == [9, None, None]


class TestShelf:
    def test_it_gives_back_what_was_put(self, app):
        with app.app_context():
            shelf.Shelf().renew()
            ((product, totals),) = shelf.read()
            ((stored, sums),) = db.session.execute(shelf.products_and_totals()).all()
            for row, kept in ((stored, product), (sums, totals)):
                for column in row.__table__.columns:
                    assert getattr(kept, column.key) == getattr(row, column.key), column.key
            assert product not in db.session

    def test_only_what_changed_is_written(self, app, client, admin_headers, monkeypatch):
        monkeypatch.setattr(shelf, "RESTS", 0)
        kept = shelf.Shelf()
        with app.app_context():
            kept.renew()
            stock.client.delete(KEYS.shelf)
            kept.renew()
            assert stock.board.shelf() == {}
            client.patch("/products/1", json={"name": "Lamp"}, headers=admin_headers)
            db.session.rollback()
            kept.renew()
            assert shelf.read()[0][0].name == "Lamp"

    def test_it_takes_a_tenth_of_a_worker_at_most(self, app, monkeypatch):
        now, written = [100.0], []

        def put(texts):
            written.append(now[0])
            now[0] += 0.5

        monkeypatch.setattr(stock.board, "put_shelf", put)
        monkeypatch.setattr(shelf.time, "monotonic", lambda: now[0])
        kept = shelf.Shelf()
        with app.app_context():
            for _ in range(20):
                kept.renew()
                now[0] += 1
        assert written == [100, 105.5, 111, 116.5]

    def test_what_another_version_kept_is_read(self, app):
        old = [{"id": 7, "name": "Old", "unknown": 1}, {"product_id": 7, "confirmed_units": 2}]
        stock.board.put_shelf({7: json.dumps(old)})
        ((product, totals),) = shelf.read()
        assert (product.name, totals.confirmed_units) == ("Old", 2)
