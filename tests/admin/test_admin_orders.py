"""The support desk: search, pages, an order's story, cancelling, the export."""

import csv
import io
import re
from datetime import UTC, datetime, timedelta

import pytest
from people import BROWSER, send
from sqlalchemy import select, text

from app import sheet
from app.books import ledger
from app.extensions import db, stock
from app.feed import numbering
from app.models import AuditEntry
from app.orders import expiry, intents, search
from app.orders.sheet import MISSING
from app.problems import Unavailable

RESULTS = BROWSER | {"HX-Target": "results"}


def listed(answer) -> list[int]:
    return [
        int(found) for found in re.findall(r'strong num" href="/admin/orders/(\d+)"', answer.text)
    ]


@pytest.fixture
def many(app, drain):
    """1,000 stored orders of 10 users, a minute apart, the last one now."""
    with app.app_context():
        db.session.execute(
            text(
                "INSERT INTO orders (id, user_id, product_id, quantity, unit_price_cents, currency,"
                " claimed_at) SELECT i, i % 10 + 1, 1, 1, 100, 'USD',"
                " now() - (1000 - i) * interval '1 minute' FROM generate_series(1, 1000) AS i"
            )
        )
        db.session.execute(
            text(
                "UPDATE orders SET status = 'CANCELLED', cancelled_at = now(),"
                " cancelled_by = 'x', cancel_reason = 'y' WHERE id % 100 = 0"
            )
        )
        db.session.commit()


def test_queued_and_stored_newest_first(support, buy, drain):
    buy(7)
    drain()
    buy(7)
    buy(8)
    answer = support.get("/admin/orders/")
    assert listed(answer) == [3, 2, 1]
    assert answer.text.count("Queued</span>") == 2
    assert answer.text.count("Confirmed</span>") == 1
    assert listed(support.get("/admin/orders/?q=7")) == [2, 1]
    assert listed(support.get("/admin/orders/?status=QUEUED")) == [3, 2]
    assert listed(support.get("/admin/orders/?status=CONFIRMED")) == [1]


def test_results_are_a_fragment(support, buy):
    buy(7)
    assert "<html" in support.get("/admin/orders/").text
    answer = support.get("/admin/orders/?q=7", headers=RESULTS)
    assert "<html" not in answer.text
    assert listed(answer) == [1]


def test_a_number_is_a_user_or_an_order(support, buy, drain):
    for user in (7, 7, 2):
        buy(user)
    drain()
    answer = support.get("/admin/orders/?q=2")
    assert 'class="hit"' in answer.text
    assert "Order" in answer.text
    assert listed(answer) == [3]
    answer = support.get("/admin/orders/?q=%232")
    assert 'class="hit"' in answer.text
    assert listed(answer) == []
    assert "No other order" not in answer.text
    answer = support.get("/admin/orders/?q=3")
    assert 'class="hit"' in answer.text
    assert "No other order is of a user 3, or under such a key or reference." in answer.text
    assert "No orders found" not in answer.text
    assert "No orders found" in support.get("/admin/orders/?q=99").text
    assert "visible characters" in support.get("/admin/orders/?q=Zoë").text
    assert "There is no such order" in support.get("/admin/orders/?q=%2399").text


def test_pages_are_complete_and_without_repetition(support, many):
    seen, path = [], "/admin/orders/"
    while path:
        answer = support.get(path)
        seen += listed(answer)
        older = re.search(r'href="(/admin/orders/\?before=\d+)"', answer.text)
        path = older and older[1]
    assert seen == list(range(1000, 0, -1))


def test_filters_together(app, many):
    now = datetime.now(UTC)
    with app.app_context():
        found = search.search(
            search.Filter(
                user=1,
                status="CANCELLED",
                since=now - timedelta(minutes=501),
                until=now - timedelta(minutes=99),
            )
        )
        assert [order.id for order in found.orders] == [900, 800, 700, 600, 500]
        assert search.search(search.Filter(product_id=9)).orders == []
        later = search.Filter(since=now + timedelta(hours=1))
        assert search.search(later).orders == []


def test_times_of_the_browsers_zone(support, many):
    then = datetime.now(UTC) - timedelta(minutes=10, seconds=30) + timedelta(hours=5, minutes=30)
    answer = support.get(
        "/admin/orders/",
        query_string={"from": then.strftime("%Y-%m-%dT%H:%M:%S"), "from_offset": "+05:30"},
    )
    assert listed(answer) == list(range(1000, 989, -1))
    assert "not a date" in support.get("/admin/orders/?from=yesterday").text
    assert support.get("/admin/orders/?from=9999-99-99T00:00").status_code == 200


