"""What a WSGI server and the `flask` command load: `wsgi:app`.

Without REDIS_URL and DATABASE_URL the embedded servers are used: those of a running `make run`, or
else started for the life of this process.
"""

import atexit
import contextlib
import gc
import sys
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import click

from app import create_app, logs, telling
from app.config import SettingsError, load_settings, with_secrets
from app.run.embedded import EmbeddedError, servers, with_servers

P = ParamSpec("P")
R = TypeVar("R")

telling.begin()
_open = contextlib.ExitStack()
atexit.register(_open.close)


def start_servers() -> None:
    """Start what is not running; ends the process where that can't be done."""
    try:
        _open.enter_context(servers(settings))
    except EmbeddedError as error:
        sys.exit(telling.fail(error))


def start_when_carried_out(commands: Iterable[click.Command]) -> None:
    """Leave the start to the commands: `--help` and wrong arguments need no servers."""
    for command in commands:
        if isinstance(command, click.Group):
            start_when_carried_out(command.commands.values())
        elif command.callback:
            command.callback = _started_first(command.callback)


def _started_first(callback: Callable[P, R]) -> Callable[P, R]:
    def carry_out(*args: P.args, **options: P.kwargs) -> R:
        start_servers()
        return callback(*args, **options)

    return carry_out


# `flask` looks for its commands; for those that serve (run, shell, routes) it asks later.
_asked = click.get_current_context(silent=True)
_for_commands = _asked is not None and isinstance(_asked.command, click.Group)

# A thousand modules, and nothing among them is garbage: to look for it takes a tenth of the time.
gc.disable()
try:
    settings = with_secrets(load_settings())
    logs.configure(settings)
    app = create_app(with_servers(settings), commands_only=_for_commands)
except (SettingsError, EmbeddedError) as error:
    sys.exit(telling.fail(error))
gc.enable()

if _for_commands:
    start_when_carried_out(app.cli.commands.values())
else:
    start_servers()
