"""An empty shop for each test: what a reset leaves is put back, in a tenth of a reset's time."""

import secrets
from unittest.mock import patch

import psycopg2

from app import database
from app.audit import CLI
from app.books import recovery
from app.config import Settings
from app.extensions import stock

# A reset keeps them; a test counts its own acts, and has its own consumers.
ALSO_EMPTY = ("audit_log", "request_keys", "webhook_endpoints")
FIND_COUNTERS = """
    SELECT pg_get_serial_sequence(table_name, column_name) FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name = ANY(%s)
      AND (is_identity = 'YES' OR column_default LIKE 'nextval%%')
"""
FIND_COLUMNS = """
    SELECT column_name, data_type LIKE 'timestamp%%' FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name = %s AND is_generated = 'NEVER'
"""


class Fresh:
    """Puts back the rows and keys of a shop in which nothing has happened yet.

    Its session keeps the rows in temporary tables, and functions that PostgreSQL plans once. It
    leaves triggers and foreign keys out, as TRUNCATE does; that one makes a hundred files anew,
    which for a test's few rows takes longest.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open()

    def _open(self) -> None:
        self._keys: dict[bytes, bytes] = {}
        self._session = psycopg2.connect(
            self._settings.database_url.replace("+psycopg2", ""),
            options="-c session_replication_role=replica -c timezone=UTC",
        )
        self._session.autocommit = True
        found = self._run(FIND_COUNTERS, list(recovery.SALE_TABLES))
        self._counters = [name for (name,) in found]
        self._define(
            "empty_tables()",
            *(f"DELETE FROM {table}" for table in recovery.SALE_TABLES),
            *(f"PERFORM setval('{name}', 1, false)" for name in self._counters),
        )

    def close(self) -> None:
        self._session.close()

    def begin(self, settings: Settings) -> None:
        """Make the shop of the app with these settings a fresh one."""
        try:
            self._make(settings)
        except (psycopg2.OperationalError, psycopg2.InterfaceError):
            # A test has ended all sessions, and this one with them.
            self._open()
            self._make(settings)
        # PostgreSQL has just answered: what a test before this one waited for in vain is over.
        database._answered()

    def _make(self, settings: Settings) -> None:
        ours = self._settings.database_url == settings.database_url
        alike = ours and (self._settings.redis_url, self._settings.shards) == (
            settings.redis_url,
            settings.shards,
        )
        if alike and self._keys:
            self._put_back()
        else:
            self._reset(ours)
            if alike:
                self._remember()

    def _reset(self, ours: bool) -> None:
        stock.client.flushdb()
        empty_tables = recovery._empty_tables
        if ours:
            empty_tables = self._empty_tables
            for table in ALSO_EMPTY:
                self._run(f"DELETE FROM {table}")
        with patch.object(recovery, "_empty_tables", empty_tables):
            recovery.reset(CLI)

    def _empty_tables(self) -> None:
        self._run("SELECT pg_temp.empty_tables()")

    def _remember(self) -> None:
        """Keep what a reset has made."""
        made = []
        for table in (*recovery.SALE_TABLES, "audit_log"):
            self._run(f"CREATE TEMP TABLE fresh_{table} AS SELECT * FROM {table}")
            if not self._run(f"SELECT 1 FROM fresh_{table}"):
                continue
            columns = dict(self._run(FIND_COLUMNS, table))
            # What has been stamped is stamped anew.
            values = (
                f"CASE WHEN {name} IS NOT NULL THEN now() END" if is_time else name
                for name, is_time in columns.items()
            )
            made.append(
                f"INSERT INTO {table} ({', '.join(columns)}) OVERRIDING SYSTEM VALUE"
                f" SELECT {', '.join(values)} FROM fresh_{table}"
            )
        for name in self._counters:
            ((last, is_called),) = self._run(f"SELECT last_value, is_called FROM {name}")
            made.append(f"PERFORM setval('{name}', {last}, {is_called})")
        self._define(
            "put_back(sale_name text)",
            "PERFORM pg_temp.empty_tables()",
            *(f"DELETE FROM {table}" for table in ALSO_EMPTY),
            *made,
            "UPDATE sale SET generation = sale_name, epoch = sale_name",
            "UPDATE feed SET head = 0, floor = 0",
        )
        self._keys = {key: stock.raw_client.dump(key) for key in stock.raw_client.scan_iter()}

    def _put_back(self) -> None:
        """Make it anew, under another name: processes know a sale by that."""
        name = secrets.token_hex(8)
        self._run("SELECT pg_temp.put_back(%s)", name)
        with stock.raw_client.pipeline(transaction=False) as pipe:
            pipe.flushdb()
            for key, value in self._keys.items():
                pipe.restore(key, 0, value)
            pipe.set(stock.first.keys.generation, stock.first.part.generation(name))
            pipe.execute()

    def _define(self, function: str, *acts: str) -> None:
        body = "; ".join(acts)
        self._run(
            f"CREATE FUNCTION pg_temp.{function} RETURNS void LANGUAGE plpgsql"
            f" AS $body$ BEGIN {body}; END $body$"
        )

    def _run(self, statement: str, *values: object) -> list[tuple]:
        with self._session.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description is not None else []
