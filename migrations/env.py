"""Run migrations on the app's own database connection (`flask db …`)."""

import re

from alembic import context
from flask import current_app

migrate = current_app.extensions["migrate"]


def is_ours(name: str | None, kind: str, _: object) -> bool:
    """Leave the days of the feed out: they are made and dropped by feed/numbering.py."""
    return not (kind == "table" and (name or "").startswith("events_"))


def is_table(found: object, name: str | None, kind: str, reflected: bool, _: object) -> bool:
    """Leave views out: they are written by hand."""
    return not (kind == "table" and getattr(found, "info", {}).get("is_view"))


def call_next(made: object, _: object, directives: list) -> None:
    """Call a new migration by the next number and its message: `0017_notes_of_products`."""
    (script,) = directives
    words = re.sub("[^a-z0-9]+", "_", (script.message or "").lower()).strip("_")
    number = int(context.script.get_current_head()[:4]) + 1
    # alembic_version has room for 32 characters.
    script.rev_id = f"{number:04}_{words}"[:32].rstrip("_")


def run_offline() -> None:
    """Print the SQL instead of running it (`flask db upgrade --sql`)."""
    context.configure(
        url=migrate.db.engine.url.render_as_string(hide_password=False),
        target_metadata=migrate.db.metadata,
        literal_binds=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def run_online() -> None:
    with migrate.db.engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=migrate.db.metadata,
            include_name=is_ours,
            include_object=is_table,
            # What one has locked nobody waits for while the next one waits for something else.
            transaction_per_migration=True,
            process_revision_directives=call_next,
            **migrate.configure_args,
        )
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
