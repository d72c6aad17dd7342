"""Importing products from files: judged to the last line first, then all of it or nothing."""

import io
import json
import re

import pytest
from people import csrf_token
from sqlalchemy import select

from app.admin import product_form
from app.audit import CLI
from app.books import ledger
from app.config import ROOT
from app.extensions import db
from app.models import AuditEntry, Product
from app.problems import Conflict, Unavailable
from app.products import catalogue, importing, terms
from app.products.movements import finish_pending
from app.products.sale import publish_stale

CSV = "name,price,currency,stock,sku\nLamp,19.90,eur,3,L-1\nFan,1500,JPY,1,L-2\n"
ROW = {"name": "Lamp", "priceCents": 1990, "currency": "EUR", "stock": 3}


def faults(content: str | bytes) -> list[tuple[int, str]]:
    plan = importing.read(content.encode() if isinstance(content, str) else content)
    assert plan.faults
    return [(fault.line, fault.message) for fault in plan.faults]


def made(content: str | bytes) -> list[tuple[object, ...]]:
    plan = importing.read(content.encode() if isinstance(content, str) else content)
    assert plan.faults == []
    return [
        (line, new.terms["name"], new.terms["price_cents"], new.terms["currency"], new.units)
        for line, new in zip(plan.lines, plan.products, strict=True)
    ]


def test_every_term_can_be_imported_and_edited():
    """A new one would else be known to the API alone."""
    assert set(importing.CELLS) == {*terms.TERMS, "stock"}
    buttons = ("paused", "archived")
    columns = {column for name, (column, _) in terms.TERMS.items() if name not in buttons}
    assert {column for _, column, _ in product_form.FIELDS.values()} == columns
    documented = (ROOT / "docs" / "admin.md").read_text().partition("## Importing products")[2]
    assert not [name for name in importing.COLUMNS if f"`{name}`" not in documented]


BOTH = [(2, "Lamp", 1990, "EUR", 3), (3, "Fan", 1500, "JPY", 1)]


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        CSV.replace("\n", "\r\n"),
        CSV.rstrip("\n"),
        "\ufeff" + CSV,
        CSV.encode("utf-16"),
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        CSV.replace(",", "\t").encode("utf-16"),
        CSV.replace("name,price", "Name , PRICE"),
        'Name,"Price",Currency,Stock\n"Lamp","19,90",EUR,3\nFan,"1,500",JPY,1\n,,,\n',
        "name;priceCents;currency;stock;Max Quantity;per_user_limit\n"
        "Lamp;1990;EUR;3;;\nFan;1500;jpy;1;2;2\n",
    ],
)
def test_forms_of_csv(app, content):
    with app.app_context():
        assert made(content) == BOTH


def test_json_with_lines(app):
    second = ROW | {"name": "Fan", "priceCents": 1500, "currency": "JPY", "stock": 1}
    content = f"[{json.dumps(ROW)},\n{json.dumps(second)}]"
    with app.app_context():
        assert made(content) == [(1, *BOTH[0][1:]), (2, *BOTH[1][1:])]
        assert made("\ufeff" + content)
        assert importing.read(json.dumps([ROW | {"visibility": "draft"}]).encode()).faults == []


