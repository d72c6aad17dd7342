"""Webhooks: what consumers get, whatever they do, and where nothing is ever sent."""

import itertools
import json
import logging
import socket
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy
from consumer import Consumer, drip, endless, garbage, hang, hang_up, number, reset
from people import API_TOKEN
from sqlalchemy import text
from waiting import patience

from app.audit import CLI
from app.books import recovery
from app.extensions import db
from app.feed import delivery, reading, sending, webhooks
from app.models import AuditEntry, WebhookDelivery, WebhookEndpoint
from app.orders import cancelling
from app.worker import jobs

HEADERS = {"Authorization": f"Bearer {API_TOKEN}"}


def make(consumer: Consumer, **values) -> tuple[int, str]:
    endpoint, secret = webhooks.create({"url": consumer.url, **values}, CLI)
    return endpoint.id, secret


def run(endpoint_id: int) -> delivery.Job:
    job = delivery.Job(endpoint_id)
    job.run()
    db.session.remove()
    return job


def now_due(endpoint_id: int) -> None:
    """Let the pause after a failure be over."""
    db.session.execute(text("UPDATE webhook_endpoints SET next_at = now()"))
    db.session.commit()


def state(endpoint_id: int) -> WebhookEndpoint:
    db.session.remove()
    return webhooks.get(endpoint_id)


def test_what_happens_is_sent_in_order_and_signed(shop, sell, consumer):
    sell(3)
    endpoint, secret = make(consumer)
    # Only what happens from now on.
    run(endpoint)
    assert consumer.received == []
    sell(5)
    cancelling.cancel(4, "asked for", CLI)
    number()
    job = run(endpoint)
    assert (job.delivered, job.events) == (1, 6)
    types = [(event["type"], event["order"]["id"]) for event in consumer.events]
    assert types == [("order.confirmed", n) for n in range(4, 9)] + [("order.cancelled", 4)]
    consumer.verify(secret)
    headers, body = consumer.received[0]
    message = json.loads(body)
    assert list(message) == ["type", "timestamp", "data"]
    assert message["type"] == "events"
    assert headers["content-type"] == "application/json"
    run(endpoint)
    assert len(consumer.received) == 1


def test_a_hundred_to_a_delivery_and_only_the_types_that_are_wanted(shop, sell, consumer):
    more_stock(shop)
    endpoint, _ = make(consumer)
    cancels, _ = make(consumer, types=["order.cancelled"])
    sell(250)
    cancelling.cancel(7, "asked for", CLI)
    number()
    run(endpoint)
    assert [len(json.loads(body)["data"]["events"]) for _, body in consumer.received] == [
        100, 100, 51,
    ]  # fmt: skip
    ids = [event["id"] for event in consumer.events]
    assert len(set(ids)) == len(ids) == 251
    consumer.received.clear()
    run(cancels)
    assert [event["type"] for event in consumer.events] == ["order.cancelled"]
    assert state(cancels).number == state(endpoint).number


def more_stock(app) -> None:
    body = {"productId": 1, "amount": 1000}
    app.test_client().post("/products/restock", json=body, headers=HEADERS)
    number()


def test_a_further_delivery_costs_a_handful_of_statements(shop, sell, consumer, monkeypatch):
    """Its events were read with those of the ones before, whose outcome its transaction records."""
    monkeypatch.setattr(delivery, "EVENTS_PER_DELIVERY", 2)
    endpoint, _ = make(consumer)
    counts = []
    for deliveries in (2, 6):
        sell(2 * deliveries)
        db.session.execute(text("SELECT 1"))
        seen = []

        def note(connection, cursor, statement, *_, seen=seen):
            seen.append(statement)

        sqlalchemy.event.listen(db.engine, "before_cursor_execute", note)
        run(endpoint)
        sqlalchemy.event.remove(db.engine, "before_cursor_execute", note)
        counts.append(len(seen))
    assert len(consumer.received) == 8
    assert (counts[1] - counts[0]) / 4 <= 6, counts


