"""The form of a product: what it shows, how it is read, and what of it somebody has changed.

A form carries what it showed (`was`) and the version it showed it of. So only what was typed is
written, and where another change came first, each field can tell the three apart.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from .. import numbers
from ..models import Product
from ..money import decimal, read_currency
from ..problems import InvalidRequest
from ..products import terms
from ..reading import MAX_ID, MAX_QUANTITY, MAX_STOCK, read_digits, read_text
from . import forms


def _currency(form: Mapping[str, str]) -> str:
    return read_currency(form.get("currency", "").strip().upper(), "The currency")


# Each field with its label, the column that it sets, and how it is read.
FIELDS: dict[str, tuple[str, str, Callable[[Mapping[str, str]], object]]] = {
    "name": ("Name", "name", lambda form: read_text(form, "name", terms.MAX_NAME, "The name")),
    "currency": ("Currency", "currency", _currency),
    "price": (
        "Price",
        "price_cents",
        lambda form: numbers.amount(form.get("price", ""), "price", "The price", _currency(form)),
    ),
    "opens": ("Opens", "opens_at", lambda form: forms.moment("opens", form, "The opening")),
    "closes": ("Closes", "closes_at", lambda form: forms.moment("closes", form, "The closing")),
    "per_user": (
        "Cap per user",
        "per_user_limit",
        lambda form: (
            numbers.whole(form["per_user"], "per_user", "The cap", 1, MAX_QUANTITY)
            if form.get("per_user", "").strip()
            else None
        ),
    ),
    "max_quantity": (
        "Most per purchase",
        "max_quantity",
        lambda form: numbers.whole(
            form.get("max_quantity", ""), "max_quantity", "The maximum", 1, MAX_QUANTITY
        ),
    ),
    "sku": (
        "SKU",
        "sku",
        lambda form: (
            terms.sku(form["sku"].strip(), "The SKU") if form.get("sku", "").strip() else None
        ),
    ),
    "visibility": (
        "Who sees it",
        "visibility",
        lambda form: terms.visibility(form.get("visibility", "listed"), "Who sees it"),
    ),
}
TIMES = ("opens", "closes")
WRONG_WINDOW = {"closes": "The closing must be after the opening"}
SKU_TAKEN = {"sku": "Another product has this SKU"}
CURRENCY_FIXED = {"currency": "There are orders in the currency that it has: it is fixed"}
NEW = {"currency": "USD", "max_quantity": "10", "visibility": "listed"}
VISIBILITIES = {
    "listed": "Listed: everybody sees it",
    "hidden": "Hidden: on no list, and who knows its number can buy it",
    "draft": "Draft: only you see it, and nobody can buy it",
}


def shown(product: Product) -> dict[str, str]:
    """Return what the fields show of a product; times as instants, to the microsecond."""
    return {
        "name": product.name,
        "price": decimal(product.price_cents, product.currency),
        "currency": product.currency,
        "opens": product.opens_at.astimezone(UTC).isoformat() if product.opens_at else "",
        "closes": product.closes_at.astimezone(UTC).isoformat() if product.closes_at else "",
        "per_user": str(product.per_user_limit or ""),
        "max_quantity": str(product.max_quantity),
        "sku": product.sku or "",
        "visibility": product.visibility,
    }


def typed(form: Mapping[str, str]) -> dict[str, str]:
    """Return what the fields hold as they are sent, to be shown again."""
    texts = {name: form.get(name, "").strip() for name in (*FIELDS, "stock")}
    return texts | {name: forms.moment_text(name, form) for name in TIMES}


def read(
    form: Mapping[str, str], names: Iterable[str] = FIELDS
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the named fields' terms by column, and the errors by field."""
    values, errors = {}, {}
    for name in names:
        _, column, take = FIELDS[name]
        try:
            values[column] = take(form)
        except InvalidRequest as error:
            # A price can't be read without its currency, which says so beside its own field.
            errors[error.field if error.field in FIELDS else name] = str(error)
    return values, errors


def read_new(form: Mapping[str, str]) -> tuple[terms.NewProduct | None, dict[str, str]]:
    """Return the new product, None where there are errors; and these by field."""
    values, errors = read(form)
    try:
        units = numbers.whole(form.get("stock", ""), "stock", "The stock", 0, MAX_STOCK)
    except InvalidRequest as error:
        errors["stock"] = str(error)
    return (None if errors else terms.NewProduct(values, units)), errors


@dataclass(frozen=True)
class Difference:
    """A field that somebody else has changed meanwhile; `yours` is None where you have not."""

    name: str
    label: str
    was: str
    now: str
    yours: str | None


class Edit:
    """A form that was sent to change a product."""

    def __init__(self, form: Mapping[str, str], product: Product) -> None:
        self.form = form
        was = _what_it_showed(form)
        # A page that does not say what it showed may be of any age: it is taken for stale.
        self.version = (read_digits(form.get("version", ""), 1, MAX_ID) or 0) if was else 0
        # Fields that a page of an earlier version does not have are left alone.
        self.was = shown(product) | (was if was and self.version else {})
        self.typed = self.was | {name: text for name, text in typed(form).items() if name in form}

    @property
    def touched(self) -> list[str]:
        """The fields that hold something else than the form showed, or mean something else."""
        touched = [name for name in FIELDS if self.typed[name] != self.was[name]]
        if "currency" in touched and "price" not in touched:
            touched.append("price")
        return touched

    def rebase(self, product: Product) -> tuple[dict[str, str], list[Difference]]:
        """Return what the fields hold over the product as it stands now, and what differs.

        What was typed stays; what was left alone is what it is now.
        """
        now = shown(product)
        touched = self._wanting(product)
        differences = [
            Difference(
                name,
                FIELDS[name][0],
                self.was[name],
                now[name],
                self.typed[name] if name in touched else None,
            )
            for name in FIELDS
            if now[name] != self.was[name] or (not self.version and name in touched)
        ]
        return now | {name: self.typed[name] for name in touched}, differences

    def is_done(self, product: Product) -> bool:
        """Tell whether the product has all that was typed already: the form was sent twice."""
        return not self._wanting(product)

    def _wanting(self, product: Product) -> list[str]:
        """The fields in which the product is not as it was typed, however that was written."""
        values, _ = read(self.form, self.touched)
        return [
            name
            for name in self.touched
            if values[FIELDS[name][1]] != getattr(product, FIELDS[name][1])
        ]


def _what_it_showed(form: Mapping[str, str]) -> dict[str, str] | None:
    try:
        was = json.loads(form.get("was", ""))
        return {name: str(was[name]) for name in FIELDS if name in was or name == "name"}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
