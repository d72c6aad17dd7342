"""Signing in and out, sessions, roles, and what stands before every page."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import limits
import pytest
import redis
from client import free_port
from flask.sessions import SecureCookieSessionInterface
from itsdangerous import TimestampSigner
from people import BROWSER, PASSWORD, cookie_name, create_person, csrf_token, send, sign_in
from sqlalchemy import func

from app import create_app
from app.admin.guard import SESSION_LIFETIME, safe_target
from app.audit import CLI
from app.extensions import db, limiter, stock
from app.models import AuditEntry, Staff, StaffSession
from app.problems import Unavailable
from app.staff import people, sessions, signin, tokens

EVERYBODYS_PAGES = (
    "/admin/", "/admin/live", "/admin/chart.json", "/admin/orders/", "/admin/orders/orders.csv",
    "/admin/password",
)  # fmt: skip
# Everything else is for admins.
OPEN_TO_SUPPORT = {
    "session.sign_in", "session.sign_out", "session.show_password", "session.change_password",
    "dashboard.show", "dashboard.live", "dashboard.chart", "orders.index", "orders.export",
    "orders.show", "orders.live", "orders.cancel", "orders.confirm", "orders.extend",
}  # fmt: skip


def ways_in(app) -> list[tuple[str, str, str]]:
    """Return (endpoint, method, path) of whatever there is below /admin."""
    return [
        (rule.endpoint, method, re.sub("<[^>]+>", "1", rule.rule))
        for rule in app.url_map.iter_rules()
        if rule.rule.startswith("/admin/")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    ]


def test_nobody_sees_or_does_anything(app, client):
    for endpoint, method, path in ways_in(app):
        if endpoint == "session.sign_in":
            continue
        answer = client.open(path, method=method)
        assert answer.status_code == 302, (method, path)
        asked_from = f"?next={path}" if method == "GET" else ""
        assert answer.location == f"/admin/sign-in{asked_from}", (method, path)


@pytest.mark.parametrize("path", ["/admin", "/admin/nowhere"])
def test_nobody_learns_what_there_is(client, path):
    answer = client.get(path)
    assert (answer.status_code, answer.location) == (302, f"/admin/sign-in?next={path}")


def test_all_but_a_few_pages_and_acts_are_for_admins(app, support):
    token = {"csrf_token": csrf_token(support)}
    found = ways_in(app)
    assert {endpoint for endpoint, *_ in found} > OPEN_TO_SUPPORT
    for endpoint, method, path in found:
        if endpoint not in OPEN_TO_SUPPORT:
            answer = support.open(path, method=method, data=token if method == "POST" else None)
            assert answer.status_code == 403, (method, path)


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


def test_without_the_redis_of_sessions_postgresql_decides_alone(app, blind, monkeypatch):
    def away(*_, **__):
        raise redis.ConnectionError("Redis is away")

    create_person(app, "support")
    browser = app.test_client()
    sign_in(browser, "support-page@example.com")
    kept = kept_cookie(app, browser)
    monkeypatch.setattr(stock.jobs_client, "mget", away)
    with monkeypatch.context() as patch:
        patch.setattr(stock.jobs_client, "set", away)
        assert browser.get("/admin/password").status_code == 200
    with app.app_context():
        assert not stock.client.keys("staff:session:*")
    kept.application = blind
    assert kept.get("/admin/password").status_code == 503
    with app.app_context():
        people.set_active(people.find("support-page@example.com"), False, CLI)
    assert browser.get("/admin/password").status_code == 302


def test_a_token_that_cannot_be_checked_is_neither_valid_nor_wrong(app, blind, admin_headers):
    with app.app_context():
        _, text = tokens.create("checkout", ["*"], CLI)
    body = {"productId": 1, "amount": 1}
    client = blind.test_client()
    for token in (text, "fst_unknown"):
        headers = {"Authorization": f"Bearer {token}"}
        answer = client.post("/products/restock", json=body, headers=headers)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    # The setting's own needs no server to be known: the shape is looked at.
    assert client.post("/products/restock", json={}, headers=admin_headers).status_code == 400


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


def guess(client, email="admin-page@example.com", password="not this one", address=None):
    """Try a password; the form's token is asked for once."""
    if address:
        client.environ_base["REMOTE_ADDR"] = address
    data = {"csrf_token": csrf_token(client, "/admin/sign-in"), "email": email}
    return client.post("/admin/sign-in", data=data | {"password": password})


