"""Whether each part that a sale needs is there, in words an operator understands."""

import time
from functools import cache

import redis
from alembic.config import Config
from alembic.script import ScriptDirectory
from flask import Flask
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from ..extensions import db, stock
from ..problems import Unavailable
from ..stock.keys import Keys

# A worker says so once a second; after this it counts as gone.
WORKER_SEEN_SECONDS = 5
# What a Redis must be set to so that a promised order survives a crash.
DURABLE_REDIS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}


def check(app: Flask) -> dict[str, dict]:
    """Return {part: {"ok": bool, "state": text}} for redis, postgres, migrations, sale, worker."""
    parts = {}
    generation = workers = None
    try:
        generation = stock.generation()
        workers = workers_alive()
        parts["redis"] = _part(True, "reachable")
    except (Unavailable, redis.RedisError) as error:
        parts["redis"] = _part(False, f"unreachable: {error}")
    try:
        applied = db.session.execute(text("SELECT version_num FROM alembic_version")).scalar()
        parts["postgres"] = _part(True, "reachable")
        newest = newest_migration(app.extensions["migrate"].directory)
        parts["migrations"] = _part(
            applied == newest, "applied" if applied == newest else f"at {applied}, not {newest}"
        )
        expected = db.session.execute(text("SELECT generation FROM sale")).scalar()
    except SQLAlchemyError as error:
        db.session.rollback()
        if "alembic_version" in str(error):
            parts["postgres"] = _part(True, "reachable")
            parts["migrations"] = _part(False, "not applied: run `flask db upgrade`")
        else:
            parts["postgres"] = _part(False, "unreachable")
        expected = None
    parts["sale"] = _sale(generation, expected)
    parts["worker"] = _part(bool(workers), f"{workers or 0} seen lately")
    return parts


def _part(ok: bool, state: str) -> dict:
    return {"ok": ok, "state": state}


def _sale(generation: str | None, expected: str | None) -> dict:
    if generation is None:
        return _part(False, "not in Redis: run `flask rebuild`")
    if expected and generation != expected:
        return _part(False, "Redis holds another sale: run `flask rebuild`")
    return _part(True, "in Redis")


@cache
def newest_migration(directory: str) -> str:
    """Return the revision that the code expects."""
    config = Config()
    config.set_main_option("script_location", directory)
    return ScriptDirectory.from_config(config).get_current_head()


def workers_alive() -> int:
    """Return the number of worker processes seen lately. Raises redis.RedisError."""
    return stock.client.zcount(Keys.workers, time.time() - WORKER_SEEN_SECONDS, "+inf")


def weak_durability() -> list[str]:
    """Return what makes this Redis forget promised orders in a crash; empty when nothing does.

    Managed servers often forbid CONFIG; then the answer is that it can't be told.
    """
    weak = []
    for name, wanted in DURABLE_REDIS.items():
        try:
            found = stock.client.config_get(name).get(name)
        except redis.ResponseError:
            return ["this Redis does not show its configuration"]
        except redis.RedisError:
            return []
        if found != wanted:
            weak.append(f"{name} is {found}, not {wanted}")
    return weak
