"""How each program begins: its log lines, the settings, the app, and the servers that it lacks.

Without REDIS_URL and DATABASE_URL the embedded servers are used: those of a running `make run`, or
else started for the life of this process.
"""

import atexit
import contextlib
import gc
import sys

from flask import Flask

from . import create_app, logs, telling
from .config import SettingsError, load_settings, with_secrets
from .run.embedded import EmbeddedError, servers, with_servers

_open = contextlib.ExitStack()
atexit.register(_open.close)


def load_app(*, pages: bool = False, commands: bool = False) -> Flask:
    """Return the app of a program, see `create_app`; ends the process where it can't have one.

    From here on what goes wrong is a log line. Commands start the servers themselves.
    """
    telling.begin()
    # A thousand modules, and nothing among them is garbage: to look for it takes a tenth of the
    # time.
    gc.disable()
    try:
        settings = with_secrets(load_settings())
        logs.configure(settings)
        app = create_app(with_servers(settings), pages=pages, commands=commands)
    except (SettingsError, EmbeddedError) as error:
        sys.exit(telling.fail(error))
    finally:
        gc.enable()
    app.config["SETTINGS_GIVEN"] = settings  # without the addresses of servers it lacks
    if not commands:
        start_servers(app)
    return app


def start_servers(app: Flask) -> None:
    """Start what an app lacks and is not running; ends the process where that can't be done."""
    try:
        _open.enter_context(servers(app.config["SETTINGS_GIVEN"]))
    except EmbeddedError as error:
        sys.exit(telling.fail(error))
