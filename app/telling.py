"""What every process writes: log lines for people or machines, bounded in number.

Knows neither Flask nor the sale, so that programs which only start others can use it too.
"""

import json
import logging
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from .config import Settings, wanted_log_format

log = logging.getLogger("app.run")

SAME_LINES_PER_SECOND = 10
# Nothing that a client sent may begin a new line or move a terminal's cursor.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160), 0x2028, 0x2029)}


class Bound:
    """Lets so many lines a second through and counts the others."""

    def __init__(self, per_second: int) -> None:
        self._allowed = per_second
        self._second = 0
        self._seen = 0

    def left_out(self) -> int | None:
        """Return the number left out since the last line; None when this one is left out too."""
        self._seen += 1
        second = int(time.monotonic())
        if second == self._second and self._seen > self._allowed:
            return None
        left_out = 0
        if second != self._second:
            left_out = max(0, self._seen - 1 - self._allowed)
            self._second, self._seen = second, 1
        return left_out


class BoundLines(logging.Filter):
    """Bounds the lines of one kind, whatever module writes them."""

    def __init__(self) -> None:
        super().__init__()
        self._bounds: dict[tuple[str, object], Bound] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if len(self._bounds) > 1000:
            self._bounds.clear()
        kind = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg))
        bound = self._bounds.setdefault(kind, Bound(SAME_LINES_PER_SECOND))
        if record.levelno < logging.INFO:
            return True
        left_out = bound.left_out()
        if left_out:
            record.fields = getattr(record, "fields", {}) | {"left_out": left_out}
        return left_out is not None


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {k: v for k, v in getattr(record, "fields", {}).items() if v is not None}


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class ConsoleLines(logging.Formatter):
    """One line for a person; a stack trace below it."""

    def format(self, record: logging.LogRecord) -> str:
        words = [f"{name}={value}" for name, value in _fields(record).items()]
        text = " ".join([record.getMessage(), *words]).translate(CONTROLS)
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{moment} {record.levelname.lower():7} {record.name}  {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def begin() -> None:
    """Set up the lines of a program before its settings are known to be right.

    What nobody catches becomes a line too.
    """
    _configure(wanted_log_format(), "info")
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def configure(settings: Settings) -> None:
    """Set up the lines as the settings want them."""
    _configure(settings.log_format, settings.log_level)


def _configure(log_format: str, log_level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else ConsoleLines())
    handler.addFilter(BoundLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    # RQ tells every job, several a second; Alembic and flask-limiter what is told here already.
    for noisy in ("rq.worker", "alembic", "flask-limiter", "werkzeug"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    # What starts and ends is told at every level.
    log.setLevel(min(logging.INFO, root.level))


def _uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    # A thread's error, and one of a finalizer, may be known by its kind alone.
    error = error if error is not None else kind()
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif not issubclass(kind, SystemExit):
        log.critical("%s ended a program or a thread", kind.__name__, exc_info=(kind, error, trace))


def is_json() -> bool:
    """Tell whether machines read what this process writes."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def tell(line: str) -> None:
    """Tell who started the system something: as it stands on a console, else as a log line."""
    if is_json():
        log.info("%s", line)
        return
    # A terminal that is gone must not stop the sale.
    with suppress(OSError):
        print(line, flush=True)


def fail(reason: object, code: int = 1) -> int:
    """Tell in one line why a program can't start; return its exit code."""
    if is_json():
        log.error("%s", reason)
    else:
        print(f"error: {reason}", file=sys.stderr)
    return code
