"""Claims of threads, each alone: for any WSGI server, commands, and tests."""

import threading
import time
from contextlib import suppress
from typing import Any

import redis

from ..breaker import Breaker
from ..problems import Unavailable, Unprepared
from .claims import (
    AGAIN_SECONDS,
    COMPARE_SECONDS,
    PROMISES,
    Claim,
    ClaimScript,
    OnRecord,
    Request,
    Unsent,
    claim_of,
    refused,
)
from .replicas import Unreplicated
from .servers import COMMAND_TIMEOUT_SECONDS, UNFIT, Server, code_of

# Of redis-py, whose methods have no types.
Connection = Any


class ThreadLine:
    """Claims that block their thread. Safe to use from any number of threads."""

    def __init__(self, server: Server, script: ClaimScript, on_record: OnRecord) -> None:
        self._server = server
        self.script = script
        self._replicas = script.replicas
        self._on_record = on_record
        self._record: tuple[str, int] | None = None
        self._recorded_at = 0.0
        self._record_lock = threading.Lock()
        # Only a factory here (it knows URLs, TLS, passwords): each thread keeps its connection.
        self._pool = server.pool(decode=False, cautious=False, max_connections=2**31)
        self._local = threading.local()
        # A failure anywhere makes every thread's connection suspect: they connect anew.
        self._failures = 0
        # While it is closed nobody waits for a Redis that has just failed, but for one who tries.
        self.breaker = Breaker(COMMAND_TIMEOUT_SECONDS)

    def claim(self, request: Request) -> Claim:
        """Decide one purchase. Raises Unavailable when Redis gave no answer."""
        if not self.breaker.admits():
            raise Unavailable("Redis was unreachable a moment ago", executed=False)
        command = self.script.command(request)
        started = time.monotonic()
        try:
            try:
                claim = self._decide(command)
            except redis.RedisError as error:
                if code_of(error) not in UNFIT or time.monotonic() > started + AGAIN_SECONDS:
                    raise
                # Nothing ran, and another server may be in its place by now.
                self._leave(error)
                claim = self._decide(command)
        except Unprepared:
            self.breaker.waited_in_vain()
            raise
        except Unreplicated:
            self._leave()
            raise
        except (redis.RedisError, OSError) as error:
            if isinstance(error, redis.ResponseError) and code_of(error) not in UNFIT:
                # This claim was refused; the next one may be asked all the same.
                self.breaker.answered()
            else:
                self._leave(error)
            raise refused(error) from error
        self.breaker.answered()
        return claim

    def _leave(self, error: Exception | None = None) -> None:
        if error and code_of(error) in UNFIT:
            self._server.leave()
        self._failures += 1
        self.breaker.waited_in_vain()

    def _decide(self, command: bytes) -> Claim:
        """Return the claim. Raises redis.RedisError, OSError, Unreplicated, Unprepared."""
        try:
            connection = self._connection(self._failures)
        except (redis.RedisError, OSError) as error:
            raise Unsent(error) from error
        try:
            answer, copied = self._ask(connection, command)
        except redis.exceptions.NoScriptError:
            # Nothing ran, so this is the one case where sending again is safe.
            self._exchange(connection, self.script.load)
            answer, copied = self._ask(connection, command)
        claim = claim_of(answer[0])
        if copied is not None and not self._replicas.enough(copied):
            if claim.outcome in PROMISES:
                raise Unreplicated(copied)
            # The next one connects anew, and is asked for its replicas first.
            self._failures += 1
        return claim

    def _ask(self, connection: Connection, command: bytes) -> tuple[list[Any], object]:
        """Return the script's answer, and WAIT's where replicas are asked for."""
        wait = self._replicas.wait
        connection.send_packed_command((command + wait,))
        if not wait:
            return connection.read_response(), None
        error = None
        try:
            answer = connection.read_response()
        except redis.ResponseError as refusal:
            error = refusal
        try:
            copied = connection.read_response()
        except redis.ResponseError as refusal:
            copied = refusal
        if error:
            raise error
        return answer, copied

    def check(self) -> bool:
        """Return whether the sale was compared with PostgreSQL; as LoopLine.check."""
        try:
            connection = self._connection(self._failures)
            self._exchange(connection, self.script.try_adding)
            held, last = self._exchange(connection, self.script.ask_sale)
            if held is None:
                raise Unprepared("the sale is not in Redis")
            if self._record is None and time.monotonic() - self._recorded_at > COMPARE_SECONDS:
                self.script.check_sale(self._sale_on_record(), held, last)
        except Unprepared:
            # Every thread compares anew before it sells.
            self._failures += 1
            raise
        except (redis.RedisError, OSError) as error:
            self._failures += 1
            raise Unavailable(str(error)) from error
        return self._record is not None

    @staticmethod
    def _exchange(connection: Connection, command: bytes) -> Any:
        connection.send_packed_command((command,))
        return connection.read_response()

    def _connection(self, failures: int) -> Connection:
        local = self._local
        if getattr(local, "failures", None) != failures:
            if not hasattr(local, "connection"):
                local.connection = self._pool.make_connection()
            local.connection.disconnect()
            local.connection.connect()
            self._exchange(local.connection, self.script.load)
            self._exchange(local.connection, self.script.try_writing)
            if self._replicas.count:
                self._try_replicas(local.connection)
            # First PostgreSQL, then Redis: the ids on record were issued before Redis is asked.
            record = self._sale_on_record()
            self.script.check_sale(record, *self._exchange(local.connection, self.script.ask_sale))
            local.failures = failures
        return local.connection

    def _try_replicas(self, connection: Connection) -> None:
        connection.send_packed_command((self._replicas.fence,))
        with suppress(redis.ResponseError):
            connection.read_response()
        connection.read_response()
        copied = connection.read_response()
        if not self._replicas.enough(copied):
            raise redis.ConnectionError(str(Unreplicated(copied)))

    def _sale_on_record(self) -> tuple[str, int] | None:
        now = time.monotonic()
        with self._record_lock:
            # Threads that connect together ask once: what was asked since they came will do.
            if self._recorded_at < now:
                self._recorded_at = time.monotonic()
                self._record = self._on_record()
            return self._record