@pytest.fixture(params=[timedelta(hours=30), timedelta(hours=-30)], ids=["ahead", "behind"])
def wrong_clock(monkeypatch, request):
    """A context in which this process's clock is wrong."""

    class Wrong(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(zone) + request.param

    @contextmanager
    def is_wrong():
        with monkeypatch.context() as patched:
            patched.setattr(delivery, "datetime", Wrong)
            patched.setattr(webhooks, "datetime", Wrong)
            yield

    return is_wrong


def test_a_worker_whose_clock_is_wrong_puts_nobody_off(shop, sell, consumer, wrong_clock):
    endpoint, _ = make(consumer)
    with wrong_clock():
        webhooks.switch(endpoint, False, CLI)
        webhooks.switch(endpoint, True, CLI)
        sell(1)
        run(endpoint)
        consumer.statuses = [500]
        sell(1)
        run(endpoint)
    stamps = [int(headers["webhook-timestamp"]) for headers, _ in consumer.received]
    assert len(stamps) == 2
    assert all(abs(time.time() - stamp) < patience(60) for stamp in stamps)
    # The pause of a first failure, which is over at once.
    assert state(endpoint).next_at - datetime.now(UTC) < timedelta(minutes=1)
    now_due(endpoint)
    run(endpoint)
    assert [event["order"]["id"] for event in consumer.events] == [1, 2, 2]


def test_a_wrong_clock_neither_prolongs_nor_ends_a_former_secret(shop, sell, consumer, wrong_clock):
    endpoint, former = make(consumer)
    with wrong_clock():
        webhooks.rotate(endpoint, CLI)
        left = state(endpoint).former_until - datetime.now(UTC)
        assert abs(left - timedelta(hours=webhooks.OVERLAP_HOURS)) < timedelta(seconds=patience(60))
        sell()
        run(endpoint)
        consumer.verify(former)
        db.session.execute(text("UPDATE webhook_endpoints SET former_until = now()"))
        db.session.commit()
        sell()
        run(endpoint)
    assert [len(headers["webhook-signature"].split()) for headers, _ in consumer.received] == [2, 1]


def test_what_is_asked_for_is_sent_in_that_order_whatever_the_clocks_say(
    shop, sell, consumer, wrong_clock
):
    endpoint, _ = make(consumer)
    sell()
    run(endpoint)
    (first,) = webhooks.deliveries(endpoint)
    with wrong_clock():
        webhooks.redeliver(endpoint, first.id, CLI)
        asked = webhooks.delivery_of(endpoint, first.id).wanted_at
        assert abs(asked - datetime.now(UTC)) < timedelta(seconds=patience(60))
        test = webhooks.send_test(endpoint, CLI)
        assert asked < test.wanted_at
        assert abs(test.created_at - asked) < timedelta(seconds=patience(60))


def test_a_failing_delivery_is_repeated_as_it_was(shop, sell, consumer):
    endpoint, secret = make(consumer)
    sell(2)
    consumer.statuses = [500, 503]
    run(endpoint)
    assert state(endpoint).failures == 1
    # More happens meanwhile: it waits behind, and does not change what is repeated.
    sell(3)
    run(endpoint)
    assert len(consumer.received) == 1, "the pause is kept"
    for _ in range(2):
        now_due(endpoint)
        run(endpoint)
    assert len(set(consumer.ids()[:3])) == 1
    assert consumer.received[0][1] == consumer.received[1][1] == consumer.received[2][1]
    assert consumer.ids()[3] != consumer.ids()[0]
    consumer.verify(secret)
    assert [event["order"]["id"] for event in consumer.events] == [1, 2] * 3 + [3, 4, 5]
    assert (state(endpoint).failures, state(endpoint).failing_since) == (0, None)


def test_killed_between_send_and_record(shop, sell, consumer, monkeypatch):
    endpoint, _ = make(consumer)
    sell(2)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(delivery.Job, "_record", die)
    with pytest.raises(KeyboardInterrupt):
        delivery.Job(endpoint).run()
    monkeypatch.undo()
    db.session.remove()
    sell(1)
    run(endpoint)
    first, second, third = consumer.received
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]
    assert json.loads(third[1])["data"]["events"][0]["order"]["id"] == 3


def test_what_was_sent_before_a_failure_is_not_sent_again(shop, sell, consumer, monkeypatch):
    monkeypatch.setattr(delivery, "EVENTS_PER_DELIVERY", 1)
    endpoint, _ = make(consumer)
    sell(2)
    sign = delivery.signed

    def fail_once(*given):
        if consumer.received:
            raise MemoryError
        return sign(*given)

    monkeypatch.setattr(delivery, "signed", fail_once)
    with pytest.raises(MemoryError):
        delivery.Job(endpoint).run()
    monkeypatch.setattr(delivery, "signed", sign)
    run(endpoint)
    assert [event["order"]["id"] for event in consumer.events] == [1, 2]
    assert len(set(consumer.ids())) == 2


