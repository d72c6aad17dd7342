"""The API's description against the routes, the settings and the page made from it."""

import json
import re
import tomllib
from dataclasses import fields
from html.parser import HTMLParser

from app.config import ROOT, RateLimit, Settings
from app.models import ENDED_STATUSES
from app.products import terms
from app.web.errors import CODES
from app.web.openapi import document
from app.web.openapi.components import ERRORS, SCHEMAS

# Pages and their parts, which people use; static files.
NOT_JSON = re.compile(r"/(admin|static|rq)(/|$)|/(shop)?$|/favicon.ico$")


def documented() -> set[tuple[str, str]]:
    return {
        (method.upper(), re.sub(r"\{\w+\}", "{}", path))
        for path, item in document()["paths"].items()
        for method in item
    }


def routed(app) -> set[tuple[str, str]]:
    routes = {("POST", "/purchase")}  # the lane
    for rule in app.url_map.iter_rules():
        if not NOT_JSON.match(rule.rule):
            for method in rule.methods - {"HEAD", "OPTIONS"}:
                routes.add((method, re.sub(r"<[^>]+>", "{}", rule.rule)))
    return routes


def test_every_route_is_documented_and_nothing_else(built_app):
    assert documented() == routed(built_app)


def test_no_post_ignores_an_idempotency_key():
    posts = {path: item["post"] for path, item in document()["paths"].items() if "post" in item}
    assert len(posts) >= 3
    for path, post in posts.items():
        assert "Idempotency-Key" in {parameter["name"] for parameter in post["parameters"]}, path


def test_a_change_has_no_defaults():
    assert '"default"' not in json.dumps(SCHEMAS["ProductChange"])
    assert SCHEMAS["NewProduct"]["properties"]["maxQuantity"]["default"] == 10


def test_the_document_is_served_as_it_is(client):
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.json == json.loads(json.dumps(document()))
    assert answer.json["openapi"].startswith("3.1")


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert document()["info"]["version"] == project["version"]


def test_every_reference_leads_somewhere():
    text = json.dumps(document())
    for reference in set(re.findall(r'"\$ref": "#/([^"]+)"', text)):
        found = document()
        for part in reference.split("/"):
            found = found[part]
    names = [o["operationId"] for item in document()["paths"].values() for o in item.values()]
    assert len(names) == len(set(names))
    for link in re.findall(r'"operationId": "(\w+)", "parameters": \{"', text):
        assert link in names


def test_every_error_code_of_the_program_is_documented():
    codes = set()
    for path in (ROOT / "app").rglob("*.py"):
        source = path.read_text()
        codes |= set(re.findall(r'error_body\(\s*f?"[^"]*",\s*"([a-z_]+)"', source))
        # refusal() and Refused() begin with the status line, or a name for it.
        codes |= set(
            re.findall(r'efus(?:al|ed)\(\s*[^,]+,\s*f?(?:"[^"]*"|[A-Z]+),\s*"([a-z_]+)"', source)
        )
        codes |= set(re.findall(r'(?:show|api)_error\(\d+, [^,]+, "([a-z_]+)"', source))
        codes |= set(re.findall(r'super\(\).__init__\("[^"]*", "([a-z_]+)"\)', source))
    # What only a page of /admin, the framework's own statuses, or no operation's request leads to.
    elsewhere = {"method_not_allowed"}
    wire = {"not_implemented", "http_version_not_supported"}
    assert codes - set(ERRORS) <= elsewhere | wire
    codes |= set(CODES.values())
    # Some of those that a conflict has are met on pages alone.
    for path in (ROOT / "app").rglob("*.py"):
        found = re.findall(r'(?:Conflict|__init__)\(\s*f?"[^"]*",\s*"([a-z_]+)"', path.read_text())
        codes |= set(found)
    codes |= {
        f"{word}_{status.lower()}"
        for word in ("already", "order")
        for status in (*ENDED_STATUSES, "CONFIRMED")
    }
    assert set(ERRORS) <= codes


def test_bounds_are_the_programs_own():
    assert SCHEMAS["ProductChange"]["properties"].keys() == terms.TERMS.keys()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.links, self.scripts, self.ids = "", [], 0, set()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.scripts += tag == "script" or "style" in attributes

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_all_and_asks_nobody_else(client):
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert "'unsafe" not in answer.headers["Content-Security-Policy"]
    assert "script-src" not in answer.headers["Content-Security-Policy"]
    page = Page()
    page.feed(answer.text)
    assert page.scripts == 0
    for path, item in document()["paths"].items():
        assert path in page.text
        for operation in item.values():
            assert operation["operationId"] in page.ids
            assert operation["summary"] in page.text
    for code in ERRORS:
        assert code in page.text
    for link in page.links:
        assert link.startswith(("#", "/", "data:,")), link
        if link.startswith("/"):
            # No worker runs here, and readiness says so.
            wanted = 503 if link in ("/readyz", "/health") else 200
            assert client.get(link).status_code == wanted
        elif link.startswith("#"):
            assert link[1:] in page.ids


def settings_text() -> str:
    paths = (ROOT / "README.md", ROOT / "docs" / "settings.md")
    return "\n".join(path.read_text() for path in paths if path.exists())


def test_every_setting_is_in_the_table():
    wrong = []
    for entry in fields(Settings):
        if not entry.metadata:
            continue
        name, default = entry.metadata["name"], entry.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        lines = [line for line in settings_text().splitlines() if f"`{name}`" in line]
        lines = [line for line in lines if line.startswith("|")]
        if not lines:
            wrong.append(f"{name} is missing")
        elif isinstance(default, (int, str)) and str(default) not in lines[0].replace(",", ""):
            wrong.append(f"the default of {name}, {default}, is missing")
        elif isinstance(default, RateLimit):
            limit = f"{default.count}/minute" if default else "off"
            if limit not in lines[0]:
                wrong.append(f"the default of {name}, {limit}, is missing")
    assert not wrong