def test_story_of_an_order_on_its_way(support, buy, drain):
    buy(7, key="abc")
    page = support.get("/admin/orders/1").text
    assert "Waiting to be stored" in page
    assert "data-poll" in page
    assert "abc" in page
    drain()
    fragment = support.get("/admin/orders/1/live", headers=BROWSER).text
    assert "<html" not in fragment
    assert "Persisted" in fragment
    assert "data-poll" not in fragment
    assert support.get("/admin/orders/99").status_code == 404


def test_cancel_returns_the_units_once(client, support, buy, drain):
    buy(7, quantity=3)
    drain()
    assert client.get("/products/1").json["stockRemaining"] == 97
    answer = send(support, "/admin/orders/1/cancel", reason="changed their mind")
    assert answer.location == "/admin/orders/1"
    page = support.get("/admin/orders/1").text
    assert "Order 1 is cancelled; 3 units are free again." in page
    assert "Cancelled by staff support-page@example.com" in page
    assert "changed their mind" in page
    assert "3 units back in stock" in page
    send(support, "/admin/orders/1/cancel", reason="again")
    assert "This order is cancelled already" in support.get("/admin/orders/1").text
    assert client.get("/products/1").json["stockRemaining"] == 100


def test_cancel_needs_a_reason_and_an_order(client, support, buy, drain):
    buy(7, quantity=2)
    drain()
    assert send(support, "/admin/orders/2/cancel", reason="x").status_code == 404
    for field, value in (("reason", " "), ("quantity", "0"), ("quantity", "x"), ("key", " ")):
        answer = send(support, "/admin/orders/1/cancel", **{"reason": "x", field: value})
        assert answer.status_code == 422, field
    answer = send(support, "/admin/orders/1/cancel", reason=" ")
    assert 'id="e-reason"' in answer.text
    send(support, "/admin/orders/1/cancel", reason="x", quantity="3")
    assert "2 of this order&#39;s 2 units are left" in support.get("/admin/orders/1").text
    assert client.get("/products/1").json["stockRemaining"] == 98


def test_a_part_is_cancelled_once_and_told(client, support, buy, drain):
    buy(7, quantity=3)
    drain()
    for _ in range(2):
        send(support, "/admin/orders/1/cancel", reason="broken", quantity="1", key="form-1")
    page = support.get("/admin/orders/1").text
    assert "1 unit is free again" in page
    assert "1 unit cancelled by staff support-page@example.com" in page
    assert "(1 given back)" in page
    assert "Of the 2 that are left; empty for all." in page
    assert client.get("/products/1").json["stockRemaining"] == 98
    send(support, "/admin/orders/1/cancel", reason="the rest", quantity="")
    page = support.get("/admin/orders/1").text
    assert "Order 1 is cancelled; 2 units are free again." in page
    assert "quantity" not in page
    assert client.get("/products/1").json["stockRemaining"] == 100


def test_a_queued_order_is_cancelled_when_it_is_stored(client, app, support, buy, drain):
    buy(7, quantity=2)
    send(support, "/admin/orders/1/cancel", reason="early")
    page = support.get("/admin/orders/1").text
    assert "2 units are free as soon as the order is stored" in page
    assert "2 units will be given back as soon as it is stored." in page
    drain()
    with app.app_context():
        intents.apply_open()
    assert "Cancelled by staff" in support.get("/admin/orders/1").text
    assert client.get("/products/1").json["stockRemaining"] == 100


