"""Signing in and out, sessions, roles, and what stands before every page."""

import re
from dataclasses import replace
from datetime import timedelta

import pytest
from conftest import ADMIN_PASSWORD, free_port
from flask.sessions import SecureCookieSessionInterface
from itsdangerous import TimestampSigner
from people import BROWSER, PASSWORD, cookie_name, create_person, csrf_token, send, sign_in
from sqlalchemy import func

from app import create_app
from app.admin.guard import SESSION_LIFETIME, safe_target
from app.audit import CLI
from app.extensions import db, limiter, stock
from app.models import Staff, StaffSession
from app.problems import Unavailable
from app.staff import people, sessions

ADMIN_PAGES = (
    "/admin/products/", "/admin/products/live", "/admin/products/1", "/admin/products/1/live",
    "/admin/products/1/edit", "/admin/products/new", "/admin/dead-letters/",
    "/admin/dead-letters/review", "/admin/ledger/", "/admin/ledger/live", "/admin/staff/",
    "/admin/audit/", "/admin/rq/", "/admin/rq/0/view/jobs", "/admin/rq/0/data/queues.json",
    "/admin/rq/static/css/main.css",
)  # fmt: skip
EVERYBODYS_PAGES = (
    "/admin/", "/admin/live", "/admin/chart.json", "/admin/orders/", "/admin/orders/orders.csv",
    "/admin/password",
)  # fmt: skip
ADMIN_ACTS = (
    "/admin/products/new", "/admin/products/1/edit", "/admin/products/1/sale",
    "/admin/products/1/restock", "/admin/dead-letters/replay", "/admin/ledger/rebuild",
    "/admin/staff/", "/admin/staff/1/active", "/admin/staff/1/role", "/admin/staff/1/password",
    "/admin/staff/tokens", "/admin/staff/tokens/1/revoke", "/admin/rq/requeue/orders",
    "/admin/rq/queue/orders/queued/empty",
)  # fmt: skip


@pytest.mark.parametrize("path", [*ADMIN_PAGES, *EVERYBODYS_PAGES, "/admin", "/admin/nowhere"])
def test_nobody_sees_anything(client, path):
    answer = client.get(path)
    assert answer.status_code == 302
    assert answer.location.startswith("/admin/sign-in?next=/admin")


@pytest.mark.parametrize("path", [*ADMIN_ACTS, "/admin/orders/1/cancel", "/admin/sign-out"])
def test_nobody_does_anything(client, path):
    answer = client.post(path)
    assert answer.status_code == 302
    assert answer.location == "/admin/sign-in"


@pytest.mark.parametrize("path", ADMIN_PAGES)
def test_admin_pages_are_for_admins(support, path):
    assert support.get(path).status_code == 403


@pytest.mark.parametrize("path", ADMIN_ACTS)
def test_admin_acts_are_for_admins(support, path):
    assert support.post(path, data={"csrf_token": csrf_token(support)}).status_code == 403


@pytest.mark.parametrize("path", EVERYBODYS_PAGES)
def test_support_sees_its_pages(support, path):
    assert support.get(path).status_code == 200


def test_support_is_offered_no_act(support):
    page = support.get("/admin/").text
    assert "/sale" not in page
    assert "/restock" not in page
    assert "/admin/staff/" not in page


def test_sign_in_and_out(app, client):
    create_person(app, "admin")
    page = client.get("/admin/sign-in?next=/admin/orders/%3Fq%3D7")
    assert "<html" in page.text
    answer = sign_in(client, next="/admin/orders/?q=7")
    assert (answer.status_code, answer.location) == (302, "/admin/orders/?q=7")
    assert client.get("/admin/").status_code == 200
    answer = client.post("/admin/sign-out", data={"csrf_token": csrf_token(client)})
    assert answer.location == "/admin/sign-in"
    assert client.get("/admin/").status_code == 302


def kept_cookie(app, browser):
    """Return a second browser with the cookie that the first has now, as a thief keeps it."""
    thief = app.test_client()
    name = cookie_name(app)
    thief.set_cookie(name, browser.get_cookie(name, path="/admin").value, path="/admin")
    return thief


def test_signing_out_ends_the_session_for_whoever_kept_its_cookie(app):
    create_person(app, "support")
    browser, other = app.test_client(), app.test_client()
    for each in (browser, other):
        sign_in(each, "support-page@example.com")
    thief = kept_cookie(app, browser)
    assert thief.get("/admin/orders/").status_code == 200
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    assert thief.get("/admin/orders/").status_code == 302
    assert thief.post("/admin/orders/1/cancel").status_code == 302
    assert other.get("/admin/orders/").status_code == 200, "another session of the same person"


def test_a_session_ends_after_a_week_however_busy(app, support):
    with app.app_context():
        db.session.query(StaffSession).update(
            {"created_at": func.now() - sessions.LONGEST - timedelta(seconds=1)}
        )
        db.session.commit()
    assert support.get("/admin/").status_code == 302


