"""The client examples of docs/clients.md do what the document says, and are what it shows."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import urllib.request
from urllib.parse import quote

import pytest
from waiting import patience

from app.config import ROOT

DOCS = ROOT / "docs"
users = itertools.count(random.randrange(10**9, 2**52))


@pytest.fixture(params=["buy.py", "buy.js", "buy.sh"])
def client(request):
    """Run one of the examples; gives a function (arguments, environment) → finished process."""
    program, needs = {
        "buy.py": (sys.executable, sys.executable),
        "buy.js": ("node", "node"),
        "buy.sh": ("sh", "curl"),
    }[request.param]
    if not shutil.which(needs):
        pytest.skip(f"{needs} is not installed")

    def run(*arguments, **environment):
        return subprocess.run(
            [program, DOCS / "clients" / request.param, *map(str, arguments)],
            env=os.environ | {"no_proxy": "127.0.0.1"} | environment,
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )

    return run


@pytest.fixture
def product(server):
    """A product with three items."""
    body = {"name": "For a client", "priceCents": 100, "currency": "USD", "stock": 3}
    return call(server, "/products", body)["id"]


def call(server, path, body=None):
    request = urllib.request.Request(
        server.url + path,
        body and json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {server.api_token}"},
    )
    with urllib.request.urlopen(request, timeout=patience(10)) as response:
        return json.load(response)


def test_buys(client, server, product):
    user = next(users)
    bought = client(server.url, user, product, 2)
    assert bought.returncode == 0, bought.stderr
    orders = call(server, f"/purchase/orders/{user}")
    assert [(order["id"], order["quantity"]) for order in orders] == [(int(bought.stdout), 2)]


def test_buys_as_a_text(client, server, product):
    user = f"auth0|{next(users)}"
    bought = client(server.url, user, product)
    assert bought.returncode == 0, bought.stderr
    (order,) = call(server, f"/purchase/orders/{quote(user, safe='')}")
    assert order["id"] == int(bought.stdout)


def test_same_key_is_the_same_order(client, server, product):
    user = next(users)
    first, second = (client(server.url, user, product, KEY="one-intent") for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout == second.stdout
    assert len(call(server, f"/purchase/orders/{user}")) == 1


def test_sold_out_is_final(client, server, product):
    assert client(server.url, next(users), product, 3).returncode == 0
    refused = client(server.url, next(users), product)
    assert (refused.returncode, refused.stdout) == (1, "refused: sold_out\n")


def test_unknown_product_is_final(client, server):
    refused = client(server.url, next(users), 2**53 - 1)
    assert (refused.returncode, refused.stdout) == (1, "refused: unknown_product\n")


def test_no_answer_is_undecided(client):
    undecided = client("http://127.0.0.1:1", 1, 1, PATIENCE="1", KEY="one-intent")
    assert undecided.returncode == 3
    assert "KEY=one-intent" in undecided.stdout


def test_wrong_arguments(client):
    assert client("http://127.0.0.1:1").returncode == 2


@pytest.mark.parametrize(
    ("name", "language"), [("buy.py", "python"), ("buy.js", "javascript"), ("buy.sh", "sh")]
)
def test_document_shows_the_files(name, language):
    program = (DOCS / "clients" / name).read_text()
    assert f"```{language}\n{program}```\n" in (DOCS / "clients.md").read_text()
