"""The pages that a start leads to: where everything is, and the example for shoppers."""

from flask import Blueprint, abort, current_app, render_template
from flask.typing import ResponseReturnValue

from ..config import Settings, was_generated
from ..extensions import limiter
from .api import DOCS_POLICY

bp = Blueprint("front", __name__)

# Scripts, styles and answers of this host alone; its forms are sent by the script.
SHOP_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@bp.get("/")
@limiter.exempt
def show() -> ResponseReturnValue:
    """Links; and on a developer's machine how to sign in, as far as it was generated there."""
    settings: Settings = current_app.config["SETTINGS"]
    at_home = settings.app_env == "development"
    page = render_template(
        "front.html",
        shop=settings.has_shop_page,
        email=settings.admin_email if at_home else None,
        password_file=settings.data_dir / "admin_password"
        if at_home and was_generated(settings, "admin_password")
        else None,
    )
    return page, {"Content-Security-Policy": DOCS_POLICY}


@bp.get("/shop")
@limiter.exempt
def shop() -> ResponseReturnValue:
    """The example page for shoppers; all that it shows it asks the API for."""
    settings: Settings = current_app.config["SETTINGS"]
    if not settings.has_shop_page:
        abort(404)
    claim = settings.jwt_user_claim if settings.shopper_auth == "jwt" else None
    return render_template("shop.html", claim=claim), {"Content-Security-Policy": SHOP_POLICY}
