"""Where a shopper belongs, which every process must agree on; and entries of the outbox."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.reading import canonical
from app.stock.entries import Columns, Entry, split
from app.stock.keys import KEYS
from app.stock.place import Place, place, queued_score

ALPHABET = "ABCXYZabcxyz0123456789._~:@|+-"
TEXTS = st.text(ALPHABET, min_size=1, max_size=64).filter(lambda text: text not in (".", ".."))
USERS = st.one_of(st.integers(1, 2**53 - 1), TEXTS).map(canonical)
TEXT_KEYS = st.text([chr(code) for code in range(0x21, 0x7F)], min_size=1, max_size=255)


@pytest.mark.parametrize(
    ("user", "shards", "expected"),
    [
        (1, 1, Place(0, "0", "1")),
        (128, 1, Place(0, "1", "0")),
        (2**53 - 1, 1, Place(0, "70368744177663", "127")),
        (42, 3, Place(0, "0", "14")),
        (128, 3, Place(1, "0", "42")),
        (1, 24, Place(1, "0", "0")),
        (128, 24, Place(20, "0", "5")),
        (2**53 - 1, 24, Place(23, "2932031007402", "85")),
        ("007", 1, Place(0, "t33213", "007")),
        ("a:b", 3, Place(1, "t65319", "a:b")),
        ("5f3c-uuid", 24, Place(22, "t44744", "5f3c-uuid")),
    ],
)
def test_places_stay_where_they_are(user, shards, expected):
    assert place(user, shards) == expected


def test_integers_are_their_own_score_and_texts_have_one_that_a_float_keeps():
    assert queued_score(42) == 42
    assert queued_score("007") == 2955633232740797
    assert queued_score("5f3c-uuid") == 3957342658342600


@given(USERS)
def test_a_score_is_exact(user):
    assert int(float(queued_score(user))) == queued_score(user)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (42, 42), ("42", 42), (1, 1), ("9007199254740991", 2**53 - 1),
        ("9007199254740992", "9007199254740992"), ("0", "0"), ("007", "007"), ("+7", "+7"),
        ("1.0", "1.0"), ("A", "A"), ("a", "a"), ("...", "..."), ("auth0|7", "auth0|7"),
        ("x" * 64, "x" * 64),
    ],
)  # fmt: skip
def test_one_form_of_a_user(given, form):
    assert canonical(given) == form
    assert type(canonical(given)) is type(form)


@pytest.mark.parametrize(
    "given",
    [
        0, -1, 2**53, True, False, 1.0, None, "", ".", "..", "a b", "a\n", "ä", "a/b", "%41",
        "x" * 65, "\u0661", b"1",
    ],
)  # fmt: skip
def test_what_is_no_user(given):
    with pytest.raises(ValueError, match="not a user id"):
        canonical(given)


@given(USERS, TEXT_KEYS, USERS, TEXT_KEYS)
def test_no_two_pairs_of_user_and_key_share_a_name(user, key, other, another):
    assume((user, key) != (other, another))
    assert KEYS.idempotency(user, key) != KEYS.idempotency(other, another)


def test_a_user_and_a_key_that_would_be_another_pair_with_a_colon_between():
    assert KEYS.idempotency("a:b", "c") != KEYS.idempotency("a", "b:c")
    assert KEYS.idempotency("1:b", "c") != KEYS.idempotency(1, "b:c")


def test_entries_of_both_forms():
    former = "42 1 2 1999 EUR 1700000000000 k"
    assert Entry.parse(former) == Entry(42, 1, 2, 1999, "EUR", 1_700_000_000_000, "k")
    assert Entry.parse(former[:-1]).idempotency_key is None
    assert split(former) == Columns(
        "42", None, "1", "2", "1999", "EUR", "1700000000000", "k", None, None
    )
    full = "v2 auth0|7 1 2 1999 EUR 1700000000000 k cart-7 1700000060000"
    assert Entry.parse(full) == Entry(
        "auth0|7", 1, 2, 1999, "EUR", 1_700_000_000_000, "k", "cart-7", 1_700_000_060_000
    )
    assert Entry.parse("v2 42 1 2 1999 EUR 1700000000000   ") == Entry(
        42, 1, 2, 1999, "EUR", 1_700_000_000_000, None
    )
    assert split(full)[:2] == (None, "auth0|7")


@pytest.mark.parametrize(
    "text",
    ["", "x", "42 1 2 1999 EUR 17", "v2 42 1 2 1999 EUR 17 k", "v2 .. 1 2 1999 EUR 17 k r 1",
     "v1 42 1 2 1999 EUR 17 k r 1", "42 1 2 1999 EUR 17 k r 1", "v3 a 1 2 1999 EUR 17 k r 1"],
)  # fmt: skip
def test_what_is_no_order(text):
    assert split(text) is None
    with pytest.raises(ValueError, match="not an order"):
        Entry.parse(text)