def test_an_endpoint_that_was_off_for_longer_than_events_are_kept(shop, sell, consumer, caplog):
    endpoint, _ = make(consumer)
    sell(5)
    db.session.execute(text("DELETE FROM events WHERE number <= 3"))
    db.session.execute(text("UPDATE feed SET floor = 3"))
    db.session.commit()
    run(endpoint)
    assert [event["order"]["id"] for event in consumer.events] == [4, 5]
    assert f"webhook {endpoint}: events before 3 are no longer kept" in caplog.text


def test_a_repeated_act_of_an_endpoint_is_done_once(shop, sell, consumer):
    client = shop.test_client()
    endpoint, _ = make(consumer)
    sell()
    run(endpoint)
    for act in ("test", "secret", "deliveries/1/redeliver"):
        path, headers = f"/webhooks/{endpoint}/{act}", HEADERS | {"Idempotency-Key": act}
        first, second = (client.post(path, headers=headers) for _ in range(2))
        assert first.status_code in (200, 202), first.text
        assert (second.status_code, second.headers["Idempotent-Replayed"]) == (
            first.status_code, "true",
        )  # fmt: skip
        assert "Idempotent-Replayed" not in first.headers
        assert second.json == first.json
    run(endpoint)
    # The event, once more as it was asked for, and the test.
    assert len(consumer.received) == 3


@pytest.mark.parametrize("status", [500, 503, 408, 425, 429])
def test_answers_that_ask_for_another_attempt(shop, sell, consumer, status):
    endpoint, _ = make(consumer)
    sell()
    consumer.statuses = [status] * 20
    for _ in range(8):
        now_due(endpoint)
        run(endpoint)
    assert (state(endpoint).state, state(endpoint).failures) == ("on", 8)


@pytest.mark.parametrize("status", [301, 307, 400, 401, 404])
def test_answers_that_ask_for_none(shop, sell, consumer, status):
    endpoint, _ = make(consumer)
    sell()
    consumer.behave = lambda handler: handler.answer(status, Location=consumer.url) or True
    for _ in range(6):
        now_due(endpoint)
        run(endpoint)
    assert len(consumer.received) == delivery.FINAL_ATTEMPTS, "and no redirect is followed"
    assert state(endpoint).state == "off"
    assert str(status) in state(endpoint).off_reason
    # Nothing is lost: switched on it goes on with the very delivery.
    consumer.behave = None
    webhooks.switch(endpoint, True, CLI)
    run(endpoint)
    assert len(set(consumer.ids())) == 1
    assert state(endpoint).off_reason is None


def test_gone_switches_off_at_once_with_a_word_in_the_audit(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    consumer.statuses = [410]
    run(endpoint)
    assert state(endpoint).state == "off"
    entry = db.session.query(AuditEntry).order_by(AuditEntry.id.desc()).first()
    assert (entry.action, entry.target, entry.actor) == (
        "webhook.off",
        f"webhook {endpoint}",
        "system",
    )
    assert state(endpoint).off_reason


def test_after_three_days_it_is_switched_off(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    consumer.statuses = [500] * 9
    run(endpoint)
    db.session.execute(
        text("UPDATE webhook_endpoints SET failing_since = now() - interval '71 hours'")
    )
    now_due(endpoint)
    run(endpoint)
    assert state(endpoint).state == "on"
    db.session.execute(
        text("UPDATE webhook_endpoints SET failing_since = now() - interval '73 hours'")
    )
    now_due(endpoint)
    run(endpoint)
    assert state(endpoint).state == "off"
    assert "3 days" in state(endpoint).off_reason


def test_pauses_grow_and_retry_after_is_heeded(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    consumer.statuses = [500] * 12
    pauses = []
    for _ in range(11):
        now_due(endpoint)
        asked = datetime.now(UTC)
        run(endpoint)
        pauses.append((state(endpoint).next_at - asked).total_seconds())
    assert pauses[0] < 10
    assert all(after > before for before, after in itertools.pairwise(pauses[:10]))
    assert 6 * 3600 <= pauses[-1] <= 6 * 3600 * 1.2 + 5
    consumer.behave = lambda handler: handler.answer(429, Retry_After="10000") or True
    db.session.execute(text("UPDATE webhook_endpoints SET failures = 0"))
    now_due(endpoint)
    run(endpoint)
    assert 9_990 < (state(endpoint).next_at - datetime.now(UTC)).total_seconds() <= 10_000


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5), ("0", 0), ("-5", None), ("soon", None), ("9" * 30, None), ("", None), ("٣", None)],
)
def test_retry_after(value, seconds):
    headers = [(b"Retry-After", value.encode("utf-8"))]
    assert sending._retry_after(headers) == seconds


