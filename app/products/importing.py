"""Many products at once, from a CSV or JSON file: all of it is read and judged first.

A file with one wrong line makes nothing. What a file makes is one transaction, and comes on sale
like any new product; what a crash leaves undone in Redis, the sweeper finishes.
"""

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import select

from .. import idempotency, numbers
from ..audit import Actor, record
from ..extensions import db
from ..models import Product
from ..money import read_currency
from ..problems import Conflict, InvalidRequest
from ..reading import MAX_ID, MAX_QUANTITY, MAX_STOCK, STRICT_JSON
from . import catalogue, terms
from .sale import require_sale

IMPORT = "import products"
# A file that is so large at most is read within a second, and carried out within some.
MOST_BYTES = 1024 * 1024
MOST_PRODUCTS = 1000
MOST_ERRORS = 50
DELIMITERS = ",;\t"
WHITESPACE = " \t\r\n"


class Fault(NamedTuple):
    """What is wrong with a file; `line` is counted from 1."""

    line: int
    message: str


@dataclass(frozen=True)
class Plan:
    """What a file would make: products with the lines on which they stand, or faults."""

    digest: str
    products: list[terms.NewProduct] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    # How many faults there are in all; only the first are kept.
    faulty: int = 0

    @property
    def units(self) -> int:
        return sum(product.units for product in self.products)


def read(content: bytes) -> Plan:
    """Read a file and judge each of its lines, also by the products that exist. Changes nothing."""
    digest = hashlib.sha256(content).hexdigest()
    try:
        text = decode(content)
        items = _json_items(text) if text.lstrip()[:1] in ("[", "{") else _csv_items(text)
        return _judged(digest, items)
    except _Unreadable as error:
        return Plan(digest, faults=[error.fault], faulty=1)


def carry_out(plan: Plan, actor: Actor, key: str | None = None) -> list[int] | None:
    """Create the products of a plan without faults, all or none; return their ids.

    None where this key has done it before. Raises Conflict when a sku was taken meanwhile,
    KeyMismatch, and stock.Unavailable before or after the rows exist, as catalogue.create().
    """
    if plan.faults or not plan.products:
        raise Conflict("There is nothing to import, or a line of it is wrong", "nothing_to_import")
    taken = None
    if key:
        taken = idempotency.take(IMPORT, "", key, plan.digest)
        if taken.answer is not None:
            db.session.rollback()
            return None
    require_sale()
    ids = [product.id for product in catalogue.add(plan.products, actor, "imported")]
    record(
        actor,
        "product.import",
        "sale",
        after={"products": len(ids), "first": ids[0], "last": ids[-1], "sha256": plan.digest},
    )
    if taken:
        taken.answer = {"ids": ids}
    db.session.commit()
    catalogue.put_on_sale(ids)
    return ids


def was_done(digest: str, key: str) -> bool:
    """Tell whether this key has imported this file already. Raises KeyMismatch for another."""
    done = idempotency.take(IMPORT, "", key, digest).answer is not None
    db.session.rollback()
    return done


class _Unreadable(Exception):
    """Nothing after this line can be read."""

    def __init__(self, line: int, message: str) -> None:
        self.fault = Fault(line, message)


def decode(content: bytes) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with its mark, as Excel's "Unicode Text" is."""
    if len(content) > MOST_BYTES:
        raise _Unreadable(
            1, f"The file is larger than {MOST_BYTES // 1024:,} KiB: import it in parts"
        )
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _Unreadable(line, "This is not UTF-8: save the file as “CSV UTF-8”") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Unreadable(line, "This is no text: save the file as “CSV UTF-8”")
    return text


# An item is what POST /products takes, with its line; or what is wrong with it.
Item = tuple[int, dict[str, Any] | InvalidRequest]


