"""How figures, money and times look on the pages."""

import json
from datetime import UTC, datetime
from functools import cache

from flask import Flask, url_for
from markupsafe import Markup

from ..config import ROOT
from ..money import decimal
from ..words import counted
from .forms import submission_key, wall_time

ICONS = "/static/vendor/tabler-icons-3.51.0.svg"


def init_app(app: Flask) -> None:
    # A fragment goes out every second: less of it is indentation.
    app.jinja_env.trim_blocks = app.jinja_env.lstrip_blocks = True
    amounts = (number, counted, compact, money)
    for present in (*amounts, when, duration, moment_utc, as_json, wall_time):
        app.add_template_filter(present)
    app.add_template_global(asset)
    app.add_template_global(icon)
    app.add_template_global(submission_key)
    app.add_template_global(verdict)


def number(value: int | float | None) -> str:
    """12345 → 12,345; nothing known → –."""
    return "–" if value is None else f"{value:,}"


def compact(value: float | None) -> str:
    """A rate: one decimal below ten, none above."""
    if value is None:
        return "–"
    return f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:,.0f}"


def money(cents: int, currency: str) -> str:
    """99999, USD → USD 999.99; 1500, JPY → JPY 1,500."""
    return f"{currency} {decimal(cents, currency, ',')}"


def moment_utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def when(moment: datetime | None, utc: bool = False) -> str:
    """A time element: UTC as written here, the browser's own zone once the script has seen it.

    With `utc` the UTC time stays visible beside the other.
    """
    if moment is None:
        return "–"
    text = moment_utc(moment)
    machine = moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    element = Markup('<time datetime="{}" title="{} UTC">{} UTC</time>').format(machine, text, text)
    if utc:
        element += Markup(' <span class="utc" title="{} UTC">{} UTC</span>').format(text, text[11:])
    return element


def duration(seconds: float | None) -> str:
    """How long, in its two largest units: 2 d 3 h, 4 min 05 s, 40 ms."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{max(seconds, 0) * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def verdict(ok: bool | None, in_part: object = False, difference: int = 0) -> tuple[str, str]:
    """How a proof of the ledger looks, and what is said of it.

    `ok` is None without a proof; of what is right so far `in_part` may be left unproved. Of a
    single product the difference in units is told; without one something else is wrong.
    """
    if ok is None:
        return "unknown", "unknown"
    if not ok:
        return "bad", f"off by {difference:+,}" if difference else "does not balance"
    return ("unknown", "partly proved") if in_part else ("good", "balanced")


def as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def asset(name: str) -> str:
    """The URL of one of our own files; it changes whenever the file does."""
    return url_for("static", filename=name, v=_version(name))


@cache
def _version(name: str) -> int:
    return int((ROOT / "static" / name).stat().st_mtime)


@cache
def icon(name: str) -> Markup:
    """A decorative drawing; the text beside it, or the label around it, says what it means."""
    return Markup('<svg class="icon" aria-hidden="true"><use href="{}#{}"/></svg>').format(
        ICONS, name
    )