def test_retry_after_as_a_date():
    moment = datetime.now(UTC) + timedelta(minutes=5)
    text_ = moment.strftime("%a, %d %b %Y %H:%M:%S GMT").encode()
    assert 295 < sending._retry_after([(b"retry-after", text_)]) <= 300


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (hang, "not answered in time"),
        (drip, "not answered in time"),
        (reset, "reset"),
        (garbage, "not HTTP"),
    ],
)
def test_consumers_that_do_not_answer(shop, sell, consumer, behave, error):
    endpoint, _ = make(consumer)
    sell()
    consumer.behave = behave
    started = time.monotonic()
    run(endpoint)
    assert time.monotonic() - started < patience(sending.SECONDS + 3)
    (sent,) = webhooks.deliveries(endpoint)
    (attempt,) = webhooks.attempts(sent.id)
    assert error in attempt.error
    assert state(endpoint).failures == 1


def test_200_counts_whatever_the_body_says(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    consumer.behave = lambda handler: handler.answer(200, b"\x00\xff{nonsense") or True
    run(endpoint)
    sell()
    consumer.behave = endless
    started = time.monotonic()
    run(endpoint)
    assert time.monotonic() - started < patience(4)
    assert state(endpoint).failures == 0
    assert [webhooks.state_of(one) for one in webhooks.deliveries(endpoint)] == ["delivered"] * 2


def test_nobody_there(shop, sell, consumer):
    endpoint, _ = make(consumer)
    consumer.close()
    sell()
    run(endpoint)
    (sent,) = webhooks.deliveries(endpoint)
    assert webhooks.attempts(sent.id)[0].error == "the connection was refused"


def test_a_kept_connection_that_the_consumer_has_closed(shop, sell, consumer):
    more_stock(shop)
    endpoint, _ = make(consumer)
    sell(201)
    closed = []

    def close_after(handler):
        handler.answer(200)
        handler.close_connection = True
        closed.append(1)
        return True

    consumer.behave = close_after
    run(endpoint)
    assert (len(closed), state(endpoint).failures) == (3, 0)


def test_a_kept_connection_that_is_closed_when_it_is_used_again(shop, sell, consumer):
    """Too late to be seen before: the message is sent once more, on another one."""
    more_stock(shop)
    endpoint, _ = make(consumer)
    sell(201)
    answered = []

    def hang_up_once(handler):
        if len(answered) == 1 and not hung_up:
            hung_up.append(1)
            return hang_up(handler)
        answered.append(1)
        return False

    hung_up = []
    consumer.behave = hang_up_once
    run(endpoint)
    assert (len(hung_up), len(answered), state(endpoint).failures) == (1, 3, 0)


def test_a_consumer_that_always_hangs_up_is_no_circle(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    consumer.behave = hang_up
    run(endpoint)
    assert (len(consumer.received), state(endpoint).failures) == (1, 1)


PRIVATE = [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1",
    "169.254.169.254", "100.64.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "224.0.0.1", "255.255.255.255",
    "240.0.0.1", "fe80::1%eth0", "198.18.0.1", "ff02::1", "2001:db8::1",
    "fec0::1", "64:ff9b:1::7f00:1", "::ffff:0:7f00:1", "::7f00:1",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not sending.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "1.1.1.1"])
def test_public_addresses(address):
    assert sending.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://localhost:8000/", "http://[::1]/", "http://10.0.0.1/x",
        "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data",
        "ftp://example.com/", "//example.com", "example.com", "http://", "http://a b/",
        "http://user:secret@example.com/", "http://example.com/#part", "http://example.com:0/",
        "http://example.com:99999/", "http://exämple.com/", "http://x/\r\nHost: y", "http://x/\x00",
        "javascript:alert(1)", "", " ", "http://x/" + "a" * 2000, 7, None, ["http://x/"],
        "http://sale.localhost/", "http://127.0.0.1./", "http://2130706433/", "http://0x7f000001/",
        "http://0177.0.0.1/", "http://127.1/", "http://0/", "http://[fec0::1]/",
    ],
)  # fmt: skip
def test_wrong_addresses(client, url):
    answer = client.post("/webhooks", json={"url": url}, headers=HEADERS)
    assert (answer.status_code, answer.json["field"]) == (400, "url")