def _json_items(text: str) -> Iterator[Item]:
    """Yield the objects of an array, each with the line on which it begins."""

    def skip(position: int) -> int:
        while position < len(text) and text[position] in WHITESPACE:
            position += 1
        return position

    def line_at(position: int) -> int:
        return text.count("\n", 0, position) + 1

    position = skip(0)
    if text[position] != "[":
        raise _Unreadable(line_at(position), "The file must be an array of products: [{…}, {…}]")
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        line = line_at(position)
        try:
            value, position = STRICT_JSON.raw_decode(text, position)
        except InvalidRequest as error:
            raise _Unreadable(line, str(error)) from None
        except json.JSONDecodeError as error:
            raise _Unreadable(error.lineno, f"This is not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise _Unreadable(line, "This is not valid JSON") from None
        yield line, value if isinstance(value, dict) else InvalidRequest("must be an object")
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise _Unreadable(line_at(position), "This is not valid JSON: expecting ',' or ']'")
    if text[skip(position + 1) :]:
        raise _Unreadable(line_at(position), "This is not valid JSON: there is more after its end")


def _csv_items(text: str) -> Iterator[Item]:
    """Yield a product for each row below the first, which names the columns."""
    head = text.lstrip(WHITESPACE).partition("\n")[0]
    delimiter = max(DELIMITERS, key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    line = 1
    try:
        for row in rows:
            # Of a row with a line end inside of a cell: where it begins.
            first, line = line, rows.line_num + 1
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                columns = _columns(cells, first)
                continue
            try:
                yield first, _product(columns, cells)
            except InvalidRequest as error:
                yield first, error
    except csv.Error as error:
        raise _Unreadable(rows.line_num, f"This is not valid CSV: {error}") from None


def _flag(cell: str, name: str) -> bool:
    if cell.lower() not in ("true", "false"):
        raise InvalidRequest(f"{name} must be true or false", name)
    return cell.lower() == "true"


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    return lambda cell, name: numbers.whole(cell, name, name, low, high)


def _as_it_is(cell: str, name: str) -> str:
    return cell


# How a cell is read; what it holds is judged like the member of that name in POST /products.
CELLS: dict[str, Callable[[str, str], object]] = {
    "name": _as_it_is,
    "priceCents": _whole(0, MAX_ID),
    "currency": lambda cell, name: cell.upper(),
    "stock": _whole(0, MAX_STOCK),
    "sku": _as_it_is,
    "visibility": lambda cell, name: cell.lower(),
    "opensAt": _as_it_is,
    "closesAt": _as_it_is,
    "perUserLimit": _whole(1, MAX_QUANTITY),
    "maxQuantity": _whole(1, MAX_QUANTITY),
    "paused": _flag,
    "archived": _flag,
}
# Instead of `priceCents`, as people write it: 999.99.
PRICE = "price"
COLUMNS = ("name", PRICE, *(name for name in CELLS if name != "name"))


def _columns(cells: list[str], line: int) -> list[str]:
    """Return the names of the columns, whatever their case, with spaces or without."""
    known = {name.lower(): name for name in COLUMNS}
    found = [known.get(re.sub("[ _-]", "", cell.lower()), cell) for cell in cells]
    for name in found:
        if name not in COLUMNS:
            raise _Unreadable(
                line,
                f"There is no column “{name[:50]}”; the first line names columns out of "
                + ", ".join(COLUMNS),
            )
        if found.count(name) > 1:
            raise _Unreadable(line, f"The column {name} comes more than once")
    if PRICE in found and "priceCents" in found:
        raise _Unreadable(line, "Of price and priceCents there can be one alone")
    return found


def _product(columns: list[str], cells: list[str]) -> dict[str, Any]:
    if any(cells[len(columns) :]):
        raise InvalidRequest("there are more cells than columns")
    # An empty cell is as good as none.
    texts = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
    price = texts.pop(PRICE, None)
    data = {name: CELLS[name](text, name) for name, text in texts.items()}
    if price is not None:
        currency = read_currency(data.get("currency"))
        data["priceCents"] = numbers.amount(price, PRICE, PRICE, currency)
    elif PRICE in columns:
        raise InvalidRequest("price is required", PRICE)
    return data


def _judged(digest: str, items: Iterator[Item]) -> Plan:
    products: list[terms.NewProduct] = []
    lines: list[int] = []
    faults: list[Fault] = []
    faulty = 0
    skus: dict[str, int] = {}

    def fault(line: int, message: str) -> None:
        nonlocal faulty
        faulty += 1
        if len(faults) < MOST_ERRORS:
            faults.append(Fault(line, message))

    for count, (line, item) in enumerate(items, 1):
        if count > MOST_PRODUCTS:
            raise _Unreadable(
                line, f"There are more than {MOST_PRODUCTS:,} products: import them in parts"
            )
        try:
            if isinstance(item, InvalidRequest):
                raise item
            new = terms.read_new(item)
            terms.check_window(new.terms.get("opens_at"), new.terms.get("closes_at"))
        except InvalidRequest as error:
            fault(line, str(error))
            continue
        sku = new.terms.get("sku")
        if sku is not None and sku in skus:
            fault(line, f"sku {sku} is on line {skus[sku]} already")
            continue
        if sku is not None:
            skus[sku] = line
        products.append(new)
        lines.append(line)
    taken = db.session.execute(select(Product.id, Product.sku).where(Product.sku.in_(list(skus))))
    for product_id, sku in taken:
        fault(skus[str(sku)], f"sku {sku} is product {product_id}'s")
    if not products and not faulty:
        raise _Unreadable(1, "There is no product in the file")
    return Plan(digest, products, lines, sorted(faults), faulty)
