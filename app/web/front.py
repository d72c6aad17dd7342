"""The page at the address that a start prints: where everything is."""

from flask import Blueprint, current_app, render_template
from flask.typing import ResponseReturnValue

from ..config import Settings, was_generated
from ..extensions import limiter
from .api import DOCS_POLICY

bp = Blueprint("front", __name__)


@bp.get("/")
@limiter.exempt
def show() -> ResponseReturnValue:
    """Links; and on a developer's machine how to sign in, as far as it was generated there."""
    settings: Settings = current_app.config["SETTINGS"]
    at_home = settings.app_env == "development"
    page = render_template(
        "front.html",
        email=settings.admin_email if at_home else None,
        password_file=settings.data_dir / "admin_password"
        if at_home and was_generated(settings, "admin_password")
        else None,
    )
    return page, {"Content-Security-Policy": DOCS_POLICY}