def test_a_name_that_leads_home_is_refused_when_it_is_sent(shop, sell, consumer, monkeypatch):
    """Whatever the name said when the endpoint was made, or a moment ago: what counts is now."""
    answers = ["8.8.8.8", "127.0.0.1"]
    asked = []

    def resolve(host, port, *_, **__):
        asked.append(host)
        address = answers[min(len(asked), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(sending.socket, "getaddrinfo", resolve)
    assert resolve("shop.example", 80)[0][4][0] == "8.8.8.8"
    with sending.Sender(allow_private=False) as sender:
        outcome = sender.post(f"http://shop.example:{consumer.port}/", {}, b"{}")
    assert outcome.error == "the name leads to a private address"
    assert consumer.received == []
    assert asked == ["shop.example"] * 2, "resolved once for a connection, and that is checked"


def test_a_wrong_certificate(shop, tmp_path):
    server, certificate = tls_server(tmp_path)
    url = f"https://127.0.0.1:{server.server_address[1]}/"
    try:
        with sending.Sender(allow_private=True) as sender:
            outcome = sender.post(url, {}, b"{}")
        assert "certificate" in outcome.error
        import ssl

        with sending.Sender(True, ssl.create_default_context(cafile=str(certificate))) as sender:
            assert sender.post(url, {}, b"{}").status == 204
            other = url.replace("127.0.0.1", "localhost")
            assert "certificate" in sender.post(other, {}, b"{}").error
    finally:
        server.shutdown()
        server.server_close()


def tls_server(folder):
    """Return an HTTPS server with a certificate of its own for 127.0.0.1 alone, and the file."""
    import ipaddress
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "consumer")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            False,
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "consumer.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    consumer = Consumer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    consumer.server.socket = context.wrap_socket(consumer.server.socket, server_side=True)
    return consumer.server, path


def test_secrets_are_shown_once_and_stored_nowhere(shop, sell, consumer, caplog):
    caplog.set_level(logging.DEBUG)
    client = shop.test_client()
    made = client.post("/webhooks", json={"url": consumer.url}, headers=HEADERS)
    assert made.status_code == 201
    assert made.headers["Cache-Control"] == "no-store"
    path, secret = made.headers["Location"], made.json["secret"]
    sell()
    run(made.json["id"])
    rotated = client.post(f"{path}/secret", json={}, headers=HEADERS).json["secret"]
    sell()
    run(made.json["id"])
    # Both are valid for a day.
    consumer.verify(secret)
    assert len(consumer.received[1][0]["webhook-signature"].split()) == 2
    consumer.received.pop(0)
    consumer.verify(rotated)
    db.session.execute(text("UPDATE webhook_endpoints SET former_until = now()"))
    db.session.commit()
    sell()
    run(made.json["id"])
    assert len(consumer.received[-1][0]["webhook-signature"].split()) == 1
    shown = client.get(path, headers=HEADERS).text + client.get("/webhooks", headers=HEADERS).text
    dump = "".join(
        str(tuple(row))
        for table in ("webhook_endpoints", "audit_log", "webhook_deliveries", "webhook_attempts")
        for row in db.session.execute(text(f"SELECT * FROM {table}"))
    )
    for one in (secret, rotated):
        for where in (shown, dump, caplog.text):
            assert one not in where
            assert one.removeprefix("whsec_") not in where


def test_an_address_keeps_its_query_out_of_audit_logs_and_other_pages(
    shop, sell, consumer, support, caplog
):
    caplog.set_level(logging.DEBUG)
    client = shop.test_client()
    first, second = (f"{consumer.url}?apikey=Secret{number}" for number in (1, 2))
    made = client.post("/webhooks", json={"url": first}, headers=HEADERS).json
    path = f"/webhooks/{made['id']}"
    consumer.statuses = [410]
    sell()
    run(made["id"])
    assert client.patch(path, json={"url": second}, headers=HEADERS).json["url"] == second
    assert client.patch(path, json={"enabled": True}, headers=HEADERS).status_code == 200
    sell()
    run(made["id"])
    page = support.get("/admin/orders/1").text
    assert f"{consumer.url}?…" in page
    assert client.delete(path, headers=HEADERS).status_code == 204
    rows = list(db.session.execute(text("SELECT action, before, after FROM audit_log ORDER BY id")))
    audit = "".join(str(tuple(row)) for row in rows)
    assert "?…" in audit
    (change,) = (row for row in rows if row.action == "webhook.change")
    assert change.after["url"] == f"{consumer.url}?… (another query)"
    for where in (page, audit, caplog.text):
        assert "Secret" not in where


def test_another_secret_key(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    shop.config["SECRET_KEY"], former = "another-secret-key-of-the-tests", shop.config["SECRET_KEY"]
    try:
        run(endpoint)
        assert consumer.received == []
        assert "SECRET_KEY" in state(endpoint).off_reason
        _, secret = webhooks.rotate(endpoint, CLI)
        webhooks.switch(endpoint, True, CLI)
        run(endpoint)
    finally:
        shop.config["SECRET_KEY"] = former
    consumer.verify(secret)
    assert len(consumer.events) == 1


def test_no_more_endpoints_than_there_is_room_for(shop, consumer):
    client = shop.test_client()
    refused = 0
    for _ in range(webhooks.MOST_ENDPOINTS + 5):
        answer = client.post("/webhooks", json={"url": consumer.url}, headers=HEADERS)
        refused += answer.status_code == 409
    assert refused == 5
    assert answer.json["code"] == "too_many_endpoints"
    assert len(client.get("/webhooks", headers=HEADERS).json) == webhooks.MOST_ENDPOINTS


def test_a_test_event_and_a_redelivery_are_sent_once(shop, sell, consumer):
    client = shop.test_client()
    endpoint, secret = make(consumer)
    consumer.statuses = [500]
    sell()
    run(endpoint)
    # While the endpoint fails, and waits, a test is sent all the same, and changes nothing of it.
    consumer.statuses = [500, 204]
    for _ in range(2):
        assert client.post(f"/webhooks/{endpoint}/test", headers=HEADERS).status_code == 202
        run(endpoint)
    assert [json.loads(body)["data"]["events"][0]["type"] for _, body in consumer.received] == [
        "order.confirmed", "test", "test",
    ]  # fmt: skip
    assert state(endpoint).failures == 1
    now_due(endpoint)
    run(endpoint)
    assert state(endpoint).failures == 0
    listed = client.get(f"/webhooks/{endpoint}/deliveries", headers=HEADERS).json
    assert [one["state"] for one in listed] == ["delivered", "failed", "delivered"]
    oldest = listed[-1]["id"]
    path = f"/webhooks/{endpoint}/deliveries/{oldest}"
    assert client.post(f"{path}/redeliver", headers=HEADERS).status_code == 202
    run(endpoint)
    run(endpoint)
    assert consumer.ids().count(listed[-1]["messageId"]) == 3
    assert consumer.received[-1][1] == consumer.received[0][1]
    consumer.verify(secret)
    shown = client.get(path, headers=HEADERS).json
    assert [attempt["status"] for attempt in shown["attemptList"]] == [204, 204, 500]


def test_one_sender_for_an_endpoint(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell()
    with delivery._alone(endpoint), pytest.raises(delivery.Busy):
        delivery.Job(endpoint).run()
    assert jobs.send_webhooks(endpoint, False).endswith("1 deliveries with 1 events")


def test_an_endpoint_that_hangs_leaves_the_next_its_turn(shop, sell, consumer):
    slow = Consumer()
    try:
        first, _ = make(slow)
        second, _ = make(consumer)
        slow.behave = hang
        sell()
        due = delivery.due()
        assert [one for one, _ in due] == [first, second]
        started = time.monotonic()
        run(first)
        run(second)
        assert time.monotonic() - started < patience(delivery.JOB_SECONDS + 3)
        assert len(consumer.received) == 1
        sell()
        # It fails now: it comes after the others.
        db.session.execute(text("UPDATE webhook_endpoints SET next_at = now() - interval '1 s'"))
        db.session.commit()
        assert delivery.due() == [(second, False), (first, True)]
    finally:
        slow.close()


def test_a_reset_lets_endpoints_follow_the_next_sale(shop, sell, consumer):
    endpoint, _ = make(consumer)
    sell(2)
    consumer.statuses = [500]
    run(endpoint)
    recovery.reset(CLI)
    sell(1)
    run(endpoint)
    epoch = reading.ends().epoch
    (event,) = consumer.events[2:]
    assert event["id"].startswith(epoch)
    assert state(endpoint).failures == 0


def test_switched_off_nothing_is_sent_and_on_again_nothing_is_missing(shop, sell, consumer):
    client = shop.test_client()
    endpoint, _ = make(consumer)
    for enabled in (False, False, True):
        answer = client.patch(f"/webhooks/{endpoint}", json={"enabled": enabled}, headers=HEADERS)
        assert (answer.status_code, answer.json["enabled"]) == (200, enabled)
        sell()
        run(endpoint)
        assert len(consumer.received) == (1 if enabled else 0)
    assert [event["order"]["id"] for event in consumer.events] == [1, 2, 3]


def test_removed_while_it_is_sent_to(shop, sell, consumer):
    client = shop.test_client()
    endpoint, _ = make(consumer)
    sell()

    def remove(_):
        assert client.delete(f"/webhooks/{endpoint}", headers=HEADERS).status_code == 204
        return False

    consumer.behave = remove
    run(endpoint)
    assert client.get(f"/webhooks/{endpoint}", headers=HEADERS).status_code == 404
    assert db.session.query(WebhookDelivery).count() == 0


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"url": "http://example.com/", "types": ["order.eaten"]}, "types"),
        ({"url": "http://example.com/", "types": "order.held"}, "types"),
        ({"url": "http://example.com/", "types": [["order.held"]]}, "types"),
        ({"url": "http://example.com/", "description": 5}, "description"),
        ({"url": "http://example.com/", "description": "x" * 201}, "description"),
        ({"url": "http://example.com/", "after": 5}, "after"),
        ({"url": "http://example.com/", "after": None}, "after"),
        ({"url": "http://example.com/", "description": None}, "description"),
        ({"url": "http://example.com/", "types": None}, "types"),
        ({"url": "http://example.com/", "after": "nonsense"}, "after"),
        ({"url": "http://example.com/", "secret": "mine"}, "secret"),
        ({"types": []}, "url"),
    ],
)
def test_wrong_endpoints(shop, data, field):
    answer = shop.test_client().post("/webhooks", json=data, headers=HEADERS)
    assert (answer.status_code, answer.json["field"]) == (400, field)
    assert webhooks.everything() == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/webhooks/7"), ("PATCH", "/webhooks/7"), ("DELETE", "/webhooks/7"),
        ("POST", "/webhooks/7/secret"), ("POST", "/webhooks/7/test"),
        ("GET", "/webhooks/7/deliveries"),
        ("GET", "/webhooks/7/deliveries/1"), ("POST", "/webhooks/7/deliveries/1/redeliver"),
        ("GET", "/webhooks/99999999999999999999"), ("GET", "/webhooks/0"),
        ("GET", "/webhooks/7/deliveries/99999999999999999999"),
    ],
)  # fmt: skip
def test_unknown_endpoints(shop, method, path):
    client = shop.test_client()
    json_ = {} if method in ("PATCH", "POST") else None
    answer = client.open(path, method=method, headers=HEADERS, json=json_)
    assert (answer.status_code, answer.json["code"]) == (404, "unknown_webhook")
    assert client.open(path, method=method, json=json_).status_code == 401


@pytest.mark.parametrize(("method", "path"), [("POST", "/webhooks"), ("PATCH", "/webhooks/7")])
def test_no_body_where_one_is_needed(shop, method, path):
    assert shop.test_client().open(path, method=method, headers=HEADERS).status_code in (400, 415)


def test_a_replay_of_an_endpoint_that_is_removed_since(shop):
    client, keyed = shop.test_client(), HEADERS | {"Idempotency-Key": "once"}
    made = client.post("/webhooks", json={"url": "http://example.com/"}, headers=keyed)
    assert client.delete(made.location, headers=HEADERS).status_code == 204
    again = client.post("/webhooks", json={"url": "http://example.com/"}, headers=keyed)
    assert (again.status_code, again.json["code"]) == (404, "unknown_webhook")
    assert webhooks.everything() == []


@pytest.mark.parametrize("enabled", [None, 1, "true"])
def test_a_switch_is_true_or_false(shop, enabled):
    client = shop.test_client()
    made = client.post("/webhooks", json={"url": "http://example.com/"}, headers=HEADERS)
    answer = client.patch(made.location, json={"enabled": enabled}, headers=HEADERS)
    assert (answer.status_code, answer.json["field"]) == (400, "enabled")
