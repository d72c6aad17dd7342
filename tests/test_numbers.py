"""Numbers as people type them: what each means, or that it is asked back; and as they are told."""

import pytest

from app import numbers
from app.money import decimal, digits_of, read_currency
from app.problems import InvalidRequest
from app.words import counted

NBSP, NARROW, THIN = "\u00a0", "\u202f", "\u2009"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("7", 7), (" 15 ", 15), ("007", 7), ("1500", 1500), ("1,500", 1500),
        ("1 500", 1500), (f"1{NBSP}500", 1500), (f"1{NARROW}500", 1500), (f"1{THIN}500", 1500),
        ("1'500", 1500), ("1’500", 1500), ("1,234,567", 1_234_567), ("1.234.567", 1_234_567),
        ("1 234 567", 1_234_567), ("１５００", 1500), ("１，５００", 1500), ("١", 1),
        ("١٬٥٠٠", 1500), ("१५", 15), (f"{NBSP}5{NBSP}", 5),
    ],
)  # fmt: skip
def test_whole_numbers(text, number):
    assert numbers.whole(text, "stock", "The stock", 0, 10_000_000) == number


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "ten", "1,5", "2,5", "1.5", "1,50", "15,00", "1,5000", "12,34", "1,23,456",
        "1,2345", "0,500", "01,500", "1,234.567", "1.234,567", "1,234 567", "1  500", "1,500.00",
        "1.5.0", "1500.0", ",500", "1500,", "1e3", "+5", "-0", "-5", "−5", "5-", "0x10", "1_000",
        "²", "10²", "½", "Ⅳ", "一", "5 pieces", "5%", "1\n500", "5\0", "٫٥", "١٫٥", "NaN", "∞",
    ],
)  # fmt: skip
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"^The stock must be a whole number") as refused:
        numbers.whole(text, "stock", "The stock", 0, 10_000_000)
    assert refused.value.field == "stock"


def test_one_group_after_a_dot_is_asked_back():
    with pytest.raises(InvalidRequest) as refused:
        numbers.whole("2.000", "stock", "The stock", 0, 10_000_000)
    assert str(refused.value) == (
        "The stock must be a whole number: 2.000 could be a fraction too, so type 2000 or 2,000"
    )


@pytest.mark.parametrize("text", ["10000001", "10,000,001", "9" * 16, "9" * 30, "9" * 60_000])
def test_out_of_range(text):
    with pytest.raises(InvalidRequest, match=r"^The stock must be from 0 to 10,000,000$"):
        numbers.whole(text, "stock", "The stock", 0, 10_000_000)


@pytest.mark.parametrize(
    ("text", "cents"),
    [
        ("0", 0), ("5", 500), ("19.9", 1990), ("19,9", 1990), ("19.90", 1990), ("19,90", 1990),
        ("1299", 129_900), ("1,299.00", 129_900), ("1.299,00", 129_900), ("1 299.00", 129_900),
        ("1 299,00", 129_900), (f"1{NBSP}299,00", 129_900), (f"1{NARROW}299", 129_900),
        ("1'299.00", 129_900), ("1 299", 129_900), ("1,299,000", 129_900_000),
        ("1.299.000", 129_900_000), ("1,299,000.5", 129_900_050), ("1.299.000,50", 129_900_050),
        ("１９．９０", 1990), ("١٩٫٩٠", 1990), ("١٬٢٩٩٫٠٠", 129_900), (" 5 ", 500),
        ("9999999999999.99", 10**15 - 1),
    ],
)  # fmt: skip
def test_amounts(text, cents):
    assert numbers.amount(text, "price", "The price", "USD") == cents


@pytest.mark.parametrize(
    "text",
    [
        "", "cheap", "1.999", "1,234", "1.234", "0.999", "1,299,00", "1.299.00", "12,99.00",
        "1,299.000", "1 299 00", "1.", ".50", ",5", "$5", "5 €", "5.-", "1e3", "+5", "-5", "-0",
        "1.2.3", "1,2,3", "²", "5½",
    ],
)  # fmt: skip
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"^The price must be an amount like 999\.99"):
        numbers.amount(text, "price", "The price", "USD")


@pytest.mark.parametrize("text", ["1.234", "1,234"])
def test_an_amount_that_could_be_two_is_asked_back(text):
    with pytest.raises(InvalidRequest, match=r"so type 1234\.00 or 1\.23$"):
        numbers.amount(text, "price", "The price", "USD")


def test_an_amount_beyond_all():
    for text in ("99999999999999", "9" * 60_000):
        with pytest.raises(InvalidRequest, match=r"^The price must be at most 9,999,999,999,999\."):
            numbers.amount(text, "price", "The price", "USD")


@pytest.mark.parametrize(
    ("text", "currency", "minor_units"),
    [
        ("1500", "JPY", 1500), ("1,500", "JPY", 1500), ("1 500", "JPY", 1500), ("0", "JPY", 0),
        ("1.5", "KWD", 1500), ("1.500", "KWD", 1500), ("1,5", "KWD", 1500),
        ("1,234.567", "KWD", 1_234_567), ("1.234,567", "KWD", 1_234_567),
        ("1500", "KWD", 1_500_000), ("1.2345", "CLF", 12_345), ("0,0001", "CLF", 1),
        ("1,5", "EUR", 150),
        ("999999999999999", "JPY", 10**15 - 1),
    ],
)  # fmt: skip
def test_amounts_have_the_digits_of_their_currency(text, currency, minor_units):
    assert numbers.amount(text, "price", "The price", currency) == minor_units


@pytest.mark.parametrize(
    ("text", "currency", "words"),
    [
        ("1500.00", "JPY", "JPY has no digits after the point"),
        ("15,0", "JPY", "JPY has no digits after the point"),
        ("1.500", "JPY", "so type 1500 or 1,500"),
        ("1,500", "KWD", "so type 1500.000 or 1.500"),
        ("1.2345", "KWD", "KWD has 3 digits after the point"),
        ("19.999", "USD", "so type 19999.00 or 20.00"),
        ("1", "XAU", "needs a currency first"),
        ("1000000000000000", "JPY", "at most 999,999,999,999,999"),
    ],
)
def test_an_amount_that_its_currency_does_not_have(text, currency, words):
    with pytest.raises(InvalidRequest, match=words):
        numbers.amount(text, "price", "The price", currency)


@pytest.mark.parametrize("currency", ["JPY", "USD", "KWD", "CLF"])
@pytest.mark.parametrize("minor_units", [0, 7, 1500, 123_456_789])
def test_what_is_shown_is_read_as_it_was(currency, minor_units):
    shown = decimal(minor_units, currency)
    assert numbers.amount(shown, "price", "The price", currency) == minor_units
    grouped = decimal(minor_units, currency, ",")
    if grouped.count(",") != 1 or "." in grouped or currency == "JPY":
        assert numbers.amount(grouped, "price", "The price", currency) == minor_units


def test_things_are_told_in_the_singular_only_when_there_is_one():
    told = [counted(number, "unit") for number in (0, 1, 2, 1200, -1)]
    assert told == ["0 units", "1 unit", "2 units", "1,200 units", "-1 units"]


def test_currencies_are_those_of_the_standard():
    # CLDR, and whoever follows it, has 0 digits for all of these.
    assert [digits_of(code) for code in ("IQD", "IRR", "LAK", "MGA")] == [3, 2, 2, 2]
    for refused in ("XAU", "XXX", "XTS", "XDR", "ABC", "usd", "US", "", None, 840, ["USD"]):
        with pytest.raises(InvalidRequest) as error:
            read_currency(refused)
        assert error.value.field == "currency"