def test_every_column_is_read(app):
    content = (
        "name,priceCents,currency,stock,sku,visibility,opensAt,closesAt,perUserLimit,maxQuantity,"
        "paused,archived\n"
        "Lamp,1,EUR,0,L,Hidden,2030-01-01T00:00:00Z,2031-01-01T00:00:00Z,2,3,TRUE,false\n"
    )
    with app.app_context():
        (new,) = importing.read(content.encode()).products
        (product,) = catalogue.add([new], CLI, "x")
        assert (product.sku, product.visibility, product.paused) == ("L", "hidden", True)
        assert (product.per_user_limit, product.max_quantity) == (2, 3)
        assert (product.opens_at.year, product.closes_at.year) == (2030, 2031)
        db.session.rollback()


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("", 1, "no product"), ("\n\n", 1, "no product"),
        ("name,price,currency,stock", 1, "no product"),
        ("[]", 1, "no product"), ("name,cost\nx,1", 1, "no column “cost”"),
        ("\n\nname,cost\nx,1", 3, "no column"), ("name,name\nx,y", 1, "more than once"),
        ("name,price,priceCents\nx,1,1", 1, "one alone"),
        ("name,price,currency\nLamp,1,EUR", 2, "stock is required"),
        ("name,currency,stock\nLamp,EUR,1", 2, "priceCents is required"),
        ("name,price,currency,stock\nLamp,,EUR,1", 2, "price is required"),
        ("name,price,currency,stock\nLamp,1,,1", 2, "currency must be"),
        ("name,price,currency,stock\nLamp,1,XAU,1", 2, "currency must be a code of ISO 4217"),
        ("name,price,currency,stock\nLamp,1.50,JPY,1", 2, "JPY has no digits"),
        ("name,price,currency,stock\nLamp,=1+1,EUR,1", 2, "price must be an amount"),
        ("name,price,currency,stock\nLamp,1E3,EUR,1", 2, "price must be an amount"),
        ("name,price,currency,stock\nLamp,1,EUR,1E+3", 2, "stock must be a whole number"),
        ("name,price,currency,stock\nLamp,1,EUR,-1", 2, "stock must be a whole number"),
        ("name,price,currency,stock\nLamp,1,EUR,1,more", 2, "more cells than columns"),
        ("name,price,currency,stock,paused\nLamp,1,EUR,1,yes", 2, "paused must be true or false"),
        ("name,price,currency,stock,visibility\nLamp,1,EUR,1,secret", 2, "visibility must be one"),
        ("name,price,currency,stock,opensAt\nLamp,1,EUR,1,27.11.2026", 2, "opensAt must be a time"),
        ('name,price,currency,stock\n"Lamp,1,EUR,1', 2, "not valid CSV"),
        ('name,price,currency,stock\n"Lamp"x,1,EUR,1', 2, "not valid CSV"),
        ("{}", 1, "must be an array"), ("[1]", 1, "must be an object"), ("[", 1, "not valid JSON"),
        ("[{}", 1, "not valid JSON"), ("[{}]x", 1, "more after its end"),
        ('[\n{"name": "x", "name": "y"}]', 2, "more than once"),
        ("[" * 100_000, 1, "not valid JSON"),
        ('[{"name":"x","priceCents":1.5,"currency":"EUR","stock":1}]', 1, "priceCents must be an"),
        ('[{"name":"x","priceCents":1,"currency":"EUR","stock":1,"id":7}]', 1, "id is not known"),
        ('[{"name":"x","priceCents":NaN,"currency":"EUR","stock":1}]', 1, "NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_and_where(app, content, line, words):
    with app.app_context():
        first, *_ = faults(content)
    assert first[0] == line
    assert words in first[1]


def test_other_encodings_are_named(app):
    with app.app_context():
        latin = "name,price,currency,stock\nLamp,1,EUR,1\nCafé,1,EUR,1\n".encode("cp1252")
        assert faults(latin) == [(3, "This is not UTF-8: save the file as “CSV UTF-8”")]
        assert "This is no text" in faults(CSV.encode("utf-16-le"))[0][1]
        assert faults(b"PK\x03\x04\x00\x00 an xlsx")[0][0] == 1


def test_every_wrong_line_is_named_up_to_a_bound(app):
    rows = "".join(f"P{n},{'x' if n % 2 else 1},EUR,1\n" for n in range(200))
    with app.app_context():
        plan = importing.read(f"name,price,currency,stock\n{rows}".encode())
    assert plan.faulty == 100
    assert [fault.line for fault in plan.faults] == [2 * n + 3 for n in range(50)]


def test_a_million_lines_are_refused_at_once(app):
    row = b"P,1,EUR,1\n"
    with app.app_context():
        assert (
            "import it in parts" in faults(b"name,price,currency,stock\n" + row * 1_000_000)[0][1]
        )
        many = faults(b"name,price,currency,stock\n" + row * 1001)
        assert many == [(1002, "There are more than 1,000 products: import them in parts")]
        most = importing.read(b"name,price,currency,stock\n" + row * 1000)
        assert len(most.products) == 1000


def test_skus_twice_in_the_file_and_in_the_shop(app, client, admin_headers):
    client.post("/products", json=ROW | {"sku": "L-1"}, headers=admin_headers)
    with app.app_context():
        assert faults(CSV) == [(2, "sku L-1 is product 2's")]
        assert faults(CSV.replace("L-1", "L-2")) == [(3, "sku L-2 is on line 2 already")]


def test_a_wrong_line_makes_nothing(app):
    with app.app_context():
        plan = importing.read((CSV + "Bad,x,EUR,1,\n").encode())
        with pytest.raises(Conflict):
            importing.carry_out(plan, CLI)
        assert db.session.query(Product).count() == 1


def test_all_of_it_is_on_sale_and_in_the_audit(app, buy):
    with app.app_context():
        assert importing.carry_out(importing.read(CSV.encode()), CLI) == [2, 3]
    assert buy(7, product_id=3).json["unitPriceCents"] == 1500
    assert buy(8, product_id=3).json["code"] == "sold_out"
    with app.app_context():
        assert ledger.check().ok
        entry = db.session.scalar(
            select(AuditEntry)
            .where(AuditEntry.action == "product.import")
            .order_by(AuditEntry.id.desc())
        )
        assert (entry.actor, entry.after["products"]) == ("command line", 2)


def test_a_sku_taken_after_the_dry_run_makes_nothing(app, client, admin_headers):
    with app.app_context():
        plan = importing.read(CSV.encode())
        client.post("/products", json=ROW | {"sku": "L-2"}, headers=admin_headers)
        with pytest.raises(catalogue.SkuTaken):
            importing.carry_out(plan, CLI)
        db.session.rollback()
        assert db.session.query(Product).count() == 2
        assert ledger.check().ok


def test_redis_lost_midway_and_the_sweeper_finishes(app, buy, monkeypatch):
    def lost(ids):
        raise Unavailable("lost")

    with app.app_context():
        plan = importing.read(CSV.encode())
        with monkeypatch.context() as patched:
            patched.setattr(catalogue, "put_on_sale", lost)
            with pytest.raises(Unavailable):
                importing.carry_out(plan, CLI, "one-key")
        # The form is sent again, which makes nothing twice; the sweeper does the rest.
        assert importing.carry_out(plan, CLI, "one-key") is None
        assert db.session.query(Product).count() == 3
        publish_stale()
        finish_pending()
        assert ledger.check().ok
    assert buy(7, product_id=2).status_code == 200


def send(admin, **data):
    data = {"csrf_token": csrf_token(admin), **data}
    return admin.post("/admin/products/import", data=data, content_type="multipart/form-data")


def test_the_page_shows_first_and_makes_once(app, client, admin):
    page = send(admin, file=(io.BytesIO(CSV.encode()), "products.csv"))
    assert page.status_code == 200
    assert "2 products with 4 units, not created yet" in page.text
    assert "JPY 1,500" in page.text
    assert len(client.get("/products").json) == 1
    key = re.search(r'name="key" value="([^"]+)"', page.text)[1]
    body = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page.text, re.DOTALL)[1]
    for _ in range(2):
        done = send(admin, text=body.replace("\n", "\r\n"), key=key, confirmed="yes")
        assert (done.status_code, done.location) == (302, "/admin/products/?sort=newest")
    assert [product["sku"] for product in client.get("/products").json] == [None, "L-1", "L-2"]
    assert "product.import" in admin.get("/admin/audit/").text


