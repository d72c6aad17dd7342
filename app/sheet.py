"""Lists as CSV (RFC 4180) that a spreadsheet opens as they were meant."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

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


def chunks(header: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield the file's text, some rows at a time.

    The first of them are made at once, so that what fails there can still be answered as an error.
    """
    made = _chunks(header, rows)
    return chain((next(made),), made)


def _chunks(header: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    lines = [BYTE_ORDER_MARK + line(header)]
    for row in rows:
        lines.append(line(row))
        if len(lines) >= CHUNK_ROWS:
            yield "".join(lines)
            lines.clear()
    yield "".join(lines)


def line(cells: Iterable[object]) -> str:
    """Return a row with its end of line; None is an empty cell."""
    texts = ("" if value is None else str(value) for value in cells)
    return ",".join(_quoted(safe_cell(text)) for text in texts) + "\r\n"


def safe_cell(text: str) -> str:
    """Return a cell's text; an apostrophe keeps a text from being calculated or rounded."""
    return "'" + text if FORMULA(text) or MANGLED(text) else text


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if QUOTED(text) else text
