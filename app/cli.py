"""The `flask …` commands of operators and developers."""

import functools
import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

import click
import flask_migrate
import psycopg2
import redis
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext
from psycopg2.errorcodes import UNDEFINED_COLUMN, UNDEFINED_TABLE
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from . import telling
from .audit import CLI, Actor
from .books import ledger, recovery
from .config import ROOT, Settings, was_generated
from .database import is_unavailable, sqlstate
from .extensions import db, stock
from .locks import PREPARE_LOCK
from .models import DeadLetter, Product
from .money import decimal
from .orders import bulk, deadletters
from .problems import Conflict, InvalidRequest, Unavailable, UnknownProduct, Unprepared
from .products import brake as brakes
from .products import currency as currencies
from .products import importing, movements, terms
from .products.sale import to_follow
from .reading import MAX_ID, MAX_REASON, USER_WORDS, User, canonical, read_text
from .staff import people, tokens
from .stock import plan
from .words import counted

# Two starts at once must not migrate at once.
PREPARE_SECONDS = 0.2
MOST_LISTED = 100_000
LETTERS_AT_ONCE = 500

ledger_commands = AppGroup("ledger", help="The proof that stock and orders agree to the unit.")
cluster_commands = AppGroup("cluster", help="The nodes that share the sale.")
orders = AppGroup("orders", help="Orders that were sold.")
dead_letters = AppGroup("dead-letters", help="Orders that could not be stored.")
products_commands = AppGroup("products", help="What is sold.")
stock_commands = AppGroup("stock", help="The stock of products.")
staff = AppGroup("staff", help="People who may sign in to /admin.")
token = AppGroup("token", help="Bearer tokens of the admin API.")


def init_app(app: Flask) -> None:
    """Add the commands, and to `flask db` where the migrations are."""
    flask_migrate.Migrate(app, db, directory=str(ROOT / "migrations"), compare_type=True)
    for command in (
        prepare, seed, rebuild, brake, ledger_commands, orders, dead_letters, products_commands,
        stock_commands, cluster_commands, staff, token,
    ):  # fmt: skip
        app.cli.add_command(_told_in_words(command))
    _told_in_words(app.cli.commands["db"])  # Flask-Migrate's own


def _told_in_words(command: click.Command) -> click.Command:
    """Make a command end with one line, and no traceback, when what it is to do can't be done."""
    for each in getattr(command, "commands", {}).values():
        _told_in_words(each)
    carry_out = command.callback

    if carry_out is None or hasattr(carry_out, "told_in_words"):
        return command

    @functools.wraps(carry_out)
    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return carry_out(*arguments, **options)
        except (InvalidRequest, Conflict, ledger.Unquiet) as error:
            raise click.ClickException(str(error)) from None
        except UnknownProduct as error:
            raise click.ClickException(f"There is no product {error}") from None
        except (Unavailable, redis.RedisError) as error:
            raise click.ClickException(_redis_fault(error)) from None
        except (SQLAlchemyError, psycopg2.Error) as error:
            if not is_unavailable(error):
                raise
            raise click.ClickException(_postgres_fault(error)) from None

    told.told_in_words = True  # type: ignore[attr-defined]  # a mark: no command is wrapped twice
    command.callback = told
    return command


def _redis_fault(error: Exception) -> str:
    if isinstance(error, Unprepared):
        return f"{error}: `flask rebuild` makes the sale in Redis anew"
    return f"Redis can't do this now: {error}"


def _postgres_fault(error: Exception) -> str:
    reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    if sqlstate(error) in (UNDEFINED_TABLE, UNDEFINED_COLUMN):
        if click.get_current_context().info_name == "prepare":
            return f"No migration makes what the models have: {reason}"
        return "PostgreSQL is without this system's tables, or has older ones: run `flask prepare`"
    url = db.engine.url
    where = url.host or url.query.get("host", "its socket")
    return f"PostgreSQL at {where}:{url.port or 5432} can't do this now: {reason}"