def test_the_page_tells_what_is_wrong(client, admin, support):
    wrong = send(admin, file=(io.BytesIO(b"name,price,currency,stock\n<b>,x,EUR,1\n"), "x.csv"))
    assert wrong.status_code == 422
    assert "Nothing was imported: 1 line is wrong" in wrong.text
    assert send(admin, text="").status_code == 422
    assert send(admin).status_code == 422
    # Larger than any file may be: a word, not a reset connection.
    large = send(admin, file=(io.BytesIO(b"x" * 2_000_000), "x.csv"))
    assert (large.status_code, "import it in parts" in large.text) == (400, True)
    assert send(support, text=CSV).status_code == 403
    assert len(client.get("/products").json) == 1


def test_larger_than_a_form(app, client, admin):
    content = "name,price,currency,stock\n" + "".join(
        f"{'Lamp ' * 30}{n},1.00,EUR,1\n" for n in range(500)
    )
    page = send(admin, file=(io.BytesIO(content.encode()), "products.csv"))
    assert (page.status_code, "500 products" in page.text) == (200, True)


def test_the_command(app, runner, tmp_path, client):
    def run(*words):
        return runner.invoke(args=["products", "import", *map(str, words)])

    file = tmp_path / "products.csv"
    file.write_text(CSV)
    dry = run(file, "--dry-run")
    assert dry.output == (
        "line 2: Lamp  EUR 19.90  stock 3\nline 3: Fan  JPY 1500  stock 1\n"
        "2 products would be created.\n"
    )
    assert run(file).exit_code == 1  # nobody said yes
    assert len(client.get("/products").json) == 1
    done = run(file, "--yes")
    assert done.output.endswith("2 products created, numbers 2 to 3.\n")
    one = tmp_path / "one.csv"
    one.write_text("name,price,currency,stock\nMug,9.90,EUR,7\n")
    assert run(one, "--yes").output.endswith("1 product created, number 4.\n")
    again = run(file, "--yes")
    assert again.exit_code == 1
    assert "sku L-1 is product 2's" in again.output
    assert len(client.get("/products").json) == 4
    assert run(tmp_path / "none", "--yes").exit_code == 2


def test_what_looks_like_a_formula_is_a_name_and_leaves_as_text(app, admin, buy, drain):
    with app.app_context():
        importing.carry_out(importing.read(b"name,price,currency,stock\n=1+1,1.00,EUR,1\n"), CLI)
    buy(7, product_id=2)
    drain()
    assert ",'=1+1," in admin.get("/admin/orders/orders.csv").text