def use_up_the_guesses(app, email="admin-page@example.com", address="203.0.113.7"):
    stranger = app.test_client()
    answers = [guess(stranger, email, address=address).status_code for _ in range(11)]
    assert answers == [401] * 10 + [429]
    return guess(stranger, email)


def test_guessing_is_slowed_down_by_address_and_by_person(app, client):
    create_person(app, "admin")
    use_up_the_guesses(app, "x@y")
    use_up_the_guesses(app, "another@y")
    answer = guess(client, "a third@y", address="203.0.113.7")
    assert answer.status_code == 429, "20 wrong ones came from this address"
    # Another address of the same network of IPv6 is the same subscriber.
    for number in range(20):
        assert guess(client, f"{number}@y", address=f"2001:db8::{number + 1}").status_code == 401
    assert guess(client, "20@y", address="2001:db8::ffff").status_code == 429


def test_the_wait_is_told_truly(app):
    create_person(app, "admin")
    answer = use_up_the_guesses(app)
    seconds = int(answer.headers["Retry-After"])
    assert 14 * 60 < seconds <= 15 * 60
    assert f"Try again in {-(-seconds // 60)} minutes." in answer.text
    with app.app_context():
        limit = limiter.limiter.storage.storage.keys("*passwords*strangers*")
        assert [stock.client.ttl(key) for key in limit] == pytest.approx([seconds], abs=2)


def test_strangers_shut_nobody_out_who_has_signed_in_here_before(app):
    """By the browser, from any address; by the address, with any browser."""
    create_person(app, "admin")
    browser, at_home = app.test_client(), app.test_client()
    browser.environ_base["REMOTE_ADDR"] = "198.51.100.5"
    assert sign_in(browser).status_code == 302
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    use_up_the_guesses(app)
    elsewhere = guess(app.test_client(), password=PASSWORD, address="192.0.2.99")
    assert elsewhere.status_code == 429
    assert guess(at_home, password=PASSWORD, address="198.51.100.5").status_code == 302
    # At the strangers' own address, whose limit is used up as well.
    assert use_up_the_guesses(app, "another@y").status_code == 429
    assert guess(browser, password=PASSWORD, address="203.0.113.7").status_code == 302


def test_a_known_browser_guesses_no_more_than_others(app):
    create_person(app, "admin")
    browser = app.test_client()
    assert sign_in(browser).status_code == 302
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    answers = [guess(browser).status_code for _ in range(11)]
    assert answers == [401] * 10 + [429]
    assert guess(browser, password=PASSWORD).status_code == 429
    # For another person it is a stranger's.
    assert guess(browser, "x@y").status_code == 401


def test_a_device_of_another_person_is_a_stranger(app):
    create_person(app, "admin")
    create_person(app, "support")
    browser = app.test_client()
    assert sign_in(browser, "support-page@example.com").status_code == 302
    browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    use_up_the_guesses(app)
    assert guess(browser, password=PASSWORD, address="192.0.2.1").status_code == 429


def test_an_admins_reset_ends_the_wait_at_once(app):
    create_person(app, "admin")
    use_up_the_guesses(app)
    browser = app.test_client()
    assert guess(browser, password=PASSWORD, address="192.0.2.4").status_code == 429
    with app.app_context():
        people.set_password(people.find("admin-page@example.com"), "another password", CLI)
    assert guess(browser, password="another password").status_code == 302


def test_only_a_wrong_password_counts(app, blind):
    create_person(app, "admin")
    browser = app.test_client()
    for _ in range(12):
        assert sign_in(browser, password="").status_code == 422
        assert browser.post("/admin/sign-in", data={"email": "x@y"}).status_code == 400
    browser.application = blind
    for _ in range(12):
        assert sign_in(browser).status_code == 503
    browser.application = app
    for _ in range(12):
        assert sign_in(browser).status_code == 302
        browser.post("/admin/sign-out", data={"csrf_token": csrf_token(browser)})
    assert [guess(browser).status_code for _ in range(10)] == [401] * 10