@pytest.fixture
def blind(settings):
    """Build the same system with a PostgreSQL that can't be reached."""
    address = f"postgresql+psycopg2://nobody@127.0.0.1:{free_port()}/nothing"
    return create_app(replace(settings, database_url=address))


def test_without_postgres_a_confirmed_session_reads_and_changes_nothing(app, blind, admin):
    """The record in Redis lets in whom PostgreSQL confirmed; nobody else."""
    assert admin.get("/admin/password").status_code == 200
    kept = kept_cookie(app, admin)
    kept.application = blind
    assert kept.get("/admin/password").status_code == 200
    page = kept.get("/admin/password")
    assert "admin-page@example.com" in page.text
    token = re.search(r'name="csrf_token" value="([^"]+)"', page.text)[1]
    for path in ("/admin/sign-out", "/admin/products/1/sale", "/admin/password"):
        assert kept.post(path, data={"csrf_token": token}).status_code == 503
    with app.app_context():
        stock.client.delete(*stock.client.keys("staff:session:*"))
    answer = kept.get("/admin/password")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1"), "not a 302: unknown"


def leave(browser):
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})


REVOKED = {
    "signed out": lambda app, browser, person: leave(browser),
    "another password": lambda app, browser, person: people.set_password(person, PASSWORD, CLI),
    "deactivated": lambda app, browser, person: people.set_active(person, False, CLI),
    "another role": lambda app, browser, person: people.set_role(person, "admin", CLI),
}


@pytest.mark.parametrize("how", REVOKED)
def test_what_is_revoked_is_revoked_without_postgres_too(app, blind, how):
    create_person(app, "support")
    browser = app.test_client()
    sign_in(browser, "support-page@example.com")
    assert browser.get("/admin/orders/").status_code == 200
    kept = kept_cookie(app, browser)
    with app.app_context():
        REVOKED[how](app, browser, people.find("support-page@example.com"))
    kept.application = blind
    assert kept.get("/admin/password").status_code == 503


def test_a_record_written_late_by_a_request_that_had_read_before_bars_nobody_in(app, blind):
    """A request reads PostgreSQL, the person is deactivated, then the request writes to Redis."""
    create_person(app, "support")
    browser = app.test_client()
    sign_in(browser, "support-page@example.com")
    assert browser.get("/admin/orders/").status_code == 200
    kept = kept_cookie(app, browser)
    with app.app_context():
        (key,) = stock.client.keys("staff:session:*")
        late = stock.client.get(key)
        people.set_active(people.find("support-page@example.com"), False, CLI)
        stock.client.set(key, late)
    kept.application = blind
    assert kept.get("/admin/password").status_code == 503


def test_after_a_change_of_role_the_new_one_counts_without_postgres(app, blind):
    create_person(app, "support")
    browser = app.test_client()
    sign_in(browser, "support-page@example.com")
    with app.app_context():
        people.set_role(people.find("support-page@example.com"), "admin", CLI)
    assert browser.get("/admin/staff/").status_code == 200
    kept = kept_cookie(app, browser)
    kept.application = blind
    assert ">admin<" in kept.get("/admin/password").text


def test_without_redis_nothing_is_revoked_and_nobody_is_shut_out(app, settings, admin, tmp_path):
    deaf = create_app(replace(settings, redis_url=f"unix://{tmp_path}/none"))
    try:
        kept = kept_cookie(app, admin)
        kept.application = deaf
        page = kept.get("/admin/password")
        assert page.status_code == 200
        token = re.search(r'name="csrf_token" value="([^"]+)"', page.text)[1]
        assert kept.post("/admin/sign-out", data={"csrf_token": token}).status_code == 503
        with deaf.app_context():
            person = people.find("admin-page@example.com")
            for change in (
                lambda: people.set_role(person, "support", CLI),
                lambda: people.set_active(person, False, CLI),
                lambda: people.set_password(person, "another password", CLI),
            ):
                with pytest.raises(Unavailable):
                    change()
                db.session.rollback()
    finally:
        stock.init_app(settings)
        limiter.init_app(app)
    assert admin.get("/admin/staff/").status_code == 200


def test_wrong_password_and_unknown_person_look_the_same(app, client):
    create_person(app, "admin")
    texts = set()
    for email in ("admin-page@example.com", "nobody@example.com"):
        answer = sign_in(client, email=email, password="not this one")
        assert answer.status_code == 401
        texts.add(
            re.sub(r'(name="csrf_token" value=)"[^"]+"', r"\1", answer.text.replace(email, ""))
        )
    assert len(texts) == 1