def read_reason(context: click.Context, option: click.Option, text: str) -> str:
    """Return a reason as the pages and the API would take it, or refuse it."""
    try:
        return read_text({"reason": text}, "reason", MAX_REASON)
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@with_appcontext
def prepare() -> None:
    """Make the database ready: migrations, the first admin, and if empty the first product."""
    settings = current_app.config["SETTINGS"]
    with db.engine.connect() as connection:
        # Whoever waited inside of a statement would be waited for by CREATE INDEX CONCURRENTLY.
        while not connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({PREPARE_LOCK})")):
            connection.rollback()
            time.sleep(PREPARE_SECONDS)
        flask_migrate.upgrade()
        if not people.everybody():
            try:
                people.create(settings.admin_email, settings.admin_password, "admin", CLI)
            except InvalidRequest as error:
                raise SystemExit(telling.fail(f"ADMIN_EMAIL, ADMIN_PASSWORD: {error}")) from None
            telling.tell(f"Admin:     {settings.admin_email}  {_shown(settings, 'admin_password')}")
            telling.tell(f"API token: {_shown(settings, 'admin_api_token')}")
        for doubt in currencies.doubts():
            telling.tell(
                f"Currency:  product {doubt.product_id} costs {doubt.as_minor_units}, if no form of"
                " an earlier version stored it: see `flask products currency`"
            )
        if recovery.database_is_empty():
            product_id = recovery.reset(CLI)
            telling.tell(f"Seeded:    product {product_id} with 100 items")


def _shown(settings: Settings, name: str) -> str:
    """Return what a first start tells of a secret: a generated one itself, but not to a log."""
    if not was_generated(settings, name):
        return "(as given)"
    path = settings.data_dir / name
    return f"(in {path})" if telling.is_json() else getattr(settings, name)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def seed(yes: bool) -> None:
    """Reset to one product with 100 items: every product and order is deleted, ids start from 1.

    Refused with APP_ENV=production.
    """
    if current_app.config["SETTINGS"].app_env == "production":
        raise click.ClickException("refused with APP_ENV=production: every order would be deleted")
    products, stored, waiting = recovery.what_a_reset_deletes()
    click.echo(
        f"This deletes {counted(products, 'product')}, {counted(stored, 'stored order')} "
        f"and {waiting:,} that wait to be stored."
    )
    if not yes:
        click.confirm("Go on?", abort=True)
    product_id = recovery.reset(CLI)
    click.echo(f"Product {product_id} is on sale with 100 items.")


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--replace", is_flag=True, help="Delete the other sale that Redis holds.")
@with_appcontext
def rebuild(yes: bool, replace: bool) -> None:
    """Make the sale in Redis anew from PostgreSQL, after Redis lost it."""
    if not yes:
        click.confirm("Nothing is sold until this is done, some seconds. Go on?", abort=True)
    try:
        report = recovery.rebuild(CLI, replace)
    except recovery.ForeignSale as error:
        raise click.ClickException(f"{error}: use --replace if it may go") from None
    click.echo(report)


