"""Staff, tokens, the audit, dead letters, the ledger, rq-dashboard."""

import ast
import csv
import html
import io
import json
import re
import time
from urllib.parse import quote

import pytest
import redis
from people import BROWSER, csrf_token, fields_of, send, sign_in
from rq import Worker
from rq.results import Result

from app.audit import ACTIONS
from app.config import ROOT
from app.extensions import db, stock
from app.models import ApiToken, AuditEntry, RequestKey, Staff
from app.sheet import CHUNK_ROWS
from app.stock.keys import KEYS
from app.watch import monitor
from app.worker import jobs


def secret_of(answer) -> str:
    return re.search(r'<code id="secret">([^<]+)</code>', answer.text)[1]


def person(app, email="new@example.com") -> Staff:
    with app.app_context():
        return db.session.query(Staff).filter_by(email=email).one()


@pytest.fixture
def newcomer(app, admin):
    """Somebody created in the pages, and their password."""
    with app.app_context():
        db.session.query(Staff).filter_by(email="new@example.com").delete()
        db.session.commit()
    return secret_of(send(admin, "/admin/staff/", email="New@example.com", role="support"))


def test_create_a_person(app, admin, newcomer):
    browser = app.test_client()
    assert sign_in(browser, "new@example.com", newcomer).status_code == 302
    assert browser.get("/admin/staff/").status_code == 403
    # The password is shown once, and nowhere again.
    assert newcomer not in admin.get("/admin/staff/").text


def test_a_form_sent_again_makes_nothing_again(app, admin):
    with app.app_context():
        db.session.query(Staff).filter_by(email="twice@example.com").delete()
        db.session.commit()
    form = {"email": "twice@example.com", "role": "support"}
    key = fields_of(admin.get("/admin/staff/"))["key"]
    password = secret_of(send(admin, "/admin/staff/", **form, key=key))
    again = send(admin, "/admin/staff/", **form, key=key)
    assert again.status_code == 302
    page = admin.get("/admin/staff/").text
    assert "twice@example.com was added already, and the password was shown once." in page
    assert sign_in(app.test_client(), "twice@example.com", password).status_code == 302

    # A reset that is reloaded leaves the password that was passed on as it is.
    path = f"/admin/staff/{person(app, 'twice@example.com').id}/password"
    asked = send(admin, path, key=f"{key}-reset")
    confirmed = fields_of(asked)
    password = secret_of(send(admin, path, **confirmed))
    assert send(admin, path, **confirmed).status_code == 302
    assert sign_in(app.test_client(), "twice@example.com", password).status_code == 302

    for _ in range(2):
        answer = send(admin, "/admin/staff/tokens", name="twice", scope="*", key=f"{key}-token")
    assert answer.status_code == 302
    with app.app_context():
        assert db.session.query(ApiToken).filter_by(name="twice").count() == 1
    # With something else in it the form says so, and works when it is sent once more.
    answer = send(admin, "/admin/staff/tokens", name="other", scope="*", key=f"{key}-token")
    assert answer.status_code == 422
    assert "This form has been sent before" in answer.text
    assert secret_of(send(admin, "/admin/staff/tokens", name="other", scope="*", key=f"{key}-more"))


def test_a_person_who_could_not_be_made_leaves_the_form_usable(app, admin):
    key = f"form-{time.time_ns()}"
    answer = send(admin, "/admin/staff/", email="nonsense", role="support", key=key)
    assert answer.status_code == 422
    with app.app_context():
        assert db.session.query(RequestKey).filter_by(key=key).count() == 0


@pytest.mark.parametrize(
    ("email", "role", "field"),
    [("nonsense", "support", "email"), ("", "support", "email"), ("a@b.c", "king", "role"),
     ("admin-page@example.com", "support", "email")],
)  # fmt: skip
def test_wrong_persons(admin, email, role, field):
    answer = send(admin, "/admin/staff/", email=email, role=role)
    assert answer.status_code == 422
    assert f'id="e-{field}"' in answer.text


