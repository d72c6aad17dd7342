"""The `flask …` commands."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import click
import pytest
from system import PRODUCTION, run_program

from app import create_app
from app.extensions import db, stock
from app.models import AuditEntry, Staff, StockMovement


def test_seed_asks_first(runner, buy, drain):
    buy(1)
    drain()
    result = runner.invoke(args=["seed"], input="n\n")
    assert result.exit_code == 1
    assert stock.view([1]).products[1]["free"] == 99


def test_seed_says_what_it_would_delete(runner, buy, drain):
    buy(1)
    buy(2)
    drain()
    buy(3)
    result = runner.invoke(args=["seed"], input="n\n")
    told = "This deletes 1 product, 2 stored orders and 1 that wait to be stored.\nGo on? [y/N]"
    assert told in result.output


def test_seed_refuses_production(make_app):
    names = ("secret_key", "admin_email", "admin_password", "admin_api_token", "metrics_token")
    app = make_app(app_env="production", **{name: PRODUCTION[name.upper()] for name in names})
    before = stock.generation()
    result = app.test_cli_runner().invoke(args=["seed", "--yes"])
    assert result.exit_code == 1
    assert "APP_ENV=production" in result.output
    assert stock.generation() == before


# Each in a process of its own, that was forked: to import what they share takes longest.
COMMANDS = """
import json, os, sys
import flask.cli, app.cli

for words in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        sys.argv = ["flask", *words]
        flask.cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr)