@click.command()
@click.argument("product", type=click.IntRange(1, MAX_ID), required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--release", is_flag=True, help="Let purchases in again.")
@with_appcontext
def brake(product: int | None, yes: bool, release: bool) -> None:
    """Stop selling PRODUCT, or everything, at once; works without PostgreSQL."""
    what = f"product {product}" if product else "every product"
    if not yes:
        click.confirm(f"{'Release' if release else 'Stop selling'} {what}?", abort=True)
    done = brakes.brake(not release, product, CLI)
    told = f"{what.capitalize()} {'is released' if release else 'is braked'}."
    click.echo(told + to_follow(done.pending))
    if release and done.sale:
        click.echo("The whole sale is still braked: `flask brake --release`")
    if release and done.still:
        click.echo(f"Still braked: product {', '.join(map(str, done.still))}")


@ledger_commands.command("check")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@with_appcontext
def check_ledger(as_json: bool) -> None:
    """Prove every product's ledger, while selling goes on; exits with 1 when one is wrong."""
    result = ledger.check(rows=True)
    if as_json:
        click.echo(json.dumps(result.as_proof()))
    else:
        for product in result.products.values():
            click.echo(
                f"product {product.product_id}: {product.moved} put on sale "
                f"- {product.stored} stored - {product.queued} waiting "
                f"= {product.expected_free}, free {product.free}: "
                f"{'ok' if product.ok else 'WRONG'}"
            )
            for problem in product.problems:
                click.echo(f"  {problem}")
        for problem in result.problems:
            click.echo(problem)
    if result.ok:
        return
    if not as_json:
        for product in result.products.values():
            if not product.ok:
                show_differences(product.product_id)
    raise SystemExit(1)


def show_differences(product_id: int) -> None:
    found = ledger.differences(product_id)
    for first, last in found.missing_orders:
        click.echo(f"  issued and nowhere: order {first}" + (f" to {last}" if last > first else ""))
    for name, ids in (
        ("stored but never issued: order", found.unknown_orders),
        ("marked as applied, but not in Redis: movement", found.unapplied_movements),
        ("listed as waiting, but not in the outbox: order", found.not_waiting),
    ):
        for found_id in ids:
            click.echo(f"  {name} {found_id}")


@cluster_commands.command("plan")
@with_appcontext
def show_plan() -> None:
    """Tell which node has which shard, and what is unwise; exits with 1 when something is."""
    found = plan.placed(stock.shards)
    if found is None:
        shards = len(stock.shards)
        click.echo(
            "There is no cluster: one server has the sale"
            + (f", in {shards} shards." if shards > 1 else ".")
        )
        return
    for place in found:
        replicas = ", ".join(f"{host}:{port}" for host, port in place.replicas) or "none"
        host, port = place.primary
        click.echo(
            f"shard {place.shard:2}  slot {place.slot:5}  primary {host}:{port}"
            f"  replicas {replicas}"
        )
    problems = plan.warnings(found, stock.first.replicas.count)
    for problem in problems:
        click.echo(f"warning: {problem}")
    raise SystemExit(1 if problems else 0)


@ledger_commands.command("repair")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def repair_ledger(yes: bool) -> None:
    """Set Redis' counters right. Free stock is only ever lowered."""
    planned = ledger.plan_repair(ledger.check())
    if not planned:
        click.echo("There is nothing to repair.")
        return
    for step in planned:
        show_repair(step, "to take")
    if not yes:
        click.confirm("Go on?", abort=True)
    for step in ledger.repair(CLI):
        show_repair(step, "taken")


def show_repair(step: ledger.Repair, verb: str) -> None:
    amounts = ", ".join(f"{name} {amount:+}" for name, amount in step.amounts.items()) or "none"
    click.echo(f"product {step.product_id}: {step.take} free units {verb}; counters: {amounts}")
    if step.held_back:
        click.echo(f"  {step.held_back} units stay held back; `flask rebuild` releases them")


def read_moment(context: click.Context, option: click.Option, text: str | None) -> datetime | None:
    """Return a time as the API would take it, or refuse it."""
    try:
        return None if text is None else terms.moment(text, option.name or "", "it")
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from None


def read_shopper(context: click.Context, option: click.Option, text: str | None) -> User | None:
    try:
        return None if text is None else canonical(text)
    except ValueError:
        raise click.BadParameter(f"must be {USER_WORDS}") from None


@orders.command("cancel")
@click.option("--product", "product_id", type=click.IntRange(1, MAX_ID), required=True)
@click.option("--user", callback=read_shopper, help="Those of this shopper alone.")
@click.option("--reference", help="Those of this reference alone.")
@click.option("--from", "since", callback=read_moment, help="Claimed at this time or later.")
@click.option("--to", "until", callback=read_moment, help="Claimed before this time.")
@click.option("--reason", required=True, callback=read_reason)
@click.option("--count", type=int, help="How many that are, exactly; without it you are asked.")
@with_appcontext
def cancel_orders(
    product_id: int,
    user: User | None,
    reference: str | None,
    since: datetime | None,
    until: datetime | None,
    reason: str,
    count: int | None,
) -> None:
    """Cancel all stored orders of a product, or those of a filter; their units go back on sale.

    Interrupted, it is gone on with by the worker; `/admin/bulk-cancels` shows and stops it.
    """
    plan = bulk.plan(bulk.Wanted(product_id, user, reference, since, until))
    click.echo(
        f"{counted(plan.orders, 'order')} with {counted(plan.units, 'unit')},"
        f" up to order {plan.through_order_id}."
    )
    if not plan.orders:
        return
    if count is None:
        count = click.prompt("Type how many orders to cancel", type=int)
    begun, _ = bulk.start(plan.wanted, count, reason, CLI, plan.through_order_id)
    bulk_id = begun.id
    while (found := bulk.get(bulk_id)).finished_at is None:
        click.echo(f"\r{found.cancelled_orders} of {found.orders}", nl=False)
        if not bulk.step(bulk_id):
            # A worker is at it.
            time.sleep(PREPARE_SECONDS)
    click.echo(
        f"\rCancelled {counted(found.cancelled_orders, 'order')}"
        f" with {counted(found.cancelled_units, 'unit')}."
    )
    if found.state == "stopped":
        raise click.ClickException(f"It was stopped by {found.stopped_by}.")


@dead_letters.command("list")
@click.option("--state", type=click.Choice(["open", "replayed", "abandoned", "all"]),
              default="open", show_default=True)  # fmt: skip
@click.option("--limit", type=click.IntRange(1, MOST_LISTED), default=50, show_default=True)
@with_appcontext
def list_dead_letters(state: str, limit: int) -> None:
    """Show the newest dead letters."""
    filters = deadletters.Filters(state=None if state == "all" else state)
    before, left = None, limit
    while letters := deadletters.list_letters(filters, before, min(left, LETTERS_AT_ONCE)):
        show_letters(letters)
        before, left = letters[-1].id, left - len(letters)
        if not left:
            if deadletters.list_letters(filters, before, 1):
                click.echo(f"There are older ones than these {limit:,}: see --limit", err=True)
            return
    if before is None:
        click.echo("There are none.", err=True)


def show_letters(letters: list[DeadLetter]) -> None:
    for letter in letters:
        click.echo(
            f"{letter.id}  {letter.resolution or 'open'}  order {letter.order_id or '?'}  "
            f"user {letter.user or '?'}  product {letter.product_id or '?'}  "
            f"quantity {letter.quantity or '?'}  {letter.error}"
        )


def _resolve(
    act: Callable[[list[int], str, Actor], list[deadletters.Resolved]],
    ids: tuple[int, ...],
    reason: str,
) -> None:
    results = act(list(ids), reason, CLI)
    for result in results:
        click.echo(f"{result.letter_id}: {result.message}")
    if not all(result.done for result in results):
        raise SystemExit(1)


@dead_letters.command("replay")
@click.argument("ids", type=int, nargs=-1, required=True)
@click.option("--reason", required=True, callback=read_reason)
@with_appcontext
def replay_dead_letters(ids: tuple[int, ...], reason: str) -> None:
    """Store the orders after all; their stock is held already."""
    _resolve(deadletters.replay, ids, reason)


@dead_letters.command("abandon")
@click.argument("ids", type=int, nargs=-1, required=True)
@click.option("--reason", required=True, callback=read_reason)
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def abandon_dead_letters(ids: tuple[int, ...], reason: str, yes: bool) -> None:
    """Give the orders up and return their units to free stock."""
    effects = deadletters.effect_of(list(ids))
    units = sum(effect.returned_units for effect in effects)
    click.echo(f"{len(effects)} open letters; {units} units would return to free stock.")
    if not yes:
        click.confirm("Go on?", abort=True)
    _resolve(deadletters.abandon, ids, reason)


@products_commands.command("import")
@click.argument("file", type=click.File("rb"))
@click.option("--dry-run", is_flag=True, help="Only show what the file would make.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def import_products(file: BinaryIO, dry_run: bool, yes: bool) -> None:
    """Create the products of FILE, CSV or JSON (- for the standard input): all, or none.

    The first line of a CSV file names its columns; see docs/admin.md.
    """
    # More than a file may have is not even held.
    plan = importing.read(file.read(importing.MOST_BYTES + 1))
    for fault in plan.faults:
        click.echo(f"line {fault.line}: {fault.message}", err=True)
    if plan.faults:
        more = plan.faulty - len(plan.faults)
        raise click.ClickException(
            "nothing was imported" + (f"; {more:,} more lines are wrong" if more else "")
        )
    for new, line in zip(plan.products, plan.lines, strict=True):
        price = (
            f"{new.terms['currency']} {decimal(new.terms['price_cents'], new.terms['currency'])}"
        )
        click.echo(f"line {line}: {new.terms['name']}  {price}  stock {new.units:,}")
    products = counted(len(plan.products), "product")
    if dry_run:
        click.echo(f"{products} would be created.")
        return
    if not yes:
        click.confirm(f"Create {products}?", abort=True)
    ids = importing.carry_out(plan, CLI) or []
    numbers = f"number {ids[0]}" if len(ids) == 1 else f"numbers {ids[0]} to {ids[-1]}"
    click.echo(f"{products} created, {numbers}.")


@products_commands.command("currency")
@click.argument("product", type=click.IntRange(1, MAX_ID), required=False)
@click.option("--keep", is_flag=True, help="The amounts are right as they are shown.")
@click.option("--rewrite", is_flag=True, help="They are hundredths: make minor units of them.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_appcontext
def currency(product: int | None, keep: bool, rewrite: bool, yes: bool) -> None:
    """Show the products whose amounts may be hundredths, or put PRODUCT right.

    Before 0.2.0 forms took every amount for hundredths, also of a currency that has none (JPY) or
    thousandths (KWD); the API did not.
    """
    doubts = [doubt for doubt in currencies.doubts() if product in (None, doubt.product_id)]
    if not doubts:
        if product is None:
            click.echo("No product's amounts are in doubt.")
            return
        if db.session.get(Product, product) is None:
            raise UnknownProduct(product)
        raise click.ClickException(f"The amounts of product {product} are not in doubt")
    if product is None or keep == rewrite:
        for doubt in doubts:
            click.echo(f"product {doubt.product_id}  {doubt.name}  {doubt.orders:,} orders")
            click.echo(f"  stored by the API, and right: {doubt.as_minor_units}  (--keep)")
            typed = doubt.as_hundredths
            if typed is not None:
                click.echo(f"  typed into a form: {typed}  (--rewrite)")
            if doubt.actor:
                click.echo(f"  the price was set by {doubt.actor}, {doubt.at:%Y-%m-%d %H:%M} UTC")
        if keep and rewrite:
            raise click.ClickException("--keep or --rewrite, one of them")
        if keep or rewrite:
            raise click.ClickException("which product?")
        return
    (doubt,) = doubts
    now = doubt.as_minor_units if keep else doubt.as_hundredths
    if now is None:
        raise click.ClickException("as hundredths, its price is no whole number of minor units")
    if not yes:
        click.confirm(f"Product {product} costs {now}, and its orders alike?", abort=True)
    if keep:
        currencies.keep(product, CLI)
        click.echo(f"Product {product} costs {now}.")
    else:
        orders = currencies.rewrite(product, CLI)
        click.echo(f"Product {product} costs {now}; {orders:,} orders were put right.")


@stock_commands.command("correct", context_settings={"ignore_unknown_options": True})
@click.argument("product_id", type=int)
@click.argument("units", type=int)
@click.option("--reason", required=True, callback=read_reason)
@with_appcontext
def correct_stock(product_id: int, units: int, reason: str) -> None:
    """Add UNITS, or take them away when negative, because a count was wrong."""
    free = movements.correct(product_id, units, reason, CLI)
    click.echo(f"Product {product_id} has {free} free units.")


@staff.command("create")
@click.argument("email")
@click.option("--role", type=click.Choice(people.ROLES), default="support", show_default=True)
@click.password_option()
def create_staff(email: str, role: str, password: str) -> None:
    """Let somebody sign in."""
    person = people.create(email, password, role, CLI)
    click.echo(f"{person.email} may sign in as {person.role}.")


@staff.command("list")
def list_staff() -> None:
    """Show who may sign in."""
    for person in people.everybody():
        state = "" if person.active else "  deactivated"
        click.echo(f"{person.email}  {person.role}{state}")


@staff.command("passwd")
@click.argument("email")
@click.password_option()
def change_password(email: str, password: str) -> None:
    """Set somebody's password; their sessions end."""
    person = people.find(email)
    if person is None:
        raise click.ClickException(f"There is nobody with the address {email}")
    people.set_password(person, password, CLI)
    click.echo(f"{person.email} has a new password.")


@token.command("create")
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice([*tokens.SCOPES, tokens.ALL]),
    help="What it may do; may be given more than once. * is everything.",
)
def create_token(name: str, scopes: tuple[str, ...]) -> None:
    """Create a token and show it, this once."""
    created, secret = tokens.create(name, scopes, CLI)
    click.echo(f"Token {created.id}: {secret}")


@token.command("list")
def list_tokens() -> None:
    """Show the tokens, without their text."""
    for found in tokens.all_tokens():
        state = "revoked" if found.revoked_at else f"last used {found.last_used_at or 'never'}"
        click.echo(f"{found.id}  {found.hint or ''}…  {found.name}  {found.scopes}  {state}")


@token.command("revoke")
@click.argument("token_id", type=int)
def revoke_token(token_id: int) -> None:
    """Revoke a token at once."""
    try:
        tokens.revoke(token_id, CLI)
    except LookupError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"Token {token_id} is revoked.")