def test_the_story_of_a_hold_tells_its_payment(app, client, admin_headers, support, buy, drain):
    def told():
        page = support.get("/admin/orders/1").text
        story = page.partition('id="story-title"')[2].partition('id="facts-title"')[0]
        return page, re.findall(r"<h3>(.*?)</h3>", story)

    terms = {"holdSeconds": 300}
    assert client.patch("/products/1", json=terms, headers=admin_headers).status_code == 200
    buy(1, quantity=3)
    drain()
    assert told()[1] == ["Claimed and queued", "Persisted", "Held until"]
    paid = {"payment": "pi_4711"}
    assert client.post("/orders/1/confirm", json=paid, headers=admin_headers).status_code == 200
    page, steps = told()
    assert steps[2:] == ["Held until", "Confirmed"]
    assert 'Paid by <code class="break">pi_4711</code>' in page
    assert "Total as sold" not in page
    # Its moment is known from the feed.
    moments = page.count("<time")
    with app.app_context():
        numbering.keep_partitions()
        numbering.number_events()
    page, _ = told()
    assert page.count("<time") > moments
    part = {"quantity": 1, "reason": "asked for"}
    assert client.post("/orders/1/cancel", json=part, headers=admin_headers).status_code == 200
    page, steps = told()
    assert steps[3:5] == ["Confirmed", "1 unit cancelled by token ADMIN_API_TOKEN"]
    for name, amount in (
        ("Total as sold", "USD 2,999.97"), ("Given back", "USD 999.99"), ("Left", "USD 1,999.98")
    ):  # fmt: skip
        assert re.search(rf"<dt>{name}</dt><dd[^>]*>{re.escape(amount)}<", page), name


def export(browser, **query) -> list[dict]:
    answer = browser.get("/admin/orders/orders.csv", query_string=query)
    assert answer.mimetype == "text/csv"
    assert "attachment" in answer.headers["Content-Disposition"]
    return list(csv.DictReader(io.StringIO(answer.text.removeprefix("\ufeff"))))


def test_export_is_the_filter(support, many, buy):
    with support.application.app_context():
        stock.first.open(stock.generation(), first_order_id=1001)
    buy(3)
    rows = export(support)
    assert [int(row["order"]) for row in rows] == list(range(1001, 0, -1))
    assert rows[0]["status"] == "QUEUED"
    assert rows[1]["total"] == "1.00"
    assert rows[1]["product name"] == "Flash-sale item"
    assert [row["order"] for row in export(support, q=1, status="CANCELLED")] == [
        str(order_id) for order_id in range(1000, 0, -100)
    ]


def test_export_goes_on_past_a_step(app, many, monkeypatch):
    monkeypatch.setattr(search, "EXPORT_ORDERS", 300)
    with app.app_context():
        assert len(list(search.Export(search.Filter()))) == 1000


def test_an_export_that_is_not_whole_says_so(app, support, buy, drain, monkeypatch):
    for user in (1, 2, 3):
        buy(user)
    rows = export(support, product=1)
    assert [row["order"] for row in rows] == ["3", "2", "1"]
    monkeypatch.setattr(search, "WAITING_ORDERS", 1)
    monkeypatch.setattr(search, "MOST_WAITING", 1)
    assert export(support, product=2)[-1]["order"] == MISSING
    drain()
    assert export(support, product=2) == []
    monkeypatch.setattr("app.orders.search.stock", Away())
    assert [row["order"] for row in export(support)] == ["3", "2", "1", MISSING]


class Away:
    """Redis, when nobody can reach it; how many shards there are is a setting."""

    shards = (None,)

    def __getattr__(self, name):
        raise Unavailable("away")


FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "＋1",
    "－1",
    "＠SUM(A1)",
)


@pytest.mark.parametrize("text", [*FORMULAS, "9007199254740991", "007", "1e5", "12E-3"])
def test_no_cell_is_calculated_or_rounded(text):
    assert sheet.safe_cell(text) == "'" + text


@pytest.mark.parametrize("text", ["USD", "5", "", "a=b", "19.90", "999999999999999", "0", "Zoë"])
def test_plain_cells_stay_as_they_are(text):
    assert sheet.safe_cell(text) == text


def test_a_cell_is_one_cell_whatever_parts_them():
    cells = ("a;=1", "b\t=1", 'c"d', "e,f", "g\nh", None, 0)
    line = sheet.line(cells)
    assert next(csv.reader(io.StringIO(line, newline=""))) == [
        "" if cell is None else str(cell) for cell in cells
    ]
    assert '"a;=1"' in line
    assert '"b\t=1"' in line


def test_the_export_names_each_key(support, buy, drain):
    buy(7, key="checkout-1")
    drain()
    answer = support.get("/admin/orders/orders.csv")
    assert answer.data.startswith(b"\xef\xbb\xbf")
    (row,) = csv.DictReader(io.StringIO(answer.data.decode("utf-8-sig")))
    assert row["idempotency key"] == "checkout-1"