def test_guessing_is_slowed_down_by_address_and_by_person(app, client):
    create_person(app, "admin")
    data = {"csrf_token": csrf_token(client, "/admin/sign-in"), "email": "x@y", "password": "no"}
    answers = [client.post("/admin/sign-in", data=data).status_code for _ in range(11)]
    assert answers == [401] * 10 + [429]
    data["email"] = "another@y"
    answers = [client.post("/admin/sign-in", data=data).status_code for _ in range(11)]
    assert answers == [401] * 10 + [429]


def test_a_deactivated_person_is_out_at_once(app, support):
    assert support.get("/admin/").status_code == 200
    with app.app_context():
        db.session.query(Staff).filter_by(email="support-page@example.com").update(
            {"active": False}
        )
        db.session.commit()
    assert support.get("/admin/").status_code == 302
    assert sign_in(support, "support-page@example.com").status_code == 401


def test_htmx_is_led_to_the_sign_in_page_not_given_it(client):
    answer = client.get(
        "/admin/live",
        headers={"HX-Request": "true", "HX-Current-URL": "http://localhost/admin/orders/?q=7"},
    )
    assert answer.status_code == 401
    assert answer.headers["HX-Redirect"] == "/admin/sign-in?next=/admin/orders/?q%3D7"
    assert answer.text == ""


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example", "/admin\\@evil", "/purchase", "/administer",
     "/admin/\tx", "javascript:alert(1)", "", None],
)  # fmt: skip
def test_no_open_redirect(target):
    assert safe_target(target) is None


def test_session_cookie(app, admin):
    answer = admin.get("/admin/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert "Expires=" in cookie
    assert "Secure" not in cookie
    secure = admin.get("/admin/", base_url="https://localhost")
    assert all("Secure" in line for line in secure.headers.getlist("Set-Cookie"))


def test_polling_does_not_keep_a_session_alive(admin):
    admin.get("/admin/")
    assert "Set-Cookie" not in admin.get("/admin/live", headers={"X-Poll": "1"}).headers
    assert "Set-Cookie" in admin.get("/admin/").headers


def test_a_polled_answer_is_shared_and_holds_nobodys_token(admin, support):
    poll = {"X-Poll": "1", "HX-Request": "true"}
    first = admin.get("/admin/live", headers=poll).text
    assert "csrf_token" not in first
    assert "/sale" in first
    assert "/sale" not in support.get("/admin/live", headers=poll).text
    assert "csrf_token" in admin.get("/admin/live").text


def test_sessions_expire(app, admin, monkeypatch):
    serializer = SecureCookieSessionInterface().get_signing_serializer(app)
    name = cookie_name(app)
    data = serializer.loads(admin.get_cookie(name, path="/admin").value)
    past = TimestampSigner.get_timestamp
    age = (SESSION_LIFETIME + timedelta(seconds=5)).total_seconds()
    monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda self: int(past(self) - age))
    old = serializer.dumps(data)
    monkeypatch.undo()
    admin.set_cookie(name, old, path="/admin")
    assert admin.get("/admin/").status_code == 302


def test_a_planted_session_is_not_taken_over(app, client):
    create_person(app, "admin")
    csrf_token(client, "/admin/sign-in")
    with client.session_transaction("/admin/") as session:
        session["planted"] = "by another"
    sign_in(client)
    with client.session_transaction("/admin/") as session:
        assert "planted" not in session


def test_change_password(app, admin):
    other = app.test_client()
    sign_in(other)
    page = "/admin/password"
    answer = send(admin, page, current="wrong", new="short", repeated="other")
    assert answer.status_code == 422
    for text in ("This is not your password", "8 to 200 characters", "do not match"):
        assert text in answer.text
    new = "a new and better one"
    answer = send(admin, page, current=ADMIN_PASSWORD, new=new, repeated=new)
    assert answer.status_code == 302
    assert "Your password is changed" in admin.get(page).text
    # The other session is over, and the old password too.
    assert other.get("/admin/").status_code == 302
    assert sign_in(other).status_code == 401
    assert sign_in(other, password=new).status_code == 302


def test_a_form_needs_its_token(admin):
    answer = admin.post("/admin/products/1/sale", data={"act": "pause"})
    assert answer.status_code == 400
    assert "expired" in answer.text


def test_pages_have_a_strict_policy(admin):
    for path in ("/admin/", "/admin/sign-in", "/admin/orders/", "/admin/nowhere"):
        headers = admin.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"


def test_vendored_files_are_kept_by_browsers(client):
    answer = client.get("/static/vendor/htmx-2.0.11.min.js")
    assert answer.status_code == 200
    assert "immutable" in answer.headers["Cache-Control"]


def test_errors_are_pages(admin):
    answer = admin.get("/admin/nowhere")
    assert answer.status_code == 404
    assert "<html" in answer.text
    assert admin.get("/admin/orders/99999999999999999999").status_code == 404
    assert admin.get("/admin/orders/?q=%00").status_code == 400
    answer = admin.get("/admin/products/77", headers=BROWSER)
    assert (answer.status_code, answer.text) == (404, "Unknown product")
