"""What a WSGI server and the `flask` command load: `wsgi:app`."""

from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

import click

from app.loading import load_app, start_servers

P = ParamSpec("P")
R = TypeVar("R")


def start_when_carried_out(commands: Iterable[click.Command]) -> None:
    """Leave the start to the commands: `--help` and wrong arguments need no servers."""
    for command in commands:
        if isinstance(command, click.Group):
            start_when_carried_out(command.commands.values())
        elif command.callback:
            command.callback = _started_first(command.callback)


def _started_first(callback: Callable[P, R]) -> Callable[P, R]:
    def carry_out(*args: P.args, **options: P.kwargs) -> R:
        start_servers(app)
        return callback(*args, **options)

    return carry_out


# `flask` looks for its commands; for those that serve (run, shell, routes) it asks later.
_asked = click.get_current_context(silent=True)
_group = _asked.command if _asked else None
_for_commands = isinstance(_group, click.Group)

app = load_app(pages=not _for_commands, commands=_for_commands)
if isinstance(_group, click.Group):
    # Flask-Limiter brings it along, and it needs packages that are not installed here.
    if of_limiter := _group.commands.get("limiter"):
        of_limiter.hidden = True
    start_when_carried_out(app.cli.commands.values())
