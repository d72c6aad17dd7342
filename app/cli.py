"""The `flask …` commands of operators and developers."""

import click
import flask_migrate
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext
from sqlalchemy import select, text

from . import auth, recovery
from .audit import CLI
from .extensions import db, stock
from .inventory import Conflict
from .models import ApiToken, Sale, Staff
from .purchases import InvalidRequest
from .stock import Unavailable

# Two starts at once must not migrate at once.
PREPARE_LOCK = 7_316_002

staff = AppGroup("staff", help="People who may sign in to /admin.")
token = AppGroup("token", help="Bearer tokens of the admin API.")


def init_app(app: Flask) -> None:
    for command in (prepare, seed, staff, token):
        app.cli.add_command(command)


@click.command()
@with_appcontext
def prepare() -> None:
    """Make the database ready: migrations, the first admin, and into an empty one the first product."""
    settings = current_app.config["SETTINGS"]
    with db.engine.connect() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({PREPARE_LOCK})"))
        flask_migrate.upgrade()
        if not db.session.scalar(select(Staff.id).limit(1)):
            try:
                auth.create_staff(settings.admin_email, settings.admin_password, "admin", CLI)
            except InvalidRequest as error:
                raise click.ClickException(f"ADMIN_EMAIL, ADMIN_PASSWORD: {error}") from None
            click.echo(f"Admin:     {settings.admin_email}  {settings.admin_password}")
            click.echo(f"API token: {settings.admin_api_token}")
        if recovery.database_is_empty():
            product_id = recovery.reset(CLI)
            click.echo(f"Seeded:    product {product_id} with 100 items")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def seed(yes: bool) -> None:
    """Reset to one product with 100 items: every product and order is deleted, ids start from 1."""
    if not yes:
        click.confirm("This deletes every product and every order. Go on?", abort=True)
    try:
        product_id = recovery.reset(CLI)
    except Unavailable as error:
        raise click.ClickException(f"Redis: {error}") from None
    click.echo(f"Product {product_id} is on sale with 100 items.")


@staff.command("create")
@click.argument("email")
@click.option("--role", type=click.Choice(auth.ROLES), default="support", show_default=True)
@click.password_option()
def create_staff(email: str, role: str, password: str) -> None:
    """Let somebody sign in."""
    try:
        person = auth.create_staff(email, password, role, CLI)
    except (InvalidRequest, Conflict) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{person.email} may sign in as {person.role}.")


@staff.command("list")
def list_staff() -> None:
    """Show who may sign in."""
    for person in db.session.scalars(select(Staff).order_by(Staff.email)):
        state = "" if person.active else "  deactivated"
        click.echo(f"{person.email}  {person.role}{state}")


@staff.command("passwd")
@click.argument("email")
@click.password_option()
def change_password(email: str, password: str) -> None:
    """Set somebody's password; their sessions end."""
    person = db.session.scalar(select(Staff).where(Staff.email == email.strip().lower()))
    if person is None:
        raise click.ClickException(f"There is nobody with the address {email}")
    try:
        auth.set_password(person, password, CLI)
    except InvalidRequest as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{person.email} has a new password.")


@token.command("create")
@click.argument("name")
def create_token(name: str) -> None:
    """Create a token and show it, this once."""
    try:
        created, secret = auth.create_token(name, CLI)
    except InvalidRequest as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Token {created.id}: {secret}")


@token.command("list")
def list_tokens() -> None:
    """Show the tokens, without their text."""
    for found in db.session.scalars(select(ApiToken).order_by(ApiToken.id)):
        state = "revoked" if found.revoked_at else f"last used {found.last_used_at or 'never'}"
        click.echo(f"{found.id}  {found.name}  {state}")


@token.command("revoke")
@click.argument("token_id", type=int)
def revoke_token(token_id: int) -> None:
    """Revoke a token at once."""
    try:
        auth.revoke_token(token_id, CLI)
    except LookupError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Token {token_id} is revoked.")
