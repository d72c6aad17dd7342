"""A list of orders as CSV (RFC 4180) that a spreadsheet opens as it was meant."""

import re
from collections.abc import Iterable, Iterator

from ..times import utc_text
from .search import Found

HEADER = (
    "order", "status", "user", "product", "product name", "quantity", "unit price", "currency",
    "total", "claimed at", "persisted at", "cancelled at", "cancelled by", "cancel reason",
    "idempotency key",
)  # fmt: skip
# Without it Excel takes UTF-8 for the machine's own code page.
BYTE_ORDER_MARK = "\ufeff"
# A file may be so many rows before it is sent on: few system calls, little memory.
CHUNK_ROWS = 500
# What a spreadsheet takes for a formula (OWASP, CSV injection: the full-width signs too).
FORMULA = re.compile(r"[=+\-@\t\r\n＝＋－＠]").match
# What it takes for a number and does not keep: it knows 15 digits, and no leading zero.
MANGLED = re.compile(r"\d{16,}|0\d+|\d+[eE][+-]?\d+", re.ASCII).fullmatch
# The semicolon and the tab, too: which one parts the cells is the reader's setting.
QUOTED = re.compile(r'[",;\t\r\n]').search


def chunks(found: Iterable[Found], names: dict[int, str]) -> Iterator[str]:
    """Yield the file's text, some rows at a time; `names` are the products' by id."""
    lines = [BYTE_ORDER_MARK + line(HEADER)]
    for order in found:
        lines.append(line(row_of(order, names)))
        if len(lines) >= CHUNK_ROWS:
            yield "".join(lines)
            lines.clear()
    yield "".join(lines)


def row_of(order: Found, names: dict[int, str]) -> tuple[object, ...]:
    """Return the order's cells, as many as HEADER has."""
    return (
        order.id,
        order.status,
        order.user_id,
        order.product_id,
        names.get(order.product_id, ""),
        order.quantity,
        _decimal(order.unit_price_cents),
        order.currency,
        _decimal(order.total_cents),
        utc_text(order.claimed_at),
        order.persisted_at and utc_text(order.persisted_at),
        order.cancelled_at and utc_text(order.cancelled_at),
        order.cancelled_by,
        order.cancel_reason,
        order.idempotency_key,
    )


def line(cells: Iterable[object]) -> str:
    """Return a row with its end of line; None is an empty cell."""
    return (
        ",".join(_quoted(safe_cell("" if value is None else str(value))) for value in cells)
        + "\r\n"
    )


def safe_cell(text: str) -> str:
    """Return a cell's text; an apostrophe keeps a text from being calculated or rounded."""
    return "'" + text if FORMULA(text) or MANGLED(text) else text


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if QUOTED(text) else text


def _decimal(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02}"