"""


def test_commands_that_are_not_carried_out_start_no_server(tmp_path):
    codes = {
        ("--help",): 0, ("seed", "--help"): 0, ("ledger", "--help"): 0, ("nonsense",): 2,
        ("dead-letters", "replay"): 2,
    }  # fmt: skip
    environ = {"REDIS_URL": "", "DATABASE_URL": "", "SECRET_KEY": "", "DATA_DIR": str(tmp_path)}
    argv = [sys.executable, "-c", COMMANDS, json.dumps(list(codes))]
    done = run_program(argv, 60, **environ)
    told = [int(line) for line in done.stderr.splitlines() if line.isdecimal()]
    assert told == list(codes.values()), done.stdout + done.stderr
    assert done.stdout.count("Usage: ") == 3
    # Flask-Limiter's own commands need packages that are not installed.
    assert "ledger" in done.stdout
    assert "limiter" not in done.stdout
    assert not {"redis", "postgres"} & {path.name for path in tmp_path.iterdir()}


def test_seed_resets_everything(runner, client, buy, drain, admin_headers):
    client.post(
        "/products",
        json={"name": "Lamp", "priceCents": 1, "currency": "EUR", "stock": 3},
        headers=admin_headers,
    )
    buy(1, key="k")
    drain()
    buy(1, key="waiting")
    result = runner.invoke(args=["seed", "--yes"])
    assert result.exit_code == 0, result.output
    assert client.get("/purchase/metrics").json == {
        "stock_remaining": 100, "queue_depth": 0, "total_processed": 0,
    }  # fmt: skip
    assert [product["id"] for product in client.get("/products").json] == [1]
    assert client.get("/purchase/orders/1").json == []
    answer = buy(1, key="k")
    assert answer.json["orderId"] == 1
    assert "Idempotent-Replayed" not in answer.headers
    assert drain() == 1


def test_prepare_changes_nothing_the_second_time(runner, app, buy):
    runner.invoke(args=["prepare"])
    buy(1)
    result = runner.invoke(args=["prepare"])
    assert (result.exit_code, result.output) == (0, "")
    assert stock.view([1]).products[1]["free"] == 99


def test_staff(runner, app):
    with app.app_context():
        db.session.query(Staff).filter(Staff.email.like("%@cli.example")).delete()
        db.session.commit()
    args = ["staff", "create", "Ann@cli.example", "--role", "admin"]
    result = runner.invoke(args=args, input="long enough\nlong enough\n")
    assert result.exit_code == 0, result.output
    assert "ann@cli.example  admin" in runner.invoke(args=["staff", "list"]).output
    result = runner.invoke(args=args, input="long enough\nlong enough\n")
    assert result.exit_code == 1
    result = runner.invoke(args=["staff", "passwd", "ann@cli.example"], input="short\nshort\n")
    assert result.exit_code == 1
    assert "8 to 200" in result.output
    result = runner.invoke(
        args=["staff", "passwd", "ann@cli.example"], input="longer still\nlonger still\n"
    )
    assert result.exit_code == 0
    assert runner.invoke(args=["staff", "passwd", "no@body.example"], input="x").exit_code != 0


def test_tokens(runner, client, app):
    result = runner.invoke(args=["token", "create", "checkout", "--scope", "products:write"])
    assert result.exit_code == 0
    number, secret = result.output.removeprefix("Token ").strip().split(": ")
    headers = {"Authorization": f"Bearer {secret}"}
    body = {"productId": 1, "amount": 5}
    assert client.post("/products/restock", json=body, headers=headers).status_code == 200
    with app.app_context():
        entry = db.session.query(AuditEntry).order_by(AuditEntry.id.desc()).first()
    assert entry.actor == f"token {number} checkout"
    assert "checkout" in runner.invoke(args=["token", "list"]).output
    assert secret not in runner.invoke(args=["token", "list"]).output
    assert runner.invoke(args=["token", "revoke", number]).exit_code == 0
    assert client.post("/products/restock", json=body, headers=headers).status_code == 401
    assert runner.invoke(args=["token", "revoke", "99999"]).exit_code == 1


@pytest.mark.parametrize(
    "command",
    [
        ("stock", "correct", "1", "-5"),
        ("dead-letters", "replay", "1"),
        ("dead-letters", "abandon", "1", "--yes"),
    ],
)
@pytest.mark.parametrize("reason", ["", "  ", "x" * 501, "a\0b", "a\nb", "\u200b"])
def test_a_reason_is_refused_as_on_the_pages_never_cut(runner, app, command, reason):
    with app.app_context():
        before = db.session.query(AuditEntry).count()
        result = runner.invoke(args=[*command, "--reason", reason])
        assert result.exit_code == 2
        assert "reason must be" in result.output
        assert db.session.query(AuditEntry).count() == before
    assert stock.view([1]).products[1]["free"] == 100


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dead-letters list --limit -1", "-1 is not in the range"),
        ("dead-letters list --limit 0", "0 is not in the range"),
        ("orders cancel --product 1 --reason x --from soon", "'--from': it must be a time"),
        ("orders cancel --product 1 --reason x --to soon", "'--to': it must be a time"),
    ],
)
def test_wrong_options_are_told_by_their_names(runner, app, line, words):
    result = runner.invoke(args=line.split())
    assert result.exit_code == 2
    assert words in result.output.splitlines()[-1]


def test_a_correction_keeps_its_whole_reason(runner, app):
    reason = "x" * 500
    assert runner.invoke(args=["stock", "correct", "1", "-5", "--reason", reason]).exit_code == 0
    with app.app_context():
        movement = db.session.query(StockMovement).order_by(StockMovement.id.desc()).first()
        assert (movement.units, movement.reason) == (-5, reason)


def leaves(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *names, name)
        else:
            yield (*names, name)


# What a command needs so that it begins; others need nothing.
ARGUMENTS = {
    ("seed",): ["--yes"],
    ("rebuild",): ["--yes"],
    ("brake",): ["--yes"],
    ("ledger", "repair"): ["--yes"],
    ("orders", "cancel"): ["--product", "1", "--reason", "x", "--count", "0"],
    ("dead-letters", "replay"): ["1", "--reason", "x"],
    ("dead-letters", "abandon"): ["1", "--reason", "x", "--yes"],
    ("stock", "correct"): ["1", "1", "--reason", "x"],
    ("staff", "create"): ["ann@cli.example", "--password", "long enough"],
    ("staff", "passwd"): ["admin@example.com", "--password", "long enough"],
    ("token", "create"): ["t", "--scope", "*"],
    ("token", "revoke"): ["1"],
}
# Of one server it need not ask which node has what.
WITHOUT_SERVERS = {("cluster", "plan")}


def test_every_command_says_in_one_line_which_server_is_away(settings, tmp_path):
    file = tmp_path / "products.csv"
    file.write_text("name,price,currency,stock\nLamp,1,EUR,1\n")
    arguments = ARGUMENTS | {("products", "import"): [str(file), "--yes"]}
    app = create_app(
        replace(
            settings,
            redis_url="redis://127.0.0.1:1/0",
            jobs_redis_url=None,
            database_url="postgresql+psycopg2://u:secret@127.0.0.1:2/x",
        )
    )
    runner = app.test_cli_runner()
    for names in leaves(app.cli):
        if names[0] == "db" or names in WITHOUT_SERVERS:
            continue
        result = runner.invoke(args=[*names, *arguments.get(names, [])])
        assert (result.exit_code, type(result.exception)) == (1, SystemExit), names
        (line,) = result.output.splitlines()[-1:]
        assert line.startswith(("Error: Redis", "Error: PostgreSQL")), names
        assert "127.0.0.1:1" in line or "127.0.0.1:2" in line, names
        assert "secret" not in result.output
