"""The gateway without its Redis: whatever is asked for, Unavailable is the only failure."""

from dataclasses import replace

import pytest

from app.problems import Unavailable
from app.stock.gateway import Stock

TERMS = {
    "opens": None,
    "closes": None,
    "pause": 0,
    "cap": None,
    "max": 10,
    "price": "1 USD",
    "hold": None,
}
ASKED = {
    "claim": lambda stock: stock.claim(1, 1, 1, None, "a"),
    "braked": lambda stock: stock.braked(),
    "brake": lambda stock: stock.brakes.change(True, None, {}, None),
    "acts": lambda stock: stock.brakes.acts(1),
    "put_product": lambda stock: stock.put_product(1, 1, TERMS),
    "put_new": lambda stock: stock.put_new("g", [(1, 1, TERMS, 1, 1)]),
    "move": lambda stock: stock.move("g", 1, 1, 1),
    "queued_orders": lambda stock: stock.queued_orders(1, 1),
    "read_outbox": lambda stock: stock.first.read_outbox(1),
    "settle": lambda stock: stock.first.settle("g", ["1-0"], [1], {1: (1, 1, 1)}),
    "view": lambda stock: stock.view([1]),
    "accounts": lambda stock: stock.first.ask(stock.first.asking_accounts([1], 0, [], 0)),
    "outbox_ids": lambda stock: stock.first.outbox_ids(),
    "queued_ids": lambda stock: stock.first.queued_ids(),
    "unapplied_movements": lambda stock: stock.first.unapplied_movements([1]),
    "mend": lambda stock: stock.first.mend("g", 1, 1, {}),
    "keep_counts": lambda stock: stock.keep_counts([1]),
    "turn_away": lambda stock: stock.turn_away({1: 1}),
    "close": lambda stock: stock.first.close("g"),
    "open": lambda stock: stock.first.open("g", 1),
    "product_ids": lambda stock: stock.product_ids(),
    "waiting": lambda stock: stock.waiting(),
    "generation": lambda stock: stock.generation(),
    "newest_waiting": lambda stock: stock.newest_waiting(1),
    "waiting_order": lambda stock: stock.waiting_order(1),
    "history": lambda stock: stock.board.history(0),
    "clock": lambda stock: stock.clock(),
    "clocks": lambda stock: stock.clocks(),
    "clear": lambda stock: stock.first.clear(),
    "clear_sale": lambda stock: stock.first.clear_sale(),
    "put_accounts": lambda stock: stock.first.put_accounts({1: {"free": 1}}, {1: (1, TERMS)}),
    "put_movements": lambda stock: stock.first.put_movements(b"1"),
    "put_bought": lambda stock: stock.first.put_bought([(1, "0", ["1"], [1])]),
    "put_keys": lambda stock: stock.first.put_keys([(1, "k", "1 1 USD +")]),
    "new_order_id": lambda stock: stock.new_order_id(1),
    "alive": lambda stock: stock.board.alive("w"),
    "gone": lambda stock: stock.board.gone("w"),
    "sample": lambda stock: stock.board.sample({}),
    "news": lambda stock: stock.board.news(1),
    "take_turn": lambda stock: stock.board.take_turn(1),
    "put_proof": lambda stock: stock.board.put_proof({}),
    "put_shelf": lambda stock: stock.board.put_shelf({1: "{}"}),
    "shelf": lambda stock: stock.board.shelf(),
    "count": lambda stock: stock.board.count({"a": 1}),
    "counted": lambda stock: stock.board.counted(1),
    "try_write": lambda stock: stock.first.try_write(),
    "first_waiting": lambda stock: stock.first.first_waiting(1),
    "take_drain_lease": lambda stock: stock.board.take_drain_lease(1),
    "end_drain_lease": lambda stock: stock.board.end_drain_lease(),
    "setting": lambda stock: stock.board.setting("appendonly"),
}


@pytest.mark.parametrize("name", ASKED)
def test_without_redis(settings, name):
    stock = Stock()
    stock.init_app(replace(settings, redis_url="redis://127.0.0.1:1"))
    with pytest.raises(Unavailable):
        ASKED[name](stock)