def test_guesses_at_the_same_moment_are_counted_before_they_are_judged(app, monkeypatch):
    create_person(app, "admin")
    judged, real = [], people.check_password_hash
    monkeypatch.setattr(
        people, "check_password_hash", lambda *args: judged.append(1) or real(*args)
    )
    addresses = [f"198.51.100.{number}" for number in range(40)]
    token = csrf_token(first := app.test_client(), "/admin/sign-in")
    cookie = first.get_cookie(cookie_name(app), path="/admin").value

    def one(address):
        client = app.test_client()
        client.set_cookie(cookie_name(app), cookie, path="/admin")
        client.environ_base["REMOTE_ADDR"] = address
        data = {"csrf_token": token, "email": "admin-page@example.com", "password": "no"}
        return client.post("/admin/sign-in", data=data).status_code

    with ThreadPoolExecutor(12) as pool:
        answers = Counter(pool.map(one, addresses))
    assert answers == {401: 10, 429: 30}
    assert len(judged) == 10


def test_without_redis_no_password_is_looked_at(app, settings, client, tmp_path):
    create_person(app, "admin")
    deaf = create_app(replace(settings, redis_url=f"unix://{tmp_path}/none"))
    try:
        client.application = deaf
        assert guess(client, password=PASSWORD).status_code == 503
    finally:
        stock.init_app(settings)
        limiter.init_app(app)


def test_sign_ins_are_in_the_audit(app, client, admin):
    create_person(app, "support")
    guess(client, "support-page@example.com", address="192.0.2.77")
    guess(client, "my secret password", address="192.0.2.77")
    guess(client, "support-page@example.com", PASSWORD, "192.0.2.77")
    client.post("/admin/sign-out", data={"csrf_token": csrf_token(client)})
    with app.app_context():
        found = db.session.query(AuditEntry).filter(AuditEntry.address == "192.0.2.77")
        told = [(e.actor, e.action, e.target) for e in found.order_by(AuditEntry.id)]
    who = "staff support-page@example.com"
    assert told == [
        ("nobody", "session.refuse", who),
        ("nobody", "session.refuse", "staff unknown"),
        (who, "session.begin", who),
        (who, "session.end", who),
    ]


def test_a_flood_of_failures_does_not_fill_the_audit(app, client, monkeypatch):
    monkeypatch.setattr(signin, "AUDITED_FAILURES", limits.parse("3/hour"))
    for number in range(6):
        assert guess(client, f"{number}@y", address="192.0.2.78").status_code == 401
    with app.app_context():
        found = db.session.query(AuditEntry).filter(AuditEntry.address == "192.0.2.78")
        assert [entry.after for entry in found.order_by(AuditEntry.id)] == [
            None, None, {"note": "further ones of this hour are not listed"},
        ]  # fmt: skip


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
    answer = send(admin, page, current=PASSWORD, new=new, repeated=new)
    assert answer.status_code == 302
    assert "Your password is changed" in admin.get(page).text
    # The other session is over, and the old password too.
    assert other.get("/admin/").status_code == 302
    assert sign_in(other).status_code == 401
    assert sign_in(other, password=new).status_code == 302


