"""Whether each part that a sale needs is there, in words an operator understands.

The words are public (/readyz): they name no server.
"""

from contextlib import suppress
from functools import cache
from typing import Any

import redis
from flask import Flask
from psycopg2 import errorcodes
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError, TimeoutError

from ..config import ROOT
from ..database import Unanswered, is_unavailable, sqlstate
from ..extensions import db, stock
from ..generation import Held, held, on_record
from ..locks import DRAIN_LOCK
from ..problems import Unavailable, Unprepared
from ..stock.board import News
from ..stock.figures import View
from ..stock.shard import Shard

# With a worker at work an order waits for a second, after an outage for a few.
QUEUE_SECONDS = 10
# What a Redis must be set to so that a promised order survives a crash.
DURABLE_REDIS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}

READINESS = text(
    "SELECT version_num, current_setting('transaction_read_only') FROM alembic_version"
)
# Our own drains hold it for the blink of an eye.
DRAIN_LOCKED = text(
    "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)"
    " WHERE locktype = 'advisory' AND classid = 0 AND objid = :lock AND granted"
    " AND (application_name <> 'flash-sale'"
    " OR now() - coalesce(xact_start, state_change) > interval '5 s'))"
)

# The beginnings of what Redis itself answers, and what they mean.
REDIS_REFUSALS = {
    "OOM": "out of memory",
    "MISCONF": "can't write to its disk",
    "READONLY": "a read-only replica",
    "LOADING": "still loading its data",
    "MASTERDOWN": "a replica without its primary",
    "NOREPLICAS": "lacks its replicas",
    "NOAUTH": "refuses the password",
    "WRONGPASS": "refuses the password",
    "NOPERM": "refuses this user",
    "BUSY": "busy with a script",
}
SALE_STATES = {
    Held.NOTHING: "not in Redis, or being rebuilt: `flask rebuild` makes it anew",
    Held.ANOTHER: "Redis holds another sale: run `flask rebuild`",
    Held.THIS: "in Redis",
    Held.UNCOMPARED: "in Redis, not compared with PostgreSQL",
}
POSTGRES_STATES = {
    errorcodes.READ_ONLY_SQL_TRANSACTION: "read-only",
    errorcodes.DISK_FULL: "out of disk",
    errorcodes.TOO_MANY_CONNECTIONS: "out of connections",
    errorcodes.UNDEFINED_TABLE: "without this system's tables: run `flask prepare`",
    errorcodes.UNDEFINED_COLUMN: "without this system's tables: run `flask prepare`",
    errorcodes.INSUFFICIENT_PRIVILEGE: "without rights for this system's user",
}


def in_words(error: BaseException) -> str:
    """Return what ails a server, as the rest of "Redis is …", without its address."""
    cause = error.__cause__ if isinstance(error, Unavailable) and error.__cause__ else error
    told = str(cause)
    if isinstance(cause, Unprepared):
        return "without this sale"
    if isinstance(cause, TimeoutError):
        return "asked too much by this process"
    if isinstance(cause, (redis.TimeoutError, Unanswered)) or (
        isinstance(getattr(cause, "orig", None), Unanswered)
    ):
        return "not answering in time"
    if isinstance(cause, (redis.RedisError, Unavailable)):
        return next(
            (words for start, words in REDIS_REFUSALS.items() if told.startswith(start)),
            # redis-py takes the first word off of some.
            "a read-only replica" if isinstance(cause, redis.ReadOnlyError)
            else "out of memory" if isinstance(cause, redis.OutOfMemoryError)
            else "still loading its data" if isinstance(cause, redis.BusyLoadingError)
            else "refusing the password" if isinstance(cause, redis.AuthenticationError)
            else "unreachable",
        )  # fmt: skip
    return POSTGRES_STATES.get(sqlstate(cause), "unreachable")


