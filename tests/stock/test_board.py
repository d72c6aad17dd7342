"""What processes tell one another by Redis: every time is of Redis's clock, whatever theirs say."""

import json
import threading
import time
from dataclasses import replace

import pytest
from waiting import wait_until

from app.audit import CLI
from app.books import ledger
from app.extensions import stock
from app.products import catalogue, terms
from app.stock.keys import KEYS
from app.watch import monitor, samples
from app.watch.telemetry import STATE_LASTS_SECONDS, Meter
from app.worker.relay import Sampler

HOUR = 3600
LAMP = {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "stock": 100}


@pytest.fixture(params=[HOUR, 12, 0, -HOUR], ids=lambda lead: f"clock {lead:+d} s")
def wrong_clock(app, request, monkeypatch):
    """This process's clock is wrong; Redis's is not."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + request.param)
    return request.param


def stopped() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def workers() -> int:
    return stock.board.news(0).workers


def seconds() -> list[int]:
    return [second for second, _ in stock.board.history(0)]


def redis_second() -> int:
    return int(stock.board.now())


def test_a_worker_is_seen_whatever_its_clock_says(wrong_clock, app):
    Sampler("one").run_once(stopped())
    assert workers() == 1
    (second,) = seconds()
    assert abs(second - redis_second()) <= 1
    with app.app_context():
        assert monitor.board().workers == 1


def test_a_stamp_of_the_future_is_not_a_worker_and_goes(app):
    """As a worker of an earlier version leaves it, whose clock was ahead, and which was killed."""
    stock.client.zadd(KEYS.workers, {"ahead": stock.board.now() + HOUR})
    assert workers() == 0
    Sampler("right").run_once(stopped())
    assert workers() == 1
    assert stock.client.zrange(KEYS.workers, 0, -1) == ["right"]
    stock.client.zadd(KEYS.workers, {"right": stock.board.now() - 6})
    assert workers() == 0


def test_samples_of_the_future_hinder_nobody(app):
    now = redis_second()
    past = [now - 3, now - 2]
    for second in (*past, now + 12, now + HOUR):
        stock.client.xadd(KEYS.history, {"sample": json.dumps({"free": second})}, id=f"{second}-1")
    assert stock.board.sample({"free": 7})
    found = stock.board.history(0)
    assert [second for second, _ in found][:2] == past
    assert found[0][1] == {"free": past[0]}
    assert found[-1][1] == {"free": 7}
    assert found[-1][0] - now <= 1


def test_an_emptied_history_that_remembers_a_future_id_is_made_anew(app):
    stock.client.xadd(KEYS.history, {"sample": "{}"}, id=f"{redis_second() + HOUR}-1")
    stock.client.xtrim(KEYS.history, 0)
    assert stock.board.sample({"free": 7})
    assert len(seconds()) == 1


def test_a_second_is_sampled_once(app):
    kept = [stock.board.sample({"free": n}) for n in range(20)]
    assert kept[0]
    # The clock may have gone on by a second meanwhile.
    assert kept.count(True) == len(seconds()) <= 2


def test_the_history_is_bounded(app):
    now = redis_second()
    with stock.client.pipeline() as pipe:
        for second in range(now - 1000, now - 10):
            pipe.xadd(KEYS.history, {"sample": "{}"}, id=f"{second}-1")
        pipe.execute()
    stock.board.sample({"free": 1})
    assert len(stock.board.history(0, 2000)) == 900


def test_of_each_minute_one_sample_is_kept_for_a_day(app):
    now = redis_second()
    minute = now - now % 60
    with stock.client.pipeline() as pipe:
        for ago in range(1500, 0, -1):
            pipe.xadd(KEYS.history_by_minute, {"sample": "{}"}, id=f"{minute - 60 * ago}-1")
        pipe.execute()
    assert stock.board.sample({"free": 1})
    stock.client.delete(KEYS.history)
    assert stock.board.sample({"free": 2})
    kept = stock.board.history(0, 2000, by_minute=True)
    assert len(kept) == 24 * 60
    # Unless the minute has just ended.
    assert kept[-1][1] == {"free": 1} or redis_second() // 60 > minute // 60


def test_the_chart_of_a_product(app, buy):
    with app.app_context():
        second = catalogue.create(terms.read_new(LAMP), CLI).product["id"]
    for user in range(3):
        buy(user + 1, product_id=second)
    buy(9)
    view = stock.view([1, second])
    now = redis_second()
    with stock.client.pipeline() as pipe:
        before = samples.sample(replace(view, products={}))
        pipe.xadd(KEYS.history, {"sample": json.dumps(before)}, id=f"{now - 3}-1")
        pipe.xadd(KEYS.history, {"sample": json.dumps(samples.sample(view))}, id=f"{now - 2}-1")
        buy(10, product_id=second)
        view = stock.view([1, second])
        pipe.xadd(KEYS.history, {"sample": json.dumps(samples.sample(view))}, id=f"{now - 1}-1")
        pipe.execute()
    found = samples.chart(product_id=second)
    assert found["second"] == [now - 1]
    assert (found["accepted"], found["refused"]) == ([1.0], [0.0])
    assert (found["waiting"], found["free"]) == ([4], [96])
    assert samples.chart(product_id=99)["second"] == []


@pytest.mark.parametrize("shards", [1, 3])
def test_units_free_are_those_that_can_be_bought_everywhere(make_app, shards):
    """The tile, the chart, the shards' rows and the shoppers' own figure are of the same units."""
    with make_app(shards=shards).app_context():
        for change in ({"visibility": "draft"}, {"archived": True}, {"paused": True}):
            catalogue.create(terms.read_new(LAMP | change), CLI)
        ids = stock.product_ids()
        assert ids == [1, 2, 3, 4]
        board, view = monitor.board(), stock.view(ids)
        told = [
            board.free, samples.sample(view)["free"], view.sums()["on_sale"],
            stock.view([], ids).sums()["on_sale"], stock.view([2, 4], [1, 3]).sums()["on_sale"],
            sum(shard.free for shard in board.shards) or 200,
        ]  # fmt: skip
        assert told == [200] * len(told)
        assert view.sums()["free"] == stock.view([], ids).sums()["free"] == 400
        assert dict(view.sums()) == dict(stock.view([3], [4, 1, 2]).sums())


@pytest.mark.parametrize("query", ["span=1y", "product=x", "product=0", "product=-1"])
def test_a_chart_that_there_is_not(admin, query):
    assert admin.get(f"/admin/chart.json?{query}").status_code == 404


def test_the_ledger_is_proved_by_redis_clock(wrong_clock, app):
    with app.app_context():
        ledger.check_in_turn()
        assert monitor.board().ledger.ok is True


@pytest.mark.parametrize(("age", "ok"), [(0, True), (14, True), (16, None), (-60, None)])
def test_a_proof_of_long_ago_or_of_the_future_says_nothing(age, ok):
    proof = {"at": 1000.0 - age, "ok": True, "products": {}}
    assert monitor.read_ledger(proof, 1000.0, "sale").ok is ok


def test_a_proof_of_another_sale_says_nothing():
    proof = {"at": 1000.0, "ok": False, "products": {}, "generation": "before the rebuild"}
    assert monitor.read_ledger(proof, 1000.0, "sale").ok is None


def test_processes_report_by_redis_clock(wrong_clock):
    Meter("web").flush()
    assert len(stock.board.counted(STATE_LASTS_SECONDS).processes) == 1


@pytest.mark.parametrize("lead", [HOUR, -HOUR])
def test_a_process_of_another_time_is_forgotten(app, lead):
    state = json.dumps({"at": stock.board.now() + lead})
    stock.client.hset(KEYS.processes, "web:other:1", state)
    assert "web:other:1" not in stock.board.counted(STATE_LASTS_SECONDS).processes
    assert not stock.client.hexists(KEYS.processes, "web:other:1")


def test_the_age_of_the_queue_is_by_redis_clock(wrong_clock, app, buy):
    buy(1)
    with app.app_context():
        assert monitor.board().oldest_seconds < 5


def test_writing_is_tried_without_writing(app):
    def changes() -> int:
        return stock.client.info("persistence")["rdb_changes_since_last_save"]

    def tried() -> bool:
        before = changes()
        stock.first.try_write()
        return changes() == before

    # Meters of earlier tests write now and then; if the try wrote, none would go without.
    wait_until(tried)
    assert not stock.client.exists(KEYS.nothing)