def test_a_form_needs_its_token_and_the_words_say_what_is_wrong(app, admin):
    path, data = "/admin/products/1/sale", {"act": "pause"}
    old = csrf_token(admin)
    answer = admin.post(path, data=data)
    assert (answer.status_code, "came without its token" in answer.text) == (400, True)
    answer = admin.post(path, data=data | {"csrf_token": "made up"})
    assert (answer.status_code, "not one of ours" in answer.text) == (400, True)
    admin.post("/admin/sign-out", data={"csrf_token": old})
    csrf_token(admin, "/admin/sign-in")
    answer = admin.post("/admin/sign-in", data={"csrf_token": old, "email": "x", "password": "y"})
    assert (answer.status_code, "has expired" in answer.text) == (400, True)
    cookieless = app.test_client(use_cookies=False)
    answer = cookieless.post("/admin/sign-in", data={"csrf_token": old})
    assert (answer.status_code, "Allow cookies" in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 302), ({"Origin": "null"}, 302), ({"Origin": "https://localhost"}, 302),
        ({"Origin": "https://localhost:8443"}, 302), ({"Sec-Fetch-Site": "same-origin"}, 302),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://other.name"}, 302),
        ({"Referer": "https://evil.example/"}, 302),
        ({"Origin": "https://evil.example"}, 400), ({"Sec-Fetch-Site": "cross-site"}, 400),
        ({"Sec-Fetch-Site": "same-site", "Origin": "https://localhost"}, 400),
    ],
)  # fmt: skip
def test_the_token_is_enough_unless_the_browser_says_another_site(app, headers, status):
    create_person(app, "admin")
    browser = app.test_client()
    at = {"base_url": "https://localhost"}
    token = re.search(
        r'name="csrf_token" value="([^"]+)"', browser.get("/admin/sign-in", **at).text
    )
    data = {"csrf_token": token[1], "email": "admin-page@example.com", "password": PASSWORD}
    answer = browser.post("/admin/sign-in", data=data, headers=headers, **at)
    assert answer.status_code == status
    if status == 400:
        assert "another site" in answer.text


COOKIELESS = (
    "/static/vendor/htmx-2.0.11.min.js", "/static/admin.css", "/healthz", "/docs", "/products",
    "/openapi.json", "/nowhere", "/admin/rq/static/css/main.css", "/admin/rq/0/data/queues.json",
    "/products/1", "/purchase/orders/1",
)  # fmt: skip


@pytest.mark.parametrize("path", COOKIELESS)
@pytest.mark.parametrize("base_url", ["http://localhost", "https://localhost"])
def test_no_cookie_outside_of_the_pages(app, admin, path, base_url):
    """Not with a session either, and not with one that a browser sends everywhere."""
    name = cookie_name(app, base_url)
    value = admin.get_cookie(cookie_name(app), path="/admin").value
    headers = {"Cookie": f"{name}={value}"}
    answer = app.test_client(use_cookies=False).get(path, base_url=base_url, headers=headers)
    assert answer.status_code in (200, 404)
    assert "Set-Cookie" not in answer.headers


def test_the_cookies_of_others_do_no_harm(app):
    """One named `session`, of a parent domain or another port; one of our name that is not ours."""
    create_person(app, "admin")
    browser = app.test_client(use_cookies=False)
    name = cookie_name(app)
    page = browser.get("/admin/sign-in", headers={"Cookie": f"session=theirs; {name}=theirs"})
    own = page.headers["Set-Cookie"].partition(";")[0]
    data = {
        "csrf_token": re.search(r'name="csrf_token" value="([^"]+)"', page.text)[1],
        "email": "admin-page@example.com",
        "password": PASSWORD,
    }
    for cookies in (f"session=theirs; {name}=theirs; {own}", f"{own}; {name}=theirs"):
        answer = browser.post("/admin/sign-in", data=data, headers={"Cookie": cookies})
        assert answer.status_code == 302


def test_two_systems_on_one_host_keep_their_sessions_apart(app, settings):
    other = create_app(replace(settings, secret_key="another-secret-key-of-the-tests"))
    assert cookie_name(app) != cookie_name(other)


@pytest.mark.parametrize(
    "path",
    ["/products//1", "//products/1", "/admin//orders/", "/admin/staff", "/admin/orders",
     "//evil.example/admin/staff", "/admin", "/products/", "/admin/products"],
)  # fmt: skip
def test_no_redirect_follows_the_clients_host(admin, client, path):
    for browser in (admin, client):
        for scheme in ("http", "https"):
            answer = browser.get(
                path, base_url=f"{scheme}://localhost", headers={"Host": "evil.example"}
            )
            assert answer.status_code in (302, 308, 404)
            location = answer.headers.get("Location", "/")
            assert location.startswith("/")
            assert not location.startswith("//")
            assert "evil" not in location.partition("?")[0]


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
