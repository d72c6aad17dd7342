"""What the tests of the pages share: people, forms, and what htmx sends along."""

import re
from html.parser import HTMLParser

from app.audit import CLI
from app.extensions import db
from app.models import Staff
from app.staff import people

PASSWORD = "correct horse battery"
API_TOKEN = "test-token-0123456789"
BROWSER = {"HX-Request": "true"}


def create_person(app, role: str) -> str:
    """Make sure of a person with this role, active and with the tests' password."""
    email = f"{role}-page@example.com"
    with app.app_context():
        db.session.query(Staff).filter_by(email=email).delete()
        db.session.commit()
        people.create(email, PASSWORD, role, CLI)
    return email


def csrf_token(client, path: str = "/admin/password") -> str:
    return re.search(r'name="csrf_token" value="([^"]+)"', client.get(path).text)[1]


def sign_in(client, email="admin-page@example.com", password=PASSWORD, **more):
    data = {"email": email, "password": password, **more}
    return client.post(
        "/admin/sign-in", data=data | {"csrf_token": csrf_token(client, "/admin/sign-in")}
    )


def cookie_name(app, url: str = "http://localhost") -> str:
    """Return the name of the session's cookie."""
    with app.test_request_context("/admin/", base_url=url):
        return app.session_interface.get_cookie_name(app)


_cookies: dict[str, str] = {}


def sign_in_once(app, browser, role: str) -> None:
    """Sign in, by an earlier test's session where it still holds: passwords are slow by design."""
    if role in _cookies:
        browser.set_cookie(cookie_name(app), _cookies[role], path="/admin")
        if browser.get("/admin/password").status_code == 200:
            return
    sign_in(browser, create_person(app, role))
    _cookies[role] = browser.get_cookie(cookie_name(app), path="/admin").value


class _Fields(HTMLParser):
    def __init__(self):
        super().__init__()
        self.values = {}
        self.select = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "select":
            self.select = attributes["name"]
        if tag == "option" and "selected" in attributes:
            self.values[self.select] = attributes["value"]
        if tag == "input" and "name" in attributes:
            self.values[attributes["name"]] = attributes.get("value", "")


def fields_of(answer) -> dict[str, str]:
    """Return what a browser without a script would send back of the forms on a page."""
    page = _Fields()
    page.feed(answer.text[answer.text.index("<main") : answer.text.index("</main")])
    return page.values


def scripted(fields: dict[str, str], **instants: str) -> dict[str, str]:
    """Return the fields as the page's script sends them: the instants that were typed, twice."""
    exact = {f"{name}_at": instant for name, instant in instants.items()}
    return fields | exact | {name: instant[:19] for name, instant in instants.items()}


def send(client, path: str, headers: dict | None = None, **data):
    """Send a form of a signed-in person."""
    return client.post(path, data=data | {"csrf_token": csrf_token(client)}, headers=headers)