def test_holds_are_exported_and_counted_where_nobody_paid(
    support, client, admin_headers, buy, drain, app
):
    assert client.patch("/products/1", json={"holdSeconds": 60}, headers=admin_headers).json
    buy(7)
    until = buy(7).json["heldUntil"]
    buy("anna")
    drain()
    paid = client.post("/orders/3/confirm", json={"payment": "pi_3"}, headers=admin_headers)
    assert paid.status_code == 200
    assert [(row["held until"], row["payment"]) for row in export(support)][:2] == [
        (paid.json["heldUntil"], "pi_3"),
        (until, ""),
    ]
    assert "unpaid in the last hour" not in support.get("/admin/orders/?q=7").text
    with app.app_context():
        db.session.execute(
            text("UPDATE orders SET held_until = now() - interval '9 s' WHERE status = 'HELD'")
        )
        db.session.commit()
        assert expiry.expire(10) == 2
    assert "User 7 left 2 holds unpaid in the last hour." in support.get("/admin/orders/?q=7").text
    assert "unpaid in the last hour" not in support.get("/admin/orders/?q=anna").text
    with app.app_context():
        db.session.execute(
            text("UPDATE orders SET cancelled_at = now() - interval '61 min' WHERE id = 1")
        )
        db.session.commit()
    assert "left 1 hold unpaid" in support.get("/admin/orders/?q=7").text


def facts(page: str) -> dict[str, str]:
    """Return the figures of a page by their names, without marks and white space."""
    found = re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", page, re.DOTALL)
    return {re.sub("<.*?>", "", name): re.sub("<.*?>", "", value) for name, value in found}


def test_pages_tell_what_is_held_when_it_ends_and_how_many_were_paid(
    client, admin, admin_headers, buy, drain, app
):
    assert "Holds paid" not in admin.get("/admin/").text + admin.get("/admin/products/1").text
    assert client.patch("/products/1", json={"holdSeconds": 600}, headers=admin_headers).json
    for user in (1, 2, 3, 4):
        buy(user, quantity=2)
    drain()
    shown = facts(admin.get("/admin/products/1").text)
    assert (shown["Holds paid"], shown["Next hold ends in"][:3]) == ("–", "9 m")
    shown = facts(admin.get("/admin/").text)
    assert (shown["Units held"], shown["Holds paid"]) == ("8 in 4 orders", "–")
    # What is cancelled after it was paid was paid.
    for act in ("1/confirm", "2/confirm", "2/cancel", "3/release"):
        body = {"reason": "test"} if "confirm" not in act else {}
        assert client.post(f"/orders/{act}", json=body, headers=admin_headers).status_code == 200
    assert facts(admin.get("/admin/products/1/live").text)["Holds paid"] == "67 %"
    page = admin.get("/admin/live").text
    shown = facts(page)
    assert (shown["Units held"], shown["Holds paid"]) == ("2 in 1 order", "67 %")
    assert "next one ends in 9 min" in page
    with app.app_context():
        ledger.keep_proof()
    assert "now 2 held" in admin.get("/admin/ledger/").text
    assert client.post("/orders/4/release", headers=admin_headers).status_code == 200
    shown = facts(admin.get("/admin/products/1").text)
    assert (shown["Holds paid"], shown["Next hold ends in"]) == ("50 %", "–")


def audited(app, action: str) -> list[tuple[str, str, str]]:
    with app.app_context():
        query = select(AuditEntry).where(AuditEntry.action == action).order_by(AuditEntry.id)
        return [(e.actor, e.target, e.after["reason"]) for e in db.session.scalars(query)]


def test_why_a_person_acts_on_a_hold_is_kept_before_it_is_stored_and_after_its_end(
    app, client, admin_headers, support, buy, drain
):
    assert client.patch("/products/1", json={"holdSeconds": 60}, headers=admin_headers).json
    for user in (1, 2, 3, 4):
        buy(user)
    page = support.get("/admin/orders/1").text
    assert "Waiting to be stored" in page
    assert "data-poll" in page
    assert "Release order #1?" in page
    send(support, "/admin/orders/1/confirm", payment="cash", confirm_reason="at the desk")
    send(support, "/admin/orders/2/extend", seconds="5", extend_reason="on the phone")
    send(support, "/admin/orders/3/cancel", reason="not wanted")
    assert "1 unit will be given back" in support.get("/admin/orders/3").text
    drain()
    with app.app_context():
        assert intents.apply_open() == 3
        db.session.execute(
            text("UPDATE orders SET held_until = now() - interval '9 s' WHERE status = 'HELD'")
        )
        db.session.commit()
        assert expiry.expire(10) == 2
    who = "staff support-page@example.com"
    assert audited(app, "order.confirm") == [(who, "order 1", "at the desk")]
    assert audited(app, "order.extend") == [(who, "order 2", "on the phone")]
    assert audited(app, "order.release") == [(who, "order 3", "not wanted")]
    send(support, "/admin/orders/2/confirm", payment="pi_2", confirm_reason="the money came")
    assert client.post("/orders/4/confirm", headers=admin_headers).json["reclaimed"]
    assert audited(app, "order.reclaim") == [
        (who, "order 2", "the money came"),
        ("token ADMIN_API_TOKEN", "order 4", "paid late"),
    ]
    assert "“the money came”" in support.get("/admin/orders/2").text


