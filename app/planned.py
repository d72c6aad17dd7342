"""Statements that PostgreSQL plans once for a session: planning took longer than running them.

Through a pooler they need sessions of their own, as advisory locks do.
"""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import Result, TextClause, text

from .extensions import db

# For all parameters the same plan, however often it ran and whatever the statistics say.
ONE_PLAN = "SET LOCAL plan_cache_mode = force_generic_plan;"


def execute(
    statement: TextClause, values: Mapping[str, object], settings: str = ""
) -> Result[*tuple[Any, ...]]:
    """Execute it in the session's transaction, in which `settings` then hold, too.

    Each of its parameters stands in a CAST, from which PostgreSQL knows its type.
    """
    prepare, run = _prepared(statement.text, settings)
    known: set[str] = db.session.connection().info.setdefault("planned", set())
    if prepare not in known:
        db.session.execute(text(prepare.replace(":", "\\:")))
        known.add(prepare)
    return db.session.execute(run, dict(values))


@cache
def _prepared(sql: str, settings: str) -> tuple[str, TextClause]:
    places: dict[str, str] = {}

    def place(found: re.Match[str]) -> str:
        return places.setdefault(found[1], f"${len(places) + 1}")

    # As SQLAlchemy finds them.
    numbered = re.sub(r"(?<![:\w\\]):(\w+)(?!:)", place, sql)
    name = f"planned_{hashlib.sha256(sql.encode()).hexdigest()[:16]}"
    arguments = ", ".join(f":{each}" for each in places)
    prepare = f"PREPARE {name} AS {numbered}"
    return prepare, text(f"{ONE_PLAN} {settings} EXECUTE {name} ({arguments})")
