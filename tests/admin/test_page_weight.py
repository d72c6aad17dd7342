"""What the dashboard of a large sale weighs on its way to a browser, compressed as it is served."""

import gzip
import re

import pytest
from sqlalchemy import text

from app.config import ROOT
from app.extensions import db
from app.web.polls import Polls

PRODUCTS = 60
KB = 1000


def weight(data: bytes) -> int:
    return len(gzip.compress(data, 6))


@pytest.fixture(autouse=True)
def nothing_shared(app, monkeypatch):
    """No answer of another test: polls share theirs for a moment."""
    monkeypatch.setitem(app.extensions, "polls", Polls())


@pytest.fixture
def many(app):
    with app.app_context():
        db.session.execute(
            text(
                "INSERT INTO products (id, name, price_cents, currency) OVERRIDING SYSTEM VALUE"
                " SELECT i, 'Product number ' || md5(i::text), 100 + i, 'USD'"
                f" FROM generate_series(2, {PRODUCTS}) AS i"
            )
        )
        db.session.commit()


def test_a_poll_is_below_20_kb(admin, many):
    answer = admin.get("/admin/live", headers={"X-Poll": "1", "HX-Request": "true"})
    assert answer.text.count("<article") == PRODUCTS
    assert weight(answer.data) < 20 * KB


def test_the_first_load_is_below_250_kb(admin, many):
    page = admin.get("/admin/")
    files = set(re.findall(r'"/static/([^"#?]+)', page.text))
    assert len(files) > 9
    # The font is named by the style sheet, and compressed already.
    files.add("vendor/inter-5.3.0-latin.woff2")
    whole = sum(weight((ROOT / "static" / name).read_bytes()) for name in files)
    chart = weight(admin.get("/admin/chart.json").data)
    assert weight(page.data) + whole + chart < 250 * KB


def test_a_thousand_products_make_no_larger_dashboard(admin, app):
    with app.app_context():
        # What PostgreSQL knows of the tables when a thousand are imported.
        db.session.execute(text("ANALYZE products, product_totals"))
        db.session.execute(
            text(
                "INSERT INTO products (id, name, price_cents, currency, closes_at)"
                " OVERRIDING SYSTEM VALUE SELECT i, 'Product ' || i, 100, 'USD',"
                " CASE WHEN i <> 777 THEN now() - interval '1 hour' END"
                " FROM generate_series(2, 1001) AS i"
            )
        )
        db.session.commit()
    answer = admin.get("/admin/live", headers={"X-Poll": "1", "HX-Request": "true"})
    assert answer.text.count("<article") == PRODUCTS
    assert 'id="product-777"' in answer.text
    assert "60 of 1,001 products" in answer.text