def test_deactivate_and_let_in_again(app, admin, newcomer):
    browser = app.test_client()
    sign_in(browser, "new@example.com", newcomer)
    path = f"/admin/staff/{person(app).id}/active"
    assert "Deactivate new@example.com?" in send(admin, path, active="no").text
    assert browser.get("/admin/").status_code == 200
    send(admin, path, active="no", confirmed="yes")
    assert browser.get("/admin/").status_code == 302
    send(admin, path, active="yes")
    assert sign_in(browser, "new@example.com", newcomer).status_code == 302


def test_role_counts_from_the_next_request(app, admin, newcomer):
    browser = app.test_client()
    sign_in(browser, "new@example.com", newcomer)
    send(admin, f"/admin/staff/{person(app).id}/role", role="admin")
    assert browser.get("/admin/staff/").status_code == 200
    assert send(admin, f"/admin/staff/{person(app).id}/role", role="king").status_code == 400


def test_reset_a_password(app, admin, newcomer):
    path = f"/admin/staff/{person(app).id}/password"
    new = secret_of(send(admin, path, confirmed="yes"))
    browser = app.test_client()
    assert sign_in(browser, "new@example.com", newcomer).status_code == 401
    assert sign_in(browser, "new@example.com", new).status_code == 302


def test_nobody_locks_themselves_out(app, admin):
    me = person(app, "admin-page@example.com").id
    for path, data in (
        (f"/admin/staff/{me}/active", {"active": "no", "confirmed": "yes"}),
        (f"/admin/staff/{me}/role", {"role": "support"}),
        (f"/admin/staff/{me}/password", {"confirmed": "yes"}),
    ):
        assert send(admin, path, **data).status_code == 409
    assert admin.get("/admin/staff/").status_code == 200
    assert send(admin, "/admin/staff/999999/role", role="admin").status_code == 404


def test_tokens_are_shown_once_and_revoked(client, admin):
    token = secret_of(send(admin, "/admin/staff/tokens", name="checkout", scope="products:write"))
    page = admin.get("/admin/staff/").text
    assert "checkout" in page
    assert token not in page
    headers = {"Authorization": f"Bearer {token}"}
    body = {"productId": 1, "amount": 5}
    assert client.post("/products/restock", json=body, headers=headers).status_code == 200
    token_id = re.search(r"/admin/staff/tokens/(\d+)/revoke", page)[1]
    path = f"/admin/staff/tokens/{token_id}/revoke"
    assert "Revoke this token?" in send(admin, path).text
    send(admin, path, confirmed="yes")
    assert client.post("/products/restock", json=body, headers=headers).status_code == 401
    assert send(admin, "/admin/staff/tokens/99999/revoke", confirmed="yes").status_code == 404
    nameless = send(admin, "/admin/staff/tokens", name="", scope="*")
    assert nameless.status_code == 422
    assert "The name must be a text" in nameless.text


def test_audit_tells_who_what_and_what_was_before(admin):
    send(admin, "/admin/products/1/sale", act="pause")
    page = admin.get("/admin/audit/?target=product+1&action=product.change").text
    assert "staff admin-page@example.com" in page
    assert "<del>false</del>" in page
    assert "<ins>true</ins>" in page
    assert "127.0.0.1" in page
    assert "No changes found" in admin.get("/admin/audit/?actor=somebody else").text
    fragment = admin.get("/admin/audit/", headers=BROWSER | {"HX-Target": "results"}).text
    assert "<html" not in fragment


