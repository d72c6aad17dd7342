"""The address that a start prints leads somewhere."""

import re
from dataclasses import replace

import pytest
from system import PRODUCTION

from app.config import with_secrets


def test_every_link_leads_somewhere(client):
    page = client.get("/")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    links = re.findall(r'href="(/[^"]*)"', page.text)
    assert {"/admin/", "/docs", "/openapi.json"} <= set(links)
    for link in links:
        # No worker is there.
        wanted = {503} if link == "/readyz" else {200, 302}
        assert client.get(link).status_code in wanted, link


def test_at_home_it_says_how_to_sign_in(make_app, settings, tmp_path):
    given = with_secrets(replace(settings, data_dir=tmp_path, admin_password=None))
    page = make_app(data_dir=tmp_path, admin_password=None).test_client().get("/").text
    assert settings.admin_email in page
    assert f"{tmp_path}/admin_password" in page
    assert given.admin_password not in page
    # One that was given stands in no file.
    assert "admin_password" not in make_app().test_client().get("/").text


def test_in_production_it_tells_nobody(make_app):
    names = ("secret_key", "admin_email", "admin_password", "admin_api_token", "metrics_token")
    given = {name: PRODUCTION[name.upper()] for name in names}
    page = make_app(app_env="production", **given).test_client().get("/")
    assert page.status_code == 200
    for word in (*given.values(), "admin_password", "The first admin"):
        assert word not in page.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_nothing_else_is_there(client, method):
    answer = client.open("/", method=method)
    assert (answer.status_code, answer.json["code"]) == (405, "method_not_allowed")
    assert client.get("/nowhere").json["code"] == "not_found"
