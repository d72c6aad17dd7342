"""The pages of webhooks: made, shown once, changed, switched, sent again, removed."""

import re

import pytest
from sqlalchemy import text

from app.audit import CLI
from app.extensions import db
from app.feed import delivery, numbering, webhooks
from app.orders.drain import drain_batch

URL = "https://shop.example/hook"


@pytest.fixture
def endpoint(app):
    """The id of an endpoint; no other is left of another test."""
    with app.app_context():
        db.session.execute(text("TRUNCATE webhook_endpoints CASCADE"))
        db.session.commit()
        made, _ = webhooks.create({"url": URL}, CLI)
        yield made.id
        db.session.remove()
        db.session.execute(text("TRUNCATE webhook_endpoints CASCADE"))
        db.session.commit()


def form(browser, path: str) -> dict[str, str]:
    """Return the hidden fields of a page's forms."""
    page = browser.get(path).text
    return dict(re.findall(r'name="(csrf_token|key)" value="([^"]+)"', page))


def send(browser, page: str, path: str, **fields):
    return browser.post(path, data=form(browser, page) | fields)


def test_support_sees_none_of_it(support, endpoint):
    for path in ("/admin/webhooks/", f"/admin/webhooks/{endpoint}"):
        assert support.get(path).status_code == 403
    assert "Webhooks" not in support.get("/admin/").text


def test_a_secret_is_shown_once(admin, endpoint):
    hidden = form(admin, "/admin/webhooks/")
    fields = hidden | {"url": f"{URL}/2", "types": "order.held", "description": "<b>x"}
    made = admin.post("/admin/webhooks/", data=fields)
    assert made.status_code == 200
    (secret,) = re.findall(r"whsec_[\w+/=]+", made.text)
    again = admin.post("/admin/webhooks/", data=fields, follow_redirects=True)
    assert "shown once" in again.text
    assert secret not in again.text
    assert again.text.count(f"{URL}/2</a>") == 1
    assert "<b>x" not in again.text
    assert secret not in admin.get(f"/admin/webhooks/{endpoint + 1}").text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": ""}, "The address must"),
        ({"url": "ftp://x/"}, "must begin with"),
        ({"url": "http://127.0.0.1/"}, "private address"),
        ({"url": URL, "description": "x" * 201}, "The note must"),
        ({"url": URL, "types": "order.eaten"}, "types must be"),
    ],
)
def test_wrong_forms_keep_what_was_typed(admin, endpoint, fields, words):
    for path in ("/admin/webhooks/", f"/admin/webhooks/{endpoint}"):
        answer = send(admin, path, path, **fields)
        assert answer.status_code == 422
        assert words in answer.text or "types" in fields
    assert len(webhooks.everything()) == 1


def test_changed_switched_rotated_tested_removed(admin, endpoint):
    page = f"/admin/webhooks/{endpoint}"
    assert send(admin, page, page, url=f"{URL}/new", description="").status_code == 302
    assert f"{URL}/new" in admin.get(page).text
    asked = send(admin, page, f"{page}/enabled", on="no")
    assert "Switch this endpoint off?" in asked.text
    assert send(admin, page, f"{page}/enabled", on="no", confirmed="yes").status_code == 302
    assert "Switch on" in admin.get(page).text
    assert send(admin, page, f"{page}/enabled", on="yes").status_code == 302
    assert "Make a new secret?" in send(admin, page, f"{page}/secret").text
    rotated = send(admin, page, f"{page}/secret", confirmed="yes")
    assert len(re.findall(r"whsec_[\w+/=]+", rotated.text)) == 1
    assert "The former secret signs too" in rotated.text
    assert send(admin, page, f"{page}/test").status_code == 302
    assert "Waiting" in admin.get(page).text
    assert "Remove this endpoint?" in send(admin, page, f"{page}/remove").text
    assert send(admin, page, f"{page}/remove", confirmed="yes").status_code == 302
    assert admin.get(page).status_code == 404


def test_deliveries_attempts_and_the_banner(app, admin, endpoint, buy):
    buy(1)
    drain_batch("test", "test")
    numbering.Numberer().run_once()
    # Nobody is at that address: it can't be resolved, or not be reached.
    delivery.Job(endpoint).run()
    (sent,) = webhooks.deliveries(endpoint)
    page = f"/admin/webhooks/{endpoint}"
    assert "Failing" in admin.get(page).text
    fragment = admin.get(f"{page}/live").text
    assert "Send again" in fragment
    assert "<html" not in fragment
    shown = admin.get(f"{page}/deliveries/{sent.id}").text
    assert sent.message_id in shown
    assert "order.confirmed" in shown
    assert admin.get(f"{page}/deliveries/999").status_code == 404
    again = send(admin, page, f"{page}/deliveries/{sent.id}/redeliver")
    assert again.status_code == 302
    assert "switched off" not in admin.get("/admin/").text
    delivery.switch_off(webhooks.get(endpoint), "nobody was there")
    db.session.commit()
    assert "failed for too long" in admin.get("/admin/").text
    assert "nobody was there" in admin.get(page).text


def test_an_order_tells_what_the_shop_was_told(app, admin, support, endpoint, buy):
    for user in (1, 2, 3):
        buy(user)
    drain_batch("test", "test")
    numbering.Numberer().run_once()
    delivery.Job(endpoint).run()
    page = admin.get("/admin/orders/2").text
    assert "order.confirmed" in page
    assert URL in page
    assert f"-{2}</div>" in page
    assert URL in support.get("/admin/orders/2").text


def test_a_query_is_shown_to_nobody_and_kept_unless_changed(admin, app, endpoint):
    secret = f"{URL}?token=not-to-be-seen"
    page = f"/admin/webhooks/{endpoint}"

    def saved(**fields) -> str:
        assert send(admin, page, page, **fields).status_code == 302
        for path in ("/admin/webhooks/", page, "/admin/audit/"):
            assert "not-to-be-seen" not in admin.get(path).text
        db.session.expire_all()
        return webhooks.get(endpoint).url

    with app.app_context():
        assert saved(url=secret) == secret
        assert f'value="{URL}?…"' in admin.get(page).text
        assert saved(url=f"{URL}?…", description="mended") == secret
        assert saved(url=f"{URL}?other=1") == f"{URL}?other=1"
        assert saved(url=URL) == URL
