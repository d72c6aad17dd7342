"""The chaos checker is a test instrument: each kind of broken promise, planted, must be found."""

import subprocess
import sys
from dataclasses import replace

import pytest
from checker import (
    OK,
    REFUSED,
    UNKNOWN,
    Attempt,
    Cancel,
    History,
    Movement,
    Order,
    Restock,
    Stored,
    check,
    save,
)

from app.config import ROOT


@pytest.fixture
def record() -> tuple[History, Stored]:
    """A flawless run: orders with and without key, one cancelled, lost answers, a restock."""
    history = History(
        attempts=[
            Attempt(1, 1, 2, "a", UNKNOWN),
            Attempt(1, 1, 2, "a", OK, 200, 1),
            Attempt(1, 1, 2, "a", OK, 200, 1),
            Attempt(2, 1, 1, None, OK, 200, 2),
            Attempt(3, 1, 1, None, UNKNOWN),  # was carried out
            Attempt(4, 1, 1, None, UNKNOWN),  # was not
            Attempt(5, 1, 3, "b", REFUSED, 409),
            Attempt(6, 1, 1, "c", OK, 200, 4),
        ],
        restocks=[Restock("r", 1, 5, UNKNOWN), Restock("r", 1, 5, OK)],
        cancels=[Cancel(4, OK)],
    )
    stored = Stored(
        orders=[
            Order(1, 1, 1, 2, "a", "CONFIRMED"),
            Order(2, 2, 1, 1, None, "CONFIRMED"),
            Order(3, 3, 1, 1, None, "CONFIRMED"),
            Order(4, 6, 1, 1, "c", "CANCELLED"),
        ],
        movements=[
            Movement(1, 1, "initial", 10),
            Movement(2, 1, "restock", 5, key="r"),
            Movement(3, 1, "return", 1, order=4),
        ],
        free={1: 11},
    )
    return history, stored


def kinds(record) -> set[str]:
    return {violation.kind for violation in check(*record)}


def test_a_flawless_run_passes(record):
    assert check(*record) == []


def test_a_lost_order(record):
    del record[1].orders[1]
    assert kinds(record) == {"lost", "ledger"}


def test_an_altered_order(record):
    record[1].orders[1] = replace(record[1].orders[1], quantity=2)
    assert "altered" in kinds(record)


def test_an_order_stored_twice(record):
    record[1].orders.append(record[1].orders[0])
    assert "duplicate" in kinds(record)


def test_two_orders_under_one_key(record):
    record[1].orders.append(replace(record[1].orders[0], id=9))
    record[1].free[1] -= 2
    assert kinds(record) == {"duplicate"}


def test_one_key_promised_two_orders(record):
    record[0].attempts[2] = replace(record[0].attempts[2], order=2)
    assert "duplicate" in kinds(record)


def test_one_order_promised_to_two(record):
    record[0].attempts.append(Attempt(2, 1, 1, None, OK, 200, 2))
    assert kinds(record) == {"duplicate"}


def test_a_claim_carried_out_twice(record):
    """What a silent retry by the client library does: one promise, two orders."""
    record[1].orders.append(replace(record[1].orders[1], id=9))
    record[1].free[1] -= 1
    assert kinds(record) == {"duplicate"}


def test_a_refused_order_that_is_stored(record):
    record[1].orders.append(Order(9, 5, 1, 3, "b", "CONFIRMED"))
    record[1].free[1] -= 3
    assert kinds(record) == {"refused-but-stored"}
    record[0].attempts.append(Attempt(7, 1, 1, None, REFUSED, 409))
    record[1].orders[-1] = Order(9, 7, 1, 3, None, "CONFIRMED")
    assert kinds(record) == {"unasked"}
    record[0].attempts.append(Attempt(7, 1, 3, None, REFUSED, 409))
    assert kinds(record) == {"refused-but-stored"}


def test_an_order_out_of_nowhere(record):
    record[1].orders.append(Order(9, 77, 1, 1, None, "CONFIRMED"))
    record[1].free[1] -= 1
    assert kinds(record) == {"unasked"}


def test_oversold(record):
    record[0].attempts.append(Attempt(8, 1, 15, None, OK, 200, 9))
    record[1].orders.append(Order(9, 8, 1, 15, None, "CONFIRMED"))
    record[1].free[1] -= 15
    assert kinds(record) == {"oversold"}


@pytest.mark.parametrize("drift", [1, -1])
def test_a_ledger_error_of_one_unit(record, drift):
    record[1].free[1] += drift
    assert kinds(record) == {"ledger"}


def test_what_the_system_itself_complains_about(record):
    record[1].ledger.append("product 1: 1 units too many are free")
    assert kinds(record) == {"ledger"}


def test_what_was_not_finished(record):
    record[1].waiting = 1
    record[1].movements[1] = replace(record[1].movements[1], applied=False)
    assert kinds(record) == {"not-drained"}


def test_a_dead_letter(record):
    record[1].dead_letters.append(record[1].orders.pop(2))
    assert kinds(record) == {"dead-letter"}


def test_a_restock_done_twice_or_not_at_all(record):
    record[1].movements.append(Movement(4, 1, "restock", 5, key="r"))
    record[1].free[1] += 5
    assert kinds(record) == {"restock"}
    record[1].movements = [m for m in record[1].movements if m.kind != "restock"]
    record[1].free[1] -= 10
    assert kinds(record) == {"restock"}


def test_units_returned_twice_or_not_at_all(record):
    record[1].movements.append(Movement(4, 1, "return", 1, order=4))
    record[1].free[1] += 1
    assert kinds(record) == {"cancel"}
    record[1].movements = [m for m in record[1].movements if m.kind != "return"]
    record[1].free[1] -= 2
    assert kinds(record) == {"cancel"}


def test_a_cancel_that_nobody_asked_for(record):
    record[0].cancels.clear()
    assert kinds(record) == {"unasked"}


def test_a_server_error(record):
    record[0].attempts.append(Attempt(9, 1, 1, None, UNKNOWN, 500))
    assert kinds(record) == {"error"}


def test_a_kept_record_can_be_judged_again(record, tmp_path):
    path = tmp_path / "record.json"
    for drift, code in ((0, 0), (1, 1)):
        record[1].free[1] += drift
        save(path, *record)
        judged = subprocess.run(
            [sys.executable, ROOT / "stress" / "checker.py", path], capture_output=True, text=True
        )
        assert judged.returncode == code


def test_parts_of_an_order(record):
    """Given back one by one, as they were asked for, by what is known."""
    history, stored = record
    history.cancels.append(Cancel(1, UNKNOWN, 1))
    assert check(*record) == []
    stored.movements.append(Movement(4, 1, "return", 1, order=1))
    stored.free[1] += 1
    assert check(*record) == []
    history.cancels.append(Cancel(1, OK, 1))
    assert check(*record) == [], "the first may have done nothing"
    history.cancels.append(Cancel(1, OK, 1))
    assert kinds(record) == {"cancel"}, "one of two is missing"
    stored.movements.append(Movement(5, 1, "return", 1, order=1))
    stored.free[1] += 1
    assert kinds(record) == {"cancel"}, "nothing is left, and it still stands"
    stored.orders[0] = replace(stored.orders[0], status="CANCELLED")
    assert check(*record) == []
    stored.movements.append(Movement(6, 1, "return", 1, order=1))
    stored.free[1] += 1
    assert "cancel" in kinds(record), "more than it had"