def test_an_order_is_found_by_its_key(support, buy, drain):
    for user, key in ((7, "checkout-1"), (8, "checkout-2"), (9, "4711")):
        buy(user, key=key)
    assert listed(support.get("/admin/orders/?q=checkout-2")) == [2]
    drain()
    assert listed(support.get("/admin/orders/?q=checkout-1")) == [1]
    assert listed(support.get("/admin/orders/?q=checkout")) == []
    # A number may be a key, too.
    answer = support.get("/admin/orders/?q=4711")
    assert listed(answer) == [3]
    assert "under this key" in answer.text


def test_search_survives_a_dead_redis(support, many, monkeypatch):
    def away(*_, **__):
        raise search.Unavailable("away")

    monkeypatch.setattr(type(stock), "newest_waiting", away)
    answer = support.get("/admin/orders/")
    assert answer.status_code == 200
    assert "still queued are missing" in answer.text
    assert listed(answer)[0] == 1000


def test_an_order_that_waits_deep_in_the_queue_is_found(support, app, buy, monkeypatch):
    buy(1, key="first", reference="cart-1")
    with app.app_context():
        for user in range(1000, 1099):
            assert stock.claim(user, 1, 1, None, f"192.0.2.{user % 250}").outcome == b"accepted"
    monkeypatch.setattr(search, "WAITING_ORDERS", 10)
    for wanted in ("first", "cart-1"):
        answer = support.get(f"/admin/orders/?q={wanted}")
        assert listed(answer) == [1]
        assert "newest 10,000" not in answer.text
    # Bounded, and said so.
    monkeypatch.setattr(search, "MOST_WAITING", 60)
    answer = support.get("/admin/orders/?q=first")
    assert listed(answer) == []
    assert "Only the newest 10,000 were searched" in answer.text
    # Without a filter the newest page is enough.
    assert "Only the newest" not in support.get("/admin/orders/").text


def test_no_filter_reads_every_row(app, many):
    """Each kind of search is a range of an index, so that a million orders cost as little."""
    with app.app_context():
        db.session.execute(text("ANALYZE orders"))
        db.session.execute(text("SET LOCAL enable_seqscan = off"))
        for wanted in (
            search.Filter(),
            search.Filter(user=1),
            search.Filter(user="auth0|1"),
            search.Filter(reference="cart-1"),
            search.Filter(product_id=1),
            search.Filter(status="CANCELLED"),
            search.Filter(key="checkout-1"),
        ):
            query = search.stored_query(wanted, None, 51)
            sql = query.compile(dialect=db.engine.dialect, compile_kwargs={"literal_binds": True})
            plan = "\n".join(db.session.scalars(text(f"EXPLAIN {sql}")))
            assert "Seq Scan" not in plan, plan
        db.session.rollback()


def test_a_stored_order_is_not_shown_as_queued(app, buy, drain, monkeypatch):
    """Between the commit and the trim an order is in both places; it counts as stored."""
    buy(7)
    with app.app_context():
        waiting = stock.newest_waiting(10)
    drain()
    monkeypatch.setattr(
        type(stock), "newest_waiting", lambda stock, most, before: [] if before else waiting
    )
    with app.app_context():
        found = search.search(search.Filter()).orders
        assert [(order.id, order.status) for order in found] == [(1, "CONFIRMED")]
        assert search.search(search.Filter(status="QUEUED")).orders == []


def test_the_token_of_a_form_is_needed(support, buy, drain):
    buy(7)
    drain()
    assert support.post("/admin/orders/1/cancel", data={"reason": "x"}).status_code == 400
