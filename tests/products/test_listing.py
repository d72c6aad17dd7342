"""The list of products: found by name and id, filtered by state, sorted, page by page."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, text

from app.extensions import db
from app.products import currency, listing
from app.products.listing import Wanted

HOUR = timedelta(hours=1)


@pytest.fixture
def thousand(app):
    """1,000 products besides the first one, each state in turn; only a tenth sells."""
    with app.app_context():
        # What PostgreSQL knows of the tables when a thousand are imported.
        db.session.execute(text("ANALYZE products, product_totals"))
        db.session.execute(
            text(
                "INSERT INTO products"
                " (id, name, price_cents, currency, opens_at, closes_at, paused, visibility)"
                " OVERRIDING SYSTEM VALUE SELECT i, 'Drop ' || i, 100, 'USD',"
                " CASE WHEN i % 10 = 3 THEN now() + interval '1 hour' END,"
                " CASE WHEN i % 10 > 3 THEN now() - interval '1 hour' END, i % 10 = 2,"
                " CASE WHEN i % 10 = 8 THEN 'draft' ELSE 'listed' END"
                " FROM generate_series(2, 1001) AS i"
            )
        )
        # As the triggers keep them: ten units of each but of every tenth, which is sold out.
        db.session.execute(
            text(
                "INSERT INTO product_totals (product_id, moved_units, confirmed_units)"
                " SELECT id, 10, CASE WHEN id % 10 = 1 THEN 10 ELSE 0 END FROM products"
                " ON CONFLICT (product_id, shard) DO UPDATE SET moved_units = 10"
                " , confirmed_units = EXCLUDED.confirmed_units"
            )
        )
        db.session.commit()
        yield


def state_of(product_id: int) -> str:
    states = {0: "live", 1: "sold out", 2: "paused", 3: "scheduled", 8: "draft"}
    return states.get(product_id % 10, "ended")


def test_every_product_stands_on_one_page_live_first(thousand):
    first = listing.find(Wanted())
    assert (first.total, first.first, first.last) == (1001, 1, listing.PAGE_PRODUCTS)
    ids = [i for n in range(1, 22) for i in listing.find(Wanted(), n).ids]
    assert sorted(ids) == list(range(1, 1002))
    ranks = [listing.STATES.index(state_of(product_id)) for product_id in ids if product_id > 1]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("number", [0, -3, 22, 10**6])
def test_past_the_ends_are_the_first_and_the_last_page(thousand, number):
    page = listing.find(Wanted(), number)
    assert page.ids
    assert page.number == (1 if number < 1 else 21)


@pytest.mark.parametrize("state", [state for state in listing.STATES if state != "archived"])
def test_a_state_is_all_of_it_and_nothing_else(thousand, state):
    page = listing.find(Wanted(state=state))
    assert {state_of(product_id) for product_id in page.ids if product_id > 1} == {state}
    assert page.total == sum(state_of(i) == state for i in range(1, 1002))


@pytest.mark.parametrize(
    ("words", "found"),
    [("drop 77", [77, 770, 771]), ("#77", [77]), ("DROP 1000", [1000]), ("%", []), ("Drop_7", [])],
)
def test_a_part_of_the_name_or_the_id(thousand, words, found):
    ids = listing.find(Wanted(text=words, sort="name")).ids
    assert [i for i in ids if i in found or not found] == found
    if words.startswith(("#", "%", "Drop_")):
        assert ids == found


def test_the_page_costs_the_same_with_a_thousand(thousand, admin):
    """Rows of one page only, whatever there is; a poll asks for those that are shown."""
    answer = admin.get("/admin/products/?state=live")
    assert answer.text.count("<article") == listing.PAGE_PRODUCTS
    assert "1–50 of 100" in answer.text
    answer = admin.get("/admin/products/live?id=30&id=7&id=7&id=-1&id=99999999999999999999&id=x")
    assert answer.text.index('id="product-30"') < answer.text.index('id="product-7"')
    for query in ("page=x", "page=-1", "page=99999999999999", "sort=x&state=y", "q=%25&page=3"):
        assert admin.get(f"/admin/products/?{query}").status_code == 200


def test_past_and_future_are_judged_now(app, client, admin_headers):
    now = datetime.now(UTC)
    terms = {"priceCents": 1, "currency": "EUR", "stock": 1}
    for name, more in (
        ("over", {"closesAt": (now - HOUR).isoformat()}),
        ("to come", {"opensAt": (now + HOUR).isoformat()}),
        ("both", {"opensAt": (now + HOUR).isoformat(), "paused": True}),
        ("empty", {"stock": 0}),
    ):
        body = terms | {"name": name} | more
        assert client.post("/products", json=body, headers=admin_headers).status_code == 201
    with app.app_context():
        for state, ids in (
            ("ended", [2]), ("scheduled", [3]), ("paused", [4]), ("sold out", [5]), ("live", [1]),
        ):  # fmt: skip
            assert listing.find(Wanted(state=state)).ids == ids


def test_archived_products_are_found_among_themselves_alone(thousand):
    db.session.execute(text("UPDATE products SET archived = true WHERE id % 10 = 0"))
    assert listing.find(Wanted()).total == 901
    assert listing.find(Wanted(state="live")).total == 0
    assert listing.find(Wanted(state="archived")).total == 100
    assert listing.find(Wanted(text="#770")).ids == []
    assert listing.find(Wanted(text="#770", state="archived")).ids == [770]
    db.session.rollback()


def rows_of(plan: dict) -> int:
    """Return how many rows the steps of a plan went through, all together."""
    names = "Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter"
    own = sum(plan.get(name, 0) for name in names) * plan["Actual Loops"]
    return own + sum(map(rows_of, plan.get("Plans", ())))


@pytest.mark.parametrize(
    "look",
    [
        lambda: listing.find(Wanted()),
        lambda: listing.find(Wanted(sort="stock"), 7),
        lambda: listing.find(Wanted(state="live")),
        currency.doubts,
    ],
)
def test_sums_are_looked_up_whatever_the_statistics_say(thousand, look):
    """By those from before a large import, PostgreSQL went through all sums for each product."""
    asked = []

    def note(connection, cursor, statement, parameters, *_):
        asked.append((statement, parameters))

    event.listen(db.engine, "before_cursor_execute", note)
    try:
        look()
    finally:
        event.remove(db.engine, "before_cursor_execute", note)
    connection = db.session.connection()
    for statement, parameters in list(asked):
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
        plan = connection.exec_driver_sql(explain, parameters).scalar_one()[0]["Plan"]
        assert rows_of(plan) < 20_000, plan
    assert asked
    db.session.rollback()