def check(app: Flask) -> dict[str, dict[str, Any]]:
    """Return {part: {"ok": bool, "state": text}}.

    The parts are redis, postgres, migrations, sale, worker and queue; jobs where that is a Redis of
    its own.
    """
    parts, view, news = {}, None, None
    try:
        view = stock.view([])
        answers = stock.asked(_can_sell)
        # What is out of reach sells nothing, however well the others do.
        away = [answer for answer in answers if isinstance(answer, Unavailable)]
        if len(away) == len(answers):
            raise away[0]
        state = f"{len(away)} of {len(answers)} shards unreachable" if away else "reachable"
        parts["redis"] = _part(not away, state)
    except Unavailable as error:
        parts["redis"] = _part(False, in_words(error))
    # With several shards it is on the Redis of jobs: without that the sale goes on.
    with suppress(Unavailable):
        news = stock.board.news(0)
    if stock.jobs_server is not stock.first.server:
        try:
            stock.jobs_client.ping()
            parts["jobs"] = _part(True, "reachable")
        except redis.RedisError as error:
            parts["jobs"] = _part(False, in_words(error))
    expected = None
    parts |= {"postgres": _part(True, "reachable"), "migrations": _part(False, "unknown")}
    try:
        applied, read_only = db.session.execute(READINESS).one()
        if read_only == "on":
            parts["postgres"] = _part(False, "read-only")
        newest = newest_migration()
        parts["migrations"] = _part(
            applied == newest, "applied" if applied == newest else f"at {applied}, not {newest}"
        )
        expected = on_record()
    except SQLAlchemyError as error:
        db.session.rollback()
        if sqlstate(error) == errorcodes.UNDEFINED_TABLE:
            parts["migrations"] = _part(False, "not applied: run `flask prepare`")
        else:
            parts["postgres"] = _part(False, in_words(error))
    unknown = _part(False, "unknown without Redis")
    parts |= dict.fromkeys(("sale", "worker", "queue"), unknown)
    if view:
        parts["sale"] = _sale(view.generation, expected)
    if news:
        parts["worker"] = _part(news.workers > 0, f"{news.workers} seen lately")
    if view and news:
        parts["queue"] = _queue(view, news, parts)
    return parts


def _can_sell(shard: Shard) -> None:
    shard.try_write()
    shard.check_replicas()


def _part(ok: bool, state: str) -> dict[str, Any]:
    return {"ok": ok, "state": state}


def _sale(generation: str, expected: str | None) -> dict[str, Any]:
    found = held(generation, expected)
    return _part(found in (Held.THIS, Held.UNCOMPARED), SALE_STATES[found])


def _queue(view: View, news: News, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tell whether orders get stored: a worker that lives may still be kept from it."""
    if not view.waiting:
        return _part(True, "empty")
    state = "1 order waits" if view.waiting == 1 else f"{view.waiting} orders wait"
    if view.oldest_claimed_ms is None:
        return _part(True, state)
    age = max(0.0, news.now - view.oldest_claimed_ms / 1000)
    state += f", the oldest for {age:.0f} s"
    if age <= QUEUE_SECONDS:
        return _part(True, state)
    if all(parts[name]["ok"] for name in ("postgres", "worker", "sale")) and _drain_is_locked():
        state += "; another session holds the drain's lock"
    return _part(False, state)


def _drain_is_locked() -> bool:
    try:
        return bool(db.session.scalar(DRAIN_LOCKED, {"lock": DRAIN_LOCK}))
    except SQLAlchemyError as error:
        if not is_unavailable(error):
            raise
        db.session.rollback()
        return False


@cache
def newest_migration() -> str:
    """Return the revision that the code expects: named as its file, numbered as they follow."""
    return max(path.stem for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))


def weak_durability() -> list[str]:
    """Return what makes this Redis forget promised orders in a crash; empty when nothing does.

    Managed servers often forbid CONFIG; then the answer is that it can't be told.
    """
    weak = []
    for name, wanted in DURABLE_REDIS.items():
        try:
            found = stock.board.setting(name)
        except Unavailable:
            return []
        if found is None:
            return ["this Redis does not show its configuration"]
        if found != wanted:
            weak.append(f"{name} is {found}, not {wanted}")
    needed = stock.first.replicas.count
    try:
        attached = stock.first.attached_replicas() if needed else 0
    except Unavailable:
        return weak
    if attached > needed:
        weak.append(
            f"it has {attached} replicas, and REDIS_REPLICAS is {needed}: a failover to one that"
            " lags loses answered orders"
        )
    return weak
