"""A JSON body is read by the fast reader or by the strict one: nothing may depend on which."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app import reading
from app.problems import InvalidRequest
from app.web.openapi.components import ONE_LINE

NAMES = ["userId", "productId", "quantity", "user\\u0049d", "", 'a\\"b', "é", "\x7f", "\n"]
VALUES = [
    "1", "-0", "01", "1.0", "1e3", "1e400", "-1e400", "5e-324", "1e-400", "0.30000000000000004",
    "9007199254740993", "18446744073709551616", "1" + "0" * 400, "1" + "0" * 4999, "1" + "0" * 4299,
    "true", "null", "NaN", "-Infinity", "[]", '[1,"a"]', '{"a":1}', '{"a":1,"a":2}', '"x"', '""',
    '"\\""', '"\\u0041"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"\\x"', '"\x01"', '"é"',
    "-", ".5", "5.", "+1", "'a'", "[" * 3000 + "]" * 3000, "",
]  # fmt: skip
SPACES = st.sampled_from(["", "", "", " ", "\n", "\x0b", "\ufeff"])
MEMBERS = st.tuples(st.sampled_from(NAMES), SPACES, st.sampled_from(VALUES), SPACES).map(
    lambda parts: '"{}":{}{}{}'.format(*parts)
)


@st.composite
def bodies(draw) -> bytes:
    """Bodies as clients send them, and as nobody should."""
    members = ",".join(draw(st.lists(MEMBERS, max_size=4)))
    frame = draw(st.sampled_from(["{%s}", "{%s}", "{%s}", "\ufeff{%s}", "[{%s}]", "{%s}{}", "{%s"]))
    body = bytearray((frame % members).encode())
    if body and draw(st.integers(0, 4)) == 0:
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


def outcome(read, body: bytes) -> str:
    try:
        return repr(read(body))
    except InvalidRequest as error:
        return f"{error} ({error.field})"


@settings(max_examples=300, deadline=None)
@given(bodies())
@example(b'{"userId":1,"userId":2,"productId":1}')
@example(b'{"userId":"1","userId":2}')
@example(b'{"userId":"1","user\\u0049d":"2"}')
@example('{"userId":1}'.encode("utf-16"))
@example(b'{"userId":"\xff"}')
def test_the_fast_reader_says_what_the_strict_one_says(body):
    assert outcome(reading.read_object, body) == outcome(reading._read_strictly, body)


@pytest.mark.parametrize(
    "body",
    [
        {"userId": 1, "productId": 1, "quantity": 1},
        {"userId": "a-1", "productId": 1},
        {"name": "Lamp", "priceCents": 1999, "currency": "EUR", "opensAt": None, "paused": False},
    ],
)
def test_what_is_usual_needs_the_fast_reader_alone(monkeypatch, body):
    monkeypatch.setattr(reading, "_read_strictly", None)
    assert reading.read_object(json.dumps(body).encode()) == body


@pytest.mark.parametrize(
    "odd", [f"a{control}b" for control in "\n\r\t\0\x1b\x85\u2028\u202e\u2066"] + ["a\n"]
)
def test_a_text_is_one_line_without_control_characters(odd):
    with pytest.raises(InvalidRequest, match="name must be one line, without control characters"):
        reading.read_text({"name": odd}, "name", 200)


@pytest.mark.parametrize(
    "odd", ["", " ", "\n", "\u200b", "\ufeff\u2060", "\xa0\u3000", "x" * 201, 1, None]
)
def test_a_text_has_something_in_it_and_an_end(odd):
    with pytest.raises(InvalidRequest, match="name must be a text of 1 to 200 characters"):
        reading.read_text({"name": odd}, "name", 200)


@pytest.mark.parametrize(
    "name",
    ["Lamp", "é", "e\u0301", "מנורה", "می\u200cخواهم", "👩\u200d👩\u200d👧", "<b>&amp;", "=1+1"],
)
def test_names_of_all_languages_are_kept_to_the_letter(name):
    assert reading.read_text({"name": f" {name} "}, "name", 200) == name


ODD = "a \t\n\r\x00\x1f\x7f\x85\xa0\xad\u200b\u200e\u2028\u202a\u2060\u2069\ufeffé"


@given(st.text(st.sampled_from(ODD), max_size=6))
def test_the_api_description_says_which_texts_are_taken(value):
    def taken() -> bool:
        try:
            reading.read_text({"name": value}, "name", 200)
        except InvalidRequest:
            return False
        return True

    assert taken() == bool(re.search(ONE_LINE[:-1] + r"\Z", value))