@pytest.mark.parametrize(
    "query",
    [
        "actor=admin-page@example.com", "actor=ADMIN-page", "actor=staff admin-page@example.com",
        "target=product 1", "target=Product 1", "target=product %231", "target=1",
        "target=flash-sale", "target=Flash-sale item",
        "from=2026-01-01T00:00", "from=2026-01-01T00:00&to=2999-01-01T00:00",
    ],
)  # fmt: skip
def test_audit_finds_what_people_type(admin, query):
    send(admin, "/admin/products/1/sale", act="pause")
    page = admin.get(f"/admin/audit/?action=product.change&{query}")
    assert "<ins>true</ins>" in page.text


@pytest.mark.parametrize(
    "query",
    ["actor=sue", "target=product 11", "target=%", "actor=%25", "target=item 1",
     "to=2020-01-01T00:00", "from=2999-01-01T00:00", "target=99999999999999999999", "actor=\\",
     "target='"],
)  # fmt: skip
def test_audit_finds_nothing_else(admin, query):
    send(admin, "/admin/products/1/sale", act="pause")
    assert "No changes found" in admin.get(f"/admin/audit/?action=product.change&{query}").text


def test_audit_by_person_and_by_token(admin, newcomer):
    send(admin, "/admin/staff/tokens", name="checkout of berlin", scope="*")
    assert ">staff.create<" in admin.get("/admin/audit/?target=new@example.com").text
    page = admin.get("/admin/audit/?target=Berlin&action=token.create").text
    assert "checkout of berlin" in page


def test_audit_refuses_a_time_that_is_none(admin):
    page = admin.get("/admin/audit/?from=yesterday")
    assert "The first is not a date and time" in page.text
    assert admin.get("/admin/audit/audit.csv?from=yesterday").status_code == 400


def test_audit_as_csv(app, admin):
    with app.app_context():
        for number in range(CHUNK_ROWS + 1):
            db.session.add(
                AuditEntry(actor="csv", action="test", target="=1+1", before={"n": number})
            )
        db.session.commit()
    answer = admin.get("/admin/audit/audit.csv?actor=csv&target=%3D1%2B1")
    assert answer.mimetype == "text/csv"
    rows = list(csv.reader(io.StringIO(answer.text.lstrip("\ufeff"))))
    assert rows[0] == ["id", "at", "who", "from", "change", "of", "before", "after"]
    assert len(rows) == CHUNK_ROWS + 2
    assert rows[1][2:] == ["csv", "", "test", "'=1+1", f'{{"n": {CHUNK_ROWS}}}', ""]


def recorded(tree) -> set[str]:
    """Return the actions that a module's calls of `record`, and its rows for the table, name."""
    named = [
        node.args[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("record", "_note")
        and len(node.args) > 1
    ] + [
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "action"
    ]
    return {
        constant.value
        for node in named
        for constant in ast.walk(node)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }


def test_every_action_is_in_the_list_of_the_filter(admin):
    called = [recorded(ast.parse(path.read_text())) for path in (ROOT / "app").rglob("*.py")]
    assert set().union(*called) == set(ACTIONS)
    page = admin.get("/admin/audit/").text
    for action in ACTIONS:
        assert f"<option >{action}</option>" in page


def test_audit_is_paged(app, admin):
    with app.app_context():
        for number in range(60):
            db.session.add(AuditEntry(actor="pages", action="test", target=f"thing {number}"))
        db.session.commit()
    page = admin.get("/admin/audit/?actor=pages").text
    assert page.count(">test<") == 50
    older = re.search(r'href="(/admin/audit/\?before=\d+&amp;actor=pages)"', page)[1]
    assert admin.get(older.replace("&amp;", "&")).text.count(">test<") >= 10


def test_tokens_of_one_name_can_be_told_apart(admin):
    first, second = (
        secret_of(send(admin, "/admin/staff/tokens", name="twin", scope="*")) for _ in "12"
    )
    page = admin.get("/admin/staff/").text
    for token in (first, second):
        assert f"{token[:10]}…" in page
        assert token[:12] not in page


@pytest.fixture
def letter(app, buy, drain):
    """A dead letter: an order under a key that Redis forgot and PostgreSQL did not."""
    buy(7, quantity=2, key="once")
    drain()
    with app.app_context():
        stock.client.hdel(*KEYS.idempotency(7, "once"))
    buy(7, quantity=2, key="once")
    drain()
    with app.app_context():
        return db.session.scalar(db.text("SELECT id FROM dead_letters"))


def test_dead_letters_are_told_and_decided_with_a_reason(client, admin, letter):
    assert "1 order could not be stored and waits" in admin.get("/admin/").text
    page = admin.get("/admin/dead-letters/").text
    assert "another order under this Idempotency-Key" in page
    review = admin.get(f"/admin/dead-letters/review?id={letter}").text
    assert "The user has order 1 under the same Idempotency-Key." in review
    assert "2 units of Flash-sale item go back on sale" in review
    assert "Could not be stored" in admin.get("/admin/orders/2").text

    answer = send(admin, "/admin/dead-letters/abandon", id=letter, reason="")
    assert answer.status_code == 422
    assert client.get("/products/1").json["stockRemaining"] == 96
    send(admin, "/admin/dead-letters/abandon", id=letter, reason="doubled")
    assert "1 of 1 abandoned." in admin.get("/admin/dead-letters/").text
    assert client.get("/products/1").json["stockRemaining"] == 98
    # Once is enough.
    send(admin, "/admin/dead-letters/abandon", id=letter, reason="again")
    assert client.get("/products/1").json["stockRemaining"] == 98
    page = admin.get("/admin/dead-letters/?state=abandoned").text
    assert "staff admin-page@example.com: doubled" in page


def test_a_replay_that_fails_says_why(admin, letter):
    send(admin, "/admin/dead-letters/replay", id=letter, reason="try")
    assert f"Dead letter {letter}:" in admin.get("/admin/dead-letters/").text


def test_nothing_chosen_and_nothing_known(admin, letter):
    assert admin.get("/admin/dead-letters/review").status_code == 302
    answer = send(admin, "/admin/dead-letters/explode", id=letter, reason="x")
    assert answer.status_code == 400
    assert "No dead letters" in admin.get("/admin/dead-letters/?user=99&product=77").text


def test_ledger_badge_follows_the_newest_proof(app, admin):
    def proof(age: float, difference: int, ok: bool, missing: list[int] = ()) -> None:
        found = {
            "at": time.time() - age,
            "ok": ok,
            "problems": [],
            "missing": list(missing),
            "products": {
                "1": {
                    "ok": ok, "difference": difference, "moved": 100, "stored": 0,
                    "queued": 0, "free": 100 + difference, "expected_free": 100, "pending": 0,
                    "problems": [] if ok else ["odd"],
                }
            },
        }  # fmt: skip
        with app.app_context():
            stock.client.set(KEYS.ledger, json.dumps(found))

    def badges() -> list[str]:
        """Return what the dashboard, the product's page and the ledger's say."""
        pages = [admin.get(path).text for path in ("/admin/", "/admin/products/1")]
        found = [re.search(r'"(state state-\w+)">Ledger ([^<]+)<', page).groups() for page in pages]
        page = admin.get("/admin/ledger/").text
        found.append(re.search(r'<span class="(state state-\w+)">([^<]+)<', page).groups())
        return [f"{words} ({look.removeprefix('state state-')})".lower() for look, words in found]

    assert badges() == ["unknown (unknown)"] * 3
    proof(0, 0, True)
    assert badges() == ["balanced (good)"] * 3
    proof(0, 0, True, missing=[2])
    assert badges() == ["partly proved (unknown)"] * 3
    proof(monitor.LEDGER_SECONDS + 1, 0, True)
    assert badges() == ["unknown (unknown)"] * 3
    # The whole sale's has no difference of its own.
    proof(0, 1003, False)
    whole = "does not balance (bad)"
    assert badges() == [whole, "off by +1,003 (bad)", whole]
    assert "ledger off by +1,003" in admin.get("/admin/live").text
    page = admin.get("/admin/ledger/").text
    assert "odd" in page
    assert "Off by +1,003" in page
    # The units agree, something else does not.
    proof(0, 0, False)
    assert badges() == [whole] * 3
    for page in map(admin.get, ("/admin/live", "/admin/ledger/", "/admin/products/1")):
        assert "off by" not in page.text


def test_rebuild_from_the_page(client, admin, buy, drain):
    buy(7)
    drain()
    assert "Rebuild the sale in Redis?" in send(admin, "/admin/ledger/rebuild").text
    with admin.application.app_context():
        stock.client.flushdb()
    assert "does not hold this sale" in admin.get("/admin/live").text
    send(admin, "/admin/ledger/rebuild", confirmed="yes")
    assert "On sale: 1 product with 99 free units" in admin.get("/admin/ledger/").text
    assert buy(8).status_code == 200
    page = admin.get("/admin/audit/?target=sale", headers={"HX-Target": "results"}).text
    assert page.count(">sale.rebuild.start<") == 1
    assert page.count(">sale.rebuild.done<") == 1


def test_a_rebuild_that_fails_is_told_too(app, admin):
    with app.app_context():
        stock.client.set(KEYS.generation, "another sale")
    send(admin, "/admin/ledger/rebuild", confirmed="yes")
    page = admin.get("/admin/audit/?action=sale.rebuild.failed").text
    assert "Redis holds another sale" in page


def test_a_busy_worker_is_listed_with_its_job(app, admin, buy):
    buy(7)
    with app.app_context():
        queue = jobs.orders_queue()
        worker = Worker([queue], connection=queue.connection, serializer=queue.serializer)
        worker.register_birth()
        worker.prepare_execution(jobs.enqueue_drain())
    listed = admin.get("/admin/rq/0/data/workers.json").json["workers"]
    assert [one["current_job"]["description"] for one in listed] == ["store the waiting orders"]


def test_what_a_jobs_page_puts_in_as_html_is_text(app, admin, buy):
    """An error may repeat an Idempotency-Key, and that page allows scripts."""
    key = "<img/src=x/onerror='alert(1)'>"
    buy(7)
    with app.app_context():
        queue = jobs.orders_queue()
        job = jobs.enqueue_drain()
        job.description = key
        job.meta = {"key": key}
        job.save()
        Result.create_failure(job, 60, f'File "x", line 1, in <module>\n{key} & more')
        worker = Worker([queue], connection=queue.connection, serializer=queue.serializer)
        worker.register_birth()
        worker.prepare_execution(job)
    for path in (f"job/{job.id}", "workers"):
        answer = admin.get(f"/admin/rq/0/data/{path}.json")
        assert "onerror" in answer.text
        assert not set("<>") & set(answer.text), path
        assert "&amp;lt" not in answer.text
    info = admin.get(f"/admin/rq/0/data/job/{job.id}.json").json
    assert html.unescape(info["exc_info"]).endswith("> & more")


def test_jobs_that_redis_does_not_show_are_a_503_and_rubbish_is_a_404(app, admin, monkeypatch):
    path = "/admin/rq/0/data/queues.json"
    with app.app_context():
        client = stock.jobs_raw_client
        client.set("rq:queues", "no set")
        assert admin.get(path).status_code == 404
        client.delete("rq:queues")
        client.acl_setuser("nobody", enabled=True, nopass=True, commands=["+client", "+hello"])
        options = client.connection_pool.connection_kwargs
        unix, rest = options["path"], {"username": "nobody", "password": "any"}
        monkeypatch.setattr(stock, "jobs_raw_client", redis.Redis(unix_socket_path=unix, **rest))
        try:
            answer = admin.get(path)
        finally:
            client.acl_deluser("nobody")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("path", ["", "0/view/jobs/orders/finished/8/dsc/1", "0/view/workers"])
def test_pages_of_jobs_without_redis_are_a_503_with_the_menu(app, admin, monkeypatch, path):
    away = redis.Redis.from_url("redis://127.0.0.1:1")
    monkeypatch.setattr(stock, "jobs_raw_client", away)
    answer = admin.get(f"/admin/rq/{path}")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert 'href="/admin/ledger/"' in answer.text


def test_jobs_are_shown_with_their_result(app, admin, buy):
    buy(7)
    with app.app_context():
        queue = jobs.orders_queue()
        job = jobs.enqueue_drain()
    data = admin.get("/admin/rq/0/data/queues.json").json
    assert data["queues"][0]["count"] == 1
    assert admin.get(f"/admin/rq/0/view/job/{job.id}").status_code == 200
    assert admin.get(f"/admin/rq/0/data/job/{job.id}.json").json["status"] == "queued"
    page = admin.get("/admin/rq/")
    assert "<html" in page.text
    assert "redis://" not in page.text
    assert "unix://" not in page.text
    assert "unsafe-inline" in page.headers["Content-Security-Policy"]
    # The buttons of its pages: the token is in a cookie, and sent as a header.
    token = admin.get_cookie("_csrf_token", path="/admin/rq/").value
    path = "/admin/rq/queue/orders/queued/empty"
    assert admin.post(path).status_code == 400
    answer = admin.post(path, headers={"X-CSRFToken": token})
    assert (answer.status_code, answer.json) == (200, {"status": "OK"})
    with app.app_context():
        assert queue.count == 0


@pytest.mark.parametrize(
    "path",
    ["0/view/job/gone", "0/data/job/gone.json", "5/", "5/view/jobs",
     "0/view/jobs/orders/nonsense/8/asc/1", "0/data/jobs/orders/queued/0/asc/1.json",
     "0/data/jobs/orders/queued/8/asc/x.json", "0/data/jobs/orders/queued/9999/asc/1.json",
     "0/data/job/a%20b.json", "0/view/job/a%20b", "0/data/job/%00.json", "0/data/job/*.json",
     "0/data/job/%F0%9F%9B%92.json", "0/view/job/a:b", "0/data/job/" + "x" * 2000 + ".json"],
)  # fmt: skip
def test_what_rq_dashboard_would_answer_with_500(admin, path):
    assert admin.get(f"/admin/rq/{path}").status_code == 404


@pytest.mark.parametrize("job", ["a%20b", "gone", "%00", "a:b", "x" * 2000])
@pytest.mark.parametrize("act", ["delete", "requeue"])
def test_what_rq_dashboard_would_change_and_fail(admin, job, act):
    answer = admin.post(f"/admin/rq/job/{job}/{act}", headers={"X-CSRFToken": csrf_token(admin)})
    assert answer.status_code in (200, 404)
    if answer.status_code == 200:
        assert answer.json == {"status": "ERROR"}


ODD = ("a b", "x", "0", "-1", "%", "*", "\u2028", "null", "..")


def test_no_path_below_jobs_is_a_500(app, admin):
    """Every route with odd values in every place."""
    token = {"X-CSRFToken": csrf_token(admin)}
    for rule in app.url_map.iter_rules():
        if not rule.endpoint.startswith("rq_dashboard."):
            continue
        for value in ODD:
            path = re.sub(r"<int:[^>]+>", "0", rule.rule)
            path = re.sub(r"<[^>]+>", quote(value, safe=""), path)
            for method in rule.methods - {"HEAD", "OPTIONS"}:
                answer = admin.open(path, method=method, headers=token)
                assert answer.status_code < 500, (method, path)


def test_no_change_of_state_by_get(admin):
    assert admin.get("/admin/rq/requeue/orders").status_code == 405
    answer = admin.post("/admin/rq/requeue/orders", headers={"X-CSRFToken": csrf_token(admin)})
    assert answer.json == {"status": "OK", "count": 0}
